"""Processes of one run that die, stand still or are told to stop: all end soon, with a reason, and the run goes on."""
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import runs
import test_processes as processes
from conftest import ROOT
from test_processes import alone  # noqa: F401  a fixture

from launch import local
from launch.job import Job

BEAT = 6  # seconds of silence after which a process counts as dead here
SOON = 5 * BEAT  # within which all others have ended, on a machine that does other things as well
ENDLESS = {'train__images': 10 ** 7, 'train__checkpoint_every': 128, 'train__sample_every': 10 ** 7,
           'train__log_every': 64}


CONFIG = '''
import os
import jax
from conftest import tiny_config
jax.config.update('jax_num_cpu_devices', int(os.environ['JAX_NUM_CPU_DEVICES']))
def get_config(run=''): return tiny_config(optimizer='sgd')
'''


def start(workdir, env, **changes):
  """A process that trains, with JAX_NUM_CPU_DEVICES in `env`."""
  (workdir.parent / 'devices.py').write_text(CONFIG)
  flags = [f'--config.{key.replace("__", ".")}={value}' for key, value in changes.items()]
  words = [sys.executable, '-m', 'diffusion_jax.train', '--allow=nets', f'--workdir={workdir}',
           f'--config={workdir.parent}/devices.py', *flags]
  places = os.pathsep.join([str(ROOT / 'tests'), os.environ.get('PYTHONPATH', '')])
  return subprocess.Popen(words, cwd=ROOT, env=os.environ | {'PYTHONPATH': places} | env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


class Gang:
  """Processes that train in `workdir` together, as so many commands by hand."""

  def __init__(self, workdir, count=2, env=(), **changes):
    with socket.socket() as s:
      s.bind(('localhost', 0))
      port = s.getsockname()[1]
    self.workdir = workdir
    self.members = [start(workdir, {
        'DIFFUSION_JAX_COORDINATOR': f'localhost:{port}', 'DIFFUSION_JAX_NUM_PROCESSES': str(count),
        'DIFFUSION_JAX_PROCESS_ID': str(i), 'DIFFUSION_JAX_HEARTBEAT': str(BEAT), 'JAX_NUM_CPU_DEVICES': '1',
        **dict(env)}, mesh__data=-1, **changes) for i in range(count)]

  def __enter__(self):
    return self

  def __exit__(self, *_):
    for member in self.members:
      with contextlib.suppress(ProcessLookupError):
        member.kill()
      member.communicate()

  def until(self, condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
      dead = [member for member in self.members if member.poll() is not None]
      assert not dead, [member.communicate() for member in dead]
      assert time.monotonic() < deadline
      time.sleep(0.01)

  def trained(self, records=3):
    """Waits until so many records are written."""
    had = len(runs.records(self.workdir))
    self.until(lambda: len(runs.records(self.workdir)) >= had + records)

  def ends(self, *members, seconds=SOON):
    """[(status, stderr)] of the members, all if none are named."""
    found = []
    for member in members or self.members:
      try:
        _, err = member.communicate(timeout=seconds)
      except subprocess.TimeoutExpired:
        pytest.fail(f'process {self.members.index(member)} still runs after {seconds} s')
      found.append((member.returncode, err))
    return found


def assert_said(status, err):
  assert status == 70, err
  reason = err.strip().splitlines()[-1]
  assert reason.startswith('error: process ') and 'with status 70: ' in reason


@pytest.mark.parametrize('victim', [1, 0], ids=['worker', 'coordinator'])
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGSTOP], ids=['killed', 'stopped'])
def test_the_others_end_soon_with_70_and_a_reason(tmp_path, victim, how):
  with Gang(tmp_path / 'run', 2, **ENDLESS) as gang:
    gang.trained()
    gang.members[victim].send_signal(how)
    [end] = gang.ends(gang.members[1 - victim])
    assert_said(*end)
    if how == signal.SIGSTOP:  # who comes back finds itself alone
      gang.members[victim].send_signal(signal.SIGCONT)
      [end] = gang.ends(gang.members[victim])
      assert_said(*end)


HANG = '''
import sys
import threading
if os.environ['DIFFUSION_JAX_PROCESS_ID'] == '1':
  train = sys.modules['__main__']
  def hang(values, config, step, *rest, real=train.describe):
    return real(values, config, step, *rest) if step < 16 else threading.Event().wait()
  train.describe = hang
'''


def test_what_hangs_although_it_lives_is_ended_by_the_watchdog(tmp_path, monkeypatch):
  """Process 1 waits for ever after step 16, and process 0 for it; both beat."""
  monkeypatch.setitem(globals(), 'CONFIG', CONFIG + HANG)
  with Gang(tmp_path / 'run', 2, {'DIFFUSION_JAX_WATCHDOG': '8'}, **ENDLESS) as gang:
    gang.trained()
    ends = gang.ends()
    for end in ends:
      assert_said(*end)
    assert any('nothing has moved for 8 s' in err for _, err in ends)  # the other may meet the closed connection first


def test_one_sigterm_stops_all_after_the_same_step_and_another_number_of_processes_continues(tmp_path):
  changes = {'train__images': 12_800, 'train__sample_every': 12_800, 'train__log_every': 640,
             'train__checkpoint_every': 6_400}
  workdir = tmp_path / 'run'
  told = []
  for count, victim in ((2, 1), (4, 2)):
    with Gang(workdir, count, **changes) as gang:
      gang.trained(1)
      gang.members[victim].send_signal(signal.SIGTERM)
      ends = gang.ends(seconds=240)  # they have to save
    assert [status for status, _ in ends] == [75] * count, ends
    told.append(max(int(name) for name in runs.names(workdir)))
    assert not (workdir / 'done.json').exists()
  assert told[0] < told[1] < 800
  changes['mesh__data'] = -1
  code, _, err = runs.finish(start(workdir, {'JAX_NUM_CPU_DEVICES': '2'}, **changes))
  assert code == 0, err
  single = tmp_path / 'single'
  assert runs.finish(start(single, {'JAX_NUM_CPU_DEVICES': '1'}, **changes))[0] == 0
  ours, theirs = ([r['loss'] for r in runs.records(folder) if r['step'] % 40 == 0] for folder in (workdir, single))
  np.testing.assert_allclose(ours[-1], theirs[-1], rtol=1e-3)
  assert sorted({r['step'] for r in runs.records(workdir)})[-1] == 800


def test_a_second_sigterm_ends_a_process_at_once_and_the_others_follow(tmp_path):
  with Gang(tmp_path / 'run', 2, **ENDLESS) as gang:
    gang.trained()
    gang.members[0].send_signal(signal.SIGSTOP)  # so that no step ends, and none is agreed on
    gang.members[1].send_signal(signal.SIGTERM)
    time.sleep(1)
    assert gang.members[1].poll() is None
    gang.members[1].send_signal(signal.SIGTERM)
    [(status, _)] = gang.ends(gang.members[1])
    assert status == 128 + signal.SIGTERM
    gang.members[0].send_signal(signal.SIGCONT)
    [end] = gang.ends(gang.members[0])
    assert_said(*end)


@pytest.mark.parametrize('fsdp', [1, 4], ids=['data', 'fsdp'])
def test_four_processes_equal_one(tmp_path, alone, fsdp):  # noqa: F811
  run = tmp_path / 'run'
  status, said = processes.gang(4, 1, run, f'{processes.write_config(tmp_path)} --workdir={run} '
                                f'--config.mesh.data={4 // fsdp} --config.mesh.fsdp={fsdp}')
  assert status == 0, said
  processes.assert_same(run, alone)


def test_a_launcher_starts_all_again_when_one_is_killed(tmp_path):
  """kill -9 after the first checkpoint; the run ends in the parameters of one that nothing disturbed."""
  (tmp_path / 'devices.py').write_text(CONFIG)
  losses = {}
  for name in 'killed', 'whole':
    run = tmp_path / name
    words = [sys.executable, '-m', 'diffusion_jax.train', '--allow=nets', f'--config={tmp_path}/devices.py',
             f'--workdir={run}', '--config.mesh.data=-1', '--config.train.images=6400',
             '--config.train.sample_every=6400']
    job = Job(name, ('sh', '-c', f'echo $$ > {tmp_path}/{name}.$DIFFUSION_JAX_PROCESS_ID; exec "$@"', 'sh', *words),
              str(run), {'JAX_NUM_CPU_DEVICES': '1', 'PYTHONPATH': processes.PLACES})

    def kill(run=run, name=name):
      while not any(one.isdecimal() for one in runs.names(run)):
        time.sleep(0.05)
      os.kill(int((tmp_path / f'{name}.1').read_text()), signal.SIGKILL)

    if name == 'killed':
      threading.Thread(target=kill, daemon=True).start()
    assert local.run([job], local.Options(processes=2, restarts=2), shown=False) == [0], (run / 'log.txt').read_text()
    losses[name] = {record['step']: record['loss'] for record in runs.records(run)}
  assert 'ends at' in (tmp_path / 'killed' / 'log.txt').read_text()  # it was not over before
  assert losses['killed'].keys() == losses['whole'].keys()
  np.testing.assert_allclose([*losses['killed'].values()], [*losses['whole'].values()], rtol=1e-5)
