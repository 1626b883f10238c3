"""CIFAR-10 as TFDS lays it out, prepared from the published archive without TensorFlow.

TFDS needs TensorFlow to unpack and to encode; this builder writes the same records (name, version, features and keys
are TFDS's own, so the order is too) with the standard library and Pillow. sources.py imports this file only when
CIFAR-10 has to be prepared, which is why it may import tfds at its top.
"""
import hashlib
import http.client
import io
import os
import pathlib
import tarfile
import urllib.error
import urllib.request
import zlib

import numpy as np
import tensorflow_datasets as tfds

from diffusion_jax.data import images

URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
SHA256 = 'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd'
NUM_BYTES = 170052171
CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')
FOLDER = 'cifar-10-batches-bin'
FILES = {'train': [f'data_batch_{i}.bin' for i in range(1, 6)], 'test': ['test_batch.bin']}
RECORD = 1 + 3 * 32 * 32  # bytes: a label, then the red, the green and the blue plane


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # TFDS has registered a cifar10 of its own
  """Writes the splits in `self.arrays`, {split: (images uint8 [N,32,32,3], labels uint8 [N])}."""

  VERSION = tfds.core.Version('3.0.2')
  arrays = None

  def _info(self):
    return tfds.core.DatasetInfo(
        builder=self,
        description='CIFAR-10: 32x32 colour images in 10 classes.',
        features=tfds.features.FeaturesDict({
            'id': tfds.features.Text(),
            'image': tfds.features.Image(shape=(32, 32, 3)),
            'label': tfds.features.ClassLabel(names=CLASSES),
        }),
        supervised_keys=('image', 'label'),
        homepage='https://www.cs.toronto.edu/~kriz/cifar.html',
    )

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split, *arrays) for split, arrays in self.arrays.items()}

  def _generate_examples(self, split, pixels, labels):
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
      yield i, {'id': f'{split}_{i:05d}', 'image': _png(image), 'label': int(label)}


def prepare(data_dir='', manual_dir='', *, sha256=SHA256, num_bytes=NUM_BYTES):
  """Makes sure that CIFAR-10 is prepared in data_dir as array_record and returns its folder.

  Reuses what is prepared already; otherwise reads cifar-10-binary.tar.gz in manual_dir (by default
  <data_dir>/downloads/manual) and downloads it there first if it is not there. sha256 and num_bytes are what the
  archive must have. Raises FileNotFoundError if the archive can neither be found nor downloaded, ValueError if it is
  not the one expected.
  """
  folder = images.prepared('cifar10', data_dir)
  if folder:
    return folder
  root = images.data_root(data_dir)
  manual = pathlib.Path(manual_dir).expanduser() if manual_dir else root / 'downloads' / 'manual'
  archive = manual / URL.rpartition('/')[2]
  if archive.is_file():
    _check(archive, archive, sha256, num_bytes)
  else:
    _download(archive, sha256, num_bytes)
  builder = Cifar10(data_dir=root, file_format='array_record')
  builder.arrays = unpack(archive)
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
  folder = images.prepared('cifar10', data_dir)
  if not folder:  # TFDS takes any folder of that name for a prepared one
    raise ValueError(f'{builder.data_dir} exists but is not a prepared data set: remove it and run again.')
  return folder


def unpack(archive):
  """Reads the archive into {split: (images uint8 [N,32,32,3], labels uint8 [N])}; ValueError if it is broken."""
  wanted = [f'{FOLDER}/{file}' for file in [*FILES['train'], *FILES['test'], 'batches.meta.txt']]
  try:
    with tarfile.open(archive, 'r:gz') as tar:
      data = {member.name: tar.extractfile(member).read() for member in tar
              if member.name in wanted and member.isfile()}
  except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
    raise ValueError(f'{archive} cannot be unpacked ({error}): fetch it again from {URL}.') from error
  missing = [name for name in wanted if name not in data]
  if missing:
    raise ValueError(f'{archive} lacks {missing[0]}: fetch it again from {URL}.')
  names = tuple(data[wanted[-1]].decode('ascii', 'replace').split())
  if names != CLASSES:
    raise ValueError(f'{archive} names the classes {names}, expected {CLASSES}: fetch it again from {URL}.')
  return {split: _split(archive, b''.join(data[f'{FOLDER}/{file}'] for file in files))
          for split, files in FILES.items()}


def _split(archive, data):
  if not data or len(data) % RECORD:
    raise ValueError(f'{archive} holds a split of {len(data)} bytes, expected a multiple of {RECORD}: fetch it again '
                     f'from {URL}.')
  records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
  labels, planes = records[:, 0], records[:, 1:].reshape(-1, 3, 32, 32)
  if labels.max() >= len(CLASSES):
    raise ValueError(f'{archive} holds the label {labels.max()}, expected 0 to 9: fetch it again from {URL}.')
  return planes.transpose(0, 2, 3, 1), labels


def _png(image):
  from PIL import Image
  file = io.BytesIO()
  Image.fromarray(image).save(file, 'PNG')
  file.seek(0)
  return file  # TFDS writes a file object as it is; an array it would encode with TensorFlow


def _download(archive, sha256, num_bytes):
  """Downloads the archive to a temporary name, checks it and renames it."""
  part = archive.with_name(f'{archive.name}.part-{os.getpid()}')
  archive.parent.mkdir(parents=True, exist_ok=True)
  try:
    with urllib.request.urlopen(URL, timeout=60) as response, open(part, 'wb') as file:
      while block := response.read(1 << 20):
        file.write(block)
    _check(part, URL, sha256, num_bytes)
    part.rename(archive)
  except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
    raise FileNotFoundError(f'CIFAR-10 is not prepared and its archive cannot be downloaded ({error}): fetch '
                            f'{archive.name} from {URL} and put it in {archive.parent}.') from error
  finally:
    part.unlink(missing_ok=True)


def _check(path, origin, sha256, num_bytes):
  """Raises ValueError, naming `origin`, unless the file has this size and SHA-256."""
  found_bytes = path.stat().st_size
  if found_bytes != num_bytes:
    raise ValueError(f'{origin} has {found_bytes} bytes, expected {num_bytes}: fetch it again from {URL}.')
  with open(path, 'rb') as file:
    found = hashlib.file_digest(file, 'sha256').hexdigest()
  if found != sha256:
    raise ValueError(f'{origin} has the SHA-256 {found}, expected {sha256}: fetch it again from {URL}.')
