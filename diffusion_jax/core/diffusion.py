"""Where network, process and target meet: adding noise, the denoiser, and the training loss."""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.core import targets
from diffusion_jax.core.losses import Weight
from diffusion_jax.core.schedules import Process
from diffusion_jax.core.targets import Target
from diffusion_jax.core.types import Array, Denoise, Denoiser, Level, Net, Params, expand, require

Noise = Callable[[Process, Level, Params], Array]  # the scalar by which a network knows the level


class Diffusion(NamedTuple):
  """All that must be known of a model, beside its network, to train it and to sample from it."""
  process: Process
  target: Target
  noise: Noise


def timestep(scale: float = 999.0, whole: bool = False) -> Noise:
  """The network sees scale * t; 999 gives DDPM's step index 0 .. 999. whole: rounded, for levels between two steps."""
  # A time is drawn, not learned: no gradient of a schedule's parameters flows through it.
  stop = jax.lax.stop_gradient

  def noise(process, level, params=None):
    time = scale * process.time(stop(level.logsnr), stop(params))
    return jnp.round(time) if whole else time

  return noise


def log_sigma(scale: float = 0.25) -> Noise:
  """The network sees scale * log(sigma / alpha); 0.25 is EDM's c_noise (Karras et al. 2022, table 1)."""
  return lambda process, level, params=None: -0.5 * scale * level.logsnr


def add_noise(x0: Array, eps: Array, level: Level) -> Array:
  """x = alpha x0 + sigma eps (Ho et al. 2020, eq. 4)."""
  return expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps


def denoiser(net: Net, diffusion: Diffusion, params: Params = None) -> Denoise:
  """denoise(x [B, *S, C], level [] or [B]) -> x0 from net(c_in x, noise [B]) -> F. `params` are the process's.

  A network may return F and a variance output side by side, [B, *S, 2 C]: `with_variance` then gives both.
  """
  target = targets.on(diffusion.target, diffusion.process, params)

  def both(x, level):
    c_in, c_skip, c_out = (expand(c, x) for c in target.coeffs(level))
    noise = jnp.broadcast_to(diffusion.noise(diffusion.process, level, params), x.shape[:1])
    F, variance = _split(net(c_in * x, noise), x)
    return c_skip * x + c_out * F, variance

  return Denoiser(both)


def loss(net: Net, x0: Array, eps: Array, level: Level, diffusion: Diffusion, weight: Weight,
         params: Params = None, weight_params: Params = None) -> Array:
  """Each example's mean over its elements of weight(level) |x0 error|^2, for data x0 with noise eps at level: [B].

  `params` are the process's; `weight_params` those of a weight that has its own. See losses.Weight for what some
  weights add.
  """
  x = add_noise(x0, eps, level)
  target = targets.on(diffusion.target, diffusion.process, params)
  c_in, _, c_out = target.coeffs(level)
  noise = diffusion.noise(diffusion.process, level, params)
  F, variance = _split(net(expand(c_in, x) * x, noise), x)
  error = F - target.of(x0, eps, level)
  # The error of x0 is c_out times the error of F; multiplied on the scalars first, the product stays within range.
  scale = weight(level, diffusion.process, params) * c_out ** 2
  value = scale * jnp.mean(error ** 2, axis=range(1, x0.ndim))
  if weight.uncertainty:
    u = weight.uncertainty(level, weight_params)
    value = value * jnp.exp(-u) + u
  if weight.bound:
    require(variance is not None, 'this weight trains a variance output, and the network has none: '
                                  'it must return twice the channels of x')
    x0_error = jax.lax.stop_gradient(expand(c_out, x) * error)
    value += weight.bound(x0, x0_error, variance, level, diffusion.process, params)
  if weight.ends and jax.tree.leaves(params):
    value += weight.ends(x0, eps, diffusion.process, params)
  return value


def _split(out: Array, x: Array) -> tuple[Array, Array | None]:
  """(F, variance output or None) from a network's output for x."""
  if out.shape[-1] == x.shape[-1]:
    return out, None
  require(out.shape[-1] == 2 * x.shape[-1],
          f'the network must return {x.shape[-1]} channels, or twice as many with a variance output, '
          f'got {out.shape[-1]}')
  return tuple(jnp.split(out, 2, axis=-1))
