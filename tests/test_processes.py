"""One command as several real processes: the run, the samples and the scores of one, and records written once."""
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
import sweeps
from conftest import ROOT, tiny_config

from diffusion_jax import attempt, evaluate, model, sample, train
from diffusion_jax.runtime import checkpoint, distributed, log, sharding
from diffusion_jax.runtime.config import UserError
from launch import local
from launch.job import Job

# Gradient descent: where a gradient is 0, Adam makes whole steps of rounding.
CHANGES = {'optimizer': 'sgd', 'train__images': 96, 'train__checkpoint_every': 48, 'train__sample_every': 96}
CONFIG = f'''
from conftest import tiny_config
def get_config(run=''): return tiny_config(**{CHANGES})
'''
PLACES = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])


def gang(processes, devices, workdir, *commands):
  """Runs commands as so many processes of so many devices each; returns the exit status and what each said."""
  words = ' , '.join(commands).split()
  job = Job('gang', (sys.executable, str(ROOT / 'tests' / 'gang.py'), *words), str(workdir),
            {'JAX_NUM_CPU_DEVICES': str(devices), 'PYTHONPATH': PLACES})
  [status] = local.run([job], local.Options(processes=processes, restarts=0), shown=False)
  return status, [(workdir / (f'log.{i}.txt' if i else 'log.txt')).read_text() for i in range(processes)]


def write_config(folder):
  (folder / 'config.py').write_text(CONFIG)
  return f'train --config={folder}/config.py'


def params_of(workdir):
  """The arrays of the last checkpoint, as one process on one device reads them."""
  config = tiny_config(**CHANGES)
  abstract = model.abstract_state(model.make(config, (8, 8, 1), 10), sharding.make_mesh(1, 1))
  state, meta = checkpoint.Checkpoints(workdir).restore(abstract)
  assert meta['step'] == 6
  return state


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """The run of one process on one device."""
  workdir = tmp_path_factory.mktemp('processes') / 'alone'
  assert train.train(tiny_config(**CHANGES), workdir) == 0
  return workdir


@pytest.fixture(scope='module')
def two(tmp_path_factory):
  """The run, samples and scores of two processes with two devices each: data and parameters split over all."""
  folder = tmp_path_factory.mktemp('two')
  run = folder / 'run'
  status, said = gang(2, 2, run, f'{write_config(folder)} --workdir={run} --config.mesh.data=1 --config.mesh.fsdp=4',
                      f'sample --workdir={run} --num=11 --out={run}/samples.npz',
                      f'evaluate --workdir={run} --features=pixels --batch_size=8 --num=44 --ema=main')
  assert status == 0, said
  return run, said


def assert_same(run, alone):
  for (name, x), y in zip(jax.tree_util.tree_leaves_with_path(params_of(run)), jax.tree.leaves(params_of(alone)),
                          strict=True):
    np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-6, atol=1e-6, err_msg=str(name))


def test_two_processes_equal_one(two, alone):
  assert_same(two[0], alone)
  parts = [*(two[0] / 'checkpoints' / '6' / 'state').glob('ocdbt.process_*')]
  assert len(parts) == 2  # each wrote its own


def test_records_are_written_once(two, alone):
  (run, said), keys = two, ('step', 'images', 'count_by_logsnr')
  ours, theirs = (log.read_lines(folder / 'metrics.jsonl') for folder in (run, alone))
  assert [[r[key] for key in keys] for r in ours] == [[r[key] for key in keys] for r in theirs]
  np.testing.assert_allclose([r['loss'] for r in ours], [r['loss'] for r in theirs], rtol=1e-5)
  assert len([*run.glob('events.out.tfevents.*')]) == 1
  assert [p.name for p in (run / 'samples').iterdir()] == [p.name for p in (alone / 'samples').iterdir()]
  assert json.loads((run / 'done.json').read_text())['images'] == 96
  assert 'images/s' in said[0] and 'images/s' not in said[1]


def test_samples_are_those_of_one_process(two, tmp_path):
  assert sample.main([f'--workdir={two[0]}', '--num=11', f'--out={tmp_path}/samples.npz']) == 0
  with np.load(two[0] / 'samples.npz') as ours, np.load(tmp_path / 'samples.npz') as theirs:
    np.testing.assert_array_equal(ours['id'], theirs['id'])
    assert np.abs(ours['image'].astype(int) - theirs['image'].astype(int)).max() <= 1  # another compiled program


def scores(workdir):
  return {r['metric']: r['value'] for r in log.read_lines(workdir / 'eval.jsonl') if not r.get('unit')}


def test_scores_are_those_of_one_process_and_continue_with_another_number(two, tmp_path):
  """44 samples in 6 batches; one process makes only what is missing."""
  workdir, flags = tmp_path / 'again', ['--features=pixels', '--batch_size=8', '--num=44', '--ema=main']
  shutil.copytree(two[0], workdir)
  files = sorted((workdir / 'eval').rglob('*.npz'))
  assert len(files) == 12  # of samples, and of their features
  before = scores(workdir)
  (workdir / 'eval.jsonl').unlink()
  lost, kept = files[3], {f: f.stat().st_mtime_ns for f in files if f != files[3]}
  lost.unlink()
  assert evaluate.main([f'--workdir={workdir}', *flags]) == 0
  assert lost.exists() and kept == {f: f.stat().st_mtime_ns for f in kept}
  assert scores(workdir) == pytest.approx(before, rel=1e-3) and len(before) > 1
  shutil.rmtree(workdir / 'eval')
  (workdir / 'eval.jsonl').unlink()
  assert evaluate.main([f'--workdir={workdir}', *flags]) == 0
  assert scores(workdir) == pytest.approx(before, rel=1e-3)


def test_an_error_of_all_is_said_and_ends_all_with_its_status(tmp_path, alone):
  """Another config than the folder's: known to process 0 alone, raised in both."""
  run = tmp_path / 'run'
  shutil.copytree(alone, run)
  status, said = gang(2, 1, run, f'{write_config(tmp_path)} --workdir={run} --config.mesh.data=2 --config.seed=7')
  assert status == 2
  assert all('holds a run with another config (' in words and 'seed: 0 -> 7' in words for words in said)


class Store:
  """What Consensus uses of JAX's coordination service, for threads."""

  def __init__(self, count):
    self.values, self.changed, self.barrier = {}, threading.Condition(), threading.Barrier(count)

  def key_value_set(self, key, value):
    with self.changed:
      if key in self.values:
        raise jax.errors.JaxRuntimeError('ALREADY_EXISTS')
      self.values[key] = value
      self.changed.notify_all()

  def blocking_key_value_get(self, key, timeout):
    with self.changed:
      self.changed.wait_for(lambda: key in self.values)
      return self.values[key]

  def key_value_dir_get(self, key):
    with self.changed:
      return [(k, v) for k, v in self.values.items() if k.startswith(key)]

  def wait_at_barrier(self, name, timeout):
    self.barrier.wait(30)


@pytest.mark.parametrize('seed', range(8))
def test_all_stop_after_the_same_step_whoever_wishes_it_and_however_far_each_is(seed):
  """Threads that are up to a few steps apart, as processes with steps in flight are; some wish to stop, or none."""
  rng = random.Random(seed)
  count, total, per_call = 4, 120, 3
  wishes = {} if seed == 0 else {rng.randrange(count): rng.randrange(total // 2) for _ in range(rng.randint(1, 2))}
  store, stopped, at = Store(count), {}, [0] * count
  every = [distributed.Consensus(0, store, number) for number in range(count)]

  def loop(number):
    own = random.Random(f'{seed} {number}')
    for step in range(per_call, total + 1, per_call):
      while step > min(at) + 6 * per_call:  # a step in flight waits for its peers
        time.sleep(0.0005)
      at[number] = step
      time.sleep(own.random() / 1000)
      wish = 'SIGTERM' if step >= wishes.get(number, total + 1) else None
      if every[number].reached(step, wish):
        break
    at[number] = total
    stopped[number] = step
    every[number].close()

  threads = [threading.Thread(target=loop, args=(number,)) for number in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  assert len(set(stopped.values())) == 1 and len(stopped) == count
  assert {one.reason for one in every} == {'SIGTERM' if wishes else ''}
  assert min(wishes.values()) <= stopped[0] < total if wishes else stopped[0] == total


def test_one_process_stops_after_the_step_in_which_it_is_asked():
  one = distributed.Consensus(0)
  assert not one.reached(1, None) and one.reached(2, 'SIGINT') and one.reason == 'SIGINT'
  one.close()


SLURM = {'SLURM_STEP_NUM_TASKS': '4', 'SLURM_STEP_TASKS_PER_NODE': '2(x2)', 'SLURM_LOCALID': '1',
         'CUDA_VISIBLE_DEVICES': '0,1,2,3'}
OURS = {'DIFFUSION_JAX_COORDINATOR': 'a:1', 'DIFFUSION_JAX_NUM_PROCESSES': '4', 'DIFFUSION_JAX_PROCESS_ID': '3'}


@pytest.mark.parametrize(('environ', 'found'), [
    ({}, None), ({'SLURM_NTASKS': '8', 'SLURM_PROCID': '0'}, None), (SLURM, {}), ({'MEGASCALE_NUM_SLICES': '2'}, {}),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, None), ({'TPU_WORKER_HOSTNAMES': 'a,b'}, {}),
    ({'TPU_WORKER_HOSTNAMES': 'a,b', 'JAX_PLATFORMS': 'cpu'}, None), ({'DIFFUSION_JAX_COORDINATOR': 'auto'}, {}),
    (OURS | {'DIFFUSION_JAX_NUM_PROCESSES': '1'}, None),
    (OURS, {'coordinator_address': 'a:1', 'num_processes': 4, 'process_id': 3, 'local_device_ids': None}),
    (OURS | SLURM, {'coordinator_address': 'a:1', 'num_processes': 4, 'process_id': 3, 'local_device_ids': [2, 3]})])
def test_the_processes_are_found(environ, found):
  got = distributed.parameters(environ)
  assert got == (found and found | {'cluster_detection_method': 'deactivate'})


def test_flags_come_before_the_environment():
  got = distributed.parameters(OURS, 'b:2', 2, 0)
  assert (got['coordinator_address'], got['num_processes'], got['process_id']) == ('b:2', 2, 0)


@pytest.mark.parametrize(('changes', 'words'), [
    ({'DIFFUSION_JAX_COORDINATOR': ''}, 'one of 4 processes also needs its coordinator'),
    ({'DIFFUSION_JAX_PROCESS_ID': ''}, 'one of 4 processes also needs its process_id'),
    ({'DIFFUSION_JAX_PROCESS_ID': '4'}, 'process 4 of 4 at .* cannot be'),
    ({'DIFFUSION_JAX_COORDINATOR': 'a'}, "at 'a' cannot be: the coordinator is HOST:PORT"),
    ({'DIFFUSION_JAX_NUM_PROCESSES': 'four'}, "must be numbers, got 'four'")])
def test_a_description_that_is_wrong_is_said(changes, words):
  with pytest.raises(UserError, match=words):
    distributed.parameters(OURS | changes)


def test_the_watchdog_counts_from_the_last_place(monkeypatch):
  ended = threading.Event()
  monkeypatch.setattr(distributed, 'end', lambda status, why: ended.set())
  with distributed.Watchdog(1) as dog:
    assert not ended.wait(2.5)  # nothing has begun
    dog.at('step 3')
    assert ended.wait(30)


def test_an_abort_ends_with_70_and_a_reason():
  code = 'import os; from diffusion_jax.runtime import distributed as d; d._exit_on_abort(); os.abort()'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 70
  assert done.stderr.count('\n') == 1 and 'its runtime gave up' in done.stderr


def test_the_status_of_a_gang_is_that_which_no_other_start_would_change(tmp_path):
  words = 'sleep 0.$DIFFUSION_JAX_PROCESS_ID; exit $(( DIFFUSION_JAX_PROCESS_ID ? 2 : 70 ))'
  job = Job('j', ('sh', '-c', f"trap '' TERM; {words}"), str(tmp_path))
  assert local.run([job], local.Options(processes=2), shown=False) == [2]


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


def test_the_processes_of_a_point_run_the_same_commands_and_process_0_writes(tmp_path):
  """Once; the second time process 0 finds the point finished, and the other one hears of it."""
  file = sweeps.put(tmp_path / 'sweep.py', sweeps.LIGHT)
  stub = sweeps.put(tmp_path / 'stub.py', 'import os, sys\nfile = open(sys.argv[-1].partition("=")[2] + "/ran", "a")\n'
                    'file.write(sys.argv[1] + os.environ["DIFFUSION_JAX_PROCESS_ID"] + "\\n")')
  code = (f'import sys; from diffusion_jax import attempt, sweep; attempt.PYTHON = [sys.executable, {stub!r}]; '
          'sys.exit(sweep.main(sys.argv[1:]))')
  words = [sys.executable, '-c', code, 'point', file, f'--root={tmp_path}/root', '--name=a-s0']
  for _ in range(2):
    env = os.environ | local.gang_env(2, 0, free_port())
    every = [subprocess.Popen(words, cwd=ROOT, env=env | {'DIFFUSION_JAX_PROCESS_ID': str(i)}) for i in range(2)]
    assert [process.wait(120) for process in every] == [0, 0]
  folder = next((tmp_path / 'root').glob('a-s0-*'))
  ran = (folder / 'ran').read_text().split()
  assert sorted(ran) == [f'diffusion_jax.{one}' for one in ('evaluate0', 'evaluate1', 'train0', 'train1')]
  assert [line['event'] for line in log.read_lines(folder / 'attempts.jsonl')] == ['start', 'end']


@pytest.mark.parametrize('word', [attempt.GO, attempt.NO])
def test_the_processes_of_a_point_hear_whether_there_is_anything_to_do(monkeypatch, word):
  monkeypatch.setenv('DIFFUSION_JAX_COORDINATOR', f'localhost:{free_port()}')
  heard = []
  others = [threading.Thread(target=lambda: heard.append(attempt.told())) for _ in range(3)]
  for other in others:
    other.start()
  attempt.call(word, 3)
  for other in others:
    other.join(30)
  assert heard == [word == attempt.GO] * 3


def test_processes_that_do_not_meet_are_said(monkeypatch):
  monkeypatch.setattr(attempt, 'GATHER_SECONDS', 0.3)
  monkeypatch.setenv('DIFFUSION_JAX_COORDINATOR', 'localhost:1')
  with pytest.raises(UserError, match='process 0 of this job has not been heard of') as apart:
    attempt.told()
  assert apart.value.status == 70
  monkeypatch.delenv('DIFFUSION_JAX_COORDINATOR')
  with pytest.raises(UserError, match='needs DIFFUSION_JAX_COORDINATOR=HOST:PORT'):
    attempt.told()
