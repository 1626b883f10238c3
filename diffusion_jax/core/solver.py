"""The one loop that takes a sampler's steps, and what every sampler is made of.

A sampler owns its network calls: step(denoise, x, memory, cur, nxt, z) calls `denoise` as often as it needs (Heun:
twice) and returns (x at nxt, memory). All are written on levels alone: each runs on every path, and from alpha = 0.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.core.types import Array, Denoise, Level

Noise = Callable[[Array, Array, Level, Level, tuple[int, ...]], Array]  # key, i, cur, nxt, shape -> z [*shape]


class Sampler(NamedTuple):
  """A sampling method. x and z are [B, *S, C]; levels are scalars; memory is any tree of arrays.

  step(denoise, x, memory, cur, nxt, z) -> (x at nxt, memory), for a standard normal z; [draws, B, *S, C] if draws > 1.
  init(x, num_levels) -> the memory before the first step.
  finish(denoise, x, memory, last, z) -> x0, from x at the last level.
  calls: evaluations of the denoiser in a step (0: the sampler chooses, see adaptive.counted); extra_calls: further
  ones, one in each of the first so many steps.
  """
  step: Callable[[Denoise, Array, Any, Level, Level, Array], tuple[Array, Any]]
  init: Callable[[Array, int], Any] = lambda x, num_levels: ()
  finish: Callable[[Denoise, Array, Any, Level, Array], Array] = lambda denoise, x, memory, last, z: denoise(x, last)
  calls: int = 1
  extra_calls: int = 0
  draws: int = 1

  def nfe(self, num_steps: int) -> int:
    """Network evaluations for a grid of num_steps levels: a step between each pair, and a last call that gives x0."""
    return (num_steps - 1) * self.calls + min(self.extra_calls, num_steps - 1) + 1


def independent(key: Array, i: Array, cur: Level, nxt: Level, shape: tuple[int, ...]) -> Array:
  """New noise for each step: a function of the sample's key and the step's number."""
  return jax.random.normal(jax.random.fold_in(key, i), shape)


def solve(sampler: Sampler, denoise: Denoise, x: Array, grid: Level, keys: Array, trajectory: bool = False,
          noise: Noise = independent, to_data: bool = True):
  """Integrates from grid[0] to data: x0 [B, *S, C]; with `to_data` False only to grid[-1]: x there.

  x [B, *S, C] is at grid[0]; keys [B] are per-sample: sample i depends on x[i] and keys[i] alone. Memory does not grow
  with the number of steps, unless `trajectory` asks for (x0, (x, x0 estimate)), these two [N, B, *S, C], at each level.
  """
  num_levels = grid.logsnr.shape[0]
  shape = x.shape[1:] if sampler.draws == 1 else (sampler.draws, *x.shape[1:])

  def at(i):
    return jax.tree.map(lambda a: a[i], grid)

  def draw(i, cur, nxt):
    z = jax.vmap(lambda key: noise(key, i, cur, nxt, shape), out_axes=int(sampler.draws > 1))(keys)
    return z.astype(x.dtype)

  def body(carry, i):
    seen = (carry[0], denoise(carry[0], at(i))) if trajectory else None
    return sampler.step(denoise, *carry, at(i), at(i + 1), draw(i, at(i), at(i + 1))), seen

  (x, memory), seen = jax.lax.scan(body, (x, sampler.init(x, num_levels)), jnp.arange(num_levels - 1))
  last = at(num_levels - 1)
  end = sampler.finish(denoise, x, memory, last, draw(num_levels - 1, last, last)) if to_data else x
  if not trajectory:
    return end
  return end, jax.tree.map(lambda path, a: jnp.concatenate([path, a[None]]), seen, (x, denoise(x, last)))


def prior(keys: Array, shape: tuple[int, ...], level: Level) -> Array:
  """Where sampling starts: sigma times a standard normal of `shape` (*S, C) for each key: [B, *S, C]."""
  start = jnp.uint32(0xFFFFFFFF)  # `solve` folds in the steps 0, 1, ...
  return level.sigma * jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, start), shape))(keys)


def transfer(x: Array, x0: Array, cur: Level, nxt: Level) -> Array:
  """Keeps the noise and moves the level: DDIM (Song et al. 2021, eq. 13), the base of every exponential integrator."""
  ratio = nxt.sigma / cur.sigma
  return ratio * x + (nxt.alpha - cur.alpha * ratio) * x0
