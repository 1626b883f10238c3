"""The data card: what it counts is what was planted, whichever way the images come."""
import json
import math
import os
import zipfile

import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

from diffusion_jax import train
from diffusion_jax.data import card, sources
from diffusion_jax.runtime import log
from diffusion_jax.runtime.config import UserError


def distinct(n, shape=(4, 3, 2), seed=0):
  """n noisy images uint8 [n, *shape], no two equal: their first two bytes count."""
  images = np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)
  images.reshape(n, -1)[:, :2] = np.stack([np.arange(n) // 256, np.arange(n) % 256], 1)
  return images


def source_of(images, labels=None, class_names=('a', 'b', 'c'), name='npz:somewhere'):
  labels = np.arange(len(images)) % 3 if labels is None else np.asarray(labels)
  return sources.Arrays(name, 'train', images, labels, class_names)


def write_images(root, images, folders):
  """images[i] as root/folders[i]/<i>.png."""
  for i, (image, folder) in enumerate(zip(images, folders, strict=True)):
    (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(root / folder / f'{i:04d}.png')
  return root


class Read(sources.Source):
  """The same records, read one by one; those in `bad` cannot be read."""

  def __init__(self, source, bad=()):
    super().__init__(source.name, source.split, source.shape, source.class_names)
    self.source, self.bad, self.calls = source, bad, []

  def __len__(self):
    return len(self.source)

  def __getitem__(self, i):
    self.calls.append(i)
    if i in self.bad:
      raise sources.BadRecord(f'record {i} is torn')
    return self.source[i]


@pytest.mark.parametrize('n', [1, 255, 256, 257, 600])
@pytest.mark.parametrize('shape', [(4, 3, 2), (5, 1), (2, 3, 2, 3)], ids=str)
def test_counts_and_moments_are_those_of_the_whole_array(n, shape):
  source = source_of(distinct(n, shape))
  found = card.card(source)
  assert found['scanned'] and found['num_examples'] == n and found['shape'] == list(shape)
  assert found['bytes'] == n * math.prod(shape) and found['dtype'] == 'uint8'
  assert found['hash'] == sources.digest(source.images, source.labels)
  assert found['classes'] == {name: int((source.labels == k).sum()) for k, name in enumerate('abc')}
  assert found['unlabelled'] == found['bad_records'] == found['duplicates']['count'] == 0
  values = source.images.reshape(-1, shape[-1]) / 255
  np.testing.assert_allclose(found['mean'], values.mean(0), rtol=1e-12)
  np.testing.assert_allclose(found['std'], values.std(0), rtol=1e-12)


def test_the_moments_of_one_colour_are_exact():
  found = card.card(source_of(np.full((300, 8, 8, 1), 255, np.uint8)))
  assert found['mean'] == [1.0] and found['std'] == [0.0]
  assert found['duplicates']['count'] == 299 and found['duplicates']['groups'] == 1


def planted():
  """600 images in which 3, 9 and 500 are one, 300 is 10, and 599 is 0 with another label."""
  images, labels = distinct(600), np.arange(600) % 3
  for here, there in ((9, 3), (500, 3), (300, 10), (599, 0)):
    images[here], labels[here] = images[there], labels[there]
  labels[599] = 1
  return images, labels


def test_planted_duplicates_are_found_across_blocks():
  found = card.card(source_of(*planted()))['duplicates']
  assert found == {'count': 4, 'groups': 3, 'contradictory': 1, 'pairs': [[3, 9], [10, 300], [3, 500], [0, 599]]}


def test_without_labels_nothing_is_contradictory_and_no_class_is_counted():
  found = card.card(source_of(*planted(), class_names=()))
  assert found['duplicates']['count'] == 4 and found['duplicates']['contradictory'] == 0
  assert found['classes'] == {} and found['unlabelled'] == 600


def test_labels_that_name_no_class_are_counted_apart():
  found = card.card(source_of(distinct(6), [-1, 0, 1, 1, 3, -1]))
  assert found['classes'] == {'a': 1, 'b': 2, 'c': 0} and found['unlabelled'] == 3


def test_one_byte_makes_an_image_another():
  images = distinct(20)
  images[7] = images[2]
  images[7, -1, -1, -1] ^= 1
  assert card.card(source_of(images))['duplicates']['count'] == 0


def test_the_order_changes_the_hash_and_nothing_that_is_counted():
  images, labels = planted()
  order = np.random.default_rng(1).permutation(600)
  a, b = card.card(source_of(images, labels)), card.card(source_of(images[order], labels[order]))
  assert a['hash'] != b['hash'] and a['duplicates']['pairs'] != b['duplicates']['pairs']
  for found in (a, b):
    del found['hash'], found['duplicates']['pairs']
  assert a == b


@pytest.mark.filterwarnings('ignore:.* bad records of')
@pytest.mark.parametrize('bad', [(), (0, 255, 256, 599)], ids=str)
def test_reading_gives_what_memory_gives(bad):
  images, labels = planted()
  streamed = Read(source_of(images, labels), bad)
  kept = np.setdiff1d(np.arange(600), bad)
  from_memory = card.card(Read(source_of(images, labels), bad), images[kept], labels[kept])
  assert card.card(streamed) == from_memory
  assert from_memory['hash'] == sources.digest(images[kept], labels[kept])
  assert from_memory['bad_records'] == len(bad) and from_memory['num_examples'] == 600 - len(bad)


def test_images_in_memory_are_not_read_again_and_others_once():
  images, labels = planted()
  source = Read(source_of(images, labels))
  card.card(source, images, labels)
  assert source.calls == []
  card.card(source)
  assert sorted(source.calls) == list(range(600))


def test_large_images_come_in_smaller_blocks(monkeypatch):
  images, labels = planted()
  whole = card.card(source_of(images, labels))
  for size in (1, 1000):
    monkeypatch.setattr(card, 'BLOCK_BYTES', size)
    assert card.card(Read(source_of(images, labels))) == whole


def test_too_many_bad_records_are_an_error():
  with pytest.raises(ValueError, match=r'At least 3 of the 20 records .* are bad and 2 are allowed: record 1 is torn'):
    card.card(Read(source_of(distinct(20)), (1, 2, 3)), max_bad=2)


@pytest.mark.parametrize('limit', ['time', 'examples'])
def test_what_is_too_large_is_not_scanned_and_says_so(limit, monkeypatch):
  if limit == 'examples':
    monkeypatch.setattr(card, 'MAX_EXAMPLES', 599)
  source = Read(source_of(*planted()))
  found = card.card(source, max_seconds=-1 if limit == 'time' else 60)
  assert found['scanned'] is False and found['num_examples'] == 600
  assert found['not_scanned'] == {'time': 'reading the images took too long',
                                  'examples': 'more than 599 examples'}[limit]
  assert found.keys() == card.card(source_of(distinct(2))).keys()
  assert {found[key] for key in ('hash', 'bad_records', 'classes', 'unlabelled', 'mean', 'std', 'duplicates')} == {None}
  assert len(source.calls) <= (card.BLOCK if limit == 'time' else 0)


def test_images_that_the_held_out_split_has_too_are_counted(tmp_path):
  images, other = distinct(400), distinct(300, seed=1)
  other[[5, 290, 291]] = images[[399, 0, 0]]
  np.savez(tmp_path / 'train.npz', image=images, label=np.zeros(400, int))
  np.savez(tmp_path / 'test.npz', image=other, label=np.zeros(300, int))
  source = sources.load(f'npz:{tmp_path}')
  assert card.card(source, held_out='test')['held_out'] == {
      'split': 'test', 'overlap': 2, 'pairs': [[0, 290], [399, 5]]}
  missing = card.card(source, held_out='val')['held_out']
  assert missing['overlap'] is None and 'There is no file' in missing['why']
  assert card.card(source, held_out='')['held_out'] is None
  assert card.card(source, held_out='train')['held_out'] is None


@pytest.mark.filterwarnings('ignore:.* bad records of')
def test_held_out_images_are_decoded_as_those_of_the_source(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (4, 6, 6), np.uint8)
  write_images(tmp_path, images, ['train', 'train', 'test', 'train'])
  Image.fromarray(images[3]).save(tmp_path / 'test' / 'x.bmp')
  (tmp_path / 'test' / 'torn.png').write_bytes(b'not an image')
  options = {'size': 5, 'channels': 1}
  found = card.card(sources.load(f'folder:{tmp_path}', **options), held_out='test', **options)
  assert found['held_out'] == {'split': 'test', 'overlap': 1, 'pairs': [[2, 1]]}


HOSTILE = ['</script><script>alert(1)</script>', '"quoted", [and] {braced}', 'two\nlines', '\x1b[31m', '__proto__',
           '数']


def test_hostile_class_names_come_back_from_the_file_as_they_are(tmp_path):
  names = [*HOSTILE, os.fsdecode(b'\xff\xfe')]
  source = source_of(distinct(20), np.arange(20) % len(names), names)
  log.write_json(tmp_path / 'data_card.json', card.card(source))
  text = (tmp_path / 'data_card.json').read_bytes()
  assert text.isascii() and b'\x1b' not in text
  assert json.loads(text)['classes'] == {name: len(range(k, 20, len(names))) for k, name in enumerate(names)}


def test_folder_zip_and_their_licences(tmp_path):
  root = write_images(tmp_path / 'images', distinct(6, (4, 4, 3)), ['x', 'y'] * 3)
  source = sources.load(f'folder:{root}')
  assert card.card(source)['licence'] == 'unknown' and card.card(source)['licence_source'] is None
  (root / 'Licence.txt').write_bytes(b'\n \xff\x1b[2J Some  licence, version 4 \nand more')
  (root / 'x' / 'LICENSE').write_text('of one class')
  found = card.card(source)
  assert found['licence'].endswith('Some  licence, version 4') and found['licence'].isprintable()
  assert found['licence_source'] == 'Licence.txt'
  with zipfile.ZipFile(tmp_path / 'images.zip', 'w') as file:
    for path in sorted(root.rglob('*')):
      file.write(path, path.relative_to(root))
  zipped = card.card(sources.load(f'zip:{tmp_path / "images.zip"}'))
  assert zipped.pop('source') != found.pop('source')
  assert zipped == found


def test_a_licence_that_cannot_be_read_is_unknown(tmp_path):
  root = write_images(tmp_path, distinct(2, (4, 4, 3)), ['', ''])
  (root / 'LICENSE').mkdir()
  (root / 'COPYING').write_bytes(b' \n\n')
  assert card.card(sources.load(f'folder:{root}'))['licence'] == 'unknown'


def test_known_sources():
  digits, made = card.card(sources.load('digits')), card.card(sources.load('synthetic:4x4x1:8'))
  assert digits['licence'].startswith('CC BY 4.0') and 'Kaynak' in digits['citation'] and digits['homepage']
  assert 'generated' in made['licence']
  cifar10 = card.card(source_of(distinct(2), name='tfds:cifar10:3.0.2'))
  assert cifar10['licence'] == 'unknown: none is stated by its authors' and 'Krizhevsky' in cifar10['citation']
  assert card.card(source_of(distinct(2), name='tfds:mine'))['licence'] == 'unknown'


def test_tfds_says_its_own_licence(tmp_path):
  import tensorflow_datasets as tfds

  class Mine(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Two pictures."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      features = tfds.features.FeaturesDict({'image': tfds.features.Image(shape=(4, 4, 3))})
      return tfds.core.DatasetInfo(builder=self, features=features, license='Some licence', citation='Somebody, 2020',
                                   homepage='https://example.org/mine')

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples()}

    def _generate_examples(self):
      write_images(tmp_path, distinct(2, (4, 4, 3)), ['', ''])
      yield from ((i, {'image': tmp_path / f'{i:04d}.png'}) for i in range(2))

  Mine(data_dir=tmp_path, file_format='array_record').download_and_prepare()
  source = sources.load('tfds:mine', data_dir=str(tmp_path))
  found = card.card(source)
  assert found['licence'] == 'Some licence' and found['licence_source'] == 'dataset_info.json'
  assert found['citation'] == 'Somebody, 2020' and found['homepage'] == 'https://example.org/mine'
  assert found['num_examples'] == found['unlabelled'] == 2
  for text in ('[]', '{"redistributionInfo": 3}', '{"location": {"urls": 1}}', '{', '\ud800'):
    (source.folder / 'dataset_info.json').write_bytes(text.encode('utf-8', 'surrogatepass'))
    assert card.card(source)['licence'] == 'unknown'


def test_training_writes_the_card(tiny_run):
  source = sources.load('digits')
  found = json.loads((tiny_run / 'data_card.json').read_text())
  assert found['hash'] == sources.digest(source.images, source.labels)
  assert found['num_examples'] == 1297 == sum(found['classes'].values())
  assert found['held_out']['split'] == 'test' and found['held_out']['overlap'] == 0
  made_with = found.pop('made_with')
  assert made_with['source'] == 'digits' and found == card.card(source, held_out='test')


def test_a_card_is_made_again_only_for_other_settings_or_data(tmp_path, monkeypatch):
  config, source, made = tiny_config(), sources.load('digits'), []
  monkeypatch.setattr(card, 'card', lambda source, *_, **settings: made.append(settings) or {'source': source.name})
  path = tmp_path / 'data_card.json'
  train.write_card(tmp_path, config, source, ())
  text = path.read_bytes()
  train.write_card(tmp_path, config, source, ())
  assert len(made) == 1 and path.read_bytes() == text
  train.write_card(tmp_path, tiny_config(eval__held_out='val'), source, ())
  assert len(made) == 2 and made[1]['held_out'] == 'val'
  train.write_card(tmp_path, config, source_of(distinct(5)), ())
  assert len(made) == 3
  path.write_text('{"made_')
  train.write_card(tmp_path, config, source, ())
  assert len(made) == 4 and path.read_bytes() == text
  assert [p.name for p in tmp_path.iterdir()] == ['data_card.json']


def test_bad_data_end_training_with_a_sentence(tmp_path):
  with pytest.raises(UserError, match=r'config\.data: At least 11 of the 20 records'):
    train.write_card(tmp_path, tiny_config(), Read(source_of(distinct(20)), range(11)), ())
  assert not list(tmp_path.iterdir())
