"""Laws of every schedule on every path: inverse, marginals, chain, SDE, zero terminal SNR."""
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import schedules

PROCESSES = {name: getattr(schedules, name)() for name in schedules.__all__}
PARAMS = {name: process.init(jax.random.key(0)) for name, process in PROCESSES.items()}
TO_ZERO = {'jsd', 'zero_terminal_snr'}  # alpha = 0 at t = 1
T = np.linspace(0, 1, 1000)
INSIDE = jnp.asarray(np.r_[1e-6, T[1:-1], 1 - 1e-6], jnp.float32)
every_process = pytest.mark.parametrize('name', PROCESSES)
every_path = pytest.mark.parametrize('path', schedules.PATHS, ids=lambda path: path.name)


@every_process
def test_logsnr_falls_strictly_and_is_finite_at_both_ends(name):
  process, params = PROCESSES[name], PARAMS[name]
  single = process.logsnr(jnp.asarray(T, jnp.float32), params)
  for logsnr in (schedules.evaluate(process, T, params), np.asarray(single)):
    assert np.all(logsnr[1:] < logsnr[:-1])
    assert np.all(np.isfinite(logsnr[:-1]))
    assert logsnr[-1] == -np.inf if name in TO_ZERO else np.isfinite(logsnr[-1])


@every_process
def test_time_inverts_logsnr(name):
  process, params = PROCESSES[name], PARAMS[name]
  t = jnp.asarray(T, jnp.float32)
  with jax.enable_x64(True):
    exact = process.time(process.logsnr(jnp.asarray(T), params), params)
    np.testing.assert_allclose(exact, T, atol=1e-9 if not process.num_steps else 2e-6)
  np.testing.assert_allclose(process.time(process.logsnr(t, params), params), T, atol=2e-5)


@every_path
@every_process
def test_scales_give_back_logsnr_on_every_path(name, path):
  process, params = PROCESSES[name], PARAMS[name]
  if name in TO_ZERO and path is schedules.ve:
    with pytest.raises(ValueError, match='zero terminal SNR cannot be walked along the ve path'):
      schedules.on_path(process, path.name)
    return
  with jax.enable_x64(True):
    level = schedules.on_path(process, path.name).level(jnp.asarray(T), params)
    assert np.all(np.isfinite(level.alpha)) and np.all(np.isfinite(level.sigma))
    with np.errstate(divide='ignore'):
      np.testing.assert_allclose(2 * np.log(level.alpha / level.sigma), level.logsnr, rtol=1e-9, atol=1e-9)


@every_process
def test_transforms_and_gradients(name):
  """In float32 under jit, vmap and grad: nothing is infinite within (0, 1), nor alpha and sigma at its ends."""
  process, params = PROCESSES[name], PARAMS[name]
  f, g2 = schedules.sde(process)

  def slopes(t):
    logsnr, dl = jax.value_and_grad(lambda t: process.logsnr(t, params))(t)
    dt = jax.grad(lambda l: process.time(l, params))(logsnr)
    return logsnr, dl, dt, f(t, params), g2(t, params), *process.level(t, params)

  values = jax.jit(jax.vmap(slopes))(INSIDE)
  assert all(np.all(np.isfinite(v)) for v in values)
  logsnr, dl, dt, f, g2, *_ = values
  np.testing.assert_allclose(logsnr[1:-1], process.logsnr(INSIDE, params)[1:-1], rtol=1e-5, atol=5e-4)
  assert np.all(dl < 0)
  assert np.all(f <= 0)
  assert np.all(g2 > 0)
  np.testing.assert_allclose((dl * dt)[1:-1], 1, rtol=0.05)  # the inverse's slope is the inverse slope
  for level in (process.level(jnp.float32(t), params) for t in (0, 1)):
    assert np.isfinite(level.alpha) and np.isfinite(level.sigma)


@every_process
def test_betas_rebuild_alphas_cumprod(name):
  process, params = PROCESSES[name], PARAMS[name]
  betas = schedules.betas(process, 100, params)
  assert np.all((betas > 0) & (betas < 1) | (betas == 1))
  np.testing.assert_allclose(np.cumprod(1 - betas), schedules.alphas_cumprod(process, 100, params), rtol=1e-9)


@every_process
def test_chain_of_steps_equals_the_closed_form(name):
  """x_t = sqrt(1 - beta) x_{t-1} + sqrt(beta) eps, a thousand times (Ho et al. 2020, eq. 2), has eq. 4's moments."""
  process, params = PROCESSES[name], PARAMS[name]
  mean, variance, moments = 1.0, 0.0, []
  for beta in schedules.betas(process, 1000, params):
    mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
    moments.append((mean ** 2, variance))
  expected = schedules.alphas_cumprod(process, 1000, params)
  np.testing.assert_allclose(np.transpose(moments), [expected, 1 - expected], rtol=0, atol=1e-12)


@every_process
def test_sde_has_the_marginals_of_the_process(name):
  """d log(alpha) / dt = f and d sigma^2 / dt = 2 f sigma^2 + g^2 (the moments of a linear SDE), on every path."""
  params = PARAMS[name]
  with jax.enable_x64(True):
    t, h = jnp.asarray([1e-3, 0.1234, 0.5003, 0.77, 0.9985]), 1e-6
    for path in schedules.PATHS:
      if path is schedules.ve and name in TO_ZERO:
        continue
      process = schedules.on_path(PROCESSES[name], path.name)
      f, g2 = (fn(t, params) for fn in schedules.sde(process))
      before, at, after = (process.level(t + d, params) for d in (-h, 0, h))
      np.testing.assert_allclose(f, np.log(after.alpha / before.alpha) / (2 * h), rtol=1e-4, atol=1e-9)
      change = (after.sigma ** 2 - before.sigma ** 2) / (2 * h)
      np.testing.assert_allclose((2 * f * at.sigma ** 2 + g2 - change) / g2, 0, atol=1e-4)


def test_path_identities():
  logsnr = jnp.r_[-jnp.inf, jnp.linspace(-15, 15, 101)]
  alpha, sigma = schedules.vp.scales(logsnr)
  np.testing.assert_allclose(alpha ** 2 + sigma ** 2, 1, rtol=1e-6)
  alpha, sigma = schedules.flow.scales(logsnr)
  np.testing.assert_allclose(alpha + sigma, 1, rtol=1e-6)
  alpha, sigma = schedules.ve.scales(logsnr)
  np.testing.assert_array_equal(alpha, 1)
  alpha, sigma = schedules.subvp.scales(logsnr)
  np.testing.assert_allclose(alpha ** 2 + sigma, 1, rtol=1e-6)


@every_path
def test_on_path_keeps_the_schedule(path):
  process = schedules.on_path(schedules.cosine(), path.name)
  assert process.path is path
  np.testing.assert_array_equal(process.logsnr(T, None), schedules.cosine().logsnr(T, None))


@every_process
def test_zero_terminal_snr_of_any(name):
  """Lin et al. 2024, algorithm 1: sqrt(alpha_bar) minus its last value, scaled to keep its first."""
  params = PARAMS[name]
  if PROCESSES[name].path is schedules.ve:
    with pytest.raises(ValueError, match='on the ve path cannot have zero terminal SNR'):
      schedules.zero_terminal_snr(PROCESSES[name])
    return
  process = schedules.zero_terminal_snr(PROCESSES[name])
  assert process.path is PROCESSES[name].path
  n = process.num_steps or 1000
  before, after = (np.sqrt(schedules.alphas_cumprod(p, n, params)) for p in (PROCESSES[name], process))
  expected = (before - before[-1]) * before[0] / (before[0] - before[-1])
  np.testing.assert_allclose(after, expected, rtol=1e-9, atol=1e-12)
  assert after[-1] == 0 and schedules.terminal_snr(process, params) == 0
  with jax.enable_x64(True):
    again = process.time(process.logsnr(jnp.asarray(T), params), params)
    np.testing.assert_allclose(again, T, atol=1e-9 if not process.num_steps else 2e-6)
  logsnr, slope = jax.jit(jax.vmap(jax.value_and_grad(lambda t: process.logsnr(t, params))))(INSIDE)
  assert np.all(np.isfinite(logsnr)) and np.all(np.isfinite(slope)) and np.all(slope < 0)
  end = process.level(jnp.float32(1), params)
  assert (float(end.logsnr), float(end.alpha), float(end.sigma)) == (-np.inf, 0, 1)


def test_song_sdes_have_their_closed_forms():
  """beta(t) = 0.1 + 19.9 t; VP: f = -beta / 2, g^2 = beta; sub-VP: g^2 = beta (1 - exp(-2 B)); VE: d sigma^2 / dt."""
  t = np.linspace(0.01, 0.99, 50)
  beta, B = 0.1 + 19.9 * t, 0.1 * t + 19.9 * t ** 2 / 2
  for process, g2, sigma in ((schedules.vp_sde(t_min=1e-12), beta, np.sqrt(-np.expm1(-B))),
                             (schedules.subvp_sde(t_min=1e-12), beta * -np.expm1(-2 * B), -np.expm1(-B))):
    sde = schedules.sde(process)
    with jax.enable_x64(True):
      np.testing.assert_allclose(sde.f(t), -beta / 2, rtol=1e-6)
      np.testing.assert_allclose(sde.g2(t), g2, rtol=1e-6)
      np.testing.assert_allclose(process.level(jnp.asarray(t)).sigma, sigma, rtol=1e-6)
  with jax.enable_x64(True):
    sde = schedules.sde(schedules.geometric())
    np.testing.assert_allclose(sde.g2(t), 2 * np.log(5000) * 0.01 ** 2 * 5000 ** (2 * t), rtol=1e-9)


def test_integrated_sde_reaches_the_chain():
  """The moments integrated by Runge-Kutta through each cell of a chain are those of its steps."""
  process, cells, steps = schedules.linear(6, 0.05, 0.4), 5, 20
  sde, expected = schedules.sde(process), np.cumprod(1 - np.linspace(0.05, 0.4, 6))
  with jax.enable_x64(True):
    rate = jax.jit(lambda t, y: jnp.stack([sde.f(t), 2 * sde.f(t) * y[1] + sde.g2(t)]))
    y, h = jnp.asarray([0.5 * np.log(0.95), 0.05]), 1 / (cells * steps)
    for i in range(cells * steps):
      cell = i // steps
      at = lambda t, cell=cell: jnp.clip(t, (cell + 1e-9) / cells, (cell + 1 - 1e-9) / cells)  # one side of each kink
      a = rate(at(i * h), y)
      b = rate(at((i + 0.5) * h), y + h / 2 * a)
      c = rate(at((i + 0.5) * h), y + h / 2 * b)
      y = y + h / 6 * (a + 2 * b + 2 * c + rate(at((i + 1) * h), y + h * c))
      if (i + 1) % steps == 0:
        np.testing.assert_allclose([np.exp(2 * y[0]), y[1]], [expected[cell + 1], 1 - expected[cell + 1]], rtol=1e-6)


def test_a_terminal_snr_above_zero_is_warned_of():
  with pytest.warns(UserWarning, match=r'terminal SNR is 0\.0047, above 0\.001'):
    assert schedules.check_terminal(schedules.scaled_linear()) == pytest.approx(0.0046819, rel=1e-4)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    assert schedules.check_terminal(schedules.linear()) == pytest.approx(4.036e-5, rel=1e-3)
    assert schedules.check_terminal(schedules.zero_terminal_snr('scaled_linear')) == 0
