"""Values share a column exactly where all that makes them comparable agrees, and a refusal says what does not."""
import itertools
import json

import pytest
from test_report import measured, put

from diffusion_jax import records

FULL = {
  'features': 'inception', 'features_hash': '6726825d0af5', 'reference': 'cifar10/train',
  'reference_hash': '1f3a09bc77', 'reference_samples': 50000, 'num_samples': 5000,
  'quantisation': 'round', 'device': 'cpu x2', 'batch_size': 64, 'split': 'test', 'estimator': 'ode',
  'steps': 100, 'probes': 1, 'conditional': True, 'given': 'grey of cifar10/test', 'given_hash': '77ab12'}
OTHER = {
  'features': 'dinov2', 'features_hash': 'ab12', 'reference_hash': '9c0d', 'reference_samples': 10000,
  'given_hash': '0b1c', 'num_samples': 500, 'quantisation': 'truncate', 'device': 'TPU v4', 'batch_size': 1,
  'split': 'train', 'steps': 50, 'probes': 0, 'conditional': False, 'seed': 5, 'time': 'later', 'ema': 'raw',
  'guidance': 4.0, 'versions': {}, 'sampler': 'heun'}
QUALITY = {'features', 'features_hash', 'reference_hash', 'reference_samples', 'num_samples', 'quantisation',
           'given_hash'}
MUST_AGREE = {  # the protocol, in full
  'psnr_500': {'num_samples', 'given_hash'}, 'fid_5k': QUALITY, 'precision_10k_mean': QUALITY, 'made_up': QUALITY,
  'samples_per_second': {'device', 'batch_size'}, 'peak_memory_bytes': {'device', 'batch_size'},
  'cost_per_1000_images': {'device', 'batch_size'}, 'flops_per_image': set(),
  'memorised_share_pixels_5k': {'reference_hash', 'num_samples'},
  'closer_to_train_share_inception_5k': {'features', 'features_hash', 'reference_hash', 'num_samples'},
  'bits_per_dim_ode_1k': {'reference_hash', 'num_samples', 'split', 'steps', 'probes', 'conditional'},
}


def run_of(folder, *lines):
  put(folder / 'config.json', {})
  put(folder / 'eval.jsonl', *lines)
  run, = records.read_runs([folder])
  return run


@pytest.mark.parametrize('metric', MUST_AGREE)
@pytest.mark.parametrize('key', OTHER)
def test_values_are_comparable_where_all_terms_agree(metric, key):
  a, b, without = {**FULL, 'metric': metric}, {**FULL, 'metric': metric, key: OTHER[key]}, {**FULL, 'metric': metric}
  without.pop(key, None)
  for one, other in itertools.product((a, b, without), repeat=2):
    same = one.get(key) == other.get(key) or key not in MUST_AGREE[metric]
    assert (records.column(one) == records.column(other)) == same
    why = records.unlike(one, other, ('run a', 'run b'))
    assert (why is None) == same
    if why:
      assert why.startswith(f'{metric} of run a is ') and ', of run b ' in why and ': ' in why and '\n' not in why
      values = ['unrecorded' if r.get(key) is None else f'{r[key]:,}' if type(r[key]) is int else str(r[key])[:10]
                for r in (one, other)]
      first, second = why.rpartition(': ')[0].split(', of run b ')
      assert values[0] in first and values[1] in second


def test_the_reason_names_both_values_and_what_to_do():
  train = {**FULL, 'metric': 'fid_5k'}
  test = {**train, 'reference': 'cifar10/test', 'reference_hash': '9c0d11223344'}
  assert records.unlike(train, test, ('run a', 'run b')) == (
    'fid_5k of run a is against cifar10/train (1f3a09bc77), of run b against cifar10/test (9c0d112233): '
    'evaluate both against one reference')
  few = {**train, 'num_samples': 1000}
  assert records.unlike(few, train) == (
    'fid_5k of one is from 1,000 samples, of the other from 5,000 samples: evaluate both with one number of samples')


def test_digests_that_begin_alike_are_told_in_full():
  a, b = ({**FULL, 'metric': 'fid', 'reference_hash': f'1f3a09bc77{end}'} for end in ('aa', 'bb'))
  assert '1f3a09bc77aa' in records.unlike(a, b) and '1f3a09bc77bb' in records.unlike(a, b)


def test_equal_numbers_are_equal_settings():
  a, b = ({**FULL, 'metric': 'fid', 'num_samples': n, 'reference_samples': n} for n in (5000, 5000.0))
  assert records.column(a) == records.column(b) and not records.unlike(a, b)


def test_columns_part_the_records_into_alike_ones():
  changes = [{}, {'reference_hash': 'x'}, {'num_samples': 1}, {'features': None}, {'device': 'tpu'},
             {'batch_size': None}]
  made = [{**FULL, **one, **other, 'metric': metric} for one, other in itertools.product(changes, repeat=2)
          for metric in ('fid', 'made_up', 'latency_seconds')]
  groups = records.columns(made)
  assert sorted(map(id, itertools.chain(*groups.values()))) == sorted(map(id, made))
  by_metric = itertools.groupby(key.metric for key in groups)
  assert [metric for metric, _ in by_metric] == ['fid', 'latency_seconds', 'made_up']
  for (key, group), (other, rest) in itertools.product(groups.items(), repeat=2):
    for a, b in itertools.product(group, rest):
      assert (a['metric'] == b['metric'] and not records.unlike(a, b)) == (key == other)


@pytest.mark.parametrize('value', [None, float('nan'), float('inf'), 10**400, 'x', [1, {}], {'a': [None]}, True,
                                   '\ud800'])
def test_any_value_can_be_a_term(value):
  a, b = ({**dict.fromkeys(FULL, value), 'metric': metric} for metric in ('fid', 5))
  assert records.columns([a, b]) and not records.unlike(a, a)
  assert (records.unlike(a, {'metric': 'fid'}) is None) == (value is None)


@pytest.mark.parametrize('metric, parts', [
  ('fid', ('fid', '', False, '')), ('fid_5k', ('fid', '5k', False, '')), ('fid_5k_mean', ('fid', '5k', False, 'mean')),
  ('fd_digits_500_floor', ('fd_digits', '500', True, '')), ('fd_digits_floor', ('fd_digits', '', True, '')),
  ('fd_digits_500_floor_min', ('fd_digits', '500', True, 'min')), ('fid_min', ('fid', '', False, 'min')),
  ('cost_per_1000_images', ('cost_per_1000_images', '', False, '')), ('', ('', '', False, '')),
  ('bits_per_dim_discrete_vlb_1k', ('bits_per_dim_discrete_vlb', '1k', False, '')), ('_5k', ('_5k', '', False, '')),
  ('fd_dinov2', ('fd_dinov2', '', False, '')), ('a\nb_3', ('a\nb', '3', False, ''))])
def test_a_name_has_parts(metric, parts):
  assert records.named(metric) == parts


@pytest.mark.parametrize('metrics, better', [
  (('fid', 'fid_5k', 'fd_mine_7', 'kid_dinov2_5k', 'bits_per_dim_ode', 'sfid_mean'), 'lower is better'),
  (('is', 'is_5k', 'precision_10k', 'recall', 'coverage', 'accuracy_digits_500', 'density_min'), 'higher is better'),
  (('fid_floor', 'fd_digits_500_floor', 'isolated', 'fidelity', 'samples_per_second', 'memorised_share', ''), '')])
def test_what_is_better_is_known_of_known_metrics_alone(metrics, better):
  assert {records.better(metric) for metric in metrics} == {better}


@pytest.mark.parametrize('metrics', [
  ['fid', 'fd_digits_500'], ['fid_5k', 'fd_dinov2'], ['fd_dinov2_5k', 'fd_cifar'], ['fd_cifar_1k', 'fd_digits_500'],
  ['fd_digits_500', 'kid'], ['fd_digits', 'accuracy_digits'], ['fd_digits', 'bits_per_dim_ode'],
  ['fid_5k', 'fid_infinity'], ['fid_5k_mean', 'fid_5k'], ['fid_5k', 'fid_5k_min'],
  ['accuracy_digits_500', 'unknown'], ['unknown', 'fid_floor'],
  ['bits_per_dim_ode', 'samples_per_second'], ['made_up', 'memorised_share_pixels']])
@pytest.mark.parametrize('turn', [1, -1])
def test_the_metric_that_speaks_for_a_run(tmp_path, metrics, turn):
  lines = [measured(metric, 1., evaluation=str(i), params_hash=str(i)) for i, metric in enumerate(metrics[::turn])]
  metric, row = records.headline(run_of(tmp_path, *lines))
  assert metric == metrics[0] and records.value_of(row, metric)['value'] == 1


def test_what_speaks_for_a_run_is_of_the_last_step_averaged_of_the_most_samples_and_the_newest(tmp_path):
  lines = [measured('fid', 1., step=10, num_samples=50000), measured('fid', 8., num_samples=50000, nfe=9),
           measured('fid', 3., num_samples=50000),
           measured('fid_5k', 2., num_samples=5000), measured('fid', 4., num_samples=50000, ema='raw'),
           measured('kid', 5.), measured('latency_seconds', 6., step=30)]
  metric, row = records.headline(run_of(tmp_path, *lines))
  assert (metric, records.value_of(row, metric)['value']) == ('fid', 3.)
  assert records.headline(run_of(tmp_path, lines[-1])) == ('', {})


def test_evaluations_are_told_apart_by_their_settings_and_the_newest_value_of_one_stays(tmp_path):
  run = run_of(
    tmp_path, measured('fid', 7., step=30), measured('fid', 14., nfe=10), measured('fid', 9.), measured('kid', .5),
    measured('fid', 8.), measured('fid', 6., ema='raw'), measured('fid_mean', 5., seed=None, seeds=[0, 1]),
    measured('fid_mean', 4., seed=None, seeds=[2, 3]),
    measured('fid', 3., guidance=1), measured('latency_seconds', 1., batch_size=1))
  values = [{key.metric: record['value'] for key, record in row.items()} for row in records.evaluations(run)]
  newest = {'kid': .5, 'fid': 3., 'latency_seconds': 1.}
  assert values == [{'fid': 14.}, {'fid': 6.}, {'fid_mean': 5.}, {'fid_mean': 4.}, newest, {'fid': 7.}]


def test_the_same_samples_share_a_row_whatever_they_are_scored_by(tmp_path):
  run = run_of(tmp_path, measured('fid', 7., features='inception', evaluation='1'),
               measured('fd_dinov2', 8., features='dinov2', evaluation='2'))
  row, = records.evaluations(run)
  assert sorted(key.metric for key in row) == ['fd_dinov2', 'fid']


def test_a_value_against_another_reference_takes_no_value_away(tmp_path):
  run = run_of(tmp_path, measured('fid', 7.), measured('fid', 8., reference_hash='other'), measured('fid', 6.))
  row, = records.evaluations(run)
  assert [record['value'] for record in row.values()] == [8., 6.] and records.value_of(row, 'fid')['value'] == 6


def test_what_nests_without_end_is_passed_over(tmp_path):
  deep = '[' * 100_000
  (tmp_path / 'eval.jsonl').write_text(deep + '\n' + json.dumps(measured('fid', 1.)))
  assert len(records.read_lines(tmp_path / 'eval.jsonl')) == 1
  (tmp_path / 'config.json').write_text(deep)
  assert records.read_json(tmp_path / 'config.json') == {}
  with pytest.raises(records.Unusable, match='is not JSON'):
    records.read_runs([tmp_path])
