"""Halving and doubling the spatial axes of x [B, *S, C] with a small filter, the same along every axis.

Taps are symmetric and even in number: (1, 1) averages pairs and repeats elements, (1, 3, 3, 1) is the anti-aliasing
filter of StyleGAN2 and NCSN++ (Song et al. 2021, appendix C.1). What lies outside is zero. Both keep a constant inside,
and `up` is 2 to the number of axes times the transpose of `down`.
"""
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
BOX = (1.0, 1.0)


def down(x: Array, taps: Sequence[float] = BOX) -> Array:
  """Filters, then keeps every second element: every spatial axis, which must be even, is halved."""
  if any(n % 2 for n in x.shape[1:-1]):
    raise ValueError(f'only even sizes can be halved, got {x.shape[1:-1]}')
  for axis in range(1, x.ndim - 1):
    x = _down(x, taps, axis)
  return x


def up(x: Array, taps: Sequence[float] = BOX) -> Array:
  """Puts zeros between the elements, then filters: every spatial axis is doubled."""
  for axis in range(1, x.ndim - 1):
    x = _up(x, taps, axis)
  return x


def blur(x: Array, taps: Sequence[float], low: int, high: int) -> Array:
  """Filters alone, every axis padded with `low` and `high` zeros: a size n becomes n + low + high - len(taps) + 1."""
  weights = _weights(taps)
  for axis in range(1, x.ndim - 1):
    x = _pad(x, axis, low, high)
    size = x.shape[axis] - len(weights) + 1
    x = sum(w * lax.slice_in_dim(x, k, k + size, axis=axis) for k, w in enumerate(weights))
  return x


def _weights(taps):
  if len(taps) % 2 or len(taps) < 2 or list(taps) != list(reversed(taps)) or not sum(taps) > 0:
    raise ValueError(f'taps must be symmetric, even in number and of a positive sum, such as (1, 3, 3, 1), '
                     f'got {tuple(taps)}')
  return [tap / sum(taps) for tap in taps]


def _pad(x, axis, low, high):
  return jnp.pad(x, [(low, high) if i == axis else (0, 0) for i in range(x.ndim)])


def _pairs(x, axis):
  """x [.., 2 n, ..] -> its even and its odd elements; not strided slices, whose gradient scatters."""
  x = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1:])
  return [lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in (0, 1)]


def _down(x, taps, axis):
  weights, n = _weights(taps), x.shape[axis] // 2
  reach = len(weights) // 2 - 1  # output i lies between inputs 2 i and 2 i + 1
  # One more on either side where that makes the phases begin with an even element.
  even, odd = _pairs(_pad(x, axis, reach + reach % 2, reach + reach % 2), axis)
  total = 0
  for k, w in enumerate(weights):
    start = k + reach % 2  # of the tap's first element in the padded axis
    total += w * lax.slice_in_dim(odd if start % 2 else even, start // 2, start // 2 + n, axis=axis)
  return total


def _up(x, taps, axis):
  weights, n = [2 * w for w in _weights(taps)], x.shape[axis]
  reach = len(weights) // 2 - 1
  margin = (reach + 1) // 2
  padded = _pad(x, axis, margin, margin)
  phases = []
  for phase in (0, 1):
    # Output 2 q + phase takes tap k of input q + (phase + reach - k) / 2, for the k that make it whole.
    terms = [(w, (phase + reach - k) // 2) for k, w in enumerate(weights) if (phase + reach - k) % 2 == 0]
    phases.append(sum(w * lax.slice_in_dim(padded, margin + s, margin + s + n, axis=axis) for w, s in terms))
  return jnp.stack(phases, axis + 1).reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1:])
