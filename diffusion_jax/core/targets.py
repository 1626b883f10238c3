"""What a network predicts: three coefficients, x0 = c_skip x + c_out F(c_in x), and the F that training wants.

Each target shows the network x in the scale of the path on which it is usually written (c_in), so that a prediction
depends on logsnr and not on the path: a network trained on one path serves on every other.

From a level without any signal (alpha = 0), eps, score and their like say nothing of x0: there c_skip and c_out are
infinite. x0, v, velocity, edm and mu are finite everywhere.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.core import chain, schedules
from diffusion_jax.core.schedules import Process
from diffusion_jax.core.types import Array, Level, Params, expand, require

__all__ = ['edm', 'eps', 'mu', 'score', 'v', 'velocity', 'x0']


class Target(NamedTuple):
  """of(x0, eps, level) -> F [B, *S, C]; coeffs(level) -> (c_in, c_skip, c_out), each of the shape of level's fields.

  on(process, params) -> the same target for that process, where it depends on more than the level; see `on` below.
  """
  of: Callable[[Array, Array, Level], Array]
  coeffs: Callable[[Level], tuple[Array, Array, Array]]
  on: Callable[[Process, Params], 'Target'] | None = None


def on(target: Target, process: Process, params: Params = None) -> Target:
  """`target` as it is on `process`: the same, but for `mu`."""
  return target.on(process, params) if target.on else target


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


def score() -> Target:
  """F = -eps / sigma, the score of x given x0, in the variance-preserving scale (Song et al. 2021, eq. 7)."""

  def coeffs(level):
    unit = _unit(level)
    return unit, 1 / level.alpha, (level.sigma * unit) ** 2 / (level.alpha * unit)

  return Target(lambda x0, eps, level: -eps / expand(level.sigma * _unit(level), x0), coeffs)


def edm(sigma_data: float = 0.5) -> Target:
  """EDM's F for data of standard deviation sigma_data: input and output of unit variance (Karras et al. 2022, table 1).

  Theirs is written for x / alpha, the variance-exploding scale.
  """
  require(sigma_data > 0, f'sigma_data must be above 0, got {sigma_data}')

  def size(level):  # of x, its standard deviation
    return jnp.sqrt(level.sigma ** 2 + (sigma_data * level.alpha) ** 2)

  def of(x0, eps, level):
    scale = 1 / (sigma_data * size(level))
    return expand(level.sigma * scale, x0) * x0 - expand(sigma_data ** 2 * level.alpha * scale, x0) * eps

  def coeffs(level):
    s = size(level)
    return 1 / s, sigma_data ** 2 * level.alpha / s ** 2, sigma_data * level.sigma / s

  return Target(of, coeffs)


def mu(num_steps: int = 1000) -> Target:
  """F is the mean of the previous step given x and x0, in the variance-preserving scale (Ho et al. 2020, eq. 7).

  Steps are those of the process's chain, or 1 / num_steps in continuous time; without a process (`on`), DDPM's own.
  """
  require(num_steps >= 1, f'num_steps must be at least 1, got {num_steps}')

  def place(process, params=None):
    vp = schedules.on_path(process, 'vp')

    def mean(level):
      """(k0, k, unit): F = k0 x0 + k unit x."""
      cur = vp.path.level(level.logsnr)
      return *chain.posterior(cur, chain.previous(vp, cur, params, num_steps))[:2], _unit(level)

    def of(x0, eps, level):
      k0, k, unit = mean(level)
      # Summed as scalars first: near the data, where F is almost x0 itself, no digits cancel.
      return expand(k0 + k * unit * level.alpha, x0) * x0 + expand(k * unit * level.sigma, x0) * eps

    def coeffs(level):
      k0, k, unit = mean(level)
      return unit, -k * unit / k0, 1 / k0

    return Target(of, coeffs)

  return place(schedules.linear())._replace(on=place)


def _unit(level: Level) -> Array:
  """The factor that brings x to the variance-preserving scale; 1 on the vp path."""
  return jax.lax.rsqrt(level.alpha ** 2 + level.sigma ** 2)
