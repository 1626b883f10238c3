"""Guidance: wrappers Denoise -> Denoise of a few lines, which compose."""
import math

import jax.numpy as jnp

from diffusion_jax.core.types import Denoise, require

__all__ = ['cfg', 'clip']


def cfg(denoise: Denoise, ref: Denoise, scale: float) -> Denoise:
  """Classifier-free guidance: ref + scale (denoise - ref) (Ho & Salimans 2022, eq. 6, with scale = 1 + w).

  1 is the conditional model itself, 0 the reference (unconditional) one.
  """
  require(math.isfinite(scale), f'the guidance scale must be finite, got {scale}')
  if scale == 1:
    return denoise  # the reference would be multiplied by zero: do not pay for it

  def guided(x, level):
    x0_ref = ref(x, level)
    return x0_ref + scale * (denoise(x, level) - x0_ref)

  return guided


def clip(denoise: Denoise, low: float = -1.0, high: float = 1.0) -> Denoise:
  """Keeps the x0 estimate within the data's range, as DDPM's sampling code does."""
  require(low < high, f'low must be below high, got {low} and {high}')
  return lambda x, level: jnp.clip(denoise(x, level), low, high)
