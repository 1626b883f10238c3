"""Quality against cost: the part of a page that draws what more network calls, time, money or guidance bring.

With the standard library alone, like `report`. A curve joins evaluations of one run that differ in nothing but what is
on its axis, and unlike records (see `records`) never share one. The knee of a curve is its cheapest point whose
interval overlaps that of the best point: what costs more is not shown to be better.
"""
from collections.abc import Iterable, Sequence
from html import escape as text
from itertools import groupby
from typing import NamedTuple

from diffusion_jax import records, svg
from diffusion_jax.records import Column, Run
from diffusion_jax.svg import interval, number, numbers, quantity, setting

RING = 'cheapest that is not separable from the best'
class Point(NamedTuple):
  """A measured value, its interval where it has one, and where it lies on the axis."""
  x: float
  value: float
  low: float | None
  high: float | None
  record: dict


class Sweep(NamedTuple):
  """Evaluations of a run that differ in nothing but what is on the axis."""
  run: Run
  column: Column
  settings: dict
  points: list[Point]


def point(x: float, record: dict) -> Point:
  """A record at its place on the axis."""
  ends = sorted(end for end in numbers(record.get('ci')) if end is not None)
  return Point(x, record['value'], *(ends if len(ends) == 2 else (None, None)), record)


def sweeps(runs: Sequence[Run], over: str) -> list[Sweep]:
  """The sweeps over 'nfe' (or the number of steps, where no calls were counted) or 'guidance', at the last step."""
  found = []
  for run in runs:
    groups, settings = {}, {}
    for row in records.evaluations(run):
      for key, record in row.items():
        x = number(record.get('steps' if over == 'nfe' and record.get('nfe') is None else over))
        if x is None or number(record.get('value')) is None or not records.is_score(key.metric):
          continue
        shared = {k: record.get(k) for k in records.SETTINGS if k not in ('nfe', 'steps', over)}
        if over == 'guidance':  # which changes the calls of a step, not the steps
          shared['steps'] = record.get('nfe' if record.get('steps') is None else 'steps')
        made_as = tuple(map(records.exactly, shared.values()))
        groups.setdefault((key, made_as), {})[x] = point(x, record)
        settings[made_as] = shared
    kept = [Sweep(run, key, settings[made_as], [points[x] for x in sorted(points)])
            for (key, made_as), points in groups.items() if len(points) > 1]
    last = max((number(s.settings['step']) or 0 for s in kept), default=0)
    found += [s for s in kept if (number(s.settings['step']) or 0) == last]
  return found


def leading(found: Sequence[Sweep]) -> dict[Column, list[Sweep]]:
  """By column, the sweeps of the metric that speaks for each run: the first known one, averaged over seeds if it is."""
  groups = {}
  place = lambda s: (records.order(s.column.metric)[:3], ('mean', '', 'min').index(records.named(s.column.metric).over))
  for _, of_run in groupby(found, key=lambda s: s.run.folder):
    of_run = list(of_run)
    metric = min(of_run, key=place).column.metric
    for s in of_run:
      if s.column.metric == metric:
        groups.setdefault(s.column, []).append(s)
  return groups


def overlap(a: Point, b: Point) -> bool:
  """Whether both have intervals, and those meet: neither is shown to be better."""
  return None not in (a.low, b.low) and a.low <= b.high and b.low <= a.high


def knee(points: Sequence[Point], better: str) -> tuple[Point, Point]:
  """(best, enough): the best point, and the cheapest one whose interval overlaps the best one's."""
  best = min(points, key=lambda p: -p.value if better == records.HIGHER else p.value)
  return best, min([best, *(p for p in points if overlap(p, best))], key=lambda p: p.x)


def over_seeds(found: Sequence[Sweep]) -> list[list[Sweep]]:
  """The sweeps of one run by several seeds together, others alone."""
  sets = {}
  for s in found:
    settings = {key: value for key, value in s.settings.items() if key != 'params_hash'}
    sets.setdefault((s.run.group, s.column, tuple(map(records.exactly, settings.values()))), []).append(s)
  distinct = lambda part: len({s.run.index for s in part}) == len(part)
  return [part for same in sets.values() for part in ([same] if distinct(same) else [[s] for s in same])]


def curves(found: Sequence[Sweep], place=lambda p: p.x, ring: bool = True) -> list[svg.Series]:
  """The sweeps as curves, each of a colour of its own, against `place` of their points; seeds as mean and band."""
  made = []
  sets = over_seeds(found)
  one_each = len({part[0].run.group for part in sets}) == len(sets)
  for i, (s, *others) in enumerate(sets):
    if others:
      at = together([s, *others], place)
      made.append(svg.Series(label(s, found, 1 + len(others)), [(x, sum(ys) / len(ys)) for x, ys in at],
                             s.run.colour if one_each else i, band=[(x, min(ys), max(ys)) for x, ys in at]))
      continue
    points = sorted((p._replace(x=place(p)) for p in s.points if place(p) is not None), key=lambda p: p.x)
    better = records.better(s.column.metric)
    enough = knee(points, better)[1] if points and better and ring else None
    made.append(svg.Series(
      label(s, found), [(p.x, p.value) for p in points], s.run.colour if one_each else i,
      bars=[(p.x, p.low, p.high) for p in points if p.low is not None],
      ring=(enough.x, enough.value) if enough and enough.low is not None else None))
  return made


def together(sweeps: Sequence[Sweep], place) -> list[tuple[float, list[float]]]:
  """Where on the axis the seeds are on average, and their values there, at the settings that all of them have."""
  points = [{p.x: p for p in s.points if place(p) is not None} for s in sweeps]
  shared = [[of_seed[x] for of_seed in points] for x in points[0] if all(x in of_seed for of_seed in points)]
  return sorted((sum(map(place, row)) / len(row), [p.value for p in row]) for row in shared)


def label(sweep: Sweep, among: Sequence[Sweep], seeds: int = 1) -> str:
  """What tells a curve from the others."""
  parts = [sweep.run.label] if len({s.run.folder for s in among}) > 1 else []
  parts = [sweep.run.group, f'mean of {seeds} seeds'] if seeds > 1 else parts
  for key, value in sweep.settings.items():
    if key not in ('step', 'params_hash') and value is not None and any(s.settings.get(key) != value for s in among):
      before = {'sampler': '', 'ema': 'EMA '}.get(key, f'{key} ')
      parts.append('raw weights' if (key, value) == ('ema', 'raw') else f'{before}{setting(value)}')
  return ', '.join(parts) or str(sweep.settings.get('sampler') or sweep.run.label)


def wide(values: Iterable[float | None], factor: float) -> bool:
  """Whether values need a log axis."""
  known = [value for value in values if value is not None]
  return bool(known) and min(known) > 0 and max(known) > factor * min(known)


def chart(title: str, x_label: str, series: Sequence[svg.Series]) -> str:
  """A chart of measured points on axes that suit them."""
  return svg.chart(title, x_label, series, wide((y for s in series for _, y in s.points), 10),
                   wide((x for s in series for x, _ in s.points), 8), RING, dots=True)


COSTS = {  # metric: how it is said, and what becomes of its value
  'samples_per_second': ('time', 'ms an image', lambda value: 1000 / value if value > 0 else None),
  'latency_seconds': ('latency', 'ms an image', lambda value: 1000 * value),
  'cost_per_1000_images': ('price', 'for 1,000 images', float),
}


def against_cost(runs: Sequence[Run]) -> str:
  """Quality against network calls, time and price, and against guidance; '' where nothing was swept."""
  blocks = [block(key, found, by_cost(found)) for key, found in leading(sweeps(runs, 'nfe')).items()]
  guided = sweeps(runs, 'guidance')
  blocks += [block(key, found, by_guidance(found, guided)) for key, found in leading(guided).items()]
  return ''.join(blocks)


def block(key: Column, found: Sequence[Sweep], charts: tuple[list[str], list[str]]) -> str:
  """Charts of the sweeps of one column under what all of their values share, and sentences on them."""
  figures, sentences = charts
  record = found[0].points[0].record
  shared = [records.term(record, term) for term in ('features_hash', 'reference_hash', 'num_samples')
            if record.get(term) is not None]
  said = ''.join(f'<li>{sentence}</li>' for sentence in sentences)
  return (f'<p class="note">{text(", ".join([key.metric, *shared]))}</p>'
          f'<ul class="said">{said}</ul>{svg.pair(*figures)}')


def by_cost(found: Sequence[Sweep]) -> tuple[list[str], list[str]]:
  """The charts of quality against calls, time and price, and where each curve has its knee."""
  metric = found[0].column.metric
  figures = [chart(f'{metric} against network calls', 'network calls for an image', curves(found))]
  for cost in COSTS:
    if cost == 'latency_seconds' and len(figures) > 1:  # the time of an image in a batch says it already
      continue
    prices = {}  # by column, what each point costs: unlike costs get charts of their own
    for s in found:
      for p in s.points:
        for key, record in costs_of(s.run, p.record, cost).items():
          prices.setdefault(key, {})[id(p.record)] = record
    for key, known in prices.items():
      word, unit, convert = COSTS[cost]
      if cost == 'cost_per_1000_images':
        unit = f'{next(iter(known.values())).get("unit") or ""} {unit}'.strip()
      terms = [records.term(next(iter(known.values())), term) for term, value in key.terms if value != 'null']
      def place(p, known=known, convert=convert):
        return number(convert(known[id(p.record)]['value'])) if id(p.record) in known else None
      if any(sum(place(p) is not None for p in s.points) > 1 for s in found):
        figures.append(chart(' '.join([metric, 'against', word, *terms]), unit, curves(found, place)))
  return figures, [
    sentence for part in over_seeds(found) if len(part) == 1 and (sentence := knee_in_words(part[0], found))]


def costs_of(run: Run, record: dict, metric: str) -> dict[Column, dict]:
  """The newest values of a cost for samples that were made like those of a record, whatever their seed and number."""
  same = [k for k in records.SETTINGS if k not in ('seed', 'seeds', 'num_samples', 'split')]
  return {records.column(r): r for r in run.evals if r.get('metric') == metric and number(r.get('value')) is not None
          and all(records.exactly(r.get(k)) == records.exactly(record.get(k)) for k in same)}


def worth(p: Point) -> str:
  """A value with its interval."""
  ends = f' [{", ".join(interval(p.record))}]' if p.low is not None else ''
  return f'{quantity(str(p.record.get("metric")), p.value)}{ends}'


def knee_in_words(s: Sweep, among: Sequence[Sweep]) -> str:
  """How many network calls are enough; '' where it is not known what is better."""
  metric, whose = text(s.column.metric), f'{text(label(s, among))}: ' * (len(among) > 1)
  if not records.better(s.column.metric):
    return ''
  best, enough = knee(s.points, records.better(s.column.metric))
  calls = lambda p: f'{setting(p.x)} network call{"s" * (p.x != 1)}'
  if best.low is None:
    return f'{whose}{metric} is best at {calls(best)}, {worth(best)}; it has no interval to tell it from the others.'
  if enough.x < best.x:
    are = 'is' if enough.x == 1 else 'are'
    return (f'{whose}<strong>{calls(enough)} {are} enough</strong>: {metric} {worth(enough)} against {worth(best)} '
            f'at {setting(best.x)}; the intervals overlap.')
  more = '; more may be better still' if best.x == max(p.x for p in s.points) else ''
  return f'{whose}{metric} is best at {calls(best)}, {worth(best)}, and separable from all with fewer{more}.'


def by_guidance(found: Sequence[Sweep], others: Sequence[Sweep]) -> tuple[list[str], list[str]]:
  """The chart of quality against guidance, that of precision and recall, and which guidance is best."""
  metric, sentences, sides = found[0].column.metric, [], []
  figures = [chart(f'{metric} against guidance', 'guidance', curves(found, ring=False))]
  for s in found:
    if better := records.better(metric):
      best, _ = knee(s.points, better)
      close = ', '.join(setting(p.x) for p in s.points if p is not best and overlap(p, best))
      whose = f'{text(label(s, found))}: ' * (len(found) > 1)
      sentences.append(f'{whose}{text(metric)} is best at <strong>guidance {setting(best.x)}</strong>, {worth(best)}'
                       f'{"; not separable from it: " * bool(close)}{close}.')
  made_as = lambda s: (s.run.folder, {k: v for k, v in s.settings.items() if k != 'num_samples'})
  others = [other for other in others if other.column.metric.startswith(('precision', 'recall'))
            and not records.named(other.column.metric).over]
  for i, s in enumerate(found):
    for other in others:
      if made_as(other) == made_as(s) and other.column.terms == others[0].column.terms:
        side = records.named(other.column.metric).base
        [drawn] = curves([other], ring=False)
        words, colour = (f'{side}, {label(s, found)}', i) if len(found) > 1 else (side, side == 'recall')
        sides.append(drawn._replace(label=words, colour=colour, dashed=side == 'recall'))
  return [*figures, chart('precision and recall against guidance', 'guidance', sides)], sentences
