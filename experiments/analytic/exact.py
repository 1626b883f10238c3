"""Data whose best denoiser E[x0 | x] is known: a Gaussian, mixtures of Gaussians, and a finite set of points.

Shapes: B batch, D dimensions, K components or points. x [B, D] float32 or float64; a level has fields [] or [B].
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr

from diffusion_jax.core.types import Array, Denoise, Level
from diffusion_jax.data import sources

Draw = Callable[[np.random.Generator, int], np.ndarray]           # n -> [n, D] float64
Transport = Callable[[np.ndarray, Level, Level], np.ndarray]      # x [B, D] at the first level -> x at the last


class Data(NamedTuple):
  """A distribution of x0 [D], how to draw from it, its denoiser, and the exact flow where there is a formula for it."""
  about: str
  dims: int
  draw: Draw
  denoise: Denoise
  transport: Transport | None = None


def gaussian(mean: np.ndarray, cov: np.ndarray) -> Data:
  """N(mean [D], cov [D, D]). The posterior mean and the flow scale each eigenvector of cov by itself."""
  values, vectors = np.linalg.eigh(np.asarray(cov, np.float64))
  values, mean = np.maximum(values, 0), np.asarray(mean, np.float64)

  def denoise(x, level):
    m, U, s = (jnp.asarray(a, x.dtype) for a in (mean, vectors, values))
    alpha, sigma = column(level)
    gain = alpha * s / (alpha ** 2 * s + sigma ** 2)
    return m + dot(gain * dot(x - alpha * m, U), U.T)

  def transport(x, first, last):
    std = [np.sqrt(np.float64(l.alpha) ** 2 * values + np.float64(l.sigma) ** 2) for l in (first, last)]
    z = (x - np.float64(first.alpha) * mean) @ vectors
    return np.float64(last.alpha) * mean + (z * std[1] / std[0]) @ vectors.T

  def draw(rng, n):
    return mean + (rng.standard_normal((n, len(mean))) * np.sqrt(values)) @ vectors.T

  return Data('a Gaussian with correlated coordinates', len(mean), draw, denoise, transport)


def mixture(weights: np.ndarray, means: np.ndarray, stds: np.ndarray, about: str = '') -> Data:
  """Components k of weight weights[k] (they sum to 1), mean means[k] [D] and covariance stds[k]^2 I.

  In one dimension the flow keeps the order of points, so that it maps quantiles to quantiles: the exact transport.
  """
  weights, means, stds = (np.asarray(a, np.float64) for a in (weights, means, stds))
  dims = means.shape[1]

  def denoise(x, level):
    w, m, s = (jnp.asarray(a, x.dtype) for a in (weights, means, stds))
    alpha, sigma = column(level)                              # [1 or B, 1]
    variance = alpha ** 2 * s ** 2 + sigma ** 2               # [1 or B, K]
    residual = x[:, None] - alpha[..., None] * m              # [B, K, D]
    logits = jnp.log(w) - dims / 2 * jnp.log(variance) - jnp.sum(residual ** 2, -1) / (2 * variance)
    share = jax.nn.softmax(logits, axis=-1)[..., None]
    return jnp.sum(share * (m + (alpha * s ** 2 / variance)[..., None] * residual), axis=1)

  def draw(rng, n):
    k = rng.choice(len(weights), n, p=weights)
    return means[k] + stds[k, None] * rng.standard_normal((n, dims))

  def transport(x, first, last):
    return _quantile(_cdf(x, first), last)

  def _cdf(x, level):
    std = np.sqrt(np.float64(level.alpha) ** 2 * stds ** 2 + np.float64(level.sigma) ** 2)
    return ndtr((x - np.float64(level.alpha) * means[:, 0]) / std) @ weights

  def _quantile(u, level):
    reach = 12 * np.sqrt(np.float64(level.alpha) ** 2 * np.max(stds) ** 2 + np.float64(level.sigma) ** 2)
    low = np.full((len(u), 1), np.float64(level.alpha) * means.min() - reach)
    high = np.full((len(u), 1), np.float64(level.alpha) * means.max() + reach)
    for _ in range(80):  # bisection, to the last bit
      middle = (low + high) / 2
      above = _cdf(middle, level)[:, None] > u[:, None]
      low, high = np.where(above, low, middle), np.where(above, middle, high)
    return (low + high) / 2

  return Data(about or f'a mixture of {len(weights)} Gaussians', dims, draw, denoise, transport if dims == 1 else None)


def finite(points: np.ndarray, about: str = '') -> Data:
  """Equal weight on each of K points [K, D]: the best denoiser of a training set, which can only draw its members."""
  points = np.asarray(points, np.float64)
  half = np.sum(points ** 2, axis=1) / 2

  def denoise(x, level):
    p, h = (jnp.asarray(a, x.dtype) for a in (points, half))
    alpha, sigma = column(level)
    # -|x - alpha p|^2 / (2 sigma^2), without the |x|^2 that all points share.
    return dot(jax.nn.softmax(alpha / sigma ** 2 * (dot(x, p.T) - alpha * h), axis=-1), p)

  def draw(rng, n):
    return points[rng.integers(0, len(points), n)]

  return Data(about or f'{len(points)} points', points.shape[1], draw, denoise)


def column(level: Level) -> tuple[Array, Array]:
  """alpha and sigma as [B, 1], or [1, 1] of a level that all share."""
  return jnp.reshape(level.alpha, (-1, 1)), jnp.reshape(level.sigma, (-1, 1))


def dot(a: Array, b: Array) -> Array:
  """a @ b in full precision, also where a device has a faster and coarser product."""
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def ellipse() -> Data:
  """A two-dimensional Gaussian, five times as long as wide and turned by 30 degrees."""
  axes = np.array([[np.cos(np.pi / 6), -np.sin(np.pi / 6)], [np.sin(np.pi / 6), np.cos(np.pi / 6)]])
  return gaussian(np.array([0.3, -0.2]), axes @ np.diag([0.5 ** 2, 0.1 ** 2]) @ axes.T)


def three() -> Data:
  """Three modes on a line, of unequal weight and width."""
  return mixture(np.array([0.25, 0.45, 0.3]), np.array([[-0.9], [0.1], [0.8]]), np.array([0.05, 0.2, 0.02]),
                 'three modes on a line, of unequal weight and width')


def ring() -> Data:
  """Eight narrow modes on a circle."""
  angle = np.arange(8) * np.pi / 4
  return mixture(np.full(8, 1 / 8), np.stack([np.cos(angle), np.sin(angle)], 1), np.full(8, 0.05),
                 'eight narrow modes on a circle in the plane')


def moons(components: int = 40) -> Data:
  """Two half circles, as many small components side by side."""
  angle = np.pi * (np.arange(components // 2) + 0.5) / (components // 2)
  upper = np.stack([np.cos(angle) - 0.5, np.sin(angle) - 0.25], 1)
  means = np.concatenate([upper, -upper]) * 2 / 3
  return mixture(np.full(len(means), 1 / len(means)), means, np.full(len(means), 0.04),
                 'two half circles in the plane, of many small components')


def digits() -> Data:
  """The 1,297 training digits of scikit-learn, 8x8 in [-1, 1]: the best denoiser of this set, not of digits."""
  return finite(points_of(sources.load('digits', 'train')), 'the 1,297 training digits of scikit-learn, 8x8 pixels')


def points_of(source: sources.Source) -> np.ndarray:
  """The images of a source in memory as points in [-1, 1]: [N, D]."""
  images, _ = sources.arrays(source)
  return images.reshape(len(images), -1) / 127.5 - 1


DATA = {'ellipse': ellipse, 'three': three, 'ring': ring, 'moons': moons, 'digits': digits}
