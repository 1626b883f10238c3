"""How values look on a page: numbers as words, curves as SVG charts, files as pictures, records as lists.

Pure text, with the standard library alone, that knows nothing of runs. No script: charts take their colours and lines
from the classes in the style sheet of report_page.html. Every string passes through `text` on its way to the page.
"""
import base64
import math
import struct
from collections.abc import Callable, Sequence
from html import escape as text
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

NOTHING = '&ndash;'  # where a number is missing
BEND = 0.1  # pixels of 420 that a curve may be straightened by
MOST_DOTS = 300  # of a chart that say their values


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


def said(record: dict, key: str, before: str = '', after: str = '') -> list[str]:
  """A value of a record among words, as a list that is empty where there is none."""
  value = record.get(key)
  return [] if value is None else [f'{before}{text(value) if isinstance(value, str) else shown(value)}{after}']


def setting(value) -> str:
  """A setting in words: numbers in full, 1.5 and 5,000, others as they are; not yet safe to stand on a page."""
  if number(value) is None:
    return str(value)
  return f'{value:,}' if isinstance(value, int) else f'{value:.6g}'


def interval(record: dict) -> list[str]:
  """Both ends of a record's interval, [] where it has none."""
  ends = numbers(record.get('ci'))
  known = len(ends) == 2 and None not in ends
  return [quantity(str(record.get('metric')), end, record.get('value')) for end in ends] if known else []


def ends_of(record: dict) -> list[float]:
  """Both ends of an interval as numbers, rising; [] where there is none."""
  ends = [end for end in numbers(record.get('ci')) if end is not None]
  return sorted(ends) if len(ends) == 2 else []


def plain(words: str) -> str:
  """Words that a terminal shows and does not obey."""
  return ''.join(c if c.isprintable() else '?' for c in words)


def confidence(record: dict) -> str:
  """The level of a record's interval, as it says: '90 %'; 95 % where it says nothing that can be a level."""
  level = number(record.get('ci_level'))
  return f'{100 * level if level is not None and 0 < level < 1 else 95:g} %'


# Charts

class Series(NamedTuple):
  """One curve: points (x, y), where None is a gap, over a shaded band of (x, low, high).

  Few and measured points have `bars`, their intervals (x, low, high), and are drawn; `ring` is one to look at.
  """
  label: str
  points: list
  colour: int = 0
  dashed: bool = False
  band: Sequence = ()
  bars: Sequence = ()
  ring: tuple | None = None


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
  path = ''
  for gap, run in groupby(points, key=lambda point: None in point):
    for i, (across, down) in enumerate(() if gap else straightened([(x(at), y(value)) for at, value in run])):
      path += f'{"L" if i else "M"}{across:.1f},{down:.1f}{"" if i else "h0"}'
  return path


def straightened(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
  """A line through fewer points, nowhere further than BEND from the one through all (Douglas & Peucker 1973)."""
  kept, waiting = {0, len(points) - 1}, [(0, len(points) - 1)]
  while waiting:
    first, last = waiting.pop()
    (x0, y0), (x1, y1) = points[first], points[last]
    length = math.hypot(x1 - x0, y1 - y0)
    away = [abs((x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)) / length if length else math.hypot(x - x0, y - y0)
            for x, y in points[first + 1:last]]
    if away and max(away) > BEND:
      middle = first + 1 + away.index(max(away))
      kept.add(middle)
      waiting += (first, middle), (middle, last)
  return [points[i] for i in sorted(kept)]


def chart(title: str, x_label: str, series: Sequence[Series], log: bool = False, log_x: bool = False,
          ring: str = '', dots: bool = False) -> str:
  """A line chart, '' where there is nothing to draw; `ring` says in the legend what is ringed.

  `log` and `log_x` ask for log scales, given where all values allow it; `dots` draws the points, as intervals do.
  """
  several, series = len(series) > 1, [s for s in series if any(None not in point for point in s.points)]
  if not series:
    return ''
  xs = [x for s in series for x, _ in s.points if x is not None]
  ys = [y for s in series for point in (*s.points, *s.band, *s.bars) for y in point[1:] if y is not None]
  log, log_x = log and min(ys) > 1e-100, log_x and min(xs) > 1e-100
  measured = dots or any(s.bars or s.ring for s in series)
  (x, x_ticks), (y, y_ticks) = axis(xs, 44, 408, log_x, margin=.04 * measured), axis(ys, 214, 8, log, margin=.05)
  parts = [f'<text class="x" x="226" y="252">{text(x_label)}</text>']
  parts += [f'<text class="x" x="{x(tick):.1f}" y="231">{tick_label(tick)}</text>' for tick in x_ticks]
  parts += [f'<path class="rule" d="M44,{y(tick):.1f}H408"/>'
            f'<text class="y" x="38" y="{y(tick) + 4:.1f}">{tick_label(tick)}</text>' for tick in y_ticks]
  every = sum(len(s.points) for s in series) // MOST_DOTS + 1
  for s in series:
    colour = coloured(s.colour)
    parts.append('<g>')
    for gap, edges in groupby(s.band, key=lambda edge: None in edge):
      edges = list(edges)
      around = [(at, high) for at, _, high in edges] + [(at, low) for at, low, _ in reversed(edges)]
      if not gap:
        parts.append(f'<path class="band {colour}" d="{outline(around, x, y)}Z"/>')
    parts += [f'<path class="bar {colour}" d="M{x(at):.1f},{y(low):.1f}V{y(high):.1f}'
              f'M{x(at) - 3:.1f},{y(low):.1f}h6M{x(at) - 3:.1f},{y(high):.1f}h6"/>' for at, low, high in s.bars]
    parts.append(f'<path class="curve {colour}{" dashed" * s.dashed}" d="{outline(s.points, x, y)}"/>')
    if s.ring:
      parts.append(f'<circle class="ring {colour}" cx="{x(s.ring[0]):.1f}" cy="{y(s.ring[1]):.1f}" r="8"/>')
    parts += [f'<circle class="{"dot " * measured}{colour}" cx="{x(at):.1f}" cy="{y(value):.1f}" r="3">'
              f'<title>{text(s.label)}: {shown(value)} at {shown(at)}</title></circle>'
              for at, value in s.points[::1 if measured else max(len(s.points) // 80 + 1, every)]
              if at is not None and value is not None]
    parts.append('</g>')
  legend = ''.join(f'<li>{swatch(s.colour, s.dashed)}{text(s.label)}</li>' for s in series) * several
  if any(s.ring for s in series):
    legend += f'<li><span class="ringed"></span>{text(ring)}</li>'
  scales = {(0, 0): '', (1, 0): ' <small>(log scale)</small>', (0, 1): ' <small>(log scale across)</small>',
            (1, 1): ' <small>(log scales)</small>'}[log, log_x]
  return (f'<figure class="card"><figcaption>{text(title)}{scales}</figcaption>'
          f'<svg class="chart" viewBox="0 0 420 256" role="img" aria-label="{text(title)}">{"".join(parts)}</svg>'
          f'<ul class="legend">{legend}</ul></figure>')


def pair(*figures: str) -> str:
  """Charts beside each other where there is room."""
  return f'<div class="pair">{"".join(figures)}</div>' if any(figures) else ''


def facts(rows: dict[str, str]) -> str:
  """Terms and what is said of them, already markup; those with nothing to say are left out."""
  return f'<dl class="facts">{"".join(f"<dt>{key}</dt><dd>{fact}</dd>" for key, fact in rows.items() if fact)}</dl>'


def swatch(colour: int, dashed: bool = False) -> str:
  """The sign of a curve in legends and headings."""
  return f'<span class="swatch {coloured(colour)}{" dashed" * dashed}"></span>'


def coloured(colour: int) -> str:
  """The classes of a colour: eight hues, then the same ones dotted."""
  return f'c{colour % 8}{" dotted" * (colour // 8 % 2)}'


def together(curves: Sequence[list]) -> tuple[list, list]:
  """(points, band): the mean of curves where all of them are, over the band from their least to their greatest.

  Of one curve the curve itself, without a band.
  """
  if len(curves) < 2:
    return curves[0] if curves else [], []
  xs = [x for x, _ in curves[0]]
  if any([x for x, _ in curve] != xs for curve in curves):
    found = [dict(curve) for curve in curves]
    xs = [x for x in found[0] if all(x in curve for curve in found)]
    curves = [[(x, curve[x]) for x in xs] for curve in found]
  points, band = [], []
  for x, ys in zip(xs, zip(*([y for _, y in curve] for curve in curves), strict=True), strict=True):
    gap = None in ys
    points.append((x, None if gap else sum(ys) / len(ys)))
    band.append((x, None, None) if gap else (x, min(ys), max(ys)))
  return points, band


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


# Pictures and nested records

def picture(path: Path, caption: str, alt: str, width: int, data: bytes | None = None) -> str:
  """An image inside the page, enlarged by a whole factor up to `width`: small digits keep square pixels.

  `data` is what is shown of the file, where that is not all of it.
  """
  data = path.read_bytes() if data is None else data
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
