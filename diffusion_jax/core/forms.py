"""The forms that schedules take: a chain of betas, a curve cut at its infinite ends, an SDE, a move to zero SNR."""
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.paths import Path
from diffusion_jax.core.process import Process
from diffusion_jax.core.types import Array, require


def from_betas(beta: np.ndarray) -> Process:
  """The process whose step i has the given beta [T]; the last may be 1."""
  last, steps = len(beta) - 1, np.arange(len(beta), dtype=np.float64)
  log_alpha_bar = np.cumsum(np.log1p(-beta[:-1]))
  if beta[-1] < 1:
    log_alpha_bar = np.r_[log_alpha_bar, log_alpha_bar[-1] + np.log1p(-beta[-1])]
  levels = log_alpha_bar - np.log(-np.expm1(log_alpha_bar))
  known = steps[:len(levels)]
  to_zero = len(levels) == last  # alpha falls linearly to 0 within the last step

  def interp(x, xs, ys):
    """jnp.interp with tables of x's own precision: jax may mix up those of float32 and float64 otherwise."""
    x = jnp.asarray(x, jnp.result_type(x, 0.0))
    return jnp.interp(x, jnp.asarray(xs, x.dtype), jnp.asarray(ys, x.dtype))

  def logsnr(t, params=None):
    inside = interp(t * last, known, levels)
    if not to_zero:
      return inside
    left = (1 - t) * last
    log_root = 2 * jnp.log(jnp.where(left > 0, left, 1)) + log_alpha_bar[-1]
    tail = log_root - jnp.log(-jnp.expm1(jnp.minimum(log_root, log_alpha_bar[-1])))
    return jnp.where(left <= 0, -jnp.inf, jnp.where(left < 1, tail, inside))

  def time(l, params=None):
    step = interp(-l, -levels, known)
    if to_zero:
      left = jnp.exp((jax.nn.log_sigmoid(l) - log_alpha_bar[-1]) / 2)
      step = jnp.where(l < levels[-1], last - left, step)
    whole = jnp.round(step)  # the chain's own levels give back their step exactly, also in float32
    return (step + jax.lax.stop_gradient(jnp.where(jnp.abs(step - whole) < 1e-3, whole - step, 0))) / last

  return Process(logsnr, time, num_steps=len(beta))


def cut(logsnr: Callable[[Array, Array], Array], time: Callable[[Array], Array], centre: float, logsnr_min: float,
         logsnr_max: float) -> Process:
  """A schedule logsnr(t, 1 - t) on the open (0, 1) and its inverse, symmetric about `centre`, cut at both ends.

  Both times are handed over since near t = 1 it is the rest that must be precise.
  """
  check_ends(logsnr_min, logsnr_max)
  with jax.enable_x64(True):  # time(2 centre - l) is 1 - time(l)
    low, high = (float(time(jnp.float64(l))) for l in (logsnr_max, 2 * centre - logsnr_min))
  kept = 1 - low - high
  return Process(lambda t, params=None: logsnr(low + t * kept, high + (1 - t) * kept),
                 lambda l, params=None: (time(l) - low) / kept)


def linear_sde(path: Path, logsnr: Callable[[Array], Array], integral: Callable[[Array], Array], beta_min: float,
                beta_max: float, t_min: float) -> Process:
  """A process given by logsnr of the integral B of beta from 0 to t, and its inverse, for beta linear in t."""
  require(0 < beta_min <= beta_max, f'0 < beta_min <= beta_max must hold, got {beta_min} and {beta_max}')
  require(0 < t_min < 1, f't_min must lie in (0, 1), got {t_min}')
  rise, kept = beta_max - beta_min, 1 - t_min

  def of_t(t, params=None):
    s = t_min + t * kept
    return logsnr(s * (beta_min + s * rise / 2))

  def time(l, params=None):
    b = integral(l)
    return (2 * b / (beta_min + jnp.sqrt(beta_min ** 2 + 2 * rise * b)) - t_min) / kept

  return Process(of_t, time, path)


def to_zero_snr(inner: Process) -> Process:
  """A process in continuous time with sqrt(alpha_bar) moved to 0 at t = 1 and kept at t = 0."""

  def split(logsnr):
    """sqrt(alpha_bar) and 1 - sqrt(alpha_bar), both to full relative precision."""
    root = jnp.sqrt(jax.nn.sigmoid(logsnr))
    return root, jax.nn.sigmoid(-logsnr) / (1 + root)

  def ends(dtype, params):
    (first, rest), (last, _) = (split(inner.logsnr(jnp.asarray(t, dtype), params)) for t in (0, 1))
    return rest, last, first / (first - last)

  def logsnr(t, params=None):
    t = jnp.asarray(t)
    rest, last, stretch = ends(t.dtype, params)
    root, noise = split(inner.logsnr(t, params))
    root, noise = (root - last) * stretch, rest + (noise - rest) * stretch
    above = (root > 0) & (t < 1)
    root = jnp.where(above, root, 1)  # log(0) would make the gradient NaN
    return jnp.where(above, 2 * jnp.log(root) - jnp.log(noise) - jnp.log1p(root), -jnp.inf)

  def time(l, params=None):
    l = jnp.asarray(l)
    rest, last, stretch = ends(l.dtype, params)
    root, noise = split(l)
    root, noise = root / stretch + last, rest + (noise - rest) / stretch
    return inner.time(2 * jnp.log(root) - jnp.log(noise) - jnp.log1p(root), params)

  return replace(inner, logsnr=logsnr, time=time)


def check_ends(logsnr_min: float, logsnr_max: float) -> None:
  """Raises ValueError unless the ends of logsnr are in order."""
  require(logsnr_min < logsnr_max, f'logsnr_min must be below logsnr_max, got {logsnr_min} and {logsnr_max}')
