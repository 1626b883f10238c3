"""Folders, zip files and TFDS directories: what they read, in which order, and what they say when it is bad."""
import pickle
import re
import warnings
import zipfile
from concurrent import futures

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data import images, sources


def pixels(i, height=6, width=6, channels=3):
  """Picture number i: uint8 [height,width,channels] noise."""
  return np.random.default_rng(i).integers(0, 256, (height, width, channels), np.uint8)


def save(path, image):
  """Writes an image file and the folders above it; [H,W,1] as greyscale."""
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path)


def write_tree(root, paths, **shape):
  """Writes picture i to paths[i] below root."""
  for i, path in enumerate(paths):
    save(root / path, pixels(i, **shape))
  return root


def write_zip(path, root):
  """Packs a folder, in an order that is not the sorted one."""
  with zipfile.ZipFile(path, 'w') as file:
    for found in sorted(root.rglob('*'), reverse=True):
      file.write(found, found.relative_to(root))
  return path


@pytest.fixture
def tree(tmp_path):
  """12 pictures of two classes, numbered against the order of their names."""
  return write_tree(tmp_path / 'tree', [f'{"cat" if i % 2 else "ant"}/{20 - i}.png' for i in range(12)])


def test_folder_classes_come_from_sub_folders_in_sorted_order(tree):
  source = sources.load(f'folder:{tree}')
  assert source.class_names == ['ant', 'cat'] and source.num_classes == 2 and source.shape == (6, 6, 3)
  found = sorted((('cat' if i % 2 else 'ant') + f'/{20 - i}.png', i) for i in range(12))
  assert len(source) == 12
  for k, (_, i) in enumerate(found):
    np.testing.assert_array_equal(source[k][0], pixels(i))
    assert source[k][1] == i % 2


def test_flat_folder_is_unlabelled_and_other_files_are_passed_over(tmp_path):
  root = write_tree(tmp_path / 'flat', ['b.png', 'a.PNG', '.hidden.png'], channels=1)
  (root / 'notes.txt').write_text('not an image')
  source = sources.load(f'folder:{root}', channels=1)
  assert source.num_classes == 0 and len(source) == 2
  np.testing.assert_array_equal(source[0][0], pixels(1, channels=1))
  assert [label for _, label in source] == [0, 0]


def test_folder_and_zip_of_the_same_images_are_byte_for_byte_equal(tree, tmp_path):
  packed = write_zip(tmp_path / 'tree.zip', tree)
  folder, zipped = sources.load(f'folder:{tree}'), sources.load(f'zip:{packed}')
  assert folder.class_names == zipped.class_names
  assert sources.digest(*sources.arrays(folder)) == sources.digest(*sources.arrays(zipped))


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_split_folders_select_and_share_class_numbers(kind, tmp_path):
  paths = ['train/ant/0.png', 'train/bee/1.png', 'test/bee/2.png', 'validation/bee/3.png', 'extra/4.png']
  root = write_tree(tmp_path / 'root', paths)
  name = f'folder:{root}' if kind == 'folder' else f'zip:{write_zip(tmp_path / "root.zip", root)}'
  for split, numbers, labels in [('train', [0, 1], [0, 1]), ('test', [2], [1]), ('val', [3], [1])]:
    found, found_labels = sources.arrays(sources.load(name, split))
    np.testing.assert_array_equal(found, [pixels(i) for i in numbers])
    np.testing.assert_array_equal(found_labels, labels)
  with pytest.raises(ValueError, match="no split 'trian'; it has test, train, val"):
    sources.load(name, 'trian')


def test_a_split_may_be_unlabelled_beside_a_labelled_one(tmp_path):
  root = write_tree(tmp_path, ['train/ant/0.png', 'train/bee/1.png', 'test/2.png'])
  assert sources.load(f'folder:{root}').num_classes == 2
  assert sources.load(f'folder:{root}', 'test').num_classes == 0


def test_without_split_folders_all_is_train(tree):
  with pytest.raises(ValueError, match="no split 'test'; it has train"):
    sources.load(f'folder:{tree}', 'test')


def test_images_inside_and_outside_class_folders_are_refused(tree):
  save(tree / 'loose.png', pixels(0))
  with pytest.raises(ValueError, match=r'both outside and inside class folders, loose\.png'):
    sources.load(f'folder:{tree}')


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_sources_survive_pickling_and_many_threads(kind, tree, tmp_path):
  name = f'folder:{tree}' if kind == 'folder' else f'zip:{write_zip(tmp_path / "tree.zip", tree)}'
  source = sources.load(name)
  copy = pickle.loads(pickle.dumps(source))
  with futures.ThreadPoolExecutor(8) as pool:
    for k, (image, label) in enumerate(pool.map(lambda i: copy[i % 12], range(240))):
      np.testing.assert_array_equal(image, source[k % 12][0])
      assert label == source[k % 12][1]


@pytest.mark.parametrize(('height', 'width'), [(8, 8), (16, 24), (24, 16), (5, 7), (8, 31)])
def test_size_resizes_the_shorter_side_and_crops_the_centre(height, width, tmp_path):
  # A ramp along each axis: resizing keeps the middle, so a centred crop is symmetric about it.
  y, x = np.mgrid[:height, :width]
  ramp = np.stack([255 * (y + 0.5) / height, 255 * (x + 0.5) / width, np.full_like(y, 77)], -1).astype(np.uint8)
  save(tmp_path / 'ramp.png', ramp)
  source = sources.load(f'folder:{tmp_path}', size=8)
  image = source[0][0].astype(int)
  assert source.shape == image.shape == (8, 8, 3)
  assert (image[..., 2] == 77).all()
  across = 255 * min(height, width) / np.array([height, width])  # the span of values that the crop keeps
  for axis in (0, 1):
    line = image[..., axis].mean(1 - axis)
    assert abs(line.mean() - 127.5) <= 255 / min(height, width)
    assert abs((line[-1] - line[0]) - across[axis] * 7 / 8) <= 12
  if height == width == 8:
    np.testing.assert_array_equal(image, ramp)


def test_resizing_is_antialiased(tmp_path):
  checks = 255 * (np.indices((64, 64, 3))[:2].sum(0) % 2)
  save(tmp_path / 'checks.png', checks.astype(np.uint8))
  image = sources.load(f'folder:{tmp_path}', size=8)[0][0]
  assert abs(image.astype(int) - 127).max() <= 3  # single pixels alternate: a picker would return 0 or 255


def test_palette_becomes_rgb_and_greyscale_rgba_or_16_bits_are_bad(tmp_path):
  palette = Image.fromarray(pixels(0)).convert('P', palette=Image.Palette.ADAPTIVE)
  palette.save(tmp_path / '0.png')
  save(tmp_path / '1.png', pixels(1, channels=1))
  save(tmp_path / '2.png', pixels(2, channels=4))
  Image.fromarray(np.full((6, 6), 999, np.uint16)).save(tmp_path / '3.png')
  source = sources.load(f'folder:{tmp_path}')
  np.testing.assert_array_equal(source[0][0], np.asarray(palette.convert('RGB')))
  for i, mode in [(1, 'L with 1 channels'), (2, 'RGBA with 4 channels'), (3, 'I;16 with 1 channels')]:
    with pytest.raises(sources.BadRecord, match=rf'{i}\.png: {mode}, expected RGB with 3'):
      source[i]
  with pytest.raises(ValueError, match=r'data\.channels is 2'):
    sources.load(f'folder:{tmp_path}', channels=2)
  with pytest.raises(ValueError, match=r'data\.size is -1'):
    sources.load(f'folder:{tmp_path}', size=-1)


def break_files(root):
  """Breaks three of the files below root, each in its own way, and returns their names."""
  for suffix in ('jpg', 'png'):
    save(root / f'cut.{suffix}', pixels(0, 64, 64))
    data = (root / f'cut.{suffix}').read_bytes()
    (root / f'cut.{suffix}').write_bytes(data[:len(data) // 2])
  (root / 'text.jpg').write_bytes(b'GET / HTTP/1.1')
  return ['cut.jpg', 'cut.png', 'text.jpg']


def test_broken_files_are_named_left_out_and_limited(tmp_path):
  root = write_tree(tmp_path / 'root', ['a.png', 'b.png', 'z.png'], height=64, width=64)
  names = break_files(root)
  source = sources.load(f'folder:{root}')
  with pytest.warns(UserWarning, match='3 bad records.*' + '.*'.join(map(re.escape, names))):
    found, labels = sources.arrays(source, max_bad=3)
  np.testing.assert_array_equal(found, [pixels(i, 64, 64) for i in range(3)])
  assert labels.dtype == np.int32 and labels.shape == (3,)
  with pytest.raises(ValueError, match=r'3 of the 6 records .* 2 are allowed: .*cut\.jpg.*data\.max_bad'):
    sources.arrays(source, max_bad=2)


def test_a_broken_first_image_does_not_decide_the_shape(tmp_path):
  break_files(write_tree(tmp_path, ['z.png'], height=5, width=4))
  assert sources.load(f'folder:{tmp_path}').shape == (5, 4, 3)
  with pytest.raises(ValueError, match=r'2 are allowed.*data\.max_bad'):
    sources.load(f'folder:{tmp_path}', max_bad=2)
  (tmp_path / 'z.png').unlink()
  with pytest.raises(ValueError, match='All 3 records'):
    sources.load(f'folder:{tmp_path}')


def test_without_size_an_image_of_another_shape_is_bad(tmp_path):
  write_tree(tmp_path, ['a.png', 'b.png'])
  save(tmp_path / 'c.png', pixels(0, 9, 6))
  with pytest.raises(sources.BadRecord, match=r'c\.png: shape \(9, 6, 3\), expected \(6, 6, 3\).*data\.size'):
    sources.load(f'folder:{tmp_path}')[2]
  assert len(sources.arrays(sources.load(f'folder:{tmp_path}', size=4))[0]) == 3


def test_a_damaged_zip_member_is_a_bad_record(tree, tmp_path):
  packed = write_zip(tmp_path / 'tree.zip', tree)
  with zipfile.ZipFile(packed) as file:
    offset = file.getinfo('ant/12.png').header_offset + 80
  data = bytearray(packed.read_bytes())
  data[offset] ^= 255
  packed.write_bytes(data)
  source = sources.load(f'zip:{packed}')
  with pytest.warns(UserWarning, match=r'1 bad records.*tree\.zip:ant/12\.png'):
    assert len(sources.arrays(source)[0]) == 11


def test_good_sources_do_not_warn(tree):
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    sources.arrays(sources.load(f'folder:{tree}'), max_bad=0)


def test_missing_and_empty_places_are_named(tmp_path):
  (tmp_path / 'notes.txt').write_text('no image')
  (tmp_path / 'short.zip').write_bytes(b'PK')
  with zipfile.ZipFile(tmp_path / 'empty.zip', 'w') as file:
    file.writestr('notes.txt', 'no image')
  for name in (f'folder:{tmp_path}/none', f'zip:{tmp_path}/none.zip'):
    with pytest.raises(FileNotFoundError, match=r'There is no f.*none'):
      sources.load(name)
  for name in (f'folder:{tmp_path}', f'zip:{tmp_path}/empty.zip'):
    with pytest.raises(FileNotFoundError, match=r'holds no images \(\.png'):
      sources.load(name)
  with pytest.raises(ValueError, match=r'short\.zip is not a zip file'):
    sources.load(f'zip:{tmp_path}/short.zip')


def test_an_unprepared_tfds_name_says_how_to_prepare_it(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"tfds:mnist is not prepared in .*tfds\.builder\('mnist', data_dir="):
    sources.load('tfds:mnist', data_dir=str(tmp_path))


def test_the_newest_finished_version_is_the_prepared_one(tmp_path):
  assert images.prepared('toy', tmp_path) is None
  for version in ('1.2.0', '1.10.0', 'incomplete.ABC123_2.0.0', '3.0.0'):
    folder = tmp_path / 'toy' / version
    folder.mkdir(parents=True)
    (folder / 'dataset_info.json').write_text('{}')
  (tmp_path / 'toy' / '3.0.0' / 'dataset_info.json').unlink()
  assert images.prepared('toy', tmp_path) == tmp_path / 'toy' / '1.10.0'
  assert images.prepared('toy:1.2.0', tmp_path) == tmp_path / 'toy' / '1.2.0'


def test_tfds_images_without_classes_keep_their_own_channels(tmp_path):
  import tensorflow_datasets as tfds

  class Grey(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Greyscale pictures without labels, of a shape that the features leave open."""

    VERSION = tfds.core.Version('1.0.0')

    def _info(self):
      features = tfds.features.FeaturesDict({'image': tfds.features.Image(shape=(None, None, 1)), 'text': np.int64})
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
      return {'train': self._generate_examples()}

    def _generate_examples(self):
      for i in range(5):
        save(tmp_path / f'{i}.png', pixels(i, channels=1))
        yield i, {'image': tmp_path / f'{i}.png', 'text': i}

  Grey(data_dir=tmp_path, file_format='array_record').download_and_prepare()
  source = sources.load('tfds:grey', data_dir=str(tmp_path))
  assert source.shape == (6, 6, 1) and source.num_classes == 0 and source.class_names == []
  found, labels = sources.arrays(source)
  assert {image.tobytes() for image in found} == {pixels(i, channels=1).tobytes() for i in range(5)}
  assert not labels.any()
