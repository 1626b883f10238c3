"""The parts of a page that compare runs: the verdict, names over seeds, quality as training went on, configs.

With the standard library alone, like `report`. Only like values are compared (see `records`): of one metric whose
terms agree, and of samples that were made alike where the runs have such samples. What is left out is said by name.
"""
import statistics
from collections.abc import Iterable, Sequence
from html import escape as text
from typing import NamedTuple

from diffusion_jax import records, svg
from diffusion_jax.quality import linked, sort_by
from diffusion_jax.records import Column, Run
from diffusion_jax.svg import NOTHING, duration, number, quantity, shown
from diffusion_jax.verdict import Verdict, judge

# What the samples behind two values of a verdict are made by.
MADE = tuple(key for key in records.SETTINGS if key not in ('step', 'params_hash', 'seed'))
MOST_KEYS = 30  # of a table of differences
MOST_PAIRS = 150


class Compared(NamedTuple):
  """One metric over runs: the record that speaks for each of them, and why others have none."""
  column: Column
  chosen: list[tuple[Run, dict]]
  left_out: list[str]


# Which values are compared

def last_scores(run: Run) -> list[dict]:
  """The records of scores at the last step that has any, oldest first; of a run that diverged without a number."""
  rows = records.evaluations(run)
  known = [record for row in rows for key, record in row.items() if records.better(key.metric)
           and (record.get('value') is None or isinstance(record['value'], int | float))]
  last = known[-1].get('step') if known else None
  return [record for record in known if record.get('step') == last]


def made_by(record: dict) -> tuple[str, ...]:
  """How the samples of a record were made; network calls that an adaptive sampler chose are no setting."""
  calls = number(record.get('nfe'))
  chosen = calls is not None and calls % 1 != 0
  return tuple(records.exactly(None if chosen and key == 'nfe' else record.get(key)) for key in MADE)


def choose(runs: Sequence[Run]) -> Compared | None:
  """The column that most runs have, of those the one that is a headline, and a record of each run, made as most are."""
  of_run = {run.index: last_scores(run) for run in runs}
  by_column = {}
  for run in runs:
    for record in of_run[run.index]:
      by_column.setdefault(records.column(record), {}).setdefault(run.index, []).append(record)
  if not by_column:
    return None
  def place(item):
    key, having = item
    name, record = records.named(key.metric), next(iter(having.values()))[0]
    return (-len(having), records.order(name.base)[:2], -(number(record.get('num_samples')) or 0),
            ('mean', '', 'min').index(name.over))
  column, having = min(by_column.items(), key=place)
  shares = {}
  for found in having.values():
    for made in {made_by(record) for record in found}:
      shares[made] = shares.get(made, 0) + 1
  best = lambda found: max(reversed(found), key=lambda r: (shares[made_by(r)], r.get('ema') != 'raw'))
  chosen = [(run, best(having[run.index])) for run in runs if run.index in having]
  (first, like), *_ = chosen
  left_out = []
  for run in runs:
    if run.index not in having:
      same = [record for record in of_run[run.index] if record.get('metric') == column.metric]
      why = records.unlike(like, same[-1], (first.label, run.label)) if same else None
      left_out.append(why or f'{run.label} has no {column.metric}')
  return Compared(column, chosen, left_out)


def by_name(compared: Compared) -> dict[str, list[tuple[Run, dict]]]:
  """The chosen records of each name."""
  found = {}
  for run, record in compared.chosen:
    found.setdefault(run.group, []).append((run, record))
  return found


# The verdict

def judged(compared: Compared | None) -> Verdict | None:
  """The verdict over the names that have values; None where those are fewer than two."""
  if compared is None or len(by_name(compared)) < 2:
    return None
  values = {name: {run.index if run.seed is None else run.seed: number(record.get('value')) for run, record in members}
            for name, members in by_name(compared).items()}
  return judge(values, lower=records.better(compared.column.metric) == records.LOWER)


def conditions(compared: Compared) -> list[str]:
  """Sentences on what the values have in common, and warnings of what they have not."""
  found = [record for _, record in compared.chosen]
  images = sorted({number(record.get('images')) for record in found} - {None})
  calls = sorted({number(record.get('nfe')) for record in found} - {None})
  said = []
  if len(images) == 1:
    said.append(f'Budget: {shown(images[0])} training images each.')
  elif images:
    said.append(f'The budgets differ: from {shown(images[0])} to {shown(images[-1])} training images.')
  words = [f'{shown(calls[0])} network calls'] if len(calls) == 1 else []
  words += [f'{shown(found[0]["num_samples"])} samples'] if number(found[0].get('num_samples')) is not None else []
  said += [f'Each value is of {", ".join(words)}.'] * bool(words)
  differ = [key for i, key in enumerate(MADE) if len({made_by(record)[i] for record in found}) > 1]
  said += [f'The samples were not made alike: the runs differ in {", ".join(differ)}.'] * bool(differ)
  seeds = {name: {run.seed for run, _ in members} for name, members in by_name(compared).items()}
  every = set().union(*seeds.values()) - {None}
  missing = [f'{name} has no seed {", ".join(map(str, sorted(every - have)))}'
             for name, have in seeds.items() if None not in have and every - have]
  said += [f'Points are missing: {"; ".join(missing)}.'] * bool(missing)
  said += [f'Left out: {"; ".join(compared.left_out)}.'] * bool(compared.left_out)
  return said


def headline(compared: Compared | None, found: Verdict | None) -> str:
  """The verdict in words, '' where there is nothing to judge."""
  metric = f'<strong>{text(compared.column.metric)}.</strong>' if found else ''
  return f'<p class="lede verdict">{metric} {text(found.text)}</p>' if found else ''


def over_names(compared: Compared | None, found: Verdict | None) -> str:
  """What the verdict rests on: a row for each name, its mean, its seeds, its cost; '' for one value."""
  if compared is None or len(compared.chosen) < 2:
    return ''
  metric, names = compared.column.metric, by_name(compared)
  rows, values_of = '', {name: [v for _, record in members if (v := number(record.get('value'))) is not None]
                         for name, members in names.items()}
  means = {name: statistics.fmean(values) for name, values in values_of.items() if values}
  sign = -1 if records.better(metric) == records.HIGHER else 1
  for name in sorted(names, key=lambda name: (name not in means, sign * means.get(name, 0))):  # the best one first
    members, values, mean = names[name], values_of[name], means.get(name)
    error = statistics.stdev(values) / len(values) ** .5 if len(values) > 1 else None
    spread = f' ± {quantity(metric, error, mean)}' if error is not None else ''
    each = ', '.join(linked(run, record, quantity(metric, record.get('value'))) for run, record in members)
    mark = ''
    if found and name in found.group:
      mark = f'<small>{"best" if name == found.best else "not separable from the best"}</small>'
    seconds = [number(run.done.get('seconds')) for run, _ in members]
    known = [s for s in seconds if s is not None]
    time = sum(known) / len(known) if known else None
    images, calls = ([number(record.get(key)) for _, record in members] for key in ('images', 'nfe'))
    cells = ''.join(f'<td{sort_by(low(of))}>{spans(of)}</td>' for of in (images, calls))
    rows += (f'<tr><th scope="row">{svg.swatch(members[0][0].colour)}{text(name)}{mark}</th>'
             f'<td{sort_by(mean)}>{quantity(metric, mean)}{spread}</td>'
             f'<td{sort_by(len(values))}>{len(values)}</td><td{sort_by(low(values))}>{each}</td>{cells}'
             f'<td{sort_by(time)}>{duration(time)}</td></tr>')
  word = records.better(metric)
  heads = ('name', f'{text(metric).replace("_", "_<wbr>")}<small>{word}; mean ± s.e. over seeds</small>', 'seeds',
           'each seed', 'training images', 'network calls', 'training time')
  head = ''.join(f'<th scope="col">{title}</th>' for title in heads)
  said = ''.join(f'<li>{text(sentence)}</li>' for sentence in conditions(compared))
  return (f'<ul class="said">{said}</ul><div class="scroll" tabindex="0" role="region" aria-label="Names">'
          f'<table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
          f'{pairs(found, metric)}')


def pairs(found: Verdict | None, metric: str) -> str:
  """Every difference of two names with its interval, folded away; of many names those from the best one."""
  kept = found.pairs if found else ()
  kept = kept if len(kept) <= MOST_PAIRS else [pair for pair in kept if pair.better == found.best]
  if not kept:
    return ''
  rows = ''
  for pair in kept:
    ends = ', '.join(quantity(metric, end, pair.difference) for end in (pair.low, pair.high))
    rows += (f'<tr><th scope="row">{text(pair.better)}</th><td>{text(pair.worse)}</td>'
             f'<td{sort_by(pair.difference)}>{quantity(metric, pair.difference)} <small>[{ends}]</small></td>'
             f'<td{sort_by(pair.p)}>{shown(pair.p)}</td><td>{"yes" if pair.separable else "no"}</td></tr>')
  head = ''.join(f'<th scope="col">{title}</th>' for title in (
    'better mean', 'worse mean', 'difference<small>simultaneous 95 % interval</small>', 'p', 'separable'))
  return ('<details class="records"><summary>Every difference, with its interval</summary>'
          '<div class="scroll" tabindex="0" role="region" aria-label="Differences"><table class="sortable">'
          f'<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>')


def low(values: Iterable[float | None]) -> float | None:
  """The least known value."""
  return min((v for v in values if v is not None), default=None)


def spans(values: Sequence[float | None]) -> str:
  """One number where all agree, the least to the greatest where not."""
  known = [v for v in values if v is not None]
  if not known:
    return NOTHING
  return shown(min(known)) if min(known) == max(known) else f'{shown(min(known))} to {shown(max(known))}'


# As training went on

def while_training(runs: Sequence[Run], compared: Compared | None) -> str:
  """Charts of the verdict's metric against images seen and against training time; '' where no run has two steps."""
  if compared is None:
    return ''
  metric, made = compared.column.metric, {run.index: made_by(record) for run, record in compared.chosen}
  images, times = [], []
  for name, members in records.groups_of(run for run, _ in compared.chosen).items():
    ways = [way for run in members if len(way := values_by_images(run, compared.column, made[run.index])) > 1]
    if not ways:
      continue
    label = name if len(ways) == 1 else f'{name}, mean of {len(ways)} seeds'
    colour = members[0].colour
    for series, axis in ((images, 0), (times, 1)):
      curves = [[(row[axis], row[2]) for row in way] for way in ways]
      if axis and len(curves) > 1:  # seeds take unlike times for the same images
        when = dict(svg.together([[(row[0], row[1]) for row in way] for way in ways])[0])
        values, band = svg.together([[(row[0], row[2]) for row in way] for way in ways])
        points = [(when[x], y) for x, y in values if when[x] is not None]
        band = [(when[x], a, b) for x, a, b in band if when[x] is not None]
      else:
        points, band = svg.together(curves)
      points = [point for point in points if point[0] is not None]
      bars = []
      if len(ways) == 1:
        bars = [(row[axis], *row[3]) for row in ways[0] if row[3] and row[axis] is not None]
      series.append(svg.Series(label, points, colour, band=band, bars=bars))
  devices = {records.exactly(run.made.get('device')) for run, _ in compared.chosen}
  time = svg.chart(f'{metric} against training time', 'seconds of training', times * (len(devices) == 1), dots=True)
  note = '<p class="note">The runs were trained on unlike devices: their times are not drawn together.</p>'
  drawn = svg.pair(svg.chart(f'{metric} against images seen', 'images seen', images, dots=True), time)
  return drawn + note * bool(drawn and len(devices) > 1)


def values_by_images(run: Run, column: Column, made: tuple) -> list[tuple]:
  """(images, seconds of training or None, value, both ends of its interval or []) of each step, in order."""
  clock = {line['images']: line.get('seconds') for line in run.metrics if number(line.get('images')) is not None}
  if number(run.done.get('images')) is not None:
    clock.setdefault(run.done['images'], run.done.get('seconds'))
  found = {}
  for record in run.evals:
    at = number(record.get('images'))
    if at is not None and number(record.get('value')) is not None and made_by(record) == made \
        and records.column(record) == column:
      found[at] = (at, number(clock.get(at)), record['value'], svg.ends_of(record))
  return [found[at] for at in sorted(found)]


# Configs

def flat(value, key: str = '') -> dict[str, str]:
  """A config as one line for each key: {'net.channels': '64', 'process.path': 'cosine'}; of a function the name."""
  if not isinstance(value, dict):
    return {key: ''.join(svg.call(value))}
  found = {key: str(value['fn']).rpartition(':')[2]} if 'fn' in value else {}
  for name, item in value.items():
    if name != 'fn':
      found |= flat(item, f'{key}.{name}' if key else str(name))
  return found


def differing(configs: Sequence[dict[str, str]]) -> list[str]:
  """The keys in which flat configs differ."""
  keys = dict.fromkeys(key for config in configs for key in config)
  return [key for key in keys if len({config.get(key) for config in configs}) > 1]


def differences(runs: Sequence[Run]) -> str:
  """What the configs of the names differ in, as a table; '' where there is one name."""
  firsts = [members[0] for members in records.groups_of(runs).values()]
  if len(firsts) < 2:
    return ''
  configs = [flat(run.config) for run in firsts]
  keys = differing(configs)
  if not keys:
    return '<p class="note">The configs do not differ.</p>'
  more = f'<p class="note">{len(keys) - MOST_KEYS} more keys differ.</p>' * (len(keys) > MOST_KEYS)
  keys = keys[:MOST_KEYS]
  head = ''.join(f'<th scope="col">{text(key)}</th>' for key in ('name', *keys))
  rows = ''
  for run, config in zip(firsts, configs, strict=True):
    cells = ''.join(f'<td>{text(config[key]) if key in config else NOTHING}</td>' for key in keys)
    rows += f'<tr><th scope="row">{svg.swatch(run.colour)}{text(run.group or run.label)}</th>{cells}</tr>'
  return ('<div class="scroll" tabindex="0" role="region" aria-label="What the configs differ in">'
          f'<table class="sortable words"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{more}')
