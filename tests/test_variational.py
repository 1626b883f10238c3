"""Improved DDPM's U-Net and VDM's: what sets them apart from those that they are made of."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import filled, jit, normal, shapes_of

from diffusion_jax.nets.unet import ADM
from diffusion_jax.nets.variational import IDDPM, VDM

TINY = {'channels': 8, 'blocks': 1, 'groups': 4, 'dropout': 0.0}
X = normal(2, 8, 1)


def test_improved_ddpm_has_so_many_heads_at_every_width():
  """A head of half the width in the middle: the only attention here, as of ADM with heads of 8 of its 16 channels."""
  small = {**TINY, 'multipliers': (2,), 'attention': ()}
  params = filled(shapes_of(IDDPM(**small, heads=2), X.shape))
  run = lambda net: jit(lambda params: net.apply({'params': params}, X, jnp.ones(2), {}))(params)
  np.testing.assert_array_equal(run(IDDPM(**small, heads=2)), run(ADM(**small, head_channels=8)))
  with pytest.raises(ValueError, match='heads must divide every width with attention: width 16, heads 3'):
    shapes_of(IDDPM(**small, heads=3), X.shape)


def test_improved_ddpm_changes_the_size_by_convolutions():
  shapes = shapes_of(IDDPM(**TINY, multipliers=(1, 1), attention=(), heads=2), X.shape)
  assert set(shapes['down_0_downsample']) == set(shapes['up_1_upsample']) == {'kernel', 'bias'}


def test_vdm_sees_what_is_finer_than_a_period():
  """Where the first layer sees the Fourier features alone, of 2^6 and 2^7 periods, the rest repeats with x."""
  net = VDM(**TINY)
  params = filled(shapes_of(net, X.shape))
  kernel = params['conv_in']['kernel']
  assert kernel.shape[-2] == 1 + 4
  params['conv_in']['kernel'] = kernel.at[..., :1, :].set(0)
  run = jit(lambda params, x: net.apply({'params': params}, x, jnp.ones(2), {}) - x)
  x = np.round(X * 256) / 256  # exact in float32, and so are its angles' fractions
  rest = run(params, x)
  np.testing.assert_allclose(run(params, x + 2 ** -6), rest, atol=1e-3)
  assert np.abs(run(params, x + 2 ** -8) - rest).max() > 0.1
  zero = {**params, 'conv_out': jax.tree.map(jnp.zeros_like, params['conv_out'])}
  np.testing.assert_array_equal(run(zero, x), np.zeros_like(x))  # F = x at initialisation


def test_vdm_has_no_variance_output():
  with pytest.raises(ValueError, match='VDM has no variance output'):
    shapes_of(VDM(**TINY, variance=True), X.shape)
