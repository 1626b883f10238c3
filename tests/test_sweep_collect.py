"""Status and table of a sweep: read from files alone, and no average hides what is missing."""
import csv
import json
import re
import statistics
import subprocess
import sys

import pytest
from conftest import ROOT
from sweeps import LIGHT, NAMES, make_world, put, put_lines

from diffusion_jax import points, sweep


@pytest.fixture
def world(tmp_path, monkeypatch):
  return make_world(tmp_path, monkeypatch)


def fake_points(root, count, seeds=4):
  """A plan of fake points: one in four is finished, one failed, one interrupted, one waiting; the plan's file too."""
  file = put(root.parent / 'big' / 'sweep.py', LIGHT)
  made = []
  for i in range(count):
    config = {'seed': i % seeds, 'run': i // seeds, 'train': {'images': 1000}, 'ema': {'main': {}}}
    made.append(points.Point(f'r{i // seeds}-s{i % seeds}', f'r{i // seeds}', i % seeds, points.config_hash(config),
                             root / f'r{i // seeds}-s{i % seeds}-{i:08x}', 'c0de'))
    folder, kind = made[-1].folder, i % 4
    points.make(made[-1], file, [])
    if kind == 3:
      continue
    put(folder / 'config.json', json.dumps(config))
    put_lines(folder / 'attempts.jsonl', {'event': 'start', 'pid': 1, 'host': 'far', 'code': 'c0de'},
              *([{'event': 'end', 'status': kind, 'error': 'oh\x1b[31mno'}] if kind != 2 else []))
    put(folder / 'metrics.jsonl', '{"images": 1, "long": "' + 'x' * 200_000 + '"}\n'
        '{"images": 500, "images_per_second": 50.0}\n{"images": 6')
    if kind == 0:
      put(folder / 'finished.json', '{"evaluate": []}')
      put_lines(folder / 'eval.jsonl', record(i))
  points.save_plan(root, points.Plan(file, points.file_hash(file), (), 'c0de', tuple(made)))
  return file


def record(value, metric='fd_digits_24', **changes):
  return {'metric': metric, 'value': float(value), 'ema': 'main', 'step': 4, 'seed': 0, 'sampler': 'ddim', 'nfe': 2,
          'features_hash': 'f', 'reference_hash': 'r', 'num_samples': 24, **changes}


def test_200_points_are_read_from_files_without_jax(tmp_path):
  file, root = fake_points(tmp_path / 'root', 200), tmp_path / 'root'
  code = f'''
import sys
from diffusion_jax import sweep
for command in 'status', 'collect':
  assert sweep.main([command, {file!r}, '--root={root}']) == 0
assert 'jax' not in sys.modules
'''
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert done.returncode == 0, done.stderr
  assert '200 points: 50 finished, 50 failed, 50 interrupted, 50 waiting' in done.stdout
  assert len(re.findall(r'^r\d+-s1 +failed +50% +50 +status 1: oh\?\[31mno$', done.stdout, re.M)) == 50
  assert done.stdout.count('1 of 4 !') == 50 and len(re.findall('^missing: ', done.stdout, re.M)) == 150


@pytest.fixture
def finished(world):
  """The world, all its points finished, and write(name, records...), which replaces the records of one."""
  world('run')
  def write(name, *records):
    put_lines(world.folder(name) / 'eval.jsonl', *records)
  return world, write


def test_watch_ends_when_all_has_ended(finished, monkeypatch, capsys):
  """Not before: it looks again while a point waits."""
  world, _ = finished
  path = world.folder('linear-s1') / 'finished.json'
  text = path.read_text()
  path.unlink()
  monkeypatch.setattr(sweep.time, 'sleep', lambda seconds: path.write_text(text))
  capsys.readouterr()
  assert world('status --watch --every=7') == 0
  said = capsys.readouterr().out
  assert said.index('3 finished, 1 interrupted') < said.index('4 points: 4 finished') and said.count('points:') == 2


def collected(world, tmp_path, words=''):
  assert world(f'collect {words}', f'--out={tmp_path}/table.json') == 0
  return json.loads((tmp_path / 'table.json').read_text())


def test_collect_gives_mean_and_standard_error(finished, tmp_path, capsys):
  world, write = finished
  for name, value in zip(sorted(NAMES), (1, 4, 10, 20), strict=True):
    write(name, record(value), record(0, ema='raw'), record(7 * value, step=2), record(3, 'fd_digits_24_floor'))
  capsys.readouterr()
  found = collected(world, tmp_path)
  said = capsys.readouterr().out
  assert found['complete'] and not found['missing'] and '!' not in said and 'missing' not in said
  assert [(line['run'], line['metric'], line['n'], line['ema'], line['step']) for line in found['lines']] == [
      ('cosine', 'fd_digits_24', 2, 'main', 4), ('linear', 'fd_digits_24', 2, 'main', 4)]
  for line, values in zip(found['lines'], ((1, 4), (10, 20)), strict=True):
    assert line['mean'] == statistics.fmean(values)
    assert line['standard_error'] == pytest.approx(abs(values[0] - values[1]) / 2)  # of two values
  assert re.search(r'cosine +2 .* 2\.50 ± 1\.50\n', said)
  assert {line['mean'] for line in collected(world, tmp_path, '--ema=raw')['lines']} == {0}


def test_collect_lists_all_that_is_missing(finished, tmp_path, capsys):
  world, write = finished
  write('cosine-s0', record(1), record(5, 'kid_digits_24'))
  write('cosine-s1', record(4))
  write('linear-s0')
  (world.folder('linear-s1') / 'finished.json').unlink()
  put_lines(world.folder('linear-s1') / 'attempts.jsonl', {'event': 'start'},
            {'event': 'end', 'status': 1, 'error': 'not finite'})
  capsys.readouterr()
  found, said = collected(world, tmp_path), capsys.readouterr().out
  assert not found['complete'] and {*found['missing']} == {'linear-s0', 'linear-s1'}
  assert 'missing: linear-s1: failed: status 1: not finite' in said and 'missing: linear-s0: finished' in said
  assert re.search(r'linear +0 of 2 !', said) and '5.00 (n=1)' in said
  lines = {(line['run'], line['metric']): line for line in found['lines']}
  assert lines['linear', 'fd_digits_24']['mean'] is None and lines['linear', 'fd_digits_24']['n'] == 0
  assert lines['cosine', 'kid_digits_24']['lacking'] == ['cosine-s1']
  world('collect', f'--out={tmp_path}/t.csv')
  rows = [*csv.DictReader((tmp_path / 't.csv').open())]
  assert {(row['run'], row['metric']): (row['n'], row['lacking']) for row in rows} == {
      ('cosine', 'fd_digits_24'): ('2', ''), ('cosine', 'kid_digits_24'): ('1', 'cosine-s1'),
      ('linear', 'fd_digits_24'): ('0', 'linear-s0 linear-s1'),
      ('linear', 'kid_digits_24'): ('0', 'linear-s0 linear-s1')}


@pytest.mark.parametrize(('name', 'change', 'said'), [
    ('linear-s1', {'features_hash': 'g'}, 'features'), ('linear-s0', {'reference_hash': 'q'}, 'against'),
    ('cosine-s1', {'step': 5}, 'with step'), ('cosine-s1', {'seed': 1}, 'with seed')])
def test_collect_refuses_what_is_unlike(finished, tmp_path, capsys, name, change, said):
  world, write = finished
  for one in NAMES:
    write(one, record(1, **(change if one == name else {})))
  capsys.readouterr()
  assert world('collect') == 2
  out, err = capsys.readouterr()
  assert not out and said in err and name in err


def test_evaluations_by_other_settings_are_other_lines(finished, tmp_path):
  world, write = finished
  for one in NAMES:
    write(one, *(record(steps, steps=steps) for steps in (5, 10)), record(99, seed=1, steps=5, metric='fd_digits_24'),
          record(3, 'fd_digits_24_mean', seed=None, seeds=[0, 1], steps=5))
  found = collected(world, tmp_path)['lines']
  values = {(line['run'], line['metric'], line['mean']) for line in found if line['n']}
  assert values == {(run, metric, value) for run in ('cosine', 'linear')
                    for metric, value in (('fd_digits_24_mean', 3), ('fd_digits_24', 10))}


def test_a_folder_with_another_config_is_not_counted(finished, capsys):
  world, _ = finished
  path = world.folder('cosine-s0') / 'config.json'
  path.write_text(path.read_text().replace('"seed": 0', '"seed": 5'))
  capsys.readouterr()
  world('collect')
  assert 'missing: cosine-s0: its config.json is not the config of the sweep' in capsys.readouterr().out
