"""Laws of the metrics, and of the records that say how they were made."""
import importlib.resources
import json

import numpy as np
import pytest
import scipy.linalg

from diffusion_jax import evaluate
from diffusion_jax.data import sources
from diffusion_jax.metrics import features, frechet, intervals
from diffusion_jax.runtime import command, log

RECORD = {'metric', 'value', 'ci', 'run', 'step', 'ema', 'sampler', 'grid', 'nfe', 'guidance', 'seed', 'num_samples',
          'reference', 'reference_hash', 'features', 'features_hash', 'seconds', 'device', 'versions', 'git_revision'}


def test_distance_of_normals_is_the_closed_form():
  """For diagonal covariances: |m - n|^2 + sum (sqrt a - sqrt b)^2."""
  m, n = np.asarray([0.0, 1.0, 2.0]), np.asarray([1.0, 1.0, 0.0])
  a, b = np.asarray([0.5, 1.0, 0.0]), np.asarray([0.1, 4.0, 2.0])
  expected = np.sum((m - n) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
  ours = frechet.frechet_distance(frechet.Moments(9, m, np.diag(a)), frechet.Moments(9, n, np.diag(b)))
  assert ours == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('count', [20, 500])
def test_distance_equals_two_other_ways_to_it(count):
  """tr (AB)^1/2 is the nuclear norm of the centred cross product; at full rank scipy's sqrtm gives it too."""
  rng = np.random.default_rng(count)
  mix = rng.normal(size=(40, 40))
  x, y = (rng.normal(size=(count, 40)) @ mix + shift for shift in (0.0, 0.3))
  a, b = frechet.moments(x), frechet.moments(y)
  outer = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov + b.cov)
  nuclear = np.linalg.norm((x - a.mean) @ (y - b.mean).T, 'nuc') / (count - 1)
  assert frechet.frechet_distance(a, b) == pytest.approx(outer - 2 * nuclear, rel=1e-5)
  if count > 40:
    root = np.trace(scipy.linalg.sqrtm(a.cov @ b.cov).real)
    assert frechet.frechet_distance(a, b) == pytest.approx(outer - 2 * root, rel=1e-8)
  assert frechet.frechet_distance(b, a) == pytest.approx(frechet.frechet_distance(a, b), rel=1e-5)
  assert frechet.frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * np.trace(a.cov))


def test_distance_of_samples_approaches_that_of_their_distributions():
  rng = np.random.default_rng(0)
  a, b = rng.normal(0, 1, (20_000, 3)), rng.normal(0.5, 2, (20_000, 3))
  expected = 3 * (0.5 ** 2 + (2 - 1) ** 2)
  assert frechet.frechet_distance(frechet.moments(a), frechet.moments(b)) == pytest.approx(expected, rel=0.03)


def test_moments_are_numpys():
  x = np.random.default_rng(0).normal(100, 0.1, (300, 5)).astype(np.float32)
  got = frechet.moments(x)
  np.testing.assert_allclose(got.cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)


@pytest.mark.parametrize('bad', [np.zeros((1, 3)), np.zeros(3), np.full((4, 3), np.nan)])
def test_bad_features_are_named(bad):
  with pytest.raises(ValueError, match='features'):
    frechet.moments(bad)


def test_intervals_cover():
  """95 % of 200 intervals hold the truth, within four standard errors."""
  rng = np.random.default_rng(0)
  held = sum(low < 0 < high for low, high in
             (intervals.bootstrap(lambda x: float(x.mean()), rng.normal(size=100), 100, i) for i in range(200)))
  assert abs(held / 200 - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 200)
  held = sum(low < 0.9 < high for low, high in (intervals.proportion(int(n), 100) for n in rng.binomial(100, 0.9, 200)))
  assert abs(held / 200 - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 200)


def test_the_digits_classifier_reaches_what_its_weights_claim():
  images, labels = sources.arrays(sources.load('digits', 'test'))
  data = importlib.resources.files('diffusion_jax.metrics').joinpath(features.WEIGHTS).read_bytes()
  header = json.loads(data[8:8 + int.from_bytes(data[:8], 'little')])
  found = features.digits(images, batch_size=64)
  accuracy = (found.classes == labels).mean()
  assert accuracy == pytest.approx(float(header['__metadata__']['test_accuracy']), abs=0.004)
  assert accuracy > 0.97
  np.testing.assert_allclose(features.digits(images[:3]).values, found.values[:3], atol=1e-5)  # no batch size matters


def test_pixel_features_are_block_means():
  image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(1, 16, 16, 3)
  expected = image.reshape(8, 2, 8, 2, 3).mean((1, 3)).reshape(1, -1) / 255
  np.testing.assert_allclose(features.pixels(image).values, expected, rtol=1e-5)
  assert features.pixels(np.zeros((2, 5, 1), np.uint8)).values.shape == (2, 5)


def test_records_describe_themselves_and_resume(tiny_run, capsys):
  """An evaluation that lost a batch makes that batch again, to the byte, and the same value."""
  assert command.run(evaluate.main, [f'--workdir={tiny_run}']) == 0
  first = log.read_lines(tiny_run / 'eval.jsonl')
  assert {r['metric'] for r in first} == {'fd_digits', 'fd_digits_floor', 'accuracy_digits', 'samples_per_second',
                                          'latency_seconds', 'compile_seconds', 'peak_memory_bytes'}
  for record in first:
    assert set(record) >= RECORD
    assert record['num_samples'] == 24
    assert record['nfe'] == 4
    if record['ci']:
      assert record['ci'][0] <= record['value'] <= record['ci'][1]
  by_name = {r['metric']: r['value'] for r in first}
  assert by_name['fd_digits'] > by_name['fd_digits_floor']  # 32 steps make no digits

  files = sorted((tiny_run / 'eval').glob('*/0*.npz'))
  assert [p.name for p in files] == ['000000-000007.npz', '000008-000015.npz', '000016-000023.npz']
  kept = [np.load(p)['image'] for p in files]
  files[1].unlink()
  files[2].write_bytes(files[2].read_bytes()[:100])
  untouched = files[0].stat().st_mtime_ns
  assert command.run(evaluate.main, [f'--workdir={tiny_run}']) == 0
  assert files[0].stat().st_mtime_ns == untouched
  for path, image in zip(files, kept, strict=True):
    np.testing.assert_array_equal(np.load(path)['image'], image)
  again = log.read_lines(tiny_run / 'eval.jsonl')[len(first):]
  assert again[0]['value'] == first[0]['value']


@pytest.mark.parametrize(('flags', 'words'), [
    (['--num=1'], 'at least 2 samples, got --num=1'),
    (['--features=digit'], "no features 'digit'; did you mean 'digits'?"),
    (['--workdir=/nowhere'], "'/nowhere'"),
])
def test_bad_flags_get_one_sentence(tiny_run, capsys, flags, words):
  assert command.run(evaluate.main, [f'--workdir={tiny_run}', *flags]) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ')
  assert error.count('\n') == 1
  assert words in error
