"""A paper's cells beside ours: which records of the point folders belong to a cell, and whether it is reproduced."""
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from diffusion_jax import records

# What a cell may be off by: a share of the paper's number, or of NLL bits per dimension. Re-runs of DDPM by others
# differ by more than this from each other; a paper's own 95 % interval is not known.
RELATIVE = {'fid': 0.05, 'is': 0.02}
BITS = 0.03
TOLERANCE = 'FID 5 %, IS 2 %, NLL 0.03 bits/dim, or the paper\'s number within our 95 % interval'
PASS, FAIL, NOT_RUN, NOT_COMPARABLE, NO_NUMBER = 'pass', 'fail', 'not run', 'not comparable', 'no number'


class Cell(NamedTuple):
  """One number of a paper's table."""
  table: str
  row: str
  column: str
  paper: float | None      # None: the paper gives none
  run: str                 # of the sweep; '' if there is none for it
  metric: str              # without the number of samples
  where: Mapping[str, Any] = {}  # what its record must say of the evaluation
  note: str = ''


class Scale(NamedTuple):
  """What the runs of a sweep file have to be compared with."""
  sweep: str               # the file, as point.json names it
  images: Mapping[str, int]  # that each run is trained on
  comparable: bool         # whether the budget is the paper's
  metrics: Mapping[str, str] = {}  # the metric that stands for another one here; None: nothing does


class Point(NamedTuple):
  """A point folder's records."""
  run: str
  seed: int
  folder: Path
  evals: list[dict]


class Result(NamedTuple):
  """Ours for a cell, as the mean over training seeds."""
  verdict: str
  value: float | None = None
  interval: tuple[float, float] | None = None  # of one seed, for the sampling of its images
  seeds: int = 0
  why: str = ''


def read_points(root: Path, sweep: str) -> list[Point]:
  """The points of a sweep file in the folders of `root`."""
  points = []
  for path in sorted(root.glob('*/point.json')):
    about = records.read_json(path)
    same = Path(str(about.get('sweep'))).parts[-2:] == Path(sweep).parts[-2:]
    if same and isinstance(about.get('run'), str):
      points.append(Point(about['run'], about.get('seed'), path.parent, records.read_lines(path.parent / 'eval.jsonl')))
  return points


def found(cell: Cell, metric: str, point: Point) -> list[dict]:
  """A point's records of a cell, whatever the number of samples, oldest first, of the last step that has any."""
  def belongs(record):
    name, value = records.named(str(record.get('metric'))), records.number(record.get('value'))
    return (name.base == metric and not name.floor and not name.over and value is not None and math.isfinite(value)
            and record.get('ema') != 'raw' and all(record.get(key) == wanted for key, wanted in cell.where.items()))

  alike = [record for record in point.evals if belongs(record)]
  last = max((records.number(r.get('step')) or 0 for r in alike), default=0)
  return [r for r in alike if (records.number(r.get('step')) or 0) == last]


def judge(cell: Cell, points: Sequence[Point], scale: Scale) -> Result:
  """What we have for a cell, and what it says."""
  metric = scale.metrics.get(cell.metric, cell.metric)
  if not metric:
    return Result(NOT_RUN, why='has no counterpart at this scale')
  chosen = []
  for point in points:
    alike = found(cell, metric, point) if point.run == cell.run else []
    # 50,000 samples, or the whole split, need no saying in a metric's name.
    chosen += ([r for r in alike if not records.named(r['metric']).n] or alike)[-1:]
  if not chosen:
    return Result(NOT_RUN)
  mean = fmean(r['value'] for r in chosen)
  ends = [records.number(end) for end in chosen[0].get('ci') or ()]
  known = len(chosen) == 1 and len(ends) == 2 and None not in ends
  result = Result('', mean, tuple(ends) if known else None, len(chosen))
  if why := _another_budget(cell, chosen, scale):
    return result._replace(verdict=NOT_COMPARABLE, why=why)
  if cell.paper is None:
    return result._replace(verdict=NO_NUMBER)
  allowed = RELATIVE[cell.metric] * cell.paper if cell.metric in RELATIVE else BITS
  near = abs(mean - cell.paper) <= allowed * (1 + 1e-9) or (known and ends[0] <= cell.paper <= ends[1])
  return result._replace(verdict=PASS if near else FAIL, why='' if near else
                         f'{mean - cell.paper:+.3g}, and {allowed:.2g} is allowed')


def _another_budget(cell, chosen, scale):
  """Why records are not of the paper's budget, '' where they are."""
  if not scale.comparable:
    return 'another budget'
  for record in chosen:
    name, images = records.named(record['metric']), scale.images[cell.run]
    if name.n:
      return f'{record["metric"]} is of {name.n} samples'
    if record.get('images') != images:
      return f'after {record.get("images")} images, and the paper\'s are {images}'
  return ''


def table(cells: Sequence[Cell], results: Sequence[Result]) -> str:
  """Markdown tables, one for each of the paper's."""
  lines, title = [], None
  for cell, result in zip(cells, results, strict=True):
    if cell.table != title:
      title = cell.table
      lines += ['', f'**{title}**', '', '| row | column | paper | ours | |', '|---|---|---|---|---|']
    lines.append(f'| {cell.row} | {cell.column} | {"-" if cell.paper is None else f"{cell.paper:.2f}"} | '
                 f'{_ours(result)} | {"; ".join(filter(None, (_verdict(result), cell.note)))} |')
  return '\n'.join(lines[1:])


def _ours(result):
  if result.value is None:
    return '-'
  ends = f' [{result.interval[0]:.2f}, {result.interval[1]:.2f}]' if result.interval else ''
  return f'{result.value:.2f}{ends}' + f' (mean of {result.seeds} seeds)' * (result.seeds > 1)


def _verdict(result):
  return {PASS: '**pass**', FAIL: '**fail**'}.get(result.verdict, result.verdict) + f': {result.why}' * bool(result.why)


def counted(results: Sequence[Result]) -> str:
  """'2 pass, 1 fail, 4 not run' for the kinds that there are."""
  verdicts = [result.verdict for result in results]
  kinds = PASS, FAIL, NOT_COMPARABLE, NO_NUMBER, NOT_RUN
  return ', '.join(f'{verdicts.count(kind)} {kind}' for kind in kinds if kind in verdicts)
