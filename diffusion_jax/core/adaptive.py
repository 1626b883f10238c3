"""Samplers that choose their own steps: between two levels of the grid, as many as the tolerance asks for.

Every sample has its own step size and its own error, so that it depends on its x alone and not on the batch. All work
in the variance-preserving scale, where a prediction is the same on every path. The levels of the grid are all visited:
a grid of two levels, the first and the last, leaves every step to the sampler. Since the number of calls is known only
afterwards, `Sampler.calls` is 0; `counted` gives it.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.core.solver import Sampler, transfer
from diffusion_jax.core.types import Array, Level, expand, require

__all__ = ['dpm_adaptive', 'rk45']

# Dormand & Prince 1980, table 2: the fifth-order weights are the last row, since its slope is the next step's first.
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
STAGES = ((1 / 5, 0, 0, 0, 0, 0, 0),
          (3 / 40, 9 / 40, 0, 0, 0, 0, 0),
          (44 / 45, -56 / 15, 32 / 9, 0, 0, 0, 0),
          (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729, 0, 0, 0),
          (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656, 0, 0),
          (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0))
FOURTH = (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)

SAFETY, SHRINK, GROW = 0.9, 0.2, 5.0  # of the step size, after each attempt
PURE_NOISE = -20.0  # logsnr below which dpm_adaptive takes x for noise alone


class Memory(NamedTuple):
  """Between the steps of the grid. h: the next step in the method's coordinate; calls: evaluations so far, both [B]."""
  h: Array
  calls: Array


class Method(NamedTuple):
  """One attempt at a step of size h, in a coordinate u [B] that rises from noise to data.

  u(level) and level(u): from and to levels of the vp path. start(denoise, x, level) -> (x at level(u(level)), what the
  method knows there). attempt(denoise, x, known, u, h) -> (x of low order, x of high order, what it knows there).
  """
  u: Callable[[Level], Array]
  level: Callable[[Array], Level]
  start: Callable
  attempt: Callable
  calls: int   # evaluations in an attempt; `start` makes one
  order: int   # the error of an attempt falls as h to this power
  first: float  # the first h to attempt


def rk45(rtol: float = 1e-4, atol: float = 1e-4, max_steps: int = 1000) -> Sampler:
  """Dormand and Prince's Runge-Kutta pair 5(4) on the probability-flow ODE (Song et al. 2021b, appendix D.4).

  A step's error is held below atol + rtol |x|, as the root of its mean square over a sample; x has the scale of the vp
  path. After `max_steps` attempts between two levels the rest is one step, whatever its error.
  """

  def level(u):
    alpha, sigma = jnp.sin(u), jnp.maximum(jnp.cos(u), jnp.finfo(u.dtype).eps)
    return Level(2 * (jnp.log(alpha) - jnp.log(sigma)), alpha, sigma)

  def slope(denoise, x, at):
    """dx/du = sigma x0 - alpha eps, for alpha = sin u and sigma = cos u: finite from alpha = 0."""
    alpha, sigma, x0 = expand(at.alpha, x), expand(at.sigma, x), denoise(x, at)
    return sigma * x0 - alpha * (x - alpha * x0) / sigma

  def attempt(denoise, x, known, u, h):
    moved = lambda row, slopes: x + expand(h, x) * jnp.sum(expand(row, slopes) * slopes, 0)

    def stage(carry, i):  # a loop, so that the network is compiled once and not six times
      slopes = carry[0]
      high = moved(jnp.asarray(STAGES, x.dtype)[i], slopes)
      return (slopes.at[i + 1].set(slope(denoise, high, level(u + jnp.asarray(NODES, x.dtype)[i] * h))), high), None

    slopes = jnp.zeros((7, *x.shape), x.dtype).at[0].set(known)
    (slopes, high), _ = jax.lax.scan(stage, (slopes, x), jnp.arange(6))
    return moved(jnp.asarray(FOURTH, x.dtype), slopes), high, slopes[-1]

  return _sampler(Method(
      u=lambda at: jnp.arctan2(at.alpha, at.sigma), level=level, attempt=attempt, calls=6, order=5, first=0.1,
      start=lambda denoise, x, at: (x, slope(denoise, x, at))), rtol, atol, max_steps)


def dpm_adaptive(order: int = 3, rtol: float = 0.05, atol: float = 0.0078, max_steps: int = 1000) -> Sampler:
  """DPM-Solver-12 (order 2) and -23 (order 3) with their adaptive step size (Lu et al. 2022, appendix C).

  Tolerances as for `rk45`. Its coordinate is logsnr / 2; from levels below logsnr -20, alpha = 0 included, it first
  goes there in one step of DDIM, which changes x by less than 5e-5 of the data.
  """
  require(order in (2, 3), f'the order of dpm_adaptive must be 2 or 3, got {order}')

  def level(u):
    return Level(2 * u, jnp.sqrt(jax.nn.sigmoid(2 * u)), jnp.sqrt(jax.nn.sigmoid(-2 * u)))

  def coordinate(at):
    return jnp.maximum(at.logsnr, PURE_NOISE) / 2

  def start(denoise, x, at):
    x0 = denoise(x, at)
    return _transfer(x, x0, at, level(coordinate(at))), x0

  def attempt(denoise, x, known, u, h):
    cur, nxt = level(u), level(u + h)
    eps = (x - expand(cur.alpha, x) * known) / expand(cur.sigma, x)

    def change(at, x):
      """How much the noise that is seen at a level between differs from that at `cur`."""
      return (x - expand(at.alpha, x) * denoise(x, at)) / expand(at.sigma, x) - eps

    def bend(at, part, ratio):
      """The factor of the second-order term after `part` of the step: sigma ((e^h - 1) / h - 1) / ratio."""
      return expand(at.sigma * (jnp.expm1(part * h) / (part * h) - 1) / ratio, x)

    part = 1 / 3 if order == 3 else 1 / 2
    middle = level(u + part * h)
    first = change(middle, _transfer(x, known, cur, middle))
    ddim = _transfer(x, known, cur, nxt)
    second = ddim - expand(nxt.sigma * jnp.expm1(h) / (2 * part), x) * first
    if order == 2:
      low, high = ddim, second
    else:
      late = level(u + 2 / 3 * h)
      last = change(late, _transfer(x, known, cur, late) - bend(late, 2 / 3, 1 / 2) * first)
      low, high = second, ddim - bend(nxt, 1, 2 / 3) * last
    return low, high, denoise(high, nxt)

  method = Method(coordinate, level, start, attempt, calls=order, order=order, first=0.05)
  return _sampler(method, rtol, atol, max_steps)


def counted(sampler: Sampler) -> Sampler:
  """The same adaptive sampler, with which `solve` gives (x0, the number of calls [B] that each sample asked for)."""
  require(sampler.calls == 0, f'this sampler makes {sampler.calls} calls in each step: see Sampler.nfe')
  return sampler._replace(
      finish=lambda denoise, x, memory, last, z: (sampler.finish(denoise, x, memory, last, z), memory.calls + 1))


def _sampler(method: Method, rtol: float, atol: float, max_steps: int) -> Sampler:
  """The loop that both share: attempts, per sample, until every sample has reached the next level."""
  require(0 <= rtol < math.inf, f'rtol must be finite and at least 0, got {rtol}')
  require(0 < atol < math.inf, f'atol must be finite and above 0, got {atol}')
  require(max_steps >= 1, f'max_steps must be at least 1, got {max_steps}')

  def step(denoise, x, memory, cur, nxt, z):
    cur_unit, nxt_unit = (jax.lax.rsqrt(a.alpha ** 2 + a.sigma ** 2) for a in (cur, nxt))
    cur = Level(cur.logsnr, cur.alpha * cur_unit, cur.sigma * cur_unit)
    x, known = method.start(denoise, x * cur_unit, cur)
    u, end = (jnp.broadcast_to(method.u(a), x.shape[:1]).astype(x.dtype) for a in (cur, nxt))

    def body(state):
      tried, x, known, u, h, calls = state
      active, rest, forced = u < end, end - u, tried == max_steps - 1
      size = jnp.where(forced, rest, jnp.minimum(h, rest))
      size = jnp.where(active, size, method.first)  # a sample that has arrived waits; its numbers are not used
      low, high, known_high = method.attempt(denoise, x, known, u, size)
      error = _rms((high - low) / (atol + rtol * jnp.maximum(jnp.abs(x), jnp.abs(high))))
      good = active & ((error <= 1) | forced)
      factor = jnp.clip(SAFETY * jnp.maximum(error, 1e-10) ** (-1 / method.order), SHRINK, GROW)
      proposed = jnp.where(good & (size < h), jnp.maximum(h, size * factor), size * factor)  # the grid cut this one
      take = lambda new, old: jnp.where(expand(good, x), new, old)
      reached = jnp.where(size < rest, u + size, end)  # u + rest may round to a little less than the end
      return (tried + 1, take(high, x), take(known_high, known), jnp.where(good, reached, u),
              jnp.where(active & ~forced, proposed, h), calls + active * method.calls)

    state = jax.lax.while_loop(lambda s: jnp.any(s[3] < end) & (s[0] < max_steps), body,
                               (0, x, known, u, memory.h, memory.calls + 1))
    return state[1] / nxt_unit, Memory(*state[4:])

  def init(x, num_levels):
    return Memory(jnp.full(x.shape[:1], method.first, x.dtype), jnp.zeros(x.shape[:1], jnp.int32))

  return Sampler(step, init, calls=0)


def _transfer(x: Array, x0: Array, cur: Level, nxt: Level) -> Array:
  """`transfer` between levels [B]."""
  return transfer(x, x0, *(jax.tree.map(lambda a: expand(a, x), level) for level in (cur, nxt)))


def _rms(x: Array) -> Array:
  """The root of each sample's mean square: [B]."""
  return jnp.sqrt(jnp.mean(x ** 2, range(1, x.ndim)))
