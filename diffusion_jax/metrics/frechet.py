"""The Fréchet distance between two sets of features, in float64 on the host."""
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
  """Mean [D] and covariance [D, D] (divided by n - 1) of n features."""
  n: int
  mean: np.ndarray
  cov: np.ndarray


def moments(features: np.ndarray) -> Moments:
  """The moments of features [N, D]. Raises ValueError for fewer than two or values that are not finite."""
  features = np.asarray(features, np.float64)
  if features.ndim != 2 or len(features) < 2:
    raise ValueError(f'moments need features [N, D] with N at least 2, got shape {features.shape}')
  if not np.isfinite(features).all():
    raise ValueError('features must be finite: the model or the extractor gives NaN or infinity')
  mean = features.mean(0)
  centred = features - mean
  return Moments(len(features), mean, centred.T @ centred / (len(features) - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
  """|mean difference|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2) (Dowson & Landau 1982; Heusel et al. 2017, eq. 6).

  By symmetric eigenvalues: real whatever the rank, with no constant added to the diagonal. Equal sets give 0 up to
  rounding, which may be slightly negative.
  """
  if a.mean.shape != b.mean.shape:
    raise ValueError(f'features must have one dimension, got {a.mean.size} and {b.mean.size}')
  values, vectors = np.linalg.eigh(a.cov)
  root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
  cross = np.linalg.eigvalsh(root @ b.cov @ root)
  distance = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov)
  return float(distance - 2 * np.sqrt(np.clip(cross, 0, None)).sum())
