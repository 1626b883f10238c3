"""Laws of the averages of parameters."""
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import ema


@pytest.mark.parametrize('rate', [ema.constant(), ema.constant(warmup=False), ema.half_life()], ids=['a', 'b', 'c'])
def test_average_of_a_constant_is_that_constant(rate):
  average = params = {'w': jnp.full((3,), 2.5)}
  for step in range(5):
    average = ema.update(average, params, rate(jnp.asarray(step), 64))
  np.testing.assert_array_equal(average['w'], params['w'])


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


def test_warmup_and_rampup_forget_the_initialisation():
  for rate in (ema.constant(0.9999), ema.half_life()):
    assert float(rate(jnp.asarray(0), 64)) < 0.11
    assert float(rate(jnp.asarray(10 ** 7), 64)) > 0.999


@pytest.mark.parametrize('make', [lambda: ema.constant(1.0), lambda: ema.half_life(0), lambda: ema.half_life(1, -1)])
def test_bad_arguments_are_named(make):
  with pytest.raises(ValueError, match='got'):
    make()
