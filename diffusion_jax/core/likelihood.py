"""Likelihood in bits per dimension: three estimators, each of another quantity. Name the one whose number you give.

`discrete_vlb` bounds -log P(x0) of the chain that `ancestral` samples, for x0 on 256 values. `continuous_vlb` is the
same bound in the limit of many steps. `ode` is the density of the model that the probability-flow ODE samples; it is
estimated, not bounded, at x0 with a little noise, and `ode_bits` makes it a bound for x0 on 256 values.

On any path, the prior is a unit normal in the variance-preserving scale: x / sqrt(alpha^2 + sigma^2) ~ N(0, 1).
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core import chain
from diffusion_jax.core.paths import vp
from diffusion_jax.core.process import Process
from diffusion_jax.core.types import Array, Denoise, Level, Params, expand, require, with_variance

__all__ = ['Dequantiser', 'continuous_vlb', 'discrete_vlb', 'logit_normal', 'ode', 'ode_bits', 'prior_bits',
           'rate_distortion', 'uniform']

EXACT_TRACE = 1024  # elements of an example up to which its trace is worth a pass through the network for each


def prior_bits(level: Level, x0_squared: Array) -> Array:
  """L_T, what is lost by starting from a standard normal, in bits/dim (Ho et al. 2020, eq. 5).

  KL(q(x | x0) || prior) for data of mean square `x0_squared`, at the noisiest level; the same on every path.
  """
  signal = jax.nn.sigmoid(level.logsnr)  # alpha^2 on the vp path, where sigma^2 is 1 - signal: exp(-softplus(logsnr))
  return 0.5 * (signal * x0_squared + (jax.nn.softplus(level.logsnr) - signal)) / math.log(2)


class DiscreteVlb(NamedTuple):
  """All in bits/dim but mse. N is the number of levels, or of those in the subset."""
  bits: Array   # [B] the bound, prior and steps together
  prior: Array  # [B] L_T
  steps: Array  # [N, B] the reverse step from each level, noise first: L_{T-1} .. L_1, and the decoder's L_0
  mse: Array    # [N, B] of the x0 estimate at each level
  index: Array  # [N, B] which level of the grid that is


def discrete_vlb(denoise: Denoise, grid: Level, x0: Array, keys: Array, variance: float | str = 0.0,
                 subset: int = 0) -> DiscreteVlb:
  """The bound of the reverse chain over `grid`, with every term (Ho et al. 2020, eq. 5 and 13).

  x0 [B, *S, C] is floating point on the 256 values of [-1, 1]; keys [B]: example i depends on keys[i] alone. DDPM's
  own chain is levels.timesteps()(process, process.num_steps). One call of `denoise` for each level, memory for one.

  variance: a number in [0, 1] as in `ancestral` (0 "fixed small", 1 "fixed large"), or how the network's variance
  output is read, 'range' or 'diagonal', as in `ancestral_learned`. The decoder's is the posterior's of the step before
  it ("fixed small" and "large" alike, as in DDPM's own code), or the network's.
  subset: if above 0, so many levels for each example, the last and evenly drawn others, which leaves `bits` unbiased;
  `denoise` is then given levels of shape [B].
  """
  num_levels = grid.logsnr.shape[0]
  learned = isinstance(variance, str)
  require(variance in chain.VARIANCES if learned else 0 <= variance <= 1,
          f"variance must lie in [0, 1] or be 'range' or 'diagonal', got {variance!r}")
  require(num_levels >= 2, f'a chain needs a grid of at least 2 levels, got {num_levels}')
  require(subset == 0 or 2 <= subset <= num_levels, f'subset must be 0 or lie in 2..{num_levels}, got {subset}')
  x0 = _bytes(x0)[0]
  before, end = (vp.level(grid.logsnr[i]) for i in (-2, -1))

  def kl(error, output, i):
    """KL(q(x' | x, x0) || p(x' | x)) in nats for the step from x at level i, by the ratio of the variances."""
    cur, nxt = (jax.tree.map(lambda a: expand(a, error), _at(grid, j)) for j in (i, i + 1))
    if variance == 'diagonal':
      log_ratio = output - chain.log_bounds(cur, nxt)[0]
    else:
      log_ratio = ((output + 1) / 2 if learned else variance) * 2 * (jnp.log(cur.sigma) - jnp.log(nxt.sigma))
    snr_gained = jnp.exp(nxt.logsnr) - jnp.exp(cur.logsnr)
    return 0.5 * (log_ratio + jnp.expm1(-log_ratio) + jnp.exp(-log_ratio) * snr_gained * error ** 2)

  def decoder(mean, output):
    """-log P(x0 | x at the last level) in nats."""
    small = chain.log_bounds(before, end)[0]
    log_variance = chain.log_variance(output, small, 2 * jnp.log(end.sigma), variance) if learned else small
    return chain.decoder_nll(x0, mean, log_variance)

  def one(_, k):
    i = k
    if subset:
      start = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 2 * k + 1)))(keys)
      i = jnp.minimum(((k + start) * ((num_levels - 1) / (subset - 1))).astype(int), num_levels - 2)
      i = jnp.where(k == subset - 1, num_levels - 1, i)
    level = _at(grid, i)
    x = expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * _noise(keys, 2 * k, x0)
    estimate, output = with_variance(denoise)(x, level)
    require(not learned or output is not None,
            f'variance {variance!r} needs a network that predicts one: take a number in [0, 1]')
    error = estimate - x0
    last = expand(i == num_levels - 1, x0)
    nats = jnp.where(last, decoder(estimate, output), kl(error, output, jnp.minimum(i, num_levels - 2)))
    return None, (_mean(nats) / math.log(2), _mean(error ** 2), jnp.broadcast_to(i, x0.shape[:1]))

  _, (steps, mse, index) = jax.lax.scan(one, None, jnp.arange(subset or num_levels))
  prior = prior_bits(_at(grid, 0), _mean(x0 ** 2))
  return DiscreteVlb(prior + (num_levels - 1) * jnp.mean(steps[:-1], 0) + steps[-1], prior, steps, mse, index)


def rate_distortion(vlb: DiscreteVlb) -> tuple[Array, Array]:
  """(rate, RMSE) [N] of progressive coding, noise first (Ho et al. 2020, section 4.3 and table 4), of all N levels.

  rate: bits/dim that send x as far as each level; RMSE: of its x0 estimate, on the scale of bytes 0 .. 255. The last
  rate is the bound less L_0, and L_0 is the rest of the distortion in bits/dim.
  """
  bits = jnp.concatenate([vlb.prior[None], vlb.steps[:-1]])
  return jnp.cumsum(jnp.mean(bits, 1)), 127.5 * jnp.sqrt(jnp.mean(vlb.mse, 1))


class ContinuousVlb(NamedTuple):
  """All [B], in bits/dim."""
  bits: Array  # the bound: the three together
  prior: Array
  reconstruction: Array
  diffusion: Array


def continuous_vlb(denoise: Denoise, process: Process, x0: Array, key: Array, params: Params = None, times: int = 1,
                   decoder: str = 'bins') -> ContinuousVlb:
  """The bound in continuous time, at random times (Kingma et al. 2021, eq. 14-17).

  x0 [B, *S, C] is floating point; `times` calls of `denoise`, each at a level of every example's own: times * B times
  share one random offset and are equally spaced (appendix I.1). Differentiable in the network and in `params`: the
  loss of VDM, if its mean is taken. A chain is interpolated.

  decoder: 'bins' for x0 on the 256 values of [-1, 1], P(x0 | x) ~ q(x | x0) at t = 0; 'density' for x0 that is real:
  the normal density of that precision, so that the bound is of -log2 p(x0) per dimension, for x0 as it is.
  """
  require(decoder in ('bins', 'density'), f"decoder must be 'bins' or 'density', got {decoder!r}")
  require(times >= 1, f'times must be at least 1, got {times}')
  x0 = _bytes(x0)[0] if decoder == 'bins' else _float(x0)
  batch = x0.shape[0]
  offset, noise = jax.random.split(key)
  start = jax.random.uniform(offset)

  def one(total, k):
    t = ((start + (k + jnp.arange(batch) / batch) / times) % 1).astype(x0.dtype)
    logsnr, slope = jax.jvp(lambda t: process.logsnr(t, params), (t,), (jnp.ones_like(t),))
    level = process.path.level(logsnr)
    eps = jax.random.normal(jax.random.fold_in(noise, k), x0.shape, x0.dtype)
    error = denoise(expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps, level) - x0
    finite = jnp.isfinite(slope)  # where logsnr is -inf the SNR is 0 and adds nothing
    return total - 0.5 * jnp.where(finite, jnp.exp(logsnr) * jnp.where(finite, slope, 0), 0) * _mean(error ** 2), None

  diffusion, _ = jax.lax.scan(one, jnp.zeros(batch), jnp.arange(times))
  diffusion = diffusion / (times * math.log(2))
  first, last = process.level(jnp.zeros((), x0.dtype), params), process.level(jnp.ones((), x0.dtype), params)
  if decoder == 'bins':
    noisy = x0 + jnp.exp(-first.logsnr / 2) * jax.random.normal(jax.random.fold_in(noise, times), x0.shape, x0.dtype)
    nats = _mean(_softmax_nll(x0, noisy, jnp.exp(first.logsnr)))
  else:
    nats = jnp.broadcast_to(0.5 * (1 + math.log(2 * math.pi) - first.logsnr), (batch,))
  prior = prior_bits(last, _mean(x0 ** 2))
  reconstruction = nats / math.log(2)
  return ContinuousVlb(prior + reconstruction + diffusion, prior, reconstruction, diffusion)


def _softmax_nll(x0: Array, noisy: Array, snr: Array) -> Array:
  """-log P(x0 | noisy) in nats, elementwise: P(v) ~ exp(-snr (noisy - v)^2 / 2) over the 256 values v."""
  nearest = jnp.clip(jnp.round(noisy * 127.5 + 127.5), 0, 255) / 127.5 - 1
  square = lambda v: 0.5 * snr * (v - nearest) * (v + nearest - 2 * noisy)  # of v, less that of the nearest value

  @jax.checkpoint  # keeps nothing for each of the values
  def add(total, byte):
    return total + jnp.exp(-square(byte / 127.5 - 1)), None

  total, _ = jax.lax.scan(add, jnp.zeros_like(noisy), jnp.arange(256, dtype=noisy.dtype))
  return square(x0) + jnp.log(total)


class Ode(NamedTuple):
  """What `ode` finds."""
  log_prob: Array  # [B] in nats, of x0 in its own scale
  x: Array         # [B, *S, C] at the noisiest level, where the ODE takes x0


def ode(denoise: Denoise, grid: Level, x0: Array, keys: Array, method: str = 'heun', trace: str = 'hutchinson',
        probes: int = 1, probe: str = 'rademacher') -> Ode:
  """The log density of x0 [B, *S, C] by the probability-flow ODE (Song et al. 2021, eq. 39; Chen et al. 2018).

  It is that of data with the noise of the last level, x / alpha, at x0: let `grid`, noise first as in sampling, end
  near the data. Any path; from alpha = 0. dx = x0 dalpha + eps dsigma, a step being straight in (alpha, sigma).

  method: 'heun' (order 2, two calls a step) or 'rk4' (order 4, four calls, some between the levels and off the path).
  trace: 'hutchinson', the mean over `probes` of probe . J probe, unbiased in log_prob (eq. 40), probes being
  'rademacher' or 'normal' and the same for the whole run; or 'exact', one product for each of at most 1,024 elements.
  keys [B]: example i depends on x0[i] and keys[i] alone.
  """
  num_levels, size = grid.logsnr.shape[0], math.prod(x0.shape[1:])
  require(method in _METHODS, f"method must be 'heun' or 'rk4', got {method!r}")
  require(trace in ('exact', 'hutchinson'), f"trace must be 'exact' or 'hutchinson', got {trace!r}")
  require(probe in ('normal', 'rademacher'), f"probe must be 'normal' or 'rademacher', got {probe!r}")
  require(probes >= 1, f'probes must be at least 1, got {probes}')
  require(num_levels >= 2, f'the ODE needs a grid of at least 2 levels, got {num_levels}')
  require(trace != 'exact' or size <= EXACT_TRACE,
          f"trace='exact' is for at most {EXACT_TRACE} elements, and an example has {size}: take 'hutchinson'")
  x0 = _float(x0)
  exact = trace == 'exact'

  def direction(k):
    if exact:
      return jnp.broadcast_to(jax.nn.one_hot(k, size, dtype=x0.dtype).reshape(x0.shape[1:]), x0.shape)
    return _noise(keys, k, x0, jax.random.normal if probe == 'normal' else jax.random.rademacher)

  def slope(x, level, change):
    """dx and its divergence over a step in which alpha and sigma change by `change`."""

    def velocity(x):
      estimate = denoise(x, level)
      return change.alpha * estimate + change.sigma * (x - level.alpha * estimate) / level.sigma

    dx, pull = jax.vjp(velocity, x)

    def add(total, k):
      v = direction(k).astype(dx.dtype)
      return total + jnp.sum((v * pull(v)[0]).reshape(x.shape[0], -1), 1), None

    total, _ = jax.lax.scan(add, jnp.zeros(x.shape[:1], x.dtype), jnp.arange(size if exact else probes))
    return dx, total / (1 if exact else probes)

  def step(carry, i):
    cur, nxt = _at(grid, i), _at(grid, i - 1)
    alpha, sigma = (cur.alpha + nxt.alpha) / 2, (cur.sigma + nxt.sigma) / 2
    middle = Level(2 * (jnp.log(alpha) - jnp.log(sigma)), alpha, sigma)
    change = jax.tree.map(jnp.subtract, nxt, cur)
    return _METHODS[method](lambda x, level: slope(x, level, change), *carry, cur, middle, nxt), None

  last, first = _at(grid, -1), _at(grid, 0)
  start = last.alpha * x0, jnp.zeros(x0.shape[:1])
  (x, divergence), _ = jax.lax.scan(step, start, jnp.arange(num_levels - 1, 0, -1))
  variance = first.alpha ** 2 + first.sigma ** 2
  prior = -0.5 * size * (_mean(x ** 2) / variance + jnp.log(2 * math.pi * variance))
  return Ode(prior + divergence + size * jnp.log(last.alpha), x)


def _heun(f, x, total, cur, middle, nxt):
  k1, d1 = f(x, cur)
  k2, d2 = f(x + k1, nxt)
  return x + (k1 + k2) / 2, total + (d1 + d2) / 2


def _rk4(f, x, total, cur, middle, nxt):
  k1, d1 = f(x, cur)
  k2, d2 = f(x + k1 / 2, middle)
  k3, d3 = f(x + k2 / 2, middle)
  k4, d4 = f(x + k3, nxt)
  return x + (k1 + 2 * k2 + 2 * k3 + k4) / 6, total + (d1 + 2 * d2 + 2 * d3 + d4) / 6


_METHODS = {'heun': _heun, 'rk4': _rk4}


class Dequantiser(NamedTuple):
  """q(u | x0) on (0, 1), which spreads each of 256 values over its bin (Ho et al. 2019, Flow++, section 3.1)."""
  sample: Callable[[Array, Array], Array]    # keys [B], x0 [B, *S, C] -> u [B, *S, C]
  log_prob: Callable[[Array, Array], Array]  # u, x0 [B, *S, C] -> log q(u | x0) in nats, elementwise [B, *S, C]


def uniform() -> Dequantiser:
  """u is uniform (Theis et al. 2016, section 3.1)."""
  return Dequantiser(
      lambda keys, x0: jax.vmap(lambda key: jax.random.uniform(key, x0.shape[1:], x0.dtype))(keys),
      lambda u, x0: jnp.zeros_like(u))


def logit_normal(parameters: Callable[[Array], tuple[Array, Array]]) -> Dequantiser:
  """logit(u) is normal, its (mean, std) = parameters(x0) numbers or arrays that broadcast to x0, learned or not.

  Differentiable: u is a function of the noise and of the parameters.
  """

  def sample(keys, x0):
    mean, std = parameters(x0)
    return jnp.clip(jax.nn.sigmoid(mean + std * _noise(keys, 0, x0)), *_INSIDE)

  def log_prob(u, x0):
    mean, std = parameters(x0)
    u = jnp.clip(u, *_INSIDE)
    z = (jnp.log(u) - jnp.log1p(-u) - mean) / std
    return -0.5 * (z ** 2 + math.log(2 * math.pi)) - jnp.log(std) - jnp.log(u) - jnp.log1p(-u)

  return Dequantiser(sample, log_prob)


_INSIDE = 1e-6, 1 - 1e-6  # where the logit is finite in float32
_UNIFORM = uniform()


def ode_bits(denoise: Denoise, grid: Level, x0: Array, keys: Array, dequantiser: Dequantiser = _UNIFORM,
             **options) -> Array:
  """A bound on the bits/dim of x0 [B, *S, C] on the 256 values of [-1, 1], by `ode` with its options: [B].

  The b-th value becomes x = (b + u) / 128 - 1 (Song et al. 2021, section 4.3), u from `dequantiser`, so that
  -log2 P <= E[log2 q(u) - log2 p(x)] + log2(128) per dimension; log2(128) = 7 is for the bins' width of 1/128.
  Compared with x0 itself, b / 127.5 - 1, the centres of the bins are closer to zero by one part in 256.
  """
  x0, byte = _bytes(x0)
  u = dequantiser.sample(jax.vmap(lambda key: jax.random.fold_in(key, jnp.uint32(0xFFFFFFFF)))(keys), x0)
  log_prob = ode(denoise, grid, (byte + u) / 128 - 1, keys, **options).log_prob
  return (_mean(dequantiser.log_prob(u, x0)) - log_prob / math.prod(x0.shape[1:])) / math.log(2) + 7


def _bytes(x0: Array) -> tuple[Array, Array]:
  """x0 and the bytes 0. .. 255. it stands for; ValueError where x0 is known and is not on their values."""
  wide = _float(x0)
  if not isinstance(x0, jax.core.Tracer):
    known = np.asarray(x0, np.float64)
    low, high, byte = known.min(), known.max(), known * 127.5 + 127.5
    require(low >= -1 and high <= 1, f'x0 must lie in [-1, 1], got {low:g} .. {high:g}')
    away = np.abs(byte - np.round(byte)).max()
    require(away < 0.01, f'x0 must be on the 256 values b / 127.5 - 1, got one {away:.2g} of a value away')
  return wide, jnp.round(wide * 127.5 + 127.5)


def _float(x0: Array) -> Array:
  """x0 in float32 at least."""
  require(jnp.issubdtype(x0.dtype, jnp.floating),
          f'x0 must be floating point in [-1, 1], as uint8 / 127.5 - 1 is, got {x0.dtype}')
  return x0.astype(jnp.promote_types(x0.dtype, jnp.float32))


def _at(grid: Level, i: Array) -> Level:
  return jax.tree.map(lambda a: a[i], grid)


def _noise(keys: Array, i: Array, x: Array, draw: Callable = jax.random.normal) -> Array:
  """A draw for each key [B], of the shape and type of x."""
  return jax.vmap(lambda key: draw(jax.random.fold_in(key, i), x.shape[1:], x.dtype))(keys)


def _mean(a: Array) -> Array:
  """Over all axes but the first."""
  return jnp.mean(a.reshape(a.shape[0], -1), axis=1)
