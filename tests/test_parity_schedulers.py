"""Whole runs of diffusers' schedulers against ours with one made-up network, where no trace is recorded.

Needs the extra `parity`; without it these tests are skipped. Recorded runs are replayed in tests/test_schedulers.py.
"""
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import traces

from diffusion_jax.convert import schedulers
from diffusion_jax.core import diffusion, guidance, samplers
from diffusion_jax.runtime.config import build

torch = pytest.importorskip('torch', reason='torch missing: install the parity extra')
diffusers = pytest.importorskip('diffusers', reason='diffusers missing: install the parity extra')
SD = {'beta_schedule': 'scaled_linear', 'beta_start': 0.00085, 'beta_end': 0.012}
# (class, options): what no trace covers. v_prediction, so that the last level may be without signal.
PARITY = [(name, options) for name, *several in (
    ('DDPM', {'variance_type': 'fixed_large'}, {'steps_offset': 1, 'clip_sample': True},
     {'thresholding': True, 'sample_max_value': 1e6, 'dynamic_thresholding_ratio': 0.8}),
    ('DDIM', {'clip_sample': True, 'steps_offset': 1, 'set_alpha_to_one': False}),
    ('PNDM', {'set_alpha_to_one': True, 'timestep_spacing': 'trailing'}),
    ('EulerDiscrete', {'use_karras_sigmas': True}, {'rescale_betas_zero_snr': True, 'timestep_spacing': 'trailing'},
     {'use_karras_sigmas': True, 'sigma_min': 0.1, 'sigma_max': 10.0, 'timestep_spacing': 'leading'}),
    ('EulerAncestralDiscrete', {'timestep_spacing': 'leading', 'steps_offset': 1}),
    ('HeunDiscrete', {'clip_sample': True, 'use_exponential_sigmas': True}),
    ('LMSDiscrete', {}, {'prediction_type': 'sample', 'use_karras_sigmas': True}, {'timestep_spacing': 'trailing'}),
    ('DPMSolverMultistep', {'use_karras_sigmas': True}, {'use_lu_lambdas': True, 'thresholding': True},
     {'rescale_betas_zero_snr': True, 'timestep_spacing': 'trailing'},
     {'algorithm_type': 'sde-dpmsolver++', 'solver_type': 'heun'}, {'final_sigmas_type': 'sigma_min'}),
    ('UniPCMultistep', {'use_karras_sigmas': True}, {'solver_order': 3, 'disable_corrector': [0, 1]},
     {'rescale_betas_zero_snr': True}),
    ('FlowMatchEulerDiscrete', {'shift': 2.0, 'num_train_timesteps': 100}),
    ('EDMEuler', {'sigma_schedule': 'exponential', 'sigma_max': 10.0, 'sigma_data': 0.8})) for options in several]


@pytest.mark.parametrize(('name', 'options'), PARITY)
def test_a_run_of_diffusers(name, options, monkeypatch):
  """The loop of their pipelines, with the config that we write, and ours draw the same, in float64."""
  base = {} if name in ('FlowMatchEulerDiscrete', 'EDMEuler') else {
      'prediction_type': 'v_prediction', 'clip_sample': False, 'skip_prk_steps': True, **SD}
  config, n = {'_class_name': f'{name}Scheduler', **base, **options}, 5
  found = schedulers.from_theirs(config, n)
  noise, x = traces.common()['noise'], traces.common()['x_init']
  numbers = torch.float32 if name == 'UniPCMultistep' else torch.float64  # all that it solves equations in
  first = lambda a: torch.tensor(np.moveaxis(a, -1, 1).copy(), dtype=numbers)

  scheduler = getattr(diffusers, f'{name}Scheduler').from_config(schedulers.to_theirs(found, n))
  module, count = importlib.import_module(scheduler.__module__), iter(range(64))
  monkeypatch.setattr(module, 'randn_tensor', lambda *args, **kwargs: first(noise[next(count)]), raising=False)
  scheduler.set_timesteps(n)
  in_sigma = f'{name}Scheduler' in (*schedulers.IN_SIGMA, 'EDMEulerScheduler')
  start = float(scheduler.sigmas[0]) if in_sigma else 1.0
  theirs = first(x * start)
  for t in scheduler.timesteps:
    seen = scheduler.scale_model_input(theirs, t) if hasattr(scheduler, 'scale_model_input') else theirs
    out = 0.8 * torch.sin(2 * seen + 0.5) + 0.3 * seen + 0.1 * torch.cos(t.to(numbers) / 300)
    more = {'use_clipped_model_output': True} if name == 'DDIM' else {}
    theirs = scheduler.step(out, t, theirs, **more).prev_sample

  with jax.enable_x64(True), jax.disable_jit():
    process = build(found['process'])
    grid, parts = build(found['grid'])(process, n, None), (process, build(found['target']), build(found['noise']))
    denoise = diffusion.denoiser(lambda x, time: 0.8 * jnp.sin(2 * x + 0.5) + 0.3 * x + 0.1 * jnp.cos(time[0] / 300),
                                 diffusion.Diffusion(*parts))
    if found['threshold']:
      denoise = guidance.threshold(denoise, found['threshold'])
    if found['clip']:
      denoise = guidance.clip(denoise)
    ours = samplers.solve(build(found['sampler']), denoise, jnp.asarray(x * start) * (grid.alpha[0] if in_sigma else 1),
                          grid, jnp.arange(2), noise=lambda key, i, cur, nxt, shape: jnp.asarray(noise)[i, key])
  assert traces.relative_error(np.moveaxis(np.asarray(ours), -1, 1), theirs.double().numpy()) < 3e-5
