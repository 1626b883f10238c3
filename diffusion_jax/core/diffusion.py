"""Where network, process and target meet: adding noise, the denoiser, and the training loss."""
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from diffusion_jax.core.losses import Weight
from diffusion_jax.core.schedules import Process
from diffusion_jax.core.targets import Target
from diffusion_jax.core.types import Array, Denoise, Level, Net, Params, expand

Noise = Callable[[Process, Level, Params], Array]  # the scalar by which a network knows the level


class Diffusion(NamedTuple):
  """All that must be known of a model, beside its network, to train it and to sample from it."""
  process: Process
  target: Target
  noise: Noise


def timestep(scale: float = 999.0) -> Noise:
  """The network sees scale * t; 999 gives DDPM's step index 0 .. 999."""
  return lambda process, level, params=None: scale * process.time(level.logsnr, params)


def log_sigma(scale: float = 0.25) -> Noise:
  """The network sees scale * log(sigma / alpha); 0.25 is EDM's c_noise (Karras et al. 2022, table 1)."""
  return lambda process, level, params=None: -0.5 * scale * level.logsnr


def add_noise(x0: Array, eps: Array, level: Level) -> Array:
  """x = alpha x0 + sigma eps (Ho et al. 2020, eq. 4)."""
  return expand(level.alpha, x0) * x0 + expand(level.sigma, x0) * eps


def denoiser(net: Net, diffusion: Diffusion, params: Params = None) -> Denoise:
  """denoise(x [B, *S, C], level [] or [B]) -> x0 from net(c_in x, noise [B]) -> F. `params` are the process's."""

  def denoise(x, level):
    c_in, c_skip, c_out = (expand(c, x) for c in diffusion.target.coeffs(level))
    noise = jnp.broadcast_to(diffusion.noise(diffusion.process, level, params), x.shape[:1])
    return c_skip * x + c_out * net(c_in * x, noise)

  return denoise


def loss(net: Net, x0: Array, eps: Array, level: Level, diffusion: Diffusion, weight: Weight,
         params: Params = None) -> Array:
  """Each example's mean over its elements of weight(level) |x0 error|^2, for data x0 with noise eps at level: [B]."""
  x = add_noise(x0, eps, level)
  c_in, _, c_out = diffusion.target.coeffs(level)
  noise = diffusion.noise(diffusion.process, level, params)
  error = net(expand(c_in, x) * x, noise) - diffusion.target.of(x0, eps, level)
  # The error of x0 is c_out times the error of F; multiplied on the scalars first, the product stays within range.
  return weight(level) * c_out ** 2 * jnp.mean(error ** 2, axis=range(1, x0.ndim))
