"""Samplers: one step from a level to the next, and the one loop that takes the steps.

A sampler owns its network calls: step(denoise, x, memory, cur, nxt, z) calls `denoise` as often as it needs (Heun:
twice) and returns (x at nxt, memory). All are written on levels alone: each runs on every path, and from alpha = 0.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.core.types import Array, Denoise, Level, require

__all__ = ['ancestral', 'ddim', 'dpmpp_2m', 'heun']


class Sampler(NamedTuple):
  """A sampling method. `calls` is how many times a step evaluates the denoiser."""
  step: Callable[[Denoise, Array, Any, Level, Level, Array], tuple[Array, Any]]
  init: Callable[[Array], Any] = lambda x: ()  # x -> the memory before the first step
  calls: int = 1

  def nfe(self, num_steps: int) -> int:
    """Network evaluations for a grid of num_steps levels: a step between each pair, and a last call that gives x0."""
    return (num_steps - 1) * self.calls + 1


def solve(sampler: Sampler, denoise: Denoise, x: Array, grid: Level, keys: Array, trajectory: bool = False):
  """Integrates from grid[0] to data: x0 [B, *S, C].

  x [B, *S, C] is at grid[0]; keys [B] are per-sample: sample i depends on x[i] and keys[i] alone. Memory does not grow
  with the number of steps, unless `trajectory` asks for (x0, (x, x0 estimate)), these two [N, B, *S, C], at each level.
  """
  num_levels = grid.logsnr.shape[0]

  def at(i):
    return jax.tree.map(lambda a: a[i], grid)

  def body(carry, i):
    z = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:], x.dtype))(keys)
    seen = (carry[0], denoise(carry[0], at(i))) if trajectory else None
    return sampler.step(denoise, *carry, at(i), at(i + 1), z), seen

  (x, _), seen = jax.lax.scan(body, (x, sampler.init(x)), jnp.arange(num_levels - 1))
  x0 = denoise(x, at(num_levels - 1))
  if not trajectory:
    return x0
  return x0, jax.tree.map(lambda path, end: jnp.concatenate([path, end[None]]), seen, (x, x0))


def prior(keys: Array, shape: tuple[int, ...], level: Level) -> Array:
  """Where sampling starts: sigma times a standard normal of `shape` (*S, C) for each key: [B, *S, C]."""
  start = jnp.uint32(0xFFFFFFFF)  # `solve` folds in the steps 0, 1, ...
  return level.sigma * jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, start), shape))(keys)


def transfer(x: Array, x0: Array, cur: Level, nxt: Level) -> Array:
  """Keeps the noise and moves the level: DDIM (Song et al. 2021, eq. 13), the base of every exponential integrator."""
  ratio = nxt.sigma / cur.sigma
  return ratio * x + (nxt.alpha - cur.alpha * ratio) * x0


def ancestral(variance: float = 0.0) -> Sampler:
  """DDPM's reverse chain (Ho et al. 2020, algorithm 2), between any two levels.

  variance: 0 is the posterior's (their "fixed small"), 1 is beta_t ("fixed large"), between them the logarithms are
  interpolated (Nichol & Dhariwal 2021, eq. 15).
  """
  require(0 <= variance <= 1, f'variance must lie in [0, 1], got {variance}')

  def step(denoise, x, memory, cur, nxt, z):
    x0 = denoise(x, cur)
    lost = -jnp.expm1(cur.logsnr - nxt.logsnr)  # 1 - SNR(cur) / SNR(nxt): beta_t / sigma_t^2 on the vp path
    mean = nxt.alpha * lost * x0 + cur.alpha / nxt.alpha * (nxt.sigma / cur.sigma) ** 2 * x
    small, large = nxt.sigma * jnp.sqrt(lost), cur.sigma * jnp.sqrt(lost)
    return mean + small ** (1 - variance) * large ** variance * z, memory

  return Sampler(step)


def ddim(eta: float = 0.0) -> Sampler:
  """DDIM (Song et al. 2021, eq. 12): deterministic at eta = 0, the ancestral sampler at 1."""
  require(0 <= eta <= 1, f'eta must lie in [0, 1], got {eta}')

  def step(denoise, x, memory, cur, nxt, z):
    x0 = denoise(x, cur)
    std = eta * nxt.sigma * jnp.sqrt(-jnp.expm1(cur.logsnr - nxt.logsnr))
    eps = (x - cur.alpha * x0) / cur.sigma
    return nxt.alpha * x0 + jnp.sqrt(nxt.sigma ** 2 - std ** 2) * eps + std * z, memory

  return Sampler(step)


def heun() -> Sampler:
  """Heun's method on dx = x0 dalpha + eps dsigma, second order on any path; on ve it is EDM's (Karras et al. 2022)."""

  def step(denoise, x, memory, cur, nxt, z):
    x0 = denoise(x, cur)
    eps = (x - cur.alpha * x0) / cur.sigma
    guess = nxt.alpha * x0 + nxt.sigma * eps
    x0_next = denoise(guess, nxt)
    eps_next = (guess - nxt.alpha * x0_next) / nxt.sigma
    return x + (nxt.alpha - cur.alpha) * (x0 + x0_next) / 2 + (nxt.sigma - cur.sigma) * (eps + eps_next) / 2, memory

  return Sampler(step, calls=2)


def dpmpp_2m() -> Sampler:
  """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): the last two x0 estimates, extrapolated by half a step."""

  def step(denoise, x, memory, cur, nxt, z):
    last_x0, last_h = memory
    x0 = denoise(x, cur)
    h = nxt.logsnr - cur.logsnr
    slope = jnp.where(jnp.isinf(last_h), 0.0, h / (2 * last_h))  # infinite before the first step, and after alpha = 0
    return transfer(x, x0 + slope * (x0 - last_x0), cur, nxt), (x0, h)

  return Sampler(step, init=lambda x: (jnp.zeros_like(x), jnp.asarray(jnp.inf, x.dtype)))

