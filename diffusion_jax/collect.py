"""`diffusion-jax sweep collect`: one table of a sweep, each metric averaged over training seeds.

A line is one run as one evaluation saw it: of the last step, by one average of the weights, with one sampler; a value
is mean ± standard error over seeds. Nothing is averaged silently: what lacks seeds is marked, what is missing is
listed, and where values are unlike (see `records`), or seeds were evaluated otherwise, only the reason is printed.
"""
import argparse
import csv
import io
import json
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from diffusion_jax import points, progress, records
from diffusion_jax.compare import plain
from diffusion_jax.points import Plan, Point
from diffusion_jax.progress import FINISHED
from diffusion_jax.records import Row, Run
from diffusion_jax.runtime.config import UserError
from diffusion_jax.svg import number, quantity, setting

SAID = 'step', 'ema', 'sampler', 'nfe', 'guidance', 'num_samples'
# These may differ between the evaluations of one line's seeds only if that is said, or not at all.
APART = 'step', 'seed', 'seeds', 'params_hash', 'nfe'


class Line(NamedTuple):
  """One run as one evaluation saw it; `rows` has the records of each of its finished points."""
  run: str
  planned: int
  rows: dict[Point, Row]

  def about(self, key: str) -> Any:
    """A setting of the evaluation; of several values the mean, as of the calls of an adaptive solver."""
    values = [records.first(row).get(key) for row in self.rows.values()]
    same = len({records.exactly(value) for value in values}) == 1
    return values[0] if same else statistics.fmean(values) if values and all(map(is_number, values)) else None

  def found(self, metric: str) -> dict[Point, dict]:
    """The record of each point that has a value of the metric."""
    found = {point: records.value_of(row, metric) for point, row in self.rows.items()}
    return {point: record for point, record in found.items() if is_number(record.get('value'))}

  def values(self, metric: str) -> list[float]:
    """The metric's value of each point that has one."""
    return [record['value'] for record in self.found(metric).values()]


def is_number(value: Any) -> bool:
  """Whether a value can be averaged."""
  return number(value) is not None and math.isfinite(value)


def error(values: Sequence[float]) -> float | None:
  """The standard error of the mean; None of fewer than two values, which say nothing of their spread."""
  return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def why_missing(point: Point, now: progress.State) -> str:
  """Why a point cannot be counted; '' where it can."""
  if now.state != FINISHED:
    return f'{now.state}{f": {now.note}" * bool(now.note)}'
  config = records.read_json(point.folder / 'config.json')
  if points.config_hash(config) != point.config_hash:
    return 'its config.json is not the config of the sweep'
  return ''


def evaluations(point: Point, ema: str | None, metrics: Sequence[str]) -> dict[tuple, Row]:
  """{settings: records} of a point's last step that has any of the metrics (or any score), by one average.

  The average is `ema`, by default the config's first, or raw weights where there is nothing else. Of several samplings
  with the same settings it is the one over several seeds, else the newest.
  """
  config = records.read_json(point.folder / 'config.json')
  # Of all records only these: reading the metrics of every step would take longest.
  run = Run._make([None] * len(Run._fields))._replace(evals=records.read_lines(point.folder / 'eval.jsonl'))
  wanted = lambda metric: metric in metrics if metrics else records.is_score(metric)
  rows = [row for row in records.evaluations(run) if any(wanted(key.metric) for key in row)]
  of = lambda row, key: records.first(row).get(key)
  last = [row for row in rows if of(row, 'step') == of(rows[-1], 'step')]
  emas = [of(row, 'ema') for row in last]
  known = [*(config.get('ema') or {}), *(name for name in emas if name != 'raw'), 'raw']
  chosen = ema or next((name for name in known if name in emas), None)
  found = {}
  for row in last:
    key = tuple(records.exactly(of(row, key)) for key in records.SETTINGS if key not in APART)
    if of(row, 'ema') == chosen and (of(row, 'seeds') or key not in found or not of(found[key], 'seeds')):
      found[key] = row
  return found


def lines_of(plan: Plan, chosen: Sequence[Point], ema: str | None, metrics: Sequence[str],
             ) -> tuple[list[Line], dict[Point, str]]:
  """(lines in the order of the sweep, {point that is missing: why}). Raises Unusable where seeds are not alike."""
  lines, missing, planned = [], {}, {}
  for point in chosen:
    planned.setdefault(point.run, []).append(point)
  for run, seeds in planned.items():
    groups = {}
    for point in seeds:
      why = why_missing(point, progress.state(point, plan.evaluate))
      rows = {} if why else evaluations(point, ema, metrics)
      if not rows:
        has = f'no {", ".join(metrics) or "scores"}{f" by {ema}" * bool(ema)} in eval.jsonl'
        missing[point] = why or f'finished, with {has}'
      for key, row in rows.items():
        groups.setdefault(key, {})[point] = row
    lines += [Line(run, len(seeds), rows) for rows in groups.values()] or [Line(run, len(seeds), {})]
  for line in lines:
    for key in 'step', 'seed', 'seeds':
      values = {records.exactly(records.first(row).get(key)): point.name for point, row in line.rows.items()}
      if len(values) > 1:
        (a, one), (b, other) = [*values.items()][:2]
        raise records.Unusable(f'{one} was evaluated with {key} {a}, {other} with {b}: evaluate both alike.')
  return lines, missing


def check_alike(lines: Sequence[Line], metrics: Sequence[str]) -> None:
  """Raises Unusable where two values of a metric may not stand in one table."""
  for metric in metrics:
    found = [(point, record) for line in lines for point, record in line.found(metric).items()]
    for point, record in found[1:]:
      if why := records.unlike(found[0][1], record, (found[0][0].name, point.name)):
        raise records.Unusable(f'{why}.')


def cell(line: Line, metric: str) -> str:
  """'9.35 ± 0.12', with its n where seeds are lacking."""
  values = line.values(metric)
  if not values:
    return '-'
  mean, spread = statistics.fmean(values), error(values)
  words = quantity(metric, mean) + (f' ± {quantity(metric, spread, mean)}' if spread is not None else '')
  return words + f' (n={len(values)})' * (len(values) < line.planned)


def table(lines: Sequence[Line], metrics: Sequence[str]) -> list[str]:
  """The lines as text; '!' marks those that lack seeds."""
  rows = [['run', 'seeds', *SAID, *metrics]]
  for line in lines:
    lacks = len(line.rows) < line.planned
    seeds = f'{len(line.rows)} of {line.planned} !' if lacks else str(line.planned)
    said = ('-' if (value := line.about(key)) is None else setting(value) for key in SAID)
    rows.append([line.run, seeds, *said, *(cell(line, metric) for metric in metrics)])
  return columns(rows)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
  """Rows of words as lines in which the columns stand below each other."""
  rows = [[plain(word) for word in row] for row in rows]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return ['  '.join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def data(plan: Plan, lines: Sequence[Line], metrics: Sequence[str], missing: dict[Point, str]) -> dict[str, Any]:
  """All of it as plain data; a line without seeds has n 0 and no mean."""
  def about(line, metric):
    found = line.found(metric)
    values = [record['value'] for record in found.values()]
    return {
        'run': line.run, 'metric': metric, 'mean': statistics.fmean(values) if values else None,
        'standard_error': error(values), 'n': len(values), 'planned': line.planned,
        'lacking': [point.name for point in missing if point.run == line.run] + [
            point.name for point in line.rows if point not in found],
        **{key: line.about(key) for key in SAID}, 'sampling_seed': line.about('seed'),
        'sampling_seeds': line.about('seeds'),
        'values': {point.name: record['value'] for point, record in found.items()}}
  return {
      'sweep': plan.sweep, 'code': plan.code, 'complete': not missing,
      'missing': {point.name: why for point, why in missing.items()},
      'lines': [about(line, metric) for line in lines for metric in metrics or ['']],
      'folders': {point.name: point.folder.name for point in plan.points}}


def as_csv(found: dict[str, Any]) -> str:
  """The lines of `data` as comma-separated values; values by seed and what is lacking are joined by spaces."""
  text = io.StringIO()
  if found['lines']:
    writer = csv.DictWriter(text, [*found['lines'][0]], lineterminator='\n')
    writer.writeheader()
    for line in found['lines']:
      values = ' '.join(f'{name}={value!r}' for name, value in line['values'].items())
      writer.writerow(line | {'values': values, 'lacking': ' '.join(line['lacking'])})
  return text.getvalue()


def notes(chosen: Sequence[Point], plan: Plan, missing: dict[Point, str]) -> list[str]:
  """What stands under the table."""
  said = [f'missing: {point.name}: {plain(why)}' for point, why in missing.items()]
  versions = {}
  for point in chosen:
    if point not in missing:
      for code in {point.code, *progress.state(point, plan.evaluate).codes}:
        versions.setdefault(code, []).append(point.name)
  if len(versions) > 1:
    said.append('made by several code versions: ' + '; '.join(
        f'{code} {", ".join(names[:5])}{f" and {len(names) - 5} more" * (len(names) > 5)}'
        for code, names in versions.items()))
  return said


def stale(file: str, plan: Plan) -> list[str]:
  """A note where the sweep file is no longer the one that was run."""
  note = f'note: {file} is not as it was at `sweep run`, and this is of the sweep as it was then'
  return [note] * (points.file_hash(file) != plan.file_hash)


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of `sweep collect`."""
  parser.add_argument('--metric', default='', help='which, such as fid_5k,samples_per_second (default: all scores)')
  parser.add_argument('--ema', help="by which average, or raw (default: the config's first)")
  parser.add_argument('--out', metavar='FILE', help='also into FILE.csv or FILE.json')


def collect(flags: argparse.Namespace) -> int:
  """`sweep collect`."""
  out = pathlib.Path(flags.out) if flags.out else None
  if out and out.suffix not in ('.csv', '.json'):
    raise UserError(f'--out must end in .csv or .json, got {flags.out!r}')
  plan = points.load_plan(points.root_of(flags.file, flags.root))
  chosen = points.select(plan.points, flags.only)
  asked = [metric for metric in flags.metric.split(',') if metric]
  lines, missing = lines_of(plan, chosen, flags.ema, asked)
  have = {key.metric for line in lines for row in line.rows.values() for key in row}
  metrics = asked or sorted(filter(records.is_score, have), key=records.order)
  check_alike(lines, metrics)
  found = data(plan, lines, metrics, missing)
  print('\n'.join(table(lines, metrics)))
  print('± is one standard error over training seeds; the values are of the last step that was evaluated.')
  for note in [*notes(chosen, plan, missing), *stale(flags.file, plan)]:
    print(note)
  if out:
    from diffusion_jax.runtime import log
    log.write(out, as_csv(found) if out.suffix == '.csv' else json.dumps(log.plain(found), indent=1) + '\n')
    print(f'-> {out}')
  return 0
