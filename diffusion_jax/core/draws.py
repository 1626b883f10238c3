"""What the training draws of core/levels.py are made of: their interface, and the history that `importance` keeps."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.core.schedules import Process
from diffusion_jax.core.types import Array, Level, Params

State = Any  # what a draw keeps from step to step, a tree of arrays


class Draw(NamedTuple):
  """Which levels training visits, and how often.

  sample(key, batch, process, params, state) -> (Level [batch], correction [batch]): the factor on each example's loss
    that leaves the objective what it is under uniform times, however `importance` draws; 1 for all others.
  density(logsnr, process, params, state) -> how densely logsnr is drawn, per unit of logsnr and of logsnr's shape. For
    a chain: the probability of the step that is nearest, over half the logsnr between that step's two neighbours.
  init(process) -> state, and update(state, level [B], losses [B], process, params) -> state, from losses without
    their correction; () and no change for every draw but `importance`.
  """
  sample: Callable[..., tuple[Level, Array]]
  density: Callable[..., Array]
  init: Callable[[Process], State] = lambda process: ()
  update: Callable[..., State] = lambda state, level, losses, process, params=None: state

  def __call__(self, key: Array, batch: int, process: Process, params: Params = None) -> Level:
    """The levels [batch] that are drawn before any loss is known."""
    return self.sample(key, batch, process, params, self.init(process))[0]


def of_time(times: Callable[[Array, int, Process, State], Array], cdf: Callable[[Array, State], Array]) -> Draw:
  """A draw of t in [0, 1] by times(key, batch, process, state); cdf(t, state) is the share of draws below t.

  A chain of T steps is drawn at step floor(t T).
  """

  def sample(key, batch, process, params=None, state=()):
    t, T = times(key, batch, process, state), process.num_steps
    if T:
      t = jnp.minimum(jnp.floor(t * T), T - 1) / (T - 1)  # t T can round up to T
    return process.level(t, params), jnp.ones(batch)

  def density(logsnr, process, params=None, state=()):
    at = lambda t: process.logsnr(t, params)
    t, T = process.time(logsnr, params), process.num_steps
    if T:
      step = jnp.round(t * (T - 1))
      low, high = jnp.maximum(step - 1, 0), jnp.minimum(step + 1, T - 1)
      mass = cdf((step + 1) / T, state) - cdf(step / T, state)
      found = mass * (high - low) / (at(low / (T - 1)) - at(high / (T - 1)))
    else:
      slope = lambda f: jax.jvp(f, (t,), (jnp.ones_like(t),))[1]
      found = slope(lambda t: cdf(t, state)) / jnp.abs(slope(at))
    margin = 1e-4  # of rounding, at the process's ends
    return jnp.where((logsnr > at(jnp.ones(())) - margin) & (logsnr < at(jnp.zeros(())) + margin), found, 0)

  return Draw(sample, density)


def bin_of(level: Level, process: Process, params: Params, bins: int) -> Array:
  """The bin of equal time, 0 .. bins-1, that each level lies in; a chain's bins are its steps."""
  t = process.time(level.logsnr, params)
  place = jnp.round(t * (bins - 1)) if process.num_steps else jnp.floor(t * bins)
  return jnp.clip(place, 0, bins - 1).astype(jnp.int32)


def probabilities(state: State, uniform: float) -> Array:
  """sqrt(mean loss^2) of each bin over their sum, mixed with `uniform` of equal shares; equal until all are filled."""
  bins, history = state['losses'].shape
  size = jnp.sqrt(jnp.mean(state['losses'] ** 2, axis=1))
  share = size / jnp.maximum(size.sum(), jnp.finfo(size.dtype).tiny)
  ready = (state['count'] >= history).all() & (size.sum() > 0)
  return jnp.where(ready, (1 - uniform) * share + uniform / bins, 1 / bins)


def remember(state: State, places: Array, losses: Array) -> State:
  """Writes losses [B] into the rings of their bins `places` [B]; of too many for a ring the last ones stay."""
  bins, history = state['losses'].shape
  order = jnp.argsort(places, stable=True)
  ordered = places[order]
  first, end = (jnp.searchsorted(ordered, ordered, side=side) for side in ('left', 'right'))
  rank = jnp.zeros_like(places).at[order].set((jnp.arange(len(places)) - first).astype(places.dtype))
  total = jnp.zeros_like(places).at[order].set((end - first).astype(places.dtype))
  row = jnp.where(rank >= total - history, places, bins)  # a row that does not exist is dropped
  kept = state['losses'].at[row, (state['count'][places] + rank) % history].set(losses, mode='drop')
  count = state['count'].at[places].add(1)
  # The count keeps the place in the ring, and that the ring is full, without ever overflowing.
  return {'losses': kept, 'count': jnp.where(count >= 2 * history, history + count % history, count)}
