"""Laws of sampling grids; the grids of other implementations."""
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import traces

from diffusion_jax.core import levels, schedules


def own_like_leading():
  """`own` takes as many levels as it was given: here a leading grid's steps, or times, for any number of them."""

  def grid(process, num_steps, params=None):
    T = process.num_steps
    values = np.arange(num_steps)[::-1] * (T // max(num_steps, 1) if T else 1 / max(num_steps, 1))
    return levels.own(values=tuple(values), of='steps' if T else 'time')(process, num_steps, params)

  return grid


GRIDS = {name: own_like_leading() if name == 'own' else getattr(levels, name)() for name in levels.GRIDS}
NEEDS_NOTHING = lambda fn: all(p.default is not p.empty for p in inspect.signature(fn).parameters.values())
PROCESSES = {name: getattr(schedules, name)() for name in schedules.__all__ if NEEDS_NOTHING(getattr(schedules, name))}
every_grid = pytest.mark.parametrize('name', GRIDS)
every_process = pytest.mark.parametrize('process', PROCESSES.values(), ids=PROCESSES.keys())
ABOVE_ZERO = {'trailing', 'lcm'}   # their last level has t > 0
OFF_CHAIN = {'exponential', 'karras', 'uniform_logsnr'}  # their levels lie between a chain's steps
BELOW_ONE = {'leading', 'quadratic', 'own'}  # their first level has t < 1


def on_table(alpha_bar):
  """A chain with these alpha_bar [T], which may end in 0, to be asked at its own steps only."""
  with np.errstate(divide='ignore'):
    table = np.log(alpha_bar) - np.log1p(-alpha_bar)
  T = len(alpha_bar)
  step = lambda t: np.round(np.asarray(t) * (T - 1)).astype(int)
  return schedules.Process(lambda t, params=None: table[step(t)], None, num_steps=T)


@every_process
@every_grid
@pytest.mark.parametrize('num_steps', [1, 17])
def test_grids_fall_within_the_process(name, process, num_steps):
  params = process.init(jax.random.key(0))
  with jax.enable_x64(True):
    level = jax.tree.map(np.asarray, GRIDS[name](process, num_steps, params))
  noise, data = schedules.evaluate(process, np.array([1.0, 0.0]), params)
  logsnr = level.logsnr
  assert logsnr.shape == level.alpha.shape == level.sigma.shape == (num_steps,)
  assert np.all(logsnr[1:] > logsnr[:-1])
  assert np.all(np.isfinite(level.alpha)) and np.all(level.sigma > 0)
  assert noise - 1e-6 <= logsnr[0] and logsnr[-1] <= data + 1e-6
  if name not in BELOW_ONE:
    assert logsnr[0] == pytest.approx(noise, abs=1e-6)
  if name not in ABOVE_ZERO and num_steps > 1:
    assert logsnr[-1] == pytest.approx(data, abs=1e-6)


@every_grid
@pytest.mark.parametrize('num_steps', [2, 17, 47])
def test_noise_telescopes_over_a_prime_number_of_steps(name, num_steps):
  """The shares of alpha_bar that the steps keep multiply to the whole: nothing is skipped or counted twice."""
  process = schedules.linear()
  with jax.enable_x64(True):
    level = jax.tree.map(np.asarray, GRIDS[name](process, num_steps, None))
  kept = np.log1p(np.exp(-level.logsnr[1:])) - np.log1p(np.exp(-level.logsnr[:-1]))  # log of alpha_bar's ratio
  assert np.prod(np.exp(kept / 2)) == pytest.approx(level.alpha[0] / level.alpha[-1], rel=1e-12)
  np.testing.assert_allclose(level.alpha ** 2 + level.sigma ** 2, 1, rtol=1e-12)
  if name not in OFF_CHAIN:
    # The same from the chain itself: the product of sqrt(1 - beta) over all steps between the ends.
    beta = np.linspace(1e-4, 0.02, 1000)
    first, last = (int(np.argmin(np.abs(np.cumprod(1 - beta) - a ** 2))) for a in level.alpha[[0, -1]])
    assert level.alpha[0] / level.alpha[-1] == pytest.approx(np.prod(np.sqrt(1 - beta[last + 1:first + 1])), rel=1e-12)


@every_grid
def test_zero_terminal_snr_is_visited_exactly(name):
  process = on_table(np.linspace(0.9999, 0, 1000) ** 2)
  level = GRIDS[name](process, 10, None)
  assert np.all(np.diff(level.alpha) > 0) and np.all(np.diff(level.sigma) < 0)
  assert name in BELOW_ONE or (level.alpha[0], level.sigma[0]) == (0, 1)


@pytest.mark.parametrize('name', [n for n in GRIDS if n not in OFF_CHAIN | {'lcm'}])
@pytest.mark.parametrize('num_steps', [600, 1000])
def test_a_chain_is_visited_at_most_once(name, num_steps):
  """Also where whole steps become scarce, and N does not divide T."""
  step = steps_of(GRIDS[name], num_steps, 1000)
  assert len(step) == num_steps and np.all(np.diff(step) < 0) and step[-1] >= 0 and step[0] <= 999


def steps_of(grid, n, T):
  """The steps that a grid of n visits on a chain of T, found by their alpha_bar."""
  alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, T))
  with jax.enable_x64(True):
    alpha = np.asarray(grid(on_table(alpha_bar), n, None).alpha)
  steps = [int(np.argmin(np.abs(alpha_bar - a ** 2))) for a in alpha]
  np.testing.assert_allclose(alpha ** 2, alpha_bar[steps], rtol=1e-9)
  return steps


def test_grids_in_time_are_the_published_ones():
  """Lin et al. 2024, table 2: T = 1000 in 10 and 50 steps, counted from 0."""
  assert steps_of(levels.leading(), 10, 1000) == list(range(900, -1, -100))
  assert steps_of(levels.trailing(), 10, 1000) == list(range(999, 0, -100))
  assert steps_of(levels.timesteps(), 10, 1000) == list(range(999, -1, -111))
  for name in ('leading', 'trailing', 'timesteps', 'polynomial'):
    assert steps_of(GRIDS[name], 1000, 1000) == list(range(999, -1, -1))


def test_quadratic_grid_is_ddims():
  """tau_i = floor(c i^2) up to 0.8 T (Song et al. 2021, appendix D.2), here with sqrt(800) / 5 squared = 32."""
  assert steps_of(levels.quadratic(), 6, 1000) == [32 * i ** 2 for i in (5, 4, 3, 2, 1, 0)]


def test_steps_that_do_not_divide_the_chain():
  """DDIM's stride is T // N, so that 7 steps of 1000 are 142 apart; a trailing grid rounds each step."""
  assert steps_of(levels.leading(), 7, 1000) == [142 * i for i in range(6, -1, -1)]
  assert steps_of(levels.leading(offset=1), 7, 1000) == [142 * i + 1 for i in range(6, -1, -1)]
  assert steps_of(levels.timesteps(), 7, 1000) == [999, 832, 666, 500, 333, 166, 0]  # halves to even
  assert steps_of(levels.trailing(), 3, 1000) == [999, 666, 332]
  assert steps_of(levels.trailing(), 16, 1000)[1:3] == [937, 874]  # 937.5 and 875: half to even, then one less


def test_karras_grid_is_edms():
  """sigma for 18 steps, rho 7, from 80 to 0.002 (Karras et al. 2022, eq. 5)."""
  process = schedules.Process(lambda t, params=None: -2 * (np.log(0.002) + t * np.log(80 / 0.002)), None, schedules.ve)
  wanted = [80.0, 57.58599, 40.78557, 0.00752802, 0.002]
  sigma = levels.karras()(process, 18, None).sigma[np.array([0, 1, 2, 16, 17])]
  np.testing.assert_allclose(sigma, wanted, rtol=1e-6)
  given = levels.karras(sigma_min=0.002, sigma_max=80.0)(schedules.on_path(schedules.linear(), 've'), 18, None)
  np.testing.assert_allclose(given.sigma[np.array([0, 1, 2, 16, 17])], wanted, rtol=1e-6)


def test_identities_between_grids():
  """Each is another's special case: a check on both."""
  process, flow = schedules.linear(), schedules.rectified_flow()
  line = levels.uniform_logsnr()(process, 9, None)
  for grid in (levels.exponential(), levels.own(values=tuple(map(float, line.logsnr)), of='logsnr'),
               levels.own(values=tuple(map(float, np.exp(-np.asarray(line.logsnr) / 2))), of='sigma'),
               levels.karras(rho=1e6)):  # a high power of a root is a logarithm
    np.testing.assert_allclose(grid(process, 9, None).logsnr, line.logsnr, atol=1e-4)
  straight = levels.timesteps()(flow, 9, None).logsnr
  for grid in (levels.shifted(1.0), levels.polynomial(1.0)):
    np.testing.assert_allclose(grid(flow, 9, None).logsnr, straight, rtol=1e-6)
  t = np.asarray(flow.time(levels.polynomial(2.0)(flow, 9, None).logsnr, None))
  np.testing.assert_allclose(np.diff(np.sqrt(np.maximum(t, 0))), -1 / 8, atol=1e-3)


# What other implementations visit: from a trace's settings to the process, our grid, and the order of the calls.
DEFAULTS = {'beta_schedule': 'linear', 'beta_start': 1e-4, 'beta_end': 0.02, 'steps_offset': 0}
SD = {'beta_schedule': 'scaled_linear', 'beta_start': 0.00085, 'beta_end': 0.012}
EDM = schedules.Process(lambda t, params=None: -2 * (np.log(0.002) + t * np.log(80 / 0.002)), None, schedules.ve)
FLOW = schedules.Process(lambda t, params=None: 2 * jnp.log((1 - t) / t), None, schedules.flow)
# A Karras spacing of the flow's sigma itself, of which sigma/alpha is no power: levels of one's own.
FLOW_KARRAS = np.linspace(1, 0.001 ** (1 / 7), 20) ** 7


def chain_of(config):
  alpha_bar = traces.common()['alphas_cumprod/' + config['beta_schedule']].astype(np.float64)
  if config.get('rescale_betas_zero_snr'):  # Lin et al. 2024, algorithm 1
    root = np.sqrt(alpha_bar)
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
  return on_table(alpha_bar)


def chain_grid(config, spacing, last=True, between='round'):
  spacing = config.get('timestep_spacing', spacing)
  if spacing == 'linspace':
    return levels.timesteps(last, between)
  return levels.trailing() if spacing == 'trailing' else levels.leading(last, config['steps_offset'])


def recipe(settings):
  """(process, grid, level of each call, counted from the noise; a call between two levels is half-way)."""
  n, defaults = settings['num_inference_steps'], DEFAULTS | (SD if settings['class'] == 'LCMScheduler' else {})
  config = defaults | settings['config']
  plain, sort = list(range(n)), settings['class'].removesuffix('Scheduler')
  if sort in ('EDMEuler', 'EDMDPMSolverMultistep'):
    return EDM, levels.karras() if config.get('sigma_schedule') != 'exponential' else levels.exponential(), plain
  if sort == 'FlowMatchEulerDiscrete':
    if config.get('use_karras_sigmas'):
      return FLOW, levels.own(tuple(FLOW_KARRAS), 'time'), plain
    mu, linear = (settings['set_timesteps_kwargs'] or {}).get('mu'), config.get('time_shift_type') == 'linear'
    shift = config.get('shift', 1.0) if mu is None else mu if linear else np.exp(mu)
    # A shift that is set beforehand has moved diffusers' last time once already.
    last = 0.001 if mu is not None else shift * 0.001 / (1 + (shift - 1) * 0.001)
    return FLOW, levels.shifted(shift, 1.0, last), plain
  if config.get('use_flow_sigmas'):
    return FLOW, levels.shifted(config['flow_shift'], 0.999, 0.999 / n), plain
  process = chain_of(config)
  if config.get('use_karras_sigmas'):
    return process, levels.karras(), plain
  if sort in ('DDPM', 'DDIM'):
    return process, chain_grid(config, 'leading'), plain
  if sort in ('DPMSolverMultistep', 'UniPCMultistep'):
    return process, chain_grid(config, 'linspace', last=False), plain
  if sort in ('EulerDiscrete', 'EulerAncestralDiscrete', 'HeunDiscrete'):
    twice = [0, *np.repeat(range(1, n), 2)]
    return process, chain_grid(config, 'linspace', between='sigma'), twice if sort.startswith('Heun') else plain
  if sort == 'PNDM' and config.get('skip_prk_steps'):  # the second level is visited again
    return process, chain_grid(config, 'leading'), [0, 1, *plain[1:]]
  if sort == 'PNDM':  # three Runge-Kutta steps of four calls
    return process, chain_grid(config, 'leading'), [i + d for i in range(3) for d in (0, 0.5, 0.5, 1)] + plain[3:]
  if sort == 'LCM':
    return process, levels.lcm(), plain
  raise KeyError(sort)


def diffusers_traces():
  names = list(traces.index())
  assert len(names) > 70
  return names


@pytest.mark.parametrize('name', diffusers_traces())
def test_every_trace_visits_our_grid(name):
  """(alpha, sigma) at each network call of each of diffusers' traces."""
  settings, seen = traces.index()[name], traces.trace(name)
  process, grid, calls = recipe(settings)
  if np.all(seen['a'] == 1):
    process = schedules.on_path(process, 've')
  with jax.enable_x64(True):
    level = grid(process, settings['num_inference_steps'], None)
  calls = np.asarray(calls)[-len(seen['a']):]  # some traces are of the last steps only
  assert len(calls) == len(seen['a'])
  whole = calls % 1 == 0
  assert whole.sum() >= min(len(whole), 20)
  at = calls[whole].astype(int)
  # atol: a flow's 1 - sigma, rounded in float32
  np.testing.assert_allclose(np.asarray(level.alpha)[at], seen['a'][whole], rtol=1e-5, atol=6e-8)
  np.testing.assert_allclose(np.asarray(level.sigma)[at], seen['b'][whole], rtol=1e-5)


@pytest.mark.parametrize('num_steps', [8, 18])
def test_edms_sampler_visits_our_grid(num_steps):
  """sigma at the calls of EDM's own sampler, which rounds nothing; all but the first level are visited twice."""
  seen = np.load(traces.FOLDER / 'edm.npz')[f'edm/steps{num_steps}/net_sigma']
  with jax.enable_x64(True):
    sigma = np.asarray(levels.karras()(EDM, num_steps, None).sigma)
  np.testing.assert_allclose(np.r_[sigma[0], np.repeat(sigma[1:], 2)], seen, rtol=1e-7)


@pytest.mark.parametrize('num_steps', [0, -3])
@every_grid
def test_too_few_steps_are_refused(name, num_steps):
  with pytest.raises(ValueError, match=f'own grid needs|at least 1, got {num_steps}'):
    GRIDS[name](schedules.linear(), num_steps, None)


@pytest.mark.parametrize(('make', 'process', 'num_steps', 'message'), [
    (lambda: levels.timesteps(), schedules.linear(), 1001, '1001 sampling steps do not fit in a chain of 1000'),
    (lambda: levels.leading(offset=1), schedules.linear(), 1000, 'would start at step 1000'),
    (lambda: levels.leading(offset=-1), schedules.linear(), 10, 'offset must be at least 0 steps, got -1'),
    (lambda: levels.timesteps(between='nearest'), schedules.linear(), 10, "between must be .* got 'nearest'"),
    (lambda: levels.lcm(), schedules.linear(), 51, '51 sampling steps are more than the 50'),
    (lambda: levels.lcm(), schedules.linear(40), 4, 'a chain of 40 steps has no 50'),
    (lambda: levels.own(), schedules.linear(), 10, r'write own\(values='),
    (lambda: levels.own((999, 0, 500)), schedules.linear(), 3, r'each below the one before, got \(999, 0, 500\)'),
    (lambda: levels.own((1.0, -1.0), 'logsnr'), schedules.linear(), 2, 'each above the one before'),
    (lambda: levels.own((999, 999), 'steps'), schedules.linear(), 2, 'each below'),
    (lambda: levels.own((1000, 0)), schedules.linear(), 2, r'must lie in \[0, 999\]'),
    (lambda: levels.own((1.5, 0.0), 'time'), schedules.rectified_flow(), 2, r'must lie in \[0, 1\]'),
    (lambda: levels.own((99, 0)), schedules.rectified_flow(), 2, 'give times'),
    (lambda: levels.own((80.0, 0.0), 'sigma'), schedules.linear(), 2, 'sigma must be above 0'),
    (lambda: levels.own((999, 0)), schedules.linear(), 3, 'take that many sampling steps, got 3'),
    (lambda: levels.own((1,), 'alpha'), schedules.linear(), 1, "got 'alpha'"),
    (lambda: levels.karras(rho=0), schedules.linear(), 2, 'rho must be above 0, got 0'),
    (lambda: levels.karras(sigma_min=-1), schedules.linear(), 2, 'at least 0, got -1'),
    (lambda: levels.karras(sigma_min=80, sigma_max=1), schedules.linear(), 2, 'must fall along the grid, got 1 to 80'),
    (lambda: levels.polynomial(0), schedules.linear(), 2, 'rho must be above 0, got 0'),
    (lambda: levels.quadratic(1.5), schedules.linear(), 2, r'reach must lie in \(0, 1\], got 1.5'),
    (lambda: levels.shifted(0), schedules.linear(), 2, 'shift must be above 0, got 0'),
    (lambda: levels.shifted(1, 0.2, 0.3), schedules.linear(), 2, '0 <= last < first <= 1, got last 0.3 and first 0.2')])
def test_bad_input_is_named(make, process, num_steps, message):
  with pytest.raises(ValueError, match=message):
    make()(process, num_steps, None)
