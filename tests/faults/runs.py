"""What the fault tests share: training in a process of its own, of a net that is ready in seconds."""
import json
import os
import subprocess
import sys
import time

import poison
from conftest import ROOT, tiny_config

from diffusion_jax.runtime import config as config_lib

CONFIG = '''
from runs import tiny
def get_config(run=''): return tiny(train__images=1600)
'''


def tiny(poisoned=0, **changes):
  """The tiny config with an optimizer that spoils update number `poisoned`, if that is not 0."""
  if 'poison' not in config_lib.ALLOWED:
    config_lib.allow('poison')
  config = tiny_config(**changes)
  config.optimizer = config_lib.spec(poison.adam, at=poisoned)
  return config


def start(workdir, env=None, **changes):
  """`train` as a user starts it, with `changes` as {'train__images': 64}."""
  file = workdir.parent / 'config.py'
  file.write_text(CONFIG)
  flags = [f'--config.{key.replace("__", ".")}={value}' for key, value in changes.items()]
  words = [sys.executable, '-m', 'diffusion_jax.train', '--allow=nets', '--allow=poison', f'--config={file}',
           f'--workdir={workdir}', *flags]
  places = os.pathsep.join([str(ROOT / 'tests'), str(ROOT / 'tests' / 'faults'), os.environ.get('PYTHONPATH', '')])
  return subprocess.Popen(words, cwd=ROOT, env=os.environ | {'PYTHONPATH': places} | (env or {}), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process, timeout=300):
  """(exit status, what it printed, what it said on stderr)."""
  out, err = process.communicate(timeout=timeout)
  return process.returncode, out, err


def whole(workdir, **changes):
  """`workdir` after a run that nothing disturbed."""
  code, _, err = finish(start(workdir, **changes))
  assert code == 0, err
  return workdir


def fingerprint(workdir):
  return json.loads((workdir / 'done.json').read_text())['fingerprint']


def names(workdir):
  """What lies in the folder of checkpoints: numbers, unless something unfinished is there."""
  return sorted(path.name for path in (workdir / 'checkpoints').glob('*'))


def records(workdir):
  """The whole lines of metrics.jsonl."""
  path = workdir / 'metrics.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines() if line.endswith('}')] if path.exists() else []


def wait_for(condition, process, seconds=240):
  """Polls until condition() holds; fails if the process ends first."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.002)
