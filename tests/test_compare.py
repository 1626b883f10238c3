"""The table in text: what it picks, what it says of a difference, and what it refuses."""
import itertools
import os
import pathlib
import subprocess
import sys

import pytest
from test_report import HOSTILE, measured, put

from diffusion_jax import compare

ROOT = pathlib.Path(compare.__file__).parents[1]


@pytest.fixture
def runs(tmp_path, monkeypatch):
  """runs(lines of a, lines of b, ...) makes the runs a, b, ... in the working folder and names them."""
  monkeypatch.chdir(tmp_path)

  def make(*lines):
    names = 'abcdefgh'[:len(lines)]
    for name, records_of in zip(names, lines, strict=True):
      put(tmp_path / name / 'config.json', {})
      put(tmp_path / name / 'eval.jsonl', *records_of)
    return [*names]

  return make


def answer(capsys, argv):
  """(status, lines of stdout, stderr)."""
  status = compare.main(argv)
  said = capsys.readouterr()
  return status, said.out.split('\n')[:-1], said.err


def test_a_row_for_each_run_and_a_column_for_each_metric(runs, capsys):
  argv = runs([measured('fid_5k', 9.354, [8.701, 9.916]), measured('latency_seconds', .012)],
              [measured('fid_5k', 7.1, [7., 7.2]), measured('kid_5k', .0123)], [measured('fid_5k', 12.)])
  status, (head, *rows), _ = answer(capsys, argv)
  assert status == 0 and head.split()[-2:] == ['fid_5k', 'kid_5k'] and len(rows) == 3
  assert [row.split()[0] for row in rows] == ['a', 'b', 'c']
  assert rows[0].endswith('  9.35 [8.70, 9.92]  -') and rows[1].endswith('7.10 [7.00, 7.20]  0.0123')
  places = {row.index(value) for row, value in zip((head, *rows), ('fid_5k', '9.35', '7.10', '12.0'), strict=True)}
  assert len(places) == 1  # a column is a column
  assert '12 ms' in answer(capsys, [*argv, '--metric=fid_5k,latency_seconds'])[1][1]


def test_the_newest_evaluation_of_the_last_step(runs, capsys):
  argv = runs([measured('fid', 1., step=30), measured('fid', 2.), measured('fid', 3., step=30, nfe=10),
               measured('fid', 4., step=30, nfe=10, ema='raw'), measured('kid', 5., step=40)])
  for flags, values in (['--metric=fid'], ['3.00']), (['--metric=fid', '--all'], ['2.00', '1.00', '3.00', '4.00']):
    _, (_, *rows), _ = answer(capsys, argv + flags)
    assert [row.split()[-1] for row in rows] == values


def test_an_earlier_step_never_stands_for_a_run(runs, capsys):
  argv = runs([measured('fid', 1.), measured('kid', 2.), measured('fid', 3., step=30, ema='raw')])
  assert answer(capsys, [*argv, '--metric=fid'])[1][1].split()[-1] == '3.00'


def test_runs_are_compared_by_what_they_share(runs, capsys):
  argv = runs([measured('fid_mean', 1., seed=None, seeds=[0, 1]), measured('fid', 2.), measured('kid', 3., nfe=5)],
              [measured('fid', 4.)])
  _, (head, a, b, *_), _ = answer(capsys, argv)
  assert head.split()[-1] == 'fid' and a.split()[-1] == '2.00' and b.split()[-1] == '4.00'


@pytest.mark.parametrize('change', [
  {'reference_hash': '9c0d'}, {'features_hash': '1'}, {'num_samples': 50}, {'quantisation': 'truncate'},
  {'reference_samples': 7}])
def test_unlike_values_are_refused_with_one_sentence(runs, capsys, change):
  argv = runs([measured('kid', 1.), measured('fid', 2.)], [measured('kid', 1.), measured('fid', 3., **change)],
              [measured('kid', 1.), measured('fid', 2.)])
  names = itertools.combinations(argv, 2)
  refused = [pair for pair in names if answer(capsys, [*pair, '--metric=fid'])[0] == 2]
  assert refused == [('a', 'b'), ('b', 'c')]
  status, out, err = answer(capsys, argv)
  assert status == 2 and not out and err.count('\n') == 1
  assert err.startswith('error: fid of run a is ') and ', of run b ' in err
  value, = change.values()
  assert str(value) in err
  # What is alike can still be compared, where the samples were as many.
  assert answer(capsys, [*argv, '--metric=kid'])[0] == 0


def test_costs_of_unlike_devices_are_refused_only_where_they_are_asked_for(runs, capsys):
  argv = runs(*([measured('fid', 2.), measured('samples_per_second', 3., device=device)] for device in ('cpu', 'tpu')))
  assert answer(capsys, argv)[0] == 0
  status, out, err = answer(capsys, [*argv, '--metric=fid,samples_per_second'])
  assert (status, out) == (2, []) and 'on cpu, of run b on tpu: measure both on one device.' in err


def test_unlike_evaluations_of_one_run_are_refused(runs, capsys):
  argv = runs([measured('fid', 2., nfe=5), measured('fid', 3., reference_hash='other')])
  assert answer(capsys, argv)[0] == 0
  status, out, err = answer(capsys, [*argv, '--all'])
  assert (status, out) == (2, []) and err.startswith('error: fid of one evaluation is against ')


@pytest.mark.parametrize('metric, a, b, words', [
  ('fid', (9., 3.), (6., 4.), 'fid: not separable, the difference is 3.00 ± 5.00'),  # a triangle of 3, 4 and 5
  ('fid', (9., .3), (8., .4), 'fid: b is better by 1.00 ± 0.50'),
  ('fid', (8., .3), (9., .4), 'fid: a is better by 1.00 ± 0.50'),
  ('precision', (.5, .03), (.6, .04), 'precision: b is better by 0.100 ± 0.050'),
  ('precision', (.6, .03), (.5, .04), 'precision: a is better by 0.100 ± 0.050'),
  ('fid_floor', (6., .3), (5., .4), 'fid_floor: a is higher by 1.00 ± 0.50')])
def test_a_difference_is_separable_beyond_both_half_widths_together(runs, capsys, metric, a, b, words):
  argv = runs(*([measured(metric, value, [value - half, value + half], ci_level=.95)] for value, half in (a, b)))
  _, lines, _ = answer(capsys, [*argv, f'--metric={metric}'])
  assert lines[3:] == ['', words]
  assert len(answer(capsys, [*argv, 'a', f'--metric={metric}'])[1]) == 4  # of three runs nothing is said


@pytest.mark.parametrize('change', [
  {'ci': None}, {'ci_level': None}, {'ci_level': .9}, {'ci': [1]}, {'ci': ['0', '2']}, {'ci': [None, 2]},
  {'value': None}, {'value': 'x'}, {'value': float('nan')}, {'value': True}])
def test_without_two_intervals_of_one_level_nothing_is_said(runs, capsys, change):
  good = measured('fid', 9., [8., 10.], ci_level=.95)
  status, lines, _ = answer(capsys, runs([good], [{**good, **change}]))
  assert status == 0 and len(lines) == 3


def test_samples_that_were_made_otherwise_are_pointed_out(runs, capsys):
  argv = runs([measured('fid', 9., nfe=5)], [measured('fid', 9., ema='raw', guidance=1)])
  assert answer(capsys, argv)[1][-1] == 'The samples were not made alike: the runs differ in nfe, ema.'


@pytest.mark.parametrize('word', [*HOSTILE, '\x1b[2J\x07', 'two\nlines', '\ud800'])
def test_a_record_cannot_command_the_terminal(runs, capsys, word):
  for flags in [], ['--all'], ['--metric', word]:
    a = [measured('fid', 1., [0, 2], sampler=word, ema=word, reference=word, device=word), measured(word, 2., ci=word)]
    _, lines, err = answer(capsys, runs(a, a) + flags)
    assert all(line.isprintable() for line in lines) and err[:-1].isprintable() and err.count('\n') <= 1
  b = [{**record, 'reference_hash': word} for record in a]
  assert answer(capsys, runs(a, b))[2][:-1].isprintable()


@pytest.mark.parametrize('argv, words', [
  (['nowhere'], 'is not a folder'), (['a', 'empty'], 'has no config.json'), (['a', '--metric=fidd'], 'has no fidd'),
  (['c'], 'has no scores in eval.jsonl: run diffusion-jax evaluate first'),
  (['a', 'b', '--metric=kid'], 'b has no kid'),
  (['b', '--metric=fid,sfid'], 'no evaluation has both sfid and the others')])
def test_bad_input_is_answered_with_a_sentence(runs, capsys, argv, words):
  runs([measured('fid', 1.), measured('kid', 2.)], [measured('fid', 1.), measured('sfid', 1., step=3)], [])
  pathlib.Path('empty').mkdir()
  status, out, err = answer(capsys, argv)
  assert (status, out) == (2, []) and err.startswith('error: ') and words in err and err.endswith('.\n')
  assert err.count('\n') == 1


def test_the_command_needs_nothing_but_python(runs, tmp_path):
  """Where no package can be imported, words that the terminal has no signs for, and a reader who leaves early."""
  argv = runs(*([measured('fid', v, [v - 1, v + 1], sampler='Zürich')] for v in (1., 9.)))
  env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONIOENCODING': 'ascii'}
  command = [sys.executable, '-S', '-m', 'diffusion_jax.compare', *argv]
  done = subprocess.run(command, env=env, capture_output=True, check=True)
  assert b'fid: a is better by 8.00 ? 1.41' in done.stdout and b'Z?rich' in done.stdout and not done.stderr
  closed, writes = os.pipe()
  os.close(closed)
  done = subprocess.run(command, env=env, stdout=writes, stderr=subprocess.PIPE, check=False)
  os.close(writes)
  assert not done.stderr


def test_the_table_agrees_with_the_records(runs, capsys):
  """Every score of every evaluation stands in the table of all, once."""
  values = {(m, nfe): 1 + i for i, (m, nfe) in enumerate(itertools.product(('fid', 'kid', 'is'), (5, 10, 20)))}
  argv = runs([measured(m, v, nfe=nfe) for (m, nfe), v in values.items()])
  _, (head, *rows), _ = answer(capsys, [*argv, '--all'])
  assert head.split()[-3:] == ['fid', 'kid', 'is'] and len(rows) == 3
  for row in rows:
    nfe = int(row.split()[3])
    assert list(map(int, row.split()[-3:])) == [values[m, nfe] for m in ('fid', 'kid', 'is')]
