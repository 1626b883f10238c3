"""COMMAND: scores images that lie somewhere against a reference: those that sample wrote, or another program's.

evaluate, which scores the samples of a run, builds on what is here.
"""
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data import sources
from diffusion_jax.metrics import features, reference, scores
from diffusion_jax.metrics.features import Extractor
from diffusion_jax.metrics.reference import Reference
from diffusion_jax.runtime import backend, command, log
from diffusion_jax.runtime.config import UserError, explain, nearest

FEATURES = (f"what looks at the images, one or several of {', '.join(features.names())}; inception:FILE and "
            'dinov2:FILE name the weights')


class Against(NamedTuple):
  """What samples are scored by: a network, the reference, real images that the reference does not hold."""
  extractor: Extractor
  ref: Reference
  held_out: np.ndarray | None  # features [M, D]
  kinds: tuple[str, ...]       # what is scored
  asked: bool                  # whether the user asked for these kinds: one that cannot be had is then an error


def kinds_of(flag: str | None, extractor: Extractor) -> tuple[str, ...]:
  """The kinds of scores that --metrics asks for, or the extractor's own; UserError for one that does not exist."""
  if not flag:
    return scores.DEFAULTS[extractor.name]
  for kind in (kinds := tuple(flag.split(','))):
    if kind not in scores.KINDS:
      raise UserError(f'--metrics: there is no metric {kind!r}{nearest(kind, scores.KINDS)}')
  return kinds


def given(flag: str, extractor: Extractor) -> Reference:
  """The reference for the extractor among the files, comma-separated, of --reference; UserError if there is none."""
  with explain('--reference'):
    refs = [reference.load(path) for path in flag.split(',')]
  of_name = [ref for ref in refs if ref.about.get('features') == extractor.name]
  if not of_name:
    raise UserError(f'--reference={flag} holds features {", ".join(str(r.about.get("features")) for r in refs)}, and '
                    f'--features asks for {extractor.name}: make a reference with diffusion-jax encode')
  ref = of_name[0]
  if ref.about['features_hash'] not in (None, extractor.digest):
    raise UserError(f'the reference was made with the weights {ref.about["features_hash"][:12]} of {extractor.name}, '
                    f'and these are {extractor.digest[:12]}: use the same file for both')
  return ref


def score(seen: Mapping[str, np.ndarray], against: Against, labels: Sequence[int] | None) -> list[dict[str, Any]]:
  """The quality lines of samples with the outputs `seen`, the floor among them."""
  extractor, ref, kinds = against.extractor, against.ref, against.kinds
  if not against.asked:
    kinds = scores.available(kinds, extractor.name, seen, ref, labels)
  made = scores.scores(extractor.name, seen, ref, labels, kinds)
  if against.held_out is not None and 'fd' in kinds:
    made.append(scores.floor(extractor.name, against.held_out, ref))
  return [{'metric': s.metric, 'value': s.value, 'ci': s.ci, 'unit': '', **s.details} for s in made]


def show(records: Sequence[Mapping[str, Any]]) -> None:
  """Prints a line for each value."""
  for record in records:
    interval = '' if record['ci'] is None else f' [{record["ci"][0]:.4g}, {record["ci"][1]:.4g}]'
    print(f'{record["metric"]:>28}: {record["value"]:.4g}{interval} {record["unit"]}'.rstrip())


def main(argv: Sequence[str] | None = None) -> int:
  """`diffusion-jax score`: see --help."""
  p = command.parser('score', 'Scores images against a reference that encode made.')
  p.add_argument('--samples', required=True, help='folder:PATH, zip:PATH or npz:PATH')
  p.add_argument('--reference', required=True, help='FILE of encode, or .npz with mu and sigma; one for each features')
  p.add_argument('--features', required=True, help=FEATURES)
  p.add_argument('--metrics', help=f"which of {', '.join(scores.KINDS)} (default: by the features)")
  p.add_argument('--num', type=int, help='only the first N images')
  p.add_argument('--out', help='a .jsonl file that gets a line for each value')
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError(f'score takes no config: --config.{next(iter(overrides))} is for train')
  backend.prepare(features.BATCH)
  backend.keep_memory(features.SHAPE)
  against = []
  for text in flags.features.split(','):
    with explain('--features'):
      extractor = features.make(text)
    against.append(Against(extractor, given(flags.reference, extractor), None, kinds_of(flags.metrics, extractor),
                           bool(flags.metrics)))
  images, digest = _images(flags, against[0].ref.about.get('shape'))
  lines = []
  for one in against:
    ref = one.ref.about
    with explain('--samples'):
      made = score(one.extractor.extract(images), one, None)
    lines += [{**{key: ref[key] for key in ('reference', 'reference_hash', 'reference_samples')},
               'features': one.extractor.name, 'features_hash': one.extractor.digest, 'samples': flags.samples,
               'samples_hash': digest, 'num_samples': len(images), 'quantisation': 'as given',
               'ci_level': 0.95 if line['ci'] else None, **line, 'time': log.now(), **log.provenance()}
              for line in made]
  if flags.out:
    log.append(pathlib.Path(flags.out), *lines)
  print(f'{len(images):,} images of {flags.samples}')
  show(lines)
  return 0


def _images(flags, shape):
  """The images uint8 [N, *S, C], which must have `shape` (*S, C), and the SHA-256 of them and their labels."""
  with explain('--samples'):
    images, labels = sources.arrays(sources.load(flags.samples, channels=shape[-1] if shape else 3))
  if flags.num is not None and not 2 <= flags.num <= len(images):
    raise UserError(f'--num must lie from 2 to the {len(images)} images of {flags.samples}, got {flags.num}')
  images, labels = images[:flags.num], labels[:flags.num]
  if shape and shape != list(images.shape[1:]):
    raise UserError(f'the samples have the shape {list(images.shape[1:])} and the images of the reference {shape}: '
                    f'make both of one size')
  return images, sources.digest(images, labels)


if __name__ == '__main__':
  sys.exit(command.run(main))
