"""diffusers' schedulers: scheduler_config.json <-> the specs of our process, target, noise, sampler and grid.

Data only: no number is computed but the level at which a sampler ends. What is converted visits the same levels with
the same steps; what has no exact counterpart is refused. What a config does not say, diffusers takes at its call:
DDIM's `eta` is 0, and `use_clipped_model_output` is True where x0 is clipped; churn is 0; and a run starts from noise
of standard deviation 1 (times the largest sigma), where ours has the first level's sigma. DDIM and
PNDM go down by num_train_timesteps // steps, so that "trailing" is exact where the steps divide the chain.
"""
from collections.abc import Mapping
from typing import Any

from diffusion_jax.convert import files, names
from diffusion_jax.convert.scheduler_options import (
  BETAS,
  IN_SIGMA,
  KNOWN,
  OLD,
  ONLY,
  ONLY_OF,
  OPTIONS,
  SOLVERS,
  SPREAD,
  TARGETS,
  TO_LITTLE_NOISE,
  TO_ZERO,
)
from diffusion_jax.core import diffusion, levels, samplers, schedules, targets
from diffusion_jax.core.ending import ending
from diffusion_jax.runtime.config import Config, UserError, build, explain, spec

KEYS = ('process', 'target', 'noise', 'sampler', 'grid', 'clip', 'threshold')
# A flow begins in pure noise; so little data is left in float32's first level that it is the same.
MARGIN = 1e-9
DATA = 60.0  # a level whose sigma, 1e-13, is nothing in float32
UNBOUNDED = 1e6  # a bound of thresholding that no estimate reaches


def from_theirs(config: Mapping[str, Any], steps: int = 50, where: str = 'scheduler_config.json') -> dict[str, Any]:
  """The specs 'process', 'target', 'noise', 'sampler' and 'grid', 'clip' (bool) and 'threshold' (float) of a config.

  steps: of sampling; DPM-Solver takes the last of less than 15 steps with a lower order. Options that a class does not
  have are ignored, as diffusers does. Raises UserError, which begins with `where`, for a class or the value of an
  option that cannot be converted, and for an option that no class has.
  """
  name = files.class_name(config, tuple(OPTIONS), where)
  if unknown := [key for key in config if key not in KNOWN and not key.startswith('_')]:
    raise UserError(f'{where}: no scheduler that can be converted has the option {unknown[0]!r}')
  options = OPTIONS[name] | {key: value for key, value in config.items()
                             if key in OLD.union(OPTIONS[name]) and value is not None}
  names.only(options, ONLY | ONLY_OF.get(name, {}), where)
  with explain(where):
    if name == 'FlowMatchEulerDiscreteScheduler':
      found = _flow(options)
    elif name == 'EDMEulerScheduler':
      found = _edm(options)
    else:
      found = _chain(name, options, steps, where)
    for key in KEYS[:5]:
      build(found[key])  # has an error of its own for a number out of range
  return found


def _flow(options):
  T, shift = options['num_train_timesteps'], float(options['shift'])
  return {'process': spec(schedules.rectified_flow, margin=MARGIN), 'target': spec(targets.velocity),
          'noise': spec(diffusion.timestep, scale=float(T)),
          'sampler': spec(samplers.flow_euler, stochastic=options['stochastic_sampling']),
          # Their last time is shifted once when they are made and, with all others, again when they are asked.
          'grid': spec(levels.shifted, shift=shift, last=shift / T / (1 + (shift - 1) / T)),
          'clip': False, 'threshold': 0.0}


def _edm(options):
  ends = {key: float(options[key]) for key in ('sigma_min', 'sigma_max', 'rho')}
  return {'process': spec(schedules.karras, **ends), 'noise': spec(diffusion.log_sigma),
          'target': spec(targets.edm, sigma_data=float(options['sigma_data'])), 'sampler': spec(samplers.euler),
          'grid': spec(levels.exponential) if options['sigma_schedule'] == 'exponential' else
                  spec(levels.karras, rho=ends['rho']),
          'clip': False, 'threshold': 0.0}


def _chain(name, options, steps, where):
  process = _process(name, options, where)
  to_data = options.get('set_alpha_to_one', True) and options.get('final_sigmas_type', 'zero') == 'zero'
  sampler = _sampler(name, options, to_data, steps, where)
  if not to_data or name in TO_LITTLE_NOISE:
    last = DATA if to_data else float(schedules.evaluate(build(process), 0.0))
    sampler = spec(ending, sampler=sampler, logsnr=last, path='ve' if name in IN_SIGMA else 'vp')
  grid = _grid(name, options, to_data, where)
  whole = name in SOLVERS and _name(grid) in SPREAD.values()  # these round the network's time
  threshold = float(options['dynamic_thresholding_ratio']) if options.get('thresholding') else 0.0
  bounded = threshold and options['sample_max_value'] == 1  # a bound of 1 leaves nothing but clipping
  if threshold and not bounded and options['sample_max_value'] < UNBOUNDED:
    raise UserError(f'{where}: sample_max_value is {options["sample_max_value"]}, and only 1 or at least '
                    f'{UNBOUNDED:g} (no bound) can be converted')
  return {'process': process, 'target': spec(getattr(targets, TARGETS[options['prediction_type']])),
          'noise': spec(diffusion.timestep, scale=float(options['num_train_timesteps'] - 1), whole=whole),
          'sampler': sampler, 'grid': grid, 'clip': bool(threshold or options.get('clip_sample', False)),
          'threshold': 0.0 if bounded else threshold}


def _process(name, options, where):
  T, betas = options['num_train_timesteps'], options['trained_betas']
  if betas is not None:
    if len(betas) != T:
      raise UserError(f'{where}: num_train_timesteps is {T}, but there are {len(betas)} trained_betas')
    process = spec(schedules.table, betas=tuple(map(float, betas)))
  else:
    make = getattr(schedules, BETAS[options['beta_schedule']])
    ends = {key: float(options[key]) for key in ('beta_start', 'beta_end')} if make is not schedules.cosine else {}
    process = spec(make, num_steps=T, **ends)
  if not options.get('rescale_betas_zero_snr'):
    return process
  return spec(schedules.zero_terminal_snr, process=process, least=0.0 if name in TO_ZERO else 2.0 ** -24)


def _grid(name, options, to_data, where):
  spacing, last = options['timestep_spacing'], name not in SOLVERS
  spread = [ours for theirs, ours in SPREAD.items() if options.get(theirs)]
  if len(spread) > 1:
    raise UserError(f'{where} asks for several spacings of sigma: {" and ".join(spread)}')
  if spread and name == 'DPMSolverMultistepScheduler' and options['beta_schedule'] == 'squaredcos_cap_v2':
    raise UserError(f'{where}: {spread[0]} sigmas cannot be converted with squaredcos_cap_v2, whose times are cut off')
  if spread:
    ends = {key: float(options.get(key) or 0) for key in ('sigma_min', 'sigma_max')}
    if name in IN_SIGMA and spacing != 'linspace' and not all(ends.values()):
      raise UserError(f'{where}: timestep_spacing is {spacing!r}, and only "linspace" can be converted with '
                      f'{spread[0]} sigmas, whose ends are those of the spacing')
    if not to_data:
      raise UserError(f'{where}: final_sigmas_type is "sigma_min", and only "zero" can be converted with {spread[0]} '
                      f'sigmas, which end there already')
    return spec(getattr(levels, spread[0]), **ends)
  if spacing == 'leading':
    return spec(levels.leading, last=last, offset=options['steps_offset'])
  if spacing == 'trailing':
    return spec(levels.trailing)
  return spec(levels.timesteps, last=last, between='sigma' if name in IN_SIGMA else 'round')


def _sampler(name, options, to_data, steps, where):
  if name == 'DDPMScheduler':
    kind = options['variance_type']
    last = options['timestep_spacing'] == 'trailing' or (options['timestep_spacing'] == 'leading' and
                                                         options['steps_offset'])
    if last and not kind.startswith('fixed_small'):
      raise UserError(f"{where}: variance_type is {kind!r}, and only 'fixed_small' can be converted for steps that end "
                      f'above 0 ({options["timestep_spacing"]}, steps_offset {options["steps_offset"]}): diffusers '
                      f'adds noise to its result there')
    if kind == 'learned_range':
      return spec(samplers.ancestral_learned)
    return spec(samplers.ancestral, variance=float(kind == 'fixed_large'))
  if name == 'PNDMScheduler':
    return spec(samplers.plms, of='v' if options['prediction_type'] == 'v_prediction' else 'eps')
  if name not in SOLVERS:
    return spec(getattr(samplers, {'DDIMScheduler': 'ddim', 'EulerDiscreteScheduler': 'euler',
                                   'EulerAncestralDiscreteScheduler': 'euler_ancestral',
                                   'HeunDiscreteScheduler': 'heun', 'LMSDiscreteScheduler': 'lms'}[name]))
  order, lowered = options['solver_order'], options['lower_order_final']
  if name == 'UniPCMultistepScheduler':
    if to_data and (options['solver_type'] == 'bh1' or not lowered):
      raise UserError(f'{where}: final_sigmas_type is "zero", and only "sigma_min" can be converted with '
                      f'solver_type "bh1" or without lower_order_final: diffusers makes NaN of it')
    without = list(options['disable_corrector'])
    if without != list(range(len(without))):
      raise UserError(f'{where}: disable_corrector is {without}, and only the first steps, 0, 1, ..., can be converted')
    return spec(samplers.unipc, order=order, variant=options['solver_type'], uncorrected=len(without),
                final_order=_final(order, lowered, to_data))
  kind = options['algorithm_type']
  if to_data and kind == 'dpmsolver':
    raise UserError(f'{where}: final_sigmas_type is "zero", and only "sigma_min" can be converted with algorithm_type '
                    f'"dpmsolver", as in diffusers')
  if order == 3 and kind == 'sde-dpmsolver++':  # its weight of the second difference has the wrong sign
    raise UserError(f'{where}: solver_order is 3, and only 1 or 2 can be converted with algorithm_type {kind!r}')
  if options['euler_at_final'] and not to_data:
    raise UserError(f'{where}: euler_at_final is True, and only False can be converted where the end is not zero')
  make = {'dpmsolver++': samplers.dpmpp, 'sde-dpmsolver++': samplers.dpmpp_sde, 'dpmsolver': samplers.dpm_solver}[kind]
  final = _final(order, lowered and steps < 15, to_data)
  return spec(make, order=order, kind=options['solver_type'], final_order=final)


def _final(order, lowered, to_data):
  """Our `final_order`: 3 where it changes nothing."""
  if not lowered or (to_data and order < 3):
    return 3
  return 2 if to_data else 1


def to_theirs(config: Mapping[str, Any], steps: int = 50) -> dict[str, Any]:
  """The scheduler_config.json of the specs that `from_theirs` returns: from_theirs(to_theirs(c)) is c.

  But that names which mean the same become one: a chain that diffusers has no name for is its `table` of betas,
  `dpmpp_2m` is `dpmpp`, `euler` on a flow `flow_euler`, and a threshold clips as well. Raises UserError for what
  diffusers cannot do, with the nearest that it can.
  """
  wanted = _plain(_one_name(config))
  name, options = _options(wanted)
  result = {'_class_name': name, **OPTIONS[name], **options}
  result.pop('lambda_min_clipped', None)  # its default is not a number of JSON
  nearest = _plain(from_theirs(result, steps, f"diffusers' {name}"))
  for key in KEYS:
    if nearest[key] != wanted[key]:
      raise UserError(f"diffusers' {name} cannot do {key} {_call(wanted[key])}: the nearest that it can is "
                      f'{_call(nearest[key])}')
  return result


def _one_name(config):
  """The settings with one name for each thing, and with every default."""
  modules = {'process': schedules, 'target': targets, 'noise': diffusion, 'sampler': samplers, 'grid': levels}
  found = {key: _whole(config[key], module) for key, module in modules.items()}
  process, sampler = found['process'], found['sampler']
  if _name(process) == 'quadratic':
    found['process'] = spec(schedules.scaled_linear, **{k: v for k, v in process.items() if k != 'fn'})
  elif _name(process) == 'zero_terminal_snr':
    inner = process['process']
    inner = spec(getattr(schedules, inner)) if isinstance(inner, str) else inner
    found['process'] = spec(schedules.zero_terminal_snr, process=_whole(inner, schedules), least=process['least'])
  elif _name(process) not in (*BETAS.values(), 'table') and (chain := build(process)).num_steps:
    found['process'] = spec(schedules.table, betas=tuple(schedules.betas(chain, chain.num_steps).tolist()))
  if _name(sampler) in ('dpmpp_2m', 'dpmpp_3m'):
    found['sampler'] = spec(samplers.dpmpp, order=int(_name(sampler)[-2]))
  elif _name(sampler) == 'euler' and _name(process) == 'rectified_flow':
    found['sampler'] = spec(samplers.flow_euler)
  return found | {'clip': bool(config['clip'] or config['threshold']), 'threshold': float(config['threshold'])}


def _whole(call, module):
  """A spec with every default, also if it is older than an argument of its function."""
  arguments = {key: value for key, value in call.items() if key != 'fn'}
  if _name(call) == 'ending':
    return spec(ending, **arguments | {'sampler': _whole(arguments['sampler'], module)})
  make = getattr(module, _name(call), None)
  if make is None:
    raise UserError(f'{call["fn"]} is not of {module.__name__}, and diffusers has nothing like it')
  return spec(make, **arguments)


def _options(config):
  """(class, options) that come nearest to the settings."""
  sampler, process = config['sampler'], config['process']
  ends = _name(sampler) == 'ending'
  above, sampler = ends and sampler['logsnr'] < DATA, sampler['sampler'] if ends else sampler
  if not (found := _sampler_options(sampler, process, above)):
    raise UserError(f'diffusers has no scheduler like {_call(sampler)}: those that can be converted are ancestral, '
                    f'ancestral_learned, ddim, plms, euler, euler_ancestral, heun, lms, dpmpp, dpmpp_sde, dpm_solver, '
                    f'unipc and flow_euler')
  name, options = found
  if name == 'FlowMatchEulerDiscreteScheduler':
    return name, options | {'num_train_timesteps': int(config['noise'].get('scale', 1000)),
                            'shift': config['grid'].get('shift', 1.0)}
  if name == 'EDMEulerScheduler':
    return name, {**{k: v for k, v in process.items() if k != 'fn'},
                  'sigma_data': config['target'].get('sigma_data', 0.5),
                  'sigma_schedule': 'exponential' if _name(config['grid']) == 'exponential' else 'karras'}
  known = OPTIONS[name]
  options |= _process_options(process) | _grid_options(config['grid'])
  options['prediction_type'] = {v: k for k, v in TARGETS.items()}.get(_name(config['target']), 'epsilon')
  options['set_alpha_to_one'], options['final_sigmas_type'] = not above, 'sigma_min' if above else 'zero'
  options['clip_sample'] = bool(config['clip'] and not config['threshold'])
  if config['threshold']:
    options |= {'thresholding': True, 'dynamic_thresholding_ratio': config['threshold'],
                'sample_max_value': UNBOUNDED}
  elif config['clip'] and 'clip_sample' not in known:
    options['thresholding'] = True  # between -1 and 1, its default
  return name, {key: value for key, value in options.items() if key in known}


def _sampler_options(sampler, process, above):
  name = _name(sampler)
  lowered = sampler.get('final_order', 3) < 3 or (sampler.get('order', 3) < 3 and not above)
  if name == 'ancestral':
    return 'DDPMScheduler', {'variance_type': 'fixed_large' if sampler['variance'] == 1 else 'fixed_small'}
  if name == 'plms':
    return 'PNDMScheduler', {'skip_prk_steps': True}
  if name == 'flow_euler':
    return 'FlowMatchEulerDiscreteScheduler', {'stochastic_sampling': sampler['stochastic']}
  if name == 'unipc':
    return 'UniPCMultistepScheduler', {
        'solver_order': sampler['order'], 'solver_type': sampler['variant'],
        'disable_corrector': list(range(sampler['uncorrected'])),
        'lower_order_final': lowered}
  algorithms = {'dpmpp': 'dpmsolver++', 'dpmpp_sde': 'sde-dpmsolver++', 'dpm_solver': 'dpmsolver'}
  if name in algorithms:
    return 'DPMSolverMultistepScheduler', {
        'solver_order': sampler['order'], 'solver_type': sampler['kind'], 'algorithm_type': algorithms[name],
        'lower_order_final': lowered}
  simple = {'ancestral_learned': ('DDPMScheduler', {'variance_type': 'learned_range'}), 'ddim': ('DDIMScheduler', {}),
            'euler': ('EDMEulerScheduler' if _name(process) == 'karras' else 'EulerDiscreteScheduler', {}),
            'euler_ancestral': ('EulerAncestralDiscreteScheduler', {}), 'heun': ('HeunDiscreteScheduler', {}),
            'lms': ('LMSDiscreteScheduler', {})}
  return simple.get(name)


def _process_options(process):
  options = {'rescale_betas_zero_snr': _name(process) == 'zero_terminal_snr'}
  process = process['process'] if options['rescale_betas_zero_snr'] else process
  if _name(process) == 'table':
    return options | {'trained_betas': list(process['betas']), 'num_train_timesteps': len(process['betas'])}
  theirs = {ours: theirs for theirs, ours in BETAS.items()}.get(_name(process))
  if theirs is None:
    raise UserError(f"diffusers has no process like {_call(process)}: those that can be converted are chains, flows "
                    f'of margin {MARGIN:g} and karras')
  ends = {key: process[key] for key in ('beta_start', 'beta_end') if key in process}
  return options | {'beta_schedule': theirs, 'num_train_timesteps': process['num_steps'], **ends}


def _grid_options(grid):
  name = _name(grid)
  options = {theirs: True for theirs, ours in SPREAD.items() if ours == name}
  options |= {key: grid[key] for key in ('sigma_min', 'sigma_max') if grid.get(key)}
  spacing = name if name in ('leading', 'trailing') else 'linspace'
  return options | {'timestep_spacing': spacing, 'steps_offset': grid.get('offset', 0)}


def _name(call):
  return call['fn'].partition(':')[2]


def _call(value):
  """A spec as it is written on the command line, to be read in a message."""
  if not isinstance(value, dict):
    return repr(value)
  return f'{_name(value)}({", ".join(f"{k}={_call(v)}" for k, v in value.items() if k != "fn")})'


def _plain(value):
  """The same without ConfigDicts and lists, to be compared."""
  if isinstance(value, (dict, Config)):
    return {key: _plain(v) for key, v in value.items()}
  return tuple(map(_plain, value)) if isinstance(value, (list, tuple)) else value
