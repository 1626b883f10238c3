"""Laws of every target, on every path."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import diffusion, levels, losses, schedules, targets

TARGETS = {name: getattr(targets, name)() for name in targets.__all__}
WEIGHTS = {name: getattr(losses, name)() for name in losses.__all__}
every_target = pytest.mark.parametrize('target', TARGETS.values(), ids=TARGETS.keys())
every_path = pytest.mark.parametrize('path', schedules.PATHS, ids=lambda path: path.name)
LOGSNR = jnp.asarray([-8.0, -2.0, 0.0, 3.0, 8.0])


def example(path, key=0):
  x0, eps = jax.random.normal(jax.random.key(key), (2, len(LOGSNR), 4, 4, 3))
  level = path.level(LOGSNR)
  return x0, eps, level, diffusion.add_noise(x0, eps, level)


@every_path
@every_target
def test_coefficients_invert_the_target(target, path):
  with jax.enable_x64(True):
    x0, eps, level, x = example(path._replace())
    level = path.level(LOGSNR.astype(jnp.float64))
    x0, eps = x0.astype(jnp.float64), eps.astype(jnp.float64)
    x = diffusion.add_noise(x0, eps, level)
    _, c_skip, c_out = target.coeffs(level)
    back = c_skip[:, None, None, None] * x + c_out[:, None, None, None] * target.of(x0, eps, level)
    np.testing.assert_allclose(back, x0, rtol=1e-9, atol=1e-9)


@every_target
def test_prediction_does_not_depend_on_the_path(target):
  """The same F, at the same logsnr, on x of another path: the same x0."""
  net = lambda x, noise: jnp.tanh(x) * jnp.cos(noise)[:, None, None, None]
  results = []
  for path in schedules.PATHS:
    process = schedules.on_path(schedules.linear(), path.name)
    denoise = diffusion.denoiser(net, diffusion.Diffusion(process, target, diffusion.log_sigma()))
    _, _, level, x = example(path)
    results.append(denoise(x, level))
  for other in results[1:]:
    np.testing.assert_allclose(other, results[0], rtol=2e-4, atol=2e-4)


def loss(net, x0, model, weight=WEIGHTS['simple']):
  """The losses of x0 at uniform times, and the levels."""
  level = levels.uniform()(jax.random.key(1), len(x0), model.process, None)
  eps = jax.random.normal(jax.random.key(2), x0.shape)
  return diffusion.loss(net, x0, eps, level, model, weight), level


def oracle_error(target, process, error=0.1):
  """A network whose x0 is wrong by `error` everywhere, whatever it predicts."""
  x0 = jax.random.normal(jax.random.key(1), (64, 4, 4, 3))

  def net(c_x, noise):
    level = process.level(process.time(-2 * noise, None))
    c_in, c_skip, c_out = (c[:, None, None, None] for c in target.coeffs(level))
    return (x0 + error - c_skip * (c_x / c_in)) / c_out

  return net, x0


@pytest.mark.parametrize('weight', WEIGHTS.values(), ids=WEIGHTS.keys())
def test_loss_does_not_depend_on_the_target(weight):
  """One weight, one loss: the error of x0 alone counts."""
  process = schedules.cosine_continuous(-4, 4)
  for target in TARGETS.values():
    net, x0 = oracle_error(target, process)
    model = diffusion.Diffusion(process, target, diffusion.log_sigma(1.0))
    value, level = loss(net, x0, model, weight)
    np.testing.assert_allclose(value, weight(level) * 0.01, rtol=1e-3)


def test_zero_predictor_of_eps_loses_one():
  """E|eps|^2 = 1 per element; the mean of n squares of a normal has standard error sqrt(2 / n)."""
  x0 = jax.random.normal(jax.random.key(0), (512, 8, 8, 3))
  model = diffusion.Diffusion(schedules.linear(), targets.eps(), diffusion.timestep())
  value, _ = loss(lambda x, noise: jnp.zeros_like(x), x0, model)
  assert abs(float(value.mean()) - 1) < 3 * np.sqrt(2 / x0.size)


def test_exact_denoiser_of_a_normal_reaches_the_closed_form():
  """For x0 ~ N(0, s^2), E|x0 - E[x0|x]|^2 = s^2 sigma^2 / (alpha^2 s^2 + sigma^2); L_simple weighs it by SNR."""
  s = 0.5
  process = schedules.cosine_continuous(-6, 6)
  x0 = s * jax.random.normal(jax.random.key(0), (4096, 8, 8, 1))

  def net(x, noise):
    level = process.level(process.time(-2 * noise, None))
    a, b = (c[:, None, None, None] for c in (level.alpha, level.sigma))
    return a * s ** 2 / (a ** 2 * s ** 2 + b ** 2) * x

  model = diffusion.Diffusion(process, targets.x0(), diffusion.log_sigma(1.0))
  value, level = loss(net, x0, model)
  expected = jnp.exp(level.logsnr) * s ** 2 * level.sigma ** 2 / (level.alpha ** 2 * s ** 2 + level.sigma ** 2)
  # Each example's mean of 64 squares has a relative standard error of sqrt(2 / 64).
  ratio = value / expected
  assert abs(float(ratio.mean()) - 1) < 4 * np.sqrt(2 / x0.size)


def test_timestep_is_ddpms_step_index():
  process = schedules.linear()
  grid = levels.timesteps()(process, 1000)
  np.testing.assert_allclose(diffusion.timestep()(process, grid), np.arange(1000)[::-1], rtol=2e-7)
