"""Every config, shrunk, takes a step; its docstring says what it must reach."""
import importlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from nets import jit

from diffusion_jax import model as model_lib
from diffusion_jax import sample, train
from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime import sharding
from diffusion_jax.runtime.config import build

FILES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py') if path.stem != '__init__')
SMALL = {
    'diffusion_jax.nets.unet:UNet': {'net.channels': '8', 'net.multipliers': '(1,)', 'net.blocks': '1',
                                     'net.groups': '4', 'net.attention': '(1,)'},
    'diffusion_jax.nets.dit:DiT': {'net.width': '8', 'net.depth': '1', 'net.heads': '2'},
}


def runs(name):
  return list(getattr(importlib.import_module(f'configs.{name}'), 'RUNS', {'': None}))


def load(name, run):
  return config_lib.load(os.fspath(ROOT / 'configs' / f'{name}.py') + (f':{run}' if run else ''))


@pytest.mark.parametrize(('name', 'run'), [(name, run) for name in FILES for run in runs(name)])
def test_shrunk_config_takes_a_step(name, run):
  config = load(name, run)
  shape = (config.data.size, config.data.size, config.data.channels) if config.data.size else (8, 8, 1)
  model_lib.check(config)
  # The real one fits together; nothing is computed.
  real = model_lib.make(config, shape, config.net.num_classes)
  jax.eval_shape(real.init, jax.random.key(0))
  sample.Generator(real, config.sample, 0, sharding.make_mesh(1, 1))

  config_lib.override(config, SMALL[config.net.fn] | {'train.batch_size': '4', 'mesh.data': '1'})
  model = model_lib.make(config, (8, 8, shape[-1]), config.net.num_classes)
  optimizer = model_lib.optimizer_of(config)
  state = jit(lambda key: model_lib.initial_state(model, optimizer, key))(jax.random.key(0))
  before = jax.tree.leaves(state.params['net'])
  rng = np.random.default_rng(0)
  batch = (jnp.asarray(rng.integers(0, 256, (1, 4, 8, 8, shape[-1])), jnp.uint8), jnp.zeros((1, 4), jnp.int32))
  steps = jit(train.make_step(model, optimizer), static_argnums=3)
  state, metrics = steps(jax.random.key(1), state, train.Metrics.empty(), None, batch)
  assert np.isfinite(metrics.compute()['loss'])
  assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(state.params['net']), before, strict=True))


@pytest.mark.parametrize('name', FILES)
def test_docstring_names_what_to_reach(name):
  doc = importlib.import_module(f'configs.{name}').__doc__
  assert 'Reach: ' in doc


def test_unknown_runs_are_refused():
  with pytest.raises(config_lib.UserError, match="no run 'uncnd' in this config file; did you mean 'uncond'"):
    load('digits', 'uncnd')


def test_ddpm_cifar10_is_the_papers_recipe():
  """Ho et al. 2020, section 4 and appendix B."""
  config = load('ddpm_cifar10', '')
  betas = model_lib.schedules.betas(build(config.process), 1000)
  assert (betas[0], betas[-1]) == (pytest.approx(1e-4), pytest.approx(0.02))
  assert config.train.images == 800_000 * 128
  assert (config.learning_rate.peak, config.net.dropout, config.ema.main.decay) == (2e-4, 0.1, 0.9999)
  assert config.data.flip
  assert build(config.sample.sampler).nfe(config.sample.steps) == 1000
