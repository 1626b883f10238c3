"""One side of one case in a process of its own: answers JSON requests, a line each, on standard input and output.

{"do": "warm_up"} -> {"compile_seconds", "sizes", "setting", "versions", "outputs"}
{"do": "measure", "iterations": k} -> {"seconds", "cpu_seconds"} per iteration, and {"peak_bytes"} so far
The end of the input ends the worker.
"""
import argparse
import importlib
import json
import os
import pathlib
import re
import resource
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from experiments.throughput import cases

WARM_UP_ITERATIONS = 3  # allocators and thread pools settle


class Prepared(NamedTuple):
  """What a side hands to the worker: run(k) does k iterations and returns when their results are there."""
  run: Callable[[int], dict | None]  # may return its own measurements, which replace the worker's
  sizes: list[int]                   # the number of elements of each parameter array
  compile_seconds: float
  setting: str                       # threads, devices, layout
  versions: dict[str, str]
  outputs: dict[str, list] | None = None  # {name: numbers} that the other side must give too


def repeat(call: Callable[[], object]) -> Callable[[int], None]:
  """run(k) of a call that waits for its result."""
  def run(iterations):
    for _ in range(iterations):
      call()
  return run


def measure(run: Callable[[int], dict | None], iterations: int) -> dict:
  """Wall and CPU seconds per iteration (all threads), after one iteration that fills the caches again."""
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


def main() -> None:
  """Prepares on the first request, and measures on demand."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--side', required=True, choices=('jax', 'torch'))
  p.add_argument('--case', required=True, choices=list(cases.CASES))
  flags = p.parse_args()
  # Answers go to a copy of standard output; whatever libraries print goes to standard error.
  answers = os.fdopen(os.dup(1), 'w', buffering=1)
  os.dup2(2, 1)

  case = cases.CASES[flags.case]
  module = importlib.import_module('experiments.throughput.' + ('torch_side' if flags.side == 'torch' else 'jax_side'))
  prepared = None
  for line in sys.stdin:
    request = json.loads(line)
    if prepared is None:
      prepared = module.WORK[case.work](case)
      prepared.run(WARM_UP_ITERATIONS)
    if request['do'] == 'warm_up':
      answer = {k: v for k, v in prepared._asdict().items() if k != 'run'}
    else:
      answer = measure(prepared.run, request['iterations'])
    answers.write(json.dumps(answer) + '\n')


if __name__ == '__main__':
  main()
