"""Laws of the averages of parameters."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import ema

RATES = {name: getattr(ema, name)() for name in ema.__all__} | {'no_warmup': ema.constant(warmup=False)}
every_rate = pytest.mark.parametrize('rate', RATES.values(), ids=RATES.keys())


def follow(rate, values, batch_size=64):
  """The average after each of values [T, ...], from an initial one of values[0], in the precision jax runs in."""

  def body(average, at):
    step, value = at
    average = ema.update(average, value, rate(step, batch_size))
    return average, average

  return jax.lax.scan(body, values[0], (jnp.arange(len(values)), values))[1]


@every_rate
def test_average_of_a_constant_is_that_constant(rate):
  average = params = {'w': jnp.full((3,), 2.5)}
  for step in range(5):
    average = ema.update(average, params, rate(jnp.asarray(step), 64))
  np.testing.assert_array_equal(average['w'], params['w'])


@every_rate
def test_decays_lie_between_0_and_1(rate):
  decays = np.array([rate(jnp.asarray(step), 64) for step in (0, 1, 10, 10 ** 4, 10 ** 8)])
  assert np.all(decays >= 0) and np.all(decays <= 1) and np.all(np.diff(decays) >= 0)


def test_constant_decay_is_a_geometric_sum():
  average = {'w': jnp.zeros(())}
  for step in range(10):
    average = ema.update(average, {'w': jnp.ones(())}, ema.constant(0.9, warmup=False)(jnp.asarray(step), 64))
  assert float(average['w']) == pytest.approx(1 - 0.9 ** 10, rel=1e-5)


def test_half_life_halves_the_past():
  """After `images` images of zeros, whatever the batch size, half of the initial one is left."""
  for batch_size in (10, 50):
    average, rate = {'w': jnp.ones(())}, ema.half_life(images=1000, rampup=0)
    for step in range(1000 // batch_size):
      average = ema.update(average, {'w': jnp.zeros(())}, rate(jnp.asarray(step), batch_size))
    assert float(average['w']) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize('rate', [ema.constant(0.9999), ema.half_life(), ema.power_function()])
def test_warmup_and_rampup_forget_the_initialisation(rate):
  assert float(rate(jnp.asarray(0), 64)) < 0.11
  assert float(rate(jnp.asarray(10 ** 7), 64)) > 0.999


@pytest.mark.parametrize(('std', 'gamma'), [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_the_published_ones(std, gamma):
  """Karras et al. 2024, section 3.1: sigma_rel 0.05 and 0.10."""
  assert ema.gamma(std) == pytest.approx(gamma, abs=0.005)
  assert ema.sigma_rel(ema.gamma(std)) == pytest.approx(std, rel=1e-10)


@pytest.mark.parametrize('std', [0.03, 0.1, 0.25])
def test_power_function_weighs_the_past_by_its_power(std):
  """Step i of t counts (i^(gamma+1) - (i-1)^(gamma+1)) / t^(gamma+1), of relative width std."""
  t = 400
  with jax.enable_x64(True):
    weights = np.asarray(follow(ema.power_function(std), jnp.eye(t)))[-1]
  edges = (np.arange(t + 1) / t) ** (ema.gamma(std) + 1)
  np.testing.assert_allclose(weights, np.diff(edges), rtol=1e-9, atol=1e-12)
  place = (np.arange(t) + 0.5) / t
  assert np.sqrt(weights @ place ** 2 - (weights @ place) ** 2) == pytest.approx(std, rel=2e-3)


def test_inner_products_are_integrals():
  """Against the midpoint rule on the weights themselves."""
  times, stds = [1.0, 2.0, 3.5], [0.05, 0.1, 0.2]
  tau = (np.arange(200_000) + 0.5) * 3.5 / 200_000
  weights = [(ema.gamma(s) + 1) * tau ** ema.gamma(s) / t ** (ema.gamma(s) + 1) * (tau < t)
             for t, s in zip(times, stds, strict=True)]
  wanted = np.array([[np.sum(a * b) * 3.5 / 200_000 for a in weights] for b in weights])
  np.testing.assert_allclose(ema.inner_products(times, stds, times, stds), wanted, rtol=1e-4)
  far = ema.inner_products([1e9], [0.01], [1.0], [0.01])  # no overflow from high powers of many images
  assert np.isfinite(far).all() and far[0, 0] >= 0


@pytest.fixture(scope='module')
def walk():
  """A random walk [4000, 16], its step from 1 counting 32 images, and its averages of width 0.05 and 0.1."""
  steps = np.cumsum(np.random.default_rng(0).normal(size=(4000, 16)), 0)
  with jax.enable_x64(True):
    tracked = {std: np.asarray(follow(ema.power_function(std), jnp.asarray(steps))) for std in (0.05, 0.1)}
  return steps, tracked


def mixed(walk, at, std, every=80):
  """The average of width std after `at` steps from snapshots taken every so many; and the error of its weights."""
  kept = [(step, s) for s in walk[1] for step in range(every, at + 1, every)]
  shares, error = ema.reconstruction([32 * step for step, _ in kept], [s for _, s in kept], 32 * at, std)
  assert every > 80 or shares.sum() == pytest.approx(1, abs=1e-3)  # parameters that stand still stay what they are
  return shares @ np.stack([walk[1][s][step - 1] for step, s in kept]), error


@pytest.mark.parametrize('at', [4000, 2400])
@pytest.mark.parametrize('std', [0.025, 0.05, 0.07, 0.1, 0.15, 0.2])
def test_a_reconstructed_average_is_the_tracked_one(walk, std, at):
  with jax.enable_x64(True):
    wanted = np.asarray(follow(ema.power_function(std), jnp.asarray(walk[0][:at])))[-1]
  got, error = mixed(walk, at, std)
  assert np.linalg.norm(got - wanted) < 1e-3 * np.linalg.norm(wanted)
  if std in walk[1]:
    np.testing.assert_allclose(got, wanted, rtol=1e-9)
    assert error < 1e-6


def test_more_snapshots_reconstruct_better(walk):
  errors = [mixed(walk, 4000, 0.15, every)[1] for every in (800, 400, 200, 100)]
  assert np.all(np.diff(errors) < 0) and errors[-1] < errors[0] / 4


@pytest.mark.parametrize(('make', 'message'), [
    (lambda: ema.constant(1.0), 'got 1.0'), (lambda: ema.half_life(0), 'got 0'),
    (lambda: ema.half_life(1, -1), 'got -1'),
    (lambda: ema.power_function(0.0), r'std must lie in \(0, 0.2887\), got 0.0'),
    (lambda: ema.power_function(0.3), r'std must lie in \(0, 0.2887\), got 0.3'),
    (lambda: ema.reconstruction([1.0], [0.1], 1.0, 0.1), 'at least 2 snapshots, got 1'),
    (lambda: ema.reconstruction([1.0, 2.0], [0.1, 0.1], 2.0, 0.5), 'got 0.5')])
def test_bad_arguments_are_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
