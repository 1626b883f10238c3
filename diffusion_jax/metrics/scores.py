"""All scores of a set of samples against a reference, each with its interval, and named by how many samples it took.

A name without a number stands for 50,000 samples; `fid_5k` was measured with 5,000, and compares with nothing else.
"""
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.metrics import frechet, intervals
from diffusion_jax.metrics.frechet import Moments
from diffusion_jax.metrics.inception_score import inception_score
from diffusion_jax.metrics.kernel import kid, mmd2_blocks
from diffusion_jax.metrics.precision_recall import neighbours
from diffusion_jax.metrics.reference import Reference

__all__ = ['DEFAULTS', 'KINDS', 'Score', 'available', 'carried', 'floor', 'named', 'psnr', 'scores']
STANDARD = 50_000      # samples that a name does not mention
NEIGHBOURS = 10_000    # samples on each side for what rests on nearest neighbours, as Dhariwal & Nichol (2021) take
KS = 3, 5              # which nearest neighbour: of precision and recall, of density and coverage
# What is scored in the features of each extractor if nothing else is asked for.
DEFAULTS = {'inception': ('fd', 'sfd', 'kid', 'is', 'neighbours'),
            'dinov2': ('fd', 'kid', 'neighbours'), 'digits': ('fd', 'accuracy'), 'cifar': ('fd', 'accuracy'),
            'pixels': ('fd',)}


class Score(NamedTuple):
  """A value under its name, its 95 % interval if there is one, and what else must be known to read it."""
  metric: str
  value: float
  ci: tuple[float, float] | None
  details: dict[str, Any]


def named(kind: str, extractor: str, samples: int) -> str:
  """'fid' of 50,000 samples, 'fid_5k', 'fd_digits_500', 'precision_10k'."""
  if extractor == 'inception':
    base = {'fd': 'fid', 'sfd': 'sfid', 'fd_infinity': 'fid_infinity'}.get(kind, kind)
  else:
    base = f'{kind}_{extractor}'
  return base + carried(samples)


def carried(samples: int) -> str:
  """What a name says of the number of samples: '' of 50,000, '_5k', '_500'."""
  if samples == STANDARD:
    return ''
  return f'_{samples // 1000}k' if samples % 1000 == 0 else f'_{samples}'


def scores(extractor: str, found: Mapping[str, np.ndarray], ref: Reference, labels: Sequence[int] | None,
           kinds: Sequence[str]) -> list[Score]:
  """The scores `kinds` of samples whose outputs of the extractor are `found` {'features': [N, D], ...}.

  labels [N]: what each sample was asked to be; accuracy needs them and the extractor's logits. kid and neighbours
  (precision, recall, density, coverage) need the reference's features. Raises ValueError for a kind that cannot be had,
  saying why.
  """
  made = []
  for kind in kinds:
    if kind not in KINDS:
      raise ValueError(f'there is no metric {kind!r}: choose from {", ".join(KINDS)}')
    if reason := _lacks(kind, extractor, found, ref, labels):
      raise ValueError(f'the metric {kind!r} needs {reason}')
    for name, samples, value, ci, details in KINDS[kind](found, ref, labels):
      made.append(Score(named(name, extractor, samples), value, ci, details))
  return made


def floor(extractor: str, held_out: np.ndarray, ref: Reference) -> Score:
  """The Fréchet distance of real images [N, D] that the reference does not hold: what a perfect model would get."""
  value, ci = _distance(ref.moments['features'], held_out)
  return Score(f'{named("fd", extractor, len(held_out))}_floor', value, ci, {'floor_samples': len(held_out)})


def psnr(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Score:
  """The mean of 10 log10(255² / squared error) dB over at least two samples, of batches of (samples, truth).

  Both are uint8 [b, *S, C]. A squared error below 1/12, that of rounding, counts as that: 58.9 dB are all there is.
  """
  errors = np.concatenate([np.mean((a.astype(np.float64) - b) ** 2, axis=tuple(range(1, a.ndim))) for a, b in pairs])
  values = 10 * np.log10(255 ** 2 / np.maximum(errors, 1 / 12))
  mean, n = float(values.mean()), len(values)
  spread = intervals.student(n - 1) * float(values.std(ddof=1)) / math.sqrt(n)
  return Score(f'psnr{carried(n)}', mean, (mean - spread, mean + spread), {})


def available(kinds: Sequence[str], extractor: str, found: Mapping[str, np.ndarray], ref: Reference,
              labels: Sequence[int] | None) -> list[str]:
  """Those of `kinds` that `scores` can give."""
  return [kind for kind in kinds if not _lacks(kind, extractor, found, ref, labels)]


def _lacks(kind, extractor, found, ref, labels):
  """What a kind needs and does not have, '' if nothing."""
  if kind == 'sfd' and not ('sfid' in found and 'sfid' in ref.moments):
    return f"Inception's spatial features of the samples and of the reference, got those of {extractor}"
  if kind == 'is' and extractor != 'inception':
    return f"Inception's logits, got the features of {extractor}"
  if kind == 'accuracy' and ('logits' not in found or extractor == 'inception'):
    return f'a classifier of the data, digits or cifar, got {extractor}'
  if kind == 'accuracy' and labels is None:
    return 'samples that were asked to be of a class that the classifier knows, got none'
  if kind in ('kid', 'neighbours') and ref.features is None:
    return "the reference's features, not only their moments: make the reference with diffusion-jax encode"
  if kind == 'neighbours' and min(len(found['features']), len(ref.features)) <= max(KS):
    return f"more than {max(KS)} samples and reference images, got {len(found['features'])} and {len(ref.features)}"
  return ''


def _fd(found, ref, labels, name='fd', output='features'):
  x = found[output]
  return [(name, len(x), *_distance(ref.moments[output], x), {})]


def _sfd(found, ref, labels):
  return _fd(found, ref, labels, 'sfd', 'sfid')


def _fd_infinity(found, ref, labels):
  line = frechet.frechet_infinity(ref.moments['features'], found['features'])
  return [('fd_infinity', len(found['features']), line.value, line.ci, {'slope': line.slope})]


def _kid(found, ref, labels):
  x, y = found['features'], ref.features
  size = min(1000, len(x), len(y))
  value = kid(x, y, subset_size=size)
  details = {'subsets': 100, 'subset_size': size, 'std': value.std}
  return [('kid', len(x), value.mean, _kid_interval(value.mean, x, y), details)]


def _is(found, ref, labels):
  n = len(found['logits'])
  splits = min(10, n)
  value = inception_score(found['logits'], splits)
  return [('is', n, value.mean, value.ci, {'splits': splits, 'std': value.std})]


def _accuracy(found, ref, labels):
  right = int((found['logits'].argmax(1) == np.asarray(labels)).sum())
  return [('accuracy', len(labels), right / len(labels), intervals.proportion(right, len(labels)), {})]


def _neighbours(found, ref, labels):
  n = min(NEIGHBOURS, len(found['features']), len(ref.features))
  both = neighbours(found['features'][:n], _subset(ref.features, n), KS)
  return [(name, n, value, ci, {'k': k}) for part, k in zip(both, KS, strict=True)
          for name, (value, ci) in part._asdict().items()]


# What can be scored: extractor's outputs, reference, labels -> (name, samples, value, interval, details) of each value.
KINDS = {'fd': _fd, 'sfd': _sfd, 'fd_infinity': _fd_infinity, 'kid': _kid, 'is': _is,
         'neighbours': _neighbours, 'accuracy': _accuracy}


def _distance(reference: Moments, x):
  """The distance and its interval, None for fewer than 4 samples."""
  if len(x) < 4:
    return frechet.frechet_distance(frechet.moments(x), reference), None
  return frechet.frechet_estimate(reference, x)


def _kid_interval(value, x, y):
  """value -+ the half-width of the mean over disjoint blocks; None where there are too few samples for ten of them."""
  n = min(len(x), len(y))
  if n < 100:
    return None
  low, high = mmd2_blocks(x, y, min(1000, n // 10)).ci
  return value - (high - low) / 2, value + (high - low) / 2


def _subset(features, n):
  """n of the features, by chance and the same ones each time: the reference may be sorted by class."""
  if n == len(features):
    return features
  return features[np.sort(np.random.RandomState(0).permutation(len(features))[:n])]
