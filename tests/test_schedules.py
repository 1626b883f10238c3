"""Laws of every schedule and path, and the published values of DDPM's and of the cosine schedule."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import likelihood, schedules

PROCESSES = {name: getattr(schedules, name)() for name in schedules.__all__}
T = np.linspace(0, 1, 1000)
every_process = pytest.mark.parametrize('process', PROCESSES.values(), ids=PROCESSES.keys())
every_path = pytest.mark.parametrize('path', schedules.PATHS, ids=lambda path: path.name)


@every_process
def test_logsnr_falls_strictly_and_is_finite_at_both_ends(process):
  for logsnr in (schedules.evaluate(process, T), np.asarray(process.logsnr(jnp.asarray(T, jnp.float32), None))):
    assert np.all(np.isfinite(logsnr))
    assert np.all(np.diff(logsnr) < 0)


@every_process
def test_time_inverts_logsnr(process):
  t = jnp.asarray(T, jnp.float32)
  with jax.enable_x64(True):
    exact = process.time(process.logsnr(jnp.asarray(T), None), None)
    np.testing.assert_allclose(exact, T, atol=1e-9 if not process.num_steps else 2e-6)
  np.testing.assert_allclose(process.time(process.logsnr(t, None), None), T, atol=2e-5)


@every_process
def test_scales_give_back_logsnr(process):
  with jax.enable_x64(True):
    level = process.level(jnp.asarray(T))
    np.testing.assert_allclose(2 * np.log(level.alpha / level.sigma), level.logsnr, rtol=1e-9, atol=1e-9)


@every_process
def test_transforms(process):
  t = jnp.asarray([0.25, 0.75])
  np.testing.assert_allclose(jax.jit(process.level)(t), process.level(t), rtol=1e-6)
  np.testing.assert_allclose(jax.vmap(process.level)(t), process.level(t), rtol=1e-6)
  assert np.all(jax.vmap(jax.grad(lambda t: process.logsnr(t, None)))(t) < 0)


def test_path_identities():
  logsnr = jnp.linspace(-15, 15, 101)
  alpha, sigma = schedules.vp.scales(logsnr)
  np.testing.assert_allclose(alpha ** 2 + sigma ** 2, 1, rtol=1e-6)
  alpha, sigma = schedules.flow.scales(logsnr)
  np.testing.assert_allclose(alpha + sigma, 1, rtol=1e-6)
  alpha, sigma = schedules.ve.scales(logsnr)
  np.testing.assert_array_equal(alpha, 1)


@every_path
def test_on_path_keeps_the_schedule(path):
  process = schedules.on_path(schedules.cosine(), path.name)
  assert process.path is path
  np.testing.assert_array_equal(process.logsnr(T, None), schedules.cosine().logsnr(T, None))


@every_process
def test_betas_rebuild_alphas_cumprod(process):
  with np.errstate(under='ignore'):
    np.testing.assert_allclose(np.cumprod(1 - schedules.betas(process, 100)),
                               schedules.alphas_cumprod(process, 100), rtol=1e-9)


def test_linear_equals_ddpm():
  process = schedules.linear()
  np.testing.assert_allclose(schedules.betas(process, 1000), np.linspace(1e-4, 0.02, 1000), rtol=1e-9)
  assert schedules.alphas_cumprod(process, 1000)[-1] == pytest.approx(4.035830e-5, rel=1e-6)
  logsnr = schedules.evaluate(process, np.array([0.0, 1.0]))
  np.testing.assert_allclose(logsnr, [9.2102, -10.1177], atol=5e-5)


def test_linear_prior_loss_is_the_papers():
  bits = likelihood.prior_bits(schedules.linear().level(1.0), 0.27)
  assert float(bits) == pytest.approx(7.9e-6, rel=0.01)


def test_cosine_equals_nichol_and_dhariwal():
  betas = schedules.betas(schedules.cosine(), 1000)
  np.testing.assert_allclose(betas[[0, 500, 999]], [4.128422e-05, 3.155691e-03, 0.999], rtol=2e-7)
  assert np.sum(betas > 0.998999) == 1  # the clip touches one step only


def test_chain_of_steps_equals_the_closed_form():
  """x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) eps, a thousand times (Ho et al. 2020, eq. 2), has eq. 4's moments."""
  for process in (schedules.linear(), schedules.cosine()):
    mean, variance = 1.0, 0.0
    for beta in schedules.betas(process, 1000):
      mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    alpha_bar = schedules.alphas_cumprod(process, 1000)[-1]
    assert mean ** 2 == pytest.approx(alpha_bar, rel=1e-9)
    assert variance == pytest.approx(1 - alpha_bar, abs=1e-12)


def test_cosine_continuous_is_a_cosine():
  process = schedules.cosine_continuous(-30, 30)
  t = np.linspace(0.05, 0.95, 19)
  np.testing.assert_allclose(process.level(t).alpha, np.cos(t * np.pi / 2), atol=1e-5)


def test_rectified_flow_is_a_straight_line():
  process = schedules.rectified_flow()
  np.testing.assert_allclose(process.level(T).sigma, T, atol=2e-4)


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: schedules.linear(num_steps=1), 'num_steps must be at least 2, got 1'),
    (lambda: schedules.linear(beta_start=0.1, beta_end=0.01), '0.1 and 0.01'),
    (lambda: schedules.cosine(max_beta=1.0), r'max_beta must lie in \(0, 1\), got 1.0'),
    (lambda: schedules.cosine_continuous(5, -5), '5 and -5'),
    (lambda: schedules.rectified_flow(margin=0.5), 'got 0.5'),
    (lambda: schedules.on_path(schedules.linear(), 'vpp'), "vp, ve, flow, got 'vpp'"),
])
def test_bad_arguments_are_named(make, words):
  with pytest.raises(ValueError, match=words):
    make()
