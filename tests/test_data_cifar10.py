"""CIFAR-10 from an archive of the published layout, seven records a file, to what a run reads; without TensorFlow."""
import hashlib
import io
import json
import pickle
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request

import numpy as np
import pytest

from diffusion_jax.data import cifar10, images, sources

ARCHIVE = 'cifar-10-binary.tar.gz'
FILES = [f'data_batch_{i}.bin' for i in range(1, 6)] + ['test_batch.bin']


def records(file):
  """Seven records of one file: (images uint8 [7,32,32,3], labels uint8 [7])."""
  rng = np.random.default_rng(FILES.index(file))
  return rng.integers(0, 256, (7, 32, 32, 3), np.uint8), rng.integers(0, 10, 7, np.uint8)


def contents():
  """The published layout by name: a label byte and the red, green and blue planes for each record."""
  files = {'batches.meta.txt': '\n'.join(cifar10.CLASSES).encode() + b'\n\n', 'readme.html': b'<html>'}
  for file in FILES:
    pixels, labels = records(file)
    files[file] = b''.join(bytes([label]) + image.transpose(2, 0, 1).tobytes()
                           for image, label in zip(pixels, labels, strict=True))
  return files


def write_archive(folder, files):
  """Packs files into folder/cifar-10-binary.tar.gz; returns what prepare must be told of it."""
  folder.mkdir(parents=True, exist_ok=True)
  with tarfile.open(folder / ARCHIVE, 'w:gz') as tar:
    for name, data in files.items():
      member = tarfile.TarInfo(f'cifar-10-batches-bin/{name}')
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  return facts(folder / ARCHIVE)


def facts(path):
  """The size and digest of a file, as prepare takes them."""
  data = path.read_bytes()
  return {'num_bytes': len(data), 'sha256': hashlib.sha256(data).hexdigest()}


def labelled(pixels, labels):
  """A multiset of images with their labels, whatever their order."""
  return sorted((image.tobytes(), int(label)) for image, label in zip(pixels, labels, strict=True))


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  """A data_dir that was prepared from an archive, which is gone."""
  folder = tmp_path_factory.mktemp('tfds')
  manual = folder / 'downloads' / 'manual'
  cifar10.prepare(str(folder), **write_archive(manual, contents()))
  (manual / ARCHIVE).unlink()
  return folder


@pytest.fixture
def offline(monkeypatch):
  """Makes every download fail as it does without a network."""
  def refuse(*args, **kwargs):
    raise urllib.error.URLError('no network')
  monkeypatch.setattr(urllib.request, 'urlopen', refuse)


@pytest.mark.parametrize(('split', 'files'), [('train', FILES[:5]), ('test', FILES[5:])])
def test_what_went_into_the_archive_comes_out_of_the_source(data_dir, offline, split, files):
  source = sources.load('tfds:cifar10', split, data_dir=str(data_dir))
  assert source.shape == (32, 32, 3) and source.class_names == list(cifar10.CLASSES) and len(source) == 7 * len(files)
  pixels, labels = (np.concatenate(parts) for parts in zip(*map(records, files), strict=True))
  assert labelled(*sources.arrays(source)) == labelled(pixels, labels)


def test_the_prepared_source_can_be_pickled_resized_and_sliced(data_dir):
  source = sources.load('tfds:cifar10', 'train[:10]', size=8, data_dir=str(data_dir))
  copy = pickle.loads(pickle.dumps(source))
  assert len(copy) == 10 and copy.shape == (8, 8, 3)
  for i in range(10):
    np.testing.assert_array_equal(copy[i][0], source[i][0])
  with pytest.raises(ValueError, match="no split 'tset'; it has test, train"):
    sources.load('tfds:cifar10', 'tset', data_dir=str(data_dir))


def test_the_directory_is_laid_out_as_tfds_lays_out_its_own(data_dir):
  folder = images.prepared('cifar10', data_dir)
  assert folder == data_dir / 'cifar10' / '3.0.2'
  info = json.loads((folder / 'dataset_info.json').read_text())
  assert info['fileFormat'] == 'array_record'
  assert {split['name']: [int(n) for n in split['shardLengths']] for split in info['splits']} == {'train': [35],
                                                                                               'test': [7]}
  import tensorflow_datasets as tfds
  theirs = tfds.data_source('cifar10', split='test', data_dir=data_dir, download=False)
  found = zip(*[(r['image'], r['label']) for r in theirs], strict=True)
  assert labelled(*found) == labelled(*records('test_batch.bin'))
  assert {r['id'] for r in theirs} == {f'test_{i:05d}'.encode() for i in range(7)}


def test_a_record_with_a_broken_image_is_named(data_dir, monkeypatch):
  source = sources.load('tfds:cifar10', data_dir=str(data_dir))
  read = source.read
  monkeypatch.setattr(source, 'read', lambda i: (read(i)[0][:200], 0) if i == 3 else read(i))
  with pytest.raises(sources.BadRecord, match='tfds:cifar10 train record 3: '):
    source[3]


@pytest.mark.parametrize('format', ['tfrecord', 'riegeli'])
def test_a_directory_in_another_format_is_explained(data_dir, tmp_path, format):
  folder = tmp_path / 'cifar10' / '3.0.2'
  folder.mkdir(parents=True)
  for name in ('features.json', 'dataset_info.json'):
    text = (data_dir / 'cifar10' / '3.0.2' / name).read_text()
    (folder / name).write_text(text.replace('array_record', format))
  with pytest.raises(ValueError, match=f'prepared as {format}, expected array_record'):
    sources.load('tfds:cifar10', data_dir=str(tmp_path))


def test_nothing_imports_tensorflow(tmp_path):
  found = write_archive(tmp_path / 'manual', contents())
  program = f"""
import sys
from diffusion_jax.data import cifar10, pipeline, sources
cifar10.prepare({str(tmp_path)!r}, {str(tmp_path / 'manual')!r}, **{found!r})
source = sources.load('tfds:cifar10', data_dir={str(tmp_path)!r})
images, labels = sources.arrays(source)
assert len(images) == 35
assert len(list(pipeline.stream(source, 0, 5, 0, 3))) == 3
assert 'tensorflow' not in sys.modules
"""
  subprocess.run([sys.executable, '-c', program], check=True, timeout=120)


def test_the_archive_must_have_the_published_size_and_digest(tmp_path):
  found = write_archive(tmp_path, contents())
  with pytest.raises(ValueError, match=f'{ARCHIVE} has {found["num_bytes"]} bytes, expected 170052171'):
    cifar10.prepare(str(tmp_path), str(tmp_path))
  with pytest.raises(ValueError, match=f'SHA-256 {found["sha256"]}, expected {cifar10.SHA256}'):
    cifar10.prepare(str(tmp_path), str(tmp_path), num_bytes=found['num_bytes'])
  data = bytearray((tmp_path / ARCHIVE).read_bytes())
  data[len(data) // 2] ^= 1
  (tmp_path / ARCHIVE).write_bytes(data)
  with pytest.raises(ValueError, match=f'SHA-256 .*, expected {found["sha256"]}: fetch it again from https'):
    cifar10.prepare(str(tmp_path), str(tmp_path), **found)
  assert images.prepared('cifar10', tmp_path) is None


@pytest.mark.parametrize('manual', [False, True])
def test_offline_the_error_names_the_file_the_address_and_the_folder(offline, tmp_path, manual):
  manual_dir = tmp_path / 'here' if manual else tmp_path / 'downloads' / 'manual'
  with pytest.raises(FileNotFoundError) as error:
    sources.load('tfds:cifar10', data_dir=str(tmp_path), manual_dir=str(manual_dir) if manual else '')
  url = f'https://www.cs.toronto.edu/~kriz/{ARCHIVE}'
  for text in (f'fetch {ARCHIVE} from {url}', f'put it in {manual_dir}.', 'no network'):
    assert text in str(error.value)
  assert images.prepared('cifar10', tmp_path) is None
  assert not [p for p in tmp_path.rglob('*') if p.is_file()]


def test_a_download_is_checked_and_then_renamed(monkeypatch, tmp_path):
  found = write_archive(tmp_path / 'web', contents())
  opened = []

  def urlopen(url, timeout):
    opened.append(url)
    return open(tmp_path / 'web' / ARCHIVE, 'rb')
  monkeypatch.setattr(urllib.request, 'urlopen', urlopen)
  with pytest.raises(ValueError, match=f'https://.* expected {"0" * 64}'):
    cifar10.prepare(str(tmp_path), num_bytes=found['num_bytes'], sha256='0' * 64)
  assert list((tmp_path / 'downloads' / 'manual').iterdir()) == []
  folder = cifar10.prepare(str(tmp_path), **found)
  assert [p.name for p in (tmp_path / 'downloads' / 'manual').iterdir()] == [ARCHIVE]
  assert cifar10.prepare(str(tmp_path)) == folder and opened == [cifar10.URL] * 2


def damaged(kind):
  """The contents of an archive with one thing wrong."""
  files = contents()
  if kind == 'lacks':
    del files['data_batch_4.bin']
  elif kind == 'bytes':
    files['test_batch.bin'] = files['test_batch.bin'][:-1]
  elif kind == 'label':
    files['test_batch.bin'] = bytes([10]) + files['test_batch.bin'][1:]
  elif kind == 'classes':
    files['batches.meta.txt'] = b'aeroplane\n'
  return files


@pytest.mark.parametrize(('kind', 'text'), [
    ('lacks', 'lacks cifar-10-batches-bin/data_batch_4.bin'),
    ('bytes', 'a split of 21510 bytes, expected a multiple of 3073'),
    ('label', 'the label 10, expected 0 to 9'), ('classes', r"names the classes \('aeroplane',\), expected"),
    ('cut', 'cannot be unpacked'), ('text', 'cannot be unpacked'),
])
def test_a_broken_archive_is_explained_and_leaves_nothing_prepared(kind, text, tmp_path):
  write_archive(tmp_path, damaged(kind))
  archive = tmp_path / ARCHIVE
  data = archive.read_bytes()
  if kind == 'cut':
    archive.write_bytes(data[:len(data) // 2])
  elif kind == 'text':
    archive.write_bytes(b'<html>404</html>')
  with pytest.raises(ValueError, match=text):
    cifar10.prepare(str(tmp_path / 'out'), str(tmp_path), **facts(archive))
  assert images.prepared('cifar10', tmp_path / 'out') is None
  write_archive(tmp_path, contents())
  assert cifar10.prepare(str(tmp_path / 'out'), str(tmp_path), **facts(archive))


def test_a_crash_while_records_are_written_leaves_nothing_prepared(monkeypatch, tmp_path):
  found = write_archive(tmp_path, contents())
  with monkeypatch.context() as patch:
    patch.setattr(cifar10, '_png', lambda image: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      cifar10.prepare(str(tmp_path), str(tmp_path), **found)
  assert images.prepared('cifar10', tmp_path) is None
  assert cifar10.prepare(str(tmp_path), str(tmp_path), **found)


def test_a_folder_in_the_way_is_not_taken_for_a_prepared_one(tmp_path):
  found = write_archive(tmp_path, contents())
  (tmp_path / 'cifar10' / '3.0.2').mkdir(parents=True)
  with pytest.raises(ValueError, match='exists but is not a prepared data set'):
    cifar10.prepare(str(tmp_path), str(tmp_path), **found)
