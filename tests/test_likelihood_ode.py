"""The density of the probability-flow ODE, dequantisation, and every estimator against the entropy of discrete data."""
import functools
import math

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_likelihood import VARIANCE, bytes_of, deviation, every_path, gaussian, grid_of, keys_of

from diffusion_jax.core import levels, likelihood, schedules

# The ODE.

def normal_log_prob(x0, grid):
  """What the ODE gives without any error of integration: it scales x by the ratio of the standard deviations."""
  scale = lambda i: np.float64(grid.alpha[i]) ** 2 * VARIANCE + np.float64(grid.sigma[i]) ** 2
  grown = scale(0) / scale(-1)
  x = np.asarray(x0, np.float64) * np.float64(grid.alpha[-1]) * np.sqrt(grown)
  unit = np.float64(grid.alpha[0]) ** 2 + np.float64(grid.sigma[0]) ** 2
  return stats.norm.logpdf(x, scale=np.sqrt(unit)).sum(1) + x0.shape[1] * (
      0.5 * np.log(grown) + np.log(np.float64(grid.alpha[-1])))


@every_path
@pytest.mark.parametrize(('method', 'order'), [('heun', 2), ('rk4', 4)])
def test_ode_reaches_the_exact_density_at_its_order(path, method, order):
  x0 = np.array([[0.3, -1.2, 0.05], [2.0, 0.0, -0.4]])
  with jax.enable_x64(True):
    errors = []
    for num_levels in (41, 81):
      grid = grid_of(num_levels, (-6.0, 6.0), path)
      found = likelihood.ode(gaussian, grid, jnp.asarray(x0), keys_of(2), method, trace='exact')
      errors.append(np.abs(found.log_prob - normal_log_prob(x0, grid)).max())
  assert errors[1] < 0.1 and abs(math.log2(errors[0] / errors[1]) - order) < 0.35, errors


@pytest.mark.parametrize('name', ['linear', 'zero_terminal_snr', 'rectified_flow', 'karras'])
def test_ode_of_a_mixture(name):
  """A denoiser that is not linear, along real schedules, from alpha = 0 too: the density of the mixture itself."""
  process = getattr(schedules, name)()
  grid = levels.timesteps()(process, 1000) if name == 'zero_terminal_snr' else levels.karras()(process, 60)
  x0 = jnp.asarray([[-0.8, 0.5], [0.0, 1.1], [-0.3, -1.0]])
  found = likelihood.ode(exact.denoise, grid, x0, keys_of(3), 'rk4')
  blur = float(jnp.exp(-grid.logsnr[-1]))
  density = sum(w * stats.norm.pdf(x0, m, np.sqrt(s ** 2 + blur))
                for w, m, s in zip(exact.WEIGHTS, exact.MEANS, exact.STDS, strict=True))
  np.testing.assert_allclose(found.log_prob, np.log(density).sum(1), atol=0.02)


COVARIANCE = np.array([[0.3, 0.2, 0.0], [0.2, 0.4, -0.1], [0.0, -0.1, 0.2]])


def correlated(x, level):
  total = level.alpha ** 2 * COVARIANCE + level.sigma ** 2 * np.eye(3)
  return x @ jnp.linalg.solve(total, level.alpha * COVARIANCE)


@pytest.mark.parametrize(('probe', 'probes'), [('rademacher', 1), ('normal', 1), ('normal', 3)])
def test_hutchinsons_mean_is_the_exact_trace(probe, probes):
  x0 = jnp.broadcast_to(jnp.asarray([0.4, -0.5, 0.1]), (1000, 3))
  grid = grid_of(60)
  exactly = likelihood.ode(correlated, grid, x0[:1], keys_of(1), 'rk4', 'exact').log_prob
  blurred = COVARIANCE + np.exp(-8) * np.eye(3)
  assert float(exactly[0]) == pytest.approx(stats.multivariate_normal.logpdf(x0[0], cov=blurred), abs=2e-3)
  run = jax.jit(functools.partial(likelihood.ode, correlated, method='rk4', probes=probes, probe=probe))
  found = run(grid, x0, keys_of(1000)).log_prob
  assert abs(deviation(found, float(exactly[0]))) < 4.5 and found.std() > 0.1
  np.testing.assert_allclose(run(grid, x0[:7], keys_of(1000)[3:10]).log_prob, found[3:10], rtol=1e-4)


# Data on 256 values.

DEQUANTISERS = {'uniform': likelihood.uniform(), 'logit_normal': likelihood.logit_normal(lambda x0: (0.2 * x0, 1.5))}


@pytest.mark.parametrize('name', DEQUANTISERS)
def test_a_dequantiser_samples_its_density(name):
  q = DEQUANTISERS[name]
  x0 = jnp.full((1, 4000), 0.7)
  u = np.asarray(q.sample(keys_of(1), x0))[0]
  grid = (np.arange(20_000) + 0.5) / 20_000
  density = np.exp(np.asarray(q.log_prob(jnp.asarray(grid, jnp.float32)[None], jnp.full((1, 20_000), 0.7)))[0])
  assert density.mean() == pytest.approx(1, abs=1e-3)
  assert stats.kstest(u, lambda v: np.interp(v, grid, np.cumsum(density) / 20_000)).pvalue > 1e-4
  assert u.min() > 0 and u.max() < 1


def test_uniform_dequantisation_of_narrow_data():
  """Data as narrow as the bins: the bound is the mean over each bin of -log2 p, plus log2 of 1 / its width, 128."""
  std = 0.006
  byte = np.array([[127.0, 128.0], [126.0, 129.0]]).repeat(1000, 0)
  grid = grid_of(60, (-4.0, 14.0))
  run = jax.jit(lambda x0: likelihood.ode_bits(lambda x, level: gaussian(x, level, std ** 2), grid, x0, keys_of(2000),
                                               method='rk4'))
  found = np.asarray(run(jnp.asarray(byte / 127.5 - 1, jnp.float32))).reshape(2, 1000)
  u = (np.arange(500) + 0.5) / 500
  blurred = math.sqrt(std ** 2 + math.exp(-14))
  for bits, b in zip(found, byte[::1000], strict=True):
    x = (b[:, None] + u) / 128 - 1
    bound = -stats.norm.logpdf(x, scale=blurred).mean() / math.log(2) + 7
    mass = np.diff(stats.norm.cdf(np.stack([b, b + 1]) / 128 - 1, scale=blurred), axis=0)
    assert abs(deviation(bits, bound)) < 4.5 or abs(bits.mean() - bound) < 2e-3
    assert bound > -np.log2(mass).mean() + 0.01


@pytest.mark.parametrize('name', DEQUANTISERS)
def test_every_estimator_is_above_the_true_bits(name):
  """Bounds of -log2 P, whose mean is the entropy of the discrete data; all of them near it for the exact denoiser."""
  x0, nll = bytes_of(2000, 8, 0.05)  # narrow enough that no value is cut at 0 or 255
  denoise = functools.partial(gaussian, variance=0.05)
  grid, keys = grid_of(60, (-8.0, 10.0)), keys_of(2000)
  chain = levels.timesteps()(schedules.linear(), 1000)
  process = schedules.cosine_continuous(-8, 10)
  bits = {
      'ode': lambda x0: likelihood.ode_bits(denoise, grid, x0, keys, DEQUANTISERS[name], method='rk4'),
      'discrete': lambda x0: likelihood.discrete_vlb(denoise, chain, x0, keys).bits,
      'continuous': lambda x0: likelihood.continuous_vlb(denoise, process, x0, jax.random.key(0), times=16).bits}
  for estimator, run in bits.items():
    above = np.asarray(jax.jit(run)(x0)) - nll
    assert deviation(above) > -4.5, estimator
    assert above.mean() < (1 if estimator == 'discrete' else 0.1), estimator  # this chain's first steps are long


# What cannot be computed.

X0 = jnp.zeros((2, 3)) + 0.5 / 127.5
GRID = grid_of(4)


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: likelihood.ode(gaussian, GRID, X0.astype(int), keys_of(2)), 'floating point'),
    (lambda: likelihood.ode(gaussian, GRID, jnp.zeros((2, 32, 32, 3)), keys_of(2), trace='exact'), 'example has 3072'),
    (lambda: likelihood.ode(gaussian, GRID, X0, keys_of(2), trace='some'), "trace must be .* got 'some'"),
    (lambda: likelihood.ode(gaussian, GRID, X0, keys_of(2), 'euler'), "method must be .* got 'euler'"),
    (lambda: likelihood.ode(gaussian, GRID, X0, keys_of(2), probe='x'), "probe must be .* got 'x'"),
    (lambda: likelihood.ode(gaussian, GRID, X0, keys_of(2), probes=0), 'probes must be at least 1, got 0'),
    (lambda: likelihood.ode(gaussian, grid_of(1), X0, keys_of(2)), 'at least 2 levels, got 1'),
    (lambda: likelihood.ode_bits(gaussian, GRID, X0 * 300, keys_of(2)), 'must lie in')])
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
