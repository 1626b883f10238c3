"""Laws of what runs a network over images, and of the convolutions that Inception takes on a CPU."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from diffusion_jax.metrics import batches, convolution


@pytest.mark.parametrize(('count', 'batch_size'), [(0, 4), (1, 1), (7, 8), (8, 8), (11, 8), (11, 3), (5, 16)])
def test_every_image_counts_once_whatever_the_batches(count, batch_size):
  images = np.random.default_rng(0).integers(0, 256, (count, 4, 2)).astype(np.uint8)
  shapes = set()

  def network(scale, x):
    shapes.add(x.shape)
    return {'sum': scale * x.sum((1, 2)), 'first': x[:, 0, 0]}

  found = batches.apply(network, jnp.float32(2), images, batch_size)
  np.testing.assert_array_equal(found['sum'], 2 * images.sum((1, 2)))
  np.testing.assert_array_equal(found['first'], images[:, 0, 0])
  assert shapes == {(batch_size, 4, 2)}


def test_a_batch_is_cut_over_the_devices_that_divide_it():
  seen = []
  network = lambda params, x: seen.append(len(x.sharding.device_set)) or x
  for batch_size in (1, 6, 8, 11):
    batches.apply(network, (), np.zeros((1, 1), np.uint8), batch_size)
  assert jax.local_device_count() == 8 and seen == [1, 6, 8, 1]


def test_no_batch_is_refused():
  with pytest.raises(ValueError, match='batch_size must be at least 1, got 0'):
    batches.apply(lambda params, x: x, (), np.zeros((4, 1)), 0)


@pytest.mark.parametrize('size', [(1, 1), (1, 7), (7, 1), (3, 3), (5, 5), (1, 3)], ids=str)
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('shape', [(9, 17), (12, 8)], ids=str)
def test_a_convolution_is_xlas(size, stride, shape):
  """In float32, against XLA's in float64."""
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(2, *shape, 5)), rng.normal(size=(*size, 5, 6))
  with jax.enable_x64(True):
    expected = np.asarray(lax.conv_general_dilated(
        jnp.asarray(x), jnp.asarray(kernel), (stride, stride), 'SAME' if stride == 1 else 'VALID',
        dimension_numbers=('NHWC', 'HWIO', 'NHWC')))
  found = convolution.convolve(jnp.float32(x), jnp.float32(kernel), stride)
  assert found.shape == expected.shape and expected.dtype == np.float64
  assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
