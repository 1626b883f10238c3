"""The U-Net against DDPM's published sizes and against diffusers' UNet2DModel."""
import functools
import itertools
import math
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from nets import filled, jit, normal, shapes_of
from safetensors.numpy import load_file
from theirs import converted

from diffusion_jax.nets import layers
from diffusion_jax.nets.blocks import SelfAttention, upsample
from diffusion_jax.nets.unet import UNet
from diffusion_jax.runtime import sharding

FIXTURE = pathlib.Path(__file__).parent / 'fixtures' / 'unet2d_ddpm_cifar10'
SMALL = functools.partial(UNet, channels=8, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.0, groups=4,
                          num_classes=3)

# The whole network


@pytest.mark.parametrize(('net', 'size', 'count'), [
    (UNet(), 32, 35_746_307), (UNet(multipliers=(1, 1, 2, 2, 4, 4)), 256, 113_673_219)], ids=['CIFAR-10', '256x256'])
def test_parameter_counts_are_ddpms(net, size, count):
  """The paper says 35.7M and 114M (appendix B)."""
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of(net, (1, size, size, 3)))) == count


def test_equals_diffusers():
  """DDPM's CIFAR-10 network in another library, all its parameters random, computed there in float64."""
  net = UNet(channels=8, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.0, groups=4)
  params = converted(load_file(f'{FIXTURE}.safetensors'), levels=4)
  saved = np.load(f'{FIXTURE}.npz')
  x = saved['sample'].transpose(0, 2, 3, 1)
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes_of(net, x.shape))
  out = jit(lambda params, x, t: net.apply({'params': params}, x, t, {}))(params, x, saved['timestep'])
  np.testing.assert_allclose(out, saved['output'].transpose(0, 2, 3, 1), atol=1e-4)


@pytest.mark.parametrize('space', [(8,), (8, 16), (4, 8, 8)])
def test_one_to_three_spatial_axes_keep_their_shape(space):
  net = SMALL()
  shapes = shapes_of(net, (2, *space, 3))
  assert shapes['conv_in']['kernel'].shape == (3,) * len(space) + (3, 8)
  out = jax.eval_shape(lambda p, x: net.apply({'params': p}, x, x[:, 0].ravel()[:2], {'label': jnp.zeros(2, int)}),
                       shapes, jnp.zeros((2, *space, 3)))
  assert (out.shape, out.dtype) == ((2, *space, 3), jnp.float32)


def test_no_spatial_axis_is_special():
  """Turning a volume and every kernel turns the output, through convolutions at stride 1 and 2 and attention."""
  net = UNet(channels=4, multipliers=(1, 1), blocks=1, attention=(2,), groups=2)
  params, x, noise = filled(shapes_of(net, (1, 4, 4, 4, 1))), normal(1, 4, 4, 4, 1), jnp.full(1, 300.0)
  turn = lambda a, first: a.transpose(*range(first), first + 2, first, first + 1, *range(first + 3, a.ndim))
  apply = jit(lambda params, x: net.apply({'params': params}, x, noise, {}))
  turned = apply(jax.tree.map(lambda a: turn(a, 0) if a.ndim == 5 else a, params), turn(x, 1))
  np.testing.assert_allclose(turned, turn(apply(params, x), 1), atol=1e-5)
  assert not np.allclose(turned, apply(params, x), atol=1e-2)


@pytest.fixture(scope='module')
def small():
  """(net, x, params) of a small net with labels, on one axis."""
  net, x = SMALL(dropout=0.5), normal(4, 8, 3)
  return net, x, filled(shapes_of(net, x.shape))


@pytest.fixture(scope='module')
def apply(small):
  """apply(noise=, label=, drop=, key=, params=) of the small net; a key turns training on."""
  net, x, usual = small
  compiled = jit(lambda params, noise, cond, key: net.apply({'params': params}, x, noise, cond, train=key is not None,
                                                            rngs=None if key is None else {'dropout': key}))
  def run(noise=500.0, label=0, drop=False, key=None, params=usual):
    cond = {'label': jnp.broadcast_to(jnp.asarray(label), 4), 'drop': jnp.broadcast_to(drop, 4)}
    return np.asarray(compiled(params, jnp.full(4, noise), cond, key))
  return run


def test_zero_at_initialisation(small, apply):
  """By its last layer alone, whatever the others hold."""
  net, x, params = small
  last = jit(lambda key: net.init(key, x, jnp.ones(4), {'label': jnp.zeros(4, int)})['params']['conv_out'])
  zero = apply(params={**params, 'conv_out': last(jax.random.key(0))})
  np.testing.assert_array_equal(zero, np.zeros_like(x))
  assert np.abs(apply()).max() > 0.1


def test_output_depends_on_noise_and_label(apply):
  outputs = [apply(), apply(noise=501.0), apply(label=1), apply(label=2)]
  for a, b in itertools.combinations(outputs, 2):
    assert np.abs(a - b).max() > 1e-3


def test_a_dropped_label_is_the_null_class(apply):
  null = apply(label=3)
  for label in range(3):
    np.testing.assert_array_equal(apply(label=label, drop=True), null)
    assert np.abs(apply(label=label) - null).max() > 1e-3
  mixed = apply(label=jnp.arange(4) % 3, drop=jnp.array([True, False, False, True]))
  np.testing.assert_array_equal(mixed[[0, 3]], null[[0, 3]])
  np.testing.assert_array_equal(mixed[1], apply(label=1)[1])


def test_dropout_is_for_training_alone(apply):
  first, second = apply(key=jax.random.key(1)), apply(key=jax.random.key(2))
  assert np.abs(first - second).max() > 1e-2
  np.testing.assert_array_equal(first, apply(key=jax.random.key(1)))
  assert np.abs(apply() - first).max() > 1e-2  # which took no key at all


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: UNet(dropout=1.0), r'dropout must lie in \[0, 1\), got 1.0'),
    (lambda: UNet(dropout=-0.1), r'dropout must lie in \[0, 1\), got -0.1'),
    (lambda: UNet(channels=8, multipliers=(1, 2), groups=3), r'widths \[8, 16\], groups 3'),
    (lambda: UNet(groups=0), r'groups 0'),
    (lambda: UNet(multipliers=(1, 0)), r'widths \[128, 0\]'),
    (lambda: UNet(dtype='float16'), "dtype must be 'float32' or 'bfloat16', got 'float16'"),
    (lambda: UNet(num_classes=-1), 'num_classes must be at least 0, got -1'),
    (lambda: UNet(channels=2, groups=1), r'at least 4, 1 and one level, got 2, 2 and \(1, 2, 2, 2\)'),
    (lambda: UNet(blocks=0), r'got 128, 0 and'),
    (lambda: UNet(multipliers=()), r'got 128, 2 and \(\)'),
    (lambda: shapes_of(UNet(), (1, 32, 12, 3)), r'4 levels need sizes divisible by 8, got \(32, 12\)'),
    (lambda: layers.GroupNorm(4).init(jax.random.key(0), jnp.zeros((1, 8, 6))), '6 channels, 4 groups'),
])
def test_bad_arguments_are_named_with_both_values(make, words):
  with pytest.raises(ValueError, match=words):
    make()


@pytest.mark.parametrize('space', [(6,), (2, 3)])
def test_attention_closed_form_and_order_of_positions(space):
  """Softmax(Q K' C^-1/2) V over all positions, whatever their arrangement; so permuting them permutes the output."""
  net, x = SelfAttention(groups=2, dtype='float32'), normal(2, *space, 8)
  params = filled(jax.eval_shape(net.init, jax.random.key(0), x)['params'])
  run = jit(lambda x: net.apply({'params': params}, x))
  flat = x.reshape(2, 6, 8)
  h = np.asarray(jit(layers.GroupNorm(2).apply)({'params': params['norm']}, flat), np.float64)
  dense = lambda name, h: h @ np.asarray(params[name]['kernel'], np.float64) + params[name]['bias']
  query, key, value = (dense(name, h) for name in ('query', 'key', 'value'))
  weights = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(8))
  expected = flat + dense('out', weights / weights.sum(-1, keepdims=True) @ value)
  np.testing.assert_allclose(run(x).reshape(2, 6, 8), expected, atol=1e-5)
  order = np.random.default_rng(0).permutation(6)
  np.testing.assert_allclose(run(flat[:, order].reshape(x.shape)).reshape(2, 6, 8), expected[:, order], atol=1e-5)
  assert not np.allclose(expected[:, order], expected, atol=0.1)


def test_upsample_repeats_every_element():
  x = normal(1, 2, 3, 1)
  np.testing.assert_array_equal(upsample(jnp.asarray(x)), np.kron(x, np.ones((1, 2, 2, 1))))


# bfloat16


def loss_of(net):
  """Of (params, x): the mean square of the output."""
  return lambda params, x: jnp.mean(net.apply(
      {'params': params}, x, jnp.linspace(0, 999, len(x)), {'label': jnp.zeros(len(x), int)}).astype(jnp.float32) ** 2)


def test_bfloat16_keeps_parameters_and_gradients_float32():
  net = SMALL(dtype='bfloat16')
  shapes = shapes_of(net, (4, 8, 3))
  grads = jax.eval_shape(jax.grad(loss_of(net)), shapes, jnp.zeros((4, 8, 3)))
  assert {leaf.dtype for tree in (shapes, grads) for leaf in jax.tree.leaves(tree)} == {jnp.dtype('float32')}


def test_bfloat16_is_close_to_float32_and_not_float32(small, apply):
  _, x, params = small
  net, cond = SMALL(dtype='bfloat16'), {'label': jnp.zeros(4, int)}
  full, low = apply(), jit(lambda params: net.apply({'params': params}, x, jnp.full(4, 500.0), cond))(params)
  assert low.dtype == full.dtype == jnp.float32
  # One rounding to bfloat16 changes a number by 2^-9 at most: less than a tenth of that would not be bfloat16.
  assert 2e-4 < np.linalg.norm(low - full) / np.linalg.norm(full) < 2e-2


class Naive(nn.Module):
  """What flax does with dtype=bfloat16: it casts the kernel, so that the gradient of the cast is what is reduced."""

  @nn.compact
  def __call__(self, x, noise, cond):
    return nn.Dense(3, dtype=jnp.bfloat16)(nn.Conv(8, (3,), dtype=jnp.bfloat16)(x))


def reduced_types(net, folder):
  """The types that two devices sum over each other in the gradient of the loss, the batch spread over them.

  Read from the program right after XLA has split it over the devices: later passes are the backend's own, and those
  of the CPU turn every bfloat16 sum into float32, so that the compiled program would acquit any net.
  """
  mesh = sharding.make_mesh(2, 1)
  x = jax.ShapeDtypeStruct((4, 8, 3), jnp.float32)
  whole, spread = NamedSharding(mesh, P()), sharding.batch(mesh)
  gradient = jax.jit(jax.grad(loss_of(net)), in_shardings=(whole, spread), out_shardings=whole)
  # What comes out of the compilation cache writes no dump, and whether there is a cache is asked once.
  enabled = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()
  try:
    gradient.lower(shapes_of(net, x.shape), x).compile(compiler_options={
        'xla_backend_optimization_level': 0, 'xla_dump_to': str(folder), 'xla_dump_hlo_pass_re': 'spmd-partitioning',
        'xla_dump_hlo_as_text': True})
  finally:
    jax.config.update('jax_enable_compilation_cache', enabled)
    compilation_cache.reset_cache()
  program, = folder.glob('*after_spmd-partitioning*.txt')
  return [kind for line in program.read_text().splitlines() if re.search(r' all-reduce(-start)?\(', line)
          for kind in re.findall(r'(\w+)\[', line.partition(' all-reduce')[0].partition(' = ')[2])]


def test_devices_sum_gradients_in_float32(tmp_path):
  net = SMALL(multipliers=(1,), attention=(8,), dtype='bfloat16')
  types = reduced_types(net, tmp_path)
  assert set(types) == {'f32'}
  assert len(types) >= len(jax.tree.leaves(shapes_of(net, (4, 8, 3))))  # every parameter's is among them


def test_a_plain_cast_would_sum_gradients_in_bfloat16(tmp_path):
  assert 'bf16' in reduced_types(Naive(), tmp_path)
