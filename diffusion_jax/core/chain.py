"""One step of the reverse chain: the level before, the posterior, and what a network may say of the variance.

The variance output of a network (`types.Denoiser`) is read in one of two ways. 'range': (output + 1) / 2 is the place
of the log variance between the posterior's, at 0, and beta's, at 1 (Nichol & Dhariwal 2021, eq. 15). 'diagonal': the
output is the log variance itself (the learned diagonal of Ho et al. 2020, table 2).
"""
import math

import jax
import jax.numpy as jnp

from diffusion_jax.core.schedules import Process
from diffusion_jax.core.types import Array, Level, Params, expand

VARIANCES = ('range', 'diagonal')


def previous(process: Process, level: Level, params: Params = None, num_steps: int = 1000) -> Level:
  """The level one step nearer to the data, on the process's path; before the first step, the data: logsnr = inf.

  A step is the chain's own, or 1 / num_steps where the process runs in continuous time.
  """
  t = process.time(*jax.lax.stop_gradient((level.logsnr, params)))  # drawn, not learned
  if process.num_steps:
    last = process.num_steps - 1
    t = (jnp.round(t * last) - 1) / last
  else:
    t = t - 1 / num_steps
  logsnr = jnp.where(t < 0, jnp.inf, process.logsnr(jnp.maximum(t, 0), params))
  return process.path.level(logsnr.astype(level.logsnr.dtype))


def posterior(cur: Level, nxt: Level) -> tuple[Array, Array, Array]:
  """(k0, k, variance) of q(x_nxt | x_cur, x0) = N(k0 x0 + k x_cur, variance), `nxt` the cleaner level, on any path.

  Ho et al. 2020, eqs. 6 and 7. Finite from alpha = 0 to sigma = 0.
  """
  lost = -jnp.expm1(cur.logsnr - nxt.logsnr)  # 1 - SNR(cur) / SNR(nxt)
  return nxt.alpha * lost, cur.alpha / nxt.alpha * (nxt.sigma / cur.sigma) ** 2, nxt.sigma ** 2 * lost


def log_bounds(cur: Level, nxt: Level) -> tuple[Array, Array]:
  """The logs of the posterior's variance and of beta's, the least and the most that a reverse step's can be for data
  of any variance up to 1 (Ho et al. 2020, section 3.2): "fixed small" and "fixed large"."""
  log_lost = jnp.log(-jnp.expm1(cur.logsnr - nxt.logsnr))
  return 2 * jnp.log(nxt.sigma) + log_lost, 2 * jnp.log(cur.sigma) + log_lost


def log_variance(output: Array, small: Array, large: Array, kind: str = 'range') -> Array:
  """The log variance that a network's variance output stands for, between `log_bounds`; `kind` is one of VARIANCES."""
  if kind == 'diagonal':
    return output
  share = (output + 1) / 2
  return share * large + (1 - share) * small


def step_bits(x0: Array, error: Array, output: Array, level: Level, process: Process, params: Params = None,
              kind: str = 'range') -> Array:
  """L_t / log 2 of the reverse step from `level` [B], elementwise [B, *S, C] (Ho et al. 2020, eq. 5), for a network's
  x0 estimate x0 + error and its variance output. The first step's is the decoder's, x0 on 256 values of [-1, 1].
  """
  cur = jax.tree.map(lambda a: expand(a, x0), level)
  nxt = previous(process, cur, params)
  first = jnp.isinf(nxt.logsnr)
  # The first step's posterior has no variance: like Nichol & Dhariwal, take the second step's there.
  second = process.level(jnp.full_like(cur.logsnr, 1 / (process.num_steps - 1)), params)
  later = jax.tree.map(lambda a, b: jnp.where(first, a, b), second, cur)
  earlier = jax.tree.map(lambda a, b: jnp.where(first, a, b), cur, nxt)
  k0, _, variance = posterior(later, earlier)
  small, large = log_bounds(later, earlier)[0], log_bounds(cur, nxt)[1]
  log_var = log_variance(output, small, large, kind)
  nats = jnp.where(first, decoder_nll(x0, x0 + error, log_var), kl(k0 * error, variance, log_var))
  return nats / math.log(2)


def kl(mean_error: Array, variance: Array, log_variance: Array) -> Array:
  """KL(N(m, variance) || N(m + mean_error, e^log_variance)) in nats, elementwise."""
  return 0.5 * (log_variance - jnp.log(variance) + (variance + mean_error ** 2) * jnp.exp(-log_variance) - 1)


def decoder_nll(x0: Array, mean: Array, log_variance: Array, bins: int = 256) -> Array:
  """-log P(x0) in nats, elementwise, for x0 on `bins` equal values of [-1, 1] (Ho et al. 2020, eq. 13): the mass that
  N(mean, e^log_variance) has within half a bin of x0; the outermost bins reach to infinity."""
  half, scale = 1 / (bins - 1), jnp.exp(-0.5 * log_variance)
  low, high = ((x0 - mean + side * half) * scale for side in (-1, 1))
  # Both bounds are turned to the lower tail, where a difference of two probabilities keeps its digits.
  flip = low > 0
  open_low, open_high = x0 < -1 + half, x0 > 1 - half
  a = jnp.where(flip, -high, low)
  b = jnp.where(flip, -low, high)
  open_a, open_b = jnp.where(flip, open_high, open_low), jnp.where(flip, open_low, open_high)
  log_b = jnp.where(open_b, 0.0, jax.scipy.special.log_ndtr(jnp.where(open_b, 0.0, b)))
  gap = jnp.where(open_a, -math.inf, jax.scipy.special.log_ndtr(jnp.where(open_a, -1.0, a)) - log_b)
  return -(log_b + jnp.log(-jnp.expm1(jnp.minimum(gap, -1e-7))))
