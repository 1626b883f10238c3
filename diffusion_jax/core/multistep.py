"""Multistep samplers: they remember earlier estimates, and so reach a high order with one call per step.

In lam = logsnr / 2 the probability-flow ODE has two exact forms between levels s and n (Lu et al. 2022a, b):

  data:   x_n = sigma_n / sigma_s x_s + alpha_n int exp(lam - lam_n) x0 dlam
  noise:  x_n = alpha_n / alpha_s x_s - sigma_n int exp(lam_n - lam) eps dlam

A sampler replaces x0 or eps by a polynomial through the remembered values. Here that polynomial is a sum of weights on
(remembered - current), over a coordinate u that is 0 at the current level and 1 at the next; without memory every one
of them is DDIM. Memory of a level with alpha = 0, where lam is -inf, counts as none.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.solver import Sampler, transfer
from diffusion_jax.core.types import Array, Level, require

__all__ = ['deis', 'dpm_solver', 'dpmpp', 'dpmpp_2m', 'dpmpp_3m', 'dpmpp_sde', 'lms', 'plms', 'pndm', 'unipc']

_KINDS = ('midpoint', 'heun', 'exact')
_VARIANTS = ('bh1', 'bh2')
_QUANTITIES = ('eps', 'v')
# Gauss-Legendre on [0, 1]: exact for the polynomials, and to rounding for a kernel exp(rate u) with |rate| < 20.
_U, _DU = (np.polynomial.legendre.leggauss(16)[0] + 1) / 2, np.polynomial.legendre.leggauss(16)[1] / 2


class _History(NamedTuple):
  """Remembered values [K, B, *S, C], newest first, and where each belongs [K]: not finite where there is none."""
  values: Array
  place: Array

  @classmethod
  def empty(cls, x: Array, size: int):
    return cls(jnp.zeros((size, *x.shape), x.dtype), jnp.full(size, -jnp.inf, x.dtype))

  def push(self, value: Array, place: Array):
    size = len(self.place)
    return _History(*(jnp.concatenate([new[None].astype(old.dtype), old])[:size]
                      for new, old in zip((value, jnp.asarray(place)), self, strict=True)))

  def known(self, order: Array | int) -> Array:
    """Which values a method of this order may use: [K] bool."""
    return jnp.isfinite(self.place) & (jnp.arange(len(self.place)) < order - 1)


def dpmpp(order: int = 2, kind: str = 'midpoint', final_order: int = 3) -> Sampler:
  """DPM-Solver++ multistep (Lu et al. 2022b, algorithm 2 and appendix B), on x0; the first steps are of lower order.

  order: 1, 2 or 3. kind: how a difference of x0 is weighed: 'midpoint' (the paper's; by half) or 'heun' (by its exact
  integral) in a step of second order; 'exact' integrates the interpolating polynomial exactly at every order. The
  published third-order step gives the second difference half of its integral, so it converges with order 2 only, if
  closely; 'exact' has the third.
  final_order: the last step's order is at most this, the step's before it at most one more, ...; 2 is what other
  libraries call "lower order final": there the call that gives x0 is counted, as the step of order 1.
  """
  return _exponential(order, kind, final_order)


def dpmpp_2m() -> Sampler:
  """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): the last two x0 estimates, extrapolated by half a step."""
  return dpmpp(2)


def dpmpp_3m() -> Sampler:
  """DPM-Solver++(3M) as published: the last three x0 estimates; see `dpmpp` for its order."""
  return dpmpp(3)


def dpmpp_sde(order: int = 2, kind: str = 'midpoint', final_order: int = 3, eta: float = 1.0) -> Sampler:
  """SDE-DPM-Solver++ multistep (Lu et al. 2022b, section 5, at eta = 1): dpmpp with new noise in each step.

  eta: in [0, 1], how much of the noise is new; 0 is dpmpp. order, kind, final_order: as in `dpmpp`.
  """
  require(0 <= eta <= 1, f'eta must lie in [0, 1], got {eta}')
  return _exponential(order, kind, final_order, eta=eta)


def dpm_solver(order: int = 2, kind: str = 'midpoint', final_order: int = 3) -> Sampler:
  """DPM-Solver (Lu et al. 2022a) in its multistep form, on eps; order, kind, final_order: as in `dpmpp`."""
  return _exponential(order, kind, final_order, of_noise=True)


def deis(order: int = 3, final_order: int = 3) -> Sampler:
  """DEIS (Zhang & Chen 2023, section 3.3): eps interpolated in log(sigma / alpha) and integrated exactly.

  order: 1, 2 or 3; final_order: as in `dpmpp`.
  """
  return _exponential(order, 'exact', final_order, of_noise=True)


def lms(order: int = 4) -> Sampler:
  """Linear multistep in sigma / alpha, where d(x / alpha) = eps d(sigma / alpha), with the steps' own Adams-Bashforth
  coefficients (the LMS of k-diffusion). order: 1 to 4."""
  require(order in (1, 2, 3, 4), f'order must be 1, 2, 3 or 4, got {order}')

  def init(x, num_levels):
    return _History.empty(x, order - 1)

  def step(denoise, x, history, cur, nxt, z):
    x0 = denoise(x, cur)
    eps = _eps(x, x0, cur)
    known, lam = history.known(order), cur.logsnr / 2
    span = _finite(nxt.logsnr - cur.logsnr) / 2
    nodes = jnp.expm1(jnp.where(known, lam - history.place, 1)) / jnp.expm1(-span)
    change = _combine(_adams(nodes, known), history.values - eps)
    return _with_noise(x, x0, change, cur, nxt), history.push(eps, lam)

  return Sampler(step, init)


def _exponential(order: int, kind: str, final_order: int, of_noise: bool = False, eta: float = 0.0) -> Sampler:
  """The samplers whose coordinate is lam and whose kernel is the exact one."""
  require(order in (1, 2, 3), f'order must be 1, 2 or 3, got {order}')
  require(kind in _KINDS, f'kind must be one of {", ".join(_KINDS)}, got {kind!r}')
  _check_final(final_order)

  def init(x, num_levels):
    return _History.empty(x, order - 1), jnp.asarray(num_levels - 1)

  def step(denoise, x, memory, cur, nxt, z):
    history, left = memory
    x0, lam = denoise(x, cur), cur.logsnr / 2
    h = (nxt.logsnr - cur.logsnr) / 2
    value = _eps(x, x0, cur) if of_noise else x0
    rate = _finite(h) if of_noise else -(1 + eta) * _finite(h)
    nodes, known = _nodes(history, jnp.minimum(order, left + final_order - 1), lam, h)
    change = _combine(_dpm_weights(kind, nodes, known, rate), history.values - value)
    if of_noise:
      x = _with_noise(x, x0, change, cur, nxt)
    elif eta:
      kept = nxt.sigma / cur.sigma * jnp.exp(-eta * h)
      x = kept * x + (nxt.alpha - cur.alpha * kept) * (x0 + change) + nxt.sigma * jnp.sqrt(-jnp.expm1(-2 * eta * h)) * z
    else:
      x = transfer(x, x0 + change, cur, nxt)
    return x, (history.push(value, lam), left - 1)

  return Sampler(step, init)


def unipc(order: int = 2, variant: str = 'bh2', corrector: bool = True, uncorrected: int = 0,
          final_order: int = 3) -> Sampler:
  """UniPC (Zhao et al. 2023, algorithms 1 and 2), on x0: a predictor, and a corrector that costs no further call.

  A step first repeats the one before it with the estimate that is now known at its end. order: 1, 2 or 3 of the
  predictor; the corrector raises it by one. variant: B(h) = h ('bh1') or e^h - 1 ('bh2'); they differ only where one
  difference is used, as half of B(h). uncorrected: how many of the first steps go without corrector. final_order: as in
  `dpmpp`; other libraries' default is 2.
  """
  require(order in (1, 2, 3), f'order must be 1, 2 or 3, got {order}')
  require(variant in _VARIANTS, f'variant must be one of {", ".join(_VARIANTS)}, got {variant!r}')
  require(uncorrected >= 0, f'uncorrected must be at least 0, got {uncorrected}')
  _check_final(final_order)

  def half(rate):
    return 0.5 if variant == 'bh2' else 0.5 * rate / jnp.expm1(rate)  # relative to the kernel's integral, 1 - e^-h

  def init(x, num_levels):
    nowhere = Level(*(jnp.asarray(a, x.dtype) for a in (-jnp.inf, 0, 1)))
    done, used = jnp.asarray(0), jnp.asarray(1)
    return (x, nowhere), _History.empty(x, order), done, used, jnp.asarray(num_levels - 1)

  def correct(x0, last, history, used, cur):
    x, level = last
    before, values = history.values[0], history.values[1:]
    h = (cur.logsnr - level.logsnr) / 2
    nodes, known = _nodes(_History(values, history.place[1:]), used, level.logsnr / 2, h)
    nodes, known = jnp.append(1.0, nodes).astype(nodes.dtype), jnp.append(True, known)
    weights = _one_difference(nodes, known, half(-_finite(h)))
    if order > 1:
      weights = jnp.where(known[1], _adams(nodes, known, -_finite(h)), weights)
    return transfer(x, before + _combine(weights, jnp.append(x0[None], values, axis=0) - before), level, cur)

  def step(denoise, x, memory, cur, nxt, z):
    last, history, done, used, left = memory
    x0, lam = denoise(x, cur), cur.logsnr / 2
    if corrector:
      apply = jnp.isfinite(last[1].logsnr) & (done > uncorrected)
      x = jnp.where(apply, correct(x0, last, history, used, cur), x)
    h = (nxt.logsnr - cur.logsnr) / 2
    used = jnp.minimum(order, left + final_order - 1)
    nodes, known = _nodes(history, used, lam, h)
    nodes, known = nodes[:order - 1], known[:order - 1]
    weights = _one_difference(nodes, known, half(-_finite(h)))
    if order == 3:
      weights = jnp.where(known[1], _adams(nodes, known, -_finite(h)), weights)
    change = _combine(weights, history.values[:order - 1] - x0)
    cur = Level(*(a.astype(b.dtype) for a, b in zip(cur, last[1], strict=True)))
    return transfer(x, x0 + change, cur, nxt), ((x, cur), history.push(x0, lam), done + 1, used, left - 1)

  return Sampler(step, init)


def plms(of: str = 'eps') -> Sampler:
  """PLMS (Liu et al. 2022, eq. 12, without Runge-Kutta): fourth-order Adams-Bashforth coefficients of equal times, in
  DDIM's step; it is itself of second order. The first step calls twice, to average its ends.

  Use a grid of equal times. of: what is averaged, 'eps' or 'v' (the choice of the network's target elsewhere).
  """
  read, change_eps = _quantity(of)

  def init(x, num_levels):
    return _History.empty(x, 3), jnp.asarray(0)

  def step(denoise, x, memory, cur, nxt, z):
    history, done = memory
    x0 = denoise(x, cur)
    value = read(x, x0, cur)

    def average():
      guess = transfer(x, x0, cur, nxt)
      return (read(guess, denoise(guess, nxt), nxt) - value) / 2

    nodes, known = _nodes(history, 4, done, 1)
    change = jax.lax.cond(done == 0, average, lambda: _combine(_adams(nodes, known), history.values - value))
    return _with_noise(x, x0, change_eps(change, cur), cur, nxt), (history.push(value, _index(done, cur)), done + 1)

  return Sampler(step, init, extra_calls=1)


def pndm(of: str = 'eps', halved: bool = False) -> Sampler:
  """PNDM (Liu et al. 2022, algorithm 2): three steps of pseudo Runge-Kutta, four calls each, then as PLMS.

  A Runge-Kutta step covers two intervals of the grid: the level between them is its midpoint. halved: the grid's first
  six intervals are half as long as the others in time, as in the paper; else all are alike. of: as in `plms`.
  """
  read, change_eps = _quantity(of)

  def init(x, num_levels):
    return _History.empty(x, 3), (x, x, x, x, Level(*(jnp.ones((), x.dtype) for _ in Level._fields))), jnp.asarray(0)

  def step(denoise, x, memory, cur, nxt, z):
    history, begun, done = memory
    x0 = denoise(x, cur)
    value = read(x, x0, cur)
    place = jnp.where(done < 6, done / 2, done - 3) if halved else done
    pushed = history.push(value, _index(place, cur))

    def first():
      k2 = ahead(transfer(x, x0, cur, nxt))
      start = Level(*(a.astype(b.dtype) for a, b in zip(cur, begun[-1], strict=True)))
      return move(x, x0, k2 - value, cur), pushed, (x, x0, value, k2, start)

    def second():
      start, start_x0, k1, k2, level = begun
      k4 = ahead(move(start, start_x0, value - k1, level))
      return move(start, start_x0, (2 * k2 + 2 * value + k4 - 5 * k1) / 6, level), history, begun

    def later():
      nodes, known = _nodes(history, 4, place, 1)
      return move(x, x0, _combine(_adams(nodes, known), history.values - value), cur), pushed, begun

    def ahead(guess):
      return read(guess, denoise(guess, nxt), nxt)

    def move(x, x0, change, level):
      return _with_noise(x, x0, change_eps(change, level), level, nxt)

    x, history, begun = jax.lax.switch(jnp.where(done < 6, done % 2, 2), (first, second, later))
    return x, (history, begun, done + 1)

  return Sampler(step, init, extra_calls=6)


def _check_final(final_order: int) -> None:
  require(final_order in (1, 2, 3), f'final_order must be 1, 2 or 3, got {final_order}')


def _quantity(of: str):
  """read(x, x0, level) -> what `of` names; change_eps(change, level) -> eps's change for that change, at one x."""
  require(of in _QUANTITIES, f'of must be one of {", ".join(_QUANTITIES)}, got {of!r}')
  if of == 'eps':
    return _eps, lambda change, level: change
  return (lambda x, x0, level: level.alpha * _eps(x, x0, level) - level.sigma * x0,
          lambda change, level: level.alpha / (level.alpha ** 2 + level.sigma ** 2) * change)


def _eps(x: Array, x0: Array, level: Level) -> Array:
  return (x - level.alpha * x0) / level.sigma


def _index(done: Array, cur: Level) -> Array:
  """A step's number as a place of the history."""
  return jnp.where(jnp.isfinite(cur.logsnr), done, -jnp.inf)


def _finite(h: Array) -> Array:
  """h, but 1 where it is infinite: next to alpha = 0 there is no history, and h goes unused."""
  return jnp.where(jnp.isfinite(h), h, 1)


def _with_noise(x: Array, x0: Array, change: Array, cur: Level, nxt: Level) -> Array:
  """DDIM's step with eps + change for eps; from alpha = 0, where sigma / alpha has no finite step, without change."""
  h = (nxt.logsnr - cur.logsnr) / 2
  return transfer(x, x0, cur, nxt) - jnp.where(jnp.isfinite(h), nxt.sigma * jnp.expm1(_finite(h)), 0) * change


def _nodes(history: _History, order: Array | int, now: Array, h: Array) -> tuple[Array, Array]:
  """(u of each remembered value, whether a method of this order may use it), both [K]."""
  known = history.known(order)
  return jnp.where(known, (history.place - now) / _finite(h), -1), known


def _combine(weights: Array, differences: Array) -> Array:
  return jnp.tensordot(weights.astype(differences.dtype), differences, 1)


def _kernel(rate: Array | float) -> Array:
  """exp(rate (1 - u)) on the nodes of the quadrature, with integral 1."""
  weights = jnp.exp(rate * (1 - _U) - jnp.maximum(rate, 0)) * _DU
  return weights / jnp.sum(weights)


def _adams(nodes: Array, known: Array, rate: Array | float = 0.0) -> Array:
  """Weights [K] of value(node) - value(0) in the mean over u in [0, 1] of the polynomial through 0 and the known nodes.

  The mean is weighed by exp(rate (1 - u)). Lagrange's products lose no digits, however close the nodes are.
  """
  # An unknown node needs a value that no other has.
  nodes = [jnp.where(k, node, 2.0 + i) for i, (node, k) in enumerate(zip(nodes, known, strict=True))]
  kernel, weights = _kernel(rate), []
  for j, node in enumerate(nodes):
    basis = _U / node
    for i, other in enumerate(nodes):
      if i != j:
        basis = basis * jnp.where(known[i], (_U - other) / (node - other), 1)
    weights.append(jnp.where(known[j], jnp.sum(kernel * basis), 0))
  return jnp.stack(weights) if weights else jnp.zeros(0)


def _one_difference(nodes: Array, known: Array, half: Array | float) -> Array:
  """Weights [K] of the slope to the newest known value, times `half`."""
  return jnp.where(known & (jnp.arange(len(nodes)) == 0), half / nodes, 0)


def _dpm_weights(kind: str, nodes: Array, known: Array, rate: Array) -> Array:
  """The weights [K] of DPM-Solver's steps, of the order of what is known."""
  if kind == 'exact':
    return _adams(nodes, known, rate)
  first = jnp.sum(_kernel(rate) * _U)
  weights = _one_difference(nodes, known, first if kind == 'heun' else 0.5)
  if len(nodes) == 2:
    near, far = jnp.where(known[1], nodes, jnp.array([-1.0, -2.0]))
    second = jnp.sum(_kernel(rate) * _U ** 2) / 2  # half of the integral, as published
    third = jnp.stack([(second - far * first) / (near * (near - far)), (second - near * first) / (far * (far - near))])
    weights = jnp.where(known[1], third, weights)
  return weights
