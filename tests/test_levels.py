"""Laws of training draws and sampling grids."""
import jax
import numpy as np
import pytest

from diffusion_jax.core import levels, schedules

DRAWS = {name: getattr(levels, name)() for name in levels.DRAWS}
GRIDS = {name: getattr(levels, name)() for name in levels.GRIDS}
PROCESSES = {name: getattr(schedules, name)() for name in schedules.__all__}
every_draw = pytest.mark.parametrize('draw', DRAWS.values(), ids=DRAWS.keys())
every_grid = pytest.mark.parametrize('grid', GRIDS.values(), ids=GRIDS.keys())
every_process = pytest.mark.parametrize('process', PROCESSES.values(), ids=PROCESSES.keys())


@every_process
@every_draw
def test_draws_are_uniform_in_time(draw, process):
  """Kolmogorov-Smirnov at the 0.1 % level; a chain's steps are shifted by half a cell at most."""
  level = draw(jax.random.key(0), 4096, process, None)
  t = np.sort(process.time(level.logsnr, None))
  gap = np.abs(t - np.linspace(0, 1, 4096)).max()
  assert gap < 1.95 / np.sqrt(4096) + 1e-3


@every_draw
def test_a_chain_is_drawn_at_its_own_steps(draw):
  process = schedules.linear()
  step = 999 * process.time(draw(jax.random.key(3), 4096, process, None).logsnr, None)
  np.testing.assert_allclose(step, np.round(step), atol=1e-3)
  assert step.min() >= 0
  assert step.max() <= 999


def test_low_discrepancy_fills_every_cell_once():
  process = schedules.cosine_continuous()
  t = process.time(levels.low_discrepancy()(jax.random.key(5), 64, process, None).logsnr, None)
  np.testing.assert_allclose(np.diff(np.sort(t)), 1 / 64, atol=2e-5)


@every_process
@every_grid
@pytest.mark.parametrize('num_steps', [1, 2, 7, 13, 50])
def test_grids_fall_within_the_process(grid, process, num_steps):
  level = grid(process, num_steps, None)
  ends = schedules.evaluate(process, np.array([1.0, 0.0]))
  assert level.logsnr.shape == level.alpha.shape == level.sigma.shape == (num_steps,)
  assert np.all(np.diff(level.logsnr) > 0)
  assert level.logsnr[0] >= ends[0] - 1e-4
  assert level.logsnr[-1] <= ends[1] + 1e-4


@every_process
@every_grid
def test_noise_telescopes_over_a_prime_number_of_steps(grid, process):
  """The steps' shares of SNR multiply to the whole: nothing is skipped or counted twice."""
  level = grid(schedules.on_path(process, 'vp'), 17, None)
  lost = -np.expm1(np.asarray(level.logsnr[:-1], np.float64) - np.asarray(level.logsnr[1:], np.float64))
  total = np.sum(np.log1p(-lost))
  assert total == pytest.approx(float(level.logsnr[0]) - float(level.logsnr[-1]), rel=1e-6)


def steps_of(grid, n, T):
  process = schedules.linear(T)
  return list(np.round((T - 1) * np.asarray(process.time(grid(process, n, None).logsnr, None))).astype(int))


def test_grids_in_time_are_the_published_ones():
  """Lin et al. 2024, table 2: T = 1000 in 10 and 50 steps, counted from 0."""
  assert steps_of(levels.leading(), 10, 1000) == list(range(900, -1, -100))
  assert steps_of(levels.trailing(), 10, 1000) == list(range(999, 0, -100))
  assert steps_of(levels.timesteps(), 10, 1000) == list(range(999, -1, -111))
  for grid in GRIDS.values():
    if grid in (GRIDS['leading'], GRIDS['trailing'], GRIDS['timesteps']):
      assert steps_of(grid, 1000, 1000) == list(range(999, -1, -1))


def test_karras_grid_is_edms():
  """sigma for 18 steps, rho 7, from 80 to 0.002 (Karras et al. 2022, eq. 5)."""
  process = schedules.Process(lambda t, params=None: -2 * (np.log(0.002) + t * np.log(80 / 0.002)), None, schedules.ve)
  sigma = levels.karras()(process, 18, None).sigma[np.array([0, 1, 2, 16, 17])]
  np.testing.assert_allclose(sigma, [80.0, 57.58599, 40.78557, 0.00752802, 0.002], rtol=1e-6)


@pytest.mark.parametrize('num_steps', [0, -3])
@every_grid
def test_too_few_steps_are_refused(grid, num_steps):
  with pytest.raises(ValueError, match=f'at least 1, got {num_steps}'):
    grid(schedules.linear(), num_steps, None)


def test_more_steps_than_the_chain_has_are_refused():
  with pytest.raises(ValueError, match='1001 sampling steps do not fit in a chain of 1000'):
    levels.timesteps()(schedules.linear(), 1001, None)
