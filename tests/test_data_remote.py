"""Data in a bucket is the data of a folder: from a server that speaks Google Cloud Storage's JSON API."""
import json
import pickle
import shutil
import zipfile

import fake_gcs
import numpy as np
import pytest
import toy_tfds
from PIL import Image

from diffusion_jax.data import images, pipeline, remote, sources

pytestmark = pytest.mark.skipif(not fake_gcs.installed(), reason="needs the extra: pip install -e '.[gcs]'")


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
  return toy_tfds.prepare(tmp_path_factory.mktemp('tfds'))


@pytest.fixture
def store(monkeypatch, tmp_path):
  monkeypatch.setenv('DIFFUSION_JAX_CACHE', str(tmp_path / 'cache'))
  with fake_gcs.serving(monkeypatch, 'data', 'secret', denied=['secret']) as found:
    yield found


@pytest.fixture
def uploaded(store, data_dir, tmp_path):
  """The server, with the toy data below gs://data/tfds."""
  shutil.copytree(data_dir, tmp_path / 'tfds')
  store.upload('data', 'tfds', tmp_path / 'tfds')
  return store


def reads(store):
  """The names of the objects whose content was asked for."""
  return [path.rpartition('%2F')[2] for method, path, query in store.requests
          if method == 'GET' and (query.get('alt') == 'media' or path.startswith('/download'))]


def check_equal(found, expected):
  """Two sources hold the same."""
  assert found.class_names == expected.class_names and found.shape == expected.shape
  assert sources.digest(*sources.arrays(found)) == sources.digest(*sources.arrays(expected))


@pytest.mark.parametrize('split', ['train', 'test', 'train[10:14]'])
def test_tfds_from_a_bucket_is_tfds_from_a_folder(uploaded, data_dir, split):
  check_equal(sources.load('tfds:toy', split, data_dir='gs://data/tfds'),
              sources.load('tfds:toy', split, data_dir=data_dir))


def test_only_the_files_of_the_split_are_copied_and_once(uploaded):
  sources.load('tfds:toy', 'test', data_dir='gs://data/tfds')
  shards = [name for name in reads(uploaded) if 'array_record' in name]
  assert sorted(shards) == [f'toy-test.array_record-{i:05d}-of-00003' for i in range(3)]
  uploaded.requests.clear()
  sources.load('tfds:toy', 'test', data_dir='gs://data/tfds')
  assert reads(uploaded) == []


def test_a_data_set_that_was_made_anew_is_copied_anew(uploaded):
  first = sources.load('tfds:toy', data_dir='gs://data/tfds').folder
  assert sources.load('tfds:toy', data_dir='gs://data/tfds').folder == first
  name = 'tfds/toy/1.0.0/dataset_info.json'
  uploaded.put('data', name, uploaded.objects['data'][name][0])
  assert sources.load('tfds:toy', data_dir='gs://data/tfds').folder != first


def test_a_copy_that_was_cut_short_is_not_kept(uploaded, monkeypatch):
  name = 'tfds/toy/1.0.0/toy-train.array_record-00001-of-00003'
  system = remote.filesystem('gs://data')
  whole = system.get_file

  def cut(source, target):
    whole(source, target)
    if 'train.array_record-00001' in source:
      with open(target, 'r+b') as file:
        file.truncate(100)
  monkeypatch.setattr(system, 'get_file', cut)
  with pytest.raises(OSError, match=r'00001-of-00003 has \d+ bytes and its copy has 100'):
    sources.load('tfds:toy', data_dir='gs://data/tfds')
  assert not list(remote.cache().rglob('.toy*')) and not list(remote.cache().rglob(name.rpartition('/')[2]))


def test_worker_processes_read_images_from_a_bucket(store, tmp_path):
  for i in range(9):
    path = tmp_path / 'tree' / f'{"cat" if i % 2 else "ant"}' / f'{i}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(toy_tfds.pixels('train', i)).save(path)
  (tmp_path / 'tree' / 'notes.txt').write_text('no image')
  store.upload('data', 'tree', tmp_path / 'tree')
  local, found = sources.load(f'folder:{tmp_path / "tree"}'), sources.load('folder:gs://data/tree')
  check_equal(found, local)
  copy = pickle.loads(pickle.dumps(found))
  np.testing.assert_array_equal(copy[3][0], local[3][0])
  expected = list(pipeline.stream(local, 0, 4, 0, 3))
  for (image, label), (expected_image, expected_label) in zip(
      pipeline.stream(found, 0, 4, 0, 3, workers=1), expected, strict=True):
    np.testing.assert_array_equal(image, expected_image)
    np.testing.assert_array_equal(label, expected_label)
  assert found.where(0) == 'gs://data/tree/ant/0.png'


def test_zip_and_npz_from_a_bucket(store, tmp_path):
  with zipfile.ZipFile(tmp_path / 'set.zip', 'w') as file:
    for i in range(5):
      Image.fromarray(toy_tfds.pixels('train', i)).save(tmp_path / f'{i}.png')
      file.write(tmp_path / f'{i}.png', f'{i}.png')
  (tmp_path / 'arrays').mkdir()
  for split in ('train', 'test'):
    np.savez(tmp_path / 'arrays' / f'{split}.npz', image=np.full((3, 2, 2, 1), len(split), np.uint8))
  store.put('data', 'set.zip', (tmp_path / 'set.zip').read_bytes())
  store.upload('data', 'arrays', tmp_path / 'arrays')
  check_equal(sources.load('zip:gs://data/set.zip'), sources.load(f'zip:{tmp_path / "set.zip"}'))
  assert sources.load('npz:gs://data/arrays', 'test')[0][0].max() == 4
  assert sources.load('npz:gs://data/arrays/train.npz')[0][0].max() == 5


@pytest.mark.parametrize(('name', 'options', 'error', 'text'), [
    ('tfds:toy', {'data_dir': 'gs://data/none'}, FileNotFoundError, r'prepared in gs://data/none: .*copy what is in'),
    ('tfds:cifar10', {'data_dir': 'gs://data/none'}, FileNotFoundError, 'not prepared in gs://data/none'),
    ('folder:gs://data/none', {}, FileNotFoundError, 'There is no folder gs://data/none'),
    ('zip:gs://data/none.zip', {}, FileNotFoundError, r'There is no file gs://data/none\.zip'),
    ('npz:gs://data/none.npz', {}, FileNotFoundError, r'There is no file gs://data/none\.npz'),
    ('tfds:toy', {'data_dir': 'gs://secret/tfds'}, OSError, r'gs://secret/tfds/toy cannot be read .*sign in'),
    ('tfds:toy', {'data_dir': 'ftp://data/tfds'}, ValueError, r'ftp://data/tfds cannot be read: give a local path, gs'),
])
def test_what_is_absent_or_refused_is_said_in_a_sentence(store, name, options, error, text):
  with pytest.raises(error, match=text) as caught:
    sources.load(name, **options)
  assert '\n' not in str(caught.value)


def test_a_missing_shard_is_named(uploaded):
  del uploaded.objects['data']['tfds/toy/1.0.0/toy-train.array_record-00002-of-00003']
  with pytest.raises(FileNotFoundError, match=r'toy-train\.array_record-00002-of-00003'):
    sources.load('tfds:toy', data_dir='gs://data/tfds')


def test_without_gcsfs_the_package_is_named(monkeypatch):
  import fsspec

  def absent(scheme):
    raise ImportError('Please install gcsfs')
  monkeypatch.setattr(fsspec, 'filesystem', absent)
  with pytest.raises(ValueError, match=r'gs://data/tfds needs the package gcsfs.*pip install gcsfs'):
    sources.load('tfds:toy', data_dir='gs://data/tfds')


def test_the_newest_version_in_a_bucket_is_the_prepared_one(store):
  for version in ('1.2.0', '1.10.0', 'incomplete.ABC_2.0.0'):
    store.put('data', f'tfds/toy/{version}/dataset_info.json', json.dumps({}).encode())
  assert str(images.prepared('toy', 'gs://data/tfds')) == 'gs://data/tfds/toy/1.10.0'
  assert images.prepared('other', 'gs://data/tfds') is None
