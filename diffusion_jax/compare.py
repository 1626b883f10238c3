"""Run folders -> one table in text: `diffusion-jax compare RUN RUN [...] [--metric fid_5k,...] [--all]`.

A row is the newest evaluation of a run's last evaluated step: of several, one with most of the metrics, and of those
one of averaged weights. A column is a metric, and a value stands before its interval. Where the records of a metric are
unlike (see `records`) nothing is printed but the reason. Of two runs it is said whether each difference is separable:
larger than sqrt(a^2 + b^2), of the half-widths of the two intervals, which takes the two for independent.

With the standard library alone, like `report`.
"""
import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusion_jax import records
from diffusion_jax.records import Row, Run, Unusable
from diffusion_jax.svg import ends_of, number, plain, quantity, setting
from diffusion_jax.terminal import answer

SAID = ('step', 'sampler', 'nfe', 'guidance', 'ema', 'seed')  # of every row, besides its values


def chosen(run: Run, metrics: Sequence[str], every: bool) -> list[Row]:
  """All evaluations of a run that have any of the metrics, or the newest of the last step, averaged weights first.

  Raises Unusable where there is none.
  """
  wanted = lambda row: {key.metric for key in row} & {*metrics}
  rows = [row for row in records.evaluations(run) if wanted(row)]
  if not rows:
    known = sorted({key.metric for row in records.evaluations(run) for key in row}, key=records.order)
    has = f'only {", ".join(known)}' if known else 'run diffusion-jax evaluate first'
    raise Unusable(f'{run.folder} has no {" or ".join(metrics) or "scores"} in eval.jsonl: {has}.')
  last = [row for row in reversed(rows) if step(row) == step(rows[-1])]
  return rows if every else [max(last, key=lambda row: (len(wanted(row)), records.first(row).get('ema') != 'raw'))]


def scores(run: Run) -> set[str]:
  """The scores that a run has."""
  return {key.metric for row in records.evaluations(run) for key in row if records.is_score(key.metric)}


def step(row: Row) -> str:
  """The step of an evaluation, for comparison."""
  return records.exactly(records.first(row).get('step'))


def table(rows: Sequence[tuple[Run, Row]], metrics: Sequence[str]) -> list[str]:
  """The lines of the table."""
  lines = [['run', *SAID, *metrics]]
  for run, row in rows:
    first = records.first(row)
    made = ('-' if first.get(key) is None else setting(first[key]) for key in SAID)
    lines.append([run.label, *made, *(cell(records.value_of(row, metric)) for metric in metrics)])
  lines = [[plain(word) for word in line] for line in lines]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return ['  '.join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def cell(record: dict) -> str:
  """A value before its interval."""
  if number(record.get('value')) is None:
    return '-'
  ends, metric = ends_of(record), str(record.get('metric'))
  shown = [quantity(metric, end, record['value']) for end in ends]
  return quantity(metric, record['value']) + (f' [{", ".join(shown)}]' if ends else '')


def verdict(metric: str, labels: Sequence[str], a: dict, b: dict) -> str:
  """Whether two values differ by more than their intervals allow; '' where one of them has no confidence interval."""
  levels = [record.get('ci_level', 0.95) for record in (a, b)]
  values, (ends_a, ends_b) = [number(record.get('value')) for record in (a, b)], map(ends_of, (a, b))
  if None in (*levels, *values) or levels[0] != levels[1] or not (ends_a and ends_b):
    return ''
  half = math.hypot((ends_a[1] - ends_a[0]) / 2, (ends_b[1] - ends_b[0]) / 2)
  difference = values[1] - values[0]
  size = ' ± '.join(quantity(metric, part, max(abs(difference), half)) for part in (abs(difference), half))
  if abs(difference) <= half:
    return f'{metric}: not separable, the difference is {size}'
  better = records.better(metric)
  if not better:
    return f'{metric}: {labels[difference > 0]} is higher by {size}'
  return f'{metric}: {labels[(difference > 0) == (better == records.HIGHER)]} is better by {size}'


def compared(runs: Sequence[Run], metrics: Sequence[str], every: bool = False) -> str:
  """The whole answer. Raises Unusable where a run has nothing to show or two records are unlike."""
  if metrics:
    leading = {run.folder: metrics for run in runs}
  else:  # what all runs have goes first, if there is anything
    shared = sorted(set.intersection(*map(scores, runs)), key=records.order)[:1]
    leading = {run.folder: shared or sorted(scores(run), key=records.order) for run in runs}
  rows = [(run, row) for run in runs for row in chosen(run, leading[run.folder], every)]
  found = {key.metric for _, row in rows for key in row}
  if missing := [metric for metric in metrics if metric not in found]:
    raise Unusable(f'no evaluation has both {missing[0]} and the others: compare it by itself.')
  metrics = metrics or sorted(filter(records.is_score, found), key=records.order)
  for metric in metrics:
    values = [(run, record) for run, row in rows if (record := records.value_of(row, metric))]
    for (one, a), (other, b) in itertools.pairwise(values):
      names = (f'run {one.label}', f'run {other.label}') if one.label != other.label else ('one evaluation', 'another')
      if why := records.unlike(a, b, names):
        raise Unusable(f'{why}.')
  lines = table(rows, metrics)
  if len(runs) == 2 and not every:
    labels, firsts = [run.label for run in runs], [records.first(row) for _, row in rows]
    said = [verdict(metric, labels, *(records.value_of(row, metric) for _, row in rows)) for metric in metrics]
    differ = [key for key in SAID[1:] if len({records.exactly(first.get(key)) for first in firsts}) > 1]
    said += [f'The samples were not made alike: the runs differ in {", ".join(differ)}.'] * bool(differ)
    lines += ['', *map(plain, filter(None, said))] if any(said) else []
  return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  """The command."""
  parser = argparse.ArgumentParser('diffusion-jax compare', description='Puts the values of runs into one table.')
  parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='folder of a run')
  parser.add_argument('--metric', default='', help='which, such as fid_5k,samples_per_second (default: all scores)')
  parser.add_argument('--all', action='store_true', help='every evaluation, not the newest of the last step alone')
  args = parser.parse_args(argv)
  return answer(lambda: compared(records.read_runs(args.runs), [m for m in args.metric.split(',') if m], args.all))


if __name__ == '__main__':
  sys.exit(main())
