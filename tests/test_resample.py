"""Resampling against its definition by filters and zeros, and laws of it."""
import functools
import itertools

import jax
import numpy as np
import pytest
from nets import jit, normal

from diffusion_jax.nets import resample

TAPS = [(1, 1), (1, 3, 3, 1), (1, 5, 10, 10, 5, 1), (1, -3, 8, 20, 20, 8, -3, 1)]
SPACES = [(6,), (4, 8), (2, 4, 6)]
cases = pytest.mark.parametrize(('taps', 'space'), [*itertools.product(TAPS, SPACES)])


def along(x, axis, function):
  return np.apply_along_axis(function, axis, x.astype(np.float64))


@cases
def test_down_is_a_filter_and_every_second_element(taps, space):
  x, filtered, reach = normal(2, *space, 3), np.array(taps) / np.sum(taps), len(taps) // 2
  expected = x
  for axis in range(1, x.ndim - 1):
    expected = along(expected, axis, lambda line: np.convolve(line, filtered)[reach:][:len(line):2])
  np.testing.assert_allclose(jit(functools.partial(resample.down, taps=taps))(x), expected, atol=1e-5)


@cases
def test_up_is_zeros_between_and_a_filter(taps, space):
  x, filtered, reach = normal(2, *space, 3), 2 * np.array(taps) / np.sum(taps), len(taps) // 2
  expected = x
  for axis in range(1, x.ndim - 1):
    expected = along(expected, axis, lambda line: np.convolve(
        np.stack([line, 0 * line], -1).ravel(), filtered)[reach - 1:][:2 * len(line)])
  np.testing.assert_allclose(jit(functools.partial(resample.up, taps=taps))(x), expected, atol=1e-5)


@cases
def test_each_is_the_others_transpose(taps, space):
  x = normal(2, *space, 3)
  y = normal(2, *(n // 2 for n in space), 3, seed=2)
  transposed, = jax.linear_transpose(functools.partial(resample.down, taps=taps), x)(y)
  np.testing.assert_allclose(2 ** len(space) * transposed, resample.up(y, taps), atol=1e-5)


@pytest.mark.parametrize('taps', TAPS)
def test_constants_pass_and_the_finest_wave_does_not(taps):
  """Away from the ends, for a filter that is there to keep a wave of two elements from becoming a constant."""
  n, edge = 64, len(taps)
  inside = (slice(None), slice(edge, -edge))
  ones, wave = np.ones((1, n, 1), np.float32), (np.arange(n) % 2 * 2 - 1).astype(np.float32).reshape(1, n, 1)
  np.testing.assert_allclose(resample.down(ones, taps)[inside], 1, atol=1e-6)
  np.testing.assert_allclose(resample.up(ones, taps)[inside], 1, atol=1e-6)
  np.testing.assert_allclose(resample.down(wave, taps)[inside], 0, atol=1e-6)


def test_pairs_are_averaged_and_elements_repeated():
  x = normal(2, 4, 6, 3)
  np.testing.assert_allclose(resample.down(x), x.reshape(2, 2, 2, 3, 2, 3).mean((2, 4)), atol=1e-6)
  np.testing.assert_allclose(resample.up(x), np.kron(x, np.ones((1, 2, 2, 1))), atol=1e-6)


@pytest.mark.parametrize('taps', TAPS)
def test_blur_is_a_filter(taps):
  x = normal(1, 7, 2)
  expected = along(np.pad(x, ((0, 0), (2, 5), (0, 0))), 1, lambda line: np.convolve(
      line, np.array(taps) / np.sum(taps), 'valid'))
  np.testing.assert_allclose(resample.blur(x, taps, 2, 5), expected, atol=1e-5)


@pytest.mark.parametrize(('call', 'words'), [
    (lambda: resample.down(np.ones((1, 4, 4, 1)), (1, 2, 1)), r'even in number .* got \(1, 2, 1\)'),
    (lambda: resample.up(np.ones((1, 4, 4, 1)), (1, 3)), r'symmetric, .* got \(1, 3\)'),
    (lambda: resample.up(np.ones((1, 4, 4, 1)), (-1, -1)), r'positive sum, .* got \(-1, -1\)'),
    (lambda: resample.down(np.ones((1, 4, 5, 1))), r'only even sizes can be halved, got \(4, 5\)'),
])
def test_bad_arguments_are_named(call, words):
  with pytest.raises(ValueError, match=words):
    call()
