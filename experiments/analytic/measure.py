"""What is measured: samples of a known distribution at a budget of network evaluations, and how far off they are."""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core import samplers, schedules
from diffusion_jax.core.samplers import Sampler
from diffusion_jax.core.types import Denoise, Level
from experiments.analytic import distance, exact

BUDGETS = (5, 10, 20, 50, 100, 200)
WHOLE_CHAIN = 1000       # all the steps of DDPM's chain
REFERENCE_LEVELS = 600   # of the Heun solution in float64, where the flow has no formula
FLOOR_REPEATS = 20


class Case(NamedTuple):
  """A distribution and how it is sampled: `groups` times `size` samples, each group against data of its own."""
  data: exact.Data
  distance: str
  size: int
  groups: int
  reference: int  # how many samples are also compared with the exact solution of the ODE


def cases(quick: bool) -> dict[str, Case]:
  """The distributions by name."""
  groups, line, plane = (2, 500, 500) if quick else (3, 4000, 2000)
  return {'ellipse': Case(exact.ellipse(), 'sliced_wasserstein', plane, groups, 500),
          'three': Case(exact.three(), 'wasserstein', line, groups, 500),
          'ring': Case(exact.ring(), 'sliced_wasserstein', plane, groups, 500),
          'moons': Case(exact.moons(), 'sliced_wasserstein', plane // 2, groups, 250),
          'digits': Case(exact.digits(), 'energy', 256, groups, 64)}


# Taking steps

class Walker:
  """`samplers.solve`, with a step that is compiled once and serves grids of every length.

  The denoiser is exact and small, so that compiling a loop for each number of steps would take longer than the steps.
  """

  def __init__(self, sampler: Sampler, denoise: Denoise):
    self.sampler, self.random = sampler, None  # random: whether the noise changes what comes of it
    self.step = jax.jit(functools.partial(sampler.step, denoise))
    self.finish = jax.jit(functools.partial(sampler.finish, denoise))

  def __call__(self, x: jax.Array, grid: Level, keys: jax.Array) -> jax.Array:
    """x0 [B, D] from x at grid[0]."""
    at = [Level(*fields) for fields in zip(*map(np.asarray, grid), strict=True)]
    memory, z = self.sampler.init(x, len(at)), None
    for i, cur in enumerate(at):
      if z is None or self.random is not False:
        z = draw_noise(keys, i, x.shape[1:], self.sampler.draws).astype(x.dtype)
      if i == len(at) - 1:
        return self.finish(x, memory, cur, z)
      if self.random is None:  # seen on the first step
        outcomes = [jax.tree.leaves(self._outcome(x, memory, cur, at[i + 1], noise)) for noise in (z, -z)]
        self.random = any(bool(jnp.any(a != b)) for a, b in zip(*outcomes, strict=True))
      x, memory = self.step(x, memory, cur, at[i + 1], z)

  def _outcome(self, x, memory, cur, nxt, z):
    stepped, memory = self.step(x, memory, cur, nxt, z)
    return stepped, self.finish(x, memory, nxt, z)


@functools.partial(jax.jit, static_argnums=(2, 3))
def draw_noise(keys: jax.Array, i: int, shape: tuple[int, ...], draws: int) -> jax.Array:
  """A standard normal for each key at step i: [B, *shape], or [draws, B, *shape] if draws > 1."""
  whole = shape if draws == 1 else (draws, *shape)
  draw = lambda key: samplers.independent(key, i, None, None, whole)
  return jax.vmap(draw, out_axes=int(draws > 1))(keys)


def num_levels(sampler: Sampler, budget: int) -> int:
  """The longest grid whose evaluations keep to the budget; 0 if none does."""
  return max((n for n in range(1, budget + 1) if sampler.nfe(n) <= budget), default=0)


# Judging what comes out

class Judge:
  """A case's start, data to compare with, and exact solutions; made once for all samplers."""

  def __init__(self, case: Case, seed: int):
    self.case, self.references = case, {}
    ids = jnp.arange(case.size * case.groups)
    self.keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(ids)
    rng = np.random.default_rng([seed, 1])
    self.sets = [case.data.draw(rng, case.size) for _ in range(case.groups)]
    self.distance = getattr(distance, case.distance)
    fresh = [np.concatenate([case.data.draw(rng, case.size) for _ in self.sets]) for _ in range(FLOOR_REPEATS)]
    self.floor = [float(np.mean(self.distances(x0))) for x0 in fresh]  # what perfect samples would score

  def start(self, grid: Level) -> jax.Array:
    """Where sampling starts: [groups * size, D]."""
    return samplers.prior(self.keys, (self.case.data.dims,), jax.tree.map(lambda a: a[0], grid))

  def distances(self, x0: np.ndarray) -> list[float]:
    """The distance to the data for each group of samples."""
    parts = np.split(np.asarray(x0, np.float64), self.case.groups)
    return [self.distance(a, b) for a, b in zip(parts, self.sets, strict=True)]

  def ode_error(self, x0: np.ndarray, x: np.ndarray, grid: Level) -> float:
    """The RMS over samples and dimensions of x0 less the exact solution between the grid's ends and its last call."""
    n = self.case.reference
    ends = tuple(float(a[i]) for a in grid for i in (0, -1))
    if ends not in self.references:
      self.references[ends] = exact_solution(self.case.data, np.asarray(x[:n], np.float64), grid)
    return float(np.sqrt(np.mean((np.asarray(x0[:n], np.float64) - self.references[ends]) ** 2)))


def exact_solution(data: exact.Data, x: np.ndarray, grid: Level) -> np.ndarray:
  """x0 [B, D] of the flow from x at grid[0] to grid[-1] and the denoiser there: by formula, or Heun in small steps."""
  with jax.enable_x64(True):
    ends = Level(*(jnp.asarray(np.asarray(a)[[0, -1]], jnp.float64) for a in grid))
    first, last = (jax.tree.map(lambda a, i=i: a[i], ends) for i in (0, 1))
    denoise = jax.jit(data.denoise)
    if data.transport:
      return np.asarray(denoise(jnp.asarray(data.transport(x, first, last)), last))
    # Equal steps of logsnr on the path that has these ends; its noisy end is finite here.
    path = next(p for p in schedules.PATHS if np.allclose(p.level(ends.logsnr).alpha, ends.alpha, atol=1e-4))
    fine = path.level(jnp.linspace(ends.logsnr[0], ends.logsnr[1], REFERENCE_LEVELS))
    fine = jax.tree.map(lambda a, e: a.at[jnp.array([0, -1])].set(e), fine, ends)
    keys = jax.random.split(jax.random.key(0), len(x))
    return np.asarray(Walker(samplers.heun(), data.denoise)(jnp.asarray(x), fine, keys))
