"""Measures our speed against PyTorch's at equal work: python -m experiments.throughput.run --help."""
import contextlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from diffusion_jax.runtime import command, log
from diffusion_jax.runtime.config import UserError
from experiments.throughput import cases, stats, table
from experiments.throughput.cases import CASES, SUITES, Case, choose

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = pathlib.Path(__file__).parent / 'results'
BASELINE_NEEDS = ('torch', 'diffusers')
ROUNDS, ROUND_SECONDS = 20, 2.0
QUICK_ROUNDS, QUICK_SECONDS = 5, 0.5
TOLERANCE = 1e-4  # of outputs, relative to the largest


class WorkerDied(UserError):
  """A process that measures has ended."""
  status = 1


class Worker:
  """One side of a case in a fresh process, stopped by a signal while it is not asked.

  Stopping is what makes the comparison fair on few cores: idle threads of OpenMP spin, and would take the time of the
  other side. No setting of OpenMP is touched, since it could change how torch itself performs.
  """

  def __init__(self, side: str, name: str, cache: str):
    self.side, self.name = side, name
    self.errors = tempfile.TemporaryFile('w+')  # noqa: SIM115  closed with the process
    # An empty compilation cache: compile times are those of a first run, and train.train compiles once for all rounds.
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': cache,
                        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
    self.process = subprocess.Popen(
        [sys.executable, '-m', 'experiments.throughput.worker', '--side', side, '--case', name], cwd=ROOT, env=env,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True)

  def ask(self, do: str, **request: Any) -> dict[str, Any]:
    """The answer to one request; WorkerDied if there is none."""
    with contextlib.suppress(BrokenPipeError):
      self.process.send_signal(signal.SIGCONT)
      self.process.stdin.write(json.dumps({'do': do, **request}) + '\n')
      self.process.stdin.flush()
    line = self.process.stdout.readline()
    if not line:
      self.process.wait()
      self.errors.seek(0)
      # A crash ends with the addresses of its stack; what was wrong stands above them.
      lines = [line for line in self.errors.read().splitlines() if line.strip() and not line.lstrip().startswith('@')]
      raise WorkerDied(f'the {self.side} side of {self.name} ended with status {self.process.returncode}: '
                       f'{lines[-1].strip() if lines else "no message"}')
    self.process.send_signal(signal.SIGSTOP)
    return json.loads(line)

  def close(self) -> None:
    """Ends the process."""
    self.process.kill()
    self.process.communicate()
    self.errors.close()


def interleave(workers: Sequence[Worker], rounds: int, iterations: int) -> list[list[dict[str, Any]]]:
  """Each worker's answers, a round of the one then of the other; who begins alternates."""
  answers = [[] for _ in workers]
  for i in range(rounds):
    for n in (0, 1) if i % 2 == 0 else (1, 0):
      answers[n].append(workers[n].ask('measure', iterations=iterations))
  return answers


def check_equal(name: str, sides: Sequence[str], ready: Sequence[dict[str, Any]]) -> None:
  """WorkerDied unless both sides have the same network and, where they tell them, the same outputs."""
  if not cases.shapes_agree(ready[0]['sizes'], ready[1]['sizes']):
    raise WorkerDied(f'{name}: the two networks differ: {sides[0]} has {cases.count(ready[0]["sizes"])} parameters '
                     f'and {sides[1]} {cases.count(ready[1]["sizes"])}, or in arrays of other sizes')
  if ready[0]['outputs'] is not None:
    found = cases.difference(ready[0]['outputs'], ready[1]['outputs'])
    if not found < TOLERANCE:
      raise WorkerDied(f'{name}: the outputs of {sides[0]} and {sides[1]} differ by {found:.1e}, and {TOLERANCE:.0e} '
                       f'is allowed')
    print(f'{name}: the outputs of both sides agree to {found:.1e}')


def measure(name: str, case: Case, rounds: int, quick: bool) -> dict[str, Any]:
  """The record of one case."""
  load, overhead = os.getloadavg()[0], case.work == 'overhead'
  with contextlib.ExitStack() as stack:
    cache, workers = stack.enter_context(tempfile.TemporaryDirectory()), []
    for side in case.sides[1:] if overhead else case.sides:
      workers.append(Worker('jax' if overhead else side, name, cache))
      stack.callback(workers[-1].close)
    # One after the other: a side only imports its libraries before it is asked.
    ready = [worker.ask('warm_up') for worker in workers]
    if overhead:
      iterations, ready = 1, ready * 2
      answers = split(workers[0].ask('measure', iterations=rounds), case.sides)
    else:
      check_equal(name, case.sides, ready)
      slowest = max(worker.ask('measure', iterations=1)['seconds'] for worker in workers)
      iterations = max(1, round((QUICK_SECONDS if quick else ROUND_SECONDS) / slowest))
      answers = interleave(workers, rounds, iterations)
  return record(name, case, ready, answers, {'rounds': rounds, 'iterations': iterations, 'quick': quick, 'load': load})


def split(answer: dict[str, Any], sides: Sequence[str]) -> list[list[dict[str, Any]]]:
  """The answer of a process that measured both sides, as two processes would have given it."""
  return [[{**answer, 'seconds': wall, 'cpu_seconds': cpu} for wall, cpu in answer[side]] for side in sides]


def record(name: str, case: Case, ready: Sequence[dict], answers: Sequence[Sequence[dict]],
           settings: dict[str, Any]) -> dict[str, Any]:
  """What is kept of a case: times in ms, one per round, and all that follows from them."""
  times = [[1e3 * a['seconds'] for a in side] for side in answers]
  cpu = [[1e3 * a['cpu_seconds'] for a in side if a['cpu_seconds'] is not None] for side in answers]
  overhead = case.work == 'overhead'
  ratio = (stats.paired_ratio if overhead else stats.ratio)(*times)
  low, high = (stats.paired_interval if overhead else stats.interval)(*times)
  sides = {}
  for i, side in enumerate(case.sides):
    sides[side] = {
        'median_ms': stats.median(times[i]), 'spread': stats.spread(times[i]),
        'cpu_ms': stats.median(cpu[i]) if cpu[i] else None, 'compile_seconds': ready[i]['compile_seconds'],
        'peak_bytes': answers[i][-1]['peak_bytes'], 'setting': ready[i]['setting'], 'versions': ready[i]['versions'],
        'times_ms': times[i]}
  return {
      'case': name, 'about': case.about, 'device': cases.device(), 'cores': cases.cores(), 'time': log.now(),
      'git_revision': log.git_revision(), **settings, 'parameters': sum(ready[0]['sizes']),
      'ratio': ratio, 'interval': [low, high],
      'share_percent': stats.share_percent(ratio) if overhead else None,
      'verdict': (stats.overhead_verdict if overhead else stats.verdict)(*times), 'sides': sides}


def report(r: dict[str, Any]) -> None:
  """Prints what was found for a case."""
  print(f'{r["case"]}: {r["about"]} ({r["rounds"]} rounds of {r["iterations"]}, load {r["load"]:.1f} before)')
  for side, s in r['sides'].items():
    cpu = f', CPU {s["cpu_ms"]:.1f} ms' if s['cpu_ms'] is not None else ''
    compiled = f', compilation {s["compile_seconds"]:.1f} s apart' if s['compile_seconds'] else ''
    print(f'  {side:>5}: median {s["median_ms"]:.2f} ms, spread {100 * s["spread"]:.0f} %{cpu}{compiled}, '
          f'peak {s["peak_bytes"] / 2 ** 20:.0f} MiB, {s["setting"]}')
  print(f'  {table.result(r)}: {r["verdict"]}', flush=True)


def missing() -> list[str]:
  """What the baseline needs and is not installed."""
  return [name for name in BASELINE_NEEDS if importlib.util.find_spec(name) is None]


def main(argv: Sequence[str] | None = None) -> int:
  """Measures the chosen cases; prints and keeps a record of each, then the table."""
  p = command.Parser(prog='python -m experiments.throughput.run', allow_abbrev=False,
                     description='Measures our speed against PyTorch and diffusers at equal work.')
  p.add_argument('--suite', default='cpu', help=f'a list of cases: {", ".join(SUITES)} (default cpu)')
  p.add_argument('--cases', help=f'only these, with commas between them: {", ".join(CASES)}')
  p.add_argument('--rounds', type=int, help=f'of each side (default {ROUNDS})')
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
  chosen = {name: choose('case', CASES, name) for name in names}
  out = pathlib.Path(flags.out) if flags.out else None if flags.quick else RESULTS / cases.file_name(cases.device())

  absent, records = missing(), []
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the workers are ended too
  for name, case in chosen.items():
    if absent and 'torch' in case.sides:
      continue
    found = measure(name, case, flags.rounds or (QUICK_ROUNDS if flags.quick else ROUNDS), flags.quick)
    report(found)
    if out:
      log.append(out, found)
    records.append(found)
  if records:
    print('\n' + table.render(records))
  if absent and any('torch' in case.sides for case in chosen.values()):
    raise UserError(f"comparing needs {' and '.join(absent)}: install the parity extra with pip install -e '.[parity]'")
  return 0


if __name__ == '__main__':
  sys.exit(command.run(main))
