"""From the times of rounds to a ratio, its interval, and whether it may be believed."""
from collections.abc import Sequence

import numpy as np

MAX_SPREAD = 0.15  # interquartile range over median above which no verdict is given
RESAMPLES = 10_000
MAX_OTHERS = 0.1  # of all cores that others may take meanwhile; spinning threads suffer from it more than others
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
  return float(_of_medians(np.asarray(baseline), np.asarray(ours)))


def paired_ratio(bare: Sequence[float], loop: Sequence[float]) -> float:
  """Median of ratios: for times that were measured in pairs, each within seconds."""
  return float(_of_pairs(np.asarray(bare), np.asarray(loop)))


def interval(baseline: Sequence[float], ours: Sequence[float]) -> tuple[float, float]:
  """95 % bootstrap interval of `ratio`. Whole rounds are drawn: the two times of a round share the machine's mood."""
  return _bootstrap(_of_medians, baseline, ours)


def paired_interval(bare: Sequence[float], loop: Sequence[float]) -> tuple[float, float]:
  """95 % bootstrap interval of `paired_ratio`."""
  return _bootstrap(_of_pairs, bare, loop)


def _of_medians(baseline: np.ndarray, ours: np.ndarray) -> np.ndarray:
  return np.median(baseline, axis=-1) / np.median(ours, axis=-1)


def _of_pairs(bare: np.ndarray, loop: np.ndarray) -> np.ndarray:
  return np.median(bare / loop, axis=-1)


def _bootstrap(of, baseline, ours) -> tuple[float, float]:
  rows = np.random.default_rng(0).integers(len(ours), size=(RESAMPLES, len(ours)))
  low, high = np.quantile(of(np.asarray(baseline)[rows], np.asarray(ours)[rows]), [0.025, 0.975])
  return float(low), float(high)


def verdict(baseline: Sequence[float], ours: Sequence[float]) -> str:
  """'faster', 'slower' or 'no difference', or that the times spread too widely to say."""
  if max(spread(baseline), spread(ours)) > MAX_SPREAD:
    return 'too noisy for a verdict'
  low, high = interval(baseline, ours)
  return 'faster' if low > 1 else 'slower' if high < 1 else 'no difference'


def others_share(before: Sequence[int], after: Sequence[int]) -> float:
  """Of (ticks worked, all ticks, ticks worked by those who measure) at two times: what others took of all."""
  worked, total, own = (b - a for a, b in zip(before, after, strict=True))
  return max(worked - own, 0) / max(total, 1)


def quiet(others: float | None) -> bool:
  """Whether others left the machine to those who measure, so far as is known."""
  return others is None or others <= MAX_OTHERS


def share_percent(bare_over_loop: float) -> float:
  """The percentage of the loop's time that the bare steps do not explain, from a ratio of times."""
  return 100 * (1 - bare_over_loop)


def overhead_verdict(bare: Sequence[float], loop: Sequence[float]) -> str:
  """Whether the share stays below its goal. Pairs are measured seconds apart: their interval tells of all noise."""
  low, high = (share_percent(r) for r in reversed(paired_interval(bare, loop)))
  word = 'within' if high <= GOAL_PERCENT else 'above' if low > GOAL_PERCENT else 'not told from'
  return f'{word} {GOAL_PERCENT:g} %'
