"""Laws of one step of the reverse chain: Bayes' rule, the bounds of its variance, the decoder."""
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import chain, schedules


def test_the_posterior_is_bayes_rule():
  """q(x_s | x_t, x0) from the joint normal of x_s and x_t given x0, on every path."""
  with jax.enable_x64(True):
    for path in schedules.PATHS:
      cur, nxt = (path.level(jnp.asarray(l, jnp.float64)) for l in (-1.5, 0.7))
      k0, k, variance = chain.posterior(cur, nxt)
      # x_t = a x_s + noise of variance q; the covariance of the two given x0 is a sigma_s^2.
      a = cur.alpha / nxt.alpha
      gain = a * nxt.sigma ** 2 / cur.sigma ** 2
      np.testing.assert_allclose(k, gain, rtol=1e-12)
      np.testing.assert_allclose(k0, nxt.alpha - gain * cur.alpha, rtol=1e-12)
      np.testing.assert_allclose(variance, nxt.sigma ** 2 * (1 - gain * a), rtol=1e-12)
      small, large = chain.log_bounds(cur, nxt)
      np.testing.assert_allclose(np.exp(small), variance, rtol=1e-12)
      np.testing.assert_allclose(np.exp(large), cur.sigma ** 2 - a ** 2 * nxt.sigma ** 2, rtol=1e-12)


def test_the_level_before_a_step_is_the_chains():
  process = replace(schedules.linear(20), path=schedules.flow)
  level = process.level(jnp.arange(20) / 19)
  before = chain.previous(process, level)
  np.testing.assert_allclose(before.logsnr[1:], level.logsnr[:-1], rtol=1e-5)
  assert (before.logsnr[0], before.alpha[0], before.sigma[0]) == (np.inf, 1, 0)


@pytest.mark.parametrize('kind', chain.VARIANCES)
def test_an_exact_step_costs_nothing_and_the_first_step_is_finite(kind):
  """KL = 0 for the right x0 with the posterior's variance; the first step is a decoder of 256 values."""
  process, x0 = schedules.jsd(8), jnp.full((8, 2, 1), 0.2)

  @jax.jit
  def step_bits():
    level = process.level(jnp.arange(8) / 7)
    small, _ = chain.log_bounds(level, chain.previous(process, level))
    output = jnp.where(jnp.isinf(small), -9.0, small) if kind == 'diagonal' else jnp.full(8, -1.0)
    return chain.step_bits(x0, 0 * x0, output[:, None, None] + 0 * x0, level, process, kind=kind)

  bits = step_bits()
  assert np.isfinite(bits).all() and (bits[0] > 0).all()
  np.testing.assert_allclose(bits[1:], 0, atol=1e-5)


@pytest.mark.parametrize(('mean', 'log_variance'), [(0.1, -4.0), (-1.3, -2.0), (0.9, -12.0), (0.0, 3.0)])
def test_the_decoders_probabilities_sum_to_one(mean, log_variance):
  values = jnp.linspace(-1, 1, 256)
  nll, slope = jax.jit(jax.vmap(jax.value_and_grad(chain.decoder_nll, 1), (0, None, None)))(values, mean, log_variance)
  assert float(jnp.exp(-nll).sum()) == pytest.approx(1, abs=1e-4)
  near = int(np.argmin(np.abs(np.asarray(values) - mean)))
  assert nll.argmin() == near or log_variance > 0  # a wide one has most of its mass beyond the ends
  assert np.isfinite(slope).all()
