"""Every config, shrunk, takes a step; its docstring says what it must reach; the papers' sizes and recipes."""
import functools
import importlib
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from nets import jit, shapes_of

from diffusion_jax import model as model_lib
from diffusion_jax import train
from diffusion_jax.core import schedules
from diffusion_jax.generator import Generator
from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime import sharding
from diffusion_jax.runtime.config import build

FILES = sorted(path.stem for path in (ROOT / 'configs').glob('*.py') if path.stem != '__init__')
UNET = {'channels': '8', 'multipliers': '(1,)', 'blocks': '1', 'groups': '4', 'attention': '(1,)'}
SMALL = {'unet:UNet': UNET, 'unet:DDPMpp': UNET, 'unet:NCSNpp': UNET, 'unet:ADM': UNET | {'head_channels': '4'},
         'variational:IDDPM': UNET | {'heads': '2'}, 'variational:VDM': UNET,
         'edm2:UNet': {key: text for key, text in UNET.items() if key != 'groups'} | {'head_channels': '4'},
         'text_unet:TextUNet': UNET | {'depth': '(1,)', 'num_classes': '0'},
         'dit:DiT': {'width': '8', 'depth': '1', 'heads': '2'}}
COMPILED = 'edm2_imagenet512', 'edm_cifar10', 'vdm_cifar10'
# Configs that differ in these alone are one program.
SAME = {'train.batch_size': '4', 'mesh.data': '1', 'train.images': '1e6', 'learning_rate.peak': '1e-3',
        'learning_rate.warmup_images': '4e3', 'label_dropout': '0.1', 'net.dropout': '0.1', 'optimizer.eps': '1e-8',
        'data.source': '-', 'data.size': '8', 'data.flip': 'false', 'codec.channels': '(8,)', 'codec.blocks': '1',
        'codec.groups': '4', 'net.num_classes': '2', 'train.sample_every': '1e6', 'train.checkpoint_every': '1e6',
        'train.snapshot_every': '1e6'}


def runs(name):
  return list(getattr(importlib.import_module(f'configs.{name}'), 'RUNS', {'': None}))


def load(name, run=''):
  return config_lib.load(os.fspath(ROOT / 'configs' / f'{name}.py') + (f':{run}' if run else ''))


EVERY = [(name, run) for name in FILES for run in runs(name)]


stepped = {}  # models by their configs, as JSON


def takes_a_step(config, name):
  """The model of a small config, after a step: its shapes alone, or of some, its loss and that parameters changed."""
  key = json.dumps({key: value for key, value in config.to_dict().items() if key not in ('sample', 'eval')})
  if key not in stepped:
    shape = 8, 8, config.data.channels
    model = stepped[key] = model_lib.make(config, shape, config.net.get('num_classes', 0), ('one', 'two'))
    tokens = (model.text.length,) if model.text else ()
    optimizer = model_lib.optimizer_of(config)
    shapes = jax.eval_shape(lambda key: model_lib.initial_state(model, optimizer, key), jax.random.key(0))
    rng = np.random.default_rng(0)  # to compile the initialisation would take as long as the step
    state = jax.tree.map(lambda a: jnp.asarray(0.1 * rng.random(a.shape) * (a.dtype == jnp.float32), a.dtype), shapes)
    batch = jnp.asarray(rng.integers(0, 256, (1, 4, *shape)), jnp.uint8), jnp.zeros((1, 4, *tokens), jnp.int32)
    steps = jit(train.make_step(model, optimizer), static_argnums=3)
    before = jax.tree.leaves(state.params['net'])
    arguments = jax.random.key(1), state, train.Metrics.empty(), None, batch
    if name not in COMPILED:
      assert jax.tree.map(jnp.shape, jax.eval_shape(steps, *arguments)[0]) == jax.tree.map(jnp.shape, state)
    else:
      state, metrics = steps(*arguments)
      assert np.isfinite(metrics.compute()['loss'])
      assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(state.params['net']), before, strict=True))
  return stepped[key]


@pytest.mark.parametrize(('name', 'run'), EVERY)
def test_shrunk_config_takes_a_step(name, run):
  config, small = load(name, run), load(name, run)
  model_lib.check(config)
  changes = SAME | {f'net.{key}': text for key, text in SMALL[config.net.fn.rpartition('.')[2]].items()}
  config_lib.override(small, {key: text for key, text in changes.items() if key in config_lib.flatten(config)})
  Generator(takes_a_step(small, name), config.sample, 0, sharding.make_mesh(1, 1))


@functools.cache
def count(config):
  """How many parameters a net has, of a config as (name, run); its layers fit together, and nothing is computed."""
  config = load(*config)
  size, channels = config.data.size, config.data.channels
  if 'latent' in config.codec:
    size, channels = size // 8, config.codec.latent
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of(build(config.net), (1, size, size, channels))))


@pytest.mark.parametrize(('name', 'run', 'published'), [
    ('ddpm_cifar10', '', 35_700_000),  # Ho et al. 2020, appendix B
    # The checkpoints of the public code of improved DDPM are named 50M and 100M.
    ('iddpm_cifar10', '', 50_000_000), ('iddpm_imagenet64', '', 100_000_000),
    ('adm_imagenet64', '', 296_000_000),  # Dhariwal & Nichol 2021, table 11
    ('edm_cifar10', '', 55_700_000),  # Karras et al. 2022, table 7
    ('flow_cifar10', '', 61_800_000),  # DDPM++ of Song et al. 2021
    ('edm2_imagenet64_s', '', 280_000_000),  # Karras et al. 2024, table 2; test_edm2.py has all sizes
    ('dit_imagenet256_b', '', 130_000_000), ('dit_imagenet256_xl', '', 675_000_000),  # Peebles & Xie 2022, table 4
])
def test_parameter_counts_are_the_papers(name, run, published):
  digits = len(str(published).rstrip('0'))
  assert round(count((name, run)), digits - len(str(published))) == published


@pytest.mark.parametrize('name', FILES)
def test_docstring_names_what_to_reach(name):
  doc = importlib.import_module(f'configs.{name}').__doc__
  assert 'Reach: ' in doc


def test_unknown_runs_are_refused():
  with pytest.raises(config_lib.UserError, match="no run 'uncnd' in this config file; did you mean 'uncond'"):
    load('digits', 'uncnd')


# Recipes


def values(config, *keys):
  flat = config_lib.flatten(config)
  return tuple(flat[key] for key in keys)


RECIPE = ['train.images', 'train.batch_size', 'learning_rate.peak', 'learning_rate.warmup_images', 'net.dropout',
          'clip_norm']


@pytest.mark.parametrize(('name', 'run', 'recipe'), [
    ('ddpm_cifar10', '', (800_000 * 128, 128, 2e-4, 5000 * 128, 0.1, 1.0)),  # section 4 and appendix B; its code
    ('iddpm_cifar10', '', (500_000 * 128, 128, 1e-4, 0, 0.3, 0.0)),  # the public code's README
    ('iddpm_imagenet64', '', (1_500_000 * 128, 128, 1e-4, 0, 0.0, 0.0)),
    ('adm_imagenet64', '', (540_000 * 2048, 2048, 3e-4, 0, 0.1, 0.0)),  # table 11
    ('edm_cifar10', 've_cond', (200e6, 512, 1e-3, 10e6, 0.13, 0.0)),  # the public code's defaults
    ('edm2_imagenet64_s', '', (2 ** 30, 2048, 0.01, 10e6, 0.0, 0.0)),  # the public code's presets
    ('flow_cifar10', '', (800_000 * 128, 128, 2e-4, 5000 * 128, 0.15, 1.0)),  # the public code's config
    ('vdm_cifar10', '', (10_000_000 * 128, 128, 2e-4, 100 * 128, 0.1, 0.0)),  # the public code's config
])
def test_recipes_are_the_papers(name, run, recipe):
  assert values(load(name, run), *RECIPE) == recipe


@pytest.mark.parametrize(('name', 'nfe'), [
    ('ddpm_cifar10', 1000), ('iddpm_cifar10', 4000), ('adm_imagenet64', 250), ('edm_cifar10', 35),
    ('edm2_imagenet64_s', 63), ('vdm_cifar10', 1000)])
def test_network_evaluations_are_the_papers(name, nfe):
  config = load(name)
  assert build(config.sample.sampler).nfe(config.sample.steps) == nfe


def noise_at(config, times):
  """What the net is shown of the level at these times."""
  process = build(config.process)
  params = process.init(jax.random.key(0))
  return np.asarray(build(config.noise)(process, process.level(jnp.asarray(times), params), params))


@pytest.mark.parametrize(('name', 'last'), [
    ('ddpm_cifar10', 999), ('adm_imagenet64', 999), ('flow_cifar10', 999), ('iddpm_cifar10', 3999 * 1000 / 4000)])
def test_nets_are_shown_the_papers_steps(name, last):
  np.testing.assert_allclose(noise_at(load(name), [0.0, 1.0]), [0, last], rtol=1e-6, atol=1e-3)


def test_vdm_is_shown_a_thousandfold_of_its_schedule():
  first, last = noise_at(load('vdm_cifar10'), [0.0, 1.0])
  assert last - first == pytest.approx(1000, rel=1e-5)


def test_ddpm_has_its_betas():
  betas = schedules.betas(build(load('ddpm_cifar10').process), 1000)
  assert (betas[0], betas[-1]) == (pytest.approx(1e-4), pytest.approx(0.02))


@pytest.mark.parametrize('name', ['edm_cifar10', 'edm2_imagenet64_s'])
def test_edm_samples_between_its_levels(name):
  """Karras et al. 2022, table 1, by hand: (80^(1/7) + i / (N - 1) (0.002^(1/7) - 80^(1/7)))^7."""
  config = load(name)
  steps = config.sample.steps
  sigma = np.exp(-np.asarray(build(config.sample.grid)(build(config.process), steps, {}).logsnr) / 2)
  expected = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps) ** 7
  np.testing.assert_allclose(sigma, expected, rtol=1e-5)
  assert not config.sample.clip


@pytest.mark.parametrize(('name', 'peak', 'batches'), [
    ('edm2_imagenet64_s', 0.0100, 35_000), ('edm2_imagenet512_xs', 0.0120, 70_000),
    ('edm2_imagenet512_xxl', 0.0065, 70_000)])
def test_edm2s_rates_fall_after_their_reference_time(name, peak, batches):
  """Karras et al. 2024 and its code: the rate is peak / sqrt(max(t / t_ref, 1)) at batch t, after 10 million images."""
  config = load(name)
  rate = model_lib.optim.learning_rate(**config.learning_rate, total_images=config.train.images, batch_size=2048)
  for share, expected in ((0.5, 1), (1, 1), (4, 1 / 2), (9, 1 / 3)):
    assert float(rate(round(share * batches) - 1)) == pytest.approx(peak * expected, rel=1e-6)
  assert float(rate(2441)) == pytest.approx(peak / 2, rel=1e-3)  # of 4,883 batches of warm-up


def test_edm_averages_half_a_million_images():
  rate = build(load('edm_cifar10').ema.main)
  steps = 500_000 / 512
  assert float(rate(100_000, 512)) ** steps == pytest.approx(0.5, rel=1e-4)
  assert float(rate(1000, 512)) ** (0.05 * 1000) == pytest.approx(0.5, rel=1e-4)  # in its first 10 million: a twentieth
