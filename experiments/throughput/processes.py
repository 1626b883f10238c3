"""The processes that measure, one per side, and how they take turns."""
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from diffusion_jax.runtime.config import UserError
from experiments.throughput import stats
from experiments.throughput.cases import Case
from experiments.throughput.worker import group_ticks

ROOT = pathlib.Path(__file__).parents[2]
# Processes share a GPU: each takes what it needs, and not three quarters of all memory at once.
PLATFORMS = {'cpu': {'JAX_PLATFORMS': 'cpu'},
             'gpu': {'JAX_PLATFORMS': 'cuda', 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'},
             'tpu': {'JAX_PLATFORMS': 'tpu'}}


class WorkerDied(UserError):
  """A process that measures has ended."""
  status = 1


class Worker:
  """One side of a case in a fresh process, stopped by a signal while it is not asked.

  Stopping is what makes the comparison fair on few cores: idle threads of OpenMP spin, and would take the time of the
  other side. No setting of OpenMP is touched, since it could change how torch itself performs.
  """

  def __init__(self, side: str, name: str, case: Case, platform: str, folder: str):
    self.side, self.name = side, name
    self.errors = tempfile.TemporaryFile('w+')  # noqa: SIM115  closed with the process
    # An empty compilation cache: compile times are those of a first run, and train.train compiles once for all rounds.
    env = os.environ | PLATFORMS[platform] | {
        'JAX_COMPILATION_CACHE_DIR': f'{folder}/cache', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'HF_HUB_OFFLINE': '1'}  # all weights are ours
    self.process = subprocess.Popen(
        [sys.executable, '-m', 'experiments.throughput.worker', '--side', side, '--platform', platform, '--folder',
         folder, '--case', json.dumps(dataclasses.asdict(case))], cwd=ROOT, env=env, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=self.errors, text=True, process_group=0)  # with those that it starts

  def ask(self, do: str, **request: Any) -> dict[str, Any]:
    """The answer to one request; WorkerDied if there is none."""
    with contextlib.suppress(BrokenPipeError):
      self._signal(signal.SIGCONT)
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
    self._signal(signal.SIGSTOP)
    return json.loads(line)

  def _signal(self, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.process.pid, number)

  def close(self) -> None:
    """Ends the process, and those that it started."""
    self._signal(signal.SIGKILL)
    self.process.communicate()
    self.errors.close()


def interleave(workers: Sequence[Worker], rounds: int, **request: Any) -> list[list[dict[str, Any]]]:
  """Each worker's answers, a round of each after the other; who begins moves on from round to round."""
  answers = [[] for _ in workers]
  for i in range(rounds):
    for k in range(len(workers)):
      n = (i + k) % len(workers)
      answers[n].append(workers[n].ask('measure', **request))
  return answers


def busy_ticks(stat: str) -> tuple[int, int]:
  """(ticks that all cores worked, or were taken from this machine; all ticks), of the text of /proc/stat."""
  user, nice, system, idle, waiting, *rest = map(int, stat.split('\n')[0].split()[1:9])
  worked = user + nice + system + sum(rest)
  return worked, worked + idle + waiting


class Watch:
  """How much of the machine others take while `workers` measure."""

  def __init__(self, workers: Sequence[Worker]):
    self.pids = [worker.process.pid for worker in workers]
    self.before = self._read()

  def _read(self):
    proc = pathlib.Path('/proc')
    if not (proc / 'stat').exists():
      return None
    return (*busy_ticks((proc / 'stat').read_text()),
            sum(group_ticks(self.pids)))

  def share(self) -> float | None:
    """Of all cores, since the beginning; None where the system does not say."""
    now = self._read()
    return stats.others_share(self.before, now) if now else None


def limits(platform: str, libraries: Sequence[str], rounds: int) -> dict[str, Any]:
  """What this machine can do: FLOP/s of a matrix product by type, and bytes/s of a 'copy', by the quicker library.

  {'device', 'rates': {'float32': 2e11, 'copy': 1e10}, 'by': {'float32': 'torch', ...}}; device: '' for a CPU.
  """
  with contextlib.ExitStack() as stack:
    folder, workers = stack.enter_context(tempfile.TemporaryDirectory()), []
    for side in libraries:
      workers.append(Worker(side, 'limits', Case('', 'limits', 1, 'limits', (side,)), platform, folder))
      stack.callback(workers[-1].close)
    ready = [worker.ask('warm_up') for worker in workers]
    answers = interleave(workers, rounds, iterations=5, refill=False)
  return best_of(libraries, ready, answers)


def best_of(libraries: Sequence[str], ready: Sequence[dict], answers: Sequence[Sequence[dict]]) -> dict[str, Any]:
  """The largest of all measured rates. What is the largest there can be is not met by chance."""
  rates, by = {}, {}
  for side, found in zip(libraries, answers, strict=True):
    for answer in found:
      for name, rate in answer['rates'].items():
        if rate > rates.get(name, 0):
          rates[name], by[name] = rate, side
  return {'device': next((r['device'] for r in ready if r['device']), ''), 'rates': rates, 'by': by}
