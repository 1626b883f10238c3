"""Laws of the metrics, and of the records that say how they were made."""
import json
import shutil
import time
import types

import jax
import numpy as np
import pytest
import scipy.linalg
from conftest import tiny_config

from diffusion_jax import encode, evaluate, train
from diffusion_jax.metrics import features, frechet, intervals
from diffusion_jax.runtime import command, log

RECORD = {'metric', 'value', 'ci', 'run', 'step', 'images', 'ema', 'params_hash', 'sampler', 'grid', 'steps', 'nfe',
          'guidance', 'clip', 'seed', 'batch_size', 'num_samples', 'reference', 'reference_hash', 'reference_samples',
          'features', 'features_hash', 'quantisation', 'evaluation', 'seconds', 'time', 'device', 'versions',
          'git_revision'}
COST = {'samples_per_second', 'latency_seconds', 'compile_seconds', 'peak_memory_bytes', 'flops_per_image'}


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


def test_pixel_features_are_block_means():
  image = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(1, 16, 16, 3)
  expected = image.reshape(8, 2, 8, 2, 3).mean((1, 3)).reshape(1, -1) / 255
  np.testing.assert_allclose(features.make('pixels').extract(image)['features'], expected, rtol=1e-5)
  assert features.make('pixels').extract(np.zeros((2, 5, 1), np.uint8))['features'].shape == (2, 5)


@pytest.fixture
def run(tiny_run, tmp_path):
  """A copy of the tiny run that nothing has evaluated."""
  return shutil.copytree(tiny_run, tmp_path / 'run', ignore=shutil.ignore_patterns('eval', 'eval.jsonl'))


def evaluated(run, *flags):
  """The lines that an evaluation adds to eval.jsonl."""
  known = len(log.read_lines(run / 'eval.jsonl'))
  assert command.run(evaluate.main, [f'--workdir={run}', *flags]) == 0
  return log.read_lines(run / 'eval.jsonl')[known:]


def test_records_describe_themselves(run):
  records = evaluated(run)
  assert {r['metric'] for r in records} == COST | {'fd_digits_24', 'fd_digits_24_floor', 'accuracy_digits_24'}
  assert {r['ema'] for r in records} == {'main', 'raw'}
  for record in records:
    assert set(record) >= RECORD
    assert (record['num_samples'], record['nfe'], record['reference']) == (24, 4, 'digits/train')
    if record['ci']:
      assert record['ci'][0] <= record['value'] <= record['ci'][1]
  main = {r['metric']: r['value'] for r in records if r['ema'] == 'main'}
  assert main['fd_digits_24'] > main['fd_digits_24_floor']  # 32 steps make no digits
  assert len({r['evaluation'] for r in records}) == len({r['params_hash'] for r in records}) == 2


def test_an_evaluation_cut_off_continues_to_the_same_value_and_is_not_made_twice(run, capsys):
  """What is missing or damaged is made again, to the byte; what is there is not touched."""
  first = evaluated(run, '--ema=main')
  assert evaluated(run, '--ema=main') == []
  assert 'found in' in capsys.readouterr().out
  files = sorted((run / 'eval').glob('*/0*.npz'))
  assert [p.name for p in files] == ['000000-000007.npz', '000008-000015.npz', '000016-000023.npz']
  seen = sorted((run / 'eval').glob('*/digits-*/0*.npz'))
  kept = [np.load(p)['image'] for p in files]
  for folder in (files, seen):
    folder[1].unlink()
    folder[2].write_bytes(folder[2].read_bytes()[:100])
  (run / 'eval.jsonl').write_text(json.dumps(first[0]) + '\n' + json.dumps(first[1])[:50])  # killed while writing
  untouched = files[0].stat().st_mtime_ns, seen[0].stat().st_mtime_ns
  again = evaluated(run, '--ema=main')
  assert (files[0].stat().st_mtime_ns, seen[0].stat().st_mtime_ns) == untouched
  for path, image in zip(files, kept, strict=True):
    np.testing.assert_array_equal(np.load(path)['image'], image)
  quality = lambda records: [(r['metric'], r['value'], r['ci']) for r in records if r['unit'] == '']
  assert quality(again) == quality(first)
  evaluated(run, '--ema=main', '--num=32')  # a larger one begins with what is there
  assert (files[0].stat().st_mtime_ns, seen[0].stat().st_mtime_ns) == untouched


def test_another_training_in_the_same_folder_is_another_evaluation(run):
  """The samples are kept by the parameters' own hash: those of a run that was overwritten are never taken for new."""
  first = evaluated(run, '--ema=main', '--seed=3')
  folders = set((run / 'eval').iterdir())
  shutil.rmtree(run / 'checkpoints')
  (run / 'done.json').unlink()
  assert train.train(tiny_config(seed=1), run, True) == 0
  second = evaluated(run, '--ema=main', '--seed=3')
  assert second[0]['params_hash'] != first[0]['params_hash'] and second[0]['value'] != first[0]['value']
  assert len(set((run / 'eval').iterdir()) - folders) == 1


def test_sweeps_seeds_and_a_price(run):
  records = evaluated(run, '--ema=main', '--sweep_steps=2,4', '--sweep_guidance=1,2', '--seeds=0-2', '--num=16',
                      '--price_per_hour=3.6')
  single = [r for r in records if r['seed'] is not None]
  assert {(r['steps'], r['guidance'], r['nfe']) for r in single} == {(2, 1, 2), (2, 2, 4), (4, 1, 4), (4, 2, 8)}
  for point in ((2, 1), (4, 2)):
    here = [r for r in records if (r['steps'], r['guidance']) == point]
    values = [r['value'] for r in here if r['metric'] == 'fd_digits_16']
    mean, = (r for r in here if r['metric'] == 'fd_digits_16_mean')
    least, = (r for r in here if r['metric'] == 'fd_digits_16_min')
    assert len(set(values)) == 3 and mean['seeds'] == least['seeds'] == [0, 1, 2]
    assert mean['value'] == pytest.approx(np.mean(values)) and least['value'] == min(values)
    error = np.std(values, ddof=1) / np.sqrt(3)
    assert mean['standard_error'] == pytest.approx(error)
    assert mean['ci'][1] - mean['value'] == pytest.approx(4.302653 * error, rel=1e-6)  # Student's t, 2 degrees
    flops = {r['value'] for r in here if r['metric'] == 'flops_per_image'}
    assert len(flops) == 1 and flops.pop() > 0
  flops = {r['nfe']: r['value'] for r in single if r['metric'] == 'flops_per_image'}
  assert flops[8] == 2 * flops[4] == 4 * flops[2]
  cost, rate = ([r['value'] for r in single if r['metric'] == name] for name in
                ('cost_per_1000_images', 'samples_per_second'))
  devices = jax.device_count()
  assert cost == pytest.approx([1000 / r * devices * 0.001 for r in rate])
  assert evaluated(run, '--ema=main', '--sweep_steps=2,4', '--sweep_guidance=1,2', '--seeds=0-2', '--num=16',
                   '--price_per_hour=3.6') == []


def test_several_features_look_at_the_same_samples(run):
  records = evaluated(run, '--ema=main', '--features=digits,pixels', '--metrics=fd,kid,neighbours')
  kinds = ('fd', 'kid', 'precision', 'recall', 'density', 'coverage')
  names = {f'{name}_{features}_24' for features in ('digits', 'pixels') for name in kinds}
  assert {r['metric'] for r in records} - COST == names | {'fd_digits_24_floor', 'fd_pixels_24_floor'}
  assert len(list((run / 'eval').glob('*/0*.npz'))) == 3


def test_a_given_reference_scores_as_the_runs_own(run, tmp_path):
  own = evaluated(run, '--ema=main')
  assert command.run(encode.main, ['--features=digits', f'--workdir={run}', f'--out={tmp_path}/ref.safetensors']) == 0
  given = evaluated(run, '--ema=main', '--seed=1', f'--reference={tmp_path}/ref.safetensors')
  assert own[0]['reference_hash'] == given[0]['reference_hash']
  assert evaluated(run, '--ema=main', f'--reference={tmp_path}/ref.safetensors') == []  # it is the same evaluation


def test_watch_evaluates_each_checkpoint_once(run, capsys):
  records = evaluated(run, '--watch', '--ema=main', '--num=8', '--poll_seconds=0.01')
  assert {r['step'] for r in records} == {24, 32}
  assert evaluated(run, '--watch', '--ema=main', '--num=8') == []


def test_watch_follows_a_run_that_is_still_training(run, monkeypatch):
  """It waits for the folder, takes what is there, and ends only when the run is done and everything is evaluated."""
  checkpoint, done = run / 'checkpoints' / '32', run / 'done.json'
  away = {path: path.rename(run.parent / f'away{i}') for i, path in enumerate([run / 'config.json', checkpoint, done])}
  come, naps = list(away), []

  def nap(seconds):
    naps.append(seconds)
    away[come[0]].rename(come[0])  # one more thing appears while the watcher sleeps
    come.pop(0)

  monkeypatch.setattr(evaluate, 'time', types.SimpleNamespace(sleep=nap, perf_counter=time.perf_counter))
  records = evaluated(run, '--watch', '--ema=main', '--num=8', '--poll_seconds=7')
  assert naps == [7, 7, 7] and not come
  assert [r['step'] for r in records if r['metric'] == 'fd_digits_8'] == [24, 32]


@pytest.mark.parametrize(('flags', 'words'), [
    (['--num=1'], 'at least 2 samples, got --num=1'),
    (['--features=digit'], "no features 'digit'; did you mean 'digits'?"),
    (['--metrics=fid'], "no metric 'fid'; did you mean 'fd'?"),
    (['--metrics=is'], "'is' needs Inception's logits"),
    (['--sweep_steps=5,x'], "--sweep_steps must be numbers like 5,10,20, got '5,x'"),
    (['--sweep_steps=5,2000'], '2000 sampling steps do not fit in a chain of 1000'),
    (['--ema=main,rwa'], "no average 'rwa' in this run; did you mean 'raw'?"),
    (['--seeds=a'], "--seeds must be numbers like 3,5,10-12, got 'a'"),
    (['--price_per_hour=-1'], '--price_per_hour must be at least 0, got -1.0'),
    (['--watch', '--step=24'], 'give it without --step'),
    (['--reference=/nowhere.npz'], 'there is no reference /nowhere.npz'),
    (['--workdir=/nowhere'], "'/nowhere'"),
])
def test_bad_flags_get_one_sentence(tiny_run, capsys, flags, words):
  assert command.run(evaluate.main, [f'--workdir={tiny_run}', *flags]) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ')
  assert error.count('\n') == 1
  assert words in error
