"""Which levels are visited: draws for training and grids for sampling.

A *draw* is draw(key, batch, process, params) -> Level [batch]. A *grid* is grid(process, num_steps, params) -> Level
[N], noise first; grids are computed in float64 on the host, once, before anything is compiled.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core import schedules
from diffusion_jax.core.schedules import Process
from diffusion_jax.core.types import Array, Level, Params, require

DRAWS = ['low_discrepancy', 'uniform']
GRIDS = ['karras', 'leading', 'timesteps', 'trailing', 'uniform_logsnr']
__all__ = DRAWS + GRIDS

Draw = Callable[[Array, int, Process, Params], Level]
Grid = Callable[[Process, int, Params], Level]


def uniform() -> Draw:
  """Independent uniform times (Ho et al. 2020, algorithm 1); the steps of a discrete chain are equally likely."""
  return lambda key, batch, process, params=None: _at(jax.random.uniform(key, (batch,)), process, params)


def low_discrepancy() -> Draw:
  """One uniform offset and equal spacing over the batch, which lowers the loss's variance (Kingma et al. 2021, I.1)."""

  def draw(key, batch, process, params=None):
    u = (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1
    return _at(u, process, params)

  return draw


def _at(u: Array, process: Process, params: Params) -> Level:
  """The level of a uniform u in [0, 1): that very time, or the chain's step floor(u T)."""
  if process.num_steps:
    step = jnp.minimum(jnp.floor(u * process.num_steps), process.num_steps - 1)  # u T can round up to T
    u = step / (process.num_steps - 1)
  return process.level(u, params)


def timesteps() -> Grid:
  """Equal times from 1 to 0, both ends included, rounded to the chain's steps ("linspace" in diffusers)."""
  return _grid_in_time(chain=lambda n, T: np.linspace(T - 1, 0, n), time=lambda n: np.linspace(1, 0, n))


def leading() -> Grid:
  """Equal times that start below 1 and end at 0: steps 0, T//N, 2 (T//N), ... in reverse (DDIM's own code)."""
  return _grid_in_time(chain=lambda n, T: np.arange(n)[::-1] * (T // n), time=lambda n: np.arange(n)[::-1] / n)


def trailing() -> Grid:
  """Equal times that start at 1 and end above 0 (Lin et al. 2024, table 2)."""
  return _grid_in_time(chain=lambda n, T: np.arange(n, 0, -1) * (T / n) - 1, time=lambda n: np.arange(n, 0, -1) / n)


def uniform_logsnr() -> Grid:
  """Equal steps of logsnr between the process's ends (Lu et al. 2022, section 3.4)."""
  return _grid_in_logsnr(lambda first, last, n: np.linspace(first, last, n))


def karras(rho: float = 7.0) -> Grid:
  """sigma/alpha equally spaced in its power 1/rho between the process's ends (Karras et al. 2022, eq. 5)."""
  require(rho > 0, f'rho must be above 0, got {rho}')

  def spread(first, last, n):
    ends = (np.exp(-l / (2 * rho)) for l in (first, last))
    return -2 * rho * np.log(np.linspace(*ends, n))

  return _grid_in_logsnr(spread)


def _grid_in_time(chain: Callable[[int, int], np.ndarray], time: Callable[[int], np.ndarray]) -> Grid:
  """A grid from chain(N, T) -> steps on 0 .. T-1, rounded, or from time(N) -> t where time is continuous."""

  def grid(process, num_steps, params=None):
    _check(num_steps)
    T = process.num_steps
    require(not T or num_steps <= T, f'{num_steps} sampling steps do not fit in a chain of {T}: take at most {T}')
    t = np.round(chain(num_steps, T)) / (T - 1) if T else time(num_steps)
    return _level(process, schedules.evaluate(process, t, params))

  return grid


def _grid_in_logsnr(spread) -> Grid:
  """A grid from spread(first, last, n) -> logsnr, first at the noisy end."""

  def grid(process, num_steps, params=None):
    _check(num_steps)
    first, last = schedules.evaluate(process, np.array([1.0, 0.0]), params)
    return _level(process, spread(first, last, num_steps))

  return grid


def _level(process: Process, logsnr: np.ndarray) -> Level:
  """The levels at logsnr, computed in float64 and rounded once."""
  with jax.enable_x64(True):
    level = [np.asarray(a) for a in process.path.level(jnp.asarray(logsnr, jnp.float64))]
  return Level(*map(jnp.asarray, level))


def _check(num_steps: int) -> None:
  require(num_steps >= 1, f'the number of sampling steps must be at least 1, got {num_steps}')
