"""Runs are averaged over seeds and over nothing else, judged on like values alone, and what is missing is said."""
import html
import math
import re

import pytest
from test_report import HOSTILE, Page, measured, put

from diffusion_jax import comparison, curves, records, report, tradeoff

SCORES = {'cosine': (8., 9., 10.), 'linear': (20.5, 21., 21.6)}


def make(folder, name, seed, *lines, config=None, **point):
  """The folder of a point of a sweep."""
  run = folder / f'{name}-{seed}-{len(list(folder.iterdir())) if folder.exists() else 0}'
  put(run / 'point.json', {'run': name, 'name': f'{name}-s{seed}', 'seed': seed, **point})
  put(run / 'config.json', {'schedule': name, **(config or {}), 'seed': seed})
  put(run / 'eval.jsonl', *lines)
  return run


def made(folder, scores=None, **changes):
  """The runs of names with these values by seed."""
  return records.read_runs([make(folder, name, seed, measured('fid', value, **changes))
                            for name, values in (scores or SCORES).items() for seed, value in enumerate(values)])


def words(source):
  Page(source)
  return ' '.join(html.unescape(re.sub('<[^>]*>', ' ', source.replace('<wbr>', ''))).split())


# Groups

def test_points_of_one_name_are_one_run_of_several_seeds(tmp_path):
  runs = made(tmp_path)
  assert [(run.group, run.label, run.seed, run.colour) for run in runs] == [
    (name, f'{name}-s{seed}', seed, colour) for colour, name in enumerate(SCORES) for seed in range(3)]


@pytest.mark.parametrize('first, second, groups', [
  ({'seed': 0, 'a': 1}, {'seed': 1, 'a': 1}, ['run', 'run']),
  ({'seed': 0, 'a': 1}, {'seed': 1, 'a': 2}, ['run-s0', 'run-s1']),
  ({'seed': 0}, {'seed': 0}, ['run-s0', 'run-s1']), ({}, {}, ['run-s0', 'run-s1']),
  ({'seed': True}, {'seed': 'x'}, ['run-s0', 'run-s1'])])
def test_runs_without_a_sweep_are_together_where_only_the_seed_differs(tmp_path, first, second, groups):
  for i, config in enumerate((first, second)):
    put(tmp_path / f'run-s{i}/config.json', config)
  runs = records.read_runs([tmp_path / 'run-s0', tmp_path / 'run-s1'])
  assert [run.group for run in runs] == groups


def test_two_attempts_at_a_seed_are_never_averaged(tmp_path):
  of_code = [make(tmp_path, 'cosine', seed, code=code) for code in ('old', 'new') for seed in range(2)]
  runs = records.read_runs(of_code)
  assert len({run.group for run in runs[:2]}) == len({run.group for run in runs[2:]}) == 1
  assert runs[0].group != runs[2].group
  again = records.read_runs([*of_code, of_code[0]])  # a folder twice: that code has no seeds to average over
  groups = records.groups_of(again)
  assert sorted(map(len, groups.values())) == [1, 1, 1, 2]
  assert len({run.label for run in again[:4]}) == 4


def test_a_name_with_two_configs_is_two_names(tmp_path):
  runs = records.read_runs([make(tmp_path, 'cosine', 0, config={'a': 1}), make(tmp_path, 'cosine', 1, config={'a': 2})])
  assert len({run.group for run in runs}) == 2 and all('cosine' in run.group for run in runs)


# The verdict

def test_the_best_name_is_said_with_its_difference_over_seeds(tmp_path):
  compared = comparison.choose(made(tmp_path))
  found = comparison.judged(compared)
  assert found.best == 'cosine' and found.group == ('cosine',)
  assert 'cosine' in comparison.headline(compared, found) and '12' in comparison.headline(compared, found)
  table = words(comparison.over_names(compared, found))
  for part in ('cosine best 9.00 ± 0.58 3', 'linear 21.0 ± 0.3 3', '8.00 , 9.00 , 10.0',
               'Budget: 64,000 training images each.', 'Each value is of 50 network calls, 500 samples.'):
    assert part in table


def test_higher_is_better_where_it_is(tmp_path):
  runs = records.read_runs([make(tmp_path, name, seed, measured('accuracy', value / 100))
                            for name, values in SCORES.items() for seed, value in enumerate(values)])
  assert comparison.judged(comparison.choose(runs)).best == 'linear'


def test_what_chance_can_do_is_not_separable(tmp_path):
  compared = comparison.choose(made(tmp_path, {'a': (8., 9., 10.), 'b': (8.5, 9.7, 9.), 'c': (30., 31., 32.)}))
  found = comparison.judged(compared)
  table = words(comparison.over_names(compared, found))
  assert table.count('not separable from the best') == 1 and set(found.group) == {'a', 'b'}
  assert 'not separable' in comparison.headline(compared, found)


@pytest.mark.parametrize('change', [{'reference_hash': 'x'}, {'num_samples': 5}, {'features_hash': 'y'}])
def test_unlike_values_are_left_out_and_named(tmp_path, change):
  odd = make(tmp_path, 'odd', 0, measured('fid', 1., **change))
  bare = make(tmp_path, 'bare', 0)
  folders = [run.folder for run in made(tmp_path)]
  compared = comparison.choose(records.read_runs([odd, *folders, bare]))
  assert {run.group for run, _ in compared.chosen} == {*SCORES}
  said = ' '.join(comparison.conditions(compared))
  value, = change.values()
  assert f'{value}' in said and 'bare-s0 has no fid' in said and 'odd-s0' in said


def test_each_run_speaks_by_the_samples_that_most_runs_have(tmp_path):
  """A run's other evaluations, of more calls, of raw weights or of an earlier step, do not stand for it."""
  calls, raw, early = measured('fid', 1., nfe=1000), measured('fid', 2., ema='raw'), measured('fid', .5, step=10)
  folders = [make(tmp_path, name, seed, *[calls] * bool(seed), measured('fid', value),  # newest or not
                  *([raw, early] if seed else [calls, early]))
             for name, values in SCORES.items() for seed, value in enumerate(values)]
  folders[-1] = make(tmp_path, 'linear', 2, measured('fid', 21.6))  # so that 50 calls are what most runs have
  compared = comparison.choose(records.read_runs(folders))
  assert [record['value'] for _, record in compared.chosen] == [v for values in SCORES.values() for v in values]


def test_calls_that_a_sampler_chose_do_not_tell_samples_apart(tmp_path):
  runs = records.read_runs([make(tmp_path, 'a', seed, measured('fid', 1., nfe=47.5 + seed / 4)) for seed in range(2)])
  (_, a), (_, b) = comparison.choose(runs).chosen
  assert comparison.made_by(a) == comparison.made_by(b)
  assert comparison.made_by({**a, 'nfe': 47}) != comparison.made_by({**b, 'nfe': 48})


@pytest.mark.parametrize('name', ['point.json', 'data.json', 'eval.jsonl', 'metrics.jsonl', 'schedule.json', 'run.json',
                                  'done.json'])
@pytest.mark.parametrize('content', [
  '', '[]', '{"metric": "fid", "value": "x", "seed": [], "run": {}, "shape": "x", "images": {}, "step": [], "ci": 3}',
  '{"metric": "fid", "value": 1e999, "seed": true, "run": "", "nfe": "x", "images": -1, "seconds": [], "t": [1, "x"]}',
  '{"metric": "fid", "value": 5, "seed": -7, "name": 3, "alpha": 1, "logsnr_bins": [0, 0], "count_by_logsnr": [1]}'])
def test_a_broken_record_among_others_breaks_nothing(tmp_path, name, content):
  folders = [make(tmp_path, group, seed, measured('fid', 1. + seed)) for group in 'ab' for seed in range(2)]
  for folder in folders[1:]:
    (folder / name).write_text(content)
  Page(report.page(records.read_runs(folders)))


def test_unequal_budgets_and_missing_points_are_said(tmp_path):
  folders = [make(tmp_path, 'a', 0, measured('fid', 1., images=100)), make(tmp_path, 'a', 1, measured('fid', 2.)),
             make(tmp_path, 'b', 0, measured('fid', 2., nfe=9))]
  said = ' '.join(comparison.conditions(comparison.choose(records.read_runs(folders))))
  for part in ('The budgets differ: from 100 to 64,000', 'b has no seed 1', 'the runs differ in nfe'):
    assert part in said


def test_there_is_no_verdict_on_one_name_or_on_one_seed_each(tmp_path):
  one = comparison.choose(made(tmp_path / '1', {'a': (1., 2.)}))
  assert comparison.judged(one) is None and comparison.headline(one, None) == ''
  each = comparison.choose(made(tmp_path / '2', {'a': (1.,), 'b': (2.,)}))
  assert not comparison.judged(each).best
  nothing = comparison.choose(records.read_runs([make(tmp_path / '3', 'a', 0)]))
  assert nothing is None and comparison.over_names(None, None) == '' and comparison.while_training([], None) == ''


@pytest.mark.parametrize('value', [None, float('nan'), float('inf')])
def test_a_run_that_diverged_is_not_averaged_away(tmp_path, value):
  runs = made(tmp_path, {'a': (1., 2., value), 'b': (5., 6.1, 7.)})
  compared = comparison.choose(runs)
  found = comparison.judged(compared)
  assert 'Without finite values' in found.text and 'a (seeds 2)' in found.text
  assert 'a best 1.50 ± 0.50 2 1.00 , 2.00 , \N{EN DASH}' in words(comparison.over_names(compared, found))
  Page(report.page(runs))


# Curves over seeds

def numbers_of(path):
  return [tuple(map(float, pair)) for pair in re.findall(r'[ML]([\d.-]+),([\d.-]+)', path)]


def drawn(source, kind):
  return [numbers_of(path['d']) for path in Page(source).all('path') if path['class'].startswith(kind)]


def test_quality_while_training_is_a_mean_over_seeds_in_their_band(tmp_path):
  folders = []
  for seed, shift in enumerate((-1, 0, 1)):
    values = [measured('fid', 10 + shift + i * i, images=i * 100, step=i) for i in (1, 2, 3)]
    folders.append(make(tmp_path, 'a', seed, *values))
    put(folders[-1] / 'metrics.jsonl', *({'step': i, 'images': i * 100, 'seconds': i + shift / 9} for i in (1, 2, 3)))
    put(folders[-1] / 'run.json', {'device': 'cpu'})
  runs = records.read_runs(folders)
  source = comparison.while_training(runs, comparison.choose(runs))
  page = Page(source)
  assert [chart['aria-label'] for chart in page.all('svg')] == ['fid against images seen', 'fid against training time']
  for curve, band in zip(drawn(source, 'curve'), drawn(source, 'band'), strict=True):
    assert len(curve) == 3 and len(band) == 6  # up one side and down the other
    for (x, y), (x_high, high), (x_low, low) in zip(curve, band[:3], reversed(band[3:]), strict=True):
      assert x == x_high == x_low and y == pytest.approx((low + high) / 2, abs=.1) and high < y < low
  assert 'a, mean of 3 seeds' in page.text
  put(folders[0] / 'run.json', {'device': 'tpu'})
  runs = records.read_runs(folders)
  source = comparison.while_training(runs, comparison.choose(runs))
  assert source.count('<svg') == 1 and 'unlike devices' in source


def test_a_sweep_over_calls_is_a_mean_over_seeds_where_all_of_them_are(tmp_path):
  of = lambda seed, nfe: measured('fid', 10. + seed - nfe / 10, nfe=nfe, steps=nfe, params_hash=str(seed))
  folders = [make(tmp_path, 'a', seed, *(of(seed, nfe) for nfe in (5, 10, 20)[:3 - (seed == 2)])) for seed in range(3)]
  source = tradeoff.against_cost(records.read_runs(folders))
  curve, = drawn(source, 'curve')
  assert len(curve) == 2 and 'a, mean of 3 seeds' in source and len(drawn(source, 'band')) == 1


def test_the_density_of_training_is_a_density(tmp_path):
  bins, counts = [-16, -4, 0, 2, 16], [[1, 2, 3, 4], [0, 5, 0, 5]]
  put(tmp_path / 'config.json', {})
  put(tmp_path / 'metrics.jsonl', *({'step': i, 'images': i, 'logsnr_bins': bins, 'count_by_logsnr': line}
                                    for i, line in enumerate([*counts, None, 'x', [1], [1, None, 2, 3]])))
  run, = records.read_runs([tmp_path])
  points = curves.effort(run)
  areas = [(points[i + 1][0] - points[i][0]) * points[i][1] for i in range(0, len(points), 2)]
  assert math.fsum(areas) == pytest.approx(1)
  assert areas == pytest.approx([1 / 20, 7 / 20, 3 / 20, 9 / 20])
  assert 'Density of training effort' in report.page([run])


# Configs

def test_the_keys_that_differ_are_listed_and_no_others(tmp_path):
  config = lambda channels: {'same': 1, 'net': {'fn': 'm:UNet', 'channels': channels}}
  runs = records.read_runs([make(tmp_path, name, seed, config=config(channels))
                            for name, channels in (('a', 16), ('b', 32)) for seed in range(2)])
  source = comparison.differences(runs)
  assert re.findall(r'<th scope="col">(.*?)</th>', source) == ['name', 'schedule', 'net.channels']
  assert words(source).endswith("a 'a' 16 b 'b' 32")
  assert comparison.differences(runs[:2]) == ''


@pytest.mark.parametrize('word', [*HOSTILE, '</script>', 'javascript:alert(1)', '\ud800'])
def test_names_and_configs_cannot_write_markup(tmp_path, word):
  pages = []
  for i, said in enumerate(('tame', word)):
    folder = tmp_path / str(i)
    runs = [make(folder, str(n), seed, measured('fid', n + seed), run=f'{said}{n}', config={said: said, 'n': n})
            for n in range(2) for seed in range(2)]
    pages.append(Page(report.page(records.read_runs(runs))))
  tame, hostile = pages
  assert [(tag, sorted(attrs)) for tag, attrs in hostile.tags] == [(tag, sorted(attrs)) for tag, attrs in tame.tags]
  assert all(attrs.get('href', '#')[0] == '#' or attrs['href'] == 'data:,' for _, attrs in hostile.tags)
