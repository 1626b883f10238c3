"""Which of several runs is best, by how much, and how sure: from the values of one metric over training seeds.

With the standard library alone. Every pair of runs is compared and the comparisons are counted: where all runs are in
truth the same, any of them is called better than any other in at most 5 % of sweeps, the choice of the best included.

Two runs differ if their means differ by more than both of
- Tukey's margin: the studentised range of as many runs, with one variance for all of them (Tukey 1953; Kramer 1956 for
  unequal numbers of seeds);
- Welch's margin (Welch 1947) at the level 5 % / k for k runs, so that runs whose seeds scatter widely are not judged by
  the scatter of the others. The variance of a run is its own, to which that of all runs is added as 1 - 2 / k more
  degrees of freedom: of three seeds alone it would be too wild to find anything. That both together keep the error
  rate where variances differ up to thirtyfold was found by simulation, and tests/test_verdict.py repeats a part of it.
Where every run has the same seeds, what a seed does to all runs alike is taken out first: the same seed means the same
order of data and the same noise. Two such runs are judged by the paired t test, which is exact.
"""
import functools
import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple

LEVEL = 0.95


class Pair(NamedTuple):
  """Two runs, the one with the better mean first: `difference` is at least 0, whether lower or higher is better."""
  better: str
  worse: str
  difference: float
  low: float        # of the simultaneous interval of the difference
  high: float
  p: float          # chance of a difference this large among as many equal runs
  separable: bool   # whether `low` is above 0


class Verdict(NamedTuple):
  """What can be said of the runs at this budget."""
  text: str
  best: str                # the run with the best mean; '' where nothing can be judged
  group: tuple[str, ...]   # the runs not separable from it, by their means, itself first
  pairs: tuple[Pair, ...]  # all pairs of judged runs, by their means
  unjudged: tuple[str, ...]  # runs with fewer than two finite values
  paired: bool             # whether the seeds' common effect was taken out


class Spread(NamedTuple):
  """A run's mean over `count` seeds, and the variance of one value with its degrees of freedom."""
  mean: float
  variance: float
  count: int
  df: float


def judge(values: Mapping[str, Mapping[Hashable, float | None]], lower: bool = True) -> Verdict:
  """The verdict on runs by name, of `values` {run: {seed: value}}; `lower` says whether lower is better.

  Values that are None, NaN or infinite count as missing, and the text says so.
  """
  found = {run: {seed: float(v) for seed, v in seeds.items() if v is not None and math.isfinite(v)}
           for run, seeds in values.items()}
  alone = tuple(run for run, seeds in found.items() if len(seeds) < 2)
  runs = {run: seeds for run, seeds in found.items() if run not in alone}
  notes = _missing(values, found)
  if len(runs) < 2:
    why = ('there is nothing to compare' if len(values) < 2 else 'one seed tells nothing of what another would give: '
           'train at least two runs with two seeds each, better three')
    return Verdict(' '.join([f'No verdict: {why}.', *notes]), '', (), (), alone, False)
  paired = len({frozenset(seeds) for seeds in runs.values()}) == 1
  spreads = (_blocks if paired else _apart)(runs)
  order = sorted(runs, key=lambda run: spreads[run].mean if lower else -spreads[run].mean)
  pooled = Spread(0.0, *_pool(spreads.values()))
  pairs = tuple(_pair(a, b, spreads, pooled, paired) for i, a in enumerate(order) for b in order[i + 1:])
  best = order[0]
  others = [pair for pair in pairs if pair.better == best]
  group = (best, *(pair.worse for pair in others if not pair.separable))
  if alone:
    notes.append(f'Of one seed, and not judged: {", ".join(alone)}.')
  text = _said(best, spreads, others, pooled.count)
  return Verdict(' '.join([text, *notes]), best, group, pairs, alone, paired)


# The statistics

def _apart(runs):
  """Each run by itself."""
  spreads = {}
  for run, seeds in runs.items():
    n, mean = len(seeds), math.fsum(seeds.values()) / len(seeds)
    spreads[run] = Spread(mean, math.fsum((v - mean) ** 2 for v in seeds.values()) / (n - 1), n, n - 1)
  return spreads


def _blocks(runs):
  """All runs over the same seeds: the variance is of what is left when the seeds' means are taken out."""
  k, seeds = len(runs), list(next(iter(runs.values())))
  n = len(seeds)
  of_seed = {seed: math.fsum(run[seed] for run in runs.values()) / k for seed in seeds}
  grand = math.fsum(of_seed.values()) / n
  spreads = {}
  for name, run in runs.items():
    mean, df = math.fsum(run.values()) / n, (n - 1) * (k - 1) / k
    spreads[name] = Spread(mean, math.fsum((run[s] - mean - of_seed[s] + grand) ** 2 for s in seeds) / df, n, df)
  return spreads


def _pool(spreads):
  """(variance, number of runs, degrees of freedom) of all runs together."""
  spreads = list(spreads)
  df = sum(s.df for s in spreads)
  return math.fsum(s.df * s.variance for s in spreads) / df, len(spreads), df


def _pair(a, b, spreads, pooled, paired):
  one, other, k = spreads[a], spreads[b], pooled.count
  difference = abs(one.mean - other.mean)
  whole = math.sqrt(pooled.variance * (1 / one.count + 1 / other.count))
  # A difference of rounding errors is none: without any spread there is nothing to judge by.
  if whole <= 1e-12 * max(abs(one.mean), abs(other.mean)):
    return Pair(a, b, difference, -math.inf, math.inf, 1.0, False)
  margin = critical(k, pooled.df) / math.sqrt(2) * whole
  p = chance(math.sqrt(2) * difference / whole, k, pooled.df)
  if not (paired and k == 2):  # which is the paired t test
    (u, m), (v, n) = (_own(spread, pooled) for spread in (one, other))
    own, df = math.sqrt(u + v), min((u + v) ** 2 / (u * u / m + v * v / n), pooled.df)
    df = max(math.floor(20 * df + 1e-6) / 20, 0.5)  # down to a twentieth: pairs then share what is computed for them
    margin = max(margin, critical(2, df, (1 - LEVEL) / k) / math.sqrt(2) * own)
    p = max(p, min(k * chance(math.sqrt(2) * difference / own, 2, df), 1.0))
  return Pair(a, b, difference, difference - margin, difference + margin, p, difference > margin)


def _own(spread, pooled):
  """(variance of a run's mean, its degrees of freedom), with the pooled variance's share."""
  more = 1 - 2 / pooled.count
  df = spread.df + more
  return (spread.df * spread.variance + more * pooled.variance) / df / spread.count, df


# In words

def _said(best, spreads, others, k):
  """The verdict in one or two sentences."""
  counts = sorted({spread.count for spread in spreads.values()})
  seeds = f'{counts[0]} seeds each' if len(counts) == 1 else f'{counts[0]} to {counts[-1]} seeds each'
  how = f'({seeds}, {100 * LEVEL:g} %' + f' with the comparisons of {k} runs counted' * (k > 2) + ')'
  beaten, close = ([p for p in others if p.separable is wanted] for wanted in (True, False))
  if all(math.isinf(pair.high) for pair in others):
    return (f'No verdict: {best} has the best mean, {spreads[best].mean:.4g}, but the seeds leave no '
            'scatter to judge by.')
  if not close:
    return f'{best} is better than {_listed(beaten)} {how}.'
  apart = f'not separable at this budget: {best} has the best mean, {spreads[best].mean:.4g}, '
  apart += f'and differs from {_listed(close)}'
  if not beaten:
    return f'{apart[0].upper()}{apart[1:]} {how}.'
  return f'{best} is better than {_listed(beaten)}; {apart} {how}.'


def amount(pair: Pair) -> str:
  """'1.2 [0.3, 2.1]': the difference and its interval, to a hundredth of the interval's width or so."""
  width = pair.high - pair.low
  if not 0 < width < math.inf:
    return f'{pair.difference:.3g} [unknown]'
  digits = max(1 - math.floor(math.log10(width / 2)), 0)
  return f'{pair.difference:.{digits}f} [{pair.low:.{digits}f}, {pair.high:.{digits}f}]'


def _listed(pairs):
  """'b by 1.2 [0.3, 2.1] and c by ...': of more than four, only the first and the last with the difference."""
  words = [pair.worse if 0 < i < len(pairs) - 1 and len(pairs) > 4 else f'{pair.worse} by {amount(pair)}'
           for i, pair in enumerate(pairs)]
  return f'{", ".join(words[:-1])} and {words[-1]}' if len(words) > 1 else words[0]


def _missing(values, found):
  """A sentence on values that are no numbers: a run that diverged must not look better for it."""
  lost = [f'{run} (seeds {", ".join(str(s) for s in seeds if s not in found[run])})'
          for run, seeds in values.items() if len(found[run]) < len(seeds)]
  return [f'Without finite values, and left out: {", ".join(lost)}.'] if lost else []


# The studentised range: (largest - smallest) of k normal means over an independent estimate of their deviation.

NODES = 240
WIDEST = 12.0  # the range of 100 normal values is above this with probability 1e-12


@functools.cache
def _ranges(k: int) -> tuple[tuple[float, float], ...]:
  """(w, P(range of k standard normal values > w) dw) for Simpson's rule over w = u^2, finest near 0."""
  below = lambda z: 0.5 * math.erfc(-z / math.sqrt(2))
  step = 0.1
  inner = [(z, below(z), step * math.exp(-z * z / 2) / math.sqrt(2 * math.pi))
           for z in (step * i - 8 for i in range(161))]
  nodes = []
  for i in range(1, NODES):
    u = math.sqrt(WIDEST) * i / NODES
    w = u * u
    within = k * math.fsum(weight * (cdf - below(z - w)) ** (k - 1) for z, cdf, weight in inner)
    nodes.append((w, max(1 - within, 0.0) * 2 * u * math.sqrt(WIDEST) / NODES * (2 + 2 * (i % 2)) / 3))
  return tuple(nodes)


@functools.lru_cache(10_000)
def _terms(k: int, df: float) -> tuple[tuple[float, float], ...]:
  """(w^2 df / 2, factor): P(q) is the sum of factor exp(-w^2 df / 2 / q^2) over q^df, in logarithms kept in range."""
  scale = math.log(2) + df / 2 * math.log(df / 2) - math.lgamma(df / 2)
  return tuple((w * w * df / 2, math.log(dw) + scale + (df - 1) * math.log(w)) for w, dw in _ranges(k) if dw > 0)


def chance(q: float, k: int, df: float) -> float:
  """P(studentised range of k means with df degrees of freedom > q), for k >= 2 and df >= 0.5.

  The integral over the range w of P(range > w) times the density of the deviation s = w / q that it would need.
  """
  if q <= 0:
    return 1.0
  df = min(df, 400.0)  # beyond, the deviation is as good as known
  power = df * math.log(q)
  return min(math.fsum(math.exp(log - power - c / (q * q)) for c, log in _terms(k, df)), 1.0)


@functools.lru_cache(10_000)
def critical(k: int, df: float, alpha: float = 1 - LEVEL) -> float:
  """The q with chance(q, k, df) = alpha."""
  above = lambda x: math.log(max(chance(math.exp(x), k, df), 1e-300) / alpha)
  low, high = 0.0, 1.0
  while above(high) > 0:
    low, high = high, 2 * high
  at_low, at_high = above(low), above(high)
  for _ in range(60):  # the false position, halved where one end stays (the Illinois method)
    middle = (low * at_high - high * at_low) / (at_high - at_low)
    found = above(middle)
    if abs(found) < 1e-10:
      break
    if found > 0:
      low, at_low, at_high = middle, found, at_high / 2
    else:
      high, at_high, at_low = middle, found, at_low / 2
  return math.exp(middle)
