"""How sure a number is: 95 % intervals."""
import math
from collections.abc import Callable

import numpy as np

Z = 1.959963984540054  # 97.5 % point of the standard normal


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


def proportion(successes: int, trials: int) -> tuple[float, float]:
  """Wilson's interval (1927) for a probability, from `successes` out of `trials`."""
  p, z2 = successes / trials, Z ** 2
  centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
  spread = Z / (1 + z2 / trials) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials ** 2))
  return centre - spread, centre + spread
