"""The parts of a page that are about evaluations: the headline, the table of all values, the likelihood of each level.

With the standard library alone, like `report`, whose parts these are. No two unlike records (see `records`) ever share
a column.
"""
import json
from collections.abc import Iterable, Sequence
from html import escape as text
from itertools import groupby

from diffusion_jax import records, svg
from diffusion_jax.records import Column, Row, Run
from diffusion_jax.svg import NOTHING, confidence, interval, number, numbers, quantity, said, setting


def name(run: Run) -> str:
  """The run's label beside the colour of its curves."""
  return svg.swatch(run.colour) + text(run.label)


def headline(run: Run) -> str:
  """What the run reached, in one sentence about the evaluation that speaks for it; '' where there is none."""
  metric, row = records.headline(run)
  if not row:
    return ''
  base, n, _, over = records.named(metric)
  floors = ['_'.join(filter(None, parts)) for parts in ((base, n, 'floor', over), (base, n, 'floor'))]
  score, floor, speed = (records.value_of(row, *keys) for keys in ((metric,), floors, ('samples_per_second',)))
  beside = [f'{confidence(score)} interval {" to ".join(interval(score))}'] if interval(score) else []
  beside += said(floor, 'value', 'real held-out images score ')
  words = said(score, 'num_samples', 'from ', counted(score)) + said(score, 'nfe', '', ' network calls each')
  words += [over_seeds(score)] * bool(over)
  words += said(speed, 'value', '', f' samples per second{"".join(said(speed, "device", " on "))}')
  if run.done.get('images') != score.get('images'):
    words += said(score, 'images', 'after ', ' images')
  reached = f'<strong>{text(metric)} {quantity(metric, score.get("value"))}</strong>'
  return f'{reached}{" (" * bool(beside)}{"; ".join(beside)}{")" * bool(beside)} {", ".join(words)}'


def counted(record: dict) -> str:
  """What `num_samples` counts: a likelihood is of examples of a split."""
  return ' samples' if record.get('split') is None else ' examples'


def over_seeds(record: dict) -> str:
  """What a value over several seeds is: 'mean of 3 seeds', 'minimum of 3 seeds', '' for a value of one."""
  over, seeds = records.named(str(record.get('metric'))).over, record.get('seeds')
  many = f'{len(seeds)} seeds' if isinstance(seeds, list) else 'seeds'
  return f'{"mean" if over == "mean" else "minimum"} of {many}' if over else ''


# The table

def table(runs: Sequence[Run]) -> str:
  """A row for every evaluation of every run, and the records behind them; '' where there are none."""
  rows = [(run, row) for run in runs for row in records.evaluations(run)]
  if not rows:
    return ''
  found = list(records.columns(record for _, row in rows for record in row.values()))
  titles = ['sampler', *(heading(key, found, rows) for key in found)]
  head = ''.join(f'<th scope="col">{title}</th>' for title in titles)
  settings = [how(records.first(row)) for _, row in rows]
  same = [words for words in settings[0][1] if len(rows) > 1 and all(words in rest for _, rest in settings)]
  above = f'<p class="note">All evaluations: {", ".join(same)}.</p>' * bool(same)
  body = ''
  for (run, row), (main, rest) in zip(rows, settings, strict=True):
    label = f'{name(run)}<br>' * (len({run.folder for run in runs}) > 1)
    small = f'<small>{" · ".join(words for words in rest if words not in same)}</small>'
    cells = ''.join(cell(run, row.get(key)) for key in found)
    body += f'<tr><th scope="row">{label}{main}{small}</th>{cells}</tr>'
  return (f'{warnings(found, rows)}{above}<div class="scroll" tabindex="0" role="region" aria-label="Evaluations">'
          f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{behind(rows)}')


def behind(rows: Sequence[tuple[Run, Row]]) -> str:
  """The records of a table, where its links lead: what all of an evaluation's share is said once."""
  lines = ''
  for i, (run, row) in enumerate(rows):
    first, *others = row.values()
    shared = {key: value for key, value in first.items()
              if all(key in other and other[key] == value for other in others)} if others else {}
    parts = f'<li><b>all of them</b><code>{as_json(shared)}</code></li>' * bool(shared)
    for key, record in row.items():
      own = {name: value for name, value in record.items() if name not in shared}
      parts += (f'<li id="{records.anchor(run, record)}" tabindex="-1"><b>{text(key.metric)}</b>'
                f'<code>{as_json(own)}</code></li>')
    main, rest = how(first)
    title = ', '.join([f'{i + 1}. {text(run.label)}', main, *rest])
    lines += f'<li><details><summary>{title}</summary><ul class="listing">{parts}</ul></details></li>'
  return ('<details class="records"><summary>All records, with hashes and versions</summary>'
          f'<ul class="listing">{lines}</ul></details>')


def as_json(record: dict) -> str:
  """A record as it stands in its file."""
  return text(json.dumps(record, ensure_ascii=False), quote=False).replace("'", '&#x27;')  # " is harmless, and common


def linked(run: Run, record: dict, words: str) -> str:
  """Words, already markup, that lead to the record behind them."""
  return f'<a href="#{records.anchor(run, record)}">{words}</a>'


def how(record: dict) -> tuple[str, list[str]]:
  """How the samples of an evaluation were made: what made them, and its settings."""
  main = ', '.join(said(record, 'sampler') + said(record, 'estimator') + said(record, 'nfe', '', ' calls')) or 'unnamed'
  rest = said(record, 'images', 'at ', ' images') + said(record, 'num_samples', '', counted(record))
  rest += ['raw weights'] if record.get('ema') == 'raw' else said(record, 'ema', 'EMA ')
  seeds = record.get('seeds')
  for key in ('grid', 'guidance', 'seed', 'split'):
    rest += [f'{key} {text(setting(record[key]))}'] if record.get(key) is not None else []
  rest += [f'seeds {text(", ".join(map(str, seeds)))}'] if isinstance(seeds, list) else []
  return main, rest


def differing(key: Column, found: Iterable[Column]) -> list[str]:
  """The terms in which a column differs from another one of its metric."""
  others = [dict(other.terms) for other in found if other.metric == key.metric]
  return [term for term, value in key.terms if any(other[term] != value for other in others)]


def heading(key: Column, found: Sequence[Column], rows: Sequence) -> str:
  """The head of a column: its metric, a word on it, and what tells it from unlike values of the same metric."""
  one = next(row[key] for _, row in rows if key in row)
  differ = differing(key, found)
  if 'features_hash' in differ and 'features' in differ:  # the digest's phrase names them too
    differ.remove('features')
  apart = [records.term(one, term) for term in differ]
  name = records.named(key.metric)
  word = 'real held-out images' if name.floor else records.METRICS.get(records.family(key.metric), '')
  small = ''.join(f'<small>{line}</small>' for line in (word, text(', '.join(apart))) if line)
  return f'{text(key.metric).replace("_", "_<wbr>")}{small}'


def warnings(found: Sequence[Column], rows: Sequence) -> str:
  """A sentence for each reason why a column is apart from the first of its metric, and the metrics it holds for."""
  reasons = {}
  for metric, keys in groupby(found, key=lambda key: key.metric):
    (one, a), *others = [next((run, row[key]) for run, row in rows if key in row) for key in keys]
    for run, b in others:
      labels = (f'run {one.label}', f'run {run.label}') if one.label != run.label else ('one evaluation', 'another')
      why = records.unlike(a, b, labels).removeprefix(metric)
      reasons.setdefault(why, []).append(metric)
  return ''.join(
    '<p class="note warning"><strong>In columns of their own, not to be compared: '
    f'{text(", ".join(metrics))}.</strong> {text(metrics[0] + why)}.</p>' for why, metrics in reasons.items())


def cell(run: Run, record: dict | None) -> str:
  """A table's cell."""
  return f'<td{sort_by(record.get("value"))}>{value(record, run)}</td>' if record else f'<td>{NOTHING}</td>'


def sort_by(value) -> str:
  """The attribute that a cell is sorted by."""
  return f' data-v="{float(value)!r}"' if number(value) is not None else ''


def value(record: dict, run: Run | None = None) -> str:
  """A value over its interval, with what it is of several seeds; of a run, it leads to its record."""
  metric, found, error = str(record.get('metric')), record.get('value'), number(record.get('standard_error'))
  spread = f' ± {quantity(metric, error, found)}' if error is not None else ''
  seeds = f'<small>{over_seeds(record)}{" ± s.e." * bool(spread)}</small>' if over_seeds(record) else ''
  ends = f' <small>[{", ".join(interval(record))}]</small>' if interval(record) else ''
  shown = quantity(metric, found)
  return f'{linked(run, record, shown) if run else shown}{spread}{seeds}{ends}'


# Likelihood

def likelihood(runs: Sequence[Run]) -> str:
  """Bits of each level against logsnr, and the distortion that each rate leaves, of the files of `likelihood`."""
  bits, rates = [], []
  files = [(run, path) for run in runs for path in sorted(run.folder.glob('likelihood/*.json'))]
  for i, (run, path) in enumerate(files):
    record = records.read_json(path)
    words = [run.label] * (len(runs) > 1) + [str(record.get('metric', path.stem))]
    words += [f'{key} {record[key]}' for key in ('step', 'ema', 'split') if record.get(key) is not None]
    lists = [numbers(record.get(key)) for key in ('logsnr', 'rate', 'rmse')]
    level = numbers(record.get('level_bits', record.get('bits')))
    for series, xs, ys in (bits, lists[0], level), (rates, lists[1], lists[2]):
      points = [(x, y) for x, y in zip(xs, ys, strict=False) if x is not None]
      points, band = svg.thinned(points)
      series.append(svg.Series(', '.join(words), points, i, band=band))
  return svg.pair(svg.chart('Bits of each level', 'logsnr, from noise to data', bits, log=True),
                  svg.chart('Distortion left by a rate', 'bits per dimension sent', rates))
