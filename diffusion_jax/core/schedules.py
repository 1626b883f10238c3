"""Noise schedules: functions from time t in [0, 1] (data to noise) to logsnr, and the paths they are walked along.

A *schedule* is a function below; it returns a `Process`. A *path* turns logsnr into (alpha, sigma). A schedule made
from the T betas of a Markov chain places step i of 0 .. T-1 at t = i / (T - 1), exactly, and interpolates logsnr
between steps: every t in [0, 1] lies within what the chain knows, and both ends are finite.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.types import Array, Level, Params, require

__all__ = ['cosine', 'cosine_continuous', 'linear', 'rectified_flow']


class Path(NamedTuple):
  """How logsnr becomes the scales of x = alpha x0 + sigma eps."""
  name: str
  scales: Callable[[Array], tuple[Array, Array]]  # logsnr -> (alpha, sigma)

  def level(self, logsnr: Array) -> Level:
    """The level at `logsnr`, of the same shape."""
    return Level(logsnr, *self.scales(logsnr))


# Variance preserving: alpha^2 + sigma^2 = 1.
vp = Path('vp', lambda l: (jnp.sqrt(jax.nn.sigmoid(l)), jnp.sqrt(jax.nn.sigmoid(-l))))
# Variance exploding: alpha = 1.
ve = Path('ve', lambda l: (jnp.ones_like(l), jnp.exp(-l / 2)))
# Straight lines from noise to data: alpha + sigma = 1.
flow = Path('flow', lambda l: (jax.nn.sigmoid(l / 2), jax.nn.sigmoid(-l / 2)))
PATHS = (vp, ve, flow)


@dataclass(frozen=True)
class Process:
  """A schedule on a path. Fixed schedules ignore `params`; a learned one makes them in `init` to be trained."""
  logsnr: Callable[[Array, Params], Array]  # t in [0, 1] -> logsnr, strictly decreasing
  time: Callable[[Array, Params], Array]    # the inverse of `logsnr`
  path: Path = vp
  num_steps: int = 0                        # T of a discrete chain; 0: continuous time
  init: Callable[[Array], Params] = lambda key: {}

  def level(self, t: Array, params: Params = None) -> Level:
    """The level at time t, of the shape of t."""
    return self.path.level(self.logsnr(t, params))


def linear(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Process:
  """DDPM's schedule: betas rise linearly (Ho et al. 2020, section 4)."""
  _check_steps(num_steps)
  require(0 < beta_start <= beta_end < 1,
          f'betas must satisfy 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}')
  return _chain(np.linspace(beta_start, beta_end, num_steps))


def cosine(num_steps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Process:
  """The clipped cosine chain (Nichol & Dhariwal 2021, eq. 17): alpha_bar(t) ~ cos^2((t + s) / (1 + s) pi / 2)."""
  _check_steps(num_steps)
  require(s >= 0, f's must be at least 0, got {s}')
  require(0 < max_beta < 1, f'max_beta must lie in (0, 1), got {max_beta}')
  alpha_bar = np.cos((np.arange(num_steps + 1) / num_steps + s) / (1 + s) * np.pi / 2) ** 2
  return _chain(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta))


def cosine_continuous(logsnr_min: float = -15.0, logsnr_max: float = 15.0) -> Process:
  """The cosine schedule in continuous time, alpha = cos(angle), cut at both ends (Hoogeboom et al. 2023)."""
  require(logsnr_min < logsnr_max, f'logsnr_min must be below logsnr_max, got {logsnr_min} and {logsnr_max}')
  start, end = (np.arctan(np.exp(-0.5 * l)) for l in (logsnr_max, logsnr_min))
  return Process(
      logsnr=lambda t, params=None: -2 * jnp.log(jnp.tan(start + t * (end - start))),
      time=lambda l, params=None: (jnp.arctan(jnp.exp(-0.5 * l)) - start) / (end - start))


def rectified_flow(margin: float = 1e-4) -> Process:
  """sigma = t and alpha = 1 - t on the flow path (Liu et al. 2022; Lipman et al. 2022).

  `margin` keeps sigma within [margin, 1 - margin], so that logsnr is finite at both ends.
  """
  require(0 < margin < 0.5, f'margin must lie in (0, 0.5), got {margin}')

  def logsnr(t, params=None):
    sigma = margin + (1 - 2 * margin) * t
    alpha = margin + (1 - 2 * margin) * (1 - t)
    return 2 * (jnp.log(alpha) - jnp.log(sigma))

  return Process(logsnr, lambda l, params=None: (jax.nn.sigmoid(-l / 2) - margin) / (1 - 2 * margin), flow)


def on_path(process: Process, path: str) -> Process:
  """The same schedule walked along another path, 'vp', 've' or 'flow': a network trained on one serves on all."""
  found = [p for p in PATHS if p.name == path]
  require(bool(found), f"path must be one of {', '.join(p.name for p in PATHS)}, got {path!r}")
  return replace(process, path=found[0])


def alphas_cumprod(process: Process, num_steps: int, params: Params = None) -> np.ndarray:
  """DDPM's alpha_bar, the signal's share of the variance, at num_steps equal times: [num_steps] float64, falling."""
  return _sigmoid(evaluate(process, np.linspace(0, 1, num_steps), params))


def betas(process: Process, num_steps: int, params: Params = None) -> np.ndarray:
  """The betas of the chain over num_steps equal times, 1 - alpha_bar_i / alpha_bar_{i-1}: [num_steps] float64."""
  _check_steps(num_steps)
  logsnr = evaluate(process, np.linspace(0, 1, num_steps), params)
  log_alpha_bar = np.r_[0.0, -np.logaddexp(0, -logsnr)]
  return -np.expm1(np.diff(log_alpha_bar))


def evaluate(process: Process, t: np.ndarray, params: Params = None) -> np.ndarray:
  """logsnr at times t in float64 on the host, whatever precision jax runs in."""
  with jax.enable_x64(True):
    return np.asarray(process.logsnr(jnp.asarray(t, jnp.float64), params))


def _chain(beta: np.ndarray) -> Process:
  """The process whose step i has the given beta [T]."""
  alpha_bar = np.cumprod(1 - beta)
  table = np.log(alpha_bar) - np.log1p(-alpha_bar)
  last, steps = len(table) - 1, np.arange(len(table), dtype=np.float64)

  def time(logsnr, params=None):
    step = jnp.interp(-logsnr, -table, steps)
    whole = jnp.round(step)  # the chain's own levels give back their step exactly, also in float32
    return jnp.where(jnp.abs(step - whole) < 1e-3, whole, step) / last

  return Process(lambda t, params=None: jnp.interp(t * last, steps, table), time, num_steps=len(table))


def _check_steps(num_steps: int) -> None:
  require(num_steps >= 2, f'num_steps must be at least 2, got {num_steps}')


def _sigmoid(x: np.ndarray) -> np.ndarray:
  return np.exp(-np.logaddexp(0, -x))
