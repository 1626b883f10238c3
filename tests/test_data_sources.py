"""The sources that need no image files, the names of all of them, and what identifies and orders a data set."""
import pickle
import re

import numpy as np
import pytest

from diffusion_jax.data import sources


def test_digits_are_split_into_all_1797_without_overlap():
  train, test = sources.load('digits'), sources.load('digits', 'test')
  assert (len(train), len(test)) == (1297, 500)
  assert train.shape == test.shape == (8, 8, 1) and train.num_classes == 10
  from sklearn.datasets import load_digits
  found = np.concatenate([train.images, test.images])[..., 0] * (16 / 255)
  order = lambda x: np.unique(np.round(x).astype(int).reshape(1797, 64), axis=0, return_counts=True)
  for ours, theirs in zip(order(found), order(load_digits().images), strict=True):
    np.testing.assert_array_equal(ours, theirs)  # the same 1797 images, so each lies in exactly one split
  assert train.images.max() == 255 and set(test.labels) == set(range(10))


@pytest.mark.parametrize('shape', [(16, 1), (8, 6, 3), (4, 5, 6, 2)])
def test_synthetic_images_have_any_rank_and_depend_on_split_and_index_alone(shape):
  name = f'synthetic:{"x".join(map(str, shape))}:20'
  source, again = sources.load(name), sources.load(name)
  assert len(source) == 20 and source.shape == shape and source.nbytes == 20 * np.prod(shape)
  found = [source[i] for i in range(20)]
  assert {label for _, label in found} == set(range(source.num_classes)) and source.num_classes >= 2
  assert len({image.tobytes() for image, _ in found}) == 20
  for i in (19, 3):
    np.testing.assert_array_equal(again[i][0], found[i][0])
  assert (sources.load(name, 'test')[0][0] != found[0][0]).any()
  assert all(image.dtype == np.uint8 and image.shape == shape for image, _ in found)
  assert len(sources.load(name.rpartition(':')[0])) == 1024


@pytest.mark.parametrize('rest', ['8', '8x8x8x8x3', '8x0x3', '8x8x3:0', '8xx3', 'big'])
def test_a_malformed_synthetic_source_is_explained(rest):
  with pytest.raises(ValueError, match='synthetic:HxWxC:N'):
    sources.load(f'synthetic:{rest}')


@pytest.mark.parametrize(('name', 'text'), [
    ('foldr:/data', 'did you mean folder'), ('cifar10', 'did you mean tfds:cifar10'), ('digit', 'did you mean digits'),
    ('qqqq', 'only digits, folder:PATH, zip:PATH, npz:PATH, tfds:NAME, synthetic:HxWxC'), ('', "no data source ''"),
    ('folder', 'write it as folder:PATH'), ('npz:', 'write it as npz:PATH'), ('digits:8', 'write it as digits'),
])
def test_an_unknown_source_gets_the_names_and_the_nearest_one(name, text):
  with pytest.raises(ValueError, match=re.escape(text)):
    sources.load(name)


@pytest.mark.parametrize('name', ['digits', 'synthetic:4x4x1'])
def test_an_unknown_split_is_an_error_that_lists_the_splits(name):
  with pytest.raises(ValueError, match="has no split 'tset'; it has test, train"):
    sources.load(name, 'tset')


@pytest.mark.parametrize('shape', [(9, 3), (4, 5, 1), (3, 4, 5, 2)])
def test_npz_of_one_to_three_axes_with_and_without_labels(shape, tmp_path):
  image = np.random.default_rng(0).integers(0, 256, (6, *shape), np.uint8)
  label = np.array([0, 2, 1, 2, 0, 1], np.int64)
  np.savez(tmp_path / 'train.npz', image=image, label=label)
  np.savez_compressed(tmp_path / 'test.npz', image=image[:2])
  for name in (f'npz:{tmp_path}', f'npz:{tmp_path}/train.npz'):
    source = sources.load(name)
    assert source.shape == shape and source.num_classes == 3 and len(source) == 6
    found, labels = sources.arrays(source)
    np.testing.assert_array_equal(found, image)
    np.testing.assert_array_equal(labels, label)
    assert labels.dtype == np.int32 and source[3][1] == 2
  assert sources.load(f'npz:{tmp_path}', 'test').num_classes == 0
  with pytest.raises(FileNotFoundError, match=r'There is no file .*val\.npz'):
    sources.load(f'npz:{tmp_path}', 'val')
  with pytest.raises(FileNotFoundError, match=r'There is no file .*none\.npz'):
    sources.load(f'npz:{tmp_path}/none.npz')
  with pytest.raises(ValueError, match="no split 'test'; it has train"):
    sources.load(f'npz:{tmp_path}/train.npz', 'test')


@pytest.mark.parametrize(('data', 'text'), [
    ({'image': np.zeros((2, 4, 4, 3), np.float32)}, 'is float32 [2, 4, 4, 3], expected uint8'),
    ({'image': np.zeros((2, 4), np.uint8)}, 'is uint8 [2, 4], expected uint8'),
    ({'image': np.zeros((0, 4, 4, 3), np.uint8)}, 'is uint8 [0, 4, 4, 3]'),
    ({'images': np.zeros((2, 4, 4, 3), np.uint8)}, 'has no array named image'),
    ({'image': np.zeros((2, 4, 4, 3), np.uint8), 'label': np.zeros(3, int)}, 'is int64 [3], expected ints'),
    ({'image': np.zeros((2, 4, 4, 3), np.uint8), 'label': np.zeros(2)}, 'is float64 [2], expected ints'),
    ({'image': np.zeros((2, 4, 4, 3), np.uint8), 'label': np.array([0, -1])}, 'expected ints from 0'),
    ({'image': np.array([{}, {}], object)}, 'cannot be read as an npz file of plain arrays'),
])
def test_npz_of_the_wrong_content_is_refused(data, text, tmp_path):
  np.savez(tmp_path / 'bad.npz', **data)
  with pytest.raises(ValueError, match=re.escape(text)):
    sources.load(f'npz:{tmp_path}/bad.npz')


def test_a_file_that_is_no_npz_is_refused_and_no_pickle_is_opened(tmp_path):
  np.savez(tmp_path / 'whole.npz', image=np.zeros((9, 8, 8, 3), np.uint8))
  np.save(tmp_path / 'one.npy', np.zeros(3))
  (tmp_path / 'cut.npz').write_bytes((tmp_path / 'whole.npz').read_bytes()[:500])
  (tmp_path / 'pickle.npz').write_bytes(pickle.dumps({'image': 1}))
  for name in ('cut.npz', 'pickle.npz', 'one.npy'):
    with pytest.raises(ValueError, match='cannot be read as an npz file of plain arrays'):
      sources.load(f'npz:{tmp_path}/{name}')


def test_digest_changes_with_pixels_labels_order_and_shape_only():
  found, labels = sources.arrays(sources.load('synthetic:6x6x3:12'))
  digest = sources.digest(found, labels)
  assert re.fullmatch('[0-9a-f]{64}', digest)
  assert sources.digest(np.asfortranarray(found), labels.astype(np.int64)) == digest
  changed = found.copy()
  changed[-1, -1, -1, -1] ^= 1
  reshaped = found.reshape(12, 12, 3, 3)
  others = [(changed, labels), (found, labels[::-1]), (found[::-1], labels[::-1]), (reshaped, labels)]
  assert len({digest, *(sources.digest(*other) for other in others)}) == 5


@pytest.mark.parametrize('n', [1, 2, 97])
def test_permutation_is_one_and_is_fixed_by_its_entropy(n):
  order = sources.permutation([3, 4], n)
  assert sorted(order) == list(range(n))
  np.testing.assert_array_equal(order, sources.permutation([3, 4], n))
