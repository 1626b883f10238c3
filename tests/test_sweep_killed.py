"""Whoever is killed when: no point of a sweep is lost, and none is run twice."""
import contextlib
import fcntl
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from sweeps import LIGHT, NAMES, Children, Killed, make_world, put

from diffusion_jax import points, progress, sweep
from diffusion_jax.runtime import log


@pytest.fixture
def world(tmp_path, monkeypatch):
  return make_world(tmp_path, monkeypatch)


def test_run_killed_at_any_write_or_launch_loses_and_doubles_nothing(world, monkeypatch):
  """Killed at its first write, then, started again, at its second, ...: in the end every point was trained once."""
  left = 0
  def dying(real):
    def call(*args):
      nonlocal left
      left -= 1
      if left < 0:
        raise Killed
      return real(*args)
    return call
  for name in 'write', 'append':
    monkeypatch.setattr(log, name, dying(getattr(log, name)))
  for moment in range(100):
    left = moment
    with contextlib.suppress(Killed):
      world('run')
      break
  left = 100
  world('run')
  assert moment > 5 and {*world.states().values()} == {'finished'} and sorted(Children.trained) == sorted(NAMES)


@pytest.mark.parametrize('moment', range(4))
def test_a_launcher_killed_while_submitting(world, moment):
  world.fake.die = moment
  with pytest.raises(Killed):
    world('run')
  world.fake.die = 10 ** 9
  world('run')
  world('run')
  assert sorted(Children.trained) == sorted(NAMES) and sorted(world.fake.calls) == sorted(NAMES)


def test_jobs_submitted_twice_are_run_once(world, capsys):
  world.fake.here = False
  world('run')
  world('run')  # the launcher cannot tell that they are queued
  assert world.fake.calls == 2 * NAMES
  for name in world.fake.calls:
    assert sweep.main(['point', world.file, f'--root={world.root}', '--name', name]) == 0
  assert Children.trained == NAMES
  for name in NAMES:
    kinds = [line['event'] for line in log.read_lines(world.folder(name) / 'attempts.jsonl')]
    assert kinds == ['submit', 'submit', 'start', 'end']


def test_run_and_retry_leave_alone_what_runs(world, capsys):
  Children.ends[:] = [75]
  world('run --only=cosine-s0')
  with progress.locked(world.folder('cosine-s0')):
    for command in 'run', 'retry --all':
      capsys.readouterr()
      assert world(f'{command} --dry_run') == 0
      assert re.search(r'skip +cosine-s0 +running, pid \d+ on ', capsys.readouterr().out)
  assert world('run --dry_run') == 0 and 'run   cosine-s0' in capsys.readouterr().out


STUB = '''
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[-1].partition('=')[2])
def note(number, frame):
  (folder / 'told').write_text(signal.Signals(number).name)
  sys.exit(75)
signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGTERM, note)
(folder / 'up').write_text(sys.argv[1])
while not (folder / 'go').exists():
  time.sleep(0.01)
print('the last word', file=sys.stderr)
'''


class Light:
  """`sweep point` as a process, its children a stub that waits for a file named go."""

  def __init__(self, tmp_path):
    self.file, self.root, self.tmp = put(tmp_path / 'sweep.py', LIGHT), tmp_path / 'root', tmp_path
    self.stub = put(tmp_path / 'stub.py', STUB)
    self.code = (f'import sys; from diffusion_jax import attempt, sweep; attempt.PYTHON = [sys.executable, '
                 f'{self.stub!r}]; sys.exit(sweep.main(sys.argv[1:]))')

  def start(self):
    words = ['point', self.file, f'--root={self.root}', '--name=a-s0']
    return subprocess.Popen([sys.executable, '-c', self.code, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)

  def folder(self):
    return next(self.root.glob('a-s0-*'), self.tmp / 'none')

  def state(self):
    return progress.state(points.Point('a-s0', 'a', 0, '', self.folder(), ''), [])

  def wait(self, condition):
    deadline = time.monotonic() + 120
    while not condition():
      assert time.monotonic() < deadline
      time.sleep(0.01)

  def up(self):
    self.wait(lambda: (self.folder() / 'up').exists())


@pytest.fixture
def light(tmp_path):
  return Light(tmp_path)


def test_two_at_one_point_and_one_that_is_killed(light):
  first = light.start()
  light.up()
  assert light.state().state == 'running'
  second = light.start()
  out, _ = second.communicate(timeout=120)
  assert second.returncode == 0 and f'running already: pid {first.pid} on ' in out
  first.kill()
  first.communicate(timeout=60)
  light.wait(lambda: light.state().state != 'running')  # its child is told, saves and ends
  assert (light.folder() / 'told').read_text() == 'SIGTERM'
  assert light.state().state == 'interrupted' and 'without a word' in light.state().note
  (light.folder() / 'go').touch()
  third = light.start()
  out, _ = third.communicate(timeout=120)
  assert third.returncode == 0 and light.state().state == 'finished', out
  assert [line['event'] for line in log.read_lines(light.folder() / 'attempts.jsonl')] == ['start', 'start', 'end']
  assert len([*light.root.iterdir()]) == 1


def test_a_signal_is_for_the_child_and_ends_the_point(light):
  """And cancel sends it. The child is given the other of the two signals: a scheduler may have sent it the first."""
  process = light.start()
  light.up()
  plan = points.Plan(light.file, '', (), '', (points.Point('a-s0', 'a', 0, '', light.folder(), ''),))
  points.save_plan(light.root, plan)
  assert sweep.main(['cancel', light.file, f'--root={light.root}']) == 0
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 75, out
  assert (light.folder() / 'told').read_text() == 'SIGINT' and (light.folder() / 'up').read_text().endswith('train')
  assert (light.state().state, light.state().note) == ('interrupted', 'cancelled')
  (light.folder() / 'go').touch()
  again = light.start()  # as a launcher does that saw status 75
  out, _ = again.communicate(timeout=120)
  assert again.returncode == 0 and 'was cancelled' in out and light.state().state == 'interrupted'


def test_cancel_reaches_the_launcher_and_run_lifts_it(world):
  world.fake.here = False
  world('run')
  assert world('cancel --only=cosine') == 0
  assert world.fake.cancelled == [f'id-{world.folder(name).name}' for name in NAMES[::2]]
  for name in NAMES[:1], NAMES[1:2]:
    sweep.main(['point', world.file, f'--root={world.root}', '--name', *name])
  assert Children.trained == ['linear-s0']  # the other was cancelled, wherever its job still was
  world.fake.here = True
  world('run')
  assert {*world.states().values()} == {'finished'}


def test_looking_does_not_keep_a_point_from_starting(tmp_path):
  with open(tmp_path / 'point.lock', 'ab') as file:
    fcntl.flock(file, fcntl.LOCK_SH)  # as `held` does, for an instant
    assert not progress.held(tmp_path)
    signal.signal(signal.SIGALRM, lambda *_: fcntl.flock(file, fcntl.LOCK_UN))
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with progress.locked(tmp_path, patience=60) as lock:
      assert lock is not None and progress.held(tmp_path)
      with progress.locked(tmp_path, patience=0) as other:
        assert other is None
  assert not progress.held(tmp_path)
