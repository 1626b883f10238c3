"""The table shows every value, none beside an unlike one; the headline is one that speaks for the run."""
import re

import pytest
from test_report import HOSTILE, Page, measured, put

from diffusion_jax import quality, records
from diffusion_jax.svg import NOTHING


def runs_of(folder, *lines):
  """The runs a, b, ... with these evaluations."""
  for name, records_of in zip('abcdefgh', lines, strict=False):
    put(folder / name / 'config.json', {})
    put(folder / name / 'eval.jsonl', *records_of)
  return records.read_runs([folder / name for name in 'abcdefgh'[:len(lines)]])


def table(folder, *lines):
  """(heads, rows): the words in every cell of the table of the runs a, b, ..., and the notes above it."""
  source = quality.table(runs_of(folder, *lines))
  Page(source)
  plain = lambda part: ' '.join(re.sub('<[^>]*>', ' ', part.replace('<wbr>', '').replace(NOTHING, '-')).split())
  cells = lambda part: [plain(cell) for cell in re.findall(r'<t[hd][ >].*?</t[hd]>', part)]
  head, *rows = [cells(row) for row in re.findall(r'<tr>.*?</tr>', source)]
  return head, rows, [plain(note) for note in re.findall(r'<p class="note[^>]*>.*?</p>', source)]


def test_alike_values_share_a_column_and_unlike_ones_never_do(tmp_path):
  train = {'reference': 'cifar10/train', 'reference_hash': '1f3a'}
  test = {'reference': 'cifar10/test', 'reference_hash': '9c0d'}
  head, rows, notes = table(
    tmp_path, [measured('fid_5k', 9., **train), measured('kid_5k', .5, **train)], [measured('fid_5k', 8., **train)],
    [measured('fid_5k', 7., **test)])
  assert head == ['sampler', 'fid_5k lower is better against cifar10/train (1f3a)',
                  'fid_5k lower is better against cifar10/test (9c0d)', 'kid_5k lower is better']
  assert [row[1:] for row in rows] == [['9.00', '-', '0.500'], ['8.00', '-', '-'], ['-', '7.00', '-']]
  assert notes[0] == (
    'In columns of their own, not to be compared: fid_5k. fid_5k of run a is against cifar10/train (1f3a), of run c '
    'against cifar10/test (9c0d): evaluate both against one reference.')


@pytest.mark.parametrize('metric, change, words', [
  ('fid', {'features_hash': 'ffff'}, ('in the features x (ffff)', 'in the features x (unrecorded)')),
  ('fid', {'num_samples': 9}, ('from 9 samples', 'from 500 samples')),
  ('fid', {'quantisation': 'truncate'}, ('quantised by truncate', 'quantised by something unrecorded')),
  ('samples_per_second', {'device': 'tpu'}, ('on tpu', 'on cpu x2')),
  ('latency_seconds', {'batch_size': 64}, ('in batches of 64', 'in batches of something unrecorded')),
  ('fid', {'device': 'tpu'}, ()), ('samples_per_second', {'num_samples': 9}, ())])
def test_a_head_says_what_differs(tmp_path, metric, change, words):
  lines = [measured(metric, 1., features='x'), measured(metric, 2., **change, features='x')]
  head, rows, notes = table(tmp_path, lines)
  assert len(head) == len(rows[0]) == 2 + bool(words)
  assert any('not to be compared' in note for note in notes) == bool(words)
  for word in words:
    assert any(word in title for title in head)


def test_one_reason_for_several_metrics_is_said_once(tmp_path):
  lines = [[measured(metric, 1., reference_hash=digest) for metric in ('fid', 'kid', 'is')] for digest in 'xy']
  _, _, notes = table(tmp_path, *lines)
  assert len([note for note in notes if 'not to be compared: fid, kid, is.' in note]) == 1


def test_every_column_that_is_apart_has_its_reason(tmp_path):
  _, _, notes = table(tmp_path, *([measured('fid', 1., **more)] for more in (
    {}, {'reference_hash': 'x'}, {'features_hash': 'y', 'reference_hash': 'x'})))
  assert ['against x' in note and 'of run b' in note for note in notes[:2]] == [True, False]
  assert 'y' in notes[1] and 'of run c in the features y' in notes[1]


def test_averaged_and_raw_weights_and_seeds_have_rows(tmp_path):
  head, rows, notes = table(tmp_path, [
    measured('fid', 7.), measured('fid', 9., ema='raw'), measured('fid', 8., seed=1),
    measured('fid_mean', 7.5, [1.1, 13.9], seed=None, seeds=[0, 1], standard_error=.5),
    measured('fid_min', 7., seed=None, seeds=[0, 1])])
  assert head == ['sampler', 'fid lower is better', 'fid_mean lower is better', 'fid_min lower is better']
  assert [row[1:] for row in rows] == [
    ['7.00', '-', '-'], ['9.00', '-', '-'], ['8.00', '-', '-'],
    ['-', '7.50 ± 0.50 mean of 2 seeds ± s.e. [1.10, 13.90]', '7.00 minimum of 2 seeds']]
  made = ('EMA main', 'raw weights', 'seed 1', 'seeds 0, 1')
  assert all(words in row[0] for words, row in zip(made, rows, strict=True))
  assert notes == ['All evaluations: at 64,000 images, 500 samples, grid trailing, guidance 1.']
  assert all('raw weights' not in rows[i][0] for i in (0, 2, 3))


def test_what_is_true_of_all_rows_is_said_above_them_and_the_rest_beside_each(tmp_path):
  _, rows, notes = table(tmp_path, [measured('fid', 1., nfe=5, guidance=1.5), measured('fid', 1., nfe=9)])
  assert [row[0] for row in rows] == ['ddim(eta=0.0), 5 calls guidance 1.5', 'ddim(eta=0.0), 9 calls guidance 1']
  assert 'EMA main' in notes[0]
  _, (row,), notes = table(tmp_path, [measured('fid', 1.)])
  assert not notes
  assert row[0].endswith('at 64,000 images · 500 samples · EMA main · grid trailing · guidance 1 · seed 0')


@pytest.mark.parametrize('lines, words', [
  ([('fid_5k', 7.2)], 'fid_5k 7.20 from'), ([('fid_5k', 7.2), ('fid_5k_mean', 7.4)], 'fid_5k_mean 7.40 from'),
  ([('fd_digits_500', 9.), ('fd_digits_500_floor', 5.)], 'fd_digits_500 9.00 (real held-out images score 5.00) from'),
  ([('fd_digits_500_mean', 9.), ('fd_digits_500_floor', 5.)],
   'fd_digits_500_mean 9.00 (real held-out images score 5.00) from'),
  ([('fd_digits', 9.), ('fd_digits_floor', 5.)], 'fd_digits 9.00 (real held-out images score 5.00) from'),
  ([('fd_digits_500', 9.), ('fd_digits_300_floor', 5.)], 'fd_digits_500 9.00 from'),  # distances depend on the number
  ([('accuracy_digits_500', .9), ('fd_digits_500', 9.)], 'fd_digits_500 9.00 from')])
def test_the_headline(tmp_path, lines, words):
  run, = runs_of(tmp_path, [measured(metric, value) for metric, value in lines])
  assert re.sub('<.*?>', '', quality.headline(run)).startswith(words)


def test_a_likelihood_is_of_examples(tmp_path):
  line = measured('bits_per_dim_ode', 5., split='test')
  run, = runs_of(tmp_path, [line])
  _, (row,), _ = table(tmp_path, [line])
  assert 'from 500 examples' in quality.headline(run) and '500 examples' in row[0] and 'split test' in row[0]


@pytest.mark.parametrize('lines', [[], [measured('fid_floor', 1.)], [measured('samples_per_second', 1.)]])
def test_without_a_score_there_is_no_headline(tmp_path, lines):
  run, = runs_of(tmp_path, lines)
  assert quality.headline(run) == ''


def test_the_likelihood_of_each_level_is_drawn(tmp_path):
  runs = runs_of(tmp_path, [], [])
  assert quality.likelihood(runs) == ''
  put(tmp_path / 'a/likelihood/1.json', {
    'metric': 'bits_per_dim_discrete_vlb', 'logsnr': [-5, 0, None, 5], 'level_bits': [.1, .5, .3, None],
    'rate': [0, 1, 2], 'rmse': [80, 40, 20]})
  put(tmp_path / 'b/likelihood/2.json', {'logsnr': [-5, 0, 5], 'bits': [.1, .5, 'x']})
  page = Page(quality.likelihood(runs))
  assert [chart['aria-label'] for chart in page.all('svg')] == ['Bits of each level', 'Distortion left by a rate']
  curves = [path['d'] for path in page.all('path') if path['class'].startswith('curve')]
  assert [len(re.findall('[ML]', curve)) for curve in curves] == [2, 2, 3]
  assert 'a, bits_per_dim_discrete_vlb' in page.text and 'b, 2' in page.text


@pytest.mark.parametrize('content', [
  '', '[]', '{}', '{"logsnr": 3, "bits": "x", "rate": [[1]], "rmse": {}}',
  '{"logsnr": [1, NaN], "level_bits": [1e999]}'])
def test_a_broken_likelihood_is_no_likelihood(tmp_path, content):
  runs = runs_of(tmp_path, [])
  (tmp_path / 'a/likelihood').mkdir()
  (tmp_path / 'a/likelihood/x.json').write_text(content)
  assert quality.likelihood(runs) == ''


@pytest.mark.parametrize('word', [*HOSTILE, '\ud800'])
def test_strings_of_any_term_are_text(tmp_path, word):
  keys = ('features', 'features_hash', 'reference', 'reference_hash', 'quantisation', 'ema', 'sampler', 'estimator',
          'split', 'device', 'grid', 'guidance', 'seed', 'standard_error', 'unit')
  sources = []
  for said in 'tame', word:
    odd = [measured(metric, 1., [0, 2], **dict.fromkeys(keys, said), seeds=[said])
           for metric in ('fid', 'fid_mean', f'{said}_5k', 'latency_seconds')]
    lines = [*odd, measured('fid', 2.), measured('latency_seconds', 3.)]
    runs = runs_of(tmp_path / str(len(sources)), lines, lines)
    put(runs[0].folder / 'likelihood/x.json', {'metric': said, 'ema': said, 'logsnr': [0, 1], 'bits': [1, 2]})
    put(runs[1].folder / 'likelihood/x.json', {'metric': said, 'ema': said, 'logsnr': [0, 1], 'bits': [1, 2]})
    sources.append(Page(quality.table(runs) + quality.likelihood(runs)))
  tame, hostile = sources
  assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in tame.tags]
