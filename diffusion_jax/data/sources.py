"""Where images come from: `load(name, split)` returns a Source, labelled uint8 images by index, wherever they lie.

digits               scikit-learn's 8x8 digits, 1297 for training and 500 held out; needs no download
folder:PATH          images below PATH, class by sub-folder; PATH/train and PATH/test are splits if they exist
                     captions in captions.jsonl, metadata.jsonl or FILE.txt are the class names instead (captions.py)
zip:PATH             the same, in a zip file
npz:PATH             arrays image uint8 [N,*S,C] and label int [N], in one file or in PATH/train.npz and PATH/test.npz
tfds:NAME            a TensorFlow Datasets directory prepared as array_record; cifar10 is prepared here if it is missing
synthetic:HxWxC[:N]  N procedural images of coloured blobs, of one to three spatial axes

PATH, and the data_dir of TFDS, may be in a bucket, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER: see remote.py.
Shapes: *S one to three spatial axes, C channels last. Every image is uint8 in [0, 255], every label an int.
"""
import difflib
import hashlib
import importlib.util
import math
import pathlib
import re
import warnings
import zipfile
import zlib
from concurrent import futures

import numpy as np

from diffusion_jax.data import remote

KINDS = {'digits': 'digits', 'folder': 'folder:PATH', 'zip': 'zip:PATH', 'npz': 'npz:PATH', 'tfds': 'tfds:NAME',
         'synthetic': 'synthetic:HxWxC'}
SPLITS = ('train', 'test', 'val')


class BadRecord(ValueError):
  """One record that cannot be used; the message names it and says why."""


class Source:
  """Images by index: source[i] -> (image uint8 [*S,C], label int), or BadRecord.

  name, split   as given to load
  shape         (*S, C) of every image
  class_names   list of str, empty when the images carry no labels (every label is then 0)

  Subclasses define __len__ and __getitem__, are safe to read from several threads, and can be pickled.
  """

  def __init__(self, name, split, shape, class_names):
    self.name, self.split, self.class_names = name, split, list(class_names)
    self.shape = tuple(int(n) for n in shape)

  @property
  def num_classes(self):
    """Number of classes, 0 when the images carry no labels."""
    return len(self.class_names)

  @property
  def nbytes(self):
    """Bytes that all the images take in memory as uint8."""
    return len(self) * math.prod(self.shape)


class Arrays(Source):
  """Images [N,*S,C] uint8 and labels [N] that are already in memory."""

  def __init__(self, name, split, images, labels, class_names):
    super().__init__(name, split, images.shape[1:], class_names)
    self.images, self.labels = images, labels.astype(np.int32)

  def __len__(self):
    return len(self.images)

  def __getitem__(self, i):
    return self.images[i], int(self.labels[i])


class Synthetic(Source):
  """Procedural images [*shape] of one to three coloured blobs; image i is a function of (split, i) alone."""

  def __init__(self, name, split, shape, num_examples):
    super().__init__(name, split, shape, [f'hue{k}' for k in range(4)])
    self.num_examples = num_examples

  def __len__(self):
    return self.num_examples

  def __getitem__(self, i):
    if not 0 <= i < self.num_examples:
      raise IndexError(i)
    rng = np.random.default_rng([zlib.crc32(self.split.encode()), int(i)])
    label = int(i) % self.num_classes
    # The class sets the colour: a hue among three channels, and still a distinct brightness in one.
    colour = 0.6 + 0.4 * np.cos(np.pi * label / self.num_classes + 2 * np.pi * np.arange(self.shape[-1]) / 3)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in self.shape[:-1]], indexing='ij')
    image = np.full(self.shape, rng.uniform(0.0, 0.2))
    for _ in range(rng.integers(1, 4)):
      centre, radius = rng.uniform(-0.7, 0.7, len(axes)), rng.uniform(0.2, 0.5)
      bump = np.exp(-sum((x - c) ** 2 for x, c in zip(axes, centre, strict=True)) / (2 * radius ** 2))
      image += (colour - image) * bump[..., None]
    return np.round(255 * image.clip(0, 1)).astype(np.uint8), label


def load(name, split='train', *, size=0, channels=3, data_dir='', manual_dir='', max_bad=10):
  """Opens the source `name` (see the top of this file) and returns it as a Source.

  size        folder, zip, tfds: resize the shorter side to it and crop the centre; 0 keeps the images as they are, and
              then all must have one shape
  channels    folder, zip: 1, 3 or 4; an image of another channel count is a bad record (the other kinds know theirs)
  data_dir    tfds: where data sets are prepared, '' for TFDS's own default
  manual_dir  tfds:cifar10: where the downloaded archive lies, '' for <data_dir>/downloads/manual
  max_bad     folder, zip, tfds: how many bad records may come before the first good one, which decides the shape

  Raises FileNotFoundError when something is missing and ValueError when something is wrong, each in one sentence.
  """
  # images.py builds on this file, so it is imported when it is needed.
  from diffusion_jax.data import images
  kind, _, rest = name.partition(':')
  if kind not in KINDS:
    close = difflib.get_close_matches(kind, [*KINDS, 'tfds:cifar10'], n=1)
    hint = f'; did you mean {close[0]}?' if close else '.'
    raise ValueError(f'There is no data source {name!r}, only {", ".join(KINDS.values())}{hint}')
  if bool(rest) != (':' in KINDS[kind]):
    raise ValueError(f'The data source {name!r} is incomplete or has too much: write it as {KINDS[kind]}.')
  if kind == 'digits':
    return _digits(name, split)
  if kind == 'npz':
    return _npz(name, split, remote.path(rest))
  if kind == 'synthetic':
    return _synthetic(name, split, rest)
  options = {'size': size, 'channels': channels, 'max_bad': max_bad}
  if kind == 'tfds':
    return images.Tfds(name, split, rest, data_dir, manual_dir, **options)
  return {'folder': images.Folder, 'zip': images.Zip}[kind](name, split, remote.path(rest), **options)


def batches(source, max_bad=10, size=1024):
  """Decodes a source piece by piece: yields (images uint8 [b,*S,C], labels int32 [b]), b at most `size`, in order.

  Bad records are left out; up to max_bad of them cost one warning that names them, more raise ValueError.
  """
  if isinstance(source, Arrays):
    for start in range(0, len(source), size):
      yield source.images[start:start + size], source.labels[start:start + size]
    return

  def read(i):
    try:
      return source[i]
    except BadRecord as error:
      return error

  bad = []
  with futures.ThreadPoolExecutor() as pool:
    for start in range(0, len(source), size):
      records = list(pool.map(read, range(start, min(start + size, len(source)))))
      bad += [str(record) for record in records if isinstance(record, BadRecord)]
      check_bad(source, bad, max_bad)
      good = [record for record in records if not isinstance(record, BadRecord)]
      if good:
        yield np.stack([image for image, _ in good]), np.asarray([label for _, label in good], np.int32)
  if bad:
    more = f' and {len(bad) - 5} more' if len(bad) > 5 else ''
    warnings.warn(f'{len(bad)} bad records of {source.name} are left out: {"; ".join(bad[:5])}{more}', stacklevel=2)


def arrays(source, max_bad=10):
  """Decodes a whole source into memory: (images uint8 [M,*S,C], labels int32 [M]), in record order.

  Bad records are treated as by `batches`, so M may be smaller than len(source).
  """
  if isinstance(source, Arrays):
    return source.images, source.labels
  images, labels = np.empty((len(source), *source.shape), np.uint8), []
  for batch, classes in batches(source, max_bad):
    images[len(labels):len(labels) + len(batch)] = batch
    labels += classes.tolist()
  return images[:len(labels)], np.asarray(labels, np.int32)


def check_bad(source, bad, max_bad):
  """Raises ValueError when `bad`, messages of bad records, are more than max_bad or all that the source has."""
  if len(bad) == len(source):
    raise ValueError(f'All {len(bad)} records of {source.name} are bad: {"; ".join(bad[:3])}; repair or replace them.')
  if len(bad) > max_bad:
    raise ValueError(f'At least {len(bad)} of the {len(source)} records of {source.name} are bad and {max_bad} are '
                     f'allowed: {"; ".join(bad[:3])}; repair or remove them, or raise data.max_bad.')


def digest(images, labels):
  """Identifies a data set: hex SHA-256 over images uint8 [N,*S,C] and labels [N], in order."""
  return digest_batches([(images, labels)], images.shape)


def digest_batches(parts, shape):
  """`digest` of a data set of the shape (N,*S,C) that comes in pieces (images, labels)."""
  sha, every = hashlib.sha256(repr(tuple(shape)).encode()), []
  for images, labels in parts:
    sha.update(np.ascontiguousarray(images, np.uint8).reshape(-1))
    every.append(np.ascontiguousarray(labels, '<i4').reshape(-1))
  for labels in every:
    sha.update(labels)
  return sha.hexdigest()


def permutation(entropy, n):
  """A permutation of range(n), int64 [n], that is a function of the ints in `entropy` alone.

  It sorts the raw bits of Philox, which numpy promises never to change, unlike the methods of Generator: a resumed run
  sees the same order, and a held-out split stays held out, under another version of numpy.
  """
  return np.argsort(np.random.Philox(np.random.SeedSequence(entropy)).random_raw(n), kind='stable')


def no_split(name, split, known):
  """The ValueError for a split that `name` does not have."""
  return ValueError(f'{name} has no split {split!r}; it has {", ".join(sorted(known))}.')


def _digits(name, split):
  # scikit-learn's file, without scikit-learn: its import takes longer than all else that a run does with the digits.
  folder = pathlib.Path(importlib.util.find_spec('sklearn').origin).parent
  table = np.loadtxt(folder / 'datasets' / 'data' / 'digits.csv.gz', delimiter=',')
  order = permutation([0], len(table))
  splits = {'train': order[:1297], 'test': order[1297:]}
  if split not in splits:
    raise no_split(name, split, splits)
  chosen = table[splits[split]]
  images = np.round(chosen[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
  return Arrays(name, split, images, chosen[:, -1].astype(int), [str(k) for k in range(10)])


def _synthetic(name, split, rest):
  match = re.fullmatch(r'(\d+(?:x\d+){1,3})(?::(\d+))?', rest)
  shape = [int(n) for n in match[1].split('x')] if match else []
  num_examples = int(match[2] or 1024) if match else 0
  if not shape or min(*shape, num_examples) < 1:
    raise ValueError(f'The data source {name!r} must be synthetic:HxWxC or synthetic:HxWxC:N: one to three spatial '
                     'axes, then the channels, all at least 1.')
  if split not in SPLITS:
    raise no_split(name, split, SPLITS)
  return Synthetic(name, split, shape, num_examples)


def _npz(name, split, path):
  if path.is_dir():
    path = path / f'{split}.npz'
  elif split != 'train':
    raise no_split(name, split, ['train'])
  if not path.is_file():
    raise FileNotFoundError(f'There is no file {path}: write it with np.savez(path, image=..., label=...).')
  path = remote.here(path)
  try:
    with np.load(path, allow_pickle=False) as file:
      data = {key: file[key] for key in ('image', 'label') if key in file}
  except (ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(f'{path} cannot be read as an npz file of plain arrays ({error}): write it with np.savez, without '
                     'object arrays.') from error
  if 'image' not in data:
    raise ValueError(f'{path} has no array named image: write it with np.savez(path, image=..., label=...).')
  images = data['image']
  if images.dtype != np.uint8 or images.ndim not in (3, 4, 5) or not images.size:
    raise ValueError(f'image in {path} is {images.dtype} {list(images.shape)}, expected uint8 [N,*S,C] with one to '
                     'three spatial axes.')
  labels = data.get('label', np.zeros(len(images), np.int32))
  if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu' or labels.min() < 0:
    raise ValueError(f'label in {path} is {labels.dtype} {list(labels.shape)}, expected ints from 0 up of shape '
                     f'[{len(images)}].')
  num_classes = int(labels.max()) + 1 if 'label' in data else 0
  return Arrays(name, split, images, labels, [str(k) for k in range(num_classes)])
