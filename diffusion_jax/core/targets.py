"""What a network predicts: three coefficients, x0 = c_skip x + c_out F(c_in x), and the F that training wants.

Each target shows the network x in the scale of the path on which it is usually written (c_in), so that a prediction
depends on logsnr and not on the path: a network trained on one path serves on every other.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.core.types import Array, Level, expand

__all__ = ['eps', 'v', 'velocity', 'x0']


class Target(NamedTuple):
  """of(x0, eps, level) -> F [B, *S, C]; coeffs(level) -> (c_in, c_skip, c_out), each of the shape of level's fields."""
  of: Callable[[Array, Array, Level], Array]
  coeffs: Callable[[Level], tuple[Array, Array, Array]]


def eps() -> Target:
  """F is the noise (Ho et al. 2020, eq. 12)."""
  return Target(
      of=lambda x0, eps, level: eps,
      coeffs=lambda level: (_unit(level), 1 / level.alpha, -level.sigma / level.alpha))


def x0() -> Target:
  """F is the data."""
  return Target(
      of=lambda x0, eps, level: x0,
      coeffs=lambda level: (_unit(level), jnp.zeros_like(level.sigma), jnp.ones_like(level.sigma)))


def v() -> Target:
  """F = alpha eps - sigma x0 in the variance-preserving scale (Salimans & Ho 2022, section 4)."""

  def of(x0, eps, level):
    unit = _unit(level)
    return expand(level.alpha * unit, x0) * eps - expand(level.sigma * unit, x0) * x0

  return Target(of, lambda level: (_unit(level), level.alpha * _unit(level) ** 2, -level.sigma * _unit(level)))


def velocity() -> Target:
  """F = eps - x0, the velocity of the straight path (Liu et al. 2022, eq. 1, from data to noise)."""

  def coeffs(level):
    c = 1 / (level.alpha + level.sigma)
    return c, c, -level.sigma * c

  return Target(lambda x0, eps, level: eps - x0, coeffs)


def _unit(level: Level) -> Array:
  """The factor that brings x to the variance-preserving scale; 1 on the vp path."""
  return jax.lax.rsqrt(level.alpha ** 2 + level.sigma ** 2)
