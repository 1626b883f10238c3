"""One side of one case in a process of its own: answers JSON requests, a line each, on standard input and output.

{"do": "warm_up"} -> {"compile_seconds", "sizes", "setting", "versions", "outputs", "flops", "device"}
{"do": "measure", "iterations": k, "refill": bool} -> {"seconds", "cpu_seconds"} per iteration, {"peak_bytes"} so far
The end of the input ends the worker.
"""
import argparse
import contextlib
import importlib
import json
import os
import pathlib
import re
import resource
import sys
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from experiments.throughput.cases import Case

WARM_UP_ITERATIONS, WARM_UP_SECONDS = 3, 5.0  # allocators and thread pools settle; one is enough for what takes long

READ_AHEAD, BATCHES_READ = 16, 16  # batches that may be ready at the beginning, and those of an iteration


class Job(NamedTuple):
  """What a side is asked to prepare.

  folder: where both sides of a case find each other's files; platform: 'cpu', 'gpu' or 'tpu'; mode: of torch: '',
  'plain' or 'compile'.
  """
  case: Case
  folder: pathlib.Path
  platform: str
  mode: str = ''

  def dtypes(self) -> tuple[str, ...]:
    """The types whose products have a peak worth knowing here."""
    return ('float32',) if self.platform == 'cpu' else ('float32', 'bfloat16')

  def sizes(self) -> tuple[int, int]:
    """The side of the matrices, and the numbers copied, of which limits are measured."""
    return (2048, 2 ** 26) if self.platform == 'cpu' else (8192, 2 ** 30)


class Prepared(NamedTuple):
  """What a side hands to the worker: run(k) does k iterations and returns when their results are there."""
  run: Callable[[int], dict | None]  # may return its own measurements, which replace the worker's
  sizes: list[int]                   # the number of elements of each parameter array
  compile_seconds: float
  setting: str                       # threads, devices, layout
  versions: dict[str, str]
  outputs: dict[str, list] | None = None  # {name: numbers} that the other side must give too
  flops: float | None = None         # of an iteration; the side that can count says it for both
  device: str = ''                   # unless it is the CPU
  peak_bytes: Callable[[], int] | None = None  # of the device; None: of the process


def repeat(call: Callable[[], object]) -> Callable[[int], None]:
  """run(k) of a call that waits for its result."""
  def run(iterations):
    for _ in range(iterations):
      call()
  return run


def reading(batches: Iterator[object]) -> Callable[[int], dict]:
  """run(k) of batches that are read ahead: k times BATCHES_READ of them, once those that were ready have been taken."""
  def run(iterations):
    for _ in range(READ_AHEAD):
      next(batches)
    wall, cpu = time.perf_counter(), group_seconds()
    for _ in range(iterations * BATCHES_READ):
      next(batches)
    return {'seconds': (time.perf_counter() - wall) / iterations, 'cpu_seconds': (group_seconds() - cpu) / iterations}
  return run


def group_seconds() -> float:
  """CPU seconds of this process and of those that it started and that still run."""
  found = list(group_ticks([os.getpgid(0)]))
  return sum(found) / os.sysconf('SC_CLK_TCK') if found else time.process_time()


def group_ticks(groups: Collection[int]) -> Iterator[int]:
  """Ticks that each process of some groups has worked, where the system says so."""
  for file in pathlib.Path('/proc').glob('[0-9]*/stat'):
    with contextlib.suppress(OSError):  # it has ended
      fields = file.read_text().rpartition(')')[2].split()  # its name, before, may hold anything
      if int(fields[2]) in groups:
        yield int(fields[11]) + int(fields[12])


def best(call: Callable[[], object], times: int) -> float:
  """The least seconds of a call that waits for its result, after one that is not counted."""
  call()
  found = []
  for _ in range(times):
    start = time.perf_counter()
    call()
    found.append(time.perf_counter() - start)
  return min(found)


def warm_up(run: Callable[[int], dict | None]) -> None:
  """A few iterations, fewer of what takes long."""
  start = time.perf_counter()
  for _ in range(WARM_UP_ITERATIONS):
    run(1)
    if time.perf_counter() - start > WARM_UP_SECONDS:
      return


def measure(run: Callable[[int], dict | None], iterations: int, refill: bool = True) -> dict:
  """Wall and CPU seconds per iteration (all threads); refill: after one iteration that fills the caches again."""
  if refill:
    run(1)
  wall, cpu = time.perf_counter(), time.process_time()
  own = run(iterations)
  wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
  return {'seconds': wall / iterations, 'cpu_seconds': cpu / iterations, **(own or {}), 'peak_bytes': peak_bytes()}


def peak_bytes() -> int:
  """The most memory that this process has held at once.

  Linux keeps it as VmHWM; ru_maxrss is not reset by exec, so that a small process shows the size of its parent.
  """
  status = pathlib.Path('/proc/self/status')
  found = re.search(r'VmHWM:\s*(\d+) kB', status.read_text() if status.exists() else '')
  if found:
    return int(found[1]) * 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def answer(prepared: Prepared, request: dict[str, Any]) -> dict[str, Any]:
  """To one request."""
  if request['do'] == 'warm_up':
    return {k: v for k, v in prepared._asdict().items() if k not in ('run', 'peak_bytes')}
  found = measure(prepared.run, request['iterations'], request.get('refill', True))
  return found | ({'peak_bytes': prepared.peak_bytes()} if prepared.peak_bytes else {})


def main() -> None:
  """Prepares on the first request, and measures on demand."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--side', required=True, help='jax, torch, torch-plain or torch-compile')
  p.add_argument('--platform', required=True, choices=('cpu', 'gpu', 'tpu'))
  p.add_argument('--case', required=True, help='a cases.Case as JSON')
  p.add_argument('--folder', required=True, type=pathlib.Path)
  flags = p.parse_args()
  # Answers go to a copy of standard output; whatever libraries print goes to standard error.
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)

  library, _, mode = flags.side.partition('-')
  job = Job(Case(**json.loads(flags.case)), flags.folder, flags.platform, mode)
  module = importlib.import_module(f'experiments.throughput.{library}_side')
  prepared = None
  for line in sys.stdin:
    if prepared is None:
      prepared = module.WORK[job.case.work](job)
      warm_up(prepared.run)
    answers.write(json.dumps(answer(prepared, json.loads(line))) + '\n')


if __name__ == '__main__':
  main()
