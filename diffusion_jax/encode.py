"""COMMAND: the features of a data set, made once and kept: what samples are scored against."""
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from diffusion_jax.data import sources
from diffusion_jax.metrics import features, frechet, reference, weights
from diffusion_jax.metrics.features import Extractor
from diffusion_jax.metrics.reference import Reference
from diffusion_jax.model import default_config, open_data
from diffusion_jax.runtime import backend, command, log
from diffusion_jax.runtime.config import UserError, explain, from_json

KEPT = 50_000  # features kept beside the moments; of more images, a random part
OUTPUTS = ('features', 'sfid')  # whose moments are kept


def encode(source: sources.Source, extractor: Extractor, max_bad: int) -> Reference:
  """The reference of all images of a source, made now, or found in the cache.

  It is kept there by what it is made from, the SHA-256 of the images and that of the extractor, so that it is made once
  and never stale.
  """
  digest, count = identify(source, max_bad)
  folder = weights.cache() / 'references'
  path = folder / f'{digest[:16]}-{extractor.name}-{extractor.digest[:16]}.safetensors'
  about = {'reference': f'{source.name}/{source.split}', 'reference_hash': digest, 'reference_samples': count,
           'features': extractor.name, 'features_hash': extractor.digest, 'shape': list(source.shape)}
  if path.is_file():
    try:
      found = reference.load(path)
      if found.about['reference_hash'] == digest and found.about['features_hash'] == extractor.digest:
        return found._replace(about={**found.about, **about})  # the same images may go by another name
    except (OSError, ValueError, KeyError):
      pass  # damaged: it is made again
  chosen = np.ones(count, bool)
  if count > KEPT:
    chosen[np.random.RandomState(0).permutation(count)[KEPT:]] = False
  parts, kept, at = {}, [], 0
  for images, _ in sources.batches(source, max_bad):
    seen = extractor.extract(images)
    kept.append(seen['features'][chosen[at:at + len(images)]])
    for output in OUTPUTS:
      if output in seen:
        new = frechet.partial_moments(seen[output])
        parts[output] = frechet.merge([parts[output], new]) if output in parts else new
    at += len(images)
  found = Reference(about | {'time': log.now(), **log.provenance()}, parts, np.concatenate(kept))
  weights.keep(path, reference.to_bytes(found))
  return found


def identify(source: sources.Source, max_bad: int) -> tuple[str, int]:
  """(SHA-256 of the images and labels as `sources.digest` gives it, how many good images there are)."""
  count = len(source)
  for _ in range(2):  # the count comes first in the hash: bad records show themselves in the first pass
    sizes = []

    def pieces(sizes=sizes):
      for images, labels in sources.batches(source, max_bad):
        sizes.append(len(labels))
        yield images, labels

    digest = sources.digest_batches(pieces(), (count, *source.shape))
    if sum(sizes) == count:
      return digest, count
    count = sum(sizes)
  raise OSError(f'{source.name} changes while it is read: {count} images, then {sum(sizes)}')


def main(argv: Sequence[str] | None = None) -> int:
  """`diffusion-jax encode`: see --help."""
  p = command.parser('encode', 'Makes the statistics of a data set that samples are scored against.')
  p.add_argument('--features', required=True, help=f"{', '.join(features.names())}; inception:FILE names its weights")
  p.add_argument('--workdir', help='the data of this run')
  p.add_argument('--source', help='or this data: digits, folder:PATH, zip:PATH, npz:PATH, tfds:NAME')
  p.add_argument('--split', default='train', help='which part of it (default train)')
  p.add_argument('--size', type=int, help='images are resized and cropped to SIZE x SIZE')
  p.add_argument('--channels', type=int, help='1, 3 or 4 (default 3)')
  p.add_argument('--data_dir', help='where TFDS keeps its data')
  p.add_argument('--manual_dir', help='where archives that you fetched lie')
  p.add_argument('--out', help='FILE.safetensors (default: kept where evaluate finds it)')
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError(f'encode takes no config: --config.{next(iter(overrides))} is for train')
  backend.prepare(features.BATCH)
  backend.keep_memory(features.SHAPE)
  if bool(flags.workdir) == bool(flags.source):
    raise UserError('give either --workdir, a run whose data is meant, or --source')
  if flags.out and not flags.out.endswith('.safetensors'):
    raise UserError(f'--out must be a .safetensors file, got {flags.out!r}')
  data = (from_json(pathlib.Path(flags.workdir) / 'config.json') if flags.workdir else default_config()).data
  for key in ('source', 'size', 'channels', 'data_dir', 'manual_dir'):
    if getattr(flags, key) is not None:
      data[key] = getattr(flags, key)
  with explain('--features'):
    extractor = features.make(flags.features)
  with explain('encode'):
    found = encode(open_data(data, flags.split), extractor, data.max_bad)
  if flags.out:
    log.write(pathlib.Path(flags.out), reference.to_bytes(found))
  about = found.about
  print(f"{about['reference_samples']:,} images of {about['reference']} (SHA-256 {about['reference_hash'][:12]}) as "
        f"{extractor.name} ({extractor.digest[:12]}) sees them -> {flags.out or weights.cache() / 'references'}")
  return 0


if __name__ == '__main__':
  sys.exit(command.run(main))
