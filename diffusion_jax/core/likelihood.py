"""Bits per dimension."""
import math

import jax.numpy as jnp

from diffusion_jax.core.types import Array, Level


def prior_bits(level: Level, x0_squared: Array) -> Array:
  """L_T, what is lost by starting from a standard normal, in bits/dim (Ho et al. 2020, eq. 5), on the vp path.

  KL(N(alpha x0, sigma^2) || N(0, 1)) for data of mean square `x0_squared`, at the noisiest level.
  """
  variance = level.sigma ** 2
  return 0.5 * (level.alpha ** 2 * x0_squared + variance - 1 - jnp.log(variance)) / math.log(2)
