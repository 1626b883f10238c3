"""Kernel distances between two sets of features (squared maximum mean discrepancies), in float64 on the host."""
import math
from typing import NamedTuple

import numpy as np

from diffusion_jax.metrics.frechet import CHUNK, checked
from diffusion_jax.metrics.intervals import Estimate, Z, student


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
  take = lambda s: s[rng.choice(len(s), subset_size, replace=False)]
  values = [_unbiased(take(x), take(y)) for _ in range(subsets)]
  return KID(float(np.mean(values)), float(np.std(values)))


def mmd2_blocks(x: np.ndarray, y: np.ndarray, block_size: int = 1000, seed: int = 0) -> Estimate:
  """What `kid` estimates, with an interval at its cost: the mean over disjoint random blocks (Zaremba et al. 2013).

  The blocks are independent, so that the mean -+ t standard errors over them covers the unbiased MMD^2 of the
  distributions, equal ones too. Raises ValueError for fewer than two blocks.
  """
  x, y = checked(x, y)
  blocks = min(len(x), len(y)) // block_size if block_size > 1 else 0
  if blocks < 2:
    raise ValueError(f'an interval needs 2 or more blocks of 2 or more features, got blocks of {block_size} from '
                     f'{len(x)} and {len(y)}: set a smaller block_size')
  rng = np.random.default_rng(seed)
  rows = [rng.permutation(len(s))[:blocks * block_size].reshape(blocks, block_size) for s in (x, y)]
  values = np.asarray([_unbiased(x[i], y[j]) for i, j in zip(*rows, strict=True)])
  mean, spread = values.mean(), student(blocks - 1) * values.std(ddof=1) / math.sqrt(blocks)
  return Estimate(float(mean), (float(mean - spread), float(mean + spread)))


def mmd2_unbiased(x: np.ndarray, y: np.ndarray, chunk: int = CHUNK) -> Estimate:
  """KID's unbiased MMD^2 over all of x [M, D] and y [N, D] at once, with an interval for the sampling of both.

  The interval is the jackknife that leaves out each sample once, exact from the kernel's row sums; it is too wide by
  about 1.4 where the distributions are equal, as the jackknife of a degenerate U-statistic is. The cost grows with
  (M + N)^2 D and the memory with chunk^2: for tens of thousands of features take `mmd2_blocks`.
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

  def kernel(a, b):  # k - 1, for the constant drops out and k is too near 1 for its sum; a sample with itself gives 0
    squared = np.sum(a * a, 1)[:, None] + np.sum(b * b, 1) - 2 * a @ b.T
    return np.expm1(-np.clip(squared, 0, None) / (2 * sigma ** 2))

  found = _mmd2(x / lengths[0], y / lengths[1], kernel, chunk, unbiased=False)
  return Estimate(scale * found.value, (scale * found.ci[0], scale * found.ci[1]))


def _cubic(a, b):
  k = a @ b.T
  k /= a.shape[1]
  k += 1
  return k * k * k


def _unbiased(x, y):
  """Unbiased MMD^2 of two sets of equal size, with the whole kernel in memory."""
  x, y, n = x.astype(np.float64), y.astype(np.float64), len(x)
  within = sum(k.sum() - np.trace(k) for k in (_cubic(x, x), _cubic(y, y)))
  return within / (n * (n - 1)) - 2 * _cubic(x, y).mean()


def _mmd2(x, y, kernel, chunk, unbiased):
  """The mean within x and within y less twice that between, and its jackknife over the samples of both.

  Without `unbiased` the means within have n^2 terms, for a kernel that is 0 of a sample with itself.
  """
  between = [np.zeros(len(x)), np.zeros(len(y))]
  for i, a in _chunks(x, chunk):
    for j, b in _chunks(y, chunk):
      k = kernel(a, b)
      between[0][i:i + chunk] += k.sum(1)
      between[1][j:j + chunk] += k.sum(0)
  across = between[0].sum()
  value, variance = -2 * across / (len(x) * len(y)), 0.0
  for s, other, crossing in ((x, y, between[0]), (y, x, between[1])):
    n, rows = len(s), _within(s, kernel, chunk)
    value += rows.sum() / (n * (n - unbiased))
    left = (rows.sum() - 2 * rows) / ((n - 1) * (n - 1 - unbiased))
    left -= 2 * (across - crossing) / ((n - 1) * len(other))
    variance += (n - 1) / n * np.sum((left - left.mean()) ** 2)
  spread = Z * math.sqrt(variance)
  return Estimate(float(value), (float(value - spread), float(value + spread)))


def _within(x, kernel, chunk):
  """For each sample the sum of its kernel with all others."""
  rows = np.zeros(len(x))
  for i, a in _chunks(x, chunk):
    for j, b in _chunks(x[:i + chunk], chunk):
      k = kernel(a, b)
      if i == j:
        np.fill_diagonal(k, 0)
      else:
        rows[j:j + chunk] += k.sum(0)
      rows[i:i + chunk] += k.sum(1)
  return rows


def _chunks(x, chunk):
  return ((i, np.asarray(x[i:i + chunk], np.float64)) for i in range(0, len(x), chunk))
