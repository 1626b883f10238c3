"""Run folders -> one self-contained HTML page: `diffusion-jax report RUN [RUN ...] [--out PAGE.html]`.

Reads only the records that the other commands leave in a run folder, with the standard library alone, so that a page
can be made where no jax is installed. The page loads nothing and runs no script: it works from file:// and in a mail.
A record can hold anything, so every string of one passes through `text` on its way to the page.
"""

import argparse
import base64
import json
import math
import os
import shlex
import string
import struct
import sys
from collections.abc import Callable, Sequence
from html import escape as text
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

TEMPLATE = Path(__file__).with_name('report_page.html')
# What makes one evaluation: records that agree in all of these share a row.
SETTINGS = ('step', 'ema', 'sampler', 'grid', 'nfe', 'guidance', 'seed', 'num_samples')
# The known metrics in the order of their columns, with a word on each; others follow them.
METRICS = {
  'fd_digits': 'lower is better', 'fd_digits_floor': 'real held-out digits', 'accuracy_digits': 'higher is better',
  'samples_per_second': '', 'latency_seconds': '', 'compile_seconds': '', 'peak_memory_bytes': '',
}
NOTHING = '&ndash;'  # where a number is missing


# Records

class Unusable(Exception):
  """What the user gave cannot be used; the message is a sentence for them."""


class Run(NamedTuple):
  """The records of one run folder; those that do not exist yet are empty."""
  folder: Path
  label: str
  colour: int
  config: dict
  made: dict      # run.json
  schedule: dict
  metrics: list   # one dict a logged step, by step
  evals: list     # one dict a measured value, oldest first
  done: dict


def read_json(path: Path) -> dict:
  """The object in a JSON file, {} where there is none yet: a page can be made at any moment of a run."""
  try:
    value = json.loads(path.read_text('utf-8', 'replace'))
  except (OSError, ValueError):
    return {}
  return value if isinstance(value, dict) else {}


def read_lines(path: Path) -> list[dict]:
  """The objects in a .jsonl file, without the lines that a killed process left half written."""
  records = []
  for line in path.read_text('utf-8', 'replace').split('\n') if path.is_file() else ():
    try:
      records.append(json.loads(line))
    except ValueError:
      continue
  return [record for record in records if isinstance(record, dict)]


def read_run(folder: Path, label: str, colour: int = 0) -> Run:
  """All records of a run folder. Raises Unusable where there is no run."""
  path = folder / 'config.json'
  if not folder.is_dir():
    raise Unusable(f'{folder} is not a folder.')
  if not path.is_file():
    raise Unusable(f'{folder} has no config.json, so it is not the folder of a run.')
  try:
    config = json.loads(path.read_text('utf-8'))
  except ValueError as e:
    raise Unusable(f'{path} is not JSON: {e}.') from e
  if not isinstance(config, dict):
    raise Unusable(f'{path} is not a JSON object.')
  # A resumed run logs some steps again: the last line of a step wins.
  steps = {line['step']: line for line in read_lines(folder / 'metrics.jsonl') if number(line.get('step')) is not None}
  return Run(
    folder, label, colour, config, read_json(folder / 'run.json'), read_json(folder / 'schedule.json'),
    [steps[step] for step in sorted(steps)], read_lines(folder / 'eval.jsonl'), read_json(folder / 'done.json'))


def read_runs(folders: Sequence[Path]) -> list[Run]:
  """The runs, labelled by the names of their folders where those differ and by their paths where they do not."""
  names = [folder.resolve().name for folder in folders]
  labels = names if len(set(names)) == len(names) else list(map(str, folders))
  return [read_run(folder, label, i) for i, (folder, label) in enumerate(zip(folders, labels, strict=True))]


def evaluations(run: Run) -> list[dict[str, dict]]:
  """Metric -> record for each evaluation, by step and then by time: the last is the newest of the last step."""
  rows = {}
  for record in run.evals:
    key = json.dumps([record.get(setting) for setting in SETTINGS])
    rows[key] = rows.pop(key, {}) | {str(record.get('metric')): record}
  return sorted(rows.values(), key=lambda row: number(next(iter(row.values())).get('step')) or 0)


# Numbers and words

def number(value) -> float | None:
  """The value where it is a number that can be drawn, else None: records hold null, NaN, infinities, and mistakes."""
  return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100 else None


def numbers(values) -> list[float | None]:
  """`number` of each member of what should be a list."""
  return [number(value) for value in values] if isinstance(values, list) else []


def shown(value, like=None) -> str:
  """A number to three digits: 812, 9.35, 0.0123; whole ones in full: 64,000. An interval looks like its value."""
  like = number(value if like is None else like)
  if number(value) is None or like is None:
    return NOTHING
  if isinstance(value, int):
    return f'{value:,}'
  exponent = math.floor(math.log10(abs(like))) if like else 0
  return f'{value:,.{max(2 - exponent, 0)}f}' if -5 < exponent < 9 else f'{value:.2e}'


def duration(seconds) -> str:
  """Seconds as one would say them: 12 ms, 58.2 s, 1 min 15 s, 2 h 5 min, 3 d 4 h."""
  if number(seconds) is None:
    return NOTHING
  for size, unit, rest, part in (86400, 'd', 3600, 'h'), (3600, 'h', 60, 'min'), (60, 'min', 1, 's'):
    if seconds >= size:
      return f'{seconds // size:,.0f} {unit} {seconds % size // rest:.0f} {part}'
  return f'{seconds:.3g} s' if seconds >= 1 else f'{seconds * 1000:.3g} ms'


def quantity(metric: str, value, like=None) -> str:
  """A value of a metric in the unit that the metric's name ends in: bytes are binary, 1.5 GiB."""
  if metric.endswith('_seconds'):
    return duration(value)
  if not metric.endswith('_bytes') or number(value) is None:
    return shown(value, like)
  power = min(int(math.log2(max(value, 1)) / 10), 4)
  return f'{value / 1024**power:.4g} {("B", "KiB", "MiB", "GiB", "TiB")[power]}'


def interval(record: dict) -> list[str]:
  """Both ends of a record's interval, [] where it has none."""
  ends = numbers(record.get('ci'))
  known = len(ends) == 2 and None not in ends
  return [quantity(str(record.get('metric')), end, record.get('value')) for end in ends] if known else []


# Charts

class Series(NamedTuple):
  """One curve: points (x, y), where None is a gap, over a shaded band of (x, low, high)."""
  label: str
  points: list
  colour: int = 0
  dashed: bool = False
  band: Sequence = ()


def ticks(low: float, high: float, log: bool = False) -> list[float]:
  """About five round numbers in [low, high]: multiples of 1, 2 or 5 times a power of ten."""
  if log and high > 10 * low:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marks = (1, 2, 5) if high < 200 * low else (1,)
    every = -(-(last - first) // 6)
    return [m * 10.0**p for p in range(first, last + 1) if p % every == 0 for m in marks if low <= m * 10.0**p <= high]
  power = 10.0 ** math.floor(math.log10((high - low) / 5))
  step = next(m * power for m in (1, 2, 5, 10) if high - low <= 5.5 * m * power)
  return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def axis(values: Sequence[float], start: int, end: int, log: bool = False, margin: float = 0):
  """(place, ticks): `place` maps values to the pixels from `start` to `end`."""
  warp = math.log10 if log else float
  low, high = warp(min(values)), warp(max(values))
  if high - low > 1e-9 * max(abs(low), abs(high), 1e-9):
    margin *= high - low
  else:  # one value alone is no range
    margin = max(abs(low), 1) / 2
  low, high = low - margin, high + margin
  place = lambda value: start + (warp(value) - low) / (high - low) * (end - start)
  return place, ticks(10.0**low, 10.0**high, True) if log else ticks(low, high)


def tick_label(value: float) -> str:
  """0.5, 200, 64k, 1.5M."""
  factor, suffix = next(((f, s) for f, s in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')) if f <= abs(value) < 1e12), (1, ''))
  return f'{value / factor:g}{suffix}'


def outline(points: Sequence, x: Callable, y: Callable) -> str:
  """An SVG path: the pen is lifted at a gap, and a point between two gaps is a dot."""
  path, down = '', False
  for at, value in points:
    gap = at is None or value is None
    if not gap:
      path += f'{"L" if down else "M"}{x(at):.1f},{y(value):.1f}{"" if down else "h0"}'
    down = not gap
  return path


def chart(title: str, x_label: str, series: Sequence[Series], log: bool = False) -> str:
  """A line chart, '' where there is nothing to draw; `log` asks for a log scale, given where all values allow it."""
  several, series = len(series) > 1, [s for s in series if any(None not in point for point in s.points)]
  if not series:
    return ''
  xs = [x for s in series for x, _ in s.points if x is not None]
  ys = [y for s in series for point in (*s.points, *s.band) for y in point[1:] if y is not None]
  log = log and min(ys) > 1e-100
  (x, x_ticks), (y, y_ticks) = axis(xs, 44, 408), axis(ys, 214, 8, log, margin=.05)
  parts = [f'<text class="x" x="226" y="252">{text(x_label)}</text>']
  parts += [f'<text class="x" x="{x(tick):.1f}" y="231">{tick_label(tick)}</text>' for tick in x_ticks]
  parts += [f'<path class="rule" d="M44,{y(tick):.1f}H408"/>'
            f'<text class="y" x="38" y="{y(tick) + 4:.1f}">{tick_label(tick)}</text>' for tick in y_ticks]
  for s in series:
    colour = f'c{s.colour % 8}'
    for gap, edges in groupby(s.band, key=lambda edge: None in edge):
      edges = list(edges)
      around = [(at, high) for at, _, high in edges] + [(at, low) for at, low, _ in reversed(edges)]
      if not gap:
        parts.append(f'<path class="band {colour}" d="{outline(around, x, y)}Z"/>')
    parts.append(f'<path class="curve {colour}{" dashed" * s.dashed}" d="{outline(s.points, x, y)}"/>')
    parts += [f'<circle class="{colour}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="3">'
              f'<title>{text(s.label)}: {shown(value)} at {shown(at)}</title></circle>'
              for at, value in s.points[::len(s.points) // 80 + 1] if at is not None and value is not None]
  legend = ''.join(f'<li>{swatch(s.colour, s.dashed)}{text(s.label)}</li>' for s in series) * several
  return (f'<figure class="card"><figcaption>{text(title)}{" <small>(log scale)</small>" * log}</figcaption>'
          f'<svg class="chart" viewBox="0 0 420 256" role="img" aria-label="{text(title)}">{"".join(parts)}</svg>'
          f'<ul class="legend">{legend}</ul></figure>')


def swatch(colour: int, dashed: bool = False) -> str:
  """The sign of a curve in legends and headings."""
  return f'<span class="swatch c{colour % 8}{" dashed" * dashed}"></span>'


def thinned(points: list, most: int = 200) -> tuple[list, list]:
  """(points, band): of a long curve, the means of neighbours over the band from their least to their greatest."""
  if len(points) <= most:
    return points, []
  size, curve, band = -(-len(points) // most), [], []
  for i in range(0, len(points), size):
    at, ys = points[i][0], [y for _, y in points[i:i + size] if y is not None]
    curve.append((at, sum(ys) / len(ys) if ys else None))
    band.append((at, min(ys, default=None), max(ys, default=None)))
  return curve, band


# Parts of the page: some are about one run, and `each` repeats them; the others overlay or list all runs

def each(runs: Sequence[Run], part: Callable[[Run], str]) -> str:
  """The part of every run, under its name where there are several."""
  return ''.join((f'<h3>{name(run)}</h3>' if len(runs) > 1 else '') + part(run) for run in runs)


def name(run: Run) -> str:
  """The run's label beside the colour of its curves."""
  return swatch(run.colour) + text(run.label)


def note(run: Run, sentence: str, command: str, *flags: str) -> str:
  """What is missing and the command that makes it."""
  line = ' '.join(['diffusion-jax', command, f'--workdir={shlex.quote(str(run.folder))}', *flags])
  return f'<p class="note">{sentence}: <code>{text(line)}</code></p>'


def progress(run: Run) -> str:
  """How much the run has trained, '' where it has not."""
  record = run.done or (run.metrics[-1] if run.metrics else {})
  words = f'{shown(record.get("images"))} images in {duration(record.get("seconds"))}{"" if run.done else " so far"}'
  return words if number(record.get('images')) is not None else ''


def column(metric: str) -> int:
  """The place of a metric among the columns."""
  return list(METRICS).index(metric) if metric in METRICS else len(METRICS)


def summary(run: Run) -> str:
  """What the run reached, in one sentence about its last evaluation that has a score."""
  trained = f'trained on {progress(run)}' if progress(run) else 'not trained yet'
  is_score = lambda metric: not metric.endswith(('_floor', '_seconds', '_per_second', '_bytes'))
  rows = [row for row in evaluations(run) if any(map(is_score, row))]
  if not rows:
    return f'{trained.capitalize()}; not evaluated yet.'
  metric = min(filter(is_score, rows[-1]), key=column)
  score, floor, speed = (rows[-1].get(key, {}) for key in (metric, f'{metric}_floor', 'samples_per_second'))
  beside = [f'95 % interval {" to ".join(interval(score))}'] if interval(score) else []
  beside += said(floor, 'value', f'real held-out {text(metric.partition("_")[2]) or "data"} score ')
  words = said(score, 'num_samples', 'from ', ' samples') + said(score, 'nfe', '', ' network calls each')
  words += said(speed, 'value', '', f' samples per second{"".join(said(speed, "device", " on "))}')
  if run.done.get('images') != score.get('images'):
    words += said(score, 'images', 'after ', ' images')
  reached = f'<strong>{text(metric)} {quantity(metric, score.get("value"))}</strong>'
  return f'{reached}{" (" * bool(beside)}{"; ".join(beside)}{")" * bool(beside)} {", ".join(words)}; {trained}.'


def said(record: dict, key: str, before: str = '', after: str = '') -> list[str]:
  """A value of a record among words, as a list that is empty where there is none."""
  value = record.get(key)
  return [] if value is None else [f'{before}{text(value) if isinstance(value, str) else shown(value)}{after}']


def picture(path: Path, caption: str, alt: str, width: int) -> str:
  """An image inside the page, enlarged by a whole factor up to `width`: small digits keep square pixels."""
  data = path.read_bytes()
  if data[:8] == b'\x89PNG\r\n\x1a\n' and len(data) > 24:
    kind, (w, h) = 'png', struct.unpack('>II', data[16:24])
  elif data[:4] == b'GIF8' and len(data) > 10:
    kind, (w, h) = 'gif', struct.unpack('<HH', data[6:10])
  else:
    return f'<p class="note">{text(path.name)} is not a picture, or still being written.</p>'
  wide = w * (width // max(w, 1)) or width
  pixels = ' class="pixels"' if wide >= w else ''
  source = f'data:image/{kind};base64,{base64.b64encode(data).decode()}'
  return (f'<figure><img{pixels} src="{source}" alt="{text(alt)}" width="{wide}" '
          f'height="{round(wide * h / max(w, 1))}"><figcaption>{text(caption)}</figcaption></figure>')


def found(run: Run, file: str) -> list[Path]:
  """The files of this name in the folders of samples, the default folder first."""
  return sorted(run.folder.glob(f'samples/*/{file}'), key=lambda path: (path.parent.name != 'final', path))


def samples(run: Run) -> str:
  """The newest samples large, and how training came to them small."""
  during = sorted((p for p in run.folder.glob('samples/*.png') if p.stem.isdecimal()), key=lambda p: int(p.stem))
  large = found(run, 'grid.png') or [during.pop() for _ in during[-1:]]
  if not large:
    return note(run, 'No samples yet', 'sample')
  if len(during) > 8:
    during = [during[round(i * (len(during) - 1) / 7)] for i in range(8)]
  def show(path, width):
    when = f'{int(path.stem):,} images' if path.stem.isdecimal() else f'samples/{path.parent.name}'
    return picture(path, when, f'Grid of samples of {run.label}: {when}', width)
  film = ''.join(show(path, 120) for path in during)
  return f'<div class="pictures">{"".join(show(path, 480) for path in large)}<div class="film">{film}</div></div>'


def denoising(run: Run) -> str:
  """The way from noise to samples, as a strip and as a film."""
  alt = f'Samples of {run.label} on their way from noise to data'
  ways = [picture(path, 'from noise to data', alt, 960) for path in found(run, 'strip.png')]
  ways += [picture(path, 'the same as a film', f'{alt}, as a film', 320) for path in found(run, 'trajectory.gif')]
  return f'<div class="pictures">{"".join(ways)}</div>' if ways else note(
    run, 'No trajectory yet', 'sample', '--trajectory')


def evaluation(runs: Sequence[Run]) -> str:
  """A row for every evaluation of every run, and the records behind them."""
  rows = [(run, row) for run in runs for row in evaluations(run)]
  missing = ''.join(note(run, 'Not evaluated yet', 'evaluate') for run in runs if not run.evals)
  if not rows:
    return missing
  metrics = sorted(dict.fromkeys(metric for _, row in rows for metric in row), key=column)
  head = ''.join(f'<th scope="col">{text(metric).replace("_", "_<wbr>")}<small>{METRICS.get(metric, "")}</small></th>'
                 for metric in ('sampler', *metrics))
  body, records = '', {}
  for run, row in rows:
    first = next(iter(row.values()))
    how = ', '.join(said(first, 'sampler') + said(first, 'nfe', '', ' calls')) or 'unnamed'
    rest = ' · '.join(
      said(first, 'images', 'at ', ' images') + said(first, 'num_samples', '', ' samples') + said(first, 'ema', 'EMA ')
      + said(first, 'grid', 'grid ') + said(first, 'guidance', 'guidance ') + said(first, 'seed', 'seed '))
    label = f'{name(run)}<br>' * (len(runs) > 1)
    cells = ''.join(cell(row.get(metric)) for metric in metrics)
    body += f'<tr><th scope="row">{label}{how}<small>{rest}</small></th>{cells}</tr>'
    records[f'{len(records) + 1}. {run.label}'] = row
  return ('<div class="scroll" tabindex="0" role="region" aria-label="Evaluations">'
          f'<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
          '<details class="records"><summary>All records, with hashes and versions</summary>'
          f'{listing(records)}</details>{missing}')


def cell(record: dict | None) -> str:
  """A value over its interval."""
  if not record:
    return f'<td>{NOTHING}</td>'
  ends = f' <small>[{", ".join(interval(record))}]</small>' if interval(record) else ''
  return f'<td>{quantity(str(record.get("metric")), record.get("value"))}{ends}</td>'


def training(runs: Sequence[Run]) -> str:
  """The loss as training went on, and where on the noise path it is now."""
  losses, bins = [], []
  for run in runs:
    points = [(number(line.get('images')), number(line.get('loss'))) for line in run.metrics]
    points, band = thinned([point for point in points if point[0] is not None])
    losses.append(Series(run.label, points, run.colour, band=band))
    bins.append(Series(run.label, loss_by_logsnr(run), run.colour))
  missing = (note(run, 'Not trained yet', 'train', '--config=CONFIG.py') for run in runs if not run.metrics)
  return (f'<div class="pair">{chart("Loss", "images seen", losses, log=True)}'
          f'{chart("Loss by logsnr", "logsnr, from noise to data", bins, log=True)}</div>{"".join(missing)}')


def loss_by_logsnr(run: Run) -> list:
  """The outline of the newest histogram of losses; an empty bin is a gap."""
  for line in reversed(run.metrics):
    edges, values = numbers(line.get('logsnr_bins')), numbers(line.get('loss_by_logsnr'))
    if len(edges) == len(values) + 1 and any(value is not None for value in values):
      return [(edge, value) for i, value in enumerate(values) for edge in edges[i:i + 2]]
  return []


def schedule(runs: Sequence[Run]) -> str:
  """alpha and sigma, and logsnr, against t."""
  scales, logsnrs = [], []
  for run in runs:
    alpha, sigma, logsnr = (schedule_curve(run, key) for key in ('alpha', 'sigma', 'logsnr'))
    if len(runs) == 1:
      scales += [Series('alpha', alpha, 0), Series('sigma', sigma, 1)]
    else:  # a colour is a run, so that sigma is told by its dashes
      scales.append(Series(f'{run.label}, alpha', alpha, run.colour))
      scales.append(Series(f'{run.label}, sigma', sigma, run.colour, dashed=True))
    logsnrs.append(Series(run.label, logsnr, run.colour))
  log = any(y is not None and y > 10 for s in scales for _, y in s.points)  # a ve path needs decades
  missing = (note(run, 'No schedule yet', 'train', '--config=CONFIG.py') for run in runs if not run.schedule)
  return (f'<div class="pair">{chart("alpha and sigma", "t, from data to noise", scales, log)}'
          f'{chart("logsnr", "t, from data to noise", logsnrs)}</div>{"".join(missing)}')


def schedule_curve(run: Run, key: str) -> list:
  """A column of the schedule's record against t."""
  return list(zip(numbers(run.schedule.get('t')), numbers(run.schedule.get(key)), strict=False))


def listing(value: dict | list) -> str:
  """Nested records as nested lists that open; closed, a function of a config reads as a call."""
  rows = ''
  for key, item in value.items() if isinstance(value, dict) else enumerate(value):
    opens = isinstance(item, dict) or (isinstance(item, list) and any(isinstance(part, dict | list) for part in item))
    function, rest = call(item)
    full = f'<code title="{text(str(item["fn"]))}">{text(function)}</code>' if function else ''
    line = f'<b>{text(str(key))}</b>{full}<code class="rest">{text(rest[:200] if opens else rest)}</code>'
    rows += f'<li><details><summary>{line}</summary>{listing(item)}</details></li>' if opens else f'<li>{line}</li>'
  return f'<ul class="listing">{rows}</ul>'


def call(value) -> tuple[str, str]:
  """A value on one line, its function apart: ('cosine', '(shift=1.0)'), ('', '[1, 2]')."""
  if isinstance(value, list):
    return '', f'[{", ".join("".join(call(member)) for member in value)}]'
  if not isinstance(value, dict):
    return '', repr(value)
  rest = ', '.join(f'{key}={"".join(call(item))}' for key, item in value.items() if key != 'fn')
  return (str(value['fn']).rpartition(':')[2], f'({rest})') if 'fn' in value else ('', rest)


def provenance(run: Run) -> str:
  """Where the run was made, by which command and code, and what came of it."""
  versions, command = run.made.get('versions'), run.made.get('command')
  facts = {
    'trained on': progress(run),
    'speed': ''.join(said(run.done, 'images_per_second', '', ' images per second')),
    'started': text(str(run.made.get('started', ''))),
    'device': ''.join(said(run.made, 'device')),
    'parameters': ''.join(said(run.made, 'parameters')),
    'versions': text(', '.join(f'{k} {v}' for k, v in versions.items())) if isinstance(versions, dict) else '',
    'revision': ''.join(said(run.made, 'git_revision', '<code>', '</code>')),
    'command': f'<code>{text(shlex.join(map(str, command)))}</code>' if isinstance(command, list) else '',
    'fingerprint': ''.join(said(run.done, 'fingerprint', '<code>', '</code>')),
    'folder': f'<code>{text(str(run.folder))}</code>',
  }
  return f'<dl class="facts">{"".join(f"<dt>{key}</dt><dd>{fact}</dd>" for key, fact in facts.items() if fact)}</dl>'


# The page

def page(runs: Sequence[Run]) -> str:
  """The whole page."""
  sections = {
    'Samples': each(runs, samples),
    'Evaluation': evaluation(runs),
    'Training': training(runs),
    'Denoising': each(runs, denoising),
    'Schedule': schedule(runs),
    'Config': each(runs, lambda run: listing(run.config)),
    'Provenance': each(runs, provenance),
  }
  label = lambda run: f'{name(run)}: ' * (len(runs) > 1)
  return string.Template(TEMPLATE.read_text('utf-8')).substitute(
    title=text(runs[0].label if len(runs) == 1 else f'{len(runs)} runs compared'),
    summary=''.join(f'<p class="lede">{label(run)}{summary(run)}</p>' for run in runs),
    links=''.join(f'<a href="#{title.lower()}">{title}</a>' for title in sections),
    body=''.join(f'<section id="{title.lower()}"><h2>{title}</h2>{body}</section>' for title, body in sections.items()),
    folders=', '.join(f'<code>{text(str(run.folder))}</code>' for run in runs))


def write(path: Path, content: str) -> None:
  """Writes a file so that a reader sees the old one or the new one, never half of it."""
  if not path.parent.is_dir() or path.is_dir():
    raise Unusable(f'{path} cannot be written: its folder is missing, or it is a folder itself.')
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    temporary.write_text(content, 'utf-8', 'xmlcharrefreplace')
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
  """The command."""
  parser = argparse.ArgumentParser('diffusion-jax report', description='Makes one HTML page from run folders.')
  parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='folder of a run')
  parser.add_argument('--out', type=Path, metavar='PAGE.html', help='default: RUN/report.html; report.html for several')
  args = parser.parse_args(argv)
  out = args.out or (args.runs[0] / 'report.html' if len(args.runs) == 1 else Path('report.html'))
  try:
    write(out, page(read_runs(args.runs)))
  except (Unusable, OSError) as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  print(out)
  return 0


if __name__ == '__main__':
  sys.exit(main())
