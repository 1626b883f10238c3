"""Kernel distances between two sets of features (squared maximum mean discrepancies), in float64 on the host."""
import math
from typing import NamedTuple

import numpy as np

from diffusion_jax.metrics.frechet import CHUNK, checked
from diffusion_jax.metrics.intervals import Estimate, Z


class KID(NamedTuple):
  """Mean over the subsets, and their standard deviation (divided by their number): it is no standard error."""
  mean: float
  std: float


def kid(x: np.ndarray, y: np.ndarray, subsets: int = 100, subset_size: int = 1000, seed: int = 2020) -> KID:
  """The kernel inception distance (Binkowski et al. 2018): unbiased MMD^2 with the kernel (x.y / D + 1)^3.

  x [M, D] are the generated features, y [N, D] the real ones. Each subset is drawn without replacement, first from x
  and then from y, from RandomState(seed): the rule, the defaults and so the values of torch-fidelity. Equal
  distributions give values about 0, negative ones too. Raises ValueError for fewer features than a subset.
  """
  x, y = checked(x, y)
  if subsets < 1 or not 2 <= subset_size <= min(len(x), len(y)):
    raise ValueError(f'KID needs subsets of 2 or more features out of each set, got {subsets} subsets of {subset_size} '
                     f'from {len(x)} and {len(y)}: set a smaller subset_size and say so beside the value')
  rng = np.random.RandomState(seed)
  values = []
  for _ in range(subsets):
    a = x[rng.choice(len(x), subset_size, replace=False)].astype(np.float64)
    b = y[rng.choice(len(y), subset_size, replace=False)].astype(np.float64)
    pairs = subset_size * (subset_size - 1)
    within = sum(k.sum() - np.trace(k) for k in (_cubic(a, a), _cubic(b, b)))
    values.append(within / pairs - 2 * _cubic(a, b).mean())
  return KID(float(np.mean(values)), float(np.std(values)))


def mmd2_unbiased(x: np.ndarray, y: np.ndarray, chunk: int = CHUNK) -> Estimate:
  """KID's unbiased MMD^2 over all of x [M, D] and y [N, D] at once, with an interval for the sampling of both.

  The interval is the jackknife that leaves out each sample once, exact from the kernel's row sums; it is too wide by
  about 1.4 where the distributions are equal, as the jackknife of a degenerate U-statistic is. Costs M^2 + N^2 + 2 M N
  half products of D and chunk^2 values of memory.
  """
  x, y = checked(x, y)
  if min(len(x), len(y)) < 3:
    raise ValueError(f'the interval needs at least 3 features in each set, got {len(x)} and {len(y)}')
  return _mmd2(x, y, _cubic, chunk, unbiased=True)


def cmmd(x: np.ndarray, y: np.ndarray, sigma: float = 10, scale: float = 1000, chunk: int = CHUNK) -> Estimate:
  """CMMD (Jayasumana et al. 2024): scale MMD^2 of embeddings [M, D] and [N, D] divided by their lengths.

  The kernel is exp(-|x - y|^2 / (2 sigma^2)) and each mean includes a sample with itself (the biased V-statistic, never
  negative). The paper's values are for CLIP embeddings. The interval is that of `mmd2_unbiased`.
  """
  x, y = checked(x, y)
  if not sigma > 0:
    raise ValueError(f'sigma must be positive, got {sigma}')
  lengths = [np.linalg.norm(s.astype(np.float64), axis=1, keepdims=True) for s in (x, y)]
  if not all(l.all() for l in lengths):
    raise ValueError('an embedding is all zeros and has no direction: the extractor failed on it')

  def kernel(a, b):  # k - 1, whose constant drops out: k is so near 1 that its own sum would lose digits
    squared = np.sum(a * a, 1)[:, None] + np.sum(b * b, 1) - 2 * a @ b.T
    return np.expm1(-np.clip(squared, 0, None) / (2 * sigma ** 2))

  found = _mmd2(x / lengths[0], y / lengths[1], kernel, chunk, unbiased=False)
  return Estimate(scale * found.value, (scale * found.ci[0], scale * found.ci[1]))


def _cubic(a, b):
  k = a @ b.T
  k /= a.shape[1]
  k += 1
  return k * k * k


def _mmd2(x, y, kernel, chunk, unbiased):
  """The mean within x and within y less twice that between, and its jackknife over the samples of both."""
  between = [np.zeros(len(x)), np.zeros(len(y))]
  for i, a in _chunks(x, chunk):
    for j, b in _chunks(y, chunk):
      k = kernel(a, b)
      between[0][i:i + chunk] += k.sum(1)
      between[1][j:j + chunk] += k.sum(0)
  across = between[0].sum()
  value, variance = -2 * across / (len(x) * len(y)), 0.0
  for s, other, crossing in ((x, y, between[0]), (y, x, between[1])):
    n, (rows, selves) = len(s), _within(s, kernel, chunk)
    if unbiased:
      rows, selves = rows - selves, np.zeros(n)
    value += rows.sum() / (n * (n - unbiased))
    left = (rows.sum() - 2 * rows + selves) / ((n - 1) * (n - 1 - unbiased))
    left -= 2 * (across - crossing) / ((n - 1) * len(other))
    variance += (n - 1) / n * np.sum((left - left.mean()) ** 2)
  spread = Z * math.sqrt(variance)
  return Estimate(float(value), (float(value - spread), float(value + spread)))


def _within(x, kernel, chunk):
  """For each sample the sum of its kernel with all samples, and the kernel with itself."""
  rows, selves = np.zeros(len(x)), np.zeros(len(x))
  for i, a in _chunks(x, chunk):
    for j, b in _chunks(x[:i + chunk], chunk):
      k = kernel(a, b)
      rows[i:i + chunk] += k.sum(1)
      if i == j:
        selves[i:i + chunk] = np.diagonal(k)
      else:
        rows[j:j + chunk] += k.sum(0)
  return rows, selves


def _chunks(x, chunk):
  return ((i, np.asarray(x[i:i + chunk], np.float64)) for i in range(0, len(x), chunk))
