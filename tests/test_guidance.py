"""Laws of guidance, on denoisers known in closed form."""
import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import guidance, levels, samplers, schedules
from diffusion_jax.core.types import Denoiser, Level, expand, with_variance

SHAPE = (3, 4, 4, 2)
DATA = np.random.default_rng(0).normal(0, 0.5, SHAPE).astype(np.float32)
MASK = np.arange(16).reshape(4, 4, 1) % 3 == 0
X = jax.random.normal(jax.random.key(1), SHAPE)
LEVEL = schedules.linear().level(jnp.float32(0.4))
START = Level(jnp.float32(-jnp.inf), jnp.float32(0), jnp.float32(1))
every_wrapper = pytest.mark.parametrize('name', guidance.WRAPPERS)


def gaussian(mean, std):
  """E[x0 | x] for x0 ~ N(mean, std^2), element by element; it also gives a variance output."""

  def both(x, level):
    a, b = expand(level.alpha, x), expand(level.sigma, x)
    gain = a * std ** 2 / (a ** 2 * std ** 2 + b ** 2)
    return mean + gain * (x - a * mean), jnp.tanh(x)

  return Denoiser(both)


COND, REF = gaussian(2 * DATA, 0.8), gaussian(-0.2, 1.3)
# A new wrapper that uses these words is under every law below without a change here.
WORDS = {'ref': REF, 'bad': REF, 'scale': 2.5, 'weight': 1.5, 'guide': lambda d: guidance.cfg(d, REF, 3.0),
         'data': DATA, 'mask': MASK, 'percentile': 0.9, 'radius': 2.0,
         'log_prob': lambda x, level: -0.1 * jnp.sum((x - expand(level.alpha, x)) ** 2, axis=(1, 2, 3))}


def wrap(name, denoise, **changes):
  fn = getattr(guidance, name)
  words = {k: v for k, v in WORDS.items() if k in inspect.signature(fn).parameters} | changes
  return fn(denoise, **words)


@every_wrapper
def test_a_wrapper_does_something_and_passes_the_variance_on(name):
  x0, variance = with_variance(wrap(name, COND))(X, LEVEL)
  assert float(jnp.abs(x0 - COND(X, LEVEL)).max()) > 1e-3
  np.testing.assert_array_equal(variance, jnp.tanh(X))
  assert with_variance(wrap(name, lambda x, level: x))(X, LEVEL)[1] is None


@every_wrapper
@pytest.mark.parametrize('level', [START, schedules.vp.level(jnp.float32(18)), schedules.ve.level(jnp.float32(-12))],
                         ids=['pure noise', 'data', 've'])
def test_a_wrapper_is_finite_at_both_ends_of_time_and_so_is_its_gradient(name, level):
  value, slope = jax.jit(jax.value_and_grad(lambda x: jnp.sum(wrap(name, COND)(x, level) ** 2)))(level.sigma * X)
  assert np.isfinite(value)
  assert np.all(np.isfinite(slope))


@every_wrapper
def test_a_sample_does_not_see_its_neighbours_and_may_have_its_own_level(name):
  several = schedules.linear().level(jnp.array([0.1, 0.4, 0.9]))
  together = wrap(name, COND)(X, several)
  for i in range(3):
    one = gaussian(2 * DATA[i:i + 1], 0.8)
    data = {'data': DATA[i:i + 1]} if name == 'inpaint' else {}
    alone = wrap(name, one, **data)(X[i:i + 1], jax.tree.map(lambda a, i=i: a[i], several))
    np.testing.assert_allclose(together[i], alone[0], rtol=2e-5, atol=1e-5)


@every_wrapper
def test_a_constant_estimate_has_a_finite_gradient(name):
  """Where standard deviations and differences vanish, square roots must not."""
  flat = lambda c: wrap(name, lambda x, level: jnp.full_like(x, 0.1) * c,
                        **({'ref': lambda x, level: jnp.full_like(x, 0.1) * c} if name == 'apg' else {}))
  assert np.isfinite(jax.grad(lambda c: jnp.sum(flat(c)(X, LEVEL)))(1.0))


def test_wrappers_compose_in_any_order():
  for names in itertools.permutations(guidance.WRAPPERS, 2):
    x0, variance = with_variance(wrap(names[1], wrap(names[0], COND)))(X, LEVEL)
    assert np.all(np.isfinite(x0)), names
    np.testing.assert_array_equal(variance, jnp.tanh(X))
  both = functools.reduce(lambda d, name: wrap(name, d), guidance.WRAPPERS, COND)
  assert float(jnp.abs(both(X, LEVEL)).max()) <= 1 + 1e-6  # threshold is the last


def test_classifier_free_guidance_in_both_conventions():
  cond, ref = COND(X, LEVEL), REF(X, LEVEL)
  at = lambda scale: guidance.cfg(COND, REF, scale)(X, LEVEL)
  assert guidance.cfg(COND, REF, 1) is COND
  assert guidance.cfg_weight(COND, REF, 0) is COND
  np.testing.assert_allclose(at(0), ref, atol=1e-6)
  np.testing.assert_allclose(at(1.0 + 1e-7), cond, atol=1e-5)
  np.testing.assert_allclose(at(4) - at(2), 2 * (cond - ref), atol=1e-5)  # linear in the scale
  np.testing.assert_allclose(guidance.cfg_weight(COND, REF, 2)(X, LEVEL), 3 * cond - 2 * ref, atol=1e-5)
  np.testing.assert_allclose(at(3), 3 * cond - 2 * ref, atol=1e-5)


def test_guidance_of_gaussians_samples_the_sharpened_gaussian_at_each_level():
  """Two Gaussians of one spread and means m, r: guidance with scale s is the denoiser of mean r + s (m - r), exactly.

  So a negative condition, here the mean -0.5, pushes the mean of the samples away from it.
  """
  positive, negative = gaussian(0.2, 0.6), gaussian(-0.5, 0.6)
  guided = guidance.cfg(positive, negative, 3.0)
  np.testing.assert_allclose(guided(X, LEVEL), gaussian(-0.5 + 3 * 0.7, 0.6)(X, LEVEL), atol=1e-5)
  np.testing.assert_allclose(guidance.autoguide(positive, negative, 3.0)(X, LEVEL), guided(X, LEVEL))
  np.testing.assert_allclose(guidance.autoguide(positive, positive, 3.0)(X, LEVEL), positive(X, LEVEL), atol=1e-6)


def test_apg_is_cfg_without_its_parallel_part():
  cond, full = COND(X, LEVEL), guidance.cfg(COND, REF, 3.0)(X, LEVEL)
  apg = lambda **more: guidance.apg(COND, REF, 3.0, **more)(X, LEVEL)
  dot = lambda a, b: np.sum(np.asarray(a) * np.asarray(b), axis=(1, 2, 3))
  np.testing.assert_allclose(apg(eta=1.0), full, atol=1e-5)
  np.testing.assert_allclose(dot(apg() - cond, cond), 0, atol=1e-4)
  np.testing.assert_allclose(full - apg(), cond * (dot(full - cond, cond) / dot(cond, cond))[:, None, None, None],
                             atol=1e-5)
  for radius, bound in ((0.5, 0.5), (1e6, 1e6)):
    length = np.sqrt(dot(apg(eta=1.0, radius=radius) - cond, apg(eta=1.0, radius=radius) - cond)) / 2
    np.testing.assert_allclose(length, np.minimum(bound, np.sqrt(dot(full - cond, full - cond)) / 2), rtol=1e-4)
  assert guidance.apg(COND, REF, 1) is COND


def test_interval_is_guidance_within_and_nothing_without():
  guide = lambda d: guidance.cfg(d, REF, 3.0)
  grid = levels.timesteps()(schedules.linear(), 12, None)
  ratio = np.exp(-0.5 * np.asarray(grid.logsnr))
  for low, high in ((0.0, np.inf), (1e6, np.inf), (0.28, 2.9), (0.0, ratio[5]), (ratio[5], np.inf)):
    chosen = jax.jit(guidance.interval(COND, guide, low, high))
    for i in range(12):
      level = jax.tree.map(lambda a, i=i: a[i], grid)
      wanted = guide(COND) if low < ratio[i] <= high else COND
      np.testing.assert_allclose(chosen(X, level), wanted(X, level), atol=2e-6)
  everywhere = guidance.interval(COND, guide)(X, START)  # sigma / alpha is infinite there
  np.testing.assert_allclose(everywhere, guide(COND)(X, START), atol=2e-6)


def test_interval_really_skips_the_call():
  calls = {'cond': 0, 'ref': 0}

  def counted(name, denoise):
    def count():
      calls[name] += 1

    def call(x, level):
      jax.debug.callback(count)
      return denoise(x, level)
    return call

  grid = levels.timesteps()(schedules.linear(), 20, None)
  inside = int(np.sum((np.exp(-0.5 * grid.logsnr) > 0.3) & (np.exp(-0.5 * grid.logsnr) <= 3)))
  assert 3 < inside < 17
  ref = counted('ref', REF)
  guided = guidance.interval(counted('cond', COND), lambda d: guidance.cfg(d, ref, 3.0), 0.3, 3.0)
  keys = jax.random.split(jax.random.key(0), 3)
  jax.block_until_ready(jax.jit(lambda x: samplers.solve(samplers.ddim(), guided, x, grid, keys))(X))
  jax.effects_barrier()
  assert calls == {'cond': 20, 'ref': inside}


def test_rescale_brings_back_the_spread_of_each_sample():
  guide = lambda d: guidance.cfg(d, REF, 7.0)
  at = lambda phi: np.asarray(guidance.rescale(COND, guide, phi)(X, LEVEL))
  full, std = np.asarray(guide(COND)(X, LEVEL)), lambda a: np.std(np.asarray(a), axis=(1, 2, 3))
  np.testing.assert_array_equal(at(0.0), full)
  np.testing.assert_allclose(std(at(1.0)), std(COND(X, LEVEL)), rtol=1e-5)
  np.testing.assert_allclose(at(0.7), 0.7 * at(1.0) + 0.3 * full, rtol=1e-4, atol=1e-5)
  assert np.all(std(full) > 1.1 * std(at(1.0)))  # it had something to bring back


def test_thresholds_keep_the_range():
  wide = lambda x, level: 3 * x
  clipped, dynamic = guidance.clip(wide)(X, LEVEL), guidance.threshold(wide)(X, LEVEL)
  assert np.abs(clipped).max() == np.abs(dynamic).max() == 1
  np.testing.assert_array_equal(guidance.threshold(wide, max_value=1.0)(X, LEVEL), clipped)
  np.testing.assert_allclose(guidance.threshold(lambda x, level: 0.1 * x)(X, LEVEL), 0.1 * X)  # in range: untouched
  largest = np.abs(3 * X).max(axis=(1, 2, 3), keepdims=True)
  np.testing.assert_allclose(guidance.threshold(wide, percentile=1.0)(X, LEVEL), 3 * X / largest, rtol=1e-5)
  s = np.quantile(np.abs(3 * X), 0.9, axis=(1, 2, 3), keepdims=True)
  np.testing.assert_allclose(guidance.threshold(wide, 0.9)(X, LEVEL), np.clip(3 * X, -s, s) / s, rtol=1e-5)


@pytest.mark.parametrize('path', schedules.PATHS, ids=lambda p: p.name)
def test_a_classifier_turns_the_prior_into_the_exact_posterior(path):
  """x0 ~ N(m, S) with correlated S, y = H x0 + N(0, r^2): both denoisers and p(y | x) are Gaussian."""
  rng = np.random.default_rng(3)
  root, H, r, m = rng.normal(size=(5, 5)), rng.normal(size=(2, 5)), 0.3, rng.normal(size=5)
  S, y = root @ root.T, rng.normal(size=2)
  gain = S @ H.T @ np.linalg.inv(H @ S @ H.T + r ** 2 * np.eye(2))
  posterior = correlated(m + gain @ (y - H @ m), S - gain @ H @ S)

  def log_prob(x, level):
    a, b = level.alpha, level.sigma
    back = a * S @ jnp.linalg.inv(a ** 2 * S + b ** 2 * np.eye(5))  # E[x0 | x] = m + back (x - a m)
    spread = H @ (S - a * back @ S) @ H.T + r ** 2 * np.eye(2)
    residual = y - (m + (x - a * m) @ back.T) @ H.T
    return -0.5 * jnp.sum(residual @ jnp.linalg.inv(spread) * residual, -1)

  with jax.enable_x64(True):
    x = jnp.asarray(rng.normal(size=(4, 5)))
    guided = guidance.classifier(correlated(m, S), log_prob)
    for logsnr in (-8.0, -2.0, 0.0, 3.0):
      level = path.level(jnp.asarray(logsnr, jnp.float64))
      np.testing.assert_allclose(guided(x, level), posterior(x, level), rtol=1e-7, atol=1e-8)
      half = guidance.classifier(correlated(m, S), log_prob, 0.5)(x, level)
      np.testing.assert_allclose(half, (correlated(m, S)(x, level) + posterior(x, level)) / 2, rtol=1e-7, atol=1e-8)


def correlated(mean, S):
  """E[x0 | x] for x0 ~ N(mean, S), x [B, D]; levels are scalars."""

  def denoise(x, level):
    a, b = level.alpha, level.sigma
    shape, x = x.shape, x.reshape(len(x), -1)
    back = a * S @ jnp.linalg.inv(a ** 2 * S + b ** 2 * jnp.eye(len(S)))
    return (mean + (x - a * mean) @ back.T).reshape(shape).astype(x.dtype)

  return denoise


def inpainted(method, samples=4096):
  """Samples of the second of two correlated Gaussian pixels (deviation 1, correlation 0.9) where the first is 1.5."""
  denoise = correlated(np.zeros(2, np.float32), np.array([[1, 0.9], [0.9, 1]], np.float32))
  data, mask = jnp.full((samples, 2, 1), 1.5), np.array([[True], [False]])
  grid = levels.uniform_logsnr()(schedules.cosine_continuous(-6, 7), 60, None)
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(jnp.arange(samples))
  x = samplers.prior(keys, (2, 1), jax.tree.map(lambda a: a[0], grid))
  if method == 'projection':
    solver, denoise = samplers.ancestral(0.5), guidance.inpaint(denoise, data, mask)
  else:
    solver = guidance.repaint(samplers.ancestral(0.5), data, mask, resamples=method)
  x0 = np.asarray(jax.jit(lambda x: samplers.solve(solver, denoise, x, grid, keys))(x))
  np.testing.assert_array_equal(x0[:, 0, 0], 1.5)  # known pixels, to the bit
  mean, variance = 0.9 * 1.5, 1 - 0.9 ** 2  # the exact posterior of the other
  other = x0[:, 1, 0].astype(np.float64)
  return ((other.mean() - mean) / np.sqrt(variance / samples),
          (other.var() / variance - 1) / np.sqrt(2 / samples))


def test_repaint_reaches_the_exact_posterior_and_projection_does_not():
  for z in inpainted(40):
    assert abs(z) < 4
  assert inpainted('projection')[0] < -20
  assert inpainted(1)[0] < -20  # without resampling


@pytest.mark.parametrize('sampler', [samplers.ddim(), samplers.heun(), samplers.dpmpp_2m()],
                         ids=['ddim', 'heun', 'dpmpp_2m'])
def test_repaint_keeps_known_pixels_with_any_sampler_from_pure_noise(sampler):
  rest = levels.uniform_logsnr()(schedules.cosine_continuous(-6, 8), 6, None)
  grid = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), START, rest)
  painted, count = guidance.repaint(sampler, DATA, MASK, resamples=3), []

  def denoise(x, level):
    jax.debug.callback(lambda: count.append(1))
    return COND(x, level)

  keys = jax.random.split(jax.random.key(0), 3)
  x0 = np.asarray(jax.jit(lambda x: samplers.solve(painted, denoise, x, grid, keys))(X))
  jax.effects_barrier()
  assert len(count) == painted.nfe(7) == 6 * 3 * sampler.calls + 1
  assert np.all(np.isfinite(x0))
  known = np.broadcast_to(MASK, SHAPE)
  np.testing.assert_array_equal(x0[known], DATA[known])
  assert np.all(x0[~known] != DATA[~known])


@pytest.mark.parametrize(('make', 'words'), [
    (lambda g: g.cfg(COND, REF, float('nan')), 'must be finite, got nan'),
    (lambda g: g.cfg_weight(COND, REF, float('inf')), 'must be finite, got inf'),
    (lambda g: g.apg(COND, REF, float('inf')), 'must be finite, got inf'),
    (lambda g: g.apg(COND, REF, 2.0, radius=0), 'radius must be above 0, got 0'),
    (lambda g: g.interval(COND, None, 3, 2), '0 <= low < high, got 3 and 2'),
    (lambda g: g.interval(COND, None, -1, 2), '0 <= low < high, got -1 and 2'),
    (lambda g: g.rescale(COND, None, 1.5), r'phi must lie in \[0, 1\], got 1.5'),
    (lambda g: g.clip(COND, 1, -1), 'low must be below high, got 1 and -1'),
    (lambda g: g.threshold(COND, 0), r'percentile must lie in \(0, 1\], got 0'),
    (lambda g: g.threshold(COND, 99.5), r'percentile must lie in \(0, 1\], got 99.5'),
    (lambda g: g.threshold(COND, max_value=0.5), 'max_value must be at least 1, got 0.5'),
    (lambda g: g.classifier(COND, None, float('nan')), 'must be finite, got nan'),
    (lambda g: g.inpaint(COND, DATA, MASK.astype(np.float32)), 'mask must be boolean, .* got float32'),
    (lambda g: g.inpaint(COND, DATA, np.ones((5, 4, 1), bool)), r'a mask of shape \(5, 4, 1\) does not fit data of'),
    (lambda g: g.inpaint(REF, DATA, MASK)(X[:2], LEVEL), r'data of shape \(3, 4, 4, 2\) cannot fill samples of shape'),
    (lambda g: g.repaint(samplers.ddim(), DATA, MASK, 0), 'resamples must be at least 1, got 0'),
    (lambda g: g.repaint(samplers.ddim()._replace(calls=0), DATA, MASK), 'chooses its own steps'),
])
def test_bad_arguments_are_named(make, words):
  with pytest.raises(ValueError, match=words):
    make(guidance)
