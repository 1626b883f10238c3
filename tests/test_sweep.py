"""Laws of sweeps: what is run, skipped, resumed and retried, and what a point is identified by."""
import contextlib
import dataclasses
import datetime
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest
from conftest import ROOT
from sweeps import NAMES, SWEEP, Children, Killed, make_world, put
from test_layers import imports

from diffusion_jax import attempt, points, progress, sweep
from diffusion_jax.runtime import log
from diffusion_jax.runtime.config import UserError


@pytest.fixture
def world(tmp_path, monkeypatch):
  return make_world(tmp_path, monkeypatch)


def change_code(monkeypatch, version='0123456789ab'):
  monkeypatch.setattr(points, 'code_version', lambda: version)


# End to end

class Here(attempt.Children):
  """Trains and evaluates really, in this process, which has compiled much of it already."""

  def run(self, command, *flags):
    return importlib.import_module(f'diffusion_jax.{command}').main(flags)


def test_a_point_is_trained_and_evaluated(world, tmp_path, monkeypatch, capsys):
  """One point really, others by fakes, and one table of them."""
  with monkeypatch.context() as m:
    m.setattr(attempt, 'Children', Here)
    assert world('run --only=cosine-s0') == 0
  folder = world.folder('cosine-s0')
  assert {'config.json', 'metrics.jsonl', 'eval.jsonl', 'done.json', 'point.json', 'finished.json'} <= {
      path.name for path in folder.iterdir()}
  start, end = [line for line in log.read_lines(folder / 'attempts.jsonl') if line['event'] != 'submit']
  assert (start['event'], end['event'], end['status']) == ('start', 'end', 0)
  about = json.loads((folder / 'point.json').read_text())
  assert (about['name'], about['run'], about['seed']) == ('cosine-s0', 'cosine', 0)
  assert about['config_hash'] == points.config_hash(json.loads((folder / 'config.json').read_text()))
  found = next(line for line in log.read_lines(folder / 'eval.jsonl') if line['metric'] == 'fd_digits_24')

  assert world('run --only=linear*') == 0 and Children.trained == ['linear-s0', 'linear-s1']
  capsys.readouterr()
  assert world('status') == 0
  said = capsys.readouterr().out
  assert re.search(r'cosine-s0 +finished +trained', said) and re.search(r'cosine-s1 +waiting', said)
  assert '4 points: 3 finished, 1 waiting' in said
  assert world('collect --only=cosine --metric=fd_digits_24') == 0
  table = capsys.readouterr().out
  assert 'missing: cosine-s1: waiting' in table and '1 of 2 !' in table and '(n=1)' in table
  assert world('collect', '--only=cosine', f'--out={tmp_path}/t.json') == 0
  line = next(one for one in json.loads((tmp_path / 't.json').read_text())['lines'] if one['metric'] == 'fd_digits_24')
  assert line['mean'] == found['value'] and line['n'] == 1 and line['standard_error'] is None


def test_the_newer_folder_of_a_point_is_the_one_made_later_whatever_the_clock(tmp_path, monkeypatch):
  class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
      return next(times)

  times = (datetime.datetime(year, 1, 1, tzinfo=datetime.UTC) for year in (2030, 2020, 2010))  # goes back
  monkeypatch.setattr(points.datetime, 'datetime', Clock)
  made = [points.Point('a-s0', 'a', 0, 'hash', tmp_path / f'a-s0-{code}', code) for code in ('one', 'two', 'three')]
  for point in made:
    points.make(point, 'sweep.py', ())
  assert [about['folder'] for about in points.folders(tmp_path)['a-s0']] == [point.folder for point in made]


def test_run_launcher_point_and_train_are_processes(tmp_path):
  """All of them real, of a point whose data there is not."""
  text = SWEEP.replace('seed=seed', "seed=seed, data__source='npz:/no/such/file.npz'")
  file, root = put(tmp_path / 'sweep.py', text), tmp_path / 'root'
  words = [sys.executable, '-m', 'diffusion_jax.sweep', 'run', file, f'--root={root}', '--only=cosine-s1', '--slots=1']
  env = os.environ | {'PYTHONPATH': f'{ROOT / "tests"}{os.pathsep}{ROOT}'}
  done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 1 and '1 failed' in done.stdout, done.stdout + done.stderr
  assert re.search('cosine-s1: failed status 2: error: .*/no/such/file.npz', done.stdout)
  folder, = root.glob('cosine-s1-*')
  kinds = [line['event'] for line in log.read_lines(folder / 'attempts.jsonl')]
  assert kinds == ['submit', 'start', 'end'] and not progress.held(folder)


# What run and retry take

@pytest.mark.parametrize(('ends', 'state', 'run', 'retry', 'retry_all'), [
    ([], 'finished', False, False, False),
    ([75], 'interrupted', True, True, True),
    ([137], 'interrupted', True, True, True),
    ([0, 143], 'interrupted', True, True, True),      # trained, and stopped while evaluating
    (['killed'], 'interrupted', True, True, True),    # ended without a word
    ([2], 'failed', False, False, True),
    ([0, 1], 'failed', False, False, True),
    (None, 'waiting', True, False, False)])
def test_what_is_skipped_resumed_and_retried(world, capsys, ends, state, run, retry, retry_all):
  if ends is None:
    world('run --only=cosine-s1')
  else:
    Children.ends[:] = ends
    with contextlib.suppress(Killed):
      world('run --only=cosine-s0')
  assert world.states()['cosine-s0'] == state
  trained = (world.folder('cosine-s0') / 'done.json').exists() if ends is not None else False
  for command, taken in ('retry', retry), ('retry --all', retry_all), ('run', run):
    capsys.readouterr()
    assert world(f'{command} --only=cosine-s0 --dry_run') == 0
    assert (capsys.readouterr().out.strip().splitlines()[-1] == 'plain: cosine-s0') == taken, command
  Children.ends.clear()
  Children.trained.clear()
  world('run --only=cosine-s0' if run else 'retry --all --only=cosine-s0')
  assert world.states()['cosine-s0'] == 'finished'
  assert Children.trained == ([] if trained else ['cosine-s0'])


def test_a_failure_says_why(world, capsys):
  Children.ends[:] = [2]
  world('run --only=cosine-s0')
  world('status')
  assert re.search(r'cosine-s0 +failed.* status 2: a sad story\n', capsys.readouterr().out)


def test_a_dry_run_writes_nothing_and_passes_options(world, capsys):
  assert world('run --dry_run --flavour=sweet') == 0
  assert capsys.readouterr().out.endswith('sweet: ' + ' '.join(NAMES) + '\n')
  assert not world.root.exists() and world.fake.calls == []


def test_what_is_queued_is_not_submitted_again(world):
  world.fake.here = False
  world('run')
  world.fake.living = {f'id-{world.folder("cosine-s0").name}'}
  world('run')
  assert world.fake.calls == NAMES + NAMES[1:]


def test_new_flags_of_evaluation_cost_no_training(world):
  world('run')
  pathlib.Path(world.file).write_text(SWEEP.replace('--num=24', '--num=20'))
  world('run')
  assert Children.trained == NAMES and world.fake.calls == 2 * NAMES
  assert set(world.states().values()) == {'finished'}


# Identity

def test_a_folder_is_named_by_config_and_code(world, monkeypatch, tmp_path):
  folder = lambda: {point.name: point.folder for point in points.plan(world.file, world.root).points}
  before = folder()
  assert before == folder() and len({*before.values()}) == 4
  pathlib.Path(world.file).write_text(SWEEP.replace('sample__steps=2', 'sample__steps=3'))
  assert not {*before.values()} & {*folder().values()}
  pathlib.Path(world.file).write_text(SWEEP)
  change_code(monkeypatch)
  assert not {*before.values()} & {*folder().values()}


def test_other_code_neither_computes_again_nor_mixes_unasked(world, monkeypatch, capsys):
  Children.ends[:] = [0, 0, 75]
  world('run --only=cosine')
  begun = world.folder('cosine-s1')
  change_code(monkeypatch)
  capsys.readouterr()
  assert world('run --only=cosine') == 0
  said = capsys.readouterr().out
  assert 'finished by other code' in said and 'begun by other code' in said and world.fake.calls == NAMES[::2]
  argv = [world.file, f'--root={world.root}', '--name=cosine-s1']
  assert sweep.main(['point', *argv]) == 2 and 'begun by other code' in capsys.readouterr().err
  assert world('run --only=cosine --any_code') == 0
  assert (begun / 'finished.json').exists() and len([*world.root.glob('cosine-s*')]) == 2
  world('collect --only=cosine')
  assert 'made by several code versions' in capsys.readouterr().out
  world('run --only=cosine --again')
  assert len([*world.root.glob('cosine-s*')]) == 4 and Children.trained[-2:] == NAMES[::2]
  assert world.states()['cosine-s0'] == 'finished'
  world('run --only=cosine')  # what is there by this code is taken, with or without --again
  assert len(world.fake.calls) == 5


def test_a_changed_config_is_refused_by_point_and_planned_anew_by_run(world, capsys):
  Children.ends[:] = [75]
  world('run --only=cosine-s0')
  pathlib.Path(world.file).write_text(SWEEP.replace('sample__steps=2', 'sample__steps=3'))
  assert sweep.main(['point', world.file, f'--root={world.root}', '--name=cosine-s0']) == 2
  assert 'sample.steps: 2 -> 3' in capsys.readouterr().err
  world('run --only=cosine-s0')
  assert len([*world.root.glob('cosine-s0-*')]) == 2 and '1 folders' in capsys.readouterr().out


def test_the_code_version_is_of_what_makes_numbers():
  """All that train and evaluate import, found here by parsing, and neither pages nor sweeps."""
  package = ROOT / 'diffusion_jax'
  found = {(package / name).relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')
           for name in points.sources(package)}
  everything = {path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.') for path in package.rglob('*.py')}
  assert {'diffusion_jax.train', 'diffusion_jax.sample', 'diffusion_jax.core.losses'} <= found < everything
  for name in found:
    assert imports((ROOT / f'{name.replace(".", "/")}.py').read_text('utf-8')) & everything <= found, name
  assert not found & {'diffusion_jax.sweep', 'diffusion_jax.points', 'diffusion_jax.report', 'diffusion_jax.cli'}


@pytest.mark.parametrize(('old', 'new', 'said'), [
    ("'cosine': 'cosine'", "'../x': 'cosine'", 'RUNS'), ("'cosine': 'cosine'", "'a/b': 'cosine'", 'RUNS'),
    ("'cosine': 'cosine'", "'..': 'cosine'", 'RUNS'), ("'cosine': 'cosine'", "'a\\nb': 'cosine'", 'RUNS'),
    ("'cosine': 'cosine'", "'-x': 'cosine'", 'RUNS'), ("'cosine': 'cosine'", "'x-s1': 'cosine'", 'like a seed'),
    ('range(2)', '[0, 0]', 'SEEDS has 0 twice'), ('range(2)', '[-1]', 'SEEDS'), ('range(2)', '[]', 'SEEDS'),
    ('range(2)', '[True]', 'SEEDS'), ("'--ema=main'", "'--workdir=/'", 'EVALUATE'), ("'--ema=main'", '3', 'EVALUATE'),
    ('seed=seed', 'seed=0', 'the same config'), ('RUNS, SEEDS =', 'A, SEEDS =', 'has no RUNS'),
    ('sample__steps=2', 'sample__steps=0', 'sample.steps must be at least 1'),
    ('RUNS[name]', '1 / 0', 'cannot be read'), ('RUNS, SEEDS', 'RUNS SEEDS', 'cannot be read')])
def test_bad_sweep_files_are_refused_in_one_sentence(world, capsys, old, new, said):
  assert old in SWEEP
  pathlib.Path(world.file).write_text(SWEEP.replace(old, new))
  assert world('run') == 2
  err = capsys.readouterr().err
  assert said in err and err.startswith('error: ') and err.count('\n') == 1
  assert not world.root.exists()


def test_a_root_is_of_one_sweep(world, capsys, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  world('run --only=cosine-s0')
  other = put(tmp_path / 'question' / 'larger.py', SWEEP)
  for command in 'run', 'status', 'collect', 'cancel':
    assert sweep.main([command, other, f'--root={world.root}']) == 2 and 'larger.py' in capsys.readouterr().err
  roots = [points.root_of(file, None) for file in (world.file, other)]
  assert list(map(str, roots)) == ['runs/question', 'runs/question-larger']


@pytest.mark.parametrize(('words', 'said'), [
    ('status', 'nothing was run'), ('collect', 'nothing was run'), ('cancel', 'nothing was run'),
    ('run --only=cosin-s0', "did you mean 'cosine-s0'"), ('run --launcher=moon', 'moon'), ('fly', 'fly'),
    ('point --name=../../etc', 'has no point'), ('run --root=gs://b/x', 'locks'), ('collect --out=x.txt', '.csv')])
def test_bad_flags_are_refused_in_one_sentence(world, capsys, words, said):
  assert world(words) == 2
  err = capsys.readouterr().err
  assert said in err and err.startswith('error: ') and err.count('\n') == 1


def test_a_plan_that_is_not_one_is_refused(tmp_path):
  for text in '{', '[]', '{"points": [{}]}', '{"points": 3}':
    put(tmp_path / 'sweep.json', text)
    with pytest.raises(UserError, match=r'sweep\.json'):
      points.load_plan(tmp_path)


def test_launchers_are_what_sweep_expects():
  """Every launcher that is there has the interface, and no option whose name sweep takes."""
  taken = {'root', 'only', 'allow', 'any_code', 'again', 'all', 'launcher', 'dry_run', 'help'}
  for name in sweep.LAUNCHERS:
    if (ROOT / 'launch' / f'{name}.py').exists():
      module = sweep.launcher_of(name)
      assert isinstance(module, types.ModuleType) and isinstance(module.WAITS, bool)
      assert all(callable(getattr(module, word)) for word in ('render', 'submit', 'cancel', 'alive'))
      assert not taken & {field.name for field in dataclasses.fields(module.OPTIONS)}
