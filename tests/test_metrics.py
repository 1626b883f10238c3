"""Laws of the metrics on features: the peers' numbers, closed forms, invariances, intervals, bad input."""
import numpy as np
import pytest
from peers import EXPECTED, SETS, covers

from diffusion_jax.metrics import inception_score, intervals, kernel, precision_recall


def test_kid_is_the_peers():
  e = EXPECTED['kid/gen_real_subsets_f64']
  found = kernel.kid(SETS['gen'], SETS['real'], e['subsets'], e['subset_size'])
  assert found.mean == pytest.approx(e['kernel_inception_distance_mean'], rel=1e-10)
  assert found.std == pytest.approx(e['kernel_inception_distance_std'], rel=1e-10)
  assert kernel.kid(SETS['gen'], SETS['real'], 10, 100, seed=1).mean != pytest.approx(found.mean, rel=1e-3)
  full = kernel.mmd2_unbiased(SETS['gen'], SETS['real'])
  assert full.value == pytest.approx(EXPECTED['kid/gen_real_full_unbiased'], rel=1e-10)


def test_blocks_give_the_mean_of_their_unbiased_mmds():
  """Two blocks: Student's interval with one degree of freedom, from half their difference."""
  x, y = SETS['gen'][:40], SETS['real'][:40]
  rng = np.random.default_rng(5)
  rows = [rng.permutation(40).reshape(2, 20) for _ in range(2)]
  values = [kernel.mmd2_unbiased(x[i], y[j]).value for i, j in zip(*rows, strict=True)]
  found = kernel.mmd2_blocks(x, y, 20, seed=5)
  assert found.value == pytest.approx(np.mean(values), rel=1e-10)
  assert np.ptp(found.ci) / 2 == pytest.approx(intervals.student(1) * abs(values[0] - values[1]) / 2, rel=1e-9)


@pytest.mark.parametrize('metric', [kernel.mmd2_unbiased, kernel.cmmd])
def test_kernel_distances_see_neither_chunks_nor_order_and_their_jackknife_leaves_one_out(metric):
  x, y = SETS['gen'][:30], SETS['real'][:41] + 0.2
  plain = metric(x, y)
  for other in (metric(x, y, chunk=7), metric(x[::-1], y, chunk=64), metric(y, x)):
    np.testing.assert_allclose([other.value, *other.ci], [plain.value, *plain.ci], rtol=1e-9)
  left = [[metric(np.delete(x, i, 0), y).value for i in range(30)],
          [metric(x, np.delete(y, i, 0)).value for i in range(41)]]
  error = np.sqrt(sum((len(v) - 1) * np.var(v) for v in left))
  assert plain.ci[1] - plain.value == pytest.approx(intervals.Z * error, rel=1e-6)


def test_mmd_intervals_cover():
  """Equal distributions: mean 0, negative values too, and an interval that is too wide rather than too narrow."""
  rng = np.random.default_rng(0)
  normal = lambda n, shift=0.0: rng.normal(size=(n, 4)) + shift
  equal = [kernel.mmd2_unbiased(normal(60), normal(80)) for _ in range(200)]
  values = np.asarray([e.value for e in equal])
  assert abs(values.mean()) < 3 * values.std() / np.sqrt(200)
  assert (values < 0).sum() > 40
  assert covers([e.ci for e in equal], 0, high=1)
  assert kernel.kid(normal(500), normal(500), 20, 100).mean == pytest.approx(0, abs=0.05)
  # The kernel's mean is in closed form: E[(x.y / D + 1)^3] from the moments of the normals x and y
  unlike = [kernel.mmd2_unbiased(normal(60, 0.5), normal(80)) for _ in range(200)]
  truth = _mean_cubic(0.5, 0.5) + _mean_cubic(0, 0) - 2 * _mean_cubic(0.5, 0)
  assert covers([e.ci for e in unlike], truth)
  blocks = [kernel.mmd2_blocks(normal(60, 0.5), normal(80), 10) for _ in range(200)]
  assert covers([e.ci for e in blocks], truth)
  assert covers([kernel.mmd2_blocks(normal(60), normal(80), 10).ci for _ in range(200)], 0)
  spread = np.std([e.value for e in unlike]) / np.sqrt(200)
  assert abs(np.mean([e.value for e in unlike]) - truth) < 4 * spread


def _mean_cubic(a, b, d=4):
  """E (s + 1)^3 for s = x.y / d, x and y standard normal about a and b in each of d dimensions, by cumulants of s."""
  u, v = a * a, b * b  # per coordinate: E p, E p^2, E p^3 of p = x y, with E x^2 = 1 + u, E x^3 = 3 a + a^3
  p1, p2, p3 = a * b, (1 + u) * (1 + v), (3 * a + a ** 3) * (3 * b + b ** 3)
  k1, k2, k3 = (k / d ** i for i, k in enumerate((p1, p2 - p1 ** 2, p3 - 3 * p2 * p1 + 2 * p1 ** 3)))
  m = 1 + k1
  return m ** 3 + 3 * m * k2 + k3


def test_cmmd_laws():
  """0 for equal sets, symmetric, blind to lengths; two opposite points are the closed form 2 - 2 exp(-2 / sigma^2)."""
  x, y = SETS['gen'], SETS['real']
  assert kernel.cmmd(x, x).value == pytest.approx(0, abs=1e-10)
  assert kernel.cmmd(x, y).value == pytest.approx(kernel.cmmd(y, x).value, rel=1e-9)
  assert kernel.cmmd(x, y).value > 0
  assert kernel.cmmd(x.astype(np.float64) * 7, y).value == pytest.approx(kernel.cmmd(x, y).value, rel=1e-9)
  a, b = np.tile([[3.0, 0.0]], (5, 1)), np.tile([[-2.0, 0.0]], (4, 1))
  for sigma in (10, 1):
    expected = 1000 * (2 - 2 * np.exp(-4 / (2 * sigma ** 2)))
    assert kernel.cmmd(a, b, sigma).value == pytest.approx(expected, rel=1e-10)
  assert kernel.cmmd(a, b, 1, scale=1).value == pytest.approx(2 - 2 * np.exp(-2), rel=1e-10)


def test_cmmd_interval_covers():
  rng = np.random.default_rng(0)
  found = [kernel.cmmd(rng.normal(0.3, 1, (60, 4)), rng.normal(size=(60, 4))) for _ in range(200)]
  assert covers([f.ci for f in found], np.mean([f.value for f in found]))


def test_inception_score_is_the_peers():
  e = EXPECTED['isc/splits10_shuffle2020']
  found = inception_score.inception_score(SETS['logits'])
  assert found.mean == pytest.approx(e['inception_score_mean'], rel=1e-10)
  assert found.std == pytest.approx(e['inception_score_std'], rel=1e-10)
  unshuffled = inception_score.inception_score(SETS['logits'], seed=None)
  assert unshuffled.mean != pytest.approx(found.mean, rel=1e-4)


def test_inception_score_closed_forms():
  """1 for predictions that are all alike, the number of classes for sure and balanced ones, e^KL in between."""
  score = inception_score.inception_score
  assert score(np.zeros((50, 7))).mean == pytest.approx(1, rel=1e-12)
  assert score(np.tile(np.random.default_rng(0).normal(size=7), (50, 1))).mean == pytest.approx(1, rel=1e-12)
  one_hot = np.tile(np.eye(7), (30, 1)) * 1e4
  assert score(one_hot, splits=1, seed=None).mean == pytest.approx(7, rel=1e-12)
  found = score(one_hot, splits=10, seed=None)
  assert [found.mean, found.std, *found.ci] == pytest.approx([7, 0, 7, 7], rel=1e-12, abs=1e-12)
  p = np.asarray([0.9, 0.1])
  logits = np.log([p, p[::-1]] * 20)
  assert score(logits, splits=1).mean == pytest.approx(2 * np.exp(np.sum(p * np.log(p))), rel=1e-12)
  assert score(logits + 5, splits=1).mean == pytest.approx(score(logits, splits=1).mean, rel=1e-12)
  assert score(logits, splits=1).ci is None


def test_inception_score_interval_covers():
  rng = np.random.default_rng(0)
  found = [inception_score.inception_score(rng.normal(size=(300, 5)) * 3) for _ in range(200)]
  assert covers([f.ci for f in found], np.mean([f.mean for f in found]))


@pytest.mark.parametrize('chunk', [37, 2048])
def test_precision_and_recall_are_the_peers(chunk):
  e = EXPECTED['prc/gen_real/k3']
  found = precision_recall.precision_recall(SETS['gen'], SETS['real'], unequal=True, chunk=chunk)
  assert found.precision.value == pytest.approx(e['precision'], abs=1e-6)
  assert found.recall.value == pytest.approx(e['recall'], abs=1e-6)
  assert found == precision_recall.precision_recall(SETS['gen'], SETS['real'], unequal=True)


def brute(x, y, k):
  """Precision, recall, density and coverage by their definitions, one pair at a time."""
  far = lambda a, b: np.linalg.norm(a[:, None].astype(np.float64) - b, axis=-1)
  radius = lambda a: np.sort(far(a, a), axis=1)[:, k]  # the sample itself comes first
  held = far(x, y) <= radius(y)
  return held.any(1).mean(), (far(y, x) <= radius(x)).any(1).mean(), held.sum(1).mean() / k, held.any(0).mean()


@pytest.mark.parametrize('k', [1, 3, 5])
def test_manifold_metrics_are_their_definitions_and_their_jackknife_leaves_groups_out(k):
  """The intervals' values without a group are the metric's on the sets without it."""
  x, y = SETS['gen'][:60], SETS['real'][:60]
  found = (*precision_recall.precision_recall(x, y, k, chunk=25), *precision_recall.density_coverage(x, y, k, chunk=25))
  together = precision_recall.neighbours(x, y, (k, k + 1), chunk=40)  # what is shared changes nothing
  assert together == (precision_recall.precision_recall(x, y, k), precision_recall.density_coverage(x, y, k + 1))
  assert [f.value for f in found] == pytest.approx(brute(x, y, k), rel=1e-12)
  rng = np.random.default_rng(0)
  groups = [rng.permutation(np.arange(60) % 20) for _ in range(2)]
  left = np.asarray([brute(x[groups[0] != g], y[groups[1] != g], k) for g in range(20)])
  spread = intervals.student(19) * np.sqrt(19 * left.var(0))
  for f, s in zip(found, spread, strict=True):
    if f is found[2]:
      assert f.ci == pytest.approx((max(f.value - s, 0), f.value + s), rel=1e-9)
    else:
      low, high = intervals.proportion(round(f.value * 60), 60)
      assert f.ci == pytest.approx((min(max(f.value - s, 0), low), min(max(f.value + s, high), 1)), abs=1e-9)


def test_manifold_metrics_of_equal_far_and_repeated_sets():
  x = SETS['gen']
  same = precision_recall.precision_recall(x, x)
  assert (same.precision.value, same.recall.value) == (1, 1)
  assert same.precision.ci[0] < 1
  assert precision_recall.density_coverage(x, x).coverage.value == 1
  far = (*precision_recall.precision_recall(x, x + 100), *precision_recall.density_coverage(x, x + 100))
  assert [f.value for f in far] == [0, 0, 0, 0]
  copies = np.repeat(np.random.default_rng(0).normal(1000, 1, (20, 2048)), 5, axis=0)  # balls of radius 0 hold them
  for other in (copies, copies[::-1]):
    found = (*precision_recall.precision_recall(copies, other, chunk=7),
             *precision_recall.density_coverage(copies, other, 3, chunk=7))
    assert [f.value for f in found] == pytest.approx([1, 1, 5 / 3, 1], rel=1e-12)
  shuffled = precision_recall.precision_recall(x[::-1], SETS['real'][:300])
  assert shuffled.recall.value == precision_recall.precision_recall(x, SETS['real'][:300]).recall.value


def test_manifold_intervals_cover():
  """They may be too wide, not too narrow, nor useless."""
  rng = np.random.default_rng(0)
  rows = []
  for _ in range(100):
    x, y = rng.normal(0.5, 0.8, (100, 3)), rng.normal(size=(100, 3))
    rows.append((*precision_recall.precision_recall(x, y), *precision_recall.density_coverage(x, y)))
  for found in zip(*rows, strict=True):
    values = np.asarray([f.value for f in found])
    assert covers([f.ci for f in found], values.mean(), high=1)
    assert np.mean([np.ptp(f.ci) for f in found]) < 2 * 2 * intervals.Z * values.std()


def test_jackknife_of_a_mean_is_the_textbooks():
  """With one sample in each group it is the mean's standard error; the order of samples does not matter there."""
  x = np.random.default_rng(0).normal(size=50)
  low, high = intervals.jackknife(np.mean, x, groups=50)
  assert (high - low) / 2 == pytest.approx(intervals.student(49) * x.std(ddof=1) / np.sqrt(50), rel=1e-10)
  assert (low + high) / 2 == pytest.approx(x.mean(), rel=1e-10)
  assert intervals.jackknife(np.mean, x[::-1], groups=50) == pytest.approx((low, high))
  assert intervals.student(19) == pytest.approx(2.093, abs=5e-4)  # any table
  assert intervals.student(10 ** 7) == pytest.approx(intervals.Z, rel=1e-6)


def test_jackknife_covers():
  rng = np.random.default_rng(0)
  assert covers([intervals.jackknife(np.mean, rng.normal(size=103), 10, i) for i in range(400)], 0)


X = np.random.default_rng(0).normal(size=(20, 3))


@pytest.mark.parametrize(('call', 'words'), [
  (lambda: kernel.kid(X, X), 'subsets of 1000 from 20 and 20'),
  (lambda: kernel.kid(X, X, 0, 5), '0 subsets of 5'),
  (lambda: kernel.kid(X, X[:, :2], 2, 5), 'one dimension, got 3 and 2'),
  (lambda: kernel.kid(X * np.nan, X, 2, 5), 'must be finite'),
  (lambda: kernel.mmd2_blocks(X, X, 11), 'blocks of 11 from 20 and 20'),
  (lambda: kernel.mmd2_blocks(X, X, 1), 'blocks of 1 from'),
  (lambda: kernel.mmd2_unbiased(X[:2], X), 'at least 3 features in each set, got 2 and 20'),
  (lambda: kernel.cmmd(X, X, sigma=0), 'sigma must be positive, got 0'),
  (lambda: kernel.cmmd(X, X * 0), 'an embedding is all zeros'),
  (lambda: kernel.cmmd(X[:1], X), r'shape \(1, 3\)'),
  (lambda: precision_recall.precision_recall(X, X[:10]), '20 generated and 10 real'),
  (lambda: precision_recall.precision_recall(X, X, k=20), 'got k = 20 and sets of 20 and 20'),
  (lambda: precision_recall.precision_recall(X, X, k=0), 'got k = 0'),
  (lambda: precision_recall.precision_recall(X, X, groups=1), 'got 1'),
  (lambda: precision_recall.density_coverage(X, np.full_like(X, np.inf)), 'must be finite'),
  (lambda: precision_recall.density_coverage(X, X[:, :2]), 'one dimension, got 3 and 2'),
  (lambda: inception_score.inception_score(X * np.nan), 'finite logits'),
  (lambda: inception_score.inception_score(X[0]), r'shape \(3,\)'),
  (lambda: inception_score.inception_score(X, splits=21), '21 splits and 20 samples'),
  (lambda: inception_score.inception_score(X, splits=0), '0 splits'),
  (lambda: intervals.jackknife(np.mean, X, groups=1), '1 groups and 20 samples'),
  (lambda: intervals.jackknife(np.mean, X, groups=21), '21 groups and 20 samples'),
])
@pytest.mark.filterwarnings('ignore:divide by zero')
def test_bad_input_gets_one_sentence(call, words):
  with pytest.raises(ValueError, match=words) as error:
    call()
  assert '\n' not in str(error.value)
