"""Name tables and folders of other libraries: what goes wrong is one sentence."""
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from diffusion_jax.convert import autoencoder, files, names
from diffusion_jax.runtime.config import UserError

SHAPES = {'conv': {'kernel': jax.ShapeDtypeStruct((3, 3, 2, 4), np.float32),
                   'bias': jax.ShapeDtypeStruct((4,), np.float32)},
          'norm': {'scale': jax.ShapeDtypeStruct((4,), np.float32)},
          'table': {'embedding': jax.ShapeDtypeStruct((5, 2), np.float32)}}
TABLE = {'a.conv1': 'conv', 'a.norm1': 'norm', 'embed': 'table', 'not.there': 'unused'}


def tensors(dtype=np.float32):
  rng = np.random.default_rng(0)
  shapes = {'a.conv1.weight': (4, 2, 3, 3), 'a.conv1.bias': (4,), 'a.norm1.weight': (4,), 'embed.weight': (5, 2)}
  return {key: rng.standard_normal(shape).astype(dtype) for key, shape in shapes.items()}


def test_a_kernel_turns_and_the_rest_stays():
  theirs = tensors()
  params = names.from_theirs(TABLE, theirs, SHAPES, 'it')
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, SHAPES)
  for i, j, k, l in np.ndindex(3, 3, 2, 4):
    assert params['conv']['kernel'][i, j, k, l] == theirs['a.conv1.weight'][l, k, i, j]
  np.testing.assert_array_equal(params['table']['embedding'], theirs['embed.weight'])


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_there_and_back_is_the_identity(dtype):
  theirs = tensors(dtype)
  params = names.from_theirs(TABLE, theirs, SHAPES, 'it')
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype('float32')}
  back = names.to_theirs(TABLE, params, dtype)
  assert set(back) == set(theirs)
  for key, tensor in theirs.items():
    assert back[key].dtype == dtype and back[key].tobytes() == tensor.tobytes()


def refused(theirs, words):
  with pytest.raises(UserError, match=words) as error:
    names.from_theirs(TABLE, theirs, SHAPES, 'FILE')
  assert str(error.value).startswith('FILE') and '\n' not in str(error.value)
  return str(error.value)


def test_a_missing_name_is_given_with_the_nearest():
  theirs = tensors()
  theirs['a.conv1.wieght'] = theirs.pop('a.conv1.weight')
  refused(theirs, r'FILE lacks a.conv1.weight \(nearest: a.conv1.wieght\): ')


def test_an_unknown_name_is_given_with_the_nearest():
  refused({**tensors(), 'a.conv1.weight2': np.zeros(1)}, r'no place for: a.conv1.weight2 \(nearest: a.conv1.weight\)$')


def test_ten_names_are_enough():
  many = {f'extra.{i:02}': np.zeros(1) for i in range(25)}
  message = refused({**tensors(), **many}, 'and 15 more$')
  assert message.count('extra.') == 10


def test_a_wrong_shape_is_given_with_both():
  refused({**tensors(), 'a.conv1.weight': np.zeros((4, 2, 3, 1), np.float32)},
          r'a.conv1.weight has \[4, 2, 3, 1\] and not \[4, 2, 3, 3\]')


@pytest.mark.parametrize('dtype', [np.float64, np.int64])
def test_numbers_that_float32_cannot_hold_are_refused(dtype):
  refused({**tensors(), 'a.conv1.bias': np.zeros(4, dtype)}, rf'float32 cannot hold a.conv1.bias \({np.dtype(dtype)}\)')


# Folders


def test_a_folder_is_read_as_it_was_written(tmp_path):
  net = autoencoder.AutoencoderKL(channels=(4, 8), blocks=1, latent=2, groups=2)
  theirs = {**tensors(), 'half': np.ones((2, 1), ml_dtypes.bfloat16), 'empty': np.zeros((0, 3), np.float16)}
  files.write(tmp_path, autoencoder.config(net), theirs, 'diffusion_pytorch_model')
  assert sorted(path.name for path in tmp_path.iterdir()) == ['config.json', 'diffusion_pytorch_model.safetensors']
  config = files.read_config(tmp_path)
  assert files.class_name(config, autoencoder.CLASSES, tmp_path) == 'AutoencoderKL'
  assert autoencoder.net(config) == net
  back = files.read_weights(tmp_path)
  assert {key: (a.dtype, a.shape, a.tobytes()) for key, a in back.items()} == {
      key: (a.dtype, a.shape, a.tobytes()) for key, a in theirs.items()}


def test_weights_in_several_files(tmp_path):
  theirs = tensors()
  parts = {'model-1.safetensors': list(theirs)[:1], 'model-2.safetensors': list(theirs)[1:]}
  for part, keys in parts.items():
    safetensors.numpy.save_file({key: theirs[key] for key in keys}, tmp_path / part)
  index = {'weight_map': {key: part for part, keys in parts.items() for key in keys}}
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
  assert set(files.read_weights(tmp_path)) == set(theirs)
  (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': '../b.safetensors'}}))
  with pytest.raises(UserError, match='names a file outside its folder'):
    files.read_weights(tmp_path)


def test_a_pickle_is_refused_with_the_way_out(tmp_path):
  (tmp_path / 'diffusion_pytorch_model.bin').write_bytes(b'PK\3\4')
  with pytest.raises(UserError, match=r'diffusion_pytorch_model.bin, a pickle, .* safe_serialization=True'):
    files.read_weights(tmp_path)


def test_no_weights_and_other_names(tmp_path):
  with pytest.raises(UserError, match=r'has no diffusion_pytorch_model.safetensors or model.safetensors$'):
    files.read_weights(tmp_path / 'none')
  safetensors.numpy.save_file(tensors(), tmp_path / 'model.fp16.safetensors')
  with pytest.raises(UserError, match=r'it has model.fp16.safetensors: rename the one that you mean'):
    files.read_weights(tmp_path)


@pytest.mark.parametrize('keep', [0, 7, 40, -1])
def test_a_truncated_file(tmp_path, keep):
  path = tmp_path / 'model.safetensors'
  path.write_bytes(safetensors.numpy.save(tensors())[:keep])
  with pytest.raises(UserError, match=r'model.safetensors is damaged or no safetensors file .*: fetch it again'):
    files.read_weights(tmp_path)


@pytest.mark.parametrize(('text', 'words'), [
    (None, 'has no config.json: give the folder of one model'), ('{', 'config.json cannot be read'),
    ('[]', 'config.json must hold an object, got list'), ('{"_class_name": "VQModel"}', "is of class 'VQModel'; those"),
    ('{}', 'is of class None; those that can be converted are AutoencoderKL')])
def test_a_config_that_is_none(tmp_path, text, words):
  if text is not None:
    (tmp_path / 'config.json').write_text(text)
  with pytest.raises(UserError, match=words):
    files.class_name(files.read_config(tmp_path), autoencoder.CLASSES, tmp_path)
