"""The paths from data to noise: how logsnr becomes the scales of x = alpha x0 + sigma eps."""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.core.types import Array, Level


class Path(NamedTuple):
  """How logsnr becomes the scales of x = alpha x0 + sigma eps."""
  name: str
  scales: Callable[[Array], tuple[Array, Array]]  # logsnr -> (alpha, sigma)

  def level(self, logsnr: Array) -> Level:
    """The level at `logsnr`, of the same shape."""
    return Level(logsnr, *self.scales(logsnr))


def _subvp_scales(logsnr: Array) -> tuple[Array, Array]:
  b = subvp_integral(logsnr)
  return jnp.exp(-b / 2), -jnp.expm1(-b)


def subvp_integral(logsnr: Array) -> Array:
  """B = -2 log(alpha) on the sub-VP path: the root of alpha / (1 - alpha^2) = exp(logsnr / 2)."""
  return 2 * jnp.arcsinh(jnp.exp(-logsnr / 2) / 2)


# Variance preserving: alpha^2 + sigma^2 = 1.
vp = Path('vp', lambda l: (jnp.sqrt(jax.nn.sigmoid(l)), jnp.sqrt(jax.nn.sigmoid(-l))))
# Variance exploding: alpha = 1.
ve = Path('ve', lambda l: (jnp.ones_like(l), jnp.exp(-l / 2)))
# Straight lines from noise to data: alpha + sigma = 1.
flow = Path('flow', lambda l: (jax.nn.sigmoid(l / 2), jax.nn.sigmoid(-l / 2)))
# Below variance preserving: alpha^2 + sigma = 1 (Song et al. 2021, eq. 29).
subvp = Path('subvp', _subvp_scales)
PATHS = (vp, ve, flow, subvp)
