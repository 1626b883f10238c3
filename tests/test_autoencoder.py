"""The autoencoder of latent diffusion against diffusers, and its names."""
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import filled, jit, normal
from safetensors.numpy import load_file

from diffusion_jax.convert import autoencoder as convert
from diffusion_jax.nets.autoencoder import AutoencoderKL, Gaussian
from diffusion_jax.runtime.config import UserError

FIXTURE = pathlib.Path(__file__).parent / 'fixtures' / 'autoencoder_kl'
SMALL = AutoencoderKL(channels=(4, 8), blocks=1, latent=2, groups=2)


@pytest.fixture(scope='module')
def theirs():
  """(net, their tensors, inputs and outputs)."""
  config = json.loads(FIXTURE.with_suffix('.json').read_text())['config']
  return convert.net(config), load_file(FIXTURE.with_suffix('.safetensors')), np.load(FIXTURE.with_suffix('.npz'))


def test_equals_diffusers(theirs):
  """AutoencoderKL with random parameters, computed there in float64."""
  net, tensors, saved = theirs
  variables = {'params': convert.from_theirs(net, tensors)}
  last = lambda name: np.moveaxis(saved[name], 1, -1)
  latents = jit(lambda x: net.apply(variables, x, method=net.encode))(last('in/x'))
  np.testing.assert_allclose(latents.mean, last('out64/mean'), atol=1e-4)
  np.testing.assert_allclose(latents.logvar, last('out64/logvar'), atol=1e-4)
  np.testing.assert_allclose(latents.kl(), saved['out64/kl'], atol=1e-4)
  sample = latents.sample(last('in/eps'))
  np.testing.assert_allclose(sample, last('out64/sample'), atol=1e-4)
  np.testing.assert_allclose(net.scale(sample), last('out64/scaled_latent'), atol=1e-4)
  np.testing.assert_allclose(net.unscale(net.scale(sample)), sample, atol=1e-5)
  decoded = jit(lambda z: net.apply(variables, z, method=net.decode))(last('in/z'))
  np.testing.assert_allclose(decoded, last('out64/decoded'), atol=1e-4)


def test_names_go_there_and_back_bit_for_bit(theirs):
  net, tensors, _ = theirs
  back = convert.to_theirs(net, convert.from_theirs(net, tensors))
  assert set(back) == set(tensors)
  for key, tensor in tensors.items():
    assert back[key].dtype == tensor.dtype
    np.testing.assert_array_equal(back[key], tensor)
  assert convert.net(json.loads(json.dumps(convert.config(net)))) == net


@pytest.mark.parametrize('pointwise', [False, True])
def test_names_that_attention_once_had(theirs, pointwise):
  """Stable Diffusion's own files have them: matrices, or convolutions of size 1."""
  net, tensors, _ = theirs
  old = {}
  for key, tensor in tensors.items():
    for now, then in {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}.items():
      if f'.{now}.' in key:
        key, tensor = key.replace(f'.{now}.', f'.{then}.'), tensor[..., None, None] if (
            pointwise and tensor.ndim == 2) else tensor
    old[key] = tensor
  assert set(old) != set(tensors)
  jax.tree.map(np.testing.assert_array_equal, convert.from_theirs(net, old), convert.from_theirs(net, tensors))


def test_the_defaults_are_those_of_stable_diffusion():
  """83,653,863 parameters, as diffusers counts them in the checkpoint of Stable Diffusion 1."""
  assert sum(leaf.size for leaf in jax.tree.leaves(convert.shapes(AutoencoderKL()))) == 83_653_863


@pytest.mark.parametrize('space', [(8,), (4, 8), (2, 4, 4)])
def test_one_to_three_spatial_axes(space):
  x = jnp.zeros((2, *space, 3))
  shapes = jax.eval_shape(SMALL.init, jax.random.key(0), x)['params']
  latents = jax.eval_shape(lambda p: SMALL.apply({'params': p}, x, method='encode'), shapes)
  assert latents.mean.shape == latents.logvar.shape == (2, *(n // 2 for n in space), 2)
  back = jax.eval_shape(lambda p, z: SMALL.apply({'params': p}, z, method='decode'), shapes, latents.mean)
  assert back.shape == x.shape


def test_bfloat16_is_close_and_gives_float32():
  x = normal(2, 8, 8, 3)
  params = filled(convert.shapes(SMALL))
  full, low = (np.asarray(jit(net.apply)({'params': params}, x)) for net in (SMALL, SMALL.clone(dtype='bfloat16')))
  assert low.dtype == np.float32
  assert 2e-4 < np.linalg.norm(low - full) / np.linalg.norm(full) < 5e-2


def test_log_variances_are_kept_in_bounds():
  """Rombach et al.'s code keeps them in [-30, 20], so that exp is finite in float32."""
  net = SMALL.clone(channels=(4,))
  params = filled(convert.shapes(net))
  params['quantise']['bias'] = jnp.array([0.0, 0.0, -1e3, 1e3])
  latents = jit(lambda params: net.apply({'params': params}, normal(1, 2, 2, 3), method='encode'))(params)
  np.testing.assert_array_equal(latents.logvar, np.broadcast_to([-30.0, 20.0], (1, 2, 2, 2)))


def test_the_gaussian_is_one():
  """Its draws have its mean and variance; its KL is that of a closed form, and none from itself."""
  gaussian = Gaussian(jnp.full((1, 4000), 2.0), jnp.full((1, 4000), np.log(9.0)))
  draws = np.asarray(gaussian.sample(normal(1, 4000)))
  assert abs(draws.mean() - 2) < 4 * 3 / 4000 ** 0.5 and abs(draws.std() - 3) < 4 * 3 / 8000 ** 0.5
  np.testing.assert_allclose(gaussian.kl(), 4000 * (4 + 9 - 1 - np.log(9)) / 2, rtol=1e-5)
  np.testing.assert_array_equal(Gaussian(jnp.zeros((2, 3)), jnp.zeros((2, 3))).kl(), [0, 0])


@pytest.mark.parametrize(('make', 'error', 'words'), [
    (lambda: AutoencoderKL(groups=3), ValueError, r'widths \(128, 256, 512, 512\), groups 3'),
    (lambda: jax.eval_shape(SMALL.init, jax.random.key(0), jnp.zeros((1, 5, 4, 3))), ValueError,
     r'2 levels need sizes divisible by 2, got \(5, 4\)'),
    (lambda: convert.net({'block_out_channels': [32], 'act_fn': 'relu'}), UserError,
     "act_fn is 'relu', and only 'silu'"),
    (lambda: convert.net({'block_out_channels': [32], 'down_block_types': ['X']}), UserError,
     r"down_block_types is \['X'\], and only \['DownEncoderBlock2D'\]"),
    (lambda: convert.net({}), UserError, "has no 'block_out_channels'"),
])
def test_bad_arguments_are_named_with_both_values(make, error, words):
  with pytest.raises(error, match=words):
    make()
