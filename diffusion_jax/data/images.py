"""Sources of encoded images: a folder, a zip file, a TFDS directory.

All three give bytes to one decoder, so a picture becomes the same array wherever it lies. The images of a folder or a
zip file have classes by sub-folder, or captions (captions.py): every distinct caption is then a class name.
"""
import functools
import io
import os
import pathlib
import re
import threading
import zipfile

import numpy as np

from diffusion_jax.data import captions, remote, sources

SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.webp')
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # PIL's name of 8-bit pixels, by channel count
FOLDERS = {'train': 'train', 'test': 'test', 'val': 'val', 'validation': 'val'}  # folder name -> split
_ZIP_LOCK = threading.Lock()


def decode(data, channels, size):
  """Bytes of an image file -> uint8 [H,W,channels]; raises ValueError, or whatever PIL raises, for an unusable one.

  A palette becomes RGB. size > 0 resizes the shorter side to it with an antialiasing filter and crops the centre.
  """
  from PIL import Image, UnidentifiedImageError
  try:
    image = Image.open(io.BytesIO(data))
  except UnidentifiedImageError:
    raise ValueError('not an image that can be identified') from None  # PIL's own text names a memory address
  if image.mode in ('P', '1'):
    image = image.convert('RGB' if image.mode == 'P' else 'L')
  if image.mode != MODES[channels]:
    raise ValueError(f'{image.mode} with {len(image.getbands())} channels, expected {MODES[channels]} with {channels}')
  if size:
    scale = size / min(image.size)
    image = image.resize([max(size, round(n * scale)) for n in image.size], Image.Resampling.LANCZOS)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
  return np.asarray(image).reshape(image.height, image.width, channels)


class Encoded(sources.Source):
  """Images that are decoded when they are read. Subclasses define __len__, read(i) -> (bytes, label) and where(i)."""

  def __init__(self, name, split, class_names, size, channels, max_bad):
    super().__init__(name, split, (), class_names)
    if channels not in MODES:
      raise ValueError(f'data.channels is {channels}, expected one of {", ".join(map(str, MODES))}.')
    if size < 0:
      raise ValueError(f'data.size is {size}, expected 0 (keep the images as they are) or a positive number.')
    self.size, self.channels = size, channels
    self.shape = self._first_shape(max_bad)

  def __getitem__(self, i):
    if not 0 <= i < len(self):
      raise IndexError(i)
    try:
      data, label = self.read(i)
      image = decode(data, self.channels, self.size)
    except Exception as error:  # PIL answers a broken file with a dozen types, SyntaxError and struct.error among them
      raise sources.BadRecord(f'{self.where(i)}: {error}') from error
    if self.shape and image.shape != self.shape:
      raise sources.BadRecord(f'{self.where(i)}: shape {image.shape}, expected {self.shape} like the images before it '
                              '(set data.size to resize and crop)')
    return image, label

  def __getstate__(self):
    return {key: value for key, value in self.__dict__.items() if key != '_file'}  # the open file is opened anew

  def _first_shape(self, max_bad):
    """The shape of the first good image, which is the shape of the source."""
    bad = []
    for i in range(len(self)):
      try:
        return self[i][0].shape
      except sources.BadRecord as error:
        bad.append(str(error))
        sources.check_bad(self, bad, max_bad)
    raise FileNotFoundError(f'{self.name} has no images in split {self.split!r}.')


class Folder(Encoded):
  """Image files below a folder, in the order of their paths; see `layout` for splits, classes and captions."""

  def __init__(self, name, split, root, **options):
    if not root.is_dir():
      raise FileNotFoundError(f'There is no folder {root}: give data.source as folder:PATH with a folder of images.')
    self.root = root
    found = remote.find(root) if remote.is_remote(root) else [
        pathlib.Path(folder, file).relative_to(root).as_posix()
        for folder, _, files in os.walk(root, followlinks=True) for file in files]
    self.paths, self.labels, class_names = layout(name, split, found, lambda p: remote.read_bytes(root / p))
    super().__init__(name, split, class_names, **options)

  def __len__(self):
    return len(self.paths)

  def where(self, i):
    """Names record i in messages."""
    return str(self.root / self.paths[i])

  def read(self, i):
    """Bytes and label of record i."""
    return remote.read_bytes(self.root / self.paths[i]), self.labels[i]


class Zip(Encoded):
  """Image files in a zip file, as if it were unpacked to a folder."""

  def __init__(self, name, split, path, **options):
    if not path.is_file():
      raise FileNotFoundError(f'There is no file {path}: give data.source as zip:PATH with a zip file of images.')
    path = remote.here(path)
    if not zipfile.is_zipfile(path):
      raise ValueError(f'{path} is not a zip file, or it is cut short: write or copy it again.')
    self.path = path
    self.paths, self.labels, class_names = layout(name, split, self._file.namelist(), self._read)
    super().__init__(name, split, class_names, **options)

  @functools.cached_property
  def _file(self):
    return zipfile.ZipFile(self.path)

  def __len__(self):
    return len(self.paths)

  def where(self, i):
    """Names record i in messages."""
    return f'{self.path}:{self.paths[i]}'

  def read(self, i):
    """Bytes and label of record i."""
    return self._read(self.paths[i]), self.labels[i]

  def _read(self, path):
    with _ZIP_LOCK:  # one handle has one position; decoding, the slow part, runs outside
      return self._file.read(path)


class Tfds(Encoded):
  """Features image and label (if there is one) of a TFDS directory in array_record format."""

  def __init__(self, name, split, dataset, data_dir, manual_dir, *, size, channels, max_bad):
    import tensorflow_datasets as tfds
    folder, root = prepared(dataset, data_dir), data_root(data_dir)
    if folder is None and dataset == 'cifar10' and not remote.is_remote(root):
      from diffusion_jax.data import cifar10
      folder = cifar10.prepare(data_dir, manual_dir)
    if folder is None:
      there = 'FOLDER' if remote.is_remote(root) else root
      raise FileNotFoundError(
          f'{name} is not prepared in {root}: prepare it with python -c "import tensorflow_datasets as tfds; '
          f"tfds.builder('{dataset}', data_dir='{there}', file_format='array_record').download_and_prepare()\""
          f'{f", and copy what is in FOLDER to {root}" if remote.is_remote(root) else ""}.')
    folder = copied(folder, split) if remote.is_remote(folder) else folder
    info = tfds.builder_from_directory(folder).info
    features = dict(info.features.items())
    if info.file_format.value != 'array_record':
      raise ValueError(f'{folder} is prepared as {info.file_format.value}, expected array_record, which needs no '
                       'TensorFlow: prepare it again with file_format=\'array_record\' into another data_dir.')
    if split.partition('[')[0] not in info.splits:
      raise sources.no_split(name, split, info.splits)
    if not isinstance(features.get('image'), tfds.features.Image) or features['image'].np_dtype != np.uint8:
      raise ValueError(f'{name} has the features {", ".join(features)}, expected an 8-bit image named image.')
    self.folder, label = folder, features.get('label')
    self.labelled = isinstance(label, tfds.features.ClassLabel)
    super().__init__(name, split, label.names if self.labelled else [], size, features['image'].shape[-1], max_bad)

  @functools.cached_property
  def _file(self):
    import tensorflow_datasets as tfds
    decoders = {'image': tfds.decode.SkipDecoding()}
    return tfds.builder_from_directory(self.folder).as_data_source(self.split, decoders=decoders)

  def __len__(self):
    return len(self._file)

  def where(self, i):
    """Names record i in messages."""
    return f'{self.name} {self.split} record {i}'

  def read(self, i):
    """Bytes and label of record i."""
    record = self._file[i]
    return record['image'], int(record['label']) if self.labelled else 0


def layout(name, split, found, read_bytes):
  """What a split of an image folder holds: (paths [N], labels [N], class names), in the order of the paths.

  found: paths below the root with '/' between folders, of any files; read_bytes: path -> content. If the first folders
  are named train, test or val(idation), `split` selects among them and other folders are passed over; otherwise all is
  the split 'train'. Below that the first folder is the class, and classes are numbered by name over all splits. A split
  whose images lie outside any folder has no classes.

  If an image of the split has a caption (captions.py), all must have one, and folders within the split mean nothing:
  the class names are the distinct captions of all splits, sorted.
  """
  visible = [p for p in found if not re.search(r'(^|/)(\.|__MACOSX/)', p)]
  found = sorted(p for p in visible if p.lower().endswith(SUFFIXES))
  if not found:
    raise FileNotFoundError(f'{name} holds no images ({", ".join(SUFFIXES)}).')
  heads = {p: p.partition('/')[0] for p in found if '/' in p}
  rows = [(FOLDERS[head], p, p.partition('/')[2]) for p, head in heads.items() if head in FOLDERS]
  rows = rows or [('train', p, p) for p in found]  # (split, path, path below the folder of the split)
  wanted = [(p, inner) for row_split, p, inner in rows if row_split == FOLDERS.get(split, split)]
  if not wanted:
    raise sources.no_split(name, split, {row[0] for row in rows})
  try:
    texts = captions.read(visible, found, read_bytes)
  except ValueError as error:
    raise ValueError(f'{name}: {error}') from error
  missing = [p for p, _ in wanted if p not in texts]
  if len(missing) < len(wanted):
    if missing:
      raise ValueError(f'{name}: {missing[0]} has no caption, and {len(wanted) - len(missing)} of the {len(wanted)} '
                       f'images of the split {split!r} have one: give every image a caption, or none.')
    classes = {p: texts[p] for _, p, _ in rows if p in texts}
  else:
    flat = [p for p, inner in wanted if '/' not in inner]
    if flat and len(flat) < len(wanted):
      raise ValueError(f'{name} holds images both outside and inside class folders, {flat[0]} among those outside: put '
                       'every image into a class folder, or none.')
    classes = {} if flat else {p: inner.partition('/')[0] for _, p, inner in rows if '/' in inner}
  class_names = sorted(set(classes.values()))
  number = {class_name: i for i, class_name in enumerate(class_names)}
  return [p for p, _ in wanted], [number[classes[p]] if classes else 0 for p, _ in wanted], class_names


def data_root(data_dir=''):
  """The folder that holds prepared TFDS data sets: data_dir, or TFDS's own default if it is ''."""
  return remote.path(data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets')


def prepared(dataset, data_dir=''):
  """The folder of the newest prepared version of a TFDS data set (NAME, NAME/CONFIG or NAME:VERSION), or None."""
  base = data_root(data_dir) / dataset.replace(':', '/')
  with remote.refusals(base):
    folders = [info.parent for pattern in ('dataset_info.json', '*/dataset_info.json') for info in base.glob(pattern)]
  versions = [folder for folder in folders if re.fullmatch(r'\d+\.\d+\.\d+', folder.name)]  # not 'incomplete.X_3.0.2'
  return max(versions, key=lambda folder: [int(n) for n in folder.name.split('.')], default=None)


def copied(folder, split):
  """A local copy of a TFDS data set in a bucket: what describes it, and the files that hold `split`."""
  import tensorflow_datasets as tfds
  about = sorted(name for name in remote.find(folder) if not re.search(r'-\d{5}-of-\d{5}$', name) and '/' not in name)
  about = ['dataset_info.json', *(name for name in about if name != 'dataset_info.json')]
  info = tfds.builder_from_directory(remote.copies(folder, about)).info
  known = split.partition('[')[0] in info.splits  # else the caller says which there are
  files = [pathlib.PurePath(i.filename).name for i in info.splits[split].file_instructions] if known else []
  return remote.copies(folder, [*about, *files])
