"""Loss weights: functions of the level that multiply |x0 error|^2.

Written on the x0 error, one weight means the same loss whatever the network predicts: an error of eps weighs SNR-fold
on x0, one of v SNR + 1 fold. All are finite from alpha = 0 on. The bounds on the likelihood are in nats per element.

A learned schedule needs a weight with `ends`, that is a whole bound on the likelihood. Its gradient then moves the two
ends of the schedule. Between them the mean over t does not depend on the schedule in continuous time (Kingma et al.
2021, section 5.1), and falls with it in a chain of few steps. Under any other weight the schedule would only move to
where the loss is low.

Weights that wrap another take it, or the name of one here, which is then made with its defaults.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from diffusion_jax.core import chain
from diffusion_jax.core.likelihood import prior_bits
from diffusion_jax.core.schedules import Process
from diffusion_jax.core.types import Array, Level, Params, require

__all__ = ['edm', 'hybrid', 'learned_uncertainty', 'likelihood', 'min_snr', 'over_logsnr', 'p2', 'sigmoid', 'simple',
           'snr', 'soft_min_snr', 'velocity', 'vlb']


@dataclass(frozen=True)
class Weight:
  """weight(level, process, params) -> what |x0 error|^2 is multiplied by, of the shape of the level's fields.

  process and its params matter to the bounds alone. The rest is what some weights add to weight * error:
  init(key) -> parameters of the weight's own; uncertainty(level, own) -> u, for loss exp(-u) + u;
  bound(x0, error, variance, level, process, params) -> [B], added to train the variance output [B, *S, C] of the
  network, from x0 and its error [B, *S, C] through which no gradient flows.
  """
  of: Callable[[Level, Process | None, Params], Array]
  init: Callable[[Array], Params] = lambda key: {}
  uncertainty: Callable[[Level, Params], Array] | None = None
  bound: Callable[[Array, Array, Array, Level, Process, Params], Array] | None = None
  ends: Callable[[Array, Array, Process, Params], Array] | None = None

  def __call__(self, level: Level, process: Process | None = None, params: Params = None) -> Array:
    return self.of(level, process, params)


def _made(weight: Weight | str) -> Weight:
  if not isinstance(weight, str):
    return weight
  require(weight in __all__, f"weight must be one of {', '.join(__all__)}, got {weight!r}")
  return globals()[weight]()


def _of_snr(of: Callable[[Array], Array]) -> Weight:
  return Weight(lambda level, process, params: of(jnp.exp(level.logsnr)))


def simple() -> Weight:
  """L_simple (Ho et al. 2020, eq. 14): an error of eps counts the same at every level, so one of x0 counts SNR-fold."""
  return _of_snr(lambda snr: snr)


def snr(minimum: float = 0.0, plus: float = 0.0) -> Weight:
  """max(SNR, minimum) + plus: with minimum = 1 the "truncated SNR", with plus = 1 "SNR + 1", by which an error of v
  counts the same at every level (Salimans & Ho 2022, section 4)."""
  require(minimum >= 0 and plus >= 0, f'minimum and plus must be at least 0, got {minimum} and {plus}')
  return _of_snr(lambda snr: jnp.maximum(snr, minimum) + plus)


def min_snr(gamma: float = 5.0) -> Weight:
  """min(SNR, gamma) (Hang et al. 2023, section 3.4)."""
  require(gamma > 0, f'gamma must be above 0, got {gamma}')
  return _of_snr(lambda snr: jnp.minimum(snr, gamma))


def soft_min_snr(gamma: float = 4.0) -> Weight:
  """SNR gamma / (SNR + gamma), min_snr without its corner (Crowson et al. 2024, section 3.2)."""
  require(gamma > 0, f'gamma must be above 0, got {gamma}')
  return Weight(lambda level, process, params: gamma * jax.nn.sigmoid(level.logsnr - math.log(gamma)))


def p2(k: float = 1.0, gamma: float = 1.0) -> Weight:
  """SNR / (k + SNR)^gamma, less for the levels of fine detail (Choi et al. 2022, eq. 8)."""
  require(k > 0, f'k must be above 0, got {k}')
  return Weight(lambda level, process, params: jnp.exp(level.logsnr - gamma * jnp.logaddexp(level.logsnr, math.log(k))))


def sigmoid(bias: float = 2.0) -> Weight:
  """SNR sigmoid(bias - logsnr): the eps error's weight falls where SNR is above e^bias (Kingma & Gao 2023, section 4).

  SiD2 (Hoogeboom et al. 2024) takes it per logsnr: `over_logsnr` of it, with a bias from -1 to -3 as images grow.
  """
  return Weight(lambda level, process, params: math.exp(bias) * jax.nn.sigmoid(level.logsnr - bias))


def edm(sigma_data: float = 0.5) -> Weight:
  """SNR + 1 / sigma_data^2: an error of EDM's F counts the same at every level (Karras et al. 2022, table 1)."""
  require(sigma_data > 0, f'sigma_data must be above 0, got {sigma_data}')
  return _of_snr(lambda snr: snr + 1 / sigma_data ** 2)


def velocity() -> Weight:
  """(1 + sqrt(SNR))^2: an error of the velocity counts the same at every level (Liu et al. 2022, eq. 1)."""
  return Weight(lambda level, process, params: jnp.exp(2 * jax.nn.softplus(level.logsnr / 2)))


def vlb() -> Weight:
  """The variational bound on -log p(x0) for uniform times, without the terms at its two ends (see likelihood.py).

  A chain: T / 2 (SNR(t-1) - SNR(t)), the KL of every reverse step of the posterior's variance (Kingma et al. 2021,
  eq. 13). Its first step, whose exact term is a discrete decoder's, counts T / 2 SNR: a Gaussian of that precision.
  Continuous time: -1/2 dSNR/dt (eq. 17).
  """

  def of(level, process, params):
    require(process is not None, 'the weight vlb needs a process')
    if not process.num_steps:
      return _falling_snr(level, process, params) / 2
    before = chain.previous(process, level, params).logsnr
    first = jnp.isinf(before)
    fallen = jnp.where(first, 1.0, -jnp.expm1(level.logsnr - jnp.where(first, level.logsnr + 1, before)))
    return process.num_steps / 2 * jnp.exp(jnp.where(first, level.logsnr, before)) * fallen

  return Weight(of, ends=_ends)


def likelihood() -> Weight:
  """g^2 / 2 on the error of the score, the bound of the SDE (Song et al. 2021c, eq. 7); a chain's is that of its
  interpolation. On the x0 error it is -1/2 dSNR/dt: in continuous time the same as `vlb`."""

  def of(level, process, params):
    require(process is not None, 'the weight likelihood needs a process')
    return _falling_snr(level, process, params) / 2

  return Weight(of, ends=_ends)


def over_logsnr(weight: Weight | str = 'simple') -> Weight:
  """`weight` times -1/2 dlogsnr/dt: for uniform times the integral over logsnr, the same for every schedule between
  the same ends (Kingma & Gao 2023, eq. 7); of `simple` it is `likelihood`."""

  inner = _made(weight)

  def of(level, process, params):
    require(process is not None, 'the weight over_logsnr needs a process')
    return _finite_product(inner(level, process, params), _fall(level, process, params)) / 2

  return replace(inner, of=of, ends=None)


def learned_uncertainty(weight: Weight | str = 'edm', channels: int = 128) -> Weight:
  """loss exp(-u) + u with a trained u(level), which comes to be the log of the loss: each level then counts alike
  (Karras et al. 2024, eq. 21). u is linear in `channels` Fourier features of EDM's c_noise = -logsnr / 8, at first 0.
  """
  require(channels >= 1, f'channels must be at least 1, got {channels}')

  def uncertainty(level, own):
    i = jnp.arange(channels)
    # Frequencies like draws from a standard normal, phases like uniform ones, without any randomness.
    frequency, phase = jax.scipy.special.ndtri((i + 0.5) / channels), (0.6180339887 * i) % 1
    noise = -jnp.clip(level.logsnr, -40, 40) / 8  # finite at alpha = 0
    features = jnp.sqrt(2.0) * jnp.cos(2 * jnp.pi * (noise[..., None] * frequency + phase))
    return features @ own['kernel'] / jnp.sqrt(channels)

  return replace(_made(weight), init=lambda key: {'kernel': jnp.zeros(channels)}, uncertainty=uncertainty)


def hybrid(weight: Weight | str = 'simple', scale: float = 0.001, variance: str = 'range') -> Weight:
  """L_simple + scale L_vlb, the latter in bits per element and with no gradient to the mean: it trains the variance
  output of the network (Nichol & Dhariwal 2021, eq. 16), which `variance` says how to read (see core/chain.py).
  """
  require(scale > 0, f'scale must be above 0, got {scale}')
  require(variance in chain.VARIANCES, f"variance must be 'range' or 'diagonal', got {variance!r}")

  def bound(x0, error, output, level, process, params):
    require(bool(process.num_steps), 'hybrid needs the steps of a chain, and this schedule is in continuous time: '
                                     'take one with num_steps')
    bits = chain.step_bits(x0, error, output, level, process, params, variance)
    return scale * process.num_steps * jnp.mean(bits, axis=range(1, x0.ndim))

  return replace(_made(weight), bound=bound)


def _ends(x0: Array, eps: Array, process: Process, params: Params) -> Array:
  """L_0 + L_T in nats per element, for x0 on 256 values of [-1, 1]: [B]."""
  first, last = process.level(jnp.zeros((), x0.dtype), params), process.level(jnp.ones((), x0.dtype), params)
  axes = range(1, x0.ndim)
  decoder = jnp.mean(chain.decoder_nll(x0, x0 + jnp.exp(-first.logsnr / 2) * eps, -first.logsnr), axis=axes)
  return decoder + math.log(2) * prior_bits(last, jnp.mean(x0 ** 2, axis=axes))


def _fall(level: Level, process: Process, params: Params) -> Array:
  """-dlogsnr/dt at the level's time; the time is what was drawn, so no gradient flows through it."""
  t = process.time(*jax.lax.stop_gradient((level.logsnr, params)))
  return -jax.jvp(lambda t: process.logsnr(t, params), (t,), (jnp.ones_like(t),))[1]


def _falling_snr(level: Level, process: Process, params: Params) -> Array:
  return _finite_product(jnp.exp(level.logsnr), _fall(level, process, params))


def _finite_product(weight: Array, fall: Array) -> Array:
  """weight * fall, and 0 where logsnr falls to -inf: what has no signal has nothing to weigh."""
  finite = jnp.isfinite(fall)
  return jnp.where(finite, weight * jnp.where(finite, fall, 0.0), 0.0)
