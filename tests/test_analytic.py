"""The exact denoisers, the distances, and the page of experiments/analytic; what docs/maths.md names exists."""
import importlib
import inspect
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax.core import adaptive, levels, samplers, schedules
from diffusion_jax.core.types import Level
from experiments.analytic import distance, exact, measure, page, run

ROOT = pathlib.Path(__file__).parents[1]
ALPHAS, SIGMAS = np.array([1.0, 0.8, 0.3, 1.0, 0.0]), np.array([0.02, 0.6, 0.7, 30.0, 1.0])  # vp, flow, ve, pure noise
POINTS = np.random.default_rng(0).uniform(-1, 1, (40, 3))
MIXTURE = ([0.2, 0.5, 0.3], [[-0.5, 0.2], [0.4, 0.1], [0.0, -0.6]], [0.3, 0.1, 0.05])
COV = np.array([[0.4, 0.1], [0.1, 0.2]])


def level(alpha, sigma):
  with np.errstate(divide='ignore'):
    return Level(*map(np.float64, (2 * np.log(alpha / sigma), alpha, sigma)))


def density_of(name):
  """(data, (x, alpha, sigma) -> the log density of alpha x0 + sigma eps, up to a constant), written out."""
  w, m, s = map(np.asarray, MIXTURE)
  normal = jax.scipy.stats.multivariate_normal.logpdf
  if name == 'gaussian':
    mean = np.array([0.3, -0.1])
    return exact.gaussian(mean, COV), lambda x, a, b: normal(x, a * mean, a ** 2 * COV + b ** 2 * np.eye(2))
  if name == 'mixture':
    return exact.mixture(*MIXTURE), lambda x, a, b: jax.nn.logsumexp(jnp.array(
        [jnp.log(w[k]) + normal(x, a * m[k], (a ** 2 * s[k] ** 2 + b ** 2) * np.eye(2)) for k in range(3)]))
  return exact.finite(POINTS), lambda x, a, b: jax.nn.logsumexp(
      -jnp.sum((x - a * POINTS) ** 2, axis=1) / (2 * b ** 2))


@pytest.mark.parametrize('name', ['gaussian', 'mixture', 'finite'])
def test_denoisers_follow_from_the_density_by_tweedie(name):
  # alpha E[x0 | x] = x + sigma^2 grad log p(x) (Efron 2011, eq. 1.4); at pure noise E[x0 | x] is the mean.
  mean = {'gaussian': [0.3, -0.1], 'mixture': np.average(MIXTURE[1], axis=0, weights=MIXTURE[0]),
          'finite': POINTS.mean(0)}[name]
  with jax.enable_x64(True):
    data, log_density = density_of(name)
    x = np.random.default_rng(1).normal(size=(len(ALPHAS), data.dims))
    x0 = jax.jit(data.denoise)(x, level(ALPHAS, SIGMAS))
    score = jax.jit(jax.vmap(jax.grad(log_density)))(x, ALPHAS, SIGMAS)
    np.testing.assert_allclose(ALPHAS[:, None] * x0, x + SIGMAS[:, None] ** 2 * score, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(x0[-1], mean, rtol=1e-12)
    # A level that all share gives the same.
    one = jax.jit(data.denoise)(x, level(ALPHAS[1], SIGMAS[1]))
    np.testing.assert_allclose(one[1], x0[1], rtol=1e-12)


def test_denoiser_of_a_finite_set_is_the_weighted_sum_over_it():
  with jax.enable_x64(True):
    x = np.random.default_rng(3).normal(size=(5, 3))
    weights = np.exp(-((x[:, None] - 0.8 * POINTS) ** 2).sum(-1) / (2 * 0.6 ** 2))
    wanted = (weights / weights.sum(1, keepdims=True)) @ POINTS
    denoise = jax.jit(exact.finite(POINTS).denoise)
    np.testing.assert_allclose(denoise(x, level(0.8, 0.6)), wanted, rtol=1e-10)
    # Near data it gives back the member from which x came.
    np.testing.assert_allclose(denoise(POINTS, level(1.0, 1e-3)), POINTS, atol=1e-12)


def test_mixture_of_one_is_the_gaussian():
  with jax.enable_x64(True):
    x, at = jnp.asarray(np.random.default_rng(4).normal(size=(5, 2))), level(0.6, 0.8)
    one, other = exact.mixture([1.0], [[0.3, -0.1]], [0.5]), exact.gaussian([0.3, -0.1], 0.25 * np.eye(2))
    np.testing.assert_allclose(jax.jit(one.denoise)(x, at), jax.jit(other.denoise)(x, at), rtol=1e-12)


@pytest.mark.parametrize('name', exact.DATA)
def test_draws_have_the_mean_that_the_denoiser_gives_at_pure_noise(name):
  data, n = exact.DATA[name](), 4000
  drawn = data.draw(np.random.default_rng(5), n)
  with jax.enable_x64(True):
    mean = np.asarray(jax.jit(data.denoise)(np.zeros((1, data.dims)), level(0.0, 1.0)))[0]
  z = (drawn.mean(0) - mean) / np.maximum(drawn.std(0), 1e-3) * np.sqrt(n)
  assert drawn.shape == (n, data.dims) and np.max(np.abs(z)) < 5


@pytest.mark.parametrize('name', ['ellipse', 'three'])
def test_transport_solves_the_ode(name):
  # d(x / alpha) / d(sigma / alpha) = eps, so a central difference of the map must give the noise at the middle.
  data = exact.DATA[name]()
  with jax.enable_x64(True):
    at = lambda l: jax.tree.map(np.asarray, schedules.vp.level(jnp.asarray(l, jnp.float64)))
    x, first, h = np.random.default_rng(6).normal(size=(50, data.dims)), at(-2.0), 1e-4
    low, middle, high = at(1.0 - h), at(1.0), at(1.0 + h)
    ends = [(data.transport(x, first, l), l) for l in (low, high)]
    slope = (ends[1][0] / ends[1][1].alpha - ends[0][0] / ends[0][1].alpha) / (
        high.sigma / high.alpha - low.sigma / low.alpha)
    y = data.transport(x, first, middle)
    eps = (y - middle.alpha * jax.jit(data.denoise)(y, middle)) / middle.sigma
    np.testing.assert_allclose(slope, eps, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(data.transport(y, middle, first), x, rtol=1e-6)


def test_numerical_solution_agrees_with_the_formula():
  data, process = exact.ellipse(), schedules.linear()
  grid = levels.uniform_logsnr()(process, 5)
  x = np.random.default_rng(7).normal(size=(20, 2))
  np.testing.assert_allclose(measure.exact_solution(data._replace(transport=None), x, grid),
                             measure.exact_solution(data, x, grid), atol=1e-4)


@pytest.mark.parametrize('name', ['dpmpp_2m', 'euler_ancestral'])
def test_walker_is_solve(name):
  data, sampler, keys = exact.ring(), getattr(samplers, name)(), jax.random.split(jax.random.key(8), 16)
  grid = levels.trailing()(schedules.linear(), 6)
  x = samplers.prior(keys, (2,), jax.tree.map(lambda a: a[0], grid))
  walker = measure.Walker(sampler, data.denoise)
  np.testing.assert_allclose(walker(x, grid, keys), samplers.solve(sampler, data.denoise, x, grid, keys), atol=1e-5)
  assert walker.random == (name == 'euler_ancestral')


def test_budgets_are_kept():
  for name in set(samplers.__all__) - set(adaptive.__all__):
    try:
      sampler = getattr(samplers, name)()
    except ValueError:
      continue
    for budget in (5, 20, 50):
      count = measure.num_levels(sampler, budget)
      assert (count == 0 and sampler.nfe(1) > budget) or sampler.nfe(count) <= budget < sampler.nfe(count + 1)


def test_distances():
  rng = np.random.default_rng(9)
  a, b = rng.normal(size=(300, 2)), rng.normal(0.5, 2, (300, 2))
  assert distance.wasserstein(a[:, 0], b[:, 0]) == pytest.approx(stats.wasserstein_distance(a[:, 0], b[:, 0]))
  # On a line scipy's energy distance is the square root of ours.
  assert distance.energy(a[:, :1], b[:, :1]) == pytest.approx(stats.energy_distance(a[:, 0], b[:, 0]) ** 2, rel=1e-6)
  sliced = [stats.wasserstein_distance(a @ u, b @ u) for u in ([1, 0], [0, 1])]
  assert distance.sliced_wasserstein(a, b, directions=2) == pytest.approx(np.mean(sliced))
  # A shift by d moves every projection by d |cos|, whose mean over directions is 2 / pi.
  assert distance.sliced_wasserstein(a, a + np.array([1, 0]), 64) == pytest.approx(2 / np.pi, rel=1e-2)
  assert distance.energy(a, a) == pytest.approx(0, abs=1e-9) and distance.sliced_wasserstein(a, a) == 0
  with pytest.raises(ValueError, match='one size'):
    distance.wasserstein(a[:, 0], b[1:, 0])


def test_nearest_points():
  points = np.array([[0.0, 0.0], [3.0, 4.0]])
  np.testing.assert_allclose(distance.nearest(np.array([[3.0, 5.0], [0.0, 0.5]]), points), [1 / 2 ** .5, .5 / 2 ** .5])
  assert [*distance.closest(np.array([[3.0, 5.0], [0.0, 0.5]]), points)] == [1, 0]


def test_budget_that_is_enough():
  floor = {'value': 1.0, 'range': [0.9, 1.2]}
  of = lambda *values: [{'budget': b, 'value': v} for b, v in zip((5, 10, 20, 50), values, strict=True)]
  assert page.reaches(of(4, 2, 1.1, 1.0), floor) == 20
  assert page.reaches(of(4, 1.1, 2, 1.0), floor) == 50  # it came and went
  assert page.reaches(of(4, 2, 1.1, 1.3), floor) is None


def test_a_quick_run_writes_records_and_a_page(tmp_path, capsys):
  assert run.main(['--quick', f'--out={tmp_path}', '--only=ddim,ancestral,zero_terminal_snr,karras']) == 0
  records = [json.loads(line) for line in (tmp_path / 'results.jsonl').read_text().splitlines()]
  assert {r['sampler'] for r in records if r.get('part') == 'samplers'} == {'ddim', 'ancestral'}
  assert all(np.isfinite(r['value']) and {'device', 'versions', 'seed', 'data', 'num_samples'} <= set(r)
             for r in records)
  assert all(r['nfe'] <= r['budget'] for r in records if 'nfe' in r)
  errors = [r['value'] for r in records if r['metric'] == 'ode_error' and r['data'] == 'ring']
  assert len(errors) == 4 and errors == sorted(errors, reverse=True)
  html = (tmp_path / 'page.html').read_text()
  assert '<script' not in html and 'http' not in html.replace('http-equiv', '')
  assert html.count('<svg') > 8 and 'zero_terminal_snr' in html
  assert not re.search(r'\b(nan|inf|None)\b', html[html.index('<body>'):])
  printed = capsys.readouterr().out
  assert '| ddim |' in printed and str(tmp_path / 'page.html') in printed


def test_bad_input_gets_one_sentence(tmp_path):
  with pytest.raises(run.UserError, match='no_such_sampler'):
    run.main(['--quick', f'--out={tmp_path}', '--only=no_such_sampler'])


def test_what_the_page_on_maths_names_exists():
  # `module.name` and `module.name(setting=value)`, where module is a file of core.
  named = re.findall(r'`(\w+)\.(\w+)(?:\(([^`]*)\))?`', (ROOT / 'docs' / 'maths.md').read_text('utf-8'))
  assert len(named) > 100
  for module, name, settings in named:
    made = getattr(importlib.import_module(f'diffusion_jax.core.{module}'), name)
    for setting in filter(None, settings.split(',')):
      assert setting.split('=')[0].strip() in inspect.signature(made).parameters
