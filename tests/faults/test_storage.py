"""Faults of the disk: full, or the writer dies in the middle; and processes that do not read the same."""
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from conftest import ROOT

from diffusion_jax.runtime import checkpoint
from diffusion_jax.runtime.state import TrainState


@pytest.fixture
def disk(tmp_path):
  """A file system of 32 MiB in memory."""
  folder = tmp_path / 'disk'
  folder.mkdir()
  mount = shutil.which('mount')
  made = mount and subprocess.run([mount, '-t', 'tmpfs', '-o', 'size=32m', 'tmpfs', str(folder)], capture_output=True)
  if not made or made.returncode:
    pytest.skip('a small disk cannot be mounted: that needs root and the right to mount')
  yield folder
  subprocess.run(['umount', '--lazy', str(folder)], check=True)


def state_of(step, size=1 << 20):
  """Four arrays of 4 MiB that do not compress."""
  rng = np.random.default_rng(step)
  return TrainState(jnp.asarray(step), {f'w{i}': jnp.asarray(rng.random(size, np.float32)) for i in range(4)}, (), {})


def abstract_of(state):
  return checkpoint.abstract_with(jax.eval_shape(lambda: state), jax.tree.map(lambda a: a.sharding, state))


def assert_holds(workdir, step):
  found, _ = checkpoint.Checkpoints(workdir).restore(abstract_of(state_of(step)))
  jax.tree.map(np.testing.assert_array_equal, found, state_of(step))


def test_a_full_disk_leaves_the_checkpoints_before_whole_and_nothing_unfinished(disk):
  """Two checkpoints of 14 MiB fit."""
  writer = checkpoint.Checkpoints(disk, writer=True)
  for step in 1, 2:
    writer.save(state_of(step), {})
  writer.wait()
  used = shutil.disk_usage(disk).used
  with pytest.raises(checkpoint.NoSpace, match=r'no space left .* continues from step 2') as stopped:
    writer.save(state_of(3), {})
    writer.close()
  assert stopped.value.status == 1
  assert runs.names(disk) == ['1', '2'] and shutil.disk_usage(disk).used == used
  assert_holds(disk, 2)
  subprocess.run(['mount', '-o', 'remount,size=64m', str(disk)], check=True)
  with checkpoint.Checkpoints(disk, writer=True) as writer:
    writer.save(state_of(3), {})
  assert_holds(disk, 3)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  return runs.whole(tmp_path_factory.mktemp('storage') / 'whole')


@pytest.mark.parametrize('spare', [0, 40_000], ids=['none', 'a little'])
def test_training_on_a_full_disk_stops_in_one_sentence_and_goes_on_with_more(disk, whole, spare):
  """A file takes what is left after the first checkpoint, all of it or all but the records' share."""
  workdir = disk / 'run'
  process = runs.start(workdir)
  runs.wait_for(lambda: '8' in runs.names(workdir), process)
  process.send_signal(signal.SIGSTOP)
  with open(disk / 'ballast', 'wb', buffering=0) as ballast:
    with contextlib.suppress(OSError):
      while True:
        ballast.write(bytes(4096))
    ballast.truncate(ballast.tell() - spare)
  process.send_signal(signal.SIGCONT)
  code, _, err = runs.finish(process)
  assert code == 1 and err.count('\n') == 1 and 'space' in err, err
  kept = runs.names(workdir)
  assert kept and all(name.isdigit() for name in kept), (kept, err)
  (disk / 'ballast').unlink()
  code, _, err = runs.finish(runs.start(workdir))
  assert code == 0 and runs.fingerprint(workdir) == runs.fingerprint(whole), err


# Killed where the finished checkpoint would get its name, or where the first array would be written.
KILLED = '''
import os, signal, sys
import jax.numpy as jnp
from test_storage import checkpoint, state_of
writer = checkpoint.Checkpoints(sys.argv[1], writer=True)
writer.save(state_of(1), {})
writer.wait()
def die(event, args):
  if event == sys.argv[2] and '2.orbax-checkpoint-tmp' in str(args[0]):
    os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(die)
writer.save(state_of(2), {})
writer.close()
'''


def places():
  return {'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT / 'tests'), str(ROOT / 'tests' / 'faults')])}


@pytest.mark.parametrize('moment', ['os.rename', 'os.mkdir'])
def test_a_writer_killed_before_it_commits_leaves_the_checkpoint_before(tmp_path, moment):
  process = subprocess.run([sys.executable, '-c', KILLED, str(tmp_path), moment], env=os.environ | places(),
                           capture_output=True, text=True)
  assert process.returncode == -signal.SIGKILL, process.stderr
  if moment == 'os.rename':
    assert any('tmp' in name for name in runs.names(tmp_path))  # else this shows nothing
  assert_holds(tmp_path, 1)
  with checkpoint.Checkpoints(tmp_path, writer=True) as writer:
    assert writer.steps() == [1]
    writer.save(state_of(3), {})
  assert runs.names(tmp_path) == ['1', '3']


# Two processes, each with half of every array, and half of the files.
GANG = '''
import os, pathlib, sys
import jax
rank, port, workdir, what = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3]), sys.argv[4]
from test_storage import abstract_of, checkpoint, jnp, np, TrainState
jax.config.update('jax_num_cpu_devices', 1)
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(f'localhost:{port}', 2, rank)
mesh = jax.make_mesh((2,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,))
where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp'))
all_over = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
def state_of(step):
  w = np.random.default_rng(step).random(1 << 16, np.float32)
  return TrainState(jax.device_put(np.int32(step), all_over), {'w': jax.device_put(w, where)}, (), {})
checkpoints = checkpoint.Checkpoints(workdir, writer=True)
if what == 'save':
  for step in 1, 2:
    checkpoints.save(state_of(step), {})
else:
  if what == 'blind' and rank == 1:  # one process cannot read what the other can
    real = checkpoint.ocp.StandardCheckpointHandler.restore
    def refuse(self, directory, args):
      if directory.parent.name == '2':
        raise OSError('input/output error')
      return real(self, directory, args=args)
    checkpoint.ocp.StandardCheckpointHandler.restore = refuse
  found, _ = checkpoints.restore(abstract_of(state_of(0)))
  want = np.random.default_rng(int(found.step)).random(1 << 16, np.float32)
  here = found.params['w'].addressable_shards[0]
  np.testing.assert_array_equal(np.asarray(here.data), want[here.index])
  print('\\nrestored', int(found.step), flush=True)  # gloo says something too
checkpoints.close()
'''


def gang(workdir, what):
  """The output of both processes."""
  with socket.socket() as s:
    s.bind(('localhost', 0))
    port = str(s.getsockname()[1])
  both = [subprocess.Popen([sys.executable, '-c', GANG, str(rank), port, str(workdir), what],
                           env=os.environ | places(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
          for rank in range(2)]
  try:
    ends = [process.communicate(timeout=120) for process in both]
  finally:
    for process in both:
      process.kill()
  assert [process.returncode for process in both] == [0, 0], ends
  return [[line for line in out.splitlines() if line.startswith('restored')] for out, _ in ends]


def test_processes_agree_on_the_newest_checkpoint_that_all_can_read(tmp_path):
  gang(tmp_path, 'save')
  assert gang(tmp_path, 'load') == [['restored 2']] * 2
  assert gang(tmp_path, 'blind') == [['restored 1']] * 2
  assert runs.names(tmp_path) == ['1'] and [path.name for path in (tmp_path / 'damaged').iterdir()] == ['2']


def test_processes_agree_on_damage_that_only_the_checksums_show(tmp_path):
  gang(tmp_path, 'save')
  for path in (tmp_path / 'checkpoints' / '2').rglob('d/*'):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)
  assert gang(tmp_path, 'load') == [['restored 1']] * 2
