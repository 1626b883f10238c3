"""Loss weights: functions of the level that multiply |x0 error|^2.

Written on the x0 error, one weight means the same loss whatever the network predicts.
"""
from collections.abc import Callable

import jax.numpy as jnp

from diffusion_jax.core.types import Array, Level

__all__ = ['simple']

Weight = Callable[[Level], Array]  # level -> weight, of the shape of the level's fields


def simple() -> Weight:
  """L_simple (Ho et al. 2020, eq. 14): an error of eps counts the same at every level, so one of x0 counts SNR-fold."""
  return lambda level: jnp.exp(level.logsnr)
