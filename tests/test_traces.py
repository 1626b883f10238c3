"""Every trace of the single-step samplers of diffusers, and EDM's own sampler, replayed step by step in float64.

tests/fixtures/README.md says which sampler, grid and options each trace is.
"""
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import traces

from diffusion_jax.core import guidance, samplers, schedules
from diffusion_jax.core.types import Denoiser, Level


@dataclasses.dataclass
class Case:
  """A trace as our sampler runs it."""
  sampler: samplers.Sampler
  a: np.ndarray                        # the scales of each level: [N]
  b: np.ndarray
  wrap: Callable = lambda network, i, x, cur: network  # the Denoise of step i, which starts at x
  draw: Callable = lambda i: i         # which of the recorded noises step i draws
  to_data: bool = True
  quirk: bool = False                  # it departs from the source, and only the wrapped case equals it


def ddpm(trace, variance_type='fixed_small', clip_sample=True, thresholding=False, sample_max_value=1.0,
         dynamic_thresholding_ratio=0.995, **chain):
  sampler = {'fixed_small': samplers.ancestral(), 'fixed_large': samplers.ancestral(variance=1.0),
             'learned_range': samplers.ancestral_learned('range')}[variance_type]

  def wrap(network, i, x, cur):
    output = jnp.asarray(trace['outs'][i][..., 3:]) if variance_type == 'learned_range' else None
    both = Denoiser(lambda x, level: (network(x, level), output))
    if thresholding:
      return guidance.threshold(both, dynamic_thresholding_ratio, sample_max_value)
    return guidance.clip(both) if clip_sample else both

  return Case(sampler, trace['a'], trace['b'], wrap)


def ddim(trace, eta=0.0, clip_sample=True, set_alpha_to_one=True, **chain):
  case = Case(samplers.ddim(eta), trace['a'], trace['b'])
  if not set_alpha_to_one:  # it ends at the chain's first level, not in data
    alpha_bar = np.float64(traces.common()['alphas_cumprod/' + chain['beta_schedule']][0])
    case.a, case.b, case.to_data = np.r_[case.a, alpha_bar ** 0.5], np.r_[case.b, (1 - alpha_bar) ** 0.5], False
  if clip_sample:
    # diffusers clips x0 and keeps the eps of the x0 before clipping, so that the two no longer add up to x. Ours (and
    # guided-diffusion's) takes eps from the clipped x0. Theirs is our unclipped step plus the change of x0.
    def step(denoise, x, memory, cur, nxt, z):
      x0 = denoise(x, cur)
      return samplers.transfer(x, x0, cur, nxt) + nxt.alpha * (jnp.clip(x0, -1, 1) - x0), memory

    finish = lambda denoise, x, memory, last, z: jnp.clip(denoise(x, last), -1, 1)
    case.sampler, case.quirk = samplers.Sampler(step, finish=finish), True
  return case


def euler(trace, final_sigmas_type='zero', **chain):
  case = Case(samplers.euler(), trace['a'], trace['b'])
  if final_sigmas_type == 'sigma_min':
    case.a, case.b, case.to_data = np.r_[case.a, 1], trace['sigmas'], False
  return case


def heun(trace, **chain):
  return Case(samplers.heun(), trace['a'][::2], trace['b'][::2])  # the table holds each level of a correction twice


def edm_euler(trace, s_churn=0.0, s_tmin=0.0, s_tmax=np.inf, s_noise=1.0, **chain):
  if s_churn == 0:
    return Case(samplers.euler(), trace['a'], trace['b'])

  # EDM's algorithm 2 adds noise first and shows the network the noisier x at its level. diffusers calls the network on
  # x before the noise, and then puts F, which belongs to (x, sigma), to x_hat with the coefficients of sigma_hat.
  def coeffs(sigma, sigma_data=0.5):
    total = sigma ** 2 + sigma_data ** 2
    return sigma_data ** 2 / total, sigma * sigma_data / jnp.sqrt(total)

  def wrap(network, i, x, cur):
    skip, out = coeffs(cur.sigma)
    F = (network(x, cur) - skip * x) / out
    return lambda x_hat, hat: coeffs(hat.sigma)[0] * x_hat + coeffs(hat.sigma)[1] * F

  churned = (trace['b'] >= s_tmin) & (trace['b'] <= s_tmax)  # they draw noise at these levels only
  return Case(samplers.euler(s_churn, s_tmin, s_tmax, s_noise), trace['a'], trace['b'], wrap,
              draw=lambda i: int(np.sum(churned[:i])), quirk=True)


def flow_euler(trace, stochastic_sampling=False, **chain):
  return Case(samplers.flow_euler(stochastic_sampling), trace['a'], trace['b'])


def lcm(trace, **chain):
  steps, logsnr = trace['timesteps'], 2 * np.log(trace['a'] / trace['b'])
  process = schedules.Process(logsnr=None, num_steps=1000,
                              time=lambda l, params: jnp.interp(l, jnp.asarray(logsnr), jnp.asarray(steps / 999)))
  return Case(samplers.lcm(), trace['a'], trace['b'],
              lambda network, i, x, cur: samplers.lcm_boundary(network, process))


def euler_ancestral(trace, **chain):
  return Case(samplers.euler_ancestral(), trace['a'], trace['b'])


RECIPES = {'ddpm': ddpm, 'ddim': ddim, 'euler': euler, 'euler_ancestral': euler_ancestral, 'heun': heun,
           'edm_euler': edm_euler, 'flow_euler': flow_euler, 'lcm': lcm}
# Settings that only choose the levels or what the network predicts: both are read from the trace.
GIVEN = {'beta_schedule', 'beta_start', 'beta_end', 'prediction_type', 'rescale_betas_zero_snr', 'timestep_spacing',
         'steps_offset', 'use_karras_sigmas', 'shift', 'use_dynamic_shifting', 'time_shift_type', 'sigma_schedule'}


def make(name):
  """(case, trace), with the data the trace was made on."""
  settings, trace = traces.index()[name], traces.trace(name)
  options = settings['config'] | (settings['step_kwargs'] or {})
  recipe = RECIPES[name.split('/')[0]]
  known = set(recipe.__code__.co_varnames[:recipe.__code__.co_argcount]) | GIVEN
  assert set(options) <= known, f'{name}: the recipe does not know {set(options) - known}'
  return recipe(trace, **options), trace


def replay(case, x, denoise, forced=None):
  """(the state after each step, the inputs of the network), with each step started at forced[i] if given."""
  inputs, ends, noise = [], [], jnp.asarray(traces.common()['noise'])
  grid, count = traces.level(case.a, case.b), len(case.a)
  at = lambda i: Level(*(a[min(i, count - 1)] for a in grid))

  def network(x, level):
    inputs.append(x)
    return denoise(x, level)

  memory = case.sampler.init(jnp.asarray(x), count)
  for i in range(count - 1 + case.to_data):
    x = jnp.asarray(x if forced is None else forced[i])
    step, z = case.wrap(network, i, x, at(i)), noise[case.draw(i)]
    if i < count - 1:
      x, memory = case.sampler.step(step, x, memory, at(i), at(i + 1), z)
    else:
      x = case.sampler.finish(step, x, memory, at(i), z)
    ends.append(x)
  return np.stack(ends), np.stack(inputs)


def tolerance(name):
  """float32 rounding of 1 - alpha_bar, and of a difference of sigmas, costs the recorded traces a digit."""
  return 1e-4 if 'last10of1000' in name or 'churn' in name else 1e-5


@pytest.mark.parametrize('name', traces.names('test_traces'))
def test_trace_is_reproduced(name):
  with jax.enable_x64(True):
    case, trace = make(name)
    denoise, xs = traces.denoiser(traces.index()[name]['mean_scale']), trace['xs']
    calls = case.sampler.calls
    ends, _ = replay(case, xs[0], denoise, forced=xs[:-1:calls])
    assert traces.relative_error(ends, np.r_[xs[calls:-1:calls], xs[-1:]]) < tolerance(name), 'a step'
    ends, inputs = replay(case, xs[0], denoise)
    assert traces.relative_error(np.r_[inputs, ends[-1:]], xs) < tolerance(name), 'the run'
    assert traces.relative_error(ends[-1], trace['x_final_f64']) < tolerance(name)


def test_every_family_of_traces_is_replayed_somewhere():
  assert {name.split('/')[0] for name in traces.index()} == {f for fs in traces.FAMILIES.values() for f in fs}


@pytest.mark.parametrize(('name', 'ours'), [
    ('ddim/linear/epsilon/eta0.0/clip', lambda network, i, x, cur: guidance.clip(network)),
    ('edm_euler/churn', lambda network, i, x, cur: network),
])
def test_where_diffusers_departs_from_the_source(name, ours):
  """`ddim` and `edm_euler` say how; our own samplers, which follow the source, end elsewhere."""
  with jax.enable_x64(True):
    case, trace = make(name)
    assert case.quirk
    sampler = samplers.ddim() if name.startswith('ddim') else case.sampler
    ends, _ = replay(dataclasses.replace(case, sampler=sampler, wrap=ours), trace['xs'][0],
                     traces.denoiser(traces.index()[name]['mean_scale']))
  assert traces.relative_error(ends[-1], trace['x_final_f64']) > 1e-3


def test_lcm_boundary_scalings():
  """c_skip and c_out are what f(x = 1, x0 = 0) and f(x = 0, x0 = 1) give at the recorded steps."""
  common = traces.common()
  with jax.enable_x64(True):
    process = schedules.linear()
    level = process.level(jnp.asarray(common['lcm/t'] / 999))
    zero, one = jnp.zeros((4, 1)), jnp.ones((4, 1))
    skip = samplers.lcm_boundary(lambda x, level: zero, process)(one, level)
    out = samplers.lcm_boundary(lambda x, level: one, process)(zero, level)
  np.testing.assert_allclose(np.hstack([skip, out]), common['lcm/c_skip_out'], rtol=1e-6)


@pytest.mark.parametrize('name', traces.edm_runs())
def test_edms_own_sampler_is_reproduced(name):
  """Every x and sigma that the network is called with, and the end: Karras et al. 2022, algorithm 2."""
  options, run = traces.edm_runs()[name], traces.edm(name)
  churn = {ours: options[theirs] for ours, theirs in (('churn', 'S_churn'), ('s_min', 'S_min'), ('s_max', 'S_max'),
                                                      ('s_noise', 'S_noise')) if theirs in options}
  sigma = np.r_[80, run['net_sigma'][1::2]]  # of each level: the second call of a step is not churned
  levels = []
  with jax.enable_x64(True):
    def note(network, i, x, cur):
      return lambda x, level: levels.append(level.sigma) or network(x, level)

    case = Case(samplers.heun(**churn), np.ones_like(sigma), sigma, note)
    ends, inputs = replay(case, 80 * traces.common()['x_init'], traces.denoiser())
    assert len(inputs) == case.sampler.nfe(options['num_steps']) == len(run['net_x'])
    np.testing.assert_allclose(levels, run['net_sigma'], rtol=1e-10)
    assert traces.relative_error(inputs, run['net_x']) < 1e-10
    assert traces.relative_error(ends[-1], run['x_final']) < 1e-10

