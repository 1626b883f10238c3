"""Laws and closed forms of the single-step samplers, each its own."""
import functools

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import levels, samplers, schedules
from diffusion_jax.core.types import Denoiser, Level

KEYS = jax.random.split(jax.random.key(3), 4)
SHAPE = (4, 4, 3)
# Each program runs once: optimising it would take longer than all the rest.
quick = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def start(grid):
  return jax.tree.map(lambda a: a[0], grid)


@pytest.mark.parametrize('sampler', [
    samplers.euler(churn=4.0, s_min=0.1, s_max=3.0, s_noise=1.1), samplers.heun(churn=4.0), samplers.ddim(0.5),
    samplers.ancestral(), samplers.predictor_corrector(2), samplers.lcm()], ids=range(6))
def test_samples_are_the_same_along_every_path(sampler):
  """From x at the same sigma / alpha, with the same noise: one function of logsnr (Song et al. 2021, eq. 14)."""
  with jax.enable_x64(True):
    x, ends = jax.random.normal(jax.random.key(1), (4, *SHAPE), jnp.float64), []
    for path in schedules.PATHS:
      grid = levels.uniform_logsnr()(schedules.on_path(schedules.linear(), path.name), 8, None)
      run = quick(lambda x, grid: samplers.solve(sampler, exact.denoise, start(grid).sigma * x, grid, KEYS))
      ends.append(run(x, grid))
  np.testing.assert_allclose(ends, np.broadcast_to(ends[0], np.shape(ends)), rtol=1e-9, atol=1e-9)


def step(sampler, denoise, x, cur, nxt, z):
  """x at nxt, of a run of 10 levels."""
  x = jnp.asarray(x)
  return sampler.step(denoise, x, sampler.init(x, 10), cur, nxt, z)[0]


@pytest.fixture(scope='module')
def cases():
  """[(x, x0, z, cur, nxt, beta, small)] for four steps t to t - 1 of DDPM's chain, with its coefficients of eq. 7."""
  beta = schedules.betas(schedules.linear(), 1000)
  alpha_bar = np.cumprod(1 - beta)
  x, x0, z = np.random.default_rng(0).normal(size=(3, 2, 4, 4, 1))
  grid = levels.timesteps()(schedules.linear(), 1000, None)
  made = []
  for t in (1, 10, 500, 999):
    cur, nxt = (jax.tree.map(lambda a, i=i: a[i], grid) for i in (999 - t, 1000 - t))
    mean = (np.sqrt(alpha_bar[t - 1]) * beta[t] * x0
            + np.sqrt(1 - beta[t]) * (1 - alpha_bar[t - 1]) * x) / (1 - alpha_bar[t])
    small = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta[t]
    made.append((x, x0, z, cur, nxt, mean, small, beta[t]))
  return made


@pytest.mark.parametrize('share', [0.0, 0.5, 1.0])
def test_ancestral_step_is_ddpms_posterior(share, cases):
  """Ho et al. 2020, eq. 6 and 7, between neighbouring steps of the chain; the variance of Nichol & Dhariwal, eq. 15."""
  for x, x0, z, cur, nxt, mean, small, large in cases:
    expected = mean + np.sqrt(small ** (1 - share) * large ** share) * z
    got = step(samplers.ancestral(share), lambda x, level, x0=x0: x0, x, cur, nxt, z)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)
    learned = Denoiser(lambda x, level, x0=x0: (x0, jnp.full_like(x, 2 * share - 1)))
    got = step(samplers.ancestral_learned('range'), learned, x, cur, nxt, z)
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


def test_learned_diagonal_variance_is_the_networks(cases):
  """Its output is the log variance of each element."""
  for x, x0, z, cur, nxt, mean, *_ in cases:
    log_variance = np.linspace(-9, -3, x.size).reshape(x.shape)
    network = Denoiser(lambda x, level, x0=x0, v=log_variance: (x0, jnp.asarray(v)))
    got = step(samplers.ancestral_learned('diagonal'), network, x, cur, nxt, z)
    np.testing.assert_allclose(got, mean + np.exp(log_variance) ** 0.5 * z, rtol=2e-4, atol=2e-5)


def test_ddim_with_eta_one_is_ancestral(cases):
  for x, x0, z, cur, nxt, *_ in cases:
    both = samplers.ddim(1.0), samplers.ancestral()
    one, other = (step(sampler, lambda x, level, x0=x0: x0, x, cur, nxt, z) for sampler in both)
    np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize('eta', [0.3, 1.0])
def test_euler_ancestral_goes_down_and_up(eta):
  """k-diffusion's own form, on the ve path: Euler to sigma_down, then noise of sigma_up."""
  x, x0, z = np.random.default_rng(1).normal(size=(3, 2, 4, 4, 1))
  high, low = 2.0, 1.3
  up = min(low, eta * np.sqrt(low ** 2 * (high ** 2 - low ** 2) / high ** 2))
  down = np.sqrt(low ** 2 - up ** 2)
  expected = x + (x - x0) / high * (down - high) + up * z
  cur, nxt = (schedules.ve.level(jnp.float32(-2 * np.log(s))) for s in (high, low))
  got = step(samplers.euler_ancestral(eta), lambda x, level: x0, x, cur, nxt, z)
  np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_flow_euler_moves_along_the_velocity():
  """x + (sigma_next - sigma) (eps - x0) on the flow path, from alpha = 0."""
  x, x0 = np.random.default_rng(2).normal(size=(2, 2, 4, 4, 1))
  cur, nxt = (schedules.Level(*(jnp.float32(a) for a in (np.log(1 / s - 1 + 1e-99) * 2, 1 - s, s))) for s in (1.0, 0.7))
  got = step(samplers.flow_euler(), lambda x, level: x0, x, cur, nxt, None)
  np.testing.assert_allclose(got, x - 0.3 * (x - x0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('churn', 'gamma'), [(1.0, 0.1), (1e3, np.sqrt(2) - 1)])
def test_churn_calls_the_network_at_the_noisier_level(churn, gamma):
  """Karras et al. 2022, algorithm 2: gamma = min(churn / N, sqrt(2) - 1), only where s_min <= sigma <= s_max."""
  x, z = np.random.default_rng(3).normal(size=(2, 2, 4, 4, 1))
  cur, nxt = (schedules.ve.level(jnp.float32(-2 * np.log(s))) for s in (0.5, 0.3))
  for low, high, g in ((0.1, 1.0, gamma), (0.6, 1.0, 0.0), (0.1, 0.4, 0.0)):
    seen = []
    sampler = samplers.euler(churn, low, high, s_noise=1.1)
    note = lambda x, level, seen=seen: seen.append((x, level)) or jnp.zeros_like(x)
    step(sampler, note, x, cur, nxt, z)
    sampler.finish(note, x, sampler.init(jnp.asarray(x), 10), cur, z)  # the last level is churned too
    for x_hat, level in seen:
      np.testing.assert_allclose(level.sigma, 0.5 * (1 + g), rtol=1e-6)
      np.testing.assert_allclose(jnp.exp(-level.logsnr / 2), 0.5 * (1 + g), rtol=1e-6)
      np.testing.assert_allclose(x_hat, x + 1.1 * z * 0.5 * np.sqrt((1 + g) ** 2 - 1), rtol=1e-5, atol=1e-6)


def test_inversion_returns_to_the_start():
  """To noise and back misses x0 by an error that halves with the step."""
  with jax.enable_x64(True):
    x0, errors = jax.random.uniform(jax.random.key(2), (4, *SHAPE), jnp.float64, -1.2, 1.0), []
    for n in (250, 500):
      grid = levels.uniform_logsnr()(schedules.cosine_continuous(-6, 12), n + 1, None)

      @quick
      def back_and_forth(x0, grid=grid):
        noise = samplers.invert(exact.denoise, x0, grid)
        return noise, samplers.solve(samplers.ddim(), exact.denoise, noise, grid, KEYS)

      noise, again = back_and_forth(x0)
      errors.append(float(jnp.sqrt(jnp.mean((again - x0) ** 2))))
    miss = float(jnp.sqrt(jnp.mean((noise - exact.transport(x0, Level(None, 1, 1e-9), start(grid))) ** 2)))
  assert np.log2(errors[0] / errors[1]) == pytest.approx(1, abs=0.25), errors
  assert miss < 0.05


def test_langevin_corrections_reach_their_stationary_distribution():
  """Where x is normal with variance V, steps of relative size snr end at V (1 + snr^2): Langevin's bias.

  U = (1 - h / V)^2 U + 2 h is the fixed point of x' = x - h x / V + sqrt(2 h) z, with h = 2 snr^2 V^2 / U.
  """
  snr, level = 0.3, schedules.vp.level(jnp.float32(0.4))
  V = level.alpha ** 2 * 0.25 + level.sigma ** 2
  network = lambda x, level: level.alpha * 0.25 / V * x
  z = jax.random.normal(jax.random.key(0), (101, 8, 64, 64, 1))
  x = step(samplers.predictor_corrector(100, snr), network, 2 * z[0], level, level, z)
  assert np.var(x) == pytest.approx(V * (1 + snr ** 2), rel=4 * np.sqrt(2 / x.size))


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: samplers.ddim(eta=1.5), r'eta must lie in \[0, 1\], got 1.5'),
    (lambda: samplers.euler_ancestral(eta=-0.1), r'eta must lie in \[0, 1\], got -0.1'),
    (lambda: samplers.ancestral(variance=-1), r'variance must lie in \[0, 1\], got -1'),
    (lambda: samplers.ancestral_learned('log'), "kind must be 'range' or 'diagonal', got 'log'"),
    (lambda: step(samplers.ancestral_learned(), exact.denoise, jnp.ones(2), *2 * [schedules.vp.level(0.0)], 0.0),
     'needs a network that predicts one'),
    (lambda: samplers.euler(churn=-1), 'churn must be at least 0 and finite, got -1'),
    (lambda: samplers.heun(churn=float('nan')), 'churn must be at least 0 and finite, got nan'),
    (lambda: samplers.heun(s_min=2, s_max=1), '0 <= s_min <= s_max, got 2 and 1'),
    (lambda: samplers.heun(s_noise=0), 's_noise must be above 0, got 0'),
    (lambda: samplers.predictor_corrector(corrections=0), 'corrections must be at least 1, got 0'),
    (lambda: samplers.predictor_corrector(snr=0), 'snr must be above 0, got 0'),
    (lambda: samplers.lcm_boundary(None, schedules.cosine_continuous()), 'counts the steps of a chain'),
    (lambda: samplers.lcm_boundary(None, schedules.linear(), timestep_scaling=0), 'timestep_scaling must be above 0'),
    (lambda: samplers.lcm_boundary(None, schedules.linear(), sigma_data=0), 'sigma_data must be above 0'),
])
def test_bad_arguments_are_named(make, words):
  with pytest.raises(ValueError, match=words):
    make()
