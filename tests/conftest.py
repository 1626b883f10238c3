"""What every test shares: eight virtual CPU devices, a compilation cache, and one tiny run."""
import importlib.metadata
import os
import pathlib
import sys
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Most time goes into compiling programs that run once: less optimisation, and of two code generators the quicker one.
QUICK = ['--xla_backend_optimization_level=1', '--xla_llvm_disable_expensive_passes=true',
         '--xla_cpu_parallel_codegen_split_count=1']
if importlib.metadata.version('jaxlib') < '0.11':  # XLA ends the program at a flag that it does not know
  QUICK.append('--xla_cpu_use_fusion_emitters=false')
os.environ.setdefault('XLA_FLAGS', ' '.join(QUICK))
# Programs are compiled once for the whole session, its subprocesses included.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', tempfile.mkdtemp(prefix='diffusion_jax_tests_'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
os.environ['DIFFUSION_JAX_CACHE'] = tempfile.mkdtemp(prefix='diffusion_jax_cache_')  # of weights and references
ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # configs/, experiments/ and launch/ are used from the checkout

import jax  # noqa: E402
import nets  # noqa: E402
import pytest  # noqa: E402

from diffusion_jax.runtime import backend  # noqa: E402

backend.keep_memory = lambda shape: None  # a process of thousands of programs would keep what each of them has freed
jax.config.update('jax_num_cpu_devices', 8)

# The digits config, shorter, on one device; and its U-Net, smaller.
TINY_NET = {'net.channels': '8', 'net.multipliers': '(1,)', 'net.groups': '4', 'net.attention': '(1,)'}
TINY = {
    'mesh.data': '1', 'train.images': '512', 'train.batch_size': '16', 'train.log_every': '64',
    'train.sample_every': '512', 'train.checkpoint_every': '128', 'learning_rate.peak': '1e-3',
    'learning_rate.warmup_images': '32', 'learning_rate.decay': 'constant',
    'sample.batch_size': '8', 'sample.steps': '4', 'eval.num_samples': '24',
}


# These files take longest. They begin, so that no core waits for one of them in the end.
FIRST = ['test_resume.py', 'test_sample.py', 'test_samplers.py', 'test_train.py', 'test_adaptive.py',
         'test_multistep.py', 'test_configs.py', 'test_inception.py']


def pytest_collection_modifyitems(items):
  """Keeps the order within each file."""
  items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def tiny_config(unet=False, **changes):
  """The tiny config, of a U-Net or of the smallest net there is, with `changes` as {'a__b': 'text'} put in."""
  from diffusion_jax.runtime import config
  loaded = config.load(str(ROOT / 'configs' / 'digits.py'))
  if not unet:
    if 'nets' not in config.ALLOWED:
      config.allow('nets')
    loaded.net = config.spec(nets.Small, num_classes=10)
  changes = {key.replace('__', '.'): str(value) for key, value in changes.items()}
  config.override(loaded, TINY | (TINY_NET if unet else {}) | changes)
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
