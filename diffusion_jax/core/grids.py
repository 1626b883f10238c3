"""What the sampling grids of core/levels.py are made of. All of it is numpy in float64, on the host."""
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core import schedules
from diffusion_jax.core.schedules import Process
from diffusion_jax.core.types import Level, Params, require

Grid = Callable[[Process, int, Params], Level]  # process, num_steps, params -> levels [num_steps], noise first

# Where alpha is 0 at the end, sigma/alpha is spread from this value (alpha_bar = 2^-24), and the end is still visited.
LARGEST = 4096.0


def in_time(steps: Callable[[int, int], np.ndarray], time: Callable[[int], np.ndarray], between: str = 'round') -> Grid:
  """A grid from steps(N, T) -> falling steps on 0 .. T-1, or from time(N) -> falling t where time is continuous.

  between: what becomes of a place between two steps of a chain. 'round' takes the nearest step that no other level has,
  'sigma' interpolates sigma/alpha linearly, 'logsnr' logsnr.
  """
  require(between in ('round', 'sigma', 'logsnr'), f"between must be 'round', 'sigma' or 'logsnr', got {between!r}")

  def grid(process, num_steps, params=None):
    check(num_steps)
    T = process.num_steps
    if not T:
      return at_logsnr(process, schedules.evaluate(process, time(num_steps), params))
    require(num_steps <= T, f'{num_steps} sampling steps do not fit in a chain of {T}: take at most {T}')
    place = steps(num_steps, T)
    if between == 'round':
      place = distinct(np.round(place), T)
    if between != 'sigma':
      return at_logsnr(process, schedules.evaluate(process, place / (T - 1), params))
    table = schedules.evaluate(process, np.arange(T) / (T - 1), params)
    ratio = np.interp(place, np.arange(T), np.minimum(np.exp(-table / 2), LARGEST))
    return at_logsnr(process, np.where(place == T - 1, table[-1], -2 * np.log(ratio)))

  return grid


def in_logsnr(spread: Callable[[float, float, int], np.ndarray], sigma_min: float, sigma_max: float) -> Grid:
  """A grid from spread(first, last, N) -> rising logsnr; sigma_min and sigma_max are sigma/alpha of the ends.

  0 stands for the process's own end.
  """
  require(min(sigma_min, sigma_max) >= 0,
          f'sigma_min and sigma_max must be at least 0, got {sigma_min} and {sigma_max}')

  def grid(process, num_steps, params=None):
    check(num_steps)
    ends = schedules.evaluate(process, np.array([1.0, 0.0]), params)
    first, last = (-2 * np.log(s) if s else end for s, end in zip((sigma_max, sigma_min), ends, strict=True))
    require(first < last,
            f'sigma/alpha must fall along the grid, got {np.exp(-first / 2):g} to {np.exp(-last / 2):g}')
    logsnr = spread(max(first, -2 * np.log(LARGEST)), last, num_steps)
    return at_logsnr(process, np.r_[first, logsnr[1:]])

  return grid


def at_logsnr(process: Process, logsnr: np.ndarray) -> Level:
  """The levels at logsnr, computed in float64 and rounded once."""
  with jax.enable_x64(True):
    level = [np.asarray(a) for a in process.path.level(jnp.asarray(logsnr, jnp.float64))]
  return Level(*map(jnp.asarray, level))


def distinct(steps: np.ndarray, num_steps: int) -> np.ndarray:
  """Falling whole steps within 0 .. num_steps-1, moved apart where two are the same."""
  i = np.arange(len(steps))[::-1]  # levels that are yet to come
  rising = np.maximum.accumulate((steps - i)[::-1])[::-1] + i
  return np.minimum(rising, num_steps - len(steps) + i)


def check(num_steps: int) -> None:
  """Refuses an empty grid."""
  require(num_steps >= 1, f'the number of sampling steps must be at least 1, got {num_steps}')
