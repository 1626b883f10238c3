"""Objectives that carry more than a network through the train step, and combinations that are refused beforehand."""
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config
from nets import Small
from test_train import assert_same, run_steps

from diffusion_jax import model as model_lib
from diffusion_jax.core import diffusion, levels, losses, samplers, schedules, targets
from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime import sharding
from diffusion_jax.runtime.checkpoint import Checkpoints
from diffusion_jax.runtime.config import UserError, build, override, parse_call, spec
from diffusion_jax.step import Metrics, make_step


def small_config(outputs=1, **changes):
  config = tiny_config()
  config.net = spec(Small, outputs=outputs)  # without labels
  config.optimizer = spec(optax.sgd)
  for key, value in changes.items():
    config[key] = value
  return config


def start_and_end(config, count=3):
  mesh = sharding.make_mesh(1, 1)
  state, values = run_steps(config, mesh, count)
  model = model_lib.make(config, (8, 8, 1), 10)
  start = jax.jit(model.init)(model_lib.key(config.seed, 'init'))
  assert np.isfinite(values['loss']) and np.isfinite(values['grad_norm']) and values['grad_norm'] > 0
  return start, state


def moved(before, after):
  return {name: bool(np.any(np.asarray(before[name]) != np.asarray(after[name]))) for name in after}


def test_a_learned_schedule_is_trained_by_the_bound():
  process = spec(schedules.learned, logsnr_min=0.0, logsnr_max=4.0, hidden=4)
  start, state = start_and_end(small_config(process=process, weight=spec(losses.vlb), target=spec(targets.v),
                                            noise=spec(diffusion.log_sigma), clip_norm=0.0))
  assert all(moved(start['process'], state.params['process']).values())
  assert set(state.emas['main']) == {'net', 'process'}


def test_learned_uncertainty_is_a_parameter():
  start, state = start_and_end(small_config(weight=spec(losses.learned_uncertainty)))
  assert set(state.params) == set(state.emas['main']) == {'net', 'process', 'weight'}
  assert not np.any(start['weight']['kernel']) and np.all(np.isfinite(state.params['weight']['kernel']))
  assert moved(start['weight'], state.params['weight']) == {'kernel': True}


def test_hybrid_trains_the_variance_output():
  """The simple part is what L_simple makes of the first output; the second moves as well."""
  start, state = start_and_end(small_config(2, weight=spec(losses.hybrid)))
  bias = lambda params: np.asarray(params['net']['conv_out']['bias'])
  assert np.all(bias(start) != bias(state.params))
  config = small_config(2, weight=spec(losses.hybrid))
  model = model_lib.make(config, (8, 8, 1), 10)
  level = model.diffusion.process.level(jnp.zeros(1))
  x0, variance = model.denoiser(state.params, {}).both(jnp.ones((1, 8, 8, 1)), level)
  assert x0.shape == variance.shape == (1, 8, 8, 1)


def test_importance_remembers_in_the_train_state(tmp_path):
  """Its memory counts every example once, whatever the microbatches and devices, and comes back from a checkpoint."""
  config = lambda: small_config(draw=spec(levels.importance, history=1), process=spec(schedules.cosine, num_steps=4))
  mesh = sharding.make_mesh(1, 1)
  state, _ = run_steps(config(), mesh, 4)
  assert state.draw['losses'].shape == (4, 1) and np.all(state.draw['losses'] > 0)
  assert np.all(np.asarray(state.draw['count']) >= 1)
  parts = config()
  parts.train.accumulate = 2
  assert_same(run_steps(parts, sharding.make_mesh(2, 2), 4)[0], state, 1e-4)

  checkpoints = Checkpoints(tmp_path, writer=True)
  checkpoints.save(state, {})
  model = model_lib.make(config(), (8, 8, 1), 10)
  restored, _ = checkpoints.restore(model_lib.abstract_state(model, mesh))
  checkpoints.close()
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  assert_same(restored, state, 0)


def test_a_draw_without_memory_is_no_part_of_the_state():
  model = model_lib.make(small_config(), (8, 8, 1), 10)
  state = model_lib.abstract_state(model, sharding.make_mesh(1, 1))
  assert state.draw == () and len(jax.tree.leaves(state.replace(step=None, params=None, opt_state=None, emas={}))) == 0
  assert set(state.params) == {'net', 'process'}


ZERO_SNR = {'process': spec(schedules.zero_terminal_snr)}
LEARNED = {'sampler': spec(samplers.ancestral_learned)}


@pytest.mark.parametrize(('outputs', 'changes', 'words'), [
    (1, ZERO_SNR, 'config.target eps says nothing of x0 where config.process zero_terminal_snr leaves no signal'),
    (1, ZERO_SNR | {'target': spec(targets.score)}, 'config.target score says nothing of x0'),
    (1, {'process': spec(schedules.learned)}, 'learned, and config.weight simple would only drive it'),
    (1, {'weight': spec(losses.hybrid)}, 'hybrid trains a variance output, and config.net has none'),
    (2, {}, 'config.net has a variance output, and config.weight simple does not train it'),
    (3, {}, 'must return 1 channels, or twice as many with a variance output, got 3'),
    (2, {'weight': spec(losses.hybrid), 'process': spec(schedules.cosine_continuous)},
     'hybrid needs the steps of a chain, and config.process cosine_continuous is in continuous time'),
    (1, LEARNED, 'ancestral_learned needs a net with a variance output'),
    (2, LEARNED | {'weight': spec(losses.hybrid, variance='diagonal')},
     "reads the variance output as 'range', and config.weight trains it as 'diagonal'"),
])
def test_parts_that_do_not_fit_are_refused_before_compilation(outputs, changes, words):
  config = small_config(outputs)
  for key, value in changes.items():
    (config.sample if key == 'sampler' else config)[key] = value
  with pytest.raises(UserError, match=words):
    model_lib.make(config, (8, 8, 1), 10)


def test_parts_that_fit_are_taken():
  for outputs, changes in [
      (1, ZERO_SNR | {'target': spec(targets.v)}), (1, ZERO_SNR | {'target': spec(targets.mu)}),
      (1, {'process': spec(schedules.learned), 'weight': spec(losses.likelihood), 'noise': spec(diffusion.log_sigma)}),
      (2, {'weight': spec(losses.hybrid)})]:
    config = small_config(outputs, **changes)
    if outputs == 2:
      config.sample.sampler = spec(samplers.ancestral_learned)
    model_lib.make(config, (8, 8, 1), 10)


def test_a_schedule_that_never_shows_pure_noise_is_trained_with_a_warning():
  model, optimizer = model_lib.make(small_config(process=spec(schedules.scaled_linear)), (8, 8, 1), 10), optax.sgd(0.1)
  with pytest.warns(UserWarning, match=r'terminal SNR is 0\.0047'):
    make_step(model, optimizer)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    make_step(model_lib.make(small_config(), (8, 8, 1), 10), optimizer)


class Projected(Small):
  """Keeps every parameter in the unit cube."""

  def project(self, params):
    return jax.tree.map(lambda a: jnp.clip(a, 0, 1), params)


def test_a_net_that_projects_its_parameters_is_projected_after_every_step():
  config = small_config(net=spec(Small))
  model, optimizer = model_lib.make(config, (8, 8, 1), 10)._replace(net=Projected()), optax.sgd(10.0)
  state = model_lib.initial_state(model, optimizer, jax.random.key(0))
  batch = jnp.zeros((1, 16, 8, 8, 1), jnp.uint8), jnp.zeros((1, 16), jnp.int32)
  step = jax.jit(make_step(model, optimizer), static_argnums=3)
  state, _ = step(jax.random.key(0), state, Metrics.empty(), None, batch)
  after = np.concatenate([np.ravel(a) for a in jax.tree.leaves(state.params['net'])])
  assert after.min() == 0 and 0 < after.max() <= 1


def test_seeds_share_one_compiled_program():
  def program(seed):
    model, optimizer = model_lib.make(small_config(seed=seed), (8, 8, 1), 10), optax.sgd(0.1)
    state = jax.eval_shape(lambda key: model_lib.initial_state(model, optimizer, key), jax.random.key(0))
    batch = jax.ShapeDtypeStruct((1, 16, 8, 8, 1), jnp.uint8), jax.ShapeDtypeStruct((1, 16), jnp.int32)
    step = jax.jit(make_step(model, optimizer), static_argnums=3)
    return step.lower(jax.random.key(0), state, jax.eval_shape(Metrics.empty), None, batch).as_text()

  assert program(0) == program(1)


@pytest.mark.parametrize('name', levels.DRAWS)
def test_every_draw_may_be_named(name):
  config = small_config(draw=parse_call(name, levels))
  model_lib.check(config)
  model_lib.make(config, (8, 8, 1), 10)


def test_specs_nest_and_are_overridden_at_any_depth():
  config = tiny_config()
  config.process = spec(schedules.zero_terminal_snr, process=spec(schedules.cosine, num_steps=50))
  config.weight = spec(losses.over_logsnr, weight=spec(losses.min_snr))
  override(config, {'process.process.num_steps': '20', 'weight.weight.gamma': '3'})
  model_lib.check(config)
  process, level = build(config.process), schedules.vp.level(jnp.asarray([2.0]))
  assert process.num_steps == 20 and schedules.terminal_snr(process) == 0
  straight = build(parse_call('cosine_continuous', schedules))
  weight = build(config.weight)(level, straight)
  np.testing.assert_allclose(weight, losses.over_logsnr(losses.min_snr(3.0))(level, straight))
  override(config, {'process': 'zero_terminal_snr(process=linear(num_steps=30))'})
  assert build(config.process).num_steps == 30
  assert 'num_steps' in config_lib.to_json(config)
  with pytest.raises(UserError, match=r"no 'linnear'; did you mean 'linear'"):
    override(config, {'process': 'zero_terminal_snr(process=linnear())'})
