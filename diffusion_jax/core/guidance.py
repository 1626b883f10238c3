"""Guidance: wrappers of a denoiser, a few lines each, that compose in any order.

`ref` is the denoiser that is led away from: the network without its condition, with a negative condition, or a worse
network. A `guide` is a wrapper Denoise -> Denoise such as lambda d: cfg(d, ref, 3.0). What a network says of the
reverse step's variance passes through every wrapper unchanged.
"""
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.core.solver import Sampler
from diffusion_jax.core.types import Array, Denoise, Level, expand, require, then

WRAPPERS = ['apg', 'autoguide', 'cfg', 'cfg_weight', 'classifier', 'clip', 'inpaint', 'interval', 'rescale',
            'threshold']  # of a denoiser; `repaint` is one of a sampler
__all__ = [*WRAPPERS, 'repaint']

Guide = Callable[[Denoise], Denoise]
TINY = 1e-20  # below any squared length that is not zero, within float32


def cfg(denoise: Denoise, ref: Denoise, scale: float) -> Denoise:
  """Classifier-free guidance: ref + scale (denoise - ref) (Ho & Salimans 2022, eq. 6, with scale = 1 + w).

  1 is the conditional model itself, 0 the reference (unconditional) one. A negative condition is a `ref` that has it.
  """
  _check_scale(scale)
  if scale == 1:
    return denoise  # the reference would be multiplied by zero: do not pay for it

  def change(x0, x, level):
    x0_ref = ref(x, level)
    return x0_ref + scale * (x0 - x0_ref)

  return then(denoise, change)


def cfg_weight(denoise: Denoise, ref: Denoise, weight: float) -> Denoise:
  """Classifier-free guidance in the paper's own convention: (1 + w) denoise - w ref (Ho & Salimans 2022, eq. 6)."""
  return cfg(denoise, ref, 1 + weight)


def autoguide(denoise: Denoise, bad: Denoise, scale: float) -> Denoise:
  """Leads away from a worse version of the model itself, smaller or less trained (Karras et al. 2024, eq. 3).

  `bad` has the same condition as `denoise`; otherwise the formula is that of `cfg`.
  """
  return cfg(denoise, bad, scale)


def apg(denoise: Denoise, ref: Denoise, scale: float, eta: float = 0.0, radius: float = math.inf) -> Denoise:
  """Adaptive projected guidance against oversaturation (Sadat et al. 2024), without its momentum.

  The difference denoise - ref is shortened to `radius` (its length over a whole sample), and its part parallel to the
  estimate counts `eta`. With eta = 1 and no radius it is `cfg`. Momentum would be a state between steps.
  """
  _check_scale(scale)
  require(math.isfinite(eta), f'eta must be finite, got {eta}')
  require(radius > 0, f'radius must be above 0, got {radius}')
  if scale == 1:
    return denoise

  def change(x0, x, level):
    difference = x0 - ref(x, level)
    if math.isfinite(radius):
      difference *= jnp.minimum(1, radius * jax.lax.rsqrt(jnp.maximum(_dot(difference, difference), TINY)))
    parallel = _dot(difference, x0) / jnp.maximum(_dot(x0, x0), TINY) * x0
    return x0 + (scale - 1) * (difference - (1 - eta) * parallel)

  return then(denoise, change)


def interval(denoise: Denoise, guide: Guide, low: float = 0.0, high: float = math.inf,
             cond: Callable = jax.lax.cond) -> Denoise:
  """`guide` only where low < sigma / alpha <= high (Kynkäänniemi et al. 2024; their sigma is EDM's).

  Outside, the calls that `guide` adds are not made; `denoise` is called once in any case, as guide is given its result
  and may ask for it at that x alone. For levels [B], the calls are made if any sample needs them. cond: for networks
  that remember, one through which their memory passes (`caching.Cache.cond`).
  """
  require(0 <= low < high, f'the interval of guidance must have 0 <= low < high, got {low} and {high}')

  def change(x0, x, level):
    ratio = jnp.exp(-0.5 * level.logsnr)
    inside = (low < ratio) & (ratio <= high)
    guided = guide(lambda x, level: x0)
    found = cond(jnp.any(inside), lambda: guided(x, level).astype(x0.dtype), lambda: x0)
    return jnp.where(expand(inside, x0), found, x0)

  return then(denoise, change)


def rescale(denoise: Denoise, guide: Guide, phi: float = 0.7) -> Denoise:
  """`guide`, with each sample's standard deviation brought back to that of `denoise` (Lin et al. 2024, eq. 14-16).

  phi: 0 leaves the guided estimate as it is, 1 restores the deviation fully. `denoise` is called once: guide is given
  its result and may ask for it at that x alone.
  """
  require(0 <= phi <= 1, f'phi must lie in [0, 1], got {phi}')

  def change(x0, x, level):
    guided = guide(lambda x, level: x0)(x, level)
    wanted, got = (jnp.maximum(jnp.var(a, range(1, a.ndim), keepdims=True), TINY) for a in (x0, guided))
    return guided * (1 - phi + phi * jnp.sqrt(wanted / got))

  return then(denoise, change)


def clip(denoise: Denoise, low: float = -1.0, high: float = 1.0) -> Denoise:
  """Keeps the x0 estimate within the data's range, as DDPM's sampling code does."""
  require(low < high, f'low must be below high, got {low} and {high}')
  return then(denoise, lambda x0, x, level: jnp.clip(x0, low, high))


def threshold(denoise: Denoise, percentile: float = 0.995, max_value: float = math.inf) -> Denoise:
  """Dynamic thresholding, for data in [-1, 1] (Saharia et al. 2022, section 2.3).

  Each sample is clipped to [-s, s] and divided by s, the `percentile` of its absolute values within [1, max_value].
  """
  require(0 < percentile <= 1, f'percentile must lie in (0, 1], got {percentile}')
  require(max_value >= 1, f'max_value must be at least 1, got {max_value}')

  def change(x0, x, level):
    s = jnp.quantile(jnp.abs(x0), percentile, axis=tuple(range(1, x0.ndim)), keepdims=True)
    s = jnp.clip(s, 1, max_value)
    return jnp.clip(x0, -s, s) / s

  return then(denoise, change)


def classifier(denoise: Denoise, log_prob: Callable[[Array, Level], Array], scale: float = 1.0) -> Denoise:
  """Classifier guidance: x0 + scale sigma^2 / alpha grad_x log p(y | x) (Dhariwal & Nichol 2021, algorithm 2).

  log_prob(x, level) -> [B] is a classifier's of the noisy x; with an exact one and scale 1, the result is E[x0 | x, y].
  At alpha = 0, where x says nothing of y and the gradient is zero, the estimate stays as it is.
  """
  _check_scale(scale)

  def change(x0, x, level):
    gradient = jax.grad(lambda x: jnp.sum(log_prob(x, level)))(x)
    some = level.alpha > 0
    step = jnp.where(some, level.sigma ** 2 / jnp.where(some, level.alpha, 1), 0)
    return x0 + expand(scale * step, x) * gradient

  return then(denoise, change)


def inpaint(denoise: Denoise, data: Array, mask: Array) -> Denoise:
  """Projection: the estimate is `data` [B, *S, C] where `mask` is True ([B, *S, C], or less axes or 1: [*S, 1]).

  Known pixels come out exactly. The others are not quite a draw given them: they only saw them noisy; see `repaint`.
  """
  _check_mask(data, mask)

  def change(x0, x, level):
    require(x0.shape == data.shape, f'data of shape {data.shape} cannot fill samples of shape {x0.shape}')
    return jnp.where(mask, data, x0)

  return then(denoise, change)


def repaint(sampler: Sampler, data: Array, mask: Array, resamples: int = 10) -> Sampler:
  """RePaint: a sampler whose known pixels are `data` (as for `inpaint`) noised to each level (Lugmayr et al. 2022).

  Each step is taken `resamples` times, with noise added back between (algorithm 1; jumps of length 1), so that the
  unknown pixels come to agree with the known: for many resamples and a fine grid, a draw given them.
  """
  _check_mask(data, mask)
  require(resamples >= 1, f'resamples must be at least 1, got {resamples}')
  require(sampler.calls > 0, 'repaint cannot wrap a sampler that chooses its own steps')
  inner = lambda z: z[0] if sampler.draws == 1 else z[:sampler.draws]

  def step(denoise, x, memory, cur, nxt, z):
    back = cur.alpha / nxt.alpha
    std = jnp.sqrt(jnp.maximum(cur.sigma ** 2 - (back * nxt.sigma) ** 2, 0))

    def once(carry, z):
      x, after = sampler.step(denoise, carry[0], memory, cur, nxt, inner(z))
      x = jnp.where(mask, nxt.alpha * data + nxt.sigma * z[-2], x)
      return (back * x + std * z[-1], x, after), None

    z = z.reshape(resamples, sampler.draws + 2, *x.shape)
    return jax.lax.scan(once, (x, x, memory), z)[0][1:]

  def finish(denoise, x, memory, last, z):
    return jnp.where(mask, data, sampler.finish(denoise, x, memory, last, inner(z)))

  return Sampler(step, sampler.init, finish, sampler.calls * resamples, sampler.extra_calls,
                 resamples * (sampler.draws + 2))


def _check_scale(scale: float) -> None:
  require(math.isfinite(scale), f'the guidance scale must be finite, got {scale}')


def _check_mask(data: Array, mask: Array) -> None:
  require(mask.dtype == bool, f'mask must be boolean, True where the data is known, got {mask.dtype}')
  fits = mask.ndim <= data.ndim and all(
      m in (1, d) for m, d in zip(mask.shape[::-1], data.shape[::-1], strict=False))
  require(fits, f'a mask of shape {mask.shape} does not fit data of shape {data.shape}')


def _dot(a: Array, b: Array) -> Array:
  """The inner product of each sample: [B, 1, ..., 1]."""
  return jnp.sum(a * b, range(1, a.ndim), keepdims=True)
