"""Samplers: each a step from a level to the next. `solve` (core/solver.py) is the one loop that takes the steps.

All are written on levels alone: each runs on every path, and from alpha = 0. Here are the single-step ones; those that
remember earlier estimates are in core/multistep.py, those that choose their own steps in core/adaptive.py.

The probability-flow ODE is dx = x0 dalpha + eps dsigma; in sigma / alpha, the one coordinate that all paths share, it
is d(x / alpha) = eps d(sigma / alpha). Euler's step of either is `transfer`: DDIM's, the same along every path.
"""
import math

import jax
import jax.numpy as jnp

from diffusion_jax.core import adaptive, multistep
from diffusion_jax.core.adaptive import *  # noqa: F403
from diffusion_jax.core.ending import ending
from diffusion_jax.core.multistep import *  # noqa: F403
from diffusion_jax.core.schedules import Process
from diffusion_jax.core.solver import Sampler, independent, prior, solve, transfer  # noqa: F401
from diffusion_jax.core.types import Array, Denoise, Denoiser, Level, expand, require, then, with_variance

__all__ = ['ancestral', 'ancestral_learned', 'ddim', 'euler', 'euler_ancestral', 'flow_euler', 'heun', 'lcm',
           'predictor_corrector', *multistep.__all__, *adaptive.__all__]
for _name in (*multistep.__all__, *adaptive.__all__, ending.__name__):
  globals()[_name].__module__ = __name__  # in configs, one name takes another's place within its module


def ancestral(variance: float = 0.0) -> Sampler:
  """DDPM's reverse chain (Ho et al. 2020, algorithm 2), between any two levels.

  variance: 0 is the posterior's (their "fixed small"), 1 is beta_t ("fixed large"), between them the logarithms are
  interpolated (Nichol & Dhariwal 2021, eq. 15).
  """
  require(0 <= variance <= 1, f'variance must lie in [0, 1], got {variance}')

  def step(denoise, x, memory, cur, nxt, z):
    mean, small, large = _posterior(x, denoise(x, cur), cur, nxt)
    return mean + small ** (1 - variance) * large ** variance * z, memory

  return Sampler(step)


def ancestral_learned(kind: str = 'range') -> Sampler:
  """DDPM's reverse chain with the variance that the network gives (Nichol & Dhariwal 2021, section 3.1).

  kind: 'range': the network's v in [-1, 1] lies between the posterior's variance (-1) and beta_t (1), in the logarithm
  (eq. 15); 'diagonal': it is the log variance of x itself, element by element. ValueError when traced with a denoiser
  that has no variance output.
  """
  require(kind in ('range', 'diagonal'), f"kind must be 'range' or 'diagonal', got {kind!r}")

  def step(denoise, x, memory, cur, nxt, z):
    x0, output = with_variance(denoise)(x, cur)
    require(output is not None, 'a learned variance needs a network that predicts one: take the sampler `ancestral`')
    mean, small, large = _posterior(x, x0, cur, nxt)
    if kind == 'diagonal':
      return mean + jnp.exp(output / 2) * z, memory
    share = (output + 1) / 2
    return mean + small ** (1 - share) * large ** share * z, memory

  return Sampler(step)


def _posterior(x: Array, x0: Array, cur: Level, nxt: Level) -> tuple[Array, Array, Array]:
  """The mean of q(x at nxt | x, x0) (Ho et al. 2020, eq. 7), its standard deviation, and sqrt(beta)."""
  lost = -jnp.expm1(cur.logsnr - nxt.logsnr)  # 1 - SNR(cur) / SNR(nxt): beta_t / sigma_t^2 on the vp path
  mean = nxt.alpha * lost * x0 + cur.alpha / nxt.alpha * (nxt.sigma / cur.sigma) ** 2 * x
  return mean, nxt.sigma * jnp.sqrt(lost), cur.sigma * jnp.sqrt(lost)


def ddim(eta: float = 0.0) -> Sampler:
  """DDIM (Song et al. 2021, eq. 12): deterministic at eta = 0, the ancestral sampler at 1."""
  require(0 <= eta <= 1, f'eta must lie in [0, 1], got {eta}')

  def step(denoise, x, memory, cur, nxt, z):
    x0 = denoise(x, cur)
    eps = (x - cur.alpha * x0) / cur.sigma
    new = eta * jnp.sqrt(-jnp.expm1(cur.logsnr - nxt.logsnr))  # of the next noise
    kept = jnp.sqrt(1 - eta ** 2 + eta ** 2 * jnp.exp(cur.logsnr - nxt.logsnr))
    return nxt.alpha * x0 + nxt.sigma * (kept * eps + new * z), memory

  return Sampler(step)


def invert(denoise: Denoise, x0: Array, grid: Level) -> Array:
  """DDIM from data to noise (Song et al. 2021, section 5.4): the x at grid[0] from which ddim() returns to x0.

  grid is the one to sample with, noise first. The way back misses x0 by an error that halves with the step.
  """
  back = jax.tree.map(lambda a: a[::-1], grid)
  first = jax.tree.map(lambda a: a[0], back)
  # Sampling ends in denoise(x): from denoise(x) ~ x / alpha - s, the x that is denoised to x0 is alpha (x0 + s).
  x = first.alpha * (2 * x0 - denoise(first.alpha * x0, first))
  keys = jax.random.split(jax.random.key(0), x.shape[0])  # no noise is drawn from them
  return solve(euler(), denoise, x, back, keys, to_data=False)


def euler(churn: float = 0.0, s_min: float = 0.0, s_max: float = 1e6, s_noise: float = 1.0) -> Sampler:
  """Euler's method in sigma / alpha: DDIM. With churn it is EDM's stochastic sampler less its second call.

  See `heun` for the arguments.
  """
  noisier = _churn(churn, s_min, s_max, s_noise)

  def step(denoise, x, gamma, cur, nxt, z):
    x, cur = noisier(x, gamma, cur, z)
    return transfer(x, denoise(x, cur), cur, nxt), gamma

  return _churned(Sampler(step), churn, noisier)


def heun(churn: float = 0.0, s_min: float = 0.0, s_max: float = 1e6, s_noise: float = 1.0) -> Sampler:
  """EDM's sampler (Karras et al. 2022, algorithm 2): Heun's method in sigma / alpha, second order on every path.

  churn: S_churn >= 0, the noise put back over a whole run: each level rises by a factor 1 + min(churn / N, sqrt(2) - 1)
  of sigma / alpha, the last of the N levels too, where sigma / alpha lies in [s_min, s_max]; s_noise > 0 scales it.
  From alpha = 0, where sigma / alpha is infinite, the first step is Euler's.
  """
  noisier = _churn(churn, s_min, s_max, s_noise)

  def step(denoise, x, gamma, cur, nxt, z):
    x, cur = noisier(x, gamma, cur, z)
    x0 = denoise(x, cur)
    guess = transfer(x, x0, cur, nxt)
    # The trapezoidal rule changes the guess by (eps' - eps) / 2 times the step, here written with the change of x0.
    slope = jnp.where(jnp.isinf(cur.logsnr), 0.0, jnp.expm1((nxt.logsnr - cur.logsnr) / 2) / 2)
    return guess + nxt.alpha * slope * (denoise(guess, nxt) - x0), gamma

  return _churned(Sampler(step, calls=2), churn, noisier)


def _churn(churn: float, s_min: float, s_max: float, s_noise: float):
  """noisier(x, gamma, level, z) -> x and the level after noise is added: the identity at churn = 0."""
  require(0 <= churn < math.inf, f'churn must be at least 0 and finite, got {churn}')
  require(0 <= s_min <= s_max, f's_min and s_max must satisfy 0 <= s_min <= s_max, got {s_min} and {s_max}')
  require(s_noise > 0, f's_noise must be above 0, got {s_noise}')

  def noisier(x, gamma, level, z):
    if churn == 0:
      return x, level
    # sigma grows and alpha stays. That leaves the path, but a prediction depends on x / alpha and logsnr alone; and
    # nothing is divided by alpha, which may be 0.
    low, high = (-2 * math.log(s) if s > 0 else math.inf for s in (s_max, s_min))
    gamma = jnp.where((level.logsnr >= low) & (level.logsnr <= high), gamma, 0)
    sigma = level.sigma * (1 + gamma)
    std = s_noise * level.sigma * jnp.sqrt(gamma * (2 + gamma))  # sqrt(sigma_hat^2 - sigma^2)
    return x + std * z, Level(level.logsnr - 2 * jnp.log1p(gamma), level.alpha, sigma)

  return noisier


def _churned(sampler: Sampler, churn: float, noisier) -> Sampler:
  """The sampler with gamma as its memory, and with the last level churned before it goes to data."""

  def finish(denoise, x, gamma, last, z):
    return denoise(*noisier(x, gamma, last, z))

  return sampler._replace(
      init=lambda x, num_levels: jnp.full((), min(churn / num_levels, math.sqrt(2) - 1), x.dtype), finish=finish)


def euler_ancestral(eta: float = 1.0) -> Sampler:
  """k-diffusion's ancestral Euler: deterministically to a lower level, then noise up to the next. It is ddim(eta).

  There, on the ve path, sigma_up^2 = eta^2 nxt.sigma^2 (1 - nxt.sigma^2 / cur.sigma^2), which is DDIM's variance, and
  the deterministic part keeps eps and ends at sqrt(nxt.sigma^2 - sigma_up^2).
  """
  return ddim(eta)


def lcm() -> Sampler:
  """Multistep consistency sampling (Song et al. 2023, algorithm 1; Luo et al. 2023, algorithm 3): x0, then new noise.

  The denoiser is the consistency function; `lcm_boundary` makes one of a latent consistency model's network.
  """

  def step(denoise, x, memory, cur, nxt, z):
    return nxt.alpha * denoise(x, cur) + nxt.sigma * z, memory

  return Sampler(step)


def lcm_boundary(denoise: Denoise, process: Process, timestep_scaling: float = 10.0,
                 sigma_data: float = 0.5) -> Denoiser:
  """The consistency function c_skip x + c_out x0 of a latent consistency model (Luo et al. 2023, eq. 9).

  s = timestep_scaling times the step 0 .. T-1 of the chain `process`; c_skip = sigma_data^2 / (s^2 + sigma_data^2) and
  c_out = s / sqrt(s^2 + sigma_data^2): the identity at step 0, and x0 itself to 1e-5 from step 16 on.
  """
  require(process.num_steps > 0, 'the boundary condition of LCM counts the steps of a chain, and the process has none')
  require(timestep_scaling > 0, f'timestep_scaling must be above 0, got {timestep_scaling}')
  require(sigma_data > 0, f'sigma_data must be above 0, got {sigma_data}')

  def change(x0, x, level):
    s = timestep_scaling * process.time(level.logsnr, None) * (process.num_steps - 1)
    total = s ** 2 + sigma_data ** 2
    return expand(sigma_data ** 2 / total, x) * x + expand(s / jnp.sqrt(total), x) * x0

  return then(denoise, change)


def flow_euler(stochastic: bool = False) -> Sampler:
  """Euler's method for rectified flows (Esser et al. 2024): a straight step, on the flow path x + dsigma velocity.

  stochastic: x0 is noised afresh for each level instead, as in `lcm`.
  """
  return lcm() if stochastic else euler()


def predictor_corrector(corrections: int = 1, snr: float = 0.16) -> Sampler:
  """Predictor-corrector sampling (Song et al. 2021b, algorithms 2-5): an ancestral step, then Langevin's at its level.

  corrections >= 1 steps of size 2 (snr |z| / |score|)^2, with each sample's own norms, so that a sample does not depend
  on its batch, and at most sigma^2: in few dimensions a score may vanish. (Their VP version multiplies the size by
  1 - beta_i; without, all paths give the same samples.)
  """
  require(corrections >= 1, f'corrections must be at least 1, got {corrections}')
  require(snr > 0, f'snr must be above 0, got {snr}')

  def step(denoise, x, memory, cur, nxt, z):
    x, memory = ancestral().step(denoise, x, memory, cur, nxt, z[0])

    def correct(x, z):
      score = (nxt.alpha * denoise(x, nxt) - x) / nxt.sigma ** 2
      axes = tuple(range(1, x.ndim))
      size = 2 * snr ** 2 * jnp.sum(z ** 2, axes, keepdims=True) / jnp.sum(score ** 2, axes, keepdims=True)
      size = jnp.minimum(size, nxt.sigma ** 2)
      return x + size * score + jnp.sqrt(2 * size) * z, None

    return jax.lax.scan(correct, x, z[1:])[0], memory

  return Sampler(step, calls=1 + corrections, draws=1 + corrections)
