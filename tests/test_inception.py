"""The FID Inception against torch-fidelity's numbers, and what each known mistake would cost."""
import functools
import pathlib

import fidgen
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import jit
from PIL import Image

from diffusion_jax.metrics import batches, inception

EXPECTED = np.load(pathlib.Path(__file__).parent / 'fixtures' / 'inception.npz')
TOLERANCE = 1e-3  # of the largest feature; float32 alone costs 1e-5, every mistake below more than 15 tolerances


@pytest.fixture(scope='module', autouse=True)
def unoptimised():
  """The same network: XLA takes three times as long to compile it as all of these tests could gain by that."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(inception, '_network', jit(inception._network.__wrapped__))
    yield


@pytest.fixture(scope='module')
def weights():
  return fidgen.state_dict()


@pytest.fixture(scope='module')
def params(weights):
  return inception.from_torch(weights)


@pytest.fixture(scope='module')
def images():
  return {size: fidgen.images(size, n) for size, n in ((32, 2), (299, 1), (320, 1))}


def distance(found, expected):
  """The largest error, relative to the largest expected value."""
  return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


def features_of(params, x):
  """The 2048 features of prepared images, through the program that `extract` compiles for one image."""
  return batches.apply(inception._network, params, np.asarray(x), 1)['2048']


@pytest.mark.parametrize('size', [32, 299, 320])
def test_every_output_is_torch_fidelitys(params, images, size):
  found = inception.extract(params, images[size], batch_size=1)
  assert list(found) == list(inception.OUTPUTS)
  for name, values in found.items():
    expected = EXPECTED[f'b{size}/{name}']
    assert values.shape == (len(expected), inception.OUTPUTS[name]) and values.dtype == np.float32
    assert distance(values, expected) < TOLERANCE, name


def half_pixel(x, size):
  return jax.image.resize(x, (len(x), size, size, 3), 'bilinear', antialias=False)


def align_corners(x, size):
  at = np.linspace(0, x.shape[1] - 1, size)
  low = np.minimum(at.astype(int), x.shape[1] - 2)
  f = (at - low)[:, None]
  rows = x[:, low] * (1 - f)[..., None] + x[:, low + 1] * f[..., None]
  return rows[:, :, low] * (1 - f) + rows[:, :, low + 1] * f


def bicubic(x, size):
  planes = [[Image.fromarray(image[..., c]).resize((size, size), Image.Resampling.BICUBIC) for c in range(3)]
            for image in x]
  return np.stack([np.stack([np.asarray(plane) for plane in image], -1) for image in planes])


WRONG_INPUTS = {
    'half-pixel resize': lambda x: (half_pixel(x, 299) - 128) / 128,
    'aligned corners': lambda x: (align_corners(x, 299) - 128) / 128,
    'bicubic resize': lambda x: (bicubic(x, 299) - 128) / 128,
    'resize rounded to integers': lambda x: jnp.round(inception.prepare(x) * 128) / 128,
    'scale of 127.5': lambda x: (inception.prepare(x) * 128 + 128) / 127.5 - 1,
    'blue first': lambda x: inception.prepare(x[..., ::-1]),
    'no resize': lambda x: jnp.pad((x - 128) / 128, ((0, 0), (0, 267), (0, 267), (0, 0))),
}


@pytest.mark.parametrize('mistake', WRONG_INPUTS)
def test_a_wrong_input_is_seen(params, images, mistake):
  x = jnp.asarray(WRONG_INPUTS[mistake](images[32].astype(np.float32)), jnp.float32)
  assert distance(features_of(params, x), EXPECTED['b32/2048']) > 15 * TOLERANCE


def on_leaves(change):
  return lambda params: {module: {name: change(module, name, leaf) for name, leaf in leaves.items()}
                         for module, leaves in params.items()}


def swap_halves(module, name, leaf):
  """7b's output with the 1x3 and 3x1 branches of its first tower exchanged, as 7c's inputs see it."""
  if not module.startswith('Mixed_7c') or name != 'kernel' or leaf.shape[2] != 2048:
    return leaf
  return leaf[:, :, np.r_[:320, 704:1088, 320:704, 1088:2048]]


WRONG_PARAMETERS = {
    'epsilon of 1e-5': lambda module, name, leaf: leaf - 1e-3 + 1e-5 if name == 'var' else leaf,
    'bfloat16': lambda module, name, leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32),
    'mirrored rows': lambda module, name, leaf: leaf[:, ::-1] if leaf.shape[:2] == (1, 7) else leaf,
    'branches exchanged': swap_halves,
}


@pytest.mark.parametrize('size', [32, 299])
@pytest.mark.parametrize('mistake', WRONG_PARAMETERS)
def test_wrong_parameters_are_seen(params, images, mistake, size):
  wrong = on_leaves(WRONG_PARAMETERS[mistake])(params)
  assert distance(features_of(wrong, inception.prepare(images[size])), EXPECTED[f'b{size}/2048']) > 15 * TOLERANCE


@pytest.fixture(scope='module')
def with_wrong_pools(params, images):
  """mistakes [3] bool -> the 2048 features of one image by a network that makes them: one program for all."""
  average, block = inception.average_pool, inception._block_8

  def features(params, x, mistakes):
    counts, mean_in_7c, maximum_in_7b = mistakes
    either = lambda x: jnp.where(counts, nn.avg_pool(x, (3, 3), (1, 1), 'SAME'), average(x))
    last = iter([lambda x: jnp.where(maximum_in_7b, inception.max_pool(x), either(x)),
                 lambda x: jnp.where(mean_in_7c, average(x), inception.max_pool(x))])
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(inception, 'average_pool', either)
      patch.setattr(inception, '_block_8', lambda conv, x, pool: block(conv, x, next(last)))
      return inception.Inception().apply({'params': params}, x)['2048']
  compiled = jit(features)
  return functools.cache(lambda *mistakes: compiled(params, inception.prepare(images[32][:1]), jnp.asarray(mistakes)))


@pytest.mark.parametrize('mistake', [0, 1, 2], ids=['padding counted', 'mean in 7c', 'maximum in 7b'])
def test_a_wrong_pool_is_seen(with_wrong_pools, mistake):
  expected, makes = EXPECTED['b32/2048'][:1], [i == mistake for i in range(3)]
  assert distance(with_wrong_pools(*[False] * 3), expected) < TOLERANCE
  assert distance(with_wrong_pools(*makes), expected) > 15 * TOLERANCE


def test_results_do_not_depend_on_the_batch(params, images):
  """Neither on its size nor on what else is in it, and a batch that is not full adds nothing."""
  x = np.concatenate([images[32], images[32][:1, ::-1]])
  pairs = inception.extract(params, x, batch_size=2)
  for other in (inception.extract(params, x, batch_size=1, outputs=pairs),
                {name: v[::-1] for name, v in inception.extract(params, x[::-1], batch_size=2).items()}):
    for name, values in pairs.items():
      assert len(values) == 3
      assert distance(other[name], values) < 1e-5, name
  assert distance(pairs['2048'][2], pairs['2048'][0]) > TOLERANCE


def test_grey_images_have_three_equal_channels(params, images):
  grey = images[32][..., :1]
  found, colour = (inception.extract(params, x, 2, ['2048', '64']) for x in (grey, np.repeat(grey, 3, -1)))
  assert list(found) == ['2048', '64']
  assert distance(found['2048'], colour['2048']) < 1e-5
  assert distance(found['2048'], EXPECTED['b32/2048']) > TOLERANCE


@pytest.mark.parametrize(('height', 'width'), [(5, 32), (64, 7), (299, 299), (320, 500), (1, 1)])
def test_resize_of_a_ramp_is_the_ramp(height, width):
  """Output pixel (i, j) is at (i H / 299, j W / 299) of the input, and not beyond its last pixel."""
  ramp = lambda n: np.arange(n) * (255 / max(n - 1, 1))
  x = np.stack(np.broadcast_arrays(ramp(height)[:, None], ramp(width), 7.0), -1).astype(np.float32)
  at = lambda n: np.minimum(np.arange(299) * (n / 299), n - 1) * (255 / max(n - 1, 1))
  expected = np.stack(np.broadcast_arrays(at(height)[:, None], at(width), 7.0), -1)
  np.testing.assert_allclose(inception.prepare(x[None])[0], (expected - 128) / 128, atol=2e-5)


def test_resize_has_no_antialias():
  """Half the size takes every second pixel, and no resize is needed at 299."""
  x = np.random.default_rng(0).integers(0, 256, (2, 598, 598, 3), dtype=np.uint8)
  np.testing.assert_array_equal(inception.prepare(x), (x[:, ::2, ::2].astype(np.float32) - 128) / 128)
  np.testing.assert_array_equal(inception.prepare(x[:, :299, :299]), (x[:, :299, :299].astype(np.float32) - 128) / 128)


def test_average_leaves_padding_out():
  x = jnp.arange(1.0, 10).reshape(1, 3, 3, 1)
  np.testing.assert_allclose(inception.average_pool(x)[0, :, :, 0], [[3, 3.5, 4], [4.5, 5, 5.5], [6, 6.5, 7]])


@pytest.mark.parametrize('bad', [
    np.zeros((2, 32, 32, 3), np.float32), np.zeros((2, 3, 32, 32), np.uint8), np.zeros((32, 32, 3), np.uint8),
    np.zeros((2, 32, 32, 4), np.uint8), np.zeros((0, 32, 32, 3), np.uint8)])
def test_bad_images_are_named(bad):
  with pytest.raises(ValueError, match='takes images uint8'):
    inception.extract({}, bad)


def test_bad_arguments_are_named(images):
  with pytest.raises(ValueError, match="no output '2049'"):
    inception.extract({}, images[32], outputs=['2048', '2049'])
  with pytest.raises(ValueError, match='batch_size must be at least 1, got 0'):
    inception.extract({}, images[32], batch_size=0)


@pytest.mark.parametrize(('change', 'message'), [
    ({'fc.bias': None}, r"lack 'fc.bias' \(1 of 472 names\)"),
    ({'Conv2d_1a_3x3.bn.running_var': None}, "lack 'Conv2d_1a_3x3.bn.running_var'"),
    ({'AuxLogits.fc.bias': np.zeros(3, np.float32)}, "no 'AuxLogits.fc.bias'"),
    ({'fc.weight': np.zeros((1000, 2048))}, r"'fc.weight' must have the shape \[1008, 2048\], got \[1000, 2048\]"),
    ({'Conv2d_1a_3x3.conv.weight': np.zeros((3, 3, 3, 32))}, r'the shape \[32, 3, 3, 3\], got \[3, 3, 3, 32\]'),
    ({'fc.bias': np.zeros(1008, np.int32)}, "'fc.bias' must hold finite floating-point numbers, got int32"),
    ({'fc.bias': np.full(1008, np.nan)}, "'fc.bias' must hold finite")])
def test_weights_that_do_not_fit_are_named(weights, change, message):
  with pytest.raises(ValueError, match=message):
    inception.from_torch({name: array for name, array in (weights | change).items() if array is not None})


def test_counters_may_be_there(weights, params):
  counted = weights | {name.replace('bn.bias', 'bn.num_batches_tracked'): np.zeros((), np.int64)
                       for name in weights if name.endswith('bn.bias')}
  assert len(weights) == 472 and len(counted) == 566
  jax.tree.map(np.testing.assert_array_equal, inception.from_torch(counted), params)


# Where the graph has the convolutions of each kind of block, from its published node names.
STEM = {'Conv2d_1a_3x3': 'conv', 'Conv2d_2a_3x3': 'conv_1', 'Conv2d_2b_3x3': 'conv_2', 'Conv2d_3b_1x1': 'conv_3',
        'Conv2d_4a_3x3': 'conv_4'}
KINDS = {
    '5': {'1x1': 'conv', '5x5_1': 'tower/conv', '5x5_2': 'tower/conv_1', '3x3dbl_1': 'tower_1/conv',
          '3x3dbl_2': 'tower_1/conv_1', '3x3dbl_3': 'tower_1/conv_2', '_pool': 'tower_2/conv'},
    '6a': {'3x3': 'conv', '3x3dbl_1': 'tower/conv', '3x3dbl_2': 'tower/conv_1', '3x3dbl_3': 'tower/conv_2'},
    '6': {'1x1': 'conv', '7x7_1': 'tower/conv', '7x7_2': 'tower/conv_1', '7x7_3': 'tower/conv_2',
          '7x7dbl_1': 'tower_1/conv', '7x7dbl_2': 'tower_1/conv_1', '7x7dbl_3': 'tower_1/conv_2',
          '7x7dbl_4': 'tower_1/conv_3', '7x7dbl_5': 'tower_1/conv_4', '_pool': 'tower_2/conv'},
    '7a': {'3x3_1': 'tower/conv', '3x3_2': 'tower/conv_1', '7x7x3_1': 'tower_1/conv', '7x7x3_2': 'tower_1/conv_1',
           '7x7x3_3': 'tower_1/conv_2', '7x7x3_4': 'tower_1/conv_3'},
    '7': {'1x1': 'conv', '3x3_1': 'tower/conv', '3x3_2a': 'tower/mixed/conv', '3x3_2b': 'tower/mixed/conv_1',
          '3x3dbl_1': 'tower_1/conv', '3x3dbl_2': 'tower_1/conv_1', '3x3dbl_3a': 'tower_1/mixed/conv',
          '3x3dbl_3b': 'tower_1/mixed/conv_1', '_pool': 'tower_2/conv'}}
BLOCKS = {'5b': 'mixed', '5c': 'mixed_1', '5d': 'mixed_2', '6a': 'mixed_3', '6b': 'mixed_4', '6c': 'mixed_5',
          '6d': 'mixed_6', '6e': 'mixed_7', '7a': 'mixed_8', '7b': 'mixed_9', '7c': 'mixed_10'}
SCOPES = STEM | {f'Mixed_{block}.branch{branch}': f'{scope}/{place}' for block, scope in BLOCKS.items()
                 for branch, place in KINDS.get(block, KINDS.get(block[0])).items()}


@pytest.fixture(scope='module')
def graph(weights):
  """The weights as constants of the TensorFlow graph."""
  arrays = {'softmax/weights': weights['fc.weight'].T, 'softmax/biases': weights['fc.bias'],
            'pool_3/_reshape/shape': np.asarray([-1, 2048], np.int32), 'Sub/y': np.asarray(128.0)}
  for module, scope in SCOPES.items():
    arrays[f'{scope}/conv2d_params'] = weights[f'{module}.conv.weight'].transpose(2, 3, 1, 0)
    for theirs, ours in (('gamma', 'weight'), ('beta', 'bias'), ('moving_mean', 'running_mean'),
                         ('moving_variance', 'running_var')):
      arrays[f'{scope}/batchnorm/{theirs}'] = weights[f'{module}.bn.{ours}']
  return arrays


def test_the_graphs_constants_give_the_same_parameters(graph, params):
  assert len(SCOPES) == 94 == len(set(SCOPES.values()))
  jax.tree.map(np.testing.assert_array_equal, inception.from_tensorflow(graph), params)


def test_a_graph_without_gamma_has_scale_one(graph, params):
  found = inception.from_tensorflow({name: array for name, array in graph.items() if not name.endswith('gamma')})
  expected = on_leaves(lambda module, name, leaf: jnp.ones_like(leaf) if name == 'scale' else leaf)(params)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(('change', 'message'), [
    ({'mixed_8/tower/conv_1/batchnorm/gamma': None}, "lack 'mixed_8/tower/conv_1/batchnorm/gamma'"),
    ({'mixed_11/conv/conv2d_params': np.zeros((1, 1, 8, 8), np.float32)}, "no 'mixed_11/conv/conv2d_params'"),
    ({'softmax/weights': np.zeros((1008, 2048), np.float32)}, r'shape \[2048, 1008\], got \[1008, 2048\]')])
def test_a_graph_that_does_not_fit_is_named(graph, change, message):
  with pytest.raises(ValueError, match=message):
    inception.from_tensorflow({name: array for name, array in (graph | change).items() if array is not None})


def test_written_parameters_come_back(params, tmp_path):
  path = tmp_path / 'inception.safetensors'
  path.write_bytes(inception.to_safetensors(params))
  jax.tree.map(np.testing.assert_array_equal, inception.load(path), params)

  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match='not a whole safetensors file'):
    inception.load(path)
  with pytest.raises(OSError, match='absent'):
    inception.load(tmp_path / 'absent')
