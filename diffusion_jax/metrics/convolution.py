"""Convolutions of the Inception network as the products that XLA is quickest with on a CPU."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ['convolve']

POINTS = (0, 1, -1, 2, -2, 0.5, -0.5)  # and infinity, of the minimal filtering


def convolve(x, kernel, stride):
  """x [N, H, W, C] convolved with kernel [h, w, C, K], float32; stride 1 keeps the size, 2 drops what finds no input.

  On a CPU in the form that XLA is quickest with there; the results differ by rounding, 1e-6 of the largest.
  """
  height, width = kernel.shape[:2]
  if jax.default_backend() == 'cpu' and height == width == 1 and stride == 1:
    return jnp.dot(x, kernel[0, 0], precision='highest')
  if jax.default_backend() == 'cpu' and stride == 2 and kernel.shape[2] > 3:
    return _strided(x, kernel)
  if jax.default_backend() == 'cpu' and stride == 1 and {height, width} == {1, 7}:
    return _filter(x, kernel.reshape(7, *kernel.shape[2:]), 1 if height == 7 else 2)
  return lax.conv_general_dilated(x, kernel, (stride, stride), 'SAME' if stride == 1 else 'VALID',
                                  precision='highest', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _strided(x, kernel):
  """A product for each place in the kernel, summed."""
  height, width = kernel.shape[:2]
  rows, columns = (x.shape[1] - height) // 2 + 1, (x.shape[2] - width) // 2 + 1
  window = lambda i, j: x[:, i:i + 2 * rows - 1:2, j:j + 2 * columns - 1:2]
  return sum(jnp.dot(window(i, j), kernel[i, j], precision='highest') for i in range(height) for j in range(width))


def _filter(x, kernel, axis):
  """Seven taps along an axis by minimal filtering F(2, 7) (Winograd 1980): 8 products give 2 outputs in place of 14."""
  length, pairs = x.shape[axis], -(-x.shape[axis] // 2)
  x = jnp.pad(x, [(3, 2 * pairs + 3 - length) if a == axis else (0, 0) for a in range(4)])
  inputs = [lax.slice_in_dim(x, i, i + 2 * pairs - 1, 2, axis) for i in range(8)]
  others = lambda p: [q for q in POINTS if q != p]
  of_inputs = [np.poly(others(p))[::-1] for p in POINTS] + [np.poly(POINTS)[::-1]]
  of_kernel = [np.power(p, np.arange(7.)) / np.prod([p - q for q in others(p)]) for p in POINTS] + [np.eye(7)[6]]
  products = [jnp.dot(_combine(a, inputs), _combine(b, kernel), precision='highest')
              for a, b in zip(of_inputs, of_kernel, strict=True)]
  x = jnp.stack([_combine([1.] * 7, products), _combine([*POINTS, 1.], products)], axis + 1)
  x = x.reshape(*x.shape[:axis], 2 * pairs, *x.shape[axis + 2:])
  return lax.slice_in_dim(x, 0, length, 1, axis)


def _combine(factors, terms):
  return functools.reduce(jnp.add, [np.float32(f) * t for f, t in zip(factors, terms, strict=False) if f])
