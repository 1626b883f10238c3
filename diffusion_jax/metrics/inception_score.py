"""The inception score: how sure a classifier is of each image, and how varied the images are to it."""
import itertools
from typing import NamedTuple

import numpy as np
import scipy.special

from diffusion_jax.metrics.intervals import student


class InceptionScore(NamedTuple):
  """Mean and standard deviation (divided by their number) over the splits, and an interval for the mean, if any."""
  mean: float
  std: float
  ci: tuple[float, float] | None


def inception_score(logits: np.ndarray, splits: int = 10, seed: int | None = 2020) -> InceptionScore:
  """exp of the mean KL(p(y|x) || p(y)) within each of `splits` (Salimans et al. 2016), from logits [N, K].

  The samples are shuffled by RandomState(seed) and split at i N // splits, in float64: torch-fidelity's rule and values
  (there and in the original the logits are without the last layer's bias); seed None keeps the order. A split of few
  samples is biased low, so compare equal N and splits only. The interval is mean -+ t std (divided by splits - 1) /
  sqrt(splits), over the splits, and covers the expectation at a split's size; one split has none.
  Raises ValueError for logits that are not finite or fewer than the splits.
  """
  logits = np.asarray(logits)
  if logits.ndim != 2 or not np.isfinite(logits).all():
    raise ValueError(f'the inception score needs finite logits [N, K], got shape {logits.shape}'
                     + ' with NaN or infinity' * (logits.ndim == 2))
  n = len(logits)
  if not 1 <= splits <= n:
    raise ValueError(f'the inception score needs from 1 to N splits, got {splits} splits and {n} samples')
  order = np.arange(n) if seed is None else np.random.RandomState(seed).permutation(n)
  edges = [i * n // splits for i in range(splits + 1)]
  scores = np.asarray([_score(logits[order[a:b]]) for a, b in itertools.pairwise(edges)])
  mean = float(scores.mean())
  if splits == 1:
    return InceptionScore(mean, 0.0, None)
  spread = student(splits - 1) * float(scores.std(ddof=1)) / np.sqrt(splits)
  return InceptionScore(mean, float(scores.std()), (float(mean - spread), float(mean + spread)))


def _score(logits):
  log_p = scipy.special.log_softmax(logits.astype(np.float64), axis=1)
  log_mean = scipy.special.logsumexp(log_p, axis=0) - np.log(len(log_p))
  return np.exp(np.sum(np.exp(log_p) * (log_p - log_mean), axis=1).mean())
