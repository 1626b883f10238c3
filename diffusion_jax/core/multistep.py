"""Multistep samplers: they remember earlier estimates, and so reach a high order with one call per step.

In lam = logsnr / 2 the probability-flow ODE has two exact forms between levels s and n (Lu et al. 2022a, b):

  data:   x_n = sigma_n / sigma_s x_s + alpha_n int exp(lam - lam_n) x0 dlam
  noise:  x_n = alpha_n / alpha_s x_s - sigma_n int exp(lam_n - lam) eps dlam

The samplers here put a polynomial through the remembered values in the place of x0 or eps; with nothing remembered each
is DDIM. Those of core/linear_multistep.py do without the exact exponential.
"""
import jax.numpy as jnp

from diffusion_jax.core import linear_multistep
from diffusion_jax.core.history import History, adams, combine, eps_of, finite, like, moment, nodes_of, with_noise
from diffusion_jax.core.linear_multistep import *  # noqa: F403
from diffusion_jax.core.solver import Sampler, transfer
from diffusion_jax.core.types import Array, Level, require

__all__ = ['deis', 'dpm_solver', 'dpmpp', 'dpmpp_2m', 'dpmpp_3m', 'dpmpp_sde', 'unipc', *linear_multistep.__all__]

_KINDS = ('midpoint', 'heun', 'exact')
_VARIANTS = ('bh1', 'bh2')


def dpmpp(order: int = 2, kind: str = 'midpoint', final_order: int = 3) -> Sampler:
  """DPM-Solver++ multistep (Lu et al. 2022b, algorithm 2 and appendix B), on x0; the first steps are of lower order.

  order: 1, 2 or 3. kind: how a step of second order weighs the difference of two x0, 'midpoint' (by half) or 'heun' (by
  its exact integral); 'exact' integrates the interpolating polynomial exactly at every order. The published third order
  gives the second difference half of its integral and converges with order 2; 'exact' with order 3.
  final_order: the last step has at most this order, the one before it at most one more, ...; 2 is what other libraries
  call "lower order final", where the call that gives x0 is counted too, as a step of order 1.
  """
  return _exponential(order, kind, final_order)


def dpmpp_2m() -> Sampler:
  """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): the last two x0 estimates, extrapolated by half a step."""
  return dpmpp(2)


def dpmpp_3m() -> Sampler:
  """DPM-Solver++(3M), as published: the last three x0 estimates; see `dpmpp` for its order."""
  return dpmpp(3)


def dpmpp_sde(order: int = 2, kind: str = 'midpoint', final_order: int = 3, eta: float = 1.0) -> Sampler:
  """SDE-DPM-Solver++ multistep (Lu et al. 2022b, section 5, at eta = 1): dpmpp with new noise in each step.

  eta: how much noise is new, in [0, 1]; 0 is dpmpp. order, kind, final_order: as in `dpmpp`.
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


def _exponential(order: int, kind: str, final_order: int, of_noise: bool = False, eta: float = 0.0) -> Sampler:
  _check_orders(order, final_order)
  require(kind in _KINDS, f'kind must be one of {", ".join(_KINDS)}, got {kind!r}')

  def init(x, num_levels):
    return History.empty(x, order - 1), jnp.asarray(num_levels - 1)

  def step(denoise, x, memory, cur, nxt, z):
    past, left = memory
    x0, lam, h = denoise(x, cur), cur.logsnr / 2, (nxt.logsnr - cur.logsnr) / 2
    value = eps_of(x, x0, cur) if of_noise else x0
    rate = finite(h) if of_noise else -(1 + eta) * finite(h)
    nodes, known = nodes_of(past.place, left + final_order - 1, lam, h)
    change = combine(_dpm_weights(kind, nodes, known, rate), past.values - value)
    if of_noise:
      x = with_noise(x, x0, change, cur, nxt)
    elif eta:
      kept = nxt.sigma / cur.sigma * jnp.exp(-eta * h)
      new = nxt.sigma * jnp.sqrt(-jnp.expm1(-2 * eta * h))
      x = kept * x + (nxt.alpha - cur.alpha * kept) * (x0 + change) + new * z
    else:
      x = transfer(x, x0 + change, cur, nxt)
    return x, (past.push(value, lam), left - 1)

  return Sampler(step, init)


def _dpm_weights(kind: str, nodes: Array, known: Array, rate: Array) -> Array:
  """Weights [K] of DPM-Solver's step, of the order that the known values allow."""
  if kind == 'exact':
    return adams(nodes, known, rate)
  first = moment(rate, 1)
  weights = _one_difference(nodes, known, first if kind == 'heun' else 0.5)
  if len(nodes) == 2:
    near, far = jnp.where(known[1], nodes, jnp.array([-1.0, -2.0]))
    second = moment(rate, 2) / 2  # as published; all of it would be `adams`
    third = jnp.stack([(second - far * first) / (near * (near - far)), (second - near * first) / (far * (far - near))])
    weights = jnp.where(known[1], third, weights)
  return weights


def unipc(order: int = 2, variant: str = 'bh2', corrector: bool = True, uncorrected: int = 0,
          final_order: int = 3) -> Sampler:
  """UniPC (Zhao et al. 2023, algorithms 1 and 2), on x0: a predictor, and a corrector that costs no call of its own.

  A step first repeats the one before it, with the estimate that is now known at its end. order: 1, 2 or 3, that of the
  predictor; the corrector's is one more. variant: B(h) = h ('bh1') or e^h - 1 ('bh2'), of which half is the weight
  where only one difference is used; otherwise they are the same. uncorrected: how many of the first steps go without.
  final_order: as in `dpmpp`; other libraries have 2 by default.
  """
  _check_orders(order, final_order)
  require(variant in _VARIANTS, f'variant must be one of {", ".join(_VARIANTS)}, got {variant!r}')
  require(uncorrected >= 0, f'uncorrected must be at least 0, got {uncorrected}')

  def weights_of(nodes, known, h):
    """The exact ones from two known values on, else those of one difference."""
    rate = -finite(h)
    half = 0.5 if variant == 'bh2' else 0.5 * rate / jnp.expm1(rate)  # relative to the kernel's integral, 1 - e^-h
    weights = _one_difference(nodes, known, half)
    return jnp.where(known[1], adams(nodes, known, rate), weights) if len(nodes) > 1 else weights

  def init(x, num_levels):
    nowhere = Level(*(jnp.asarray(a, x.dtype) for a in (-jnp.inf, 0, 1)))
    return x, nowhere, History.empty(x, order), jnp.asarray(1), jnp.asarray(0), jnp.asarray(num_levels - 1)

  def correct(x0, x, start, past, used, cur):
    """The step from x at `start`, taken again with x0 at its end."""
    h, before = (cur.logsnr - start.logsnr) / 2, past.values[0]
    nodes, known = nodes_of(past.place[1:], used, start.logsnr / 2, h)
    nodes, known = jnp.append(jnp.ones_like(nodes, shape=1), nodes), jnp.append(True, known)
    values = jnp.append(x0[None], past.values[1:], axis=0)
    return transfer(x, before + combine(weights_of(nodes, known, h), values - before), start, cur)

  def step(denoise, x, memory, cur, nxt, z):
    start_x, start, past, used, done, left = memory
    x0, lam, h = denoise(x, cur), cur.logsnr / 2, (nxt.logsnr - cur.logsnr) / 2
    if corrector:
      follows = jnp.isfinite(start.logsnr) & (done > uncorrected)
      x = jnp.where(follows, correct(x0, start_x, start, past, used, cur), x)
    used = jnp.minimum(order, left + final_order - 1)
    nodes, known = nodes_of(past.place[:order - 1], used, lam, h)
    change = combine(weights_of(nodes, known, h), past.values[:order - 1] - x0)
    return transfer(x, x0 + change, cur, nxt), (x, like(cur, start), past.push(x0, lam), used, done + 1, left - 1)

  return Sampler(step, init)


def _one_difference(nodes: Array, known: Array, half: Array | float) -> Array:
  """Weights [K] of the slope to the newest known value, times `half`."""
  return jnp.where(known & (jnp.arange(len(nodes)) == 0), half / nodes, 0)


def _check_orders(order: int, final_order: int) -> None:
  require(order in (1, 2, 3), f'order must be 1, 2 or 3, got {order}')
  require(final_order in (1, 2, 3), f'final_order must be 1, 2 or 3, got {final_order}')
