"""The records of `run` as one page, and as a table in Markdown. No script; it works from file://."""
import base64
import io
from collections.abc import Sequence
from html import escape as text

import numpy as np
from PIL import Image

from diffusion_jax import report, svg
from diffusion_jax.svg import Series, shown
from experiments.analytic import distance, exact

DISTANCES = {'wasserstein': 'Wasserstein distance', 'sliced_wasserstein': 'sliced Wasserstein distance',
             'energy': 'energy distance'}
TITLES = {'ellipse': 'A Gaussian in the plane', 'three': 'Three modes on a line', 'ring': 'Eight modes on a circle',
          'moons': 'Two moons', 'digits': '8x8 digits, a finite set'}
TOP = 10  # what is further off than ten times the size of the data is drawn there
FAMILIES = {'one': 'one step at a time', 'multistep': 'multistep', 'random': 'with fresh noise'}
STYLE = '''
.narrow { max-width: 46rem }
.points circle { r: 1.6; fill: var(--c0); stroke: none; opacity: .55; pointer-events: none }
.points .bars { fill: var(--c0); opacity: .6; stroke: none }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem; margin: 1rem 0 }
.tiles.large { grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)) }
.tiles svg, .tiles img { display: block; width: 100%; height: auto; background: var(--card);
  border: 1px solid var(--line); border-radius: .25rem }
.reached { color: var(--c2); font-weight: 600 }
'''


# Records

def floors(records: Sequence[dict]) -> dict[str, dict]:
  """{data: the record of what perfect samples score}."""
  return {r['data']: r for r in records if r['metric'].endswith('_floor')}


def chosen(records: Sequence[dict], part: str, metric: str = '', **settings) -> list[dict]:
  """The records of a part with these settings; no metric means the distance to the data."""
  wanted = {**settings, 'part': part}
  return [r for r in records if all(r.get(k) == v for k, v in wanted.items())
          and (r['metric'] == metric if metric else r['metric'] in DISTANCES)]


def names(records: Sequence[dict], key: str) -> list[str]:
  """The different values of a setting, in order."""
  return list(dict.fromkeys(r[key] for r in records if key in r))


def ratio(record: dict, floor: dict) -> str:
  """A distance as a multiple of the floor: '1.34', '24.1'."""
  value = record['value'] / floor['value']
  return f'{value:.2f}' if value < 10 else shown(value)


def is_reached(record: dict, floor: dict) -> bool:
  """Whether samples are no further from the data than perfect samples were in the worst of their repeats."""
  return record['value'] <= floor['range'][1]


def reaches(records: Sequence[dict], floor: dict) -> int | None:
  """The smallest budget from which on all larger ones reach the floor, None if the largest does not."""
  found = None
  for r in sorted(records, key=lambda r: -r['budget']):
    if not is_reached(r, floor):
      break
    found = r['budget']
  return found


# Tables

def sampler_table(records: Sequence[dict]) -> tuple[list[str], list[list]]:
  """(head, rows): for each sampler and distribution, the distance at 20 evaluations and the budget that is enough."""
  floor, runs = floors(records), [r for r in records if r.get('part') in ('samplers', 'whole chain')]
  data = names(runs, 'data')
  head, rows = ['sampler', *data], []
  for sampler in names(chosen(runs, 'samplers'), 'sampler'):
    cells = []
    for d in data:
      mine = chosen(runs, 'samplers', data=d, sampler=sampler)
      at = [r for r in mine if r['budget'] == 20]
      cells.append((at[0] if at else None, reaches(mine, floor[d]), max((r['budget'] for r in mine), default=0)))
    rows.append([sampler, *cells])
  return head, rows


def words(cell, floor: dict) -> tuple[str, str]:
  """A cell of the table of samplers: ('1.3', 'from 20') or ('4.1', 'not by 200')."""
  at, enough, most = cell
  return (ratio(at, floor) if at else '-'), (f'from {enough}' if enough else f'not by {most}' if most else '')


def markdown(records: Sequence[dict]) -> str:
  """The table of samplers for a README."""
  floor, (head, rows) = floors(records), sampler_table(records)
  lines = ['| ' + ' | '.join(head) + ' |', '|---' * len(head) + '|']
  for name, *cells in rows:
    parts = [words(cell, floor[d]) for cell, d in zip(cells, head[1:], strict=True)]
    lines.append(f'| {name} | ' + ' | '.join(f'{a}, {b}' if b else a for a, b in parts) + ' |')
  whole = [r for d in head[1:] for r in chosen(records, 'whole chain', data=d)]
  if whole:
    found = {r['data']: ratio(r, floor[r['data']]) for r in whole}
    lines.append('| ancestral, all 1,000 steps | ' + ' | '.join(found.get(d, '-') for d in head[1:]) + ' |')
  return '\n'.join(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """An HTML table that scrolls by itself; cells are HTML."""
  top = ''.join(f'<th scope="col">{h}</th>' for h in head)
  body = ''.join('<tr>' + f'<th scope="row">{row[0]}</th>' + ''.join(f'<td>{c}</td>' for c in row[1:]) + '</tr>'
                 for row in rows)
  return (f'<div class="scroll" tabindex="0" role="region" aria-label="{text(head[0])}"><table><thead><tr>{top}</tr>'
          f'</thead><tbody>{body}</tbody></table></div>')


def samplers_section(records: Sequence[dict]) -> str:
  """The table of samplers."""
  floor, (head, rows) = floors(records), sampler_table(records)
  cells = []
  for name, *found in rows:
    line = [text(name)]
    for cell, d in zip(found, head[1:], strict=True):
      value, enough = words(cell, floor[d])
      mark = ' class="reached"' if cell[0] and is_reached(cell[0], floor[d]) else ''
      line.append(f'<span{mark}>{value}</span><small>{enough}</small>')
    cells.append(line)
  whole = {r['data']: r for r in chosen(records, 'whole chain')}
  if whole:
    cells.append(["ancestral<small>DDPM's 1,000 steps</small>", *(
      f'<span{" class=reached" * is_reached(whole[d], floor[d])}>{ratio(whole[d], floor[d])}</span>' if d in whole
      else svg.NOTHING for d in head[1:])])
  return table(['sampler', *(text(TITLES[d]) for d in head[1:])], cells)


def comparison(records: Sequence[dict], part: str, key: str) -> str:
  """A table of schedules or grids: the distance at 20 evaluations, and at 10 and 50."""
  runs, floor = chosen(records, part), floors(records)
  columns = [(d, s) for d in names(runs, 'data') for s in names(runs, 'sampler')]
  rows = []
  for name in names(runs, key):
    of = [r for r in runs if r[key] == name]
    path = of[0]['path'] if key == 'schedule' else ''
    line = [f'{text(name)}<small>{text(path)}</small>']
    for d, s in columns:
      found = {r['budget']: r for r in of if (r['data'], r['sampler']) == (d, s)}
      at = {b: ratio(found[b], floor[d]) for b in (10, 20, 50) if b in found}
      mark = ' class="reached"' if 20 in found and is_reached(found[20], floor[d]) else ''
      rest = '<br>'.join(f'{b}: {at[b]}' for b in (10, 50) if b in at)
      line.append(f'<span{mark}>{at.get(20, svg.NOTHING)}</span><small>{rest}</small>')
    rows.append(line)
  return table([key, *(f'{text(s)}<small>{text(TITLES[d])}</small>' for d, s in columns)], rows)


# Charts

def curves(title: str, y_label: str, series: Sequence[Series], floor: dict | None = None) -> str:
  """Both axes in logarithms, over network evaluations; the band is what perfect samples score."""
  series = [s._replace(points=[(x, y) for x, y in s.points if y is not None and 1e-12 < y < 1e12]) for s in series]
  series = [s for s in series if s.points]
  if not series:
    return ''
  xs = [x for s in series for x, _ in s.points]
  ys = [y for s in series for _, y in s.points] + (floor['range'] if floor else [])
  (x, _), (y, y_ticks) = svg.axis(xs, 44, 408, True), svg.axis(ys, 214, 8, True, margin=.05)
  marks = [m for m in (5, 10, 20, 50, 100, 200, 500, 1000) if min(xs) <= m <= max(xs)]
  parts = ['<text class="x" x="226" y="252">network evaluations</text>']
  parts += [f'<text class="x" x="{x(m):.1f}" y="231">{m}</text>' for m in marks]
  parts += [f'<path class="rule" d="M44,{y(t):.1f}H408"/><text class="y" x="38" y="{y(t) + 4:.1f}">{tick(t)}</text>'
            for t in y_ticks]
  if floor:
    low, high = (y(v) for v in floor['range'])
    parts.append(f'<path class="band c7" d="M44,{high:.1f}H408V{low:.1f}H44Z"/>')
  for s in series:
    parts.append(f'<path class="curve c{s.colour % 8}{" dashed" * s.dashed}" d="{svg.outline(s.points, x, y)}"/>')
    parts += [f'<circle class="c{s.colour % 8}" cx="{x(at):.1f}" cy="{y(v):.1f}" r="3"><title>{text(s.label)}: '
              f'{shown(v)} at {at}</title></circle>' for at, v in s.points]
  legend = ''.join(f'<li>{svg.swatch(s.colour, s.dashed)}{text(s.label)}</li>' for s in series)
  legend += f'<li><small>grey band: data against data, {shown(floor["value"])}</small></li>' if floor else ''
  return (f'<figure class="card"><figcaption>{text(title)} <small>{text(y_label)}, log scales</small></figcaption>'
          f'<svg class="chart" viewBox="0 0 420 256" role="img" aria-label="{text(title)}">{"".join(parts)}</svg>'
          f'<ul class="legend">{legend}</ul></figure>')


def tick(value: float) -> str:
  """0.01, and 1e-5 where zeros would not fit."""
  return f'{value:g}' if value >= 1e-3 else f'{value:.0e}'.replace('e-0', 'e-')


def lines(records: Sequence[dict], key: str) -> list[Series]:
  """A curve for each value of a setting, against the evaluations that were spent; equal curves are one."""
  labels = {}
  for name in names(records, key):
    points = tuple(sorted((r['nfe'], min(r['value'], TOP)) for r in records if r[key] == name))
    same = tuple((x, f'{y:.1e}') for x, y in points)
    labels.setdefault(same, (points, []))[1].append(name)
  return [Series(' = '.join(found), points, i % 8, dashed=i >= 8) for i, (points, found) in enumerate(labels.values())]


def data_section(records: Sequence[dict], pictures: Sequence[tuple], data: str) -> str:
  """All about one distribution: pictures, distances and errors."""
  floor, runs = floors(records)[data], chosen(records, 'samplers', data=data)
  unit = DISTANCES[next(r['metric'] for r in runs)]
  charts = [curves(f'To the data, {label}', unit, lines([r for r in runs if r['family'] == family], 'sampler'), floor)
            for family, label in FAMILIES.items()]
  errors = chosen(records, 'samplers', 'ode_error', data=data)
  charts += [curves(f'To the exact ODE, {label}', 'RMS error',
                    lines([r for r in errors if r['family'] == family], 'sampler'))
             for family, label in FAMILIES.items() if family != 'random']
  words = memory(records) if data == 'digits' else ''
  return f'{tiles(pictures, data)}{words}<div class="pair">{"".join(charts)}</div>'


def memory(records: Sequence[dict]) -> str:
  """What the finite set remembers, in one paragraph."""
  held = {r['metric']: r['value'] for r in records if r.get('part') == 'held out'}
  runs = chosen(records, 'samplers', 'nearest_training_digit')
  if not held or not runs:
    return ''
  found = [r['value'] for r in runs if r['budget'] >= 20]
  return (f'<p class="narrow">Memory, by construction: from 20 evaluations on, samples lie {shown(min(found))} to '
          f'{shown(max(found))} (RMS over pixels) from their nearest training digit, whatever the sampler; held-out '
          f'digits lie {shown(held["nearest_training_digit"])} from it, and score {shown(held["energy"])} in the '
          'distance below. At little noise the best denoiser of a set is a look-up in it; a network draws new digits '
          'because it is not perfect. In darker grey, below each row: the training digits nearest to it. So the error '
          'against the exact ODE is all or nothing: a sample ends at the right training digit or at another.</p>')


def tiles(pictures: Sequence[tuple], data: str) -> str:
  """Samples side by side, the data last."""
  draw = {1: histogram, 2: scatter}
  shown_ = ''.join(f'<figure>{draw.get(x0.shape[1], images)(x0)}<figcaption>{text(caption)}</figcaption></figure>'
                   for name, caption, x0 in pictures if name == data)
  return f'<div class="tiles{" large" * (data == "digits")}">{shown_}</div>' if shown_ else ''


def scatter(x0: np.ndarray) -> str:
  """Points of the plane in [-1.4, 1.4]."""
  at = 100 + 100 / 1.4 * x0 * [1, -1]
  dots = ''.join(f'<circle cx="{x:.0f}" cy="{y:.0f}"/>' for x, y in at if min(x, y) >= 0 and max(x, y) <= 200)
  return f'<svg class="points" viewBox="0 0 200 200" role="img" aria-label="samples">{dots}</svg>'


def histogram(x0: np.ndarray) -> str:
  """Counts of numbers in [-1.4, 1.4]."""
  counts, _ = np.histogram(x0, bins=56, range=(-1.4, 1.4))
  top = max(len(x0) / 6, 1)
  path = ''.join(f'V{200 - min(190 * c / top, 195):.0f}h{200 / 56:.3f}' for c in counts)
  return ('<svg class="points" viewBox="0 0 200 200" role="img" aria-label="histogram">'
          f'<path class="bars" d="M0,200{path}V200Z"/></svg>')


def images(x0: np.ndarray, columns: int = 8) -> str:
  """Digits in rows, each over the row of its nearest training digits."""
  train, rows = exact.points_of(exact.sources.load('digits', 'train')), []
  for start in range(0, len(x0) - len(x0) % columns, columns):
    part = x0[start:start + columns]
    rows += [part, train[distance.closest(part, train)]]
  tile = np.concatenate([np.concatenate(list(row.reshape(-1, 8, 8)), axis=1) for row in rows])
  gaps = np.kron(np.arange(len(rows)) % 2, np.ones(8))[:, None]  # the neighbours a little darker, to tell them apart
  pixels = np.clip((tile + 1) * 127.5 * (1 - 0.35 * gaps), 0, 255).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(pixels).resize((pixels.shape[1] * 4, pixels.shape[0] * 4), Image.Resampling.NEAREST).save(file, 'PNG')
  return f'<img alt="digits" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'


# The page

def render(records: Sequence[dict], pictures: Sequence[tuple], skipped: dict[str, str], seconds: float) -> str:
  """The whole page."""
  first, data = records[0], names(chosen(records, 'samplers'), 'data')
  sections = {'Samplers': ('samplers', INTRODUCTION + samplers_section(records))}
  for d in data:
    sections[TITLES[d]] = (d, data_section(records, pictures, d))
  if chosen(records, 'schedules'):
    sections['Schedules'] = ('schedules', SCHEDULES + comparison(records, 'schedules', 'schedule'))
  if chosen(records, 'grids'):
    charts = [curves(f'{TITLES[d]}, {s}', DISTANCES[chosen(records, 'grids', data=d)[0]['metric']],
                     lines(chosen(records, 'grids', data=d, sampler=s), 'grid'), floors(records)[d])
              for d in names(chosen(records, 'grids'), 'data') for s in names(chosen(records, 'grids'), 'sampler')]
    sections['Grids'] = ('grids', GRIDS + comparison(records, 'grids', 'grid')
                         + f'<div class="pair" style="margin-top:1rem">{"".join(charts)}</div>')
  left_out = ''.join(f'<li>{text(what)}: {text(why)}</li>' for what, why in skipped.items())
  versions = ', '.join(f'{k} {v}' for k, v in first['versions'].items() if k in ('jax', 'numpy'))
  sections['Provenance'] = ('provenance', (
    f'<p>{len(records):,} values in {svg.duration(seconds)} on {text(str(first["device"]))}; {text(versions)}; '
    f'revision <code>{text(str(first["git_revision"]))}</code>; seed {first["seed"]}; {text(first["time"])}.</p>'
    + (f'<p>Not run:</p><ul>{left_out}</ul>' if left_out else '')))
  links = ''.join(f'<a href="#{anchor}">{text(title)}</a>' for title, (anchor, _) in sections.items())
  body = ''.join(f'<section id="{anchor}"><h2>{text(title)}</h2>{part}</section>'
                 for title, (anchor, part) in sections.items())
  page = report.TEMPLATE.read_text('utf-8')
  style = page[page.index('<style>') + len('<style>'):page.index('</style>')]
  return f'''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>Error against network evaluations</title>
<style>{style}{STYLE}</style>
</head>
<body>
<header>
<h1>20 steps instead of 1,000?</h1>
<label class="toggle"><input type="checkbox" id="swap">Light / dark</label>
<p class="lede">Every sampler, schedule and grid of diffusion_jax on data whose best denoiser E[x0 | x] is known
exactly: what is wrong with the samples is the sampler's own doing, and no network's.</p>
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{body}
</main>
<footer>Made by <code>python -m experiments.analytic.run</code>; every number is a line of results.jsonl.</footer>
</body>
</html>
'''


INTRODUCTION = '''<p class="narrow">On DDPM's linear schedule in equal steps of logsnr, with each sampler's defaults.
Large: the distance to fresh data at 20 network evaluations, as a multiple of what perfect samples score (data against
data of the same number). Small: the budget from which on this distance cannot tell samples from data: they are no
further from it than the worst of 20 perfect draws. Green: at 20 already. A low-dimensional toy with a perfect denoiser
flatters high orders: trained networks err, and the error of a network is not among these numbers.</p>'''
SCHEDULES = '''<p class="narrow">Each schedule in equal steps of its own time, both ends included, so that the schedule
decides which noise levels are visited. Multiples of the floor at 20 evaluations; small: at 10 and 50. Some schedules
end far from pure noise, or stop far from data, and no number of steps mends that.</p>'''
GRIDS = '''<p class="narrow">DDPM's linear schedule visited in other steps. Multiples of the floor at 20 evaluations;
small: at 10 and 50.</p>'''
