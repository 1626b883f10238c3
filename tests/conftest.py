"""What every test shares: eight virtual CPU devices, a compilation cache, and one tiny run."""
import os
import pathlib
import sys
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Programs are compiled once for the whole session, its subprocesses included.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', tempfile.mkdtemp(prefix='diffusion_jax_tests_'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # configs/, experiments/ and launch/ are used from the checkout

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update('jax_num_cpu_devices', 8)

# The digits config with a net that compiles in seconds, on one device.
TINY = {
    'net.channels': '8', 'net.multipliers': '(1,)', 'net.groups': '4', 'net.attention': '(1,)', 'mesh.data': '1',
    'train.images': '512', 'train.batch_size': '16', 'train.log_every': '64', 'train.sample_every': '512',
    'train.checkpoint_every': '128', 'learning_rate.peak': '1e-3', 'learning_rate.warmup_images': '32',
    'learning_rate.decay': 'constant',
    'sample.batch_size': '8', 'sample.steps': '4', 'eval.num_samples': '24',
}


# These files take longest. They begin, so that no core waits for one of them in the end.
FIRST = ['test_resume.py', 'test_sample.py', 'test_train.py', 'test_configs.py', 'test_samplers.py', 'test_guidance.py']


def pytest_collection_modifyitems(items):
  """Keeps the order within each file."""
  items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def tiny_config(**changes):
  """The tiny config, with `changes` as {'a__b': 'text'} put in."""
  from diffusion_jax.runtime import config
  loaded = config.load(str(ROOT / 'configs' / 'digits.py'))
  config.override(loaded, TINY | {key.replace('__', '.'): str(value) for key, value in changes.items()})
  return loaded


def through_json(config, folder):
  """The config written to a file in `folder` and read again."""
  from diffusion_jax.runtime import config as config_lib
  path = folder / 'config.json'
  path.write_text(config_lib.to_json(config))
  return config_lib.from_json(path)


@pytest.fixture(scope='session')
def tiny_run(tmp_path_factory):
  """The folder of a finished tiny run: 32 steps of 16 digits."""
  from diffusion_jax import train
  workdir = tmp_path_factory.mktemp('runs') / 'tiny'
  assert train.train(tiny_config(), workdir) == 0
  return workdir
