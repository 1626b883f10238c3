"""Laws of the Fréchet distance: the peers' numbers, merged moments, coverage of its intervals, bad input."""
import numpy as np
import pytest
from peers import EXPECTED, SETS, covers

from diffusion_jax.metrics import frechet, intervals
from diffusion_jax.metrics.frechet import Moments, frechet_distance, moments

PAIRS = {'fid/gen_real': ('gen', 'real'), 'fid/rankdef': ('rankdef_a', 'rankdef_b'),
         'fid/offset': ('offset', 'offset2')}


@pytest.mark.parametrize('name', PAIRS)
def test_frechet_distance_is_the_peers(name):
  """Five ways to it; torch-fidelity's float32 mean is off by 7e-4 where the mean is large, and not to be met."""
  a, b = (moments(SETS[k]) for k in PAIRS[name])
  for way, value in EXPECTED[name].items():
    if way == 'torch_fidelity_f32mean' and name == 'fid/offset':
      assert frechet_distance(a, b) != pytest.approx(value, rel=1e-4)
    else:
      assert frechet_distance(a, b) == pytest.approx(value, rel=1e-7 if way == 'torch_fidelity_f32mean' else 1e-8)


def test_frechet_distance_of_diagonal_normals_is_the_peers():
  e = EXPECTED['fid/analytic_diag']
  a, b = (Moments(9, np.asarray(e[f'mu{i}']), np.diag(e[f'var{i}'])) for i in (1, 2))
  assert frechet_distance(a, b) == pytest.approx(e['fid'], rel=1e-12)


def test_frechet_distance_does_not_see_a_rotation_or_the_order():
  x, y = SETS['gen'].astype(np.float64), SETS['real'].astype(np.float64)
  turn = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
  plain = frechet_distance(moments(x), moments(y))
  assert frechet_distance(moments(x @ turn), moments(y @ turn)) == pytest.approx(plain, rel=1e-10)
  assert frechet_distance(moments(x[::-1]), moments(y)) == pytest.approx(plain, rel=1e-10)
  assert frechet_distance(moments(2 * x + 3), moments(2 * y + 3)) == pytest.approx(4 * plain, rel=1e-10)


@pytest.mark.parametrize('edges', [[], [1], [0, 1, 2, 499, 500], [3, 250, 251], list(range(1, 500))])
def test_moments_of_any_split_in_any_order_are_those_of_the_whole(edges):
  """Where the mean is a thousand times the spread: a float32 stream loses 3 % of the trace there, raw sums 1e-10."""
  x, e = SETS['offset'], EXPECTED['streaming_cov']
  parts = [frechet.partial_moments(p) for p in np.split(x, edges)]
  for order in (range(len(parts)), np.random.default_rng(0).permutation(len(parts))):
    half = len(parts) // 2  # two hosts, or one that has seen nothing
    hosts = [frechet.merge([frechet.partial_moments(x[:0]), *(parts[i] for i in some)])
             for some in (order[:half], order[half:])]
    found = frechet.merge(hosts)
    assert found.n == 500
    np.testing.assert_allclose(found.mean, x.mean(0, dtype=np.float64), rtol=1e-13)
    np.testing.assert_allclose(found.cov, np.cov(x.astype(np.float64), rowvar=False), atol=1e-12 * e['true_trace'])
    assert np.trace(found.cov) == pytest.approx(e['true_trace'], rel=1e-12)
  assert abs(e['f32_stream_trace'] / e['true_trace'] - 1) > 0.02  # what the law above is for


def test_moments_longer_than_a_chunk_are_numpys():
  x = np.random.default_rng(0).normal(5, 1, (frechet.CHUNK + 7, 3)).astype(np.float32)
  np.testing.assert_allclose(moments(x).cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-12)


def test_few_features_of_many_dimensions_have_the_distance_and_the_jackknife_of_their_definition():
  """Fewer samples than dimensions: by inner products, against moments and covariances of each part."""
  rng = np.random.default_rng(0)
  mix = rng.normal(size=(30, 30))
  real, x = moments(rng.normal(size=(200, 30)) @ mix), (rng.normal(0.4, 1, (24, 30)) @ mix).astype(np.float32)
  found = frechet.frechet_estimate(real, x)
  distance = lambda values: frechet.frechet_distance(moments(values), real)
  assert found.value == pytest.approx(distance(x), rel=1e-6)
  assert found.ci == pytest.approx(intervals.jackknife(distance, x, 20), rel=1e-4)
  with pytest.raises(ValueError, match='at least 4 features, got 3'):
    frechet.frechet_estimate(real, x[:3])
  with pytest.raises(ValueError, match='one dimension, got 30 and 29'):
    frechet.frechet_estimate(real, x[:, :29])


def test_the_influence_is_the_derivative_of_the_distance():
  """The standard error against that of a finite-difference jackknife: each sample's weight moved by a little."""
  rng = np.random.default_rng(0)
  real, x = moments(rng.normal(size=(80, 4))), rng.normal(0.3, 1.4, (40, 4))

  def weighted(w):
    w = w / w.sum()
    mean = w @ x
    return frechet_distance(real, Moments(40, mean, (x - mean).T @ ((x - mean) * w[:, None]) * 40 / 39))

  h = 1e-4
  slopes = [(weighted(1 + h * e) - weighted(1 - h * e)) / (2 * h) for e in np.eye(40)]
  error = np.std(slopes, ddof=1) * np.sqrt(40)  # a weight's slope is the influence / N
  found = frechet.frechet_estimate(real, x)
  assert found.value == pytest.approx(frechet_distance(real, moments(x)), rel=1e-12)
  # within the N / (N - 1) of the covariance
  assert (found.ci[1] - found.value) / intervals.Z == pytest.approx(error, rel=0.03)
  assert found.value - found.ci[0] == pytest.approx(found.ci[1] - found.value)


def test_frechet_intervals_cover_and_agree_with_the_bootstrap():
  """The influence interval covers the expectation at this N, as bootstrap and jackknife do; the intercept the truth."""
  rng = np.random.default_rng(1)
  real, mix, shift = Moments(10 ** 6, np.zeros(4), np.eye(4)), rng.normal(size=(4, 4)) / 2, np.full(4, 0.3)
  truth = frechet_distance(real, Moments(10 ** 6, shift, mix @ mix.T))
  distance = lambda x: frechet_distance(real, moments(x))
  found, infinite, groups, widths = [], [], [], []
  for i in range(200):
    x = rng.normal(size=(300, 4)) @ mix.T + shift
    found.append(frechet.frechet_estimate(real, x))
    infinite.append(frechet.frechet_infinity(real, x, seed=i))
    groups.append(intervals.jackknife(distance, x, seed=i))
    if i < 10:
      widths.append([np.ptp(found[-1].ci), np.ptp(intervals.bootstrap(distance, x))])
  values = np.asarray([f.value for f in found])
  intercepts = np.asarray([f.value for f in infinite])
  assert covers([f.ci for f in found], values.mean())
  assert covers(groups, values.mean())
  assert np.divide(*np.mean(widths, 0)) == pytest.approx(1, abs=0.1)
  assert covers([f.ci for f in infinite], truth)
  assert abs(intercepts.mean() - truth) < 3 * intercepts.std() / np.sqrt(200)
  assert values.mean() - truth > 3 * values.std() / np.sqrt(200)  # the bias that the line takes away


def test_frechet_infinity_depends_on_its_seed_alone():
  real, x = moments(SETS['real']), SETS['gen']
  assert frechet.frechet_infinity(real, x) == frechet.frechet_infinity(real, x)
  assert frechet.frechet_infinity(real, x, seed=1).value != frechet.frechet_infinity(real, x).value
  with pytest.raises(ValueError, match='make more samples'):
    frechet.frechet_infinity(real, x[:40])


X = np.random.default_rng(0).normal(size=(20, 3))


@pytest.mark.parametrize(('call', 'words'), [
  (lambda: frechet.merge([]), 'no moments to merge'),
  (lambda: frechet.merge([moments(X), moments(X[:, :2])]), 'one dimension, got 3 and 2'),
  (lambda: frechet.partial_moments(X[0]), r'shape \(3,\)'),
  (lambda: frechet.partial_moments(X / 0), 'must be finite'),
  (lambda: frechet_distance(moments(X), frechet.partial_moments(X[:1])), 'at least 2 features on each side'),
  (lambda: frechet_distance(moments(X), moments(X[:, :2])), 'one dimension, got 3 and 2'),
  (lambda: frechet.frechet_estimate(moments(X), X[:, :2]), 'one dimension, got 3 and 2'),
  (lambda: frechet.frechet_infinity(moments(X), X, points=2), '2 sizes'),
])
@pytest.mark.filterwarnings('ignore:divide by zero')
def test_bad_input_gets_one_sentence(call, words):
  with pytest.raises(ValueError, match=words) as error:
    call()
  assert '\n' not in str(error.value)
