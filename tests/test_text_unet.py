"""The U-Net that reads text, against diffusers' UNet2DConditionModel, and laws of its attention."""
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import jit
from theirs import converted, last, remade

from diffusion_jax.nets import blocks
from diffusion_jax.nets.text_unet import TextUNet

SAVED = np.load(pathlib.Path(__file__).parent / 'fixtures' / 'unet_families.npz')
SD = functools.partial(TextUNet, channels=4, multipliers=(1, 2, 2), blocks=1, groups=2, depth=(1, 1, 0),
                       heads=(2, 4, 2), text=5)


def shapes_of(net, x, **cond):
  return jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(len(x)), cond)['params']


def test_parameter_count_is_stable_diffusions():
  """As the published weights of version 1.5 have it."""
  shapes = shapes_of(TextUNet(), jnp.zeros((1, 8, 8, 4)), text=jnp.zeros((1, 77, 768)))
  assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 859_520_964


def control():
  """The residuals that the fixture was made with."""
  shapes = [(4, 8, 4), (4, 8, 4), (4, 4, 2), (8, 4, 2), (8, 2, 1), (8, 2, 1), (8, 2, 1)]
  return [last(np.random.RandomState(10 + i).standard_normal((2, *shape)).astype(np.float32))
          for i, shape in enumerate(shapes)]


@pytest.fixture(scope='module')
def run():
  """run(text=, text_mask=, control=) of a small net with diffusers' random weights."""
  net, params = SD(), converted(remade(SAVED['text/keys'], 'text'), levels=3)
  x, t, text = last(SAVED['text/x']), SAVED['text/t'], SAVED['text/text']
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes_of(net, x, text=text))
  apply = jit(lambda cond: net.apply({'params': params}, x, t, cond))
  usual = {'text': text, 'text_mask': np.ones((2, 5), bool), 'control': [np.zeros_like(c) for c in control()]}
  return lambda **cond: np.asarray(apply(usual | cond))


def test_equals_diffusers(run):
  np.testing.assert_allclose(run(), last(SAVED['text/out']), atol=1e-4)


def test_a_mask_equals_diffusers(run):
  np.testing.assert_allclose(run(text_mask=SAVED['text/mask']), last(SAVED['text/masked']), atol=1e-4)
  assert np.abs(SAVED['text/masked'] - SAVED['text/out']).max() > 1e-2


def test_residuals_equal_diffusers(run):
  """What a ControlNet adds to the skips and the middle."""
  np.testing.assert_allclose(run(control=control()), last(SAVED['text/controlled']), atol=1e-4)


def test_sdxls_structure_equals_diffusers():
  net = TextUNet(channels=4, multipliers=(1, 2), blocks=1, groups=2, depth=(0, 2), heads=(1, 2), text=5, vector=27)
  params = converted(remade(SAVED['xl/keys'], 'xl'), levels=2)
  sizes = jax.vmap(lambda ids: blocks.cosines_and_sines(ids, 4).ravel())(SAVED['xl/ids'])
  cond = {'text': SAVED['text/text'], 'vector': jnp.concatenate([SAVED['xl/pooled'], sizes], 1)}
  out = jit(lambda cond: net.apply({'params': params}, last(SAVED['text/x']), SAVED['text/t'], cond))(cond)
  np.testing.assert_allclose(out, last(SAVED['xl/out']), atol=1e-4)


def test_padded_tokens_change_nothing(run):
  """Neither what they hold nor their order; nor does the order of all tokens, since text brings its own positions."""
  text, mask = SAVED['text/text'], SAVED['text/mask']
  usual = run(text_mask=mask)
  np.testing.assert_array_equal(usual, run(text_mask=mask, text=np.where(mask[..., None], text, np.float32(1e3))))
  swapped = np.concatenate([text[:1, [0, 1, 2, 4, 3]], text[1:]])
  np.testing.assert_array_equal(usual, run(text_mask=mask, text=swapped))
  np.testing.assert_allclose(usual, run(text_mask=mask[:, [2, 0, 1, 3, 4]], text=text[:, [2, 0, 1, 3, 4]]), atol=1e-5)
  assert np.abs(usual - run(text_mask=mask, text=np.roll(text, 1, 0))).max() > 1e-2


def test_a_text_of_no_tokens_is_no_text(run):
  """Whatever lies in its place, and each example for itself."""
  mask = SAVED['text/mask'] & np.array([[False], [True]])
  one, other = run(text_mask=mask), run(text_mask=mask, text=SAVED['text/text'] + np.float32([[[9]], [[0]]]))
  np.testing.assert_array_equal(one, other)
  np.testing.assert_array_equal(one[1], run(text_mask=SAVED['text/mask'])[1])


def test_bfloat16_and_recomputing_blocks():
  """Parameters and output stay float32; remat keeps less for the gradient. Nothing is computed."""
  x, cond = jnp.zeros((50, 8, 2)), {'text': jnp.zeros((50, 5, 5))}
  def kept(**changes):
    net = SD(**changes)
    shapes = shapes_of(net, x, **cond)
    out, pull = jax.eval_shape(lambda p: jax.vjp(lambda p: net.apply({'params': p}, x, jnp.zeros(50), cond), p), shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves([shapes, out])} == {jnp.dtype('float32')}
    return [leaf for leaf in jax.tree.leaves(pull) if leaf.shape[:1] == (50,)]
  low, again = kept(dtype='bfloat16'), kept(dtype='bfloat16', remat='blocks')
  assert jnp.dtype('bfloat16') in {leaf.dtype for leaf in low}
  assert sum(leaf.size for leaf in again) < 0.7 * sum(leaf.size for leaf in low)


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: SD(depth=(1, 1)), r'for each of the 3 levels, got \(1, 1\) and'),
    (lambda: SD(heads=3), r'widths \[4, 8, 8\], heads 3'),
    (lambda: shapes_of(SD(), jnp.zeros((1, 8, 8, 2))), r"cond\['text'\] must be \[batch, tokens, 5\], got none"),
    (lambda: shapes_of(SD(), jnp.zeros((1, 8, 8, 2)), text=jnp.zeros((1, 7, 6))), r'got \[1, 7, 6\]'),
])
def test_bad_arguments_are_named(make, words):
  with pytest.raises(ValueError, match=words):
    make()
