"""Noise that belongs to the levels: its distribution, its additivity, and what it is for."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import levels, schedules
from diffusion_jax.core.brownian import brownian
from diffusion_jax.core.samplers import ancestral, independent, prior, solve
from diffusion_jax.core.schedules import PATHS, vp

SAMPLES = 4_000
NOISE = brownian()
KEYS = jax.random.split(jax.random.key(1), 8)
# Pairs of neighbouring intervals, from alpha = 0, and from the smallest SNRs to the largest.
LOGSNR = [-jnp.inf, -60.0, -20.0, -9.3, -3.0, -2.9, -0.001, 0.0, 0.5, 7.0, 7.0625, 30.0, 50.0]


def increments(noise, logsnr, shape=(), keys=None):
  """z [len(logsnr) - 1, B, *shape] of the steps from each level to the next."""
  keys = jax.random.split(jax.random.key(0), SAMPLES) if keys is None else keys
  padded = np.r_[logsnr, np.repeat(logsnr[-1], len(LOGSNR) - len(logsnr))]  # one length: compiled once
  return np.asarray(_increments(noise, shape, jnp.asarray(padded), keys)).swapaxes(0, 1)[:len(logsnr) - 1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _increments(noise, shape, logsnr, keys):
  def one(key, i):
    cur, nxt = (vp.level(logsnr[j]) for j in (i, i + 1))
    return noise(key, i, cur, nxt, shape)
  return jax.vmap(lambda key: jax.vmap(lambda i: one(key, i))(jnp.arange(len(LOGSNR) - 1)))(keys)


def correlations(z):
  """The sample covariance [K, K] of z [K, B] about zero, in units of its standard error for independent normals."""
  k, n = z.shape
  return (z @ z.T / n - np.eye(k)) * np.sqrt(n / (1 + np.eye(k)))


@pytest.mark.parametrize('depth', [14, 24])
def test_steps_draw_independent_standard_normals(depth):
  z = increments(brownian(depth), LOGSNR).astype(np.float64)
  assert np.abs(z.mean(1) * np.sqrt(SAMPLES)).max() < 4.5
  assert np.abs(correlations(z)).max() < 4.5
  assert np.abs(((z ** 4).mean(1) - 3) / np.sqrt(96 / SAMPLES)).max() < 5
  assert np.abs(correlations(np.sign(z))[~np.eye(len(z), dtype=bool)]).max() < 4.5


def test_elements_of_a_sample_and_its_draws_are_independent():
  z = increments(NOISE, [-1.0, 0.0], shape=(2, 3)).reshape(SAMPLES, 6).T
  assert np.abs(correlations(z)).max() < 4.5


def test_a_step_is_the_sum_of_its_parts():
  """sqrt(u2 - u0) z02 = sqrt(u1 - u0) z01 + sqrt(u2 - u1) z12, for every middle and over many parts."""
  whole = increments(NOISE, [-3.0, 2.0], (4,), KEYS)[0]
  middles = [-2.99, -1.5, 1.984375, *np.random.default_rng(0).uniform(-3, 2, 3)]
  for parts in [[-3, middle, 2] for middle in middles] + [np.linspace(-3, 2, 13), [-3, *sorted(middles), 2]]:
    size = np.sqrt(np.diff(np.exp(parts)) / (np.exp(2) - np.exp(-3)))
    # Levels are rounded to 1.5e-5: the shortest part, of length 0.01, moves by 1e-3 of its own share of 0.02.
    np.testing.assert_allclose(np.tensordot(size, increments(NOISE, parts, (4,), KEYS), 1), whole, atol=1e-4)


def test_from_alpha_zero_w_starts_at_zero():
  """All of W(u) is the increment from SNR 0, so a step from alpha = 0 equals one from an SNR that is as good as 0."""
  from_zero, from_little = (increments(NOISE, [l, 1.0], (4,), KEYS) for l in (-np.inf, -90.0))
  np.testing.assert_allclose(from_zero, from_little, atol=1e-5)


def test_back_over_a_step_is_the_same_noise_reversed():
  there, back = increments(NOISE, [-1.0, 2.0, -1.0], (4,), KEYS)
  np.testing.assert_array_equal(there, -back)


def test_a_step_of_no_length_gets_independent_noise():
  z = increments(NOISE, [0.5, 0.5, 0.5, 200.0, 300.0])
  assert np.isfinite(z).all() and np.abs(correlations(z)).max() < 4.5


def test_noise_depends_on_the_own_key_alone():
  z = increments(NOISE, [-4.0, 0.0, 3.0], (4,), KEYS)
  np.testing.assert_array_equal(increments(NOISE, [-4.0, 0.0, 3.0], (4,), KEYS[::-1]), z[:, ::-1])
  np.testing.assert_array_equal(increments(NOISE, [-4.0, 0.0, 3.0], (4,), KEYS[:2]), z[:, :2])
  assert len(np.unique(z)) == z.size


def gaussian(x, level):
  """The exact denoiser of normal data of variance 0.25."""
  return 0.25 * level.alpha / (0.25 * level.alpha ** 2 + level.sigma ** 2) * x


@functools.partial(jax.jit, static_argnums=(0, 1))
def end(noise, denoise, grid, keys):
  start = prior(keys, (1, 1), jax.tree.map(lambda a: a[0], grid))
  return solve(ancestral(), denoise, start, grid, keys, noise=noise)


def test_more_steps_refine_the_same_sample():
  """Strong convergence: from N to 2N steps the end moves as 1 / N; independent noise moves it for good."""
  process = schedules.cosine_continuous(-10, 6)
  keys = jax.random.split(jax.random.key(5), 128)

  def moves(noise, steps):
    ends = [end(noise, gaussian, levels.uniform_logsnr()(process, n + 1, None), keys) for n in steps]
    return np.array([float(jnp.sqrt(jnp.mean((a - b) ** 2))) for a, b in itertools.pairwise(ends)])

  settling = moves(NOISE, (32, 64, 128))
  assert abs(np.log2(settling[0] / settling[1]) - 1) < 0.1, settling
  assert moves(independent, (32, 64)) > 0.4


def test_every_path_has_the_same_sample():
  keys = jax.random.split(jax.random.key(5), 128)
  process = schedules.cosine_continuous(-10, 6)
  grids = [levels.uniform_logsnr()(schedules.on_path(process, path.name), 33) for path in PATHS]
  ends = [end(NOISE, gaussian, grid, keys) for grid in grids]
  for other in ends[1:]:
    np.testing.assert_allclose(other, ends[0], atol=1e-4)


def test_wide_numbers():
  with jax.enable_x64(True):
    z = increments(NOISE, [-2.0, 0.25, 3.0], keys=jax.random.split(jax.random.key(6), 500))
  assert z.dtype == np.float64 and np.abs(correlations(z)).max() < 4.5


@pytest.mark.parametrize('depth', [0, 31])
def test_depth_is_checked(depth):
  with pytest.raises(ValueError, match=f'depth must lie in 1..30, got {depth}'):
    brownian(depth)
