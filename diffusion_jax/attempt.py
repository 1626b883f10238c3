"""One attempt at one point of a sweep: `diffusion-jax sweep point`, the command that every job of a sweep runs.

It holds the lock of the folder, trains and evaluates in child processes, and writes down how it began and ended. Where
a job has several processes, this is the part of process 0: the others hear from it whether there is anything to do, and
then run the same two commands.
"""
import argparse
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from diffusion_jax import points, progress, records
from diffusion_jax.points import Point
from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime.config import UserError, nearest

STOPPED = 75           # as train's: stopped, everything saved, the same command continues
PYTHON = sys.executable, '-m'
ECHO_SECONDS = 5.0     # a second signal within this is the same wish, come by another way
GATHER_SECONDS = 300   # for which the processes of a job wait for each other
GO, NO = b'go', b'no'


def point(flags: argparse.Namespace) -> int:
  """`sweep point`: trains and evaluates one point, from wherever it stopped; what every job of a sweep runs.

  Returns 0 if it is finished, or if another process is at it; 75 if it was stopped; else the status of what failed.
  """
  others = int(os.environ.get('DIFFUSION_JAX_NUM_PROCESSES') or 1) - 1
  if others and os.environ.get('DIFFUSION_JAX_PROCESS_ID') != '0':
    return follow(flags) if told() else 0
  said = []

  def tell(word):
    if others and not said:
      said.append(word)
      call(word, others)

  try:
    return lead(flags, lambda: tell(GO))
  finally:
    tell(NO)


def lead(flags: argparse.Namespace, begin: Callable[[], None]) -> int:
  """What process 0 does; `begin` is called if there is something to do."""
  from diffusion_jax.runtime import log
  one, evaluate = claim(flags)
  with progress.locked(one.folder) as lock:
    now = progress.state(one, evaluate)
    if lock is None:
      print(f'{one.name} is running already: {now.note}')
      return 0
    if progress.finished(one.folder, evaluate):
      print(f'{one.name} is finished: {one.folder}')
      return 0
    if now.cancelled:
      print(f'{one.name} was cancelled: sweep run or sweep retry starts it again')
      return 0
    if one.code != (code := points.code_version()) and not flags.any_code:
      why = f'it was begun by other code ({one.code}, now it is {code})'
      log.append(one.folder / 'attempts.jsonl', {'event': 'refused', 'time': log.now(), 'error': why})
      raise UserError(f'{one.folder}: {why}; sweep run --any_code continues it, sweep run --again trains it anew')
    begin()
    return work(flags, one.folder, evaluate, lock)


def follow(flags: argparse.Namespace) -> int:
  """What every other process does: the same commands, which meet those of process 0."""
  one, evaluate = claim(flags)
  with Children() as children:
    return commands(children, flags, one.folder, evaluate)


def coordinator() -> tuple[str, int]:
  """(host, port) where the processes of this job meet; UserError if it is not said."""
  host, _, port = os.environ.get('DIFFUSION_JAX_COORDINATOR', '').rpartition(':')
  if not host or not port.isdecimal():
    raise UserError('a point of a sweep that runs as several processes needs DIFFUSION_JAX_COORDINATOR=HOST:PORT')
  return host, int(port)


def call(word: bytes, others: int) -> None:
  """Tells `word` to so many other processes, which ask where the coordinator will be."""
  with socket.create_server(('', coordinator()[1])) as server:
    server.settimeout(GATHER_SECONDS)
    try:
      for _ in range(others):
        connection, _ = server.accept()
        with connection:
          connection.sendall(word)
    except TimeoutError:
      raise Apart(f'of the {others} other processes of this job not all came within {GATHER_SECONDS} s') from None


def told() -> bool:
  """Asks process 0 whether there is anything to do."""
  deadline = time.monotonic() + GATHER_SECONDS
  while time.monotonic() < deadline:
    with contextlib.suppress(OSError), socket.create_connection(coordinator(), timeout=GATHER_SECONDS) as connection:
      if (word := connection.recv(len(GO))) in (GO, NO):
        return word == GO
    time.sleep(0.1)
  raise Apart(f'process 0 of this job has not been heard of for {GATHER_SECONDS} s')


class Apart(UserError):
  """The processes of a job have not met; they may when it is started again."""
  status = 70


def claim(flags: argparse.Namespace) -> tuple[Point, list[str] | None]:
  """(the point, flags of its evaluation); UserError if its config has changed since `run` made its folder."""
  runs, seeds, evaluate = points.read_sweep(flags.file)
  known = {f'{run}-s{seed}': (run, seed) for run in runs for seed in seeds}
  if flags.name not in known:
    raise UserError(f'{flags.file!r} has no point {flags.name!r}{nearest(flags.name, known)}')
  config, root = config_lib.load(f'{flags.file}:{flags.name}'), points.root_of(flags.file, flags.root)
  made, digest = points.folders(root), points.config_hash(config)
  one = points.place(root, Point(flags.name, *known[flags.name], digest, root, points.code_version()), made)
  if not (one.folder / 'point.json').exists():
    if alike := made.get(flags.name):
      old, changed = alike[-1]['folder'], []
      with contextlib.suppress(UserError):
        changed = config_lib.differences(config_lib.from_json(old / 'config.json'), config)
      raise UserError(f'the config of {flags.name!r} has changed since {old} was made'
                      f'{f" ({changed[0]})" if changed else ""}: sweep run makes a folder for the new one')
    points.make(one, flags.file, evaluate)
  return one, records.read_json(one.folder / 'point.json').get('evaluate')


def work(flags: argparse.Namespace, folder: pathlib.Path, evaluate: list[str] | None, lock: int) -> int:
  """Trains and evaluates, in processes of their own, which leaves memory and devices to each; writes both ends."""
  from diffusion_jax.runtime import log
  attempts = folder / 'attempts.jsonl'
  who = {'host': socket.gethostname(), 'pid': os.getpid()}
  with Children(lock) as children:
    log.append(attempts, {'event': 'start', 'time': log.now(), **who, 'code': points.code_version()})
    status = commands(children, flags, folder, evaluate)
    if not status:
      log.write_json(folder / 'finished.json', {
          'time': log.now(), 'code': points.code_version(), 'evaluate': evaluate})
    error = f'stopped by {children.stopped}' if children.stopped else children.said
    log.append(attempts, {'event': 'end', 'time': log.now(), **who, 'status': status, 'error': error if status else ''})
  return status


def commands(children: 'Children', flags: argparse.Namespace, folder: pathlib.Path, evaluate: list[str] | None) -> int:
  """Trains, unless that is done, and evaluates; the status of what failed, else 0."""
  status, allow = 0, [f'--allow={package}' for package in flags.allow]
  if not (folder / 'done.json').exists():
    status = children.run('train', f'--config={flags.file}:{flags.name}', f'--workdir={folder}', *allow)
  if not status and evaluate is not None:
    status = children.run('evaluate', f'--workdir={folder}', *evaluate, *allow)
  return status


class Children:
  """Runs commands one after another; a SIGTERM or Ctrl-C is for the one that runs, and no other is started after it.

  A child holds the lock as well and ends with its parent, so that no kill leaves two at one point.
  """

  def __init__(self, *locks: int):
    self.locks, self.process, self.stopped, self.since, self.said = locks, None, '', 0.0, ''

  def __enter__(self):
    self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
    return self

  def __exit__(self, *_):
    for number, handler in self.previous.items():
      signal.signal(number, handler)

  def run(self, command: str, *flags: str) -> int:
    """The exit status of `python -m diffusion_jax.COMMAND FLAGS`; what it says last on stderr is kept in `said`."""
    if self.stopped:
      return STOPPED
    process = self.process = subprocess.Popen(
        [*PYTHON, f'diffusion_jax.{command}', *flags], stderr=subprocess.PIPE, pass_fds=self.locks,
        preexec_fn=_end_with(os.getpid()))
    if self.stopped:  # between the two lines above
      self._pass()
    for line in process.stderr:
      text = line.decode('utf-8', 'replace')
      sys.stderr.write(text)
      sys.stderr.flush()
      self.said = text.strip()[:500] or self.said
    status = process.wait()
    self.process = None
    status = 128 - status if status < 0 else status
    return STOPPED if self.stopped and status in (130, 143) else status

  def _note(self, number: int, frame: Any) -> None:
    if not self.stopped or time.monotonic() - self.since > ECHO_SECONDS:
      self.stopped, self.since = signal.Signals(number).name, time.monotonic()
      self._pass()

  def _pass(self) -> None:
    # A terminal or a scheduler may signal every process, the child too. A second signal of one kind would stop it
    # before it has saved, so it is given the other kind, which means the same.
    if self.process:
      self.process.send_signal(signal.SIGINT if self.stopped == 'SIGTERM' else signal.SIGTERM)


def _end_with(parent: int) -> Callable[[], None] | None:
  """What a child calls to be sent a SIGTERM when its parent dies, where the system can do that."""
  if sys.platform != 'linux':
    return None
  import ctypes
  prctl = ctypes.CDLL(None).prctl  # looked up before the fork

  def arrange():
    prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
      os._exit(STOPPED)
  return arrange
