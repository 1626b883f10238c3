"""How sure a number is: 95 % intervals."""
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.special

Z = 1.959963984540054  # 97.5 % point of the standard normal


class Estimate(NamedTuple):
  """A value and its 95 % interval (low, high)."""
  value: float
  ci: tuple[float, float]


def bootstrap(statistic: Callable[[np.ndarray], float], samples: np.ndarray, replicates: int = 200,
              seed: int = 0) -> tuple[float, float]:
  """statistic(samples) -+ Z standard errors, estimated by resampling `samples` [N, ...] with replacement.

  It covers the statistic's expectation at this N. The percentiles of the replicates would not: a Fréchet distance is
  biased upwards by resampling as it is by small N, so they sit too high.
  """
  rng = np.random.default_rng(seed)
  values = [statistic(samples[rng.integers(0, len(samples), len(samples))]) for _ in range(replicates)]
  centre, spread = statistic(samples), Z * float(np.std(values, ddof=1))
  return centre - spread, centre + spread


def jackknife(statistic: Callable[[np.ndarray], float], samples: np.ndarray, groups: int = 20,
              seed: int = 0) -> tuple[float, float]:
  """statistic(samples) -+ t standard errors, from `groups` values that each leave one group out (Tukey 1958).

  The groups are random (seeded), so that the samples' order means nothing; t is the 97.5 % point of Student's
  distribution with groups - 1 degrees of freedom. Like the bootstrap it covers the expectation at this N, at the cost
  of `groups` + 1 evaluations. Wrong for statistics that are not smooth, such as a median or a nearest neighbour.
  """
  if not 2 <= groups <= len(samples):
    raise ValueError(f'a jackknife needs from 2 to N groups, got {groups} groups and {len(samples)} samples')
  group = np.random.default_rng(seed).permutation(np.arange(len(samples)) % groups)
  values = np.asarray([statistic(samples[group != g]) for g in range(groups)])
  error = math.sqrt((groups - 1) / groups * float(np.sum((values - values.mean()) ** 2)))
  centre, spread = statistic(samples), student(groups - 1) * error
  return centre - spread, centre + spread


def student(degrees: int) -> float:
  """The 97.5 % point of Student's t distribution."""
  return float(scipy.special.stdtrit(degrees, 0.975))


def proportion(successes: int, trials: int) -> tuple[float, float]:
  """Wilson's interval (1927) for a probability, from `successes` out of `trials`."""
  p, z2 = successes / trials, Z ** 2
  centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
  spread = Z / (1 + z2 / trials) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials ** 2))
  return centre - spread, centre + spread
