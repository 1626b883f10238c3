"""One trainer to a run folder: the second is refused, and told who the first is.

The lock is a `flock` of RUN/train.lock, which ends with its process, however that ends. In the file stands who holds
it, with a number that counts up every few seconds: where a shared file system does not show one machine the locks of
another, or where there are none (gs://), that shows whether the owner lives. No two clocks are compared.
"""
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from diffusion_jax.runtime import log, paths
from diffusion_jax.runtime.config import UserError

BEAT_SECONDS = 10.0   # the owner counts up so often
WATCH_SECONDS = 35.0  # an owner whose lock cannot be seen is dead if it has not counted up for so long
SETTLE_SECONDS = 1.0  # where there are no locks, the last of several that write at once is the owner
SIZE = 512            # bytes of the record, which is written in place
NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


@contextlib.contextmanager
def owned(workdir: pathlib.Path, patience: float = 2.0) -> Iterator[None]:
  """Holds a run folder, which is made if need be; UserError naming host, pid and since when if another process does.

  `patience`: seconds for which an owner may still be ending. A child process does not hold the lock; in one job of
  several processes only the writer may ask. `workdir` is what paths.folder gives.
  """
  me = {'host': socket.gethostname(), 'pid': os.getpid(), 'since': log.now(), 'machine': machine(),
        'token': secrets.token_hex(8), 'beat': 0}
  path = workdir / 'train.lock'
  with contextlib.ExitStack() as stack:
    try:
      seen = False
      if not paths.is_remote(path):
        workdir.mkdir(parents=True, exist_ok=True)
        seen = _flock(path, patience, stack)
      last = read(path)
      if last and not (seen and last.get('machine') == me['machine']):
        _watch(path, last)
      write(path, me)
      if not seen:
        time.sleep(SETTLE_SECONDS)
        _refuse_unless(path, me['token'])
    except OSError as e:
      raise UserError(f'{str(workdir)!r} cannot be locked for training: {e.strerror or e}') from e
    stop = threading.Event()
    beats = threading.Thread(target=_count, args=(path, me, stop), daemon=True)
    beats.start()
    try:
      yield
    finally:
      stop.set()
      beats.join()
      with contextlib.suppress(OSError, UserError):  # the lock itself ends with the file
        write(path, {})


def machine() -> str:
  """What two containers on one kernel share, and two machines of the same name do not."""
  with contextlib.suppress(OSError):
    return pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
  return socket.gethostname()


def read(path: pathlib.Path) -> dict[str, Any]:
  """The record of who holds the lock; {} if nobody does."""
  try:
    record = json.loads(path.read_text())
  except (FileNotFoundError, ValueError):
    return {}
  return record if isinstance(record, dict) else {}


def write(path: pathlib.Path, record: dict[str, Any]) -> None:
  """In place: another file under this name would be another lock."""
  data = (json.dumps(record).ljust(SIZE - 1) + '\n').encode()
  if paths.is_remote(path):
    paths.write(path, data)
  else:
    with open(path, 'r+b', buffering=0) as file:
      file.write(data)


def _flock(path: pathlib.Path, patience: float, stack: contextlib.ExitStack) -> bool:
  """Locks the file until `stack` ends; False if the file system has no locks, UserError if another process has it."""
  stack.enter_context(file := open(path, 'ab'))  # noqa: SIM115
  deadline = time.monotonic() + patience
  while True:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      return True
    except BlockingIOError:
      if time.monotonic() > deadline:
        raise _in_use(path, read(path)) from None
      time.sleep(0.05)
    except OSError as e:
      if e.errno not in NO_LOCKS:
        raise
      return False


def _in_use(path: pathlib.Path, record: dict[str, Any]) -> UserError:
  who = ' '.join(f'{key} {record.get(key, "?")}' for key in ('host', 'pid', 'since'))
  return UserError(f'another process trains in {str(path.parent)!r} ({who}): wait for it, stop it, or give another '
                   f'--workdir')


def _watch(path: pathlib.Path, last: dict[str, Any]) -> None:
  """Returns when the owner has stood still for WATCH_SECONDS, or gives the folder back."""
  print(f'{path.parent}: host {last.get("host", "?")}, pid {last.get("pid", "?")} had it; watching for '
        f'{WATCH_SECONDS:.0f} s whether that still lives', file=sys.stderr)
  deadline = time.monotonic() + WATCH_SECONDS
  while time.monotonic() < deadline:
    time.sleep(min(1.0, WATCH_SECONDS / 10))
    record = read(path)
    if not record:
      return
    if record != last:
      raise _in_use(path, record)


def _refuse_unless(path: pathlib.Path, token: str) -> None:
  record = read(path)
  if record.get('token') != token:
    raise _in_use(path, record)


def _count(path: pathlib.Path, me: dict[str, Any], stop: threading.Event) -> None:
  """Counts up until told to stop; ends the process if another has taken the folder, which it may after a long sleep."""
  beat = 0
  while not stop.wait(BEAT_SECONDS):
    with contextlib.suppress(OSError, UserError):  # the next one may get through
      record = read(path)
      if record and record.get('token') != me['token']:
        print(f'error: {_in_use(path, record)}; this process had stood still, and ends without saving',
              file=sys.stderr, flush=True)
        os._exit(1)
      beat += 1
      write(path, {**me, 'beat': beat})
