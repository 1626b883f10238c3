"""How far a point of a sweep is: from its files, and from its lock, which ends with the process that holds it."""
import contextlib
import fcntl
import importlib
import importlib.util
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from diffusion_jax import records
from diffusion_jax.points import Point
from diffusion_jax.runtime.config import UserError

WAITING, RUNNING, INTERRUPTED, FAILED, FINISHED = STATES = 'waiting', 'running', 'interrupted', 'failed', 'finished'


# The lock

@contextlib.contextmanager
def locked(folder: pathlib.Path, patience: float = 1.0) -> Iterator[int | None]:
  """Holds the lock of a folder; gives its file descriptor, None where another process holds it.

  A child that is given the descriptor holds the lock too. Tried for `patience` seconds: who only looks (see `held`)
  holds it for an instant.
  """
  with open(folder / 'point.lock', 'ab') as file:
    deadline = time.monotonic() + patience
    while True:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError:
        if time.monotonic() > deadline:
          yield None
          return
        time.sleep(0.05)
    yield file.fileno()


def held(folder: pathlib.Path) -> bool:
  """Whether a process works on the point."""
  try:
    with open(folder / 'point.lock', 'rb') as file:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except FileNotFoundError:
    pass
  return False


# How far a point is

class State(NamedTuple):
  """How far a point is. `last` is the start line of its newest attempt and `end` its end, {} where there is none."""
  state: str
  note: str           # why, in words
  last: dict
  end: dict
  cancelled: bool     # and not submitted since
  codes: tuple[str, ...]  # the code versions that worked on it


def finished(folder: pathlib.Path, evaluate: Sequence[str] | None) -> bool:
  """Whether a point is trained, and evaluated with these flags."""
  done = records.read_json(folder / 'finished.json')
  return bool(done) and done.get('evaluate') == (None if evaluate is None else list(evaluate))


def state(point: Point, evaluate: Sequence[str] | None) -> State:
  """The state of a point, from its files and its lock."""
  running = held(point.folder)
  lines = records.read_lines(point.folder / 'attempts.jsonl')
  kinds = [line.get('event') for line in lines]
  start = len(kinds) - 1 - kinds[::-1].index('start') if 'start' in kinds else None
  last = lines[start] if start is not None else {}
  end = next((line for line in lines[start:] if line.get('event') == 'end'), {}) if last else {}
  running = running or (bool(last) and not end and held(point.folder))  # it may have begun in between
  cancelled = [kind for kind in kinds if kind in ('submit', 'cancel')][-1:] == ['cancel']
  make = lambda *words: State(*words, last, end, cancelled,
                              tuple(sorted({str(line['code']) for line in lines if line.get('code')})))
  who = f'pid {last.get("pid", "?")} on {last.get("host", "?")}'
  if running:
    return make(RUNNING, who)
  if finished(point.folder, evaluate):
    return make(FINISHED, '')
  said = 'cancelled' if cancelled else f'refused: {lines[-1].get("error")}' if kinds[-1:] == ['refused'] else ''
  if (point.folder / 'finished.json').exists():
    return make(WAITING, said or 'the flags of its evaluation have changed')
  if not last:
    return make(WAITING, said)
  if not end:
    return make(INTERRUPTED, said or f'ended without a word ({who})')
  status, error = end.get('status'), str(end.get('error') or '')
  from launch import job  # see need_launch
  again = status == 0 or (type(status) is int and job.retryable(status))
  said = (said if again else '') or f'status {status}' + f': {error}' * bool(error)
  return make(INTERRUPTED if again else FAILED, said)


def need_launch() -> None:
  """Makes the launchers importable; UserError where this is no checkout."""
  if importlib.util.find_spec('launch') is None:
    sys.path.append(os.getcwd())  # which the console script does not have
  try:
    importlib.import_module('launch.job')
  except ImportError as e:
    raise UserError(f'the launchers cannot be imported ({e}): run this in the root of a checkout, where launch/ lies'
                    ) from e


def tail(path: pathlib.Path, size: int = 65536) -> dict:
  """The last whole record of a .jsonl file, from its last `size` bytes; {} where there is none."""
  try:
    with open(path, 'rb') as file:
      file.seek(max(0, file.seek(0, os.SEEK_END) - size))
      lines = file.read().decode('utf-8', 'replace').split('\n')
  except OSError:
    return {}
  for line in reversed(lines):
    try:
      record = json.loads(line)
    except (ValueError, RecursionError):
      continue
    if isinstance(record, dict):
      return record
  return {}
