"""Laws of every target, on every path."""
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import chain, diffusion, levels, schedules, targets

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
TARGETS = {name: getattr(targets, name)() for name in targets.__all__}
every_target = pytest.mark.parametrize('target', TARGETS.values(), ids=TARGETS.keys())
every_path = pytest.mark.parametrize('path', schedules.PATHS, ids=lambda path: path.name)
LOGSNR = np.array([-8.0, -2.0, 0.0, 3.0, 8.0])


def example(path, logsnr=LOGSNR, dtype=jnp.float32):
  x0, eps = np.random.default_rng(0).standard_normal((2, len(logsnr), 4, 4, 3))
  level = path.level(jnp.asarray(logsnr, dtype))
  x0, eps = jnp.asarray(x0, dtype), jnp.asarray(eps, dtype)
  return x0, eps, level, diffusion.add_noise(x0, eps, level)


def invert(target, level, x, F):
  _, c_skip, c_out = (c.reshape(-1, 1, 1, 1) for c in target.coeffs(level))
  return c_skip * x + c_out * F


@every_path
@every_target
def test_coefficients_invert_the_target(target, path):
  @jax.jit
  def back(x0, eps, level, x):
    return invert(target, level, x, target.of(x0, eps, level))

  with jax.enable_x64(True):
    x0, eps, level, x = example(path, dtype=jnp.float64)
    np.testing.assert_allclose(back(x0, eps, level, x), x0, rtol=1e-9, atol=1e-9)


@every_target
def test_prediction_does_not_depend_on_the_path(target):
  """The same F, at the same logsnr, on x of another path: the same x0."""
  net = lambda x, noise: jnp.tanh(x) * jnp.cos(noise)[:, None, None, None]
  results = []
  for path in schedules.PATHS:
    process = schedules.on_path(schedules.linear(), path.name)
    denoise = diffusion.denoiser(net, diffusion.Diffusion(process, target, diffusion.log_sigma()))
    _, _, level, x = example(path)
    results.append(jax.jit(denoise)(x, level))
  for other in results[1:]:
    np.testing.assert_allclose(other, results[0], rtol=2e-4, atol=2e-4)


@every_target
def test_where_there_is_no_signal_x0_is_exact_or_infinitely_uncertain(target):
  """At alpha = 0 what the net sees and what it learns are finite; of x0 it tells all, or (eps, score) nothing."""
  for path in (schedules.vp, schedules.flow):
    x0, eps, level, x = example(path, [-np.inf])
    F = target.of(x0, eps, level)
    c_in, c_skip, c_out = target.coeffs(level)
    assert np.isfinite(c_in).all() and np.isfinite(F).all()
    if np.isfinite(c_skip):
      # Where F does not depend on x0 there, as v's does, c_out |F - of| is the error of x0 still.
      np.testing.assert_allclose(invert(target, level, x, F), x0, rtol=1e-5, atol=1e-5)
    else:
      assert np.isinf(c_skip) and np.isinf(c_out)
      assert np.array_equal(F, target.of(0 * x0, eps, level))


def test_eps_and_score_alone_need_signal():
  level = schedules.vp.level(jnp.asarray(-jnp.inf))
  assert {name for name, target in TARGETS.items() if not np.isfinite(target.coeffs(level)).all()} == {'eps', 'score'}


def test_mu_is_the_posterior_mean_of_ddpm():
  """Ho et al. 2020, eq. 7, from the betas alone; the first step's is the data."""
  process = schedules.linear(50)
  with jax.enable_x64(True):
    target = targets.on(targets.mu(), process)
    level = process.level(jnp.arange(50) / 49)
    one, none = jnp.ones((50, 1)), jnp.zeros((50, 1))
    of_x0, of_eps = (np.asarray(target.of(*parts, level))[:, 0] for parts in ((one, none), (none, one)))
  beta = schedules.betas(process, 50)
  bar = np.cumprod(1 - beta)
  before = np.r_[1, bar[:-1]]
  k = np.sqrt(1 - beta) * (1 - before) / (1 - bar)
  np.testing.assert_allclose(of_x0, np.sqrt(before) * beta / (1 - bar) + k * np.sqrt(bar), rtol=1e-10)
  np.testing.assert_allclose(of_eps, k * np.sqrt(1 - bar), rtol=1e-10)
  assert of_x0[0] == pytest.approx(1) and of_eps[0] == 0


def test_mu_in_continuous_time_takes_the_given_step():
  process = schedules.cosine_continuous(-6, 6)
  level = process.level(jnp.asarray([0.5]))
  np.testing.assert_allclose(chain.previous(process, level, num_steps=4).logsnr, process.logsnr(jnp.asarray([0.25])),
                             rtol=1e-5)
  with pytest.raises(ValueError, match='num_steps must be at least 1, got 0'):
    targets.mu(0)


@every_path
def test_score_is_the_gradient_of_the_log_density(path):
  """d/dx log N(x; alpha x0, sigma^2), in the variance-preserving scale whatever the path."""
  with jax.enable_x64(True):
    x0, eps, level, _ = example(path, dtype=jnp.float64)
    vp = schedules.vp.level(level.logsnr)
    a, s = (c.reshape(-1, 1, 1, 1) for c in (vp.alpha, vp.sigma))
    gradient = jax.grad(lambda x: jnp.sum(-0.5 * ((x - a * x0) / s) ** 2))(a * x0 + s * eps)
    np.testing.assert_allclose(targets.score().of(x0, eps, level), gradient, rtol=1e-9)


@pytest.mark.parametrize(('name', 'path'), [('v', schedules.vp), ('velocity', schedules.flow)])
def test_velocities_are_derivatives_along_the_path(name, path):
  """v is dx/d(angle) with alpha = cos, velocity dx/d(sigma) with alpha = 1 - sigma: central differences."""
  with jax.enable_x64(True):
    x0, eps, level, _ = example(path, dtype=jnp.float64)
    place = (jnp.arcsin(level.sigma) if name == 'v' else level.sigma).reshape(-1, 1, 1, 1)
    x = lambda p: (jnp.cos(p) * x0 + jnp.sin(p) * eps) if name == 'v' else (1 - p) * x0 + p * eps
    slope = (x(place + 1e-5) - x(place - 1e-5)) / 2e-5
    np.testing.assert_allclose(TARGETS[name].of(x0, eps, level), slope, rtol=1e-6, atol=1e-7)


@every_path
@pytest.mark.parametrize('sigma_data', [0.5, 1.3])
def test_edm_sees_and_predicts_unit_variance(path, sigma_data):
  """What defines EDM's coefficients (Karras et al. 2022, appendix B.6), for x0 of variance sigma_data^2."""
  target, level = targets.edm(sigma_data), path.level(jnp.asarray(LOGSNR))
  c_in, _, _ = target.coeffs(level)
  np.testing.assert_allclose(c_in ** 2 * (level.alpha ** 2 * sigma_data ** 2 + level.sigma ** 2), 1, rtol=1e-5)
  one, none = jnp.ones((5, 1)), jnp.zeros((5, 1))
  variance = sigma_data ** 2 * target.of(one, none, level) ** 2 + target.of(none, one, level) ** 2
  np.testing.assert_allclose(variance, 1, rtol=1e-5)


@pytest.mark.parametrize(('peer', 'target'), [('EDMPrecond', 'edm'), ('VPPrecond', 'eps')])
def test_coefficients_are_those_of_edms_code(peer, target):
  """Their c_skip at sigma = 80 is off by 2e-9, ours is 0.25 / 6400.25 to float32."""
  table = np.load(FIXTURES / 'edm.npz', allow_pickle=False)
  sigma = jnp.asarray(table['precond/sigma'])
  level = schedules.ve.level(-2 * jnp.log(sigma))
  for name, ours in zip(('c_in', 'c_skip', 'c_out'), TARGETS[target].coeffs(level), strict=True):
    np.testing.assert_allclose(ours, table[f'precond/{peer}/{name}'], rtol=1e-5, atol=3e-9, err_msg=name)
  if peer == 'EDMPrecond':
    noise = diffusion.log_sigma()(None, level)
    np.testing.assert_allclose(noise, table[f'precond/{peer}/c_noise'], rtol=1e-5, atol=1e-7)


def test_timestep_is_ddpms_step_index():
  process = schedules.linear()
  grid = levels.timesteps()(process, 1000)
  np.testing.assert_allclose(diffusion.timestep()(process, grid), np.arange(1000)[::-1], rtol=2e-7)


def test_a_denoiser_carries_the_variance_output():
  """A net of 2 C channels: the first half is F, the second passes through; another number is refused."""
  model = diffusion.Diffusion(schedules.linear(), targets.x0(), diffusion.log_sigma())
  x, level = jnp.ones((2, 4, 4, 3)), schedules.vp.level(jnp.zeros(2))
  net = lambda times: lambda x, noise: jnp.concatenate([(i + 1) * x for i in range(times)], -1)
  x0, variance = diffusion.denoiser(net(2), model).both(x, level)
  np.testing.assert_allclose(x0, x)
  np.testing.assert_allclose(variance, 2 * x)
  assert diffusion.denoiser(net(1), model).both(x, level)[1] is None
  with pytest.raises(ValueError, match=r'must return 3 channels, or twice as many .* got 9'):
    diffusion.denoiser(net(3), model)(x, level)
