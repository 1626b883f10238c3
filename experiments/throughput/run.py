"""Measures our speed against PyTorch's at equal work: python -m experiments.throughput.run --help."""
import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import signal
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from diffusion_jax.runtime import command, log
from diffusion_jax.runtime.config import UserError
from experiments.throughput import cases, goals, stats, table
from experiments.throughput.cases import CASES, SUITES, Case, choose
from experiments.throughput.processes import Watch, Worker, WorkerDied, interleave, limits

RESULTS = pathlib.Path(__file__).parent / 'results'
BASELINE_NEEDS = ('torch', 'diffusers', 'transformers')
# Of each side: so many rounds of about so many seconds, and fewer of what takes longer.
ROUNDS, ROUND_SECONDS, SIDE_SECONDS, FEWEST_ROUNDS, OVERHEAD_ROUNDS = 12, 1.0, 30.0, 5, 20
QUICK_ROUNDS, QUICK_SECONDS = 3, 0.3
REFILL_SECONDS = 0.5  # what takes longer fills its caches anyway
LIMIT_ROUNDS = 3
OWN_LOOP = ('overhead', 'dispatch')  # work of one process that measures all sides of its case


def is_baseline(side: str) -> bool:
  """Whether a side needs PyTorch."""
  return side.startswith('torch')


def check_equal(name: str, sides: Sequence[str], ready: Sequence[dict[str, Any]], tolerance: float) -> None:
  """WorkerDied unless two sides have the same network and, where they tell them, the same outputs."""
  if not cases.shapes_agree(ready[0]['sizes'], ready[1]['sizes']):
    raise WorkerDied(f'{name}: the two networks differ: {sides[0]} has {cases.count(ready[0]["sizes"])} parameters '
                     f'and {sides[1]} {cases.count(ready[1]["sizes"])}, or in arrays of other sizes')
  if ready[0]['outputs'] is not None:
    found = cases.difference(ready[0]['outputs'], ready[1]['outputs'])
    if not found < tolerance:
      raise WorkerDied(f'{name}: the outputs of {sides[0]} and {sides[1]} differ by {found:.1e}, and {tolerance:.0e} '
                       f'is allowed')
    print(f'{name}: the outputs of {sides[0]} and {sides[1]} agree to {found:.1e}')


def plan(slowest: float, rounds: int | None, quick: bool) -> dict[str, Any]:
  """How often the sides are measured if an iteration of the slower one takes so many seconds."""
  usual = QUICK_ROUNDS if quick else max(FEWEST_ROUNDS, min(ROUNDS, round(SIDE_SECONDS / slowest)))
  return {'rounds': rounds or usual, 'refill': slowest < REFILL_SECONDS,
          'iterations': max(1, round((QUICK_SECONDS if quick else ROUND_SECONDS) / slowest))}


def prepare(name: str, case: Case, platform: str, folder: str, stack: contextlib.ExitStack) -> tuple[dict, dict]:
  """({side: worker}, {side: what it says of itself}), checked to be equal, in the order of the case's sides.

  Ours first: it writes the weights that the others load. A setting of PyTorch that does not work here is left out.
  """
  workers, ready = {}, {}
  for side in reversed(case.sides):
    workers[side] = Worker(side, name, case, platform, folder)
    stack.callback(workers[side].close)
    try:
      ready[side] = workers[side].ask('warm_up')
    except WorkerDied as e:
      if '-' not in side:
        raise
      print(f'{name}: without {side}: {e}')
      del workers[side]
      continue
    if side != case.sides[-1]:
      check_equal(name, (side, case.sides[-1]), (ready[side], ready[case.sides[-1]]), cases.tolerance(platform, case))
  order = [side for side in case.sides if side in workers]
  return {side: workers[side] for side in order}, {side: ready[side] for side in order}


def measure(name: str, case: Case, platform: str, limit: dict[str, Any] | None, rounds: int | None,
            quick: bool) -> dict[str, Any]:
  """The record of one case."""
  settings = {'quick': quick, 'load': os.getloadavg()[0]}
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    if case.work in OWN_LOOP:
      worker = Worker('jax', name, case, platform, folder)
      stack.callback(worker.close)
      ready = dict.fromkeys(case.sides, worker.ask('warm_up'))
      chosen = {'rounds': rounds or (QUICK_ROUNDS if quick else OVERHEAD_ROUNDS), 'iterations': 1}
      watch = Watch([worker])
      answers = split(worker.ask('measure', iterations=chosen['rounds']), case.sides)
    else:
      workers, ready = prepare(name, case, platform, folder, stack)
      slowest = max(worker.ask('measure', iterations=1, refill=False)['seconds'] for worker in workers.values())
      chosen = plan(slowest, rounds, quick)
      watch = Watch(list(workers.values()))
      answers = interleave(list(workers.values()), **chosen)
    settings['others'] = watch.share()
  return record(name, case, ready, answers, limit, {**chosen, **settings})


def split(answer: dict[str, Any], sides: Sequence[str]) -> list[list[dict[str, Any]]]:
  """The answer of a process that measured both sides, as two processes would have given it."""
  return [[{**answer, 'seconds': wall, 'cpu_seconds': cpu} for wall, cpu in answer[side]] for side in sides]


def record(name: str, case: Case, ready: dict[str, dict], answers: Sequence[Sequence[dict]],
           limit: dict[str, Any] | None, settings: dict[str, Any]) -> dict[str, Any]:
  """What is kept of a case: times in ms, one per round, and all that follows from them."""
  times = {side: [1e3 * a['seconds'] for a in found] for side, found in zip(ready, answers, strict=True)}
  *others, ours = times
  baseline = min(others, key=lambda side: stats.median(times[side]), default=None)
  work = next((r['flops'] for r in ready.values() if r.get('flops')), None)
  peak = (limit or {}).get('rates', {}).get(case.dtype)
  sides = {}
  for side, found in zip(ready, answers, strict=True):
    middle, cpu = stats.median(times[side]), [1e3 * a['cpu_seconds'] for a in found]
    sides[side] = {
        'median_ms': middle, 'spread': stats.spread(times[side]), 'cpu_ms': stats.median(cpu),
        'flops_per_second': work and 1e3 * work / middle, 'peak_share': work and peak and 1e3 * work / middle / peak,
        'items_per_second': 1e3 * case.batch / middle,
        'compile_seconds': ready[side]['compile_seconds'], 'peak_bytes': found[-1]['peak_bytes'],
        'setting': ready[side]['setting'], 'versions': ready[side]['versions'], 'times_ms': times[side],
        **({'written_ms': stats.median([1e3 * a['written_seconds'] for a in found])}
           if 'written_seconds' in found[0] else {})}
  result = {'ratio': None, 'interval': None, 'share_percent': None, 'verdict': 'no counterpart'}
  if baseline:
    both, overhead = (times[baseline], times[ours]), case.work == 'overhead'
    ratio = (stats.paired_ratio if overhead else stats.ratio)(*both)
    result = {'ratio': ratio, 'interval': list((stats.paired_interval if overhead else stats.interval)(*both)),
              'share_percent': stats.share_percent(ratio) if overhead else None,
              'verdict': (stats.overhead_verdict if overhead else stats.verdict)(*both)
              if stats.quiet(settings.get('others')) else 'machine too busy for a verdict'}
  return {'case': name, 'about': case.about, 'device': (limit or {}).get('device') or cases.device(),
          'cores': cases.cores(), 'time': log.now(), 'git_revision': log.git_revision(), **settings,
          'parameters': sum(ready[ours]['sizes']), 'dtype': case.dtype, 'batch': case.batch, 'flops': work,
          'steps': case.steps if case.work in ('sample', 'draw') else None,
          'limits': limit, 'baseline': baseline, **result, 'sides': sides}


def report(r: dict[str, Any]) -> None:
  """Prints what was found for a case."""
  others = '' if r['others'] is None else f', others took {100 * r["others"]:.0f} % of the machine'
  print(f'{r["case"]}: {r["about"]} ({r["rounds"]} rounds of {r["iterations"]}{others})')
  for side, s in r['sides'].items():
    parts = [f'median {s["median_ms"]:.2f} ms', f'spread {100 * s["spread"]:.0f} %', f'CPU {s["cpu_ms"]:.1f} ms']
    if s['flops_per_second']:
      parts.append(f'{s["flops_per_second"] / 1e9:.0f} GFLOP/s' + (
          f' ({100 * s["peak_share"]:.0f} % of the peak)' if s['peak_share'] else ''))
    if s['compile_seconds']:
      parts.append(f'compilation {s["compile_seconds"]:.1f} s apart')
    if 'written_ms' in s:
      parts.append(f'on the disk after {s["written_ms"]:.0f} ms')
    print(f'  {side:>13}: {", ".join(parts)}, peak {s["peak_bytes"] / 2 ** 20:.0f} MiB, {s["setting"]}')
  beside = ''.join(f'; {words}' for words in (goals.goal(r), goals.published(r)) if words)
  print(f'  {table.result(r)}: {r["verdict"]}{beside}', flush=True)


def missing() -> list[str]:
  """What the baseline needs and is not installed."""
  return [name for name in BASELINE_NEEDS if importlib.util.find_spec(name) is None]


def main(argv: Sequence[str] | None = None) -> int:
  """Measures the chosen cases; prints and keeps a record of each, then the table."""
  p = command.Parser(prog='python -m experiments.throughput.run', allow_abbrev=False,
                     description='Measures our speed against PyTorch and diffusers at equal work.')
  p.add_argument('--suite', default='cpu', help=f'where, and a list of cases: {", ".join(SUITES)} (default cpu)')
  p.add_argument('--cases', help=f'only these, with commas between them: {", ".join(CASES)}')
  p.add_argument('--rounds', type=int, help=f'of each side (default {ROUNDS}, and fewer of what takes long)')
  p.add_argument('--quick', action='store_true', help='a few short rounds, to see that it works; kept apart')
  p.add_argument('--out', help='the file of records (default results/DEVICE.jsonl; none with --quick)')
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError('cases are fixed: --config overrides nothing here')
  if flags.rounds is not None and flags.rounds < 2:
    raise UserError(f'--rounds must be at least 2, got {flags.rounds}')
  names = choose('suite', SUITES, flags.suite)
  if flags.cases:
    names = [name.strip() for name in flags.cases.split(',')]
  chosen = {name: of_suite(choose('case', CASES, name), flags.suite) for name in names}

  absent, records, limit = missing(), [], None
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended too
  if flags.suite != 'cpu' or any(case.work not in (*OWN_LOOP, 'checkpoint', 'read') for case in chosen.values()):
    limit = limits(flags.suite, ['jax'] + ['torch'] * (not absent and flags.suite != 'tpu'),
                   1 if flags.quick else LIMIT_ROUNDS)
    print(table.limits_line(limit) + '\n', flush=True)
  device = (limit or {}).get('device') or cases.device()
  out = pathlib.Path(flags.out) if flags.out else None if flags.quick else RESULTS / cases.file_name(device)
  for name, case in chosen.items():
    if absent and any(map(is_baseline, case.sides)):
      continue
    found = measure(name, case, flags.suite, limit, flags.rounds, flags.quick)
    report(found)
    if out:
      log.append(out, found)
    records.append(found)
  if records:
    print('\n' + table.render(records))
  if absent and any(is_baseline(side) for case in chosen.values() for side in case.sides):
    raise UserError(f"comparing needs {' and '.join(absent)}: install the parity extra with pip install -e '.[parity]'")
  return 0


def of_suite(case: Case, suite: str) -> Case:
  """The case as it is measured there: PyTorch is no baseline on a TPU."""
  if suite != 'tpu':
    return case
  return dataclasses.replace(case, sides=tuple(side for side in case.sides if not is_baseline(side)))


if __name__ == '__main__':
  sys.exit(command.run(main))
