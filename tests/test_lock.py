"""The lock of a run folder: who has it is alone, is named, and leaves nothing behind that is in the way."""
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT

from diffusion_jax.runtime import lock, paths
from diffusion_jax.runtime.config import UserError

HOLD = '''
import pathlib, sys, time
from diffusion_jax.runtime import lock
lock.BEAT_SECONDS = 0.05
if sys.argv[2] == 'no flock':
  lock._flock = lambda path, patience, stack: path.touch()
with lock.owned(pathlib.Path(sys.argv[1])):
  print('held', flush=True)
  time.sleep(300)
'''


@pytest.fixture
def holder():
  """holder(folder) -> a process that holds it."""
  started = []

  def start(folder, kind='flock'):
    process = subprocess.Popen([sys.executable, '-c', HOLD, str(folder), kind], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started.append(process)
    assert process.stdout.readline() == 'held\n', process.communicate()[1]
    return process
  yield start
  for process in started:
    process.kill()
    process.communicate()


@pytest.fixture
def quick(monkeypatch):
  """Seconds become tenths."""
  for name in 'BEAT_SECONDS', 'WATCH_SECONDS', 'SETTLE_SECONDS':
    monkeypatch.setattr(lock, name, getattr(lock, name) / 20)


def whole(path, data):
  path.with_suffix('.new').write_bytes(data)
  path.with_suffix('.new').replace(path)


@pytest.fixture(params=['no flock', 'bucket'])
def without_locks(request, quick, monkeypatch):
  """A file system without locks; a store whose objects are written whole."""
  if request.param == 'bucket':
    monkeypatch.setattr(paths, 'is_remote', lambda path: True)
    monkeypatch.setattr(paths, 'write', whole)
  else:
    def refuse(file, how):
      raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    monkeypatch.setattr(lock.fcntl, 'flock', refuse)


OTHER = {'host': 'elsewhere', 'pid': 7, 'since': '2026-01-01T00:00:00+00:00', 'machine': 'm', 'token': 't', 'beat': 3}


def leave(folder, **changes):
  """What an owner leaves that was killed on another machine."""
  (folder / 'train.lock').touch()
  lock.write(folder / 'train.lock', OTHER | changes)


class Counting:
  """An owner on another machine, alive."""

  def __init__(self, folder):
    self.folder, self.beat, self.stop = folder, 0, threading.Event()
    self.thread = threading.Thread(target=self.run, daemon=True)

  def run(self):
    while not self.stop.wait(0.05):
      self.beat += 1
      leave(self.folder, beat=self.beat)

  def __enter__(self):
    leave(self.folder)
    self.thread.start()

  def __exit__(self, *_):
    self.stop.set()
    self.thread.join()


def test_the_second_is_refused_and_told_who_the_first_is(holder, tmp_path):
  process = holder(tmp_path / 'run')
  with pytest.raises(UserError, match=re.escape(f'host {socket.gethostname()} pid {process.pid} since 20')), \
       lock.owned(tmp_path / 'run', patience=0):
    pytest.fail('held by two')
  with lock.owned(tmp_path / 'other', patience=0):
    pass


def test_a_killed_owner_is_no_obstacle(holder, tmp_path):
  process = holder(tmp_path)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert lock.read(tmp_path / 'train.lock')['pid'] == process.pid  # stale
  with lock.owned(tmp_path, patience=0):
    assert lock.read(tmp_path / 'train.lock')['pid'] == os.getpid()
  assert lock.read(tmp_path / 'train.lock') == {}


def test_a_stopped_owner_still_has_it(holder, tmp_path):
  process = holder(tmp_path)
  process.send_signal(signal.SIGSTOP)
  with pytest.raises(UserError, match=f'pid {process.pid}'), lock.owned(tmp_path, patience=0):
    pytest.fail('held by two')


def test_one_process_cannot_have_it_twice_and_an_error_gives_it_back(tmp_path):
  with pytest.raises(KeyError), lock.owned(tmp_path):
    with pytest.raises(UserError, match='another process trains'), lock.owned(tmp_path, patience=0.1):
      pytest.fail('held by two')
    raise KeyError
  with lock.owned(tmp_path, patience=0):
    pass


def test_one_who_is_just_ending_is_waited_for(tmp_path):
  inside, leave_it = threading.Event(), threading.Event()

  def first():
    with lock.owned(tmp_path):
      inside.set()
      leave_it.wait(60)
  thread = threading.Thread(target=first)
  thread.start()
  assert inside.wait(60)
  threading.Timer(0.2, leave_it.set).start()
  with lock.owned(tmp_path, patience=60):
    assert leave_it.is_set()
  thread.join()


def test_another_machine_that_lives_is_seen_though_its_lock_is_not(quick, tmp_path):
  with Counting(tmp_path), pytest.raises(UserError, match=r'host elsewhere pid 7'), lock.owned(tmp_path):
    pytest.fail('held by two')


def test_another_machine_that_died_is_waited_for_and_then_no_obstacle(quick, tmp_path, capsys):
  leave(tmp_path)
  with lock.owned(tmp_path):
    assert lock.read(tmp_path / 'train.lock')['host'] == socket.gethostname()
  assert 'host elsewhere, pid 7 had it' in capsys.readouterr().err


@pytest.mark.parametrize('content', ['', 'no json', '[]', '{}'])
def test_a_file_that_names_nobody_is_no_obstacle(content, tmp_path):
  (tmp_path / 'train.lock').write_text(content)
  with lock.owned(tmp_path, patience=0):
    pass


def test_without_locks_the_count_shows_who_lives(without_locks, tmp_path):
  with lock.owned(tmp_path), pytest.raises(UserError, match=f'pid {os.getpid()} '), lock.owned(tmp_path):
    pytest.fail('held by two')
  leave(tmp_path)
  with lock.owned(tmp_path):
    pass
  with Counting(tmp_path), pytest.raises(UserError, match='elsewhere'), lock.owned(tmp_path):
    pytest.fail('held by two')


def test_of_two_that_come_at_once_without_locks_the_last_to_write_gets_it(without_locks, tmp_path, monkeypatch):
  monkeypatch.setattr(lock.time, 'sleep', lambda seconds: leave(tmp_path))
  with pytest.raises(UserError, match='elsewhere'), lock.owned(tmp_path):
    pytest.fail('held by two')
  assert lock.read(tmp_path / 'train.lock') == OTHER


def test_who_has_lost_the_folder_while_it_stood_still_ends(holder, tmp_path):
  process = holder(tmp_path, 'no flock')
  process.send_signal(signal.SIGSTOP)
  leave(tmp_path)  # another took it over
  process.send_signal(signal.SIGCONT)
  while process.poll() is None:  # it may have been about to write
    leave(tmp_path)
    time.sleep(0.1)
  _, err = process.communicate()
  assert process.returncode == 1 and 'host elsewhere pid 7' in err and err.count('\n') == 1


def test_a_place_that_cannot_be_locked_is_named(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match=r"file/run' cannot be locked for training: Not a directory"), \
       lock.owned(tmp_path / 'file' / 'run'):
    pytest.fail('held')
