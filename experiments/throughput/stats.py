"""From the times of rounds to a ratio, its interval, and whether it may be believed."""
from collections.abc import Sequence

import numpy as np

MAX_SPREAD = 0.15  # interquartile range over median above which no verdict is given
RESAMPLES = 10_000
GOAL_PERCENT = 3.0  # of the overhead of data and records


def spread(times: Sequence[float]) -> float:
  """Interquartile range over median."""
  low, middle, high = np.percentile(times, [25, 50, 75])
  return float((high - low) / middle)


def median(times: Sequence[float]) -> float:
  """The middle time."""
  return float(np.median(times))


def ratio(baseline: Sequence[float], ours: Sequence[float]) -> float:
  """Ratio of medians: above 1, ours is faster."""
  return median(baseline) / median(ours)


def interval(baseline: Sequence[float], ours: Sequence[float], level: float = 0.95) -> tuple[float, float]:
  """Bootstrap interval of `ratio`. Whole rounds are drawn: the two times of a round share the machine's mood."""
  baseline, ours = np.asarray(baseline), np.asarray(ours)
  rows = np.random.default_rng(0).integers(len(ours), size=(RESAMPLES, len(ours)))
  ratios = np.median(baseline[rows], axis=1) / np.median(ours[rows], axis=1)
  low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
  return float(low), float(high)


def verdict(baseline: Sequence[float], ours: Sequence[float]) -> str:
  """'faster', 'slower' or 'no difference', or that the times spread too widely to say."""
  if max(spread(baseline), spread(ours)) > MAX_SPREAD:
    return 'too noisy for a verdict'
  low, high = interval(baseline, ours)
  return 'faster' if low > 1 else 'slower' if high < 1 else 'no difference'


def share_percent(bare_over_loop: float) -> float:
  """The percentage of the loop's time that the bare steps do not explain, from a ratio of times."""
  return 100 * (1 - bare_over_loop)


def overhead_verdict(bare: Sequence[float], loop: Sequence[float]) -> str:
  """Whether the share stays below its goal, or that the times spread too widely to say."""
  if max(spread(bare), spread(loop)) > MAX_SPREAD:
    return 'too noisy for a verdict'
  low, high = (share_percent(r) for r in reversed(interval(bare, loop)))
  word = 'within' if high <= GOAL_PERCENT else 'above' if low > GOAL_PERCENT else 'not told from'
  return f'{word} {GOAL_PERCENT:g} %'
