"""A run that is killed at any moment and started again ends in the very bits of one that was not."""
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT, TINY, tiny_config

from diffusion_jax import train
from diffusion_jax.runtime import checkpoint
from diffusion_jax.runtime.config import UserError
from diffusion_jax.runtime.state import TrainState

IMAGES = 3200
# What is saved and restored does not depend on the net, and this one is compiled in seconds.
CONFIG = '''
import nets
from configs import digits
from diffusion_jax.runtime.config import spec

def get_config(run=''):
  config = digits.get_config()
  config.net = spec(nets.Small, num_classes=10, dropout=0.1)
  return config
'''


def start(workdir):
  """Training in a process of its own, on two virtual devices."""
  file = workdir.parent / 'small.py'
  file.write_text(CONFIG)
  changes = TINY | {'train.images': IMAGES, 'mesh.data': '2', 'train.checkpoint_every': '320',
                    'train.sample_every': IMAGES}
  flags = [f'--config.{key}={value}' for key, value in changes.items()]
  command = [sys.executable, '-m', 'diffusion_jax.train', '--allow=nets', f'--config={file}', f'--workdir={workdir}',
             *flags]
  places = os.pathsep.join([str(ROOT / 'tests'), os.environ.get('PYTHONPATH', '')])
  return subprocess.Popen(command, cwd=ROOT, env=os.environ | {'JAX_NUM_CPU_DEVICES': '2', 'PYTHONPATH': places},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
  out, _ = process.communicate(timeout=240)
  return process.returncode, out


def fingerprint(workdir):
  return json.loads((workdir / 'done.json').read_text())['fingerprint']


def steps(workdir):
  return sorted(int(p.name) for p in (workdir / 'checkpoints').glob('*') if p.name.isdigit())


def wait_for(condition, process):
  """Polls until condition() holds; fails if the process ends first."""
  deadline = time.monotonic() + 240
  while not condition():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline
    time.sleep(0.002)


def lines(workdir):
  path = workdir / 'metrics.jsonl'
  return path.read_text().count('\n') if path.exists() else 0


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp('resume') / 'whole'
  code, out = finish(start(workdir))
  assert code == 0, out
  return workdir


def test_killed_runs_end_in_the_same_bits(whole, tmp_path):
  """kill -9 before the first checkpoint, between two, and while one is written; then a SIGTERM; then to the end."""
  workdir = tmp_path / 'killed'
  moments = [
      lambda: lines(workdir) >= 1,
      lambda: len(steps(workdir)) >= 1 and lines(workdir) >= 6,
      lambda: any('tmp' in p.name for p in pathlib.Path(workdir, 'checkpoints').glob('*')),
  ]
  for moment in moments:
    process = start(workdir)
    wait_for(moment, process)
    process.send_signal(signal.SIGKILL)
    finish(process)
    assert process.returncode == -signal.SIGKILL
    assert not (workdir / 'done.json').exists()

  before, process = lines(workdir), start(workdir)
  wait_for(lambda: lines(workdir) > before, process)
  process.send_signal(signal.SIGTERM)
  code, out = finish(process)
  assert code == 75, out
  assert 'SIGTERM: saved step' in out

  code, out = finish(start(workdir))
  assert code == 0, out
  assert fingerprint(workdir) == fingerprint(whole)
  assert not [p for p in (workdir / 'checkpoints').glob('*') if 'tmp' in p.name]


def data_files(checkpoint):
  return sorted(checkpoint.rglob('d/*'), key=lambda p: p.stat().st_size)


def flip_bits(checkpoint):
  """One in the middle of every data file: tensorstore leaves bytes there that nothing refers to any more."""
  for path in data_files(checkpoint):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(checkpoint):
  for path in data_files(checkpoint):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def remove(checkpoint):
  """All data files: tensorstore also leaves whole ones that nothing refers to."""
  for path in data_files(checkpoint):
    path.unlink()


@pytest.mark.parametrize('damage', [flip_bits, truncate, remove])
def test_a_damaged_checkpoint_is_set_aside(tiny_run, tmp_path, damage):
  """The newest checkpoint is named and set aside; the run goes on from the one before to the same bits."""
  workdir = tmp_path / 'damaged'
  shutil.copytree(tiny_run, workdir)
  (workdir / 'done.json').unlink()
  newest = steps(workdir)[-1]
  damage(workdir / 'checkpoints' / str(newest))
  with pytest.warns(UserWarning, match=f'checkpoint {newest} is damaged.*damaged/{newest}'):
    assert train.train(tiny_config(), workdir) == 0
  assert (workdir / 'damaged' / str(newest)).is_dir()
  assert fingerprint(workdir) == fingerprint(tiny_run)


def test_one_flipped_bit_of_an_array_is_seen(tmp_path):
  """In the stored bytes of a large incompressible array."""
  params = {'w': jax.random.normal(jax.random.key(0), (512, 512))}
  state = TrainState(jnp.array(7), params, (), {})
  writer = checkpoint.Checkpoints(tmp_path, writer=True)
  writer.save(state, {})
  writer.close()
  largest = data_files(tmp_path / 'checkpoints' / '7')[-1]
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 0x10
  largest.write_bytes(data)
  where = jax.tree.map(lambda a: a.sharding, state)
  with pytest.raises(UserError, match=r'checkpoint 7 is damaged .*checksums of 1 arrays do not match'):
    checkpoint.Checkpoints(tmp_path).restore(checkpoint.abstract_with(jax.eval_shape(lambda: state), where), 7)
