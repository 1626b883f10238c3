"""Runs jobs on this machine, some at once, and starts them again when they were interrupted.

  python -m launch.local --config=configs/digits.py --workdir=runs/digits [--restarts=3] [--dry_run] [--config.a.b=V]
"""
import collections
import contextlib
import dataclasses
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from launch import job as job_lib
from launch.job import INTERRUPTED, Job, LaunchError, option, retryable, shell_status

WAITS = True
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Options:
  """How jobs share this machine."""
  slots: int = option(1, 'jobs at once; each gets an equal share of the CPU cores and of --gpus')
  processes: int = option(1, 'processes of a job; they start together, and the death of one ends all')
  restarts: int = option(3, 'how often a job is started again after exit status 70, 75, 134, 137 or 143')
  gpus: str = option('', 'GPUs to share out, such as 0,1,2,3; without it every job sees all')
  grace: int = option(30, 'seconds that the others of a job have to end when one has died')

  def __post_init__(self):
    workers = self.slots * self.processes
    if self.slots < 1 or self.processes < 1 or self.restarts < 0:
      raise LaunchError(f'--slots={self.slots} and --processes={self.processes} must be at least 1, and '
                        f'--restarts={self.restarts} at least 0')
    if self.gpus and len(self.gpus.split(',')) < workers:
      raise LaunchError(f'--gpus={self.gpus} is too few for {workers} processes at once: give more, or fewer --slots')

  def gpus_of(self, worker: int) -> list[str]:
    """The GPUs of one of the slots * processes workers."""
    return share(self.gpus.split(','), worker, self.slots * self.processes) if self.gpus else []


OPTIONS = Options


def share(things: Sequence[Any], index: int, count: int) -> list[Any]:
  """Part `index` of `things` cut into `count` parts that differ by at most one in length."""
  return list(things[len(things) * index // count:len(things) * (index + 1) // count])


def gang_env(processes: int, rank: int, port: int | str) -> dict[str, str]:
  """What tells a process which one of several it is; nothing for one alone."""
  return {} if processes == 1 else {
      'DIFFUSION_JAX_COORDINATOR': f'localhost:{port}', 'DIFFUSION_JAX_PROCESS_ID': str(rank),
      'DIFFUSION_JAX_NUM_PROCESSES': str(processes)}


def render(jobs: Iterable[Job], options: Options) -> str:
  """The shell commands of the jobs, a line for each process."""
  lines = []
  for job in jobs:
    job_lib.local_folder(job)
    for rank in range(options.processes):
      env = {**job.env, **gang_env(options.processes, rank, 'PORT')}
      words = [*(['env', *(f'{key}={value}' for key, value in env.items())] if env else []), *job.argv]
      lines.append(f'{shlex.join(words)}\n')
  return ''.join(lines)


class Gang:
  """The processes of one start of a job."""

  def __init__(self, job: Job, options: Options, slot: int, shown: bool):
    self.grace, self.status, self.told, self.deadline = options.grace, None, False, None
    self.members: list[subprocess.Popen] = []
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []
    workers, port = options.slots * options.processes, 0
    if options.processes > 1:
      with socket.socket() as s:  # a port that is free now
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    for rank in range(options.processes):
      worker = slot * options.processes + rank
      env = {**os.environ, **job.env, **gang_env(options.processes, rank, port)}
      if options.gpus:
        env['CUDA_VISIBLE_DEVICES'] = ','.join(options.gpus_of(worker))
      if shown and rank == 0:
        log = contextlib.nullcontext()
      else:
        env['PYTHONUNBUFFERED'] = '1'
        os.makedirs(job_lib.local_folder(job), exist_ok=True)
        log = open(os.path.join(job.workdir, f'log.{rank}.txt' if rank else 'log.txt'), 'ab')  # noqa: SIM115
      try:
        with log as out:
          # In a session of its own: Ctrl-C at the terminal reaches only the launcher, which tells the job once.
          self.members.append(process := subprocess.Popen(
              job.argv, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out and subprocess.STDOUT,
              start_new_session=True))
      except OSError as e:
        print(f'{job.name}: cannot start {job.argv[0]!r}: {e.strerror}', file=sys.stderr)
        self.status = 127
        break
      if 1 < workers <= len(cores):
        with contextlib.suppress(ProcessLookupError):  # it has ended already
          os.sched_setaffinity(process.pid, share(cores, worker, workers))  # jobs keep off each other's cores

  def terminate(self) -> None:
    """SIGTERM to all, once: a second one would keep them from saving."""
    if not self.told:
      self.told = True
      for process in self.members:
        process.send_signal(signal.SIGTERM)

  def kill(self) -> None:
    """SIGKILL to all, and to what they started."""
    for process in self.members:
      if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)

  def poll(self) -> int | None:
    """None while one runs, then 0 if all ended well, else the status of the one that died first.

    One that is not worth another start comes before one that is: the others may have died of the same thing.
    """
    statuses = [process.poll() for process in self.members]
    dead = [status for status in statuses if status]
    if self.status is None and dead:
      self.status = dead[0]
    if None not in statuses:
      ends = [status for status in (self.status, *dead) if status]
      return next((status for status in ends if not retryable(status)), ends[0] if ends else 0)
    if self.status is not None:  # the others would wait for it
      self.deadline = self.deadline or time.monotonic() + self.grace
      self.terminate()
      if time.monotonic() > self.deadline:
        self.kill()
    return None


def run(jobs: Sequence[Job], options: Options, shown: bool = True) -> list[int]:
  """Runs the jobs to their ends, and returns their exit statuses; 75 for one that was not started or not finished.

  A single job prints here if `shown`; otherwise each writes WORKDIR/log.txt. Ctrl-C, SIGTERM and SIGHUP are for the
  jobs: they are told once with SIGTERM, save, exit, and are not started again. A second Ctrl-C kills them.
  """
  signals: list[int] = []
  waiting = collections.deque((index, 0) for index in range(len(jobs)))
  running: dict[int, tuple[int, int, Gang]] = {}
  statuses = [INTERRUPTED] * len(jobs)
  previous = {number: signal.signal(number, lambda number, frame: signals.append(number)) for number in SIGNALS}
  try:
    while running or (waiting and not signals):
      for slot in range(options.slots):
        if slot not in running and waiting and not signals:
          index, attempt = waiting.popleft()
          running[slot] = index, attempt, Gang(jobs[index], options, slot, shown and len(jobs) == 1)
      for slot, (index, attempt, gang) in [*running.items()]:
        if signals:
          gang.terminate()
        if signals.count(signal.SIGINT) > 1:
          gang.kill()
        status = gang.poll()
        if status is not None:
          del running[slot]
          statuses[index] = shell_status(status)
          if retryable(status) and attempt < options.restarts and not signals:
            print(f'{jobs[index].name}: exit status {statuses[index]}: starting again ({attempt + 1} of '
                  f'{options.restarts})', file=sys.stderr)
            waiting.appendleft((index, attempt + 1))
      time.sleep(0.02)
  finally:
    for _, _, gang in running.values():
      gang.kill()
    for number, handler in previous.items():
      signal.signal(number, handler)
  return statuses


def submit(jobs: Sequence[Job], options: Options, folder: str) -> list[str]:
  """Runs the jobs, with WORKDIR/log.txt for what they print; returns when all have ended. The ids are the statuses."""
  job_lib.write(os.path.join(folder, 'local.sh'), render(jobs, options))
  return [str(status) for status in run(jobs, options, shown=False)]


def alive(ids: Iterable[str]) -> set[str]:
  """None: what `submit` started has ended when it returns."""
  return set()


def cancel(ids: Iterable[str]) -> None:
  """Nothing: what `submit` started has ended when it returns; until then, press Ctrl-C there."""


def main(argv: Sequence[str] | None = None) -> int:
  """Parses the flags and runs the job; --dry_run prints its command and starts nothing."""
  return job_lib.main(sys.modules[__name__], argv)


if __name__ == '__main__':
  sys.exit(main())
