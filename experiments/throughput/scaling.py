"""Whether time grows as the arithmetic does: python -m experiments.throughput.scaling --help.

A train step of a small U-Net against batch, width and resolution, and its sampling against the number of steps: all on
one pair of logarithmic axes, with the FLOPs beside.
"""
import dataclasses
import io
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np

from diffusion_jax.runtime import command, log
from diffusion_jax.runtime.config import UserError
from experiments.throughput import cases, processes, run
from experiments.throughput.cases import Case, choose

RESULTS = run.RESULTS / 'scaling'
BASE = Case('scaling', 'train', 16, 'train step', ('jax',))
# What is changed, and its values. Batches below 8 would have one device, and others two.
SWEEPS = {'batch': (8, 16, 32, 64, 128), 'width': (32, 64, 128, 256), 'resolution': (8, 16, 32, 64),
          'steps': (5, 10, 20, 40, 80)}
TITLE = {'batch': 'train step, batch', 'width': 'train step, channels', 'resolution': 'train step, pixels along a side',
         'steps': 'sampling, steps'}


def case_of(sweep: str, value: int) -> Case:
  """The base, but for one thing."""
  if sweep == 'steps':
    return dataclasses.replace(BASE, work='sample', about='sampling', steps=value)
  change = {'batch': {'batch': value}, 'width': {'changes': {'channels': value}},
            'resolution': {'changes': {'size': value}}}[sweep]
  return dataclasses.replace(BASE, **change)


def slope(points: Sequence[tuple[float, float]]) -> float:
  """Of the straight line nearest to points (x, y) in log y over log x, by least squares: y ~ x ** slope."""
  x, y = np.log(np.asarray(points, float)).T
  return float(np.polyfit(x, y, 1)[0])


def newest(records: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
  """{sweep: its records by rising value}, of each value the last."""
  last = {(r['sweep'], r['value']): r for r in sorted(records, key=lambda r: r['time']) if r['sweep'] in SWEEPS}
  return {sweep: [last[key] for key in sorted(last) if key[0] == sweep]
          for sweep in SWEEPS if any(key[0] == sweep for key in last)}


def summary(curves: dict[str, list[dict[str, Any]]]) -> str:
  """The points, and for each curve the exponents of time and of arithmetic."""
  lines = []
  for sweep, points in curves.items():
    values = ', '.join(f'{r["value"]}: {r["median_ms"]:.1f} ms' for r in points)
    lines.append(f'{TITLE[sweep]}: {values}')
    if len(points) > 1:
      lines.append(f'  time grows with exponent {slope([(r["value"], r["median_ms"]) for r in points]):.2f}, '
                   f'arithmetic with {slope([(r["value"], r["flops"]) for r in points]):.2f}')
  return '\n'.join(lines)


def draw(curves: dict[str, list[dict[str, Any]]], device: str) -> bytes:
  """A PNG: time against each value in units of the curve's smallest, and dashed the FLOPs, which meet it at its end.

  At its end, since what does not grow with the work matters least there.
  """
  matplotlib.use('Agg')
  from matplotlib import pyplot
  figure, axes = pyplot.subplots(figsize=(7.5, 5.5), layout='constrained')
  for i, (sweep, points) in enumerate(curves.items()):
    x = [r['value'] / points[0]['value'] for r in points]
    time = [r['median_ms'] for r in points]
    flops = [r['flops'] * time[-1] / points[-1]['flops'] for r in points]
    words = f'{TITLE[sweep]} {points[0]["value"]} to {points[-1]["value"]}'
    if len(points) > 1:
      words += (f': exponent {slope(list(zip(x, time, strict=True))):.2f}, arithmetic '
                f'{slope(list(zip(x, flops, strict=True))):.2f}')
    low, high = zip(*(percentiles(r['times_ms']) for r in points), strict=True)
    axes.fill_between(x, low, high, color=f'C{i}', alpha=0.2, linewidth=0)
    axes.plot(x, time, 'o-', color=f'C{i}', label=words, markersize=4)
    axes.plot(x, flops, '--', color=f'C{i}', linewidth=1)
  axes.set(xscale='log', yscale='log', xlabel='times the smallest value', ylabel='ms', title=device)
  axes.set_xscale('log', base=2)
  axes.plot([], [], 'k--', linewidth=1, label='arithmetic, scaled to the last point')
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  data = io.BytesIO()
  figure.savefig(data, format='png', dpi=150)
  pyplot.close(figure)
  return data.getvalue()


def percentiles(times: Sequence[float]) -> tuple[float, float]:
  """The middle half."""
  return tuple(np.percentile(times, [25, 75]).tolist())


def measure(sweep: str, value: int, platform: str, device: str, rounds: int | None, quick: bool) -> dict[str, Any]:
  """The record of one point."""
  case = case_of(sweep, value)
  found = run.measure(f'{sweep}_{value}', case, platform, None, rounds, quick)
  side = found['sides']['jax']
  return {'sweep': sweep, 'value': value, 'device': device, 'others': found['others'],
          **{key: found[key] for key in ('time', 'git_revision', 'rounds', 'iterations', 'quick', 'flops')},
          **{key: side[key] for key in ('median_ms', 'spread', 'cpu_ms', 'compile_seconds', 'setting', 'versions',
                                        'times_ms')}}


def main(argv: Sequence[str] | None = None) -> int:
  """Measures the chosen curves, keeps a record of each point, and draws the newest ones."""
  p = command.Parser(prog='python -m experiments.throughput.scaling', description=main.__doc__, allow_abbrev=False)
  p.add_argument('--suite', default='cpu', help=f'where: {", ".join(processes.PLATFORMS)} (default cpu)')
  p.add_argument('--sweeps', default=','.join(SWEEPS), help=f'which, of {", ".join(SWEEPS)} (default: all)')
  p.add_argument('--rounds', type=int, help=f'of each point (default {run.ROUNDS}, and fewer of what takes long)')
  p.add_argument('--quick', action='store_true', help='a few short rounds of the two smallest values; nothing is kept')
  p.add_argument('--draw', action='store_true', help='only draw what is recorded')
  p.add_argument('--out', help='the folder of records and plots (default results/scaling)')
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError('sweeps are fixed: --config overrides nothing here')
  if flags.rounds is not None and flags.rounds < 2:
    raise UserError(f'--rounds must be at least 2, got {flags.rounds}')
  choose('suite', processes.PLATFORMS, flags.suite)
  names = [name.strip() for name in flags.sweeps.split(',')]
  chosen = {name: choose('sweep', SWEEPS, name)[:2 if flags.quick else None] for name in names}
  folder = pathlib.Path(flags.out) if flags.out else None if flags.quick else RESULTS
  if flags.draw:
    paths = sorted((folder or RESULTS).glob('*.jsonl'))
    if not paths:
      raise UserError(f'{folder or RESULTS} has no records to draw: measure first, without --draw')
    for path in paths:
      picture(path)
    return 0
  device = cases.device() if flags.suite == 'cpu' else processes.limits(flags.suite, ['jax'], 1)['device']
  path, records = folder / cases.file_name(device) if folder else None, []
  for sweep, values in chosen.items():
    for value in values:
      records.append(measure(sweep, value, flags.suite, device, flags.rounds, flags.quick))
      r = records[-1]
      print(f'{TITLE[sweep]} {value}: {r["median_ms"]:.2f} ms, spread {100 * r["spread"]:.0f} %, '
            f'{r["flops"] / 1e9:.2f} GFLOP', flush=True)
      if path:
        log.append(path, r)
  print('\n' + summary(newest(records)))
  if path:
    picture(path)
  return 0


def picture(path: pathlib.Path) -> None:
  """Draws a file of records beside it."""
  records = log.read_lines(path)
  log.write(path.with_suffix('.png'), draw(newest(records), records[0]['device']))
  print(f'-> {path.with_suffix(".png")}')


if __name__ == '__main__':
  sys.exit(command.run(main))
