"""Exponential moving averages of parameters."""
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.core.types import Array, Params, require

__all__ = ['constant', 'half_life']

Rate = Callable[[Array, int], Array]  # (step from 0, images per step) -> the decay of this update


def constant(decay: float = 0.9999, warmup: bool = True) -> Rate:
  """A constant decay per step; `warmup` caps it at (1 + step) / (10 + step): a short run is not all initialisation."""
  require(0 <= decay < 1, f'decay must lie in [0, 1), got {decay}')
  return lambda step, batch_size: jnp.minimum(decay, (1 + step) / (10 + step)) if warmup else jnp.asarray(decay)


def half_life(images: float = 500_000, rampup: float = 0.05) -> Rate:
  """The weight of the past halves every `images` images, capped at `rampup` times the images seen; EDM's rule."""
  require(images > 0, f'the half-life must be above 0 images, got {images}')
  require(rampup >= 0, f'rampup must be at least 0, got {rampup}')

  def rate(step, batch_size):
    length = jnp.minimum(images, rampup * step * batch_size) if rampup else images
    return 0.5 ** (batch_size / jnp.maximum(length, 1e-8))

  return rate


def update(average: Params, params: Params, decay: Array) -> Params:
  """average + (1 - decay) (params - average), leaf by leaf."""
  return jax.tree.map(lambda a, p: a + (1 - decay).astype(a.dtype) * (p - a), average, params)
