"""Which levels are visited: draws for training and grids for sampling.

A *draw* is draw(key, batch, process, params) -> Level [batch], with its density and, for `importance`, its state: see
`Draw`. A *grid* is grid(process, num_steps, params) -> Level [N], noise first; grids are computed in float64 on the
host, once, before anything is compiled.
"""
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core import draws, grids, schedules
from diffusion_jax.core.draws import Draw
from diffusion_jax.core.grids import Grid
from diffusion_jax.core.types import require

DRAWS = ['importance', 'logit_normal', 'lognormal', 'low_discrepancy', 'stratified', 'uniform']
GRIDS = ['exponential', 'karras', 'lcm', 'leading', 'own', 'polynomial', 'quadratic', 'shifted', 'timesteps',
         'trailing', 'uniform_logsnr']
__all__ = DRAWS + GRIDS


def uniform() -> Draw:
  """Independent uniform times (Ho et al. 2020, algorithm 1); the steps of a discrete chain are equally likely."""
  return draws.of_time(lambda key, batch, process, state: jax.random.uniform(key, (batch,)), lambda t, state: t)


def low_discrepancy() -> Draw:
  """One uniform offset and equal spacing over the batch, which lowers the loss's variance (Kingma et al. 2021, I.1)."""
  times = lambda key, batch, process, state: (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1
  return draws.of_time(times, lambda t, state: t)


def stratified() -> Draw:
  """One uniform time in each of `batch` equal parts of [0, 1]: even, as low_discrepancy, with independent offsets."""
  times = lambda key, batch, process, state: (jnp.arange(batch) + jax.random.uniform(key, (batch,))) / batch
  return draws.of_time(times, lambda t, state: t)


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Draw:
  """log(t / (1 - t)) is normal: times in the middle more often, as for SD3 on a flow (Esser et al. 2024, eq. 19)."""
  require(std > 0, f'std must be above 0, got {std}')
  times = lambda key, batch, process, state: jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch,)))

  def cdf(t, state):
    inside = (t > 0) & (t < 1)
    share = jax.scipy.special.ndtr((jax.scipy.special.logit(jnp.where(inside, t, 0.5)) - mean) / std)
    return jnp.where(inside, share, jnp.where(t <= 0, 0.0, 1.0))

  return draws.of_time(times, cdf)


def lognormal(mean: float = -1.2, std: float = 1.2) -> Draw:
  """log(sigma / alpha) is normal, whatever the process's schedule: EDM's draw (Karras et al. 2022, table 1).

  Its tails reach beyond the process's ends, and a chain is drawn between its steps too.
  """
  require(std > 0, f'std must be above 0, got {std}')

  def sample(key, batch, process, params=None, state=()):
    log_ratio = mean + std * jax.random.normal(key, (batch,))
    return process.path.level(-2 * log_ratio), jnp.ones(batch)

  return Draw(sample, lambda logsnr, process, params=None, state=():
              jax.scipy.stats.norm.pdf(logsnr, -2 * mean, 2 * std))


def importance(history: int = 10, mix: float = 0.001, bins: int = 128) -> Draw:
  """Times in proportion to sqrt(E[loss^2]) over their last losses (Nichol & Dhariwal 2021, eq. 18).

  Uniform until each step of the chain, or each of `bins` equal parts of continuous time, has seen `history` losses;
  `mix` is the share of draws that stays uniform, so that no step is forgotten.
  """
  require(history >= 1, f'history must be at least 1 loss, got {history}')
  require(0 < mix <= 1, f'mix must lie in (0, 1], got {mix}')
  require(bins >= 1, f'bins must be at least 1, got {bins}')

  def init(process):
    count = process.num_steps or bins
    return {'losses': jnp.zeros((count, history), jnp.float32), 'count': jnp.zeros(count, jnp.int32)}

  def times(key, batch, process, state):
    p = draws.probabilities(state, mix)
    which_key, where_key = jax.random.split(key)
    which = jax.random.choice(which_key, len(p), (batch,), p=p)
    return (which + (0.5 if process.num_steps else jax.random.uniform(where_key, (batch,)))) / len(p)

  def cdf(t, state):
    p = draws.probabilities(state, mix)
    return jnp.interp(t, jnp.arange(len(p) + 1) / len(p), jnp.r_[0, jnp.cumsum(p)])

  base = draws.of_time(times, cdf)

  def sample(key, batch, process, params=None, state=()):
    level, _ = base.sample(key, batch, process, params, state)
    p = draws.probabilities(state, mix)
    return level, 1 / (len(p) * p[draws.bin_of(level, process, params, len(p))])

  def update(state, level, losses, process, params=None):
    place = draws.bin_of(level, process, params, len(state['count']))
    return draws.remember(state, place, losses.astype(state['losses'].dtype))

  return Draw(sample, base.density, init, update)


def timesteps(last: bool = True, between: str = 'round') -> Grid:
  """Equal times from 1 to 0, both ends included ("linspace" in diffusers).

  last: whether 0 itself is a level; without it the grid is one of N + 1 times less the last (DPM-Solver's).
  between: chain steps are whole ('round'), or sigma/alpha ('sigma': Euler and Heun in diffusers) or logsnr ('logsnr')
  is interpolated between them.
  """
  line = lambda end, n: np.linspace(0, end, n + 1 - last)[::-1][:n] if n + 1 - last > 1 else np.array([end])
  return grids.in_time(lambda n, T: line(T - 1.0, n), lambda n: line(1.0, n), between)


def leading(last: bool = True, offset: int = 0) -> Grid:
  """Equal times that start below 1 and end at 0: steps 0, T//N, 2 (T//N), ... in reverse (DDIM's own code).

  last: as for `timesteps`. offset: added to each step of a chain; SD 1.5 and its kin take 1.
  """
  require(offset >= 0, f'offset must be at least 0 steps, got {offset}')

  def steps(n, T):
    first, cells = n - last, n + 1 - last
    top = first * (T // cells) + offset
    require(top < T, f'offset {offset} leaves the chain: {n} leading steps of {T} would start at step {top}')
    return (first - np.arange(n)) * (T // cells) + offset

  return grids.in_time(steps, lambda n: (n - last - np.arange(n)) / (n + 1 - last))


def trailing() -> Grid:
  """Equal times that start at 1 and end above 0 (Lin et al. 2024, table 2)."""
  return grids.in_time(lambda n, T: np.round(T - np.arange(n) * (T / n)) - 1, lambda n: np.arange(n, 0, -1) / n)


def quadratic(reach: float = 0.8) -> Grid:
  """Times from `reach` to 0 that are equally spaced in their square root (Song et al. 2021, appendix D.2)."""
  require(0 < reach <= 1, f'reach must lie in (0, 1], got {reach}')
  root = lambda n: np.linspace(1, 0, n) ** 2
  # 1e-9: the square of a root may fall short of a whole step.
  return grids.in_time(lambda n, T: np.floor(np.minimum(reach * T, T - 1) * root(n) + 1e-9), lambda n: reach * root(n))


def polynomial(rho: float = 2.0) -> Grid:
  """Times from 1 to 0 that are equally spaced in their power 1/rho: above 1, finer at the data end."""
  require(rho > 0, f'rho must be above 0, got {rho}')
  power = lambda n: np.linspace(1, 0, n) ** rho
  return grids.in_time(lambda n, T: power(n) * (T - 1), power)


def shifted(shift: float = 3.0, first: float = 1.0, last: float = 0.0) -> Grid:
  """Equal times t from `first` to `last`, moved to shift t / (1 + (shift - 1) t) (Esser et al. 2024, eq. 23).

  Above 1 it is finer at the noise end, for high resolutions. It is meant for flows, where t is sigma. exp(mu) is the
  shift of diffusers' exponential `mu`.
  """
  require(shift > 0, f'shift must be above 0, got {shift}')
  require(0 <= last < first <= 1, f'times must satisfy 0 <= last < first <= 1, got last {last} and first {first}')

  def time(n):
    t = np.linspace(first, last, n)
    return shift * t / (1 + (shift - 1) * t)

  return grids.in_time(lambda n, T: time(n) * (T - 1), time)


def lcm(train_steps: int = 50) -> Grid:
  """N of the `train_steps` trailing times that a consistency model was distilled on (Luo et al. 2023)."""
  require(train_steps >= 1, f'train_steps must be at least 1, got {train_steps}')

  def chosen(n):
    require(n <= train_steps, f'{n} sampling steps are more than the {train_steps} that the model was distilled on')
    return train_steps - np.arange(n) * train_steps // n

  def steps(n, T):
    require(train_steps <= T, f'a chain of {T} steps has no {train_steps} that a model could be distilled on')
    return chosen(n) * (T // train_steps) - 1

  return grids.in_time(steps, lambda n: chosen(n) / train_steps)


def uniform_logsnr(sigma_min: float = 0.0, sigma_max: float = 0.0) -> Grid:
  """Equal steps of logsnr (Lu et al. 2022, section 3.4) between sigma_max and sigma_min, the ends' sigma/alpha.

  0 stands for the process's own end.
  """
  return grids.in_logsnr(np.linspace, sigma_min, sigma_max)


def exponential(sigma_min: float = 0.0, sigma_max: float = 0.0) -> Grid:
  """Equal ratios of sigma/alpha: `uniform_logsnr` by the name that EDM's users know."""
  return uniform_logsnr(sigma_min, sigma_max)


def karras(rho: float = 7.0, sigma_min: float = 0.0, sigma_max: float = 0.0) -> Grid:
  """sigma/alpha equally spaced in its power 1/rho (Karras et al. 2022, eq. 5); the ends are as for uniform_logsnr."""
  require(rho > 0, f'rho must be above 0, got {rho}')

  def spread(first, last, n):
    ends = (np.exp(-l / (2 * rho)) for l in (first, last))
    return -2 * rho * np.log(np.linspace(*ends, n))

  return grids.in_logsnr(spread, sigma_min, sigma_max)


def own(values: tuple = (), of: str = 'steps') -> Grid:
  """Your own levels, noise first: steps of a chain, 'time' in [0, 1], 'logsnr', or 'sigma' (sigma/alpha)."""
  require(of in ('steps', 'time', 'logsnr', 'sigma'), f"of must be 'steps', 'time', 'logsnr' or 'sigma', got {of!r}")
  require(len(values) > 0, f'an own grid needs its {of}: write own(values=(...,))')
  v = np.asarray(values, np.float64)
  change = np.diff(v) if of == 'logsnr' else -np.diff(v)
  require(bool(np.all(change > 0)), f"{of} must go from noise to data, each {'above' if of == 'logsnr' else 'below'} "
          f'the one before, got {tuple(values)}')
  require(of != 'sigma' or v[-1] > 0, f'sigma must be above 0, got {tuple(values)}')

  def grid(process, num_steps, params=None):
    require(num_steps == len(v),
            f'the grid has {len(v)} levels of its own: take that many sampling steps, got {num_steps}')
    require(of != 'steps' or process.num_steps, 'steps need a chain, and this process is continuous: give times')
    top = process.num_steps - 1 if of == 'steps' else 1
    if of in ('steps', 'time'):
      require(v[-1] >= 0 and v[0] <= top, f'{of} must lie in [0, {top}], got {tuple(values)}')
      return grids.at_logsnr(process, schedules.evaluate(process, v / top, params))
    return grids.at_logsnr(process, v if of == 'logsnr' else -2 * np.log(v))

  return grid
