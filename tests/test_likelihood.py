"""Bits per dimension: each estimator against the closed forms of Gaussian data, whose exact denoiser is known."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax.core import levels, likelihood, schedules
from diffusion_jax.core.chain import decoder_nll
from diffusion_jax.core.schedules import PATHS, vp
from diffusion_jax.core.types import Denoiser, expand

VARIANCE = 0.25  # of the data
every_path = pytest.mark.parametrize('path', PATHS, ids=lambda path: path.name)


def gaussian(x, level, variance=VARIANCE):
  """E[x0 | x] for independent normal elements."""
  gain = level.alpha * variance / (level.alpha ** 2 * variance + level.sigma ** 2)
  return expand(gain, x) * x


def grid_of(num_levels, ends=(-8.0, 8.0), path=vp):
  return path.level(jnp.linspace(*ends, num_levels))


def keys_of(batch, seed=0):
  return jax.random.split(jax.random.key(seed), batch)


def bytes_of(batch, size, variance=VARIANCE):
  """Normal data rounded to the 256 values [batch, size], and each example's true -log2 P per dimension [batch]."""
  x = np.random.default_rng(1).normal(scale=variance ** 0.5, size=(batch, size))
  byte = np.clip(np.round(x * 127.5 + 127.5), 0, 255)
  edges = (np.arange(257) - 0.5) / 127.5 - 1
  edges[0], edges[-1] = -np.inf, np.inf
  nll = -np.log2(np.diff(stats.norm.cdf(edges / variance ** 0.5)))
  return jnp.asarray(byte / 127.5 - 1, jnp.float32), nll[byte.astype(int)].mean(1)


def deviation(samples, expected=0.0):
  """How many standard errors the mean of the samples is above its expectation."""
  d = np.asarray(samples, np.float64) - expected
  return d.mean() / (d.std(ddof=1) / math.sqrt(len(d)) + 1e-7)


# The prior.

def test_prior_of_ddpm_is_the_published_number():
  bits = likelihood.prior_bits(schedules.linear().level(jnp.float32(1)), 0.27)
  assert float(bits) == pytest.approx(7.9e-6, rel=0.01)


@every_path
def test_prior_is_the_kl_of_two_normals(path):
  logsnr = np.array([-12.0, -4.0, 0.0, 3.0])
  signal = 1 / (1 + np.exp(-logsnr))
  expected = 0.5 * (signal * 0.3 + 1 - signal - 1 - np.log1p(-signal)) / np.log(2)
  np.testing.assert_allclose(likelihood.prior_bits(path.level(jnp.asarray(logsnr)), 0.3), expected, rtol=2e-6)


def test_prior_costs_nothing_without_signal():
  assert float(likelihood.prior_bits(vp.level(jnp.float32(-jnp.inf)), 0.3)) == 0


# The discrete bound.

def with_output(value):
  return Denoiser(lambda x, level: (gaussian(x, level), jnp.full_like(x, value)))


def quadrature(of):
  """E[of(eps)] for a standard normal eps; of takes [K] on its last axis."""
  eps = np.linspace(-7, 7, 201)
  return of(eps) @ (stats.norm.pdf(eps) / stats.norm.pdf(eps).sum())


@pytest.mark.parametrize(('variance', 'output'), [(0.0, None), (1.0, None), (0.4, None), ('range', 0.3),
                                                  ('diagonal', -2.5)])
def test_every_term_of_the_discrete_bound(variance, output):
  """Of a chain of 12 steps: DDPM's equations 5 to 7 and 13, written with its alpha_bar."""
  grid = grid_of(12)
  x0, _ = bytes_of(400, 8)
  denoise = gaussian if output is None else with_output(output)
  vlb = jax.jit(lambda x0: likelihood.discrete_vlb(denoise, grid, x0, keys_of(400), variance))(x0)

  bar = 1 / (1 + np.exp(-np.asarray(grid.logsnr, np.float64)))
  gain = np.sqrt(bar) * VARIANCE / (bar * VARIANCE + 1 - bar)  # x0 estimate = gain x
  squares = np.asarray(x0, np.float64) ** 2
  for i in range(12):
    error = (1 - gain[i] * np.sqrt(bar[i])) ** 2 * squares + gain[i] ** 2 * (1 - bar[i])
    assert abs(deviation(vlb.mse[i], error.mean(1))) < 4.5, i
    if i == 11:
      break
    beta = 1 - bar[i] / bar[i + 1]
    q, least = (beta * (1 - bar[i + 1]) / (1 - bar[i]),) * 2
    share = {'range': 0.65, 'diagonal': 0}.get(variance, variance)
    p = math.exp(output) if variance == 'diagonal' else least ** (1 - share) * beta ** share
    k0 = np.sqrt(bar[i + 1]) * beta / (1 - bar[i])
    kl = 0.5 * (np.log(p / q) + (q + k0 ** 2 * error) / p - 1)
    assert abs(deviation(vlb.steps[i], kl.mean(1) / math.log(2))) < 4.5, i

  least = (1 - bar[-2] / bar[-1]) * (1 - bar[-1]) / (1 - bar[-2])  # the step before's: this one's would be zero
  p = {'range': least ** 0.35 * (1 - bar[-1]) ** 0.65, 'diagonal': math.exp(-2.5)}.get(variance, least)

  def decoder(eps):
    x = np.asarray(x0, np.float64)[..., None]
    mean = gain[-1] * (np.sqrt(bar[-1]) * x + np.sqrt(1 - bar[-1]) * eps)
    low, high = ((x - mean + side / 255) / np.sqrt(p) for side in (-1, 1))
    low, high = np.where(x < -0.999, -np.inf, low), np.where(x > 0.999, np.inf, high)
    flip = low > 0  # the upper tail's probabilities are too near 1 to subtract
    return -np.log2(stats.norm.cdf(np.where(flip, -low, high)) - stats.norm.cdf(np.where(flip, -high, low)))

  assert abs(deviation(vlb.steps[-1], quadrature(decoder).mean(1))) < 4.5
  np.testing.assert_allclose(vlb.bits, vlb.prior + vlb.steps.sum(0), rtol=1e-5)
  np.testing.assert_allclose(vlb.prior, likelihood.prior_bits(jax.tree.map(lambda a: a[0], grid), squares.mean(1)),
                             rtol=1e-5)


@every_path
def test_discrete_bound_is_the_same_on_every_path(path):
  x0, _ = bytes_of(16, 8)
  ours, ddpms = (likelihood.discrete_vlb(gaussian, grid_of(12, path=p), x0, keys_of(16)) for p in (path, vp))
  for a, b in zip(ours, ddpms, strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6)


def test_a_subset_of_the_steps_leaves_the_bound_unbiased():
  x0 = jnp.broadcast_to(bytes_of(1, 8)[0], (1500, 8))
  bits = lambda subset: jax.jit(lambda x0: likelihood.discrete_vlb(
      gaussian, grid_of(12), x0, keys_of(1500), subset=subset))(x0)
  full, some, all_of_them = bits(0), bits(4), bits(12)
  assert some.steps.shape == (4, 1500) and set(np.unique(some.index)) == set(range(12))
  assert abs(deviation(some.bits, np.mean(full.bits))) < 4.5
  np.testing.assert_allclose(all_of_them.bits, full.bits, rtol=1e-5)


def test_rate_and_distortion_of_progressive_coding():
  x0, _ = bytes_of(800, 8)
  vlb = jax.jit(lambda x0: likelihood.discrete_vlb(gaussian, grid_of(40), x0, keys_of(800)))(x0)
  rate, rmse = likelihood.rate_distortion(vlb)
  assert rate.shape == rmse.shape == (40,) and (np.diff(rate) > 0).all()
  assert float(rate[0]) == pytest.approx(float(vlb.prior.mean()))
  assert float(rate[-1] + vlb.steps[-1].mean()) == pytest.approx(float(vlb.bits.mean()), rel=1e-5)
  expected = 127.5 * np.sqrt(VARIANCE / (1 + VARIANCE * np.exp(np.linspace(-8, 8, 40))))
  np.testing.assert_allclose(rmse, expected, rtol=0.05)


def test_the_decoders_256_probabilities_sum_to_one():
  values = jnp.arange(256) / 127.5 - 1
  mean, std = (a.ravel()[:, None] for a in np.meshgrid([-1.4, -1.0, -0.3, 0.0, 0.9, 1.2], [1e-3, 0.01, 0.1, 1.0, 5.0]))
  total = jnp.exp(-decoder_nll(values, mean, 2 * np.log(std))).sum(1)
  np.testing.assert_allclose(total, 1, atol=1e-3)  # a float32 bin of a wide normal is known to 1e-5 of 1 / 256


# The continuous bound.

ENDS = (-10.0, 9.0)
BAR = np.r_[1, 1 / (1 + np.exp(-np.linspace(9, -10, 400)))]  # alpha_bar of a chain
SCHEDULES = [schedules.cosine_continuous(*ENDS), schedules.laplace(0, 2, *ENDS), schedules.learned(*ENDS, hidden=8),
             schedules.table(tuple((1 - BAR[1:] / BAR[:-1]).tolist()))]


@pytest.mark.parametrize('i', range(4))
def test_continuous_bound_depends_on_the_ends_alone(i):
  """And every part is the closed form: one value for all schedules and paths (Kingma et al. 2021, section 5.1)."""
  process = schedules.on_path(SCHEDULES[i], PATHS[i].name)
  params = process.init(jax.random.key(1))
  x0 = VARIANCE ** 0.5 * jax.random.normal(jax.random.key(2), (4000, 4))
  vlb = jax.jit(lambda x0, key: likelihood.continuous_vlb(gaussian, process, x0, key, params, 4, 'density'))(
      x0, jax.random.key(3))
  last, first = np.exp(np.array(ENDS))
  diffusion = 0.5 * np.log2((1 + VARIANCE * first) / (1 + VARIANCE * last))
  assert abs(deviation(vlb.diffusion, diffusion)) < 4.5
  assert np.std(vlb.diffusion) / np.sqrt(4000) < 0.04 * diffusion
  np.testing.assert_allclose(vlb.reconstruction, 0.5 * np.log2(2 * np.pi * np.e / first), rtol=1e-4)
  np.testing.assert_allclose(vlb.bits, vlb.prior + vlb.reconstruction + vlb.diffusion, rtol=1e-4, atol=1e-5)
  # The bound is the entropy, but for the ends.
  entropy, prior = 0.5 * np.log2(2 * np.pi * np.e * VARIANCE), np.mean(vlb.prior)
  ends = 0.5 * np.log2(1 + 1 / (VARIANCE * first)) - 0.5 * np.log2(1 + VARIANCE * last) + prior
  assert abs(deviation(vlb.bits, entropy + ends)) < 4.5 and abs(ends) < 1e-3


def test_reconstruction_is_kingmas_decoder():
  """P(x0 | x) of 256 values in proportion to q(x | x0), at a noise of two values."""
  process = schedules.cosine_continuous(-8, 8.3)
  x0 = jnp.asarray([-1.0, -0.5, 3 / 127.5 - 1, 1.0])[:, None] * jnp.ones((1, 3000))
  x0 = jnp.round(x0 * 127.5 + 127.5) / 127.5 - 1
  vlb = likelihood.continuous_vlb(gaussian, process, x0, jax.random.key(0))
  values, std = np.arange(256) / 127.5 - 1, math.exp(-8.3 / 2)

  def bits(eps):
    x = np.asarray(x0[:, :1], np.float64)
    logits = lambda v: -0.5 * ((x + std * eps)[..., None] - v) ** 2 / std ** 2
    log_total = np.log(np.exp(logits(values)).sum(-1))
    return (log_total - logits(x[..., None])[..., 0]) / math.log(2)

  np.testing.assert_allclose(vlb.reconstruction, quadrature(bits), atol=4.5 * 1.1 / math.sqrt(3000))
  assert quadrature(bits).min() > 0.5


def test_times_are_spread_evenly():
  """Equally spaced times integrate SNR' to 1 / n; independent ones would miss it by 1 / sqrt(n)."""
  process = schedules.cosine_continuous(-3, 3)
  vlb = likelihood.continuous_vlb(lambda x, level: 0 * x, process, jnp.ones((512, 1)), jax.random.key(5), times=4)
  expected = 0.5 * (math.exp(3) - math.exp(-3)) / math.log(2)
  assert float(vlb.diffusion.mean()) == pytest.approx(expected, rel=3e-3)


def test_gradient_to_a_learned_schedule():
  """The bound's gradient to an end of the schedule is the closed form's; to all between, zero."""
  process = schedules.learned(-2.0, 2.0, hidden=4)
  params = process.init(jax.random.key(0))

  def bound(params, key):
    x0 = VARIANCE ** 0.5 * jax.random.normal(key, (2000, 4))
    return likelihood.continuous_vlb(gaussian, process, x0, key, params, decoder='density').bits.mean()

  def closed(end):
    first, last = end, end - 4
    prior = 0.5 * (jax.nn.sigmoid(last) * (VARIANCE - 1) + jax.nn.softplus(last))
    gap = jnp.log1p(VARIANCE * jnp.exp(first)) - first - jnp.log1p(VARIANCE * jnp.exp(last))
    return (prior + 0.5 * gap) / math.log(2)

  found = jax.jit(jax.vmap(jax.grad(bound), (None, 0)))(params, keys_of(24))
  expected = float(jax.grad(closed)(2.0))
  assert abs(deviation(found['logsnr_max'], expected)) < 5
  assert found['logsnr_max'].std() / math.sqrt(24) < 0.2 * abs(expected)
  for name in ('height', 'centre', 'steepness'):
    assert all(abs(deviation(g)) < 5 for g in found[name].T), name


# What cannot be computed.

X0 = jnp.zeros((2, 3)) + 0.5 / 127.5
GRID = grid_of(4)


@pytest.mark.parametrize(('call', 'message'), [
    (lambda: likelihood.discrete_vlb(gaussian, GRID, X0 * 0 + 7, keys_of(2)), r'x0 must lie in \[-1, 1\], got 7 .. 7'),
    (lambda: likelihood.discrete_vlb(gaussian, GRID, X0 * 0, keys_of(2)), 'on the 256 values'),
    (lambda: likelihood.discrete_vlb(gaussian, GRID, X0.astype(jnp.uint8), keys_of(2)), 'floating point .* got uint8'),
    (lambda: likelihood.discrete_vlb(gaussian, GRID, X0, keys_of(2), 1.5), r'variance must lie in \[0, 1\] .* got 1.5'),
    (lambda: likelihood.discrete_vlb(gaussian, GRID, X0, keys_of(2), 'wide'), "got 'wide'"),
    (lambda: likelihood.discrete_vlb(gaussian, GRID, X0, keys_of(2), 'range'), 'needs a network that predicts one'),
    (lambda: likelihood.discrete_vlb(gaussian, GRID, X0, keys_of(2), subset=5), 'lie in 2..4, got 5'),
    (lambda: likelihood.discrete_vlb(gaussian, grid_of(1), X0, keys_of(2)), 'at least 2 levels, got 1'),
    (lambda: likelihood.continuous_vlb(gaussian, schedules.linear(), X0 * 300, keys_of(1)[0]), 'must lie in'),
    (lambda: likelihood.continuous_vlb(gaussian, schedules.linear(), X0, keys_of(1)[0], times=0), 'times .* got 0'),
    (lambda: likelihood.continuous_vlb(gaussian, schedules.linear(), X0, keys_of(1)[0], decoder='x'), "got 'x'")])
def test_bad_input_is_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()


# Gradients and types.

@pytest.mark.parametrize('estimator', ['discrete', 'continuous'])
def test_bounds_have_gradients_from_alpha_zero_on(estimator):
  """The gain that minimises each bound is the exact denoiser's; zero terminal SNR and values at the edges included."""
  process = schedules.zero_terminal_snr(schedules.linear(10))
  grid = levels.timesteps()(process, 10)
  x0 = bytes_of(3000, 4, 0.05)[0].at[0].set(1.0).at[1].set(-1.0)

  def bound(scale, key):
    denoise = lambda x, level: scale * gaussian(x, level, 0.05)
    if estimator == 'discrete':
      return likelihood.discrete_vlb(denoise, grid, x0, jax.random.split(key, 3000)).steps[:-1].sum(0).mean()
    return likelihood.continuous_vlb(denoise, process, x0, key).diffusion.mean()

  slopes = jax.jit(lambda scale: jax.vmap(jax.grad(bound), (None, 0))(scale, keys_of(4)))
  below, at, above = (np.asarray(slopes(scale)) for scale in (0.9, 1.0, 1.1))
  assert below.max() < 0 < above.min() and abs(at.mean()) < 0.1 * above.mean()


def test_float32_data_where_jax_is_wide():
  x0, process = bytes_of(3, 4)[0], schedules.linear()

  def every(x0):
    return (likelihood.discrete_vlb(gaussian, grid, x0, keys_of(3)).bits,
            likelihood.ode_bits(gaussian, grid, x0, keys_of(3)),
            likelihood.continuous_vlb(gaussian, process, x0, jax.random.key(0)).bits)

  with jax.enable_x64(True):
    grid = levels.timesteps()(process, 6)
    assert all(np.isfinite(bits).all() for bits in jax.jit(every)(x0))
