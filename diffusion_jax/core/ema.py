"""Exponential moving averages of parameters, and averages of any length made afterwards from snapshots of a few."""
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.types import Array, Params, require

__all__ = ['constant', 'half_life', 'power_function']

Rate = Callable[[Array, int], Array]  # (step from 0, images per step) -> the decay of this update

WIDEST = 12 ** -0.5  # sigma_rel of a plain mean over the whole run, where gamma = 0


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


def power_function(std: float = 0.05) -> Rate:
  """Weights the past by time^gamma (Karras et al. 2024, eqs. 2 and 3): the average's width grows with the run.

  std: their sigma_rel, the weights' standard deviation as a share of the run, within (0, 12^-1/2): 0.05 and 0.1 are
  theirs. At step t from 1 the decay is (1 - 1 / t)^(gamma + 1), so that the initial parameters have no weight.
  """
  power = gamma(std) + 1
  return lambda step, batch_size: jnp.exp(power * jnp.log1p(-1 / (step + 1)))


def update(average: Params, params: Params, decay: Array) -> Params:
  """average + (1 - decay) (params - average), leaf by leaf."""
  return jax.tree.map(lambda a, p: a + (1 - decay).astype(a.dtype) * (p - a), average, params)


def gamma(std: float) -> float:
  """The exponent of a power function whose relative width is std: (gamma + 2)^2 (gamma + 3) std^2 = gamma + 1."""
  require(0 < std < WIDEST, f'std must lie in (0, {WIDEST:.4f}), got {std}')
  return float(np.roots([1, 7, 16 - std ** -2, 12 - std ** -2]).real.max())


def sigma_rel(exponent: float) -> float:
  """The relative width of a power function with this exponent (Karras et al. 2024, section 3.1): `gamma`'s inverse."""
  return float(np.sqrt((exponent + 1) / (exponent + 3)) / (exponent + 2))


def inner_products(times: Sequence[float], stds: Sequence[float], other_times: Sequence[float],
                   other_stds: Sequence[float]) -> np.ndarray:
  """Integrals of products of two power functions' weights, [n, m] (Karras et al. 2024, algorithm 3).

  The weights of an average of width std at time t are (gamma + 1) tau^gamma / t^(gamma + 1) for tau in [0, t].
  """
  t, s = (np.asarray(a, np.float64) for a in (times, other_times))
  g, h = (np.array([gamma(std) for std in of]) for of in (stds, other_stds))
  t, g = t[:, None], g[:, None]
  # The later one's weights, integrated up to the earlier one's time: powers of ratios below 1 stay within range.
  up_to = np.minimum(t / s, 1) ** h * np.minimum(s / t, 1) ** g / np.maximum(t, s)
  return (g + 1) * (h + 1) / (g + h + 1) * up_to


def reconstruction(times: Sequence[float], stds: Sequence[float], time: float, std: float) -> tuple[np.ndarray, float]:
  """How to mix averages of widths `stds` at `times` into the one of width `std` at `time`: (shares [n], error).

  Least squares between the weights that each gives to the past (Karras et al. 2024, algorithm 3); the error is what
  is left of the wanted weights' norm, as a share of it. Raises ValueError for fewer than 2 averages.
  """
  require(len(times) == len(stds) >= 2, f'a reconstruction needs at least 2 snapshots, got {len(times)}')
  products, wanted = inner_products(times, stds, times, stds), inner_products(times, stds, [time], [std])[:, 0]
  norms, whole = np.sqrt(np.diag(products)), inner_products([time], [std], [time], [std])[0, 0]
  # Of unit length, and without the directions that rounding alone has filled: neighbours are nearly the same.
  shares = np.linalg.lstsq(products / np.outer(norms, norms), wanted / norms, rcond=1e-14)[0] / norms
  left = whole - 2 * shares @ wanted + shares @ products @ shares
  return shares, float(np.sqrt(max(left, 0) / whole))
