"""Noise schedules: functions from time t in [0, 1] (data to noise) to logsnr, each a factory of a `Process`.

A schedule made from the T betas of a Markov chain places step i of 0 .. T-1 at t = i / (T - 1), exactly, and
interpolates logsnr between steps: every t in [0, 1] lies within what the chain knows, and both ends are finite. Only
`jsd`, `zero_terminal_snr` and a `table` that ends with 1 reach logsnr = -inf, exactly at t = 1.

A schedule in continuous time whose logsnr would be infinite at an end is cut there: [0, 1] is mapped linearly to the
part of its time in which logsnr lies within [logsnr_min, logsnr_max].

Wrappers take a process or the name of a schedule here, which is then made with its defaults.
"""
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.forms import check_ends, cut, from_betas, linear_sde, to_zero_snr
from diffusion_jax.core.paths import PATHS, Path, flow, subvp, subvp_integral, ve, vp  # noqa: F401  by one import
from diffusion_jax.core.process import (  # noqa: F401  all that can be asked of a process
  MAX_TERMINAL_SNR,
  Process,
  Sde,
  alphas_cumprod,
  betas,
  check_steps,
  check_terminal,
  evaluate,
  on_path,
  sde,
  terminal_snr,
)
from diffusion_jax.core.types import Level, require  # noqa: F401

__all__ = [
  'constant', 'cosine', 'cosine_continuous', 'geometric', 'inverse_cosine', 'jsd', 'karras', 'laplace', 'learned',
  'linear', 'quadratic', 'rectified_flow', 'scaled_linear', 'shifted', 'sigmoid', 'sigmoid_betas', 'subvp_sde', 'table',
  'time_shifted', 'vp_sde', 'warmup', 'warmup10', 'warmup50', 'zero_terminal_snr',
]


# Chains.

def linear(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Process:
  """DDPM's schedule: betas rise linearly (Ho et al. 2020, section 4)."""
  _check_betas(num_steps, beta_start, beta_end)
  return from_betas(np.linspace(beta_start, beta_end, num_steps))


def quadratic(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Process:
  """sqrt(beta) rises linearly (Ho et al. 2020, appendix B; DDIM's CelebA)."""
  _check_betas(num_steps, beta_start, beta_end)
  return from_betas(np.linspace(beta_start ** 0.5, beta_end ** 0.5, num_steps) ** 2)


def scaled_linear(num_steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Process:
  """Stable Diffusion's schedule: `quadratic` with other ends (Rombach et al. 2022). Its terminal SNR is 0.0047."""
  return quadratic(num_steps, beta_start, beta_end)


def constant(num_steps: int = 1000, beta: float = 0.02) -> Process:
  """Every beta the same (Ho et al. 2020, appendix B)."""
  return warmup(num_steps, beta, beta)


def warmup(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, fraction: float = 0.1) -> Process:
  """Betas rise linearly over the first `fraction` of the steps and stay at beta_end (DDPM's own code)."""
  _check_betas(num_steps, beta_start, beta_end)
  require(0 < fraction <= 1, f'fraction must lie in (0, 1], got {fraction}')
  rise = np.linspace(beta_start, beta_end, int(num_steps * fraction))
  return from_betas(np.r_[rise, np.full(num_steps - len(rise), beta_end)])


def warmup10(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Process:
  """`warmup` over the first tenth of the steps."""
  return warmup(num_steps, beta_start, beta_end, 0.1)


def warmup50(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Process:
  """`warmup` over the first half of the steps."""
  return warmup(num_steps, beta_start, beta_end, 0.5)


def jsd(num_steps: int = 1000) -> Process:
  """beta = 1/T, 1/(T-1), .. 1: alpha_bar falls linearly, to zero (Sohl-Dickstein et al. 2015, section 2.4.1)."""
  check_steps(num_steps)
  return from_betas(1 / np.arange(num_steps, 0, -1))


def cosine(num_steps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Process:
  """The clipped cosine chain (Nichol & Dhariwal 2021, eq. 17): alpha_bar(t) ~ cos^2((t + s) / (1 + s) pi / 2)."""
  check_steps(num_steps)
  require(s >= 0, f's must be at least 0, got {s}')
  require(0 < max_beta < 1, f'max_beta must lie in (0, 1), got {max_beta}')
  alpha_bar = np.cos((np.arange(num_steps + 1) / num_steps + s) / (1 + s) * np.pi / 2) ** 2
  return from_betas(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta))


def sigmoid_betas(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Process:
  """Betas rise from beta_start to beta_end like a logistic curve over [-6, 6] (GeoDiff, Xu et al. 2022)."""
  _check_betas(num_steps, beta_start, beta_end)
  return from_betas(beta_start + (beta_end - beta_start) / (1 + np.exp(-np.linspace(-6, 6, num_steps))))


def table(betas: tuple[float, ...] = tuple(np.linspace(1e-3, 0.2, 100).tolist())) -> Process:  # noqa: F811
  """A chain of your own betas, one a step, each within (0, 1); the last may be 1: zero terminal SNR.

  The default is DDPM's schedule in 100 steps.
  """
  require(len(betas) >= 2, f'betas must hold at least 2 numbers, got {len(betas)}')
  for i, beta in enumerate(betas):
    number = isinstance(beta, (int, float)) and not isinstance(beta, bool)
    require(number and (0 < beta < 1 or (beta == 1 and i == len(betas) - 1)),
            f'betas must lie in (0, 1), but betas[{i}] is {beta!r}')
  return from_betas(np.asarray(betas, np.float64))


# Continuous time.

def cosine_continuous(logsnr_min: float = -15.0, logsnr_max: float = 15.0) -> Process:
  """The cosine schedule in continuous time, alpha = cos(angle), cut at both ends (Hoogeboom et al. 2023)."""
  return cut(lambda t, rest: 2 * (jnp.log(jnp.sin(np.pi / 2 * rest)) - jnp.log(jnp.sin(np.pi / 2 * t))),
             lambda l: 2 / np.pi * jnp.arctan(jnp.exp(-l / 2)), 0.0, logsnr_min, logsnr_max)


def inverse_cosine(logsnr_min: float = -15.0, logsnr_max: float = 15.0) -> Process:
  """alpha_bar(t) = arccos(2 t - 1) / pi, the inverse function of the cosine's, cut at both ends (Hudson et al. 2023).

  Where the cosine dwells at both ends, this one dwells in the middle.
  """

  def logsnr(t, rest):
    signal, noise = jnp.sqrt(rest), jnp.sqrt(t)
    return jnp.log(jnp.arctan2(signal, noise)) - jnp.log(jnp.arctan2(noise, signal))  # angles of pi/2 times their share

  return cut(logsnr, lambda l: jnp.sin(np.pi / 2 * jax.nn.sigmoid(-l)) ** 2, 0.0, logsnr_min, logsnr_max)


def sigmoid(start: float = -3.0, end: float = 3.0, tau: float = 1.0, logsnr_min: float = -15.0,
            logsnr_max: float = 15.0) -> Process:
  """alpha_bar falls like a part of a logistic curve, scaled to [0, 1] (Jabri et al. 2022; Chen 2023).

  alpha_bar(t) = (S(end) - S(start + t (end - start))) / (S(end) - S(start)) for S(z) = 1 / (1 + exp(-z / tau)), cut.
  """
  require(start < end, f'start must be below end, got {start} and {end}')
  require(tau > 0, f'tau must be above 0, got {tau}')
  # For tau = 1, S(a) - S(b) = sinh((a - b) / 2) / (2 cosh(a / 2) cosh(b / 2)): no difference of near equals is left.
  half = (end - start) / (2 * tau)
  log_cosh = lambda z: np.logaddexp(z, -z)
  centre = float(log_cosh(start / (2 * tau)) - log_cosh(end / (2 * tau)))
  log_sinh = lambda z: z + jnp.log(-jnp.expm1(-2 * z))  # + log(2)
  return cut(
      logsnr=lambda t, rest: log_sinh(rest * half) - log_sinh(t * half) + centre,
      time=lambda l: (jax.nn.softplus(centre - l + half) - jax.nn.softplus(centre - l - half)) / (2 * half),
      centre=centre, logsnr_min=logsnr_min, logsnr_max=logsnr_max)


def laplace(mean: float = 0.0, scale: float = 0.5, logsnr_min: float = -15.0, logsnr_max: float = 15.0) -> Process:
  """logsnr at uniform times has a Laplace distribution, cut at both ends (Hang et al. 2024, table 1)."""
  require(scale > 0, f'scale must be above 0, got {scale}')

  def time(logsnr):
    z = (logsnr - mean) / scale
    early = z > 0
    tail = 0.5 * jnp.exp(jnp.where(early, -z, z))
    return jnp.where(early, tail, 1 - tail)

  return cut(
      logsnr=lambda t, rest: mean + scale * (jnp.log(jnp.minimum(2 * rest, 1)) - jnp.log(jnp.minimum(2 * t, 1))),
      time=time, centre=mean, logsnr_min=logsnr_min, logsnr_max=logsnr_max)


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


def geometric(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Process:
  """The VE SDE: sigma = sigma_min (sigma_max / sigma_min)^t (Song et al. 2021, appendix C, for data in [0, 1])."""
  _check_sigmas(sigma_min, sigma_max)
  low, span = np.log(sigma_min), np.log(sigma_max / sigma_min)
  return Process(lambda t, params=None: -2 * (low + t * span), lambda l, params=None: (-l / 2 - low) / span, ve)


def karras(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Process:
  """sigma^(1/rho) rises linearly from sigma_min to sigma_max on the ve path: EDM (Karras et al. 2022, eq. 5)."""
  _check_sigmas(sigma_min, sigma_max)
  require(rho > 0, f'rho must be above 0, got {rho}')
  low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
  return Process(lambda t, params=None: -2 * rho * jnp.log(low + t * (high - low)),
                 lambda l, params=None: (jnp.exp(-l / (2 * rho)) - low) / (high - low), ve)


def vp_sde(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-5) -> Process:
  """The VP SDE, beta(t) = beta_min + t (beta_max - beta_min), over [t_min, 1] (Song et al. 2021, eq. 32-33)."""
  return linear_sde(vp, lambda b: -b - jnp.log(-jnp.expm1(-b)), lambda l: jax.nn.softplus(-l),
                     beta_min, beta_max, t_min)


def subvp_sde(beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-5) -> Process:
  """The sub-VP SDE, with the same alpha as `vp_sde` and sigma = 1 - alpha^2 (Song et al. 2021, eq. 29)."""
  return linear_sde(subvp, lambda b: -b - 2 * jnp.log(-jnp.expm1(-b)), subvp_integral, beta_min, beta_max, t_min)


def learned(logsnr_min: float = -5.0, logsnr_max: float = 13.3, hidden: int = 1024) -> Process:
  """A trainable schedule: both ends, and between them t plus `hidden` logistic steps (VDM, Kingma et al. 2021).

  `init(key)` makes its params, whose ends begin at logsnr_min and logsnr_max. logsnr falls strictly whatever they are.
  To be trained with the continuous VLB: another weight may be lowered by moving to where the task is easy.
  """
  check_ends(logsnr_min, logsnr_max)
  require(hidden >= 1, f'hidden must be at least 1, got {hidden}')

  def init(key):
    return {'logsnr_max': jnp.float32(logsnr_max),
            'span': jnp.float32(np.log(np.expm1(logsnr_max - logsnr_min))),  # before softplus, like the next two
            'steepness': jnp.full(hidden, 10.0), 'height': jnp.zeros(hidden),
            'centre': jax.random.uniform(key, (hidden,))}

  def logsnr(t, params=None):
    require(params is not None, 'the learned schedule needs its params, as made by process.init(key)')
    steepness, height = (jax.nn.softplus(params[k]) for k in ('steepness', 'height'))

    def rise(t):
      return t + jnp.mean(height * jax.nn.sigmoid(steepness * (t[..., None] - params['centre'])), axis=-1)

    t = jnp.asarray(t)
    first, last = rise(jnp.zeros((), t.dtype)), rise(jnp.ones((), t.dtype))
    return params['logsnr_max'] - jax.nn.softplus(params['span']) * (rise(t) - first) / (last - first)

  def time(l, params=None):
    l = jnp.asarray(l)
    fixed = jax.lax.stop_gradient(params)

    def halve(_, ends):
      middle = (ends[0] + ends[1]) / 2
      later = logsnr(middle, fixed) > l_fixed
      return jnp.where(later, middle, ends[0]), jnp.where(later, ends[1], middle)

    l_fixed = jax.lax.stop_gradient(l)
    t = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(l_fixed), jnp.ones_like(l_fixed)))[0]
    _, slope = jax.jvp(lambda t: logsnr(t, fixed), (t,), (jnp.ones_like(t),))
    return t - (logsnr(t, params) - l) / slope  # a step of Newton's, which also gives the inverse its gradients

  return Process(logsnr, time, init=init)


# Wrappers.

def shifted(process: Process | str = 'cosine_continuous', shift: float = 4.0) -> Process:
  """`process` with logsnr - 2 log(shift), for images `shift` times as wide (Hoogeboom et al. 2023, section 3.1)."""
  inner, down = _made(process), 2 * np.log(_positive(shift))
  return replace(inner, logsnr=lambda t, params=None: inner.logsnr(t, params) - down,
                 time=lambda l, params=None: inner.time(l + down, params))


def time_shifted(process: Process | str = 'rectified_flow', shift: float = 3.0) -> Process:
  """`process` at times shift t / (1 + (shift - 1) t) (Esser et al. 2024, SD3, eq. 23).

  On a straight path this is the same as `shifted`, but for its ends, which stay.
  """
  inner, shift = _made(process), _positive(shift)

  def warp(t, by):
    return by * t / (by * t + (1 - t))

  return replace(inner, logsnr=lambda t, params=None: inner.logsnr(warp(t, shift), params),
                 time=lambda l, params=None: warp(inner.time(l, params), 1 / shift))


def zero_terminal_snr(process: Process | str = 'linear', least: float = 0.0) -> Process:
  """`process` with sqrt(alpha_bar) moved to 0 at t = 1 and kept at t = 0 (Lin et al. 2024, algorithm 1).

  logsnr is -inf at t = 1 alone. least: what a chain's last alpha_bar is then set to, for solvers whose sigma / alpha
  must be finite; others have 2^-24. Raises ValueError on the ve path, where sigma would be infinite.
  """
  inner = _made(process)
  require(inner.path is not ve, 'a process on the ve path cannot have zero terminal SNR: its sigma would be infinite')
  if not inner.num_steps:
    require(least == 0, f'least is for chains, and this process is continuous: leave it 0, got {least}')
    return to_zero_snr(inner)
  root = np.sqrt(alphas_cumprod(inner, inner.num_steps))
  alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
  require(0 <= least < alpha_bar[-2], f'least must lie in [0, {alpha_bar[-2]:g}), got {least}')
  alpha_bar[-1] = least
  return replace(from_betas(1 - alpha_bar / np.r_[1, alpha_bar[:-1]]), path=inner.path)


def _made(process: Process | str) -> Process:
  if not isinstance(process, str):
    return process
  require(process in __all__, f"process must be one of {', '.join(__all__)}, got {process!r}")
  return globals()[process]()


def _check_betas(num_steps: int, start: float, end: float) -> None:
  check_steps(num_steps)
  require(0 < start <= end < 1, f'betas must satisfy 0 < beta_start <= beta_end < 1, got {start} and {end}')


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
  require(0 < sigma_min < sigma_max, f'0 < sigma_min < sigma_max must hold, got {sigma_min} and {sigma_max}')


def _positive(shift: float) -> float:
  require(shift > 0, f'shift must be above 0, got {shift}')
  return shift
