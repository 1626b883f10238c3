"""Linear multistep samplers: Adams-Bashforth's weights on remembered noise estimates."""
import jax
import jax.numpy as jnp

from diffusion_jax.core.history import History, adams, combine, eps_of, like, nodes_of, with_noise
from diffusion_jax.core.solver import Sampler, transfer
from diffusion_jax.core.types import Array, Level, require

__all__ = ['lms', 'plms', 'pndm']

_QUANTITIES = ('eps', 'v')


def lms(order: int = 4) -> Sampler:
  """Adams-Bashforth in sigma / alpha, where d(x / alpha) = eps d(sigma / alpha), of the grid's own steps (k-diffusion's
  LMS). order: 1 to 4, reached after as many steps."""
  require(order in (1, 2, 3, 4), f'order must be 1, 2, 3 or 4, got {order}')

  def step(denoise, x, past, cur, nxt, z):
    x0 = denoise(x, cur)
    eps, place = eps_of(x, x0, cur), cur.sigma / cur.alpha
    nodes, known = nodes_of(past.place, order, place, nxt.sigma / nxt.alpha - place)
    change = combine(adams(nodes, known), past.values - eps)
    return with_noise(x, x0, change, cur, nxt), past.push(eps, place)

  return Sampler(step, init=lambda x, num_levels: History.empty(x, order - 1))


def plms(of: str = 'eps') -> Sampler:
  """PLMS (Liu et al. 2022, eq. 12, without Runge-Kutta): Adams-Bashforth of equal times, fourth order, in DDIM's step.

  DDIM's step keeps it at second order. The first step calls twice, to average its ends. Use a grid of equal times.
  of: what is averaged, 'eps' or 'v'; other libraries average what their network gives.
  """
  read, change_eps = _quantity(of)

  def init(x, num_levels):
    return History.empty(x, 3), jnp.asarray(0)

  def step(denoise, x, memory, cur, nxt, z):
    past, done = memory
    x0 = denoise(x, cur)
    value = read(x, x0, cur)

    def average():
      guess = transfer(x, x0, cur, nxt)
      return (read(guess, denoise(guess, nxt), nxt) - value) / 2

    nodes, known = nodes_of(past.place, 4, done, 1)
    change = jax.lax.cond(done == 0, average, lambda: combine(adams(nodes, known), past.values - value))
    return with_noise(x, x0, change_eps(change, cur), cur, nxt), (past.push(value, _numbered(done, cur)), done + 1)

  return Sampler(step, init, extra_calls=1)


def pndm(of: str = 'eps', halved: bool = False) -> Sampler:
  """PNDM (Liu et al. 2022, algorithm 2): three steps of pseudo Runge-Kutta, four calls each, then as PLMS.

  A Runge-Kutta step covers two intervals of the grid: the level between them is its midpoint. halved: the grid's first
  six intervals are half as long as the others in time, as in the paper; else all are alike. of: as in `plms`.
  """
  read, change_eps = _quantity(of)

  def init(x, num_levels):
    level = Level(*(jnp.ones((), x.dtype) for _ in Level._fields))
    return History.empty(x, 3), (x, x, x, x, level), jnp.asarray(0)

  def step(denoise, x, memory, cur, nxt, z):
    past, begun, done = memory
    x0 = denoise(x, cur)
    value = read(x, x0, cur)
    place = jnp.where(done < 6, done / 2, done - 3) if halved else done
    longer = past.push(value, _numbered(place, cur))

    def call(guess):
      return read(guess, denoise(guess, nxt), nxt)

    def move(x, x0, change, level):
      return with_noise(x, x0, change_eps(change, level), level, nxt)

    def to_midpoint():
      k2 = call(transfer(x, x0, cur, nxt))
      return move(x, x0, k2 - value, cur), longer, (x, x0, value, k2, like(cur, begun[-1]))

    def from_midpoint():  # `value` is k3
      start, start_x0, k1, k2, level = begun
      k4 = call(move(start, start_x0, value - k1, level))
      return move(start, start_x0, (2 * k2 + 2 * value + k4 - 5 * k1) / 6, level), past, begun

    def multistep():
      nodes, known = nodes_of(past.place, 4, place, 1)
      return move(x, x0, combine(adams(nodes, known), past.values - value), cur), longer, begun

    x, past, begun = jax.lax.switch(jnp.where(done < 6, done % 2, 2), (to_midpoint, from_midpoint, multistep))
    return x, (past, begun, done + 1)

  return Sampler(step, init, extra_calls=6)


def _quantity(of: str):
  """read(x, x0, level) -> what `of` names; change_eps(change, level) -> eps's change for that change, at one x."""
  require(of in _QUANTITIES, f'of must be one of {", ".join(_QUANTITIES)}, got {of!r}')
  if of == 'eps':
    return eps_of, lambda change, level: change
  return (lambda x, x0, level: level.alpha * eps_of(x, x0, level) - level.sigma * x0,
          lambda change, level: level.alpha / (level.alpha ** 2 + level.sigma ** 2) * change)


def _numbered(done: Array, cur: Level) -> Array:
  """A step's number as a place of the history."""
  return jnp.where(jnp.isfinite(cur.logsnr), done, -jnp.inf)
