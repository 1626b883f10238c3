"""diffusers' schedulers as our specs: recorded runs, published configs, both directions, and what is refused."""
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import traces

from diffusion_jax.convert import schedulers
from diffusion_jax.core import diffusion, guidance, levels, samplers, schedules, targets
from diffusion_jax.core.ending import ending
from diffusion_jax.core.types import Denoiser, Level
from diffusion_jax.runtime.config import UserError, build, spec

SD = {'beta_schedule': 'scaled_linear', 'beta_start': 0.00085, 'beta_end': 0.012}
SCALED = spec(schedules.scaled_linear)
# The scheduler_config.json of well-known models, without their version.
PUBLISHED = {
    'stable diffusion 1.5': {'_class_name': 'PNDMScheduler', **SD, 'num_train_timesteps': 1000, 'clip_sample': False,
                             'set_alpha_to_one': False, 'skip_prk_steps': True, 'steps_offset': 1,
                             'trained_betas': None},
    'stable diffusion 2.1': {'_class_name': 'DDIMScheduler', **SD, 'num_train_timesteps': 1000, 'clip_sample': False,
                             'prediction_type': 'v_prediction', 'set_alpha_to_one': False, 'skip_prk_steps': True,
                             'steps_offset': 1, 'trained_betas': None},
    'stable diffusion xl': {'_class_name': 'EulerDiscreteScheduler', **SD, 'clip_sample': False,
                            'interpolation_type': 'linear', 'num_train_timesteps': 1000, 'prediction_type': 'epsilon',
                            'sample_max_value': 1.0,
                            'set_alpha_to_one': False, 'skip_prk_steps': True, 'steps_offset': 1,
                            'timestep_spacing': 'leading', 'trained_betas': None, 'use_karras_sigmas': False},
    'stable diffusion 3': {'_class_name': 'FlowMatchEulerDiscreteScheduler', 'num_train_timesteps': 1000, 'shift': 3.0},
    'ddpm cifar10': {'_class_name': 'DDPMScheduler', 'beta_end': 0.02, 'beta_schedule': 'linear', 'beta_start': 0.0001,
                     'clip_sample': True, 'num_train_timesteps': 1000, 'trained_betas': None,
                     'variance_type': 'fixed_large'},
}
# Traces that are not converted: why.
REFUSED = {'pndm/prk': 'skip_prk_steps', 'edm_euler/v_prediction': 'prediction_type', 'lcm/': '_class_name|class',
           'edm_dpm++': 'class', 'edm_sde-dpm++': 'class', 'flow_euler/dynamic': 'use_dynamic_shifting',
           'flow_euler/karras': 'use_karras_sigmas', 'dpm++/order2/flow_shift3': 'use_flow_sigmas|prediction_type',
           'ddpm/linear/epsilon/thresholding': 'sample_max_value is 1.5'}
# Options of a call and not of a config, and a clipping of diffusers' own: tests/test_traces.py replays them.
AT_CALL = {'edm_euler/churn', 'ddim/linear/epsilon/eta0.0/clip', *(f'ddim/linear/{kind}/noclip' for kind in (
    'epsilon/eta0.5', 'v_prediction/eta0.5', 'epsilon/eta1.0', 'v_prediction/eta1.0', 'sample/eta1.0'))}


def config_of(name):
  settings = traces.index()[name]
  return {'_class_name': settings['class'], **settings['config']}


def converted():
  return [name for name in traces.index() if name not in AT_CALL and not name.startswith(tuple(REFUSED))]


@functools.cache
def stepper(sampler, wrap, learned):
  """step(x, memory, cur, nxt, z, output) of a sampler's spec on the traces' network, compiled once, and finish."""
  made = build(json.loads(sampler))

  def network(output):
    inner = traces.denoiser(learned[1])
    denoise = Denoiser(lambda x, level: (inner(x, level), output)) if learned[0] else inner
    return guidance.clip(denoise) if wrap else denoise

  return (made, jax.jit(lambda x, memory, cur, nxt, z, output: made.step(network(output), x, memory, cur, nxt, z)),
          jax.jit(lambda x, memory, cur, z, output: made.finish(network(output), x, memory, cur, z)))


@pytest.mark.parametrize('name', converted())
def test_recorded_runs(name):
  """Levels, times and the whole run of each of diffusers' traces that can be converted."""
  settings, trace = traces.index()[name], traces.trace(name)
  n = settings['num_inference_steps']
  found = schedulers.from_theirs(config_of(name), n)
  count = len(trace['a']) if settings['only_last_n'] else n
  with jax.enable_x64(True):
    process = build(found['process'])
    grid = jax.tree.map(lambda a: a[-count:], build(found['grid'])(process, n, None))
    time = np.asarray(build(found['noise'])(process, grid, None))
    at = lambda i: Level(*(a[i] for a in grid))
    learned = settings['model_out_has_variance'], settings['mean_scale']
    sampler, step, finish = stepper(json.dumps(found['sampler'].to_dict()), found['clip'], learned)
    output = lambda i: jnp.asarray(trace['outs'][i][..., 3:]) if learned[0] else jnp.zeros(())
    scale = trace['b'][0] / float(grid.sigma[0])  # 1, or where theirs runs with alpha = 1
    x, noise = jnp.asarray(trace['xs'][0] / scale), jnp.asarray(traces.common()['noise'])
    memory = sampler.init(x, count)
    for i in range(count - 1):
      x, memory = step(x, memory, at(i), at(i + 1), noise[i], output(i))
    x = finish(x, memory, at(count - 1), noise[count - 1], output(count - 1))
  inside = sorted(set(np.asarray(trace['timesteps']).tolist()), reverse=True)
  np.testing.assert_allclose(time, inside, atol=0.06)  # a place between two steps is one of sigma, or of its logarithm
  tolerance = 1e-4 if 'last10of1000' in name or 'zero_snr' in name else 2e-5
  assert traces.relative_error(x, trace['x_final_f64']) < tolerance


def test_every_trace_is_converted_or_refused():
  assert len(converted()) > 45
  for name in traces.index():
    if name.startswith(tuple(REFUSED)):
      reason, = (why for start, why in REFUSED.items() if name.startswith(start))
      with pytest.raises(UserError, match=reason):
        schedulers.from_theirs(config_of(name))


def expected(process, target, sampler, grid, noise=None, clip=False, threshold=0.0):
  return {'process': process, 'target': spec(target), 'sampler': sampler, 'grid': grid, 'clip': clip,
          'noise': noise or spec(diffusion.timestep), 'threshold': threshold}


@pytest.mark.parametrize(('name', 'wanted'), [
    ('stable diffusion 1.5', lambda end: expected(
        SCALED, targets.eps, spec(ending, sampler=spec(samplers.plms), logsnr=end), spec(levels.leading, offset=1))),
    ('stable diffusion 2.1', lambda end: expected(
        SCALED, targets.v, spec(ending, sampler=spec(samplers.ddim), logsnr=end), spec(levels.leading, offset=1))),
    ('stable diffusion xl', lambda end: expected(
        SCALED, targets.eps, spec(samplers.euler), spec(levels.leading, offset=1))),
    ('stable diffusion 3', lambda end: expected(
        spec(schedules.rectified_flow, margin=1e-9), targets.velocity, spec(samplers.flow_euler),
        spec(levels.shifted, last=0.003 / 1.002), spec(diffusion.timestep, scale=1000.0))),
    ('ddpm cifar10', lambda end: expected(
        spec(schedules.linear), targets.eps, spec(samplers.ancestral, variance=1.0), spec(levels.leading), clip=True))])
def test_published_configs(name, wanted):
  found = schedulers.from_theirs(PUBLISHED[name])
  end = found['sampler'].get('logsnr', 0.0)
  assert found == wanted(end)
  if end:
    assert end == pytest.approx(np.log((1 - 0.00085) / 0.00085), rel=1e-12)


@pytest.mark.parametrize(('options', 'peer'), [
    ({}, 'linear'), (SD, 'scaled_linear'), ({'beta_schedule': 'squaredcos_cap_v2'}, 'squaredcos_cap_v2'),
    ({'beta_schedule': 'sigmoid'}, 'sigmoid'), ({'rescale_betas_zero_snr': True}, 'linear_zero_snr'),
    ({'trained_betas': np.linspace(1e-4, 0.02, 1000).tolist()}, 'linear')])
def test_betas_are_diffusers(options, peer):
  """To the rounding of its float32, which a zero-SNR chain, a difference of small numbers, shows most."""
  stored = np.load(traces.FOLDER / 'samplers_common.npz')
  process = build(schedulers.from_theirs({'_class_name': 'DDPMScheduler', **options})['process'])
  atol = 5e-7 if 'snr' in peer else 1e-13
  np.testing.assert_allclose(schedules.betas(process, 1000), stored[f'betas/{peer}'], rtol=1e-5, atol=atol)
  np.testing.assert_allclose(schedules.alphas_cumprod(process, 1000), stored[f'alphas_cumprod/{peer}'], rtol=1e-5,
                             atol=atol)


@pytest.mark.parametrize('config', [*PUBLISHED.values(), *map(config_of, converted())],
                         ids=[*PUBLISHED, *converted()])
def test_what_was_read_is_written_and_read_again(config):
  found = schedulers.from_theirs(config, 20)
  written = schedulers.to_theirs(found, 20)
  assert written['_class_name'] == config['_class_name']
  assert schedulers.from_theirs(json.loads(json.dumps(written, allow_nan=False)), 20) == found


LINEAR, LEADING = spec(schedules.linear), spec(levels.leading)
INSIDE = spec(levels.timesteps, between='sigma')
SOLVED = spec(levels.timesteps, last=False)


@pytest.mark.parametrize('ours', [
    expected(LINEAR, targets.eps, spec(samplers.ancestral), LEADING, clip=True),
    expected(spec(schedules.cosine, num_steps=50), targets.x0, spec(samplers.ancestral_learned), LEADING,
             spec(diffusion.timestep, scale=49.0), True),
    expected(spec(schedules.table, betas=(0.1, 0.2, 0.5)), targets.v, spec(samplers.ancestral), spec(levels.trailing),
             spec(diffusion.timestep, scale=2.0)),
    expected(spec(schedules.zero_terminal_snr, process=SCALED), targets.v, spec(samplers.ddim), spec(levels.trailing)),
    expected(LINEAR, targets.eps, spec(samplers.ddim), spec(levels.trailing), clip=True, threshold=0.995),
    expected(LINEAR, targets.eps, spec(samplers.euler), spec(levels.karras, sigma_min=0.1, sigma_max=10.0)),
    expected(LINEAR, targets.x0, spec(ending, sampler=spec(samplers.lms), logsnr=60.0, path='ve'), INSIDE),
    expected(LINEAR, targets.eps, spec(ending, sampler=spec(samplers.plms), logsnr=60.0), LEADING),
    expected(spec(schedules.zero_terminal_snr, process=SCALED, least=2.0 ** -24), targets.v, spec(samplers.euler),
             spec(levels.trailing)),
    expected(LINEAR, targets.v, spec(samplers.heun), spec(levels.exponential), clip=True),
    expected(LINEAR, targets.v, spec(samplers.plms, of='v'), LEADING) | {
        'sampler': spec(ending, sampler=spec(samplers.plms, of='v'),
                        logsnr=float(schedules.evaluate(schedules.linear(), 0.0)))},
    expected(LINEAR, targets.x0, spec(samplers.dpmpp, order=3), spec(levels.uniform_logsnr),
             spec(diffusion.timestep, whole=True), clip=True),
    expected(LINEAR, targets.eps, spec(samplers.dpmpp_sde, kind='heun'), SOLVED),
    expected(LINEAR, targets.eps, spec(samplers.unipc, order=3, uncorrected=2, final_order=2), SOLVED),
    expected(spec(schedules.rectified_flow, margin=1e-9), targets.velocity, spec(samplers.flow_euler, stochastic=True),
             spec(levels.shifted, shift=2.0, last=2 / 101), spec(diffusion.timestep, scale=100.0)),
    expected(spec(schedules.karras, sigma_max=60.0), targets.edm, spec(samplers.euler), spec(levels.exponential),
             spec(diffusion.log_sigma))])
def test_what_was_written_is_read_again(ours):
  assert schedulers.from_theirs(schedulers.to_theirs(ours)) == ours


@pytest.mark.parametrize(('change', 'same'), [
    ({'process': spec(schedules.quadratic)},
     {'process': spec(schedules.scaled_linear, beta_start=1e-4, beta_end=0.02)}),
    ({'process': spec(schedules.zero_terminal_snr)}, {'process': spec(schedules.zero_terminal_snr, process=LINEAR)}),
    ({'process': spec(schedules.jsd, num_steps=4), 'noise': spec(diffusion.timestep, scale=3.0)},
     {'process': None, 'noise': spec(diffusion.timestep, scale=3.0)}),
    ({'sampler': spec(samplers.dpmpp_2m), 'grid': SOLVED}, {'sampler': spec(samplers.dpmpp), 'grid': SOLVED}),
    ({'threshold': 0.9, 'clip': False}, {'threshold': 0.9, 'clip': True})])
def test_two_names_of_one_thing_become_one(change, same):
  plain = expected(LINEAR, targets.v, spec(samplers.ddim), LEADING)
  found = schedulers.from_theirs(schedulers.to_theirs(plain | change))
  if same.get('process', LINEAR) is None:  # a chain without a name: 1/4, 1/3, 1/2, 1
    np.testing.assert_allclose(found['process'].betas, [1 / 4, 1 / 3, 1 / 2, 1], rtol=1e-12)
    same['process'] = found['process']
  assert found == plain | same


def test_an_old_spec_without_a_later_argument_is_read_with_its_default():
  ours = expected(LINEAR, targets.eps, {'fn': 'diffusion_jax.core.samplers:dpmpp', 'order': 2}, SOLVED)
  assert schedulers.from_theirs(schedulers.to_theirs(ours))['sampler'] == spec(samplers.dpmpp)


@pytest.mark.parametrize(('name', 'options', 'message'), [
    ('KDPM2Discrete', {}, "^scheduler_config.json is of class 'KDPM2.*; those .* DDPMScheduler,"),
    ('DDPM', {'beta_schedule': 'laplace'}, "beta_schedule is 'laplace', and only 'linear' or"),
    ('DDIM', {'beta_schedule': 'sigmoid'}, "beta_schedule is 'sigmoid', and only"),
    ('DDPM', {'variance_type': 'learned'}, "variance_type is 'learned', and only 'fixed_small'"),
    ('DDPM', {'variance_type': 'fixed_large', 'steps_offset': 1}, 'end above 0 .leading, steps'),
    ('DDPM', {'clip_sample_range': 2.0}, 'clip_sample_range is 2.0, and only 1.0'),
    ('DDPM', {'new_option': 2.0}, "has the option 'new_option'"),
    ('DDPM', {'predict_epsilon': False}, 'predict_epsilon is False, and only True'),
    ('DDPM', {'trained_betas': [0.1, 0.2]}, 'num_train_timesteps is 1000, but there are 2 trai'),
    ('DDPM', {'beta_start': 0.5}, '0 < beta_start <= beta_end < 1, got 0.5 and 0.02'),
    ('DDPM', {'beta_start': 'low'}, "^scheduler_config.json: .* float: 'low'"),
    ('DDIM', {'timestep_spacing': 'linspace'}, "timestep_spacing is 'linspace', and only 'lead"),
    ('DDIM', {'thresholding': True, 'sample_max_value': 2}, 'sample_max_value is 2, and only 1'),
    ('EulerDiscrete', {'use_karras_sigmas': True, 'timestep_spacing': 'leading'},
     "timestep_spacing is 'leading', and only \"linspace\" can be converted with karras"),
    ('EulerDiscrete', {'use_karras_sigmas': True, 'final_sigmas_type': 'sigma_min'}, 'end there'),
    ('EulerDiscrete', {'use_karras_sigmas': True, 'use_exponential_sigmas': True},
     'several spacings of sigma: karras and exponential'),
    ('EulerDiscrete', {'rescale_betas_zero_snr': True}, 'least must lie in .0, 4.2.*e-09., got 5.96.*e-08'),
    ('UniPCMultistep', {'use_exponential_sigmas': True}, 'use_exponential_sigmas is True, and only False'),
    ('DPMSolverMultistep', {'solver_order': 3, 'algorithm_type': 'sde-dpmsolver++'}, 'solver_order is 3, and only 1'),
    ('EulerDiscrete', {'use_beta_sigmas': True}, 'use_beta_sigmas is True, and only False'),
    ('EulerAncestralDiscrete', {'prediction_type': 'sample'}, "prediction_type is 'sample'"),
    ('DPMSolverMultistep', {'algorithm_type': 'sde-dpmsolver'}, "algorithm_type is 'sde-dpmso"),
    ('DPMSolverMultistep', {'algorithm_type': 'dpmsolver'}, 'only "sigma_min" .* "dpmsolver"'),
    ('DPMSolverMultistep', {'use_karras_sigmas': True, 'beta_schedule': 'squaredcos_cap_v2'},
     'karras sigmas cannot be converted with squaredcos_cap_v2'),
    ('DPMSolverMultistep', {'solver_order': 4}, 'order must be 1, 2 or 3, got 4'),
    ('DPMSolverMultistep', {'final_sigmas_type': 'sigma_min', 'euler_at_final': True}, 'euler_at'),
    ('UniPCMultistep', {'solver_type': 'bh1'}, 'with solver_type "bh1" or without'),
    ('UniPCMultistep', {'disable_corrector': [1]}, r'disable_corrector is \[1\], and only'),
    ('FlowMatchEulerDiscrete', {'invert_sigmas': True}, 'invert_sigmas is True, and only False'),
    ('EDMEuler', {'final_sigmas_type': 'sigma_min'}, "final_sigmas_type is 'sigma_min', and")])
def test_what_cannot_be_read_is_refused_in_a_sentence(name, options, message):
  with pytest.raises(UserError, match=message) as error:
    schedulers.from_theirs({'_class_name': f'{name}Scheduler', **options})
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(('change', 'message'), [
    ({'process': spec(schedules.cosine_continuous)}, 'no process like cosine_continuous.'),
    ({'process': spec(schedules.rectified_flow), 'sampler': spec(samplers.euler)},
     r'cannot do process rectified_flow\(margin=0.0001\): the nearest that it can is rectified_flow\(margin=1e-09\)'),
    ({'target': spec(targets.velocity)}, r"diffusers' DDIMScheduler cannot do target velocity\(\): the nearest .* eps"),
    ({'noise': spec(diffusion.log_sigma)}, r'cannot do noise log_sigma\(scale=0.25\): .* timestep\(scale=999.0, whole'),
    ({'sampler': spec(samplers.ddim, eta=0.5)}, r'cannot do sampler ddim\(eta=0.5\): .* ddim\(eta=0.0\)'),
    ({'sampler': spec(samplers.ancestral, variance=0.5)}, 'cannot do sampler ancestral'),
    ({'sampler': spec(samplers.heun, churn=9.0)}, 'cannot do sampler heun'),
    ({'sampler': spec(samplers.deis)}, 'no scheduler like deis'),
    ({'sampler': spec(samplers.dpmpp_sde, order=3), 'grid': SOLVED}, 'solver_order is 3, and only 1 or 2'),
    ({'sampler': spec(samplers.lms), 'grid': INSIDE}, r'cannot do sampler lms\(order=4\): .* ending\(.*lms'),
    ({'sampler': {'fn': 'mylab.samplers:mine'}}, 'mylab.samplers:mine is not of diffusion_jax.core.samplers'),
    ({'grid': spec(levels.quadratic)}, "DDIMScheduler: timestep_spacing is 'linspace', and only 'leading'"),
    ({'sampler': spec(samplers.heun), 'grid': spec(levels.karras, rho=3.0)}, 'cannot do grid karras'),
    ({'sampler': spec(samplers.euler), 'grid': INSIDE, 'clip': True}, 'cannot do clip True: .* False')])
def test_what_cannot_be_written_is_refused_in_a_sentence(change, message):
  with pytest.raises(UserError, match=message) as error:
    schedulers.to_theirs(expected(LINEAR, targets.eps, spec(samplers.ddim), LEADING) | change)
  assert '\n' not in str(error.value)


def test_ending_is_a_step_more():
  """With one level more on the grid and its last call left out, and to a level of either scale."""
  process, keys = schedules.linear(), jax.random.split(jax.random.key(0), 2)
  with jax.enable_x64(True):
    grid = levels.timesteps()(process, 6, None)
    short, x = jax.tree.map(lambda a: a[:-1], grid), jnp.linspace(-2, 2, 8).reshape(2, 2, 2, 1)
    denoise = lambda x, level: jnp.tanh(x) * level.alpha
    for inner, path, scale in ((samplers.dpmpp(2, final_order=1), 'vp', 1), (samplers.ddim(), 've', grid.alpha[-1])):
      wanted = samplers.solve(inner, denoise, x, grid, keys, to_data=False)
      got = samplers.solve(ending(inner, float(grid.logsnr[-1]), path), denoise, x, short, keys)
      np.testing.assert_allclose(got * scale, wanted, rtol=1e-12)
  with pytest.raises(ValueError, match='one call a step'):
    ending(samplers.heun(), 9.0)
  with pytest.raises(ValueError, match=r"path must be one of vp, .*, got 'up'"):
    ending(samplers.ddim(), 9.0, 'up')
