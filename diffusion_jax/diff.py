"""What differs between two runs: `diffusion-jax diff RUN_A RUN_B [--all]`.

Configs, data, code, versions and device, how training went, every value that both have, and whether their samples of
the same ids are the same pictures. Reads records only, with the standard library alone, like `report`.

A difference of two values is tested where both have confidence intervals of one level: by a normal distribution of the
difference, with the p of all scores corrected together (Holm 1979). Those intervals are of the sampling of images:
what another training seed would give is in none of them, and takes `report` over several seeds.
"""
import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

from diffusion_jax import comparison, records
from diffusion_jax.records import Run
from diffusion_jax.svg import duration, ends_of, number, plain, quantity, setting, shown
from diffusion_jax.terminal import answer

LEVEL = 0.95
WIDE = 60  # characters of a value
MOST = 20  # lines of a part, without --all


def lines_of(a: dict, b: dict) -> list[tuple[str, str, str]]:
  """(key, value of a, value of b) of each key in which two flat records differ; '-' where one has none."""
  keys = [key for key in dict.fromkeys([*a, *b]) if (key in a, a.get(key)) != (key in b, b.get(key))]
  return [(key, *(str(record[key]) if key in record else '-' for record in (a, b))) for key in keys]


def strings(record: dict, *keys: str) -> dict[str, str]:
  """Some keys of a record as text, without those that it lacks."""
  return {key: setting(record[key]) for key in keys if record.get(key) is not None}


def data(run: Run) -> dict[str, str]:
  """What a run was trained on."""
  card, source = (records.read_json(run.folder / name) for name in ('data_card.json', 'data.json'))
  return strings(source, 'source', 'split', 'shape', 'num_examples', 'num_classes') | strings(
    card, 'source', 'split', 'num_examples', 'hash')


def code(run: Run) -> dict[str, str]:
  """What it was trained by: revision, versions, and the version of the code that its sweep recorded."""
  versions = run.made.get('versions')
  versions = {f'{key}': str(value) for key, value in versions.items()} if isinstance(versions, dict) else {}
  return strings(run.made, 'git_revision') | strings(run.point, 'code') | versions


def training(run: Run) -> dict[str, str]:
  """Where and how far it was trained."""
  seconds = {'seconds': duration(run.done['seconds'])} if number(run.done.get('seconds')) is not None else {}
  rate = run.done.get('images_per_second')
  rates = {'images per second': shown(rate)} if number(rate) is not None else {}
  loss = next((line['loss'] for line in reversed(run.metrics) if number(line.get('loss')) is not None), None)
  losses = {'last loss': shown(loss)} if loss is not None else {}
  return (strings(run.made, 'device', 'parameters') | strings(run.done or (run.metrics or [{}])[-1], 'images') | seconds
          | rates | losses | strings(run.done, 'fingerprint'))


# Values

def newest(run: Run) -> dict[tuple, dict]:
  """The newest record of each metric and way of making samples, at the run's last evaluated step."""
  rows = records.evaluations(run)
  last = records.first(rows[-1]).get('step') if rows else None
  return {(key.metric, comparison.made_by(record)): record
          for row in rows if records.first(row).get('step') == last for key, record in row.items()}


def tested(a: dict, b: dict) -> float | None:
  """p of the difference of two values, None where one has no confidence interval of the same level."""
  values, ends = [number(record.get('value')) for record in (a, b)], [ends_of(record) for record in (a, b)]
  levels = {number(record.get('ci_level', LEVEL)) for record in (a, b)}
  if None in values or not all(ends) or len(levels) != 1 or not 0 < (levels.pop() or 0) < 1:
    return None
  level = number(a.get('ci_level', LEVEL))
  error = math.hypot(*(high - low for low, high in ends)) / 2 / NormalDist().inv_cdf((1 + level) / 2)
  if error <= 0:
    return 1.0 if values[0] == values[1] else 0.0
  return 2 * NormalDist().cdf(-abs(values[1] - values[0]) / error)


def holm(ps: Sequence[float]) -> list[float]:
  """The p values as corrected for their number, in the same order."""
  corrected, least = [0.0] * len(ps), 0.0
  for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
    least = max(least, min(1.0, (len(ps) - rank) * ps[i]))
    corrected[i] = least
  return corrected


def values(a: Run, b: Run) -> tuple[list[tuple[str, str, str, str]], list[str]]:
  """(rows, sentences): the values of both that are alike and what is to be said of them; why others are not paired."""
  of_a, of_b = newest(a), newest(b)
  both = sorted(of_a.keys() & of_b.keys(), key=lambda key: records.order(key[0]))
  why, pairs = [], []
  for key in both:
    if reason := records.unlike(of_a[key], of_b[key], (a.label, b.label)):
      why.append(f'not compared: {reason}')
    else:
      pairs.append((of_a[key], of_b[key]))
  ps = [tested(*pair) if records.is_score(str(pair[0].get('metric'))) else None for pair in pairs]
  corrected = iter(holm([p for p in ps if p is not None]))
  ways = [made(one) for one, _ in pairs]
  shared = [part for part in ways[0] if all(part in way for way in ways)] if ways else []
  rows = []
  for (one, other), way, p in zip(pairs, ways, ps, strict=True):
    metric = str(one.get('metric'))
    said = judged(metric, one, other, next(corrected) if p is not None else None, (a.label, b.label))
    name = ', '.join([metric, *(part for part in way if part not in shared)])
    rows.append((name, *(value(record) for record in (one, other)), said))
  alone = []
  for run, mine, theirs in (a, of_a.keys(), of_b.keys()), (b, of_b.keys(), of_a.keys()):
    if only := sorted({metric for metric, _ in mine - theirs}, key=records.order):
      alone.append(f'only {run.label} has, of samples made so: {", ".join(only)}')
  return rows, [f'all of them: {", ".join(shared)}'] * bool(shared) + why + alone


def made(record: dict) -> list[str]:
  """How samples were made, shortly."""
  parts = [setting(record[key]) for key in ('sampler', 'estimator') if record.get(key) is not None]
  parts += [f'{key} {setting(record[key])}' for key in ('nfe', 'guidance', 'ema') if record.get(key) is not None]
  return parts


def value(record: dict) -> str:
  """A value before its interval."""
  metric = str(record.get('metric'))
  ends = ', '.join(quantity(metric, end, record['value']) for end in ends_of(record)) \
    if number(record.get('value')) is not None else ''
  return quantity(metric, record.get('value')).replace('&ndash;', '-') + f' [{ends}]' * bool(ends)


def judged(metric: str, a: dict, b: dict, p: float | None, labels: tuple[str, str]) -> str:
  """What a difference is worth."""
  one, other = number(a.get('value')), number(b.get('value'))
  if one is None or other is None:
    return ''
  if one == other:
    return 'the same'
  size = f'by {quantity(metric, abs(other - one), max(abs(one), abs(other)))}'
  if p is None:
    share = f' ({100 * abs(other - one) / abs(one):.2g} %)' if one else ''
    return f'{labels[other > one]} is higher {size}{share}'
  chance = f'p = {p:.2g}' if p >= 0.001 else 'p < 0.001'
  if p > 1 - LEVEL:
    return f'not separable, {chance}'
  better = records.better(metric)
  winner = labels[(other > one) == (better == records.HIGHER)] if better else labels[other > one]
  return f'{winner} is {"better" if better else "higher"} {size}, {chance}'


# Pictures

def images(a: Run, b: Run) -> list[str]:
  """What the pictures of samples that both runs have by one name say: the same ids in folders of the same name."""
  found = []
  for folder in sorted({path.parent.name for path in a.folder.glob('samples/*/*.png')}):
    mine, theirs = ({path.name: path for path in run.folder.glob(f'samples/{folder}/*.png') if path.stem.isdecimal()}
                    for run in (a, b))
    shared = sorted(mine.keys() & theirs.keys())
    if shared:
      same = sum(mine[name].read_bytes() == theirs[name].read_bytes() for name in shared)
      only = len(mine.keys() ^ theirs.keys())
      found.append(f'samples/{folder}: {len(shared):,} ids in both, {same:,} of them the same picture'
                   + f'; {only:,} ids in one only' * bool(only))
  return found


# The answer

def block(title: str, rows: Sequence[tuple], every: bool, what: str = 'records') -> list[str]:
  """A part of the answer, its columns aligned."""
  if not rows:
    return [f'{title}: no difference in the {what}' if what else title]
  kept = rows if every else rows[:MOST]
  cut = [[word if every or len(word) <= WIDE else f'{word[:WIDE - 3]}...' for word in map(plain, row)] for row in kept]
  widths = [max(map(len, column)) for column in zip(*cut, strict=True)]
  lines = ['  '.join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in cut]
  more = [f'  and {len(rows) - len(kept)} more: --all shows them'] * (len(rows) > len(kept))
  return [title, *(f'  {line}' for line in lines), *more]


def differences(a: Run, b: Run, every: bool = False) -> str:
  """The whole answer."""
  lines = [plain(f'a: {a.folder}'), plain(f'b: {b.folder}')]
  a, b = a._replace(label='a'), b._replace(label='b')
  configs = [comparison.flat(run.config) for run in (a, b)]
  for title, (one, other) in {'config': configs, 'data': (data(a), data(b)), 'code and versions': (code(a), code(b)),
                              'training': (training(a), training(b))}.items():
    rows = lines_of(one, other)
    what = 'records' if one or other else 'records: there are none'
    lines += ['', *block(title, [('', 'a', 'b'), *rows] if rows else [], every, what)]
  rows, sentences = values(a, b)
  lines += ['', *(block('values', [('', 'a', 'b', ''), *rows], every) if rows else ['values: none that both have'])]
  lines += [f'  {plain(sentence)}' for sentence in sentences]
  if any('p ' in row[-1] for row in rows):
    lines.append('  p is corrected for the number of scores; it is of the images drawn, not of the training seed')
  seen = images(a, b)
  lines += ['', *(['images', *(f'  {plain(line)}' for line in seen)] if seen else ['images: no ids that both have'])]
  return '\n'.join(lines)


def main(argv: Sequence[str] | None = None) -> int:
  """The command. Its status is 0 whether or not the runs differ, 2 where one of them cannot be read."""
  parser = argparse.ArgumentParser('diffusion-jax diff', description='Says what differs between two runs.')
  parser.add_argument('a', type=Path, metavar='RUN_A', help='folder of a run')
  parser.add_argument('b', type=Path, metavar='RUN_B', help='folder of another')
  parser.add_argument('--all', action='store_true', help='every line, and long values in full')
  args = parser.parse_args(argv)
  return answer(lambda: differences(*records.read_runs([args.a, args.b]), args.all))


if __name__ == '__main__':
  sys.exit(main())
