"""DDPM++, NCSN++ and ADM: published sizes, diffusers' layers, and what all U-Nets have in common."""
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import filled, jit, normal, shapes_of
from theirs import converted, last, remade

from diffusion_jax.nets import blocks, edm2
from diffusion_jax.nets.unet import ADM, DDPMpp, NCSNpp, UNet

SAVED = np.load(pathlib.Path(__file__).parent / 'fixtures' / 'unet_families.npz')
TINY = {'channels': 8, 'multipliers': (1, 2), 'blocks': 1, 'attention': (4,), 'dropout': 0.0, 'num_classes': 3}
FAMILIES = {
    'DDPM': functools.partial(UNet, **TINY, groups=4),
    'DDPM++': functools.partial(DDPMpp, **TINY, groups=4, augment=2),
    'NCSN++': functools.partial(NCSNpp, **TINY, groups=4, augment=2),
    'ADM': functools.partial(ADM, **TINY, groups=4, augment=2, head_channels=4),
    'EDM2': functools.partial(edm2.UNet, **TINY, head_channels=4),
}
every_family = pytest.mark.parametrize('family', FAMILIES)


def count(net, shape):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of(net, (1, *shape))))


# Published sizes


@pytest.mark.parametrize(('net', 'size', 'millions'), [
    # Karras et al. 2022, table 7: EDM's networks for CIFAR-10 (with nine channels of augmentation) and ImageNet-64.
    (DDPMpp(augment=9), 32, 55.7), (ADM(num_classes=1000), 64, 295.9),
    # Song et al. 2021: NCSN++ "deep" for CIFAR-10 has four levels of eight blocks.
    (NCSNpp(multipliers=(1, 2, 2, 2), blocks=8), 32, 107.6),
    # Dhariwal & Nichol 2021, table 11: ImageNet 128x128, with a variance output.
    (ADM(channels=256, multipliers=(1, 1, 2, 3, 4), blocks=2, num_classes=1000, variance=True), 128, 422),
], ids=['DDPM++', 'ADM 64', 'NCSN++ deep', 'ADM 128'])
def test_parameter_counts_are_the_papers(net, size, millions):
  assert round(count(net, (size, size, 3)) / 1e6, 1 if isinstance(millions, float) else 0) == millions


# diffusers


def weights(name, levels=2):
  return converted(remade(SAVED[f'{name}/keys'], name), levels)


def test_adm_equals_diffusers():
  """A UNet2DModel with scale and shift, residual blocks that resample, heads by channels, labels, a variance output."""
  net = ADM(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.0, groups=4, num_classes=3,
            variance=True, head_channels=4)
  x, params = last(SAVED['adm/x']), weights('adm')
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes_of(net, x.shape))
  out = jit(lambda params, x, t, label: net.apply({'params': params}, x, t, {'label': label}))(
      params, x, SAVED['adm/t'], SAVED['adm/label'])
  np.testing.assert_allclose(out, last(SAVED['adm/out']), atol=1e-4)


@pytest.mark.parametrize(('name', 'features'), [('down', 8), ('up', 16)])
def test_residual_blocks_with_filters_equal_diffusers(name, features):
  """NCSN++'s: resampled with (1, 3, 3, 1), with weights in the shortcut, the sum over sqrt(2)."""
  net = blocks.ResBlock(features, 0.0, 4, 'float32', resample=name, taps=(1, 3, 3, 1), skip_scale=0.5 ** 0.5,
                        project=True)
  emb = SAVED[f'{name}/emb']
  swish = emb / (1 + np.exp(-emb))  # ours gets it as it is used, diffusers' applies it in every block
  out = jit(lambda params, x: net.apply({'params': params}, x, swish, False))(
      weights(name), last(SAVED[f'{name}/x']))
  np.testing.assert_allclose(out, last(SAVED[f'{name}/out']), atol=1e-5)


def test_the_input_s_path_equals_diffusers():
  """What NCSN++ adds to each level: a filter and a convolution of stride 2, zeros outside."""
  net = blocks.FilteredConv(8, (1, 3, 3, 1))
  params = {'conv': weights('input')['Conv2d_0']}
  out = jit(lambda x: net.apply({'params': params}, x))(last(SAVED['input/x']))
  np.testing.assert_allclose(out, last(SAVED['input/out']), atol=1e-5)


# What all have in common


@functools.cache
def made(family):
  """(net, x, params, cond) on one axis: nothing of the parameters is zero, and the net sees all that it can."""
  net, x = FAMILIES[family](image=1), normal(4, 8, 2)
  # Residuals on the way down: the first convolution, a block, half the size, a block; and the middle.
  control = [jnp.zeros(shape) for shape in [(4, 8, 8), (4, 8, 8), (4, 4, 8), (4, 4, 16), (4, 4, 16)]]
  cond = {'label': jnp.array([0, 1, 2, 0]), 'drop': jnp.zeros(4, bool), 'image': normal(4, 8, 1, seed=7),
          'control': control, 'augment': jnp.zeros((4, 2))}
  params = filled(jax.eval_shape(net.init, jax.random.key(0), x, jnp.ones(4), cond)['params'])
  return net, x, params, cond


@functools.cache
def compiled(family):
  net, x, *_ = made(family)
  return jit(lambda params, noise, cond: net.apply({'params': params}, x, noise, cond))


def output(family, noise=0.3, params=None, **changes):
  return np.asarray(compiled(family)(params or made(family)[2], jnp.full(4, noise), made(family)[3] | changes))


@pytest.mark.parametrize('family', ['DDPM++', 'ADM', 'EDM2'])
def test_zero_at_initialisation(family):
  net, x, params, cond = made(family)
  last = 'out_gain' if family == 'EDM2' else 'conv_out'
  start = jit(lambda key: net.init(key, x, jnp.ones(4), cond)['params'][last])(jax.random.key(0))
  np.testing.assert_array_equal(output(family, params={**params, last: start}), np.zeros_like(x))
  assert np.abs(output(family)).max() > 0.1


@every_family
def test_output_depends_on_noise_and_label_and_a_dropped_label_is_the_null_class(family):
  usual, null = output(family), output(family, label=jnp.full(4, 3))
  assert np.abs(usual - output(family, noise=0.35)).max() > 1e-3
  assert np.abs(usual - null).max(axis=(1, 2)).min() > 1e-3
  mixed = output(family, drop=jnp.array([True, False, False, True]))
  np.testing.assert_array_equal(mixed, np.where([[[True]], [[False]], [[False]], [[True]]], null, usual))


def inputs_of(family):
  """What cond brings in, as (words, changes to the third example alone)."""
  *_, cond = made(family)
  third = lambda a: a + np.float32(np.arange(4) == 2).reshape(4, *(1,) * (a.ndim - 1))
  yield 'image', {'image': third(cond['image'])}
  if family not in ('DDPM', 'EDM2'):
    yield 'augment', {'augment': third(cond['augment'])}
  for i in range(len(cond['control'])):
    yield f'control {i}', {'control': [third(c) if i == j else c for j, c in enumerate(cond['control'])]}


@every_family
def test_each_example_has_its_own_image_augmentation_and_residuals(family):
  usual = output(family)
  for words, changes in inputs_of(family):
    changed = output(family, **changes)
    np.testing.assert_array_equal(np.delete(changed, 2, 0), np.delete(usual, 2, 0), err_msg=words)
    assert np.abs(changed[2] - usual[2]).max() > 1e-3, words


def test_zeros_are_what_is_not_there():
  """No residuals; and an image as it was."""
  net, x, params, cond = made('DDPM++')
  plain = {key: value for key, value in cond.items() if key not in ('control', 'augment')}
  out = jit(lambda params: net.apply({'params': params}, x, jnp.full(4, 0.3), plain))(params)
  np.testing.assert_allclose(out, output('DDPM++'), atol=1e-5)


@pytest.mark.parametrize(('changes', 'words'), [
    ({'image': None}, r"cond\['image'\] must be \[4, 8, 1\] for an input of \[4, 8, 2\], got none"),
    ({'image': jnp.zeros((4, 4, 1))}, r'for an input of \[4, 8, 2\], got \[4, 4, 1\]'),
    ({'control': [jnp.zeros((4, 8, 8))]}, r'residuals of the shapes .*, got \[\(4, 8, 8\)\]'),
    ({'augment': jnp.zeros((4, 3))}, "must have 2 channels, as the network's augment says, got 3"),
])
def test_wrong_shapes_are_named(changes, words):
  net, x, params, cond = made('ADM')
  with pytest.raises(ValueError, match=words):
    jax.eval_shape(lambda: net.apply({'params': params}, x, jnp.ones(4), cond | changes))


@pytest.mark.parametrize('family', ['NCSN++', 'EDM2'])
def test_recomputing_blocks_changes_no_output_and_no_gradient(family):
  """Nor what dropout draws."""
  _, x, params, cond = made(family)
  def gradient(remat):
    net = FAMILIES[family](image=1, dropout=0.3, remat=remat)
    def loss(params):
      out = net.apply({'params': params}, x, jnp.full(4, 0.3), cond, train=True, rngs={'dropout': jax.random.key(3)})
      return jnp.mean(out ** 2), out
    return jit(jax.grad(loss, has_aux=True))(params)
  for a, b in zip(*map(jax.tree.leaves, (gradient('none'), gradient('blocks'))), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * max(1, np.abs(a).max()))


def left_for_the_gradient(family, **changes):
  """Shapes and types of what the forward pass of a batch of 50 keeps for the backward one, and of its output."""
  net, x = FAMILIES[family](**changes), jnp.zeros((50, 8, 2))
  cond = {'label': jnp.zeros(50, int)}
  shapes = jax.eval_shape(net.init, jax.random.key(0), x, jnp.ones(50), cond)['params']
  out, pull = jax.eval_shape(lambda params: jax.vjp(lambda params: net.apply(
      {'params': params}, x, jnp.ones(50), cond), params), shapes)
  return [leaf for leaf in jax.tree.leaves(pull) if leaf.shape[:1] == (50,)], out


@pytest.mark.parametrize('family', ['NCSN++', 'EDM2'])
def test_recomputing_blocks_keeps_less(family):
  """Most of what is kept lies inside blocks."""
  size = lambda leaves: sum(leaf.size for leaf in leaves)
  assert size(left_for_the_gradient(family, remat='blocks')[0]) < 0.7 * size(left_for_the_gradient(family)[0])


@pytest.mark.parametrize('family', ['NCSN++', 'ADM', 'EDM2'])
def test_bfloat16_computes_in_it_and_keeps_float32(family):
  _, x, params, cond = made(family)
  net = FAMILIES[family](image=1, dtype='bfloat16')
  full, low = output(family), jit(lambda params: net.apply({'params': params}, x, jnp.full(4, 0.3), cond))(params)
  assert low.dtype == jnp.float32
  # One rounding to bfloat16 changes a number by 2^-9 at most: less than a tenth of that would not be bfloat16.
  assert 2e-4 < np.linalg.norm(low - full) / np.linalg.norm(full) < 4e-2
  grads = jax.eval_shape(jax.grad(lambda params: jnp.sum(net.apply({'params': params}, x, jnp.ones(4), cond))), params)
  assert {leaf.dtype for leaf in jax.tree.leaves((params, grads))} == {jnp.dtype('float32')}


@pytest.mark.parametrize(('family', 'space'), [('NCSN++', (4, 8, 8)), ('ADM', (8, 16)), ('EDM2', (4, 8, 8))])
def test_more_axes_keep_their_shape(family, space):
  net = FAMILIES[family]()
  out = jax.eval_shape(lambda key, x: net.init_with_output(key, x, jnp.zeros(2), {'label': jnp.zeros(2, int)})[0],
                       jax.random.key(0), jnp.zeros((2, *space, 3)))
  assert (out.shape, out.dtype) == ((2, *space, 3), jnp.float32)
