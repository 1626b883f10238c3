"""Every run of every sweep file fits together; sweeps are fair; papers' cells are judged by their own records."""
import functools
import importlib
import json
import re
from collections.abc import Mapping

import jax
import pytest
from conftest import ROOT

from diffusion_jax import model as model_lib
from diffusion_jax.runtime import config as config_lib
from experiments.ddpm_paper import cells, reproduce
from experiments.ddpm_paper.cells import FAIL, NO_NUMBER, NOT_COMPARABLE, NOT_RUN, PASS, Cell, Point, Scale

FILES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('experiments/*/*.py')
               if re.search(r'^RUNS\b', path.read_text('utf-8'), re.MULTILINE))
SCHEDULES = [name for name in FILES if 'noise_schedules' in name]
CHEAP = {'net.channels': '8', 'net.multipliers': '(1,)', 'net.blocks': '1', 'net.groups': '4', 'net.attention': '(1,)'}


def module_of(file):
  return importlib.import_module(file.removesuffix('.py').replace('/', '.'))


loaded = functools.cache(lambda file, name: config_lib.load(f'{ROOT / file}:{name}'))


def load(file, name):
  return loaded(file, name).copy_and_resolve_references()


def shape_of(config):
  return {'digits': (8, 8, 1)}.get(config.data.source, (config.data.size or 32,) * 2 + (3,))


def test_the_sweep_files_are_found():
  assert {f'experiments/{name}/sweep.py' for name in ('noise_schedules', 'ddpm_paper', 'iddpm')} < set(FILES)


def once(key):
  """{key(config): (file, run)} over all files: what several of them share is checked once."""
  return {key(config): (file, run) for file in reversed(FILES) for run in module_of(file).RUNS
          for config in [load(file, f'{run}-s0')]}


PARTS = 'process', 'target', 'noise', 'draw', 'weight'
FITS = once(lambda config: json.dumps([json.loads(config_lib.to_json(config))[key] for key in PARTS]
                                      + [config.net.variance, str((config.sample.sampler, config.sample.grid))]))
NETS = once(lambda config: str((dict(config.net) | {'variance': False}, shape_of(config))))


@pytest.mark.parametrize('file', FILES)
def test_every_config_is_whole(file):
  for run in module_of(file).RUNS:
    config = load(file, f'{run}-s0')
    model_lib.check(config)
    model_lib.optimizer_of(config)
    for average in config.ema.values():
      config_lib.build(average)


@pytest.mark.parametrize(('file', 'run'), FITS.values())
def test_every_run_fits_together(file, run):
  config = load(file, f'{run}-s0')
  config_lib.override(config, CHEAP)
  model = model_lib.make(config, (8, 8, 1), config.net.num_classes)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  assert shapes['net']['conv_out']['kernel'].shape[-1] == 1 + config.net.variance
  grid = config_lib.build(config.sample.grid)(model.diffusion.process, config.sample.steps, None)
  assert grid.logsnr.shape == (config.sample.steps,)


@pytest.mark.parametrize(('file', 'run'), NETS.values())
def test_every_net_fits_its_data(file, run):
  config = load(file, f'{run}-s0')
  config.net.blocks = 1  # more of them are more of the same
  shape, net = shape_of(config), config_lib.build(config.net)
  cond = {'label': jax.ShapeDtypeStruct((1,), 'int32')} if config.net.num_classes else {}
  x, noise = (jax.ShapeDtypeStruct(s, 'float32') for s in ((1, *shape), (1,)))
  params = jax.eval_shape(net.init, jax.random.key(0), x, noise, cond)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) > 10_000


@pytest.mark.parametrize('file', FILES)
def test_names_are_names_of_files(file):
  runs, seeds = list(module_of(file).RUNS), list(module_of(file).SEEDS)
  assert len(set(runs)) == len(runs) > 1 and len(set(seeds)) == len(seeds) > 0
  for run in runs:
    assert re.fullmatch(r'[a-z0-9][a-z0-9._-]{0,60}', run) and not re.search(r'-s\d+$', run)


@pytest.mark.parametrize('file', FILES)
def test_a_seed_changes_the_seed_alone(file):
  runs = list(module_of(file).RUNS)
  for run in (runs[0], runs[-1]):
    plain, first, third = (load(file, name) for name in (run, f'{run}-s0', f'{run}-s2'))
    assert not config_lib.differences(plain, first)
    assert config_lib.differences(first, third) == ['seed: 0 -> 2']


@pytest.mark.parametrize('file', FILES)
def test_no_run_is_another_one(file):
  made = [config_lib.to_json(load(file, run)) for run in module_of(file).RUNS]
  assert len(set(made)) == len(made)


@pytest.mark.parametrize('file', FILES)
def test_unknown_runs_are_refused(file):
  known = next(iter(module_of(file).RUNS))
  with pytest.raises(config_lib.UserError, match=f'did you mean {known!r}'):
    load(file, known[:-1] + 'q-s0')


# Noise schedules: what is held equal.

@pytest.mark.parametrize('file', SCHEDULES)
def test_runs_differ_in_schedule_and_target_alone(file):
  module = module_of(file)
  allowed = {False: r'(process|target)\b', True: r'(process|target|draw|noise|weight)\b'}
  base = load(file, 'linear-eps')
  for run, (schedule, _) in module.RUNS.items():
    for line in config_lib.differences(base, load(file, run)):
      assert re.match(allowed[schedule == 'edm'], line), f'{run}: {line}'
  for run in ('edm-eps', 'edm-v'):
    differ = {line.split('.')[0] for line in config_lib.differences(base, load(file, run))}
    assert differ <= {'process', 'target', 'draw'}
  assert len(module.SEEDS) >= 3


def test_every_schedule_has_both_targets_where_they_say_something_of_the_data():
  runs = module_of('experiments/noise_schedules/sweep.py').RUNS
  schedules = {'linear', 'cosine', 'sigmoid', 'laplace', 'flow', 'edm', 'shifted', 'zero-snr'}
  assert set(runs) == {f'{s}-{t}' for s in schedules for t in ('eps', 'v')} - {'zero-snr-eps'} | {'edm-published'}
  config = load('experiments/noise_schedules/sweep.py', 'zero-snr-v')
  config.target = config_lib.spec(model_lib.targets.eps)
  with pytest.raises(config_lib.UserError, match='leaves no signal'):
    model_lib.make(config, (8, 8, 1), 10)


@pytest.mark.parametrize('file', SCHEDULES)
def test_scales_differ_in_data_net_and_durations_alone(file):
  for run in module_of(file).RUNS:
    lines = config_lib.differences(load('experiments/noise_schedules/sweep.py', run), load(file, run))
    for line in lines:
      assert re.match(r'(data|net|learning_rate|ema|train|mesh|eval|sample\.batch_size)\b', line), f'{run}: {line}'
  assert list(module_of(file).RUNS) == list(module_of('experiments/noise_schedules/sweep.py').RUNS)


def test_the_common_grid_lies_within_what_each_schedule_reaches():
  for run in module_of('experiments/noise_schedules/sweep.py').RUNS:
    config = load('experiments/noise_schedules/sweep.py', run)
    process = config_lib.build(config.process)
    ends = model_lib.schedules.evaluate(process, [0.0, 1.0])
    grid = config_lib.build(config.sample.grid)(process, config.sample.steps, None)
    assert ends[0] >= grid.logsnr[-1] - 1e-4 and ends[1] <= grid.logsnr[0] + 1e-4


# Papers.

def test_the_papers_cells_have_runs():
  for paper in reproduce.PAPERS:
    for scale_name in reproduce.SCALES:
      module, scale = reproduce.scale_of(paper, scale_name)
      assert scale.comparable == (scale_name == 'full') and set(scale.images) == set(module.RUNS)
      full = reproduce.scale_of(paper, 'full')[0]
      for cell in module.CELLS:
        assert not cell.run or cell.run in full.RUNS
        assert cell.paper is not None or cell.note
      keys = [(cell.table, cell.row, cell.column) for cell in module.CELLS]
      assert len(set(keys)) == len(keys)
      assert set(full.RUNS) == {cell.run for cell in full.CELLS if cell.run}


def test_known_numbers_stand_in_their_cells():
  """The best known ones, and the shapes of the tables: DDIM's is 5 x 5 for each of two data sets."""
  ddpm, iddpm = (reproduce.scale_of(paper, 'full')[0].CELLS for paper in ('ddpm', 'iddpm'))
  value = {(c.table, c.row, c.column): c.paper for c in (*ddpm, *iddpm)}
  assert value['DDPM table 1', 'eps, L_simple', 'FID'] == 3.17
  assert value['DDPM table 1', 'eps, L_simple', 'IS'] == 9.46
  assert value['DDIM table 1, CIFAR-10', 'eta 0', 'FID, S = 50'] == 4.67
  assert value['DDIM table 1, CIFAR-10', 'sigma-hat', 'FID, S = 1000'] == 3.17  # DDPM itself
  assert value['iDDPM table 2, CIFAR-10, 500K', '4k, cosine, vlb', 'NLL'] == 2.94
  assert sum(c.table.startswith('DDIM') for c in ddpm) == 50
  # Of a row, FID falls with the number of steps.
  for row in {(c.table, c.row) for c in ddpm if c.table.startswith('DDIM')}:
    values = [c.paper for c in ddpm if (c.table, c.row) == row]
    assert values == sorted(values, reverse=True)


def test_sampler_and_grid_of_a_cell_are_written_as_records_write_them():
  from diffusion_jax.core import levels, samplers
  from diffusion_jax.sample import describe
  for paper in reproduce.PAPERS:
    for where in (c.where for c in reproduce.scale_of(paper, 'full')[0].CELLS):
      said = describe(config_lib.Config({
          key: config_lib.parse_call(where.get(key, default), module)
          for key, module, default in (('sampler', samplers, 'ddim'), ('grid', levels, 'trailing'))}))
      assert all(said[key] == where[key] for key in ('sampler', 'grid') if key in where)


def test_the_budgets_are_the_papers():
  """Ho et al. 2020, appendix B; Nichol & Dhariwal 2021, table captions: 500K, 200K and 1.5M steps of 128."""
  ddpm, iddpm = (reproduce.scale_of(paper, 'full')[1].images for paper in ('ddpm', 'iddpm'))
  assert ddpm['eps-simple'] == ddpm['mu-bound'] == 800_000 * 128
  assert [iddpm[f'{data}-4k-cosine-vlb'] / 128 for data in ('cifar10', 'imagenet64', 'imagenet64-long')] == [5e5, 2e5,
                                                                                                            1.5e6]


FID = Cell('T', 'row', 'FID', 4.00, 'a', 'fid', {'sampler': 'ddim(eta=0.0)', 'steps': 10})
SCALE = Scale('experiments/x/sweep.py', {'a': 1000}, True)


def record(value, metric='fid', **more):
  return {'metric': metric, 'value': value, 'sampler': 'ddim(eta=0.0)', 'steps': 10, 'step': 5, 'images': 1000,
          'ema': 'main', 'ci': None} | more


def judged(*lines, cell=FID, scale=SCALE, run='a'):
  return cells.judge(cell, [Point(run, 0, ROOT, list(lines))], scale)


@pytest.mark.parametrize(('value', 'more', 'verdict'), [
    (4.00, {}, PASS), (4.199, {}, PASS), (3.801, {}, PASS), (4.21, {}, FAIL), (3.79, {}, FAIL),
    (4.5, {'ci': [3.99, 5.01]}, PASS), (4.5, {'ci': [4.01, 4.99]}, FAIL), (4.5, {'ci': [None, 'x']}, FAIL)])
def test_a_cell_passes_within_the_tolerance_or_the_interval(value, more, verdict):
  found = judged(record(value, **more))
  assert (found.verdict, found.value, found.seeds) == (verdict, value, 1)


@pytest.mark.parametrize(('cell', 'value', 'verdict'), [
    (FID._replace(metric='is', paper=9.0), 9.17, PASS), (FID._replace(metric='is', paper=9.0), 9.19, FAIL),
    (FID._replace(metric='bits_per_dim_discrete_vlb', paper=3.7), 3.729, PASS),
    (FID._replace(metric='bits_per_dim_discrete_vlb', paper=3.7), 3.731, FAIL)])
def test_each_metric_has_its_tolerance(cell, value, verdict):
  assert judged(record(value, cell.metric), cell=cell).verdict == verdict


@pytest.mark.parametrize('more', [
    {'sampler': 'ddim(eta=0.2)'}, {'steps': 20}, {'ema': 'raw'}, {'metric': 'fid_floor'}, {'metric': 'fid_mean'},
    {'metric': 'sfid'}, {'value': float('nan')}, {'value': 'x'}, {'value': None}, {'metric': None}])
def test_records_of_something_else_are_no_cells(more):
  assert judged(record(4.0) | more).verdict == NOT_RUN
  assert judged(record(4.0), record(9.0) | more).value == 4.0


def test_what_was_not_run_is_said():
  assert judged() == cells.Result(NOT_RUN)
  assert judged(record(4.0), run='b').verdict == NOT_RUN


@pytest.mark.parametrize(('more', 'why'), [
    ({'metric': 'fid_5k'}, 'fid_5k is of 5k samples'), ({'images': 999}, "after 999 images, and the paper's are 1000")])
def test_another_budget_is_never_compared(more, why):
  found = judged(record(4.0) | more)
  assert (found.verdict, found.why, found.value) == (NOT_COMPARABLE, why, 4.0)


def test_tiny_is_never_compared():
  tiny = SCALE._replace(comparable=False, metrics={'fid': 'fd_digits', 'is': ''})
  found = judged(record(4.0, 'fd_digits_200'), scale=tiny)
  assert (found.verdict, found.value, found.why) == (NOT_COMPARABLE, 4.0, 'another budget')
  assert judged(record(4.0), scale=tiny).verdict == NOT_RUN
  assert 'no counterpart' in judged(record(9.46, 'is'), cell=FID._replace(metric='is'), scale=tiny).why


def test_fifty_thousand_samples_go_before_fewer_and_the_last_step_before_others():
  assert judged(record(4.0), record(9.0, 'fid_5k')).verdict == PASS
  assert judged(record(9.0, step=9), record(4.0, step=5)).value == 9.0
  assert judged(record(9.0), record(4.0)).value == 4.0  # the newest


def test_seeds_are_averaged_and_counted():
  points = [Point('a', seed, ROOT, [record(value, ci=[0, 9])]) for seed, value in enumerate((3.0, 5.0))]
  found = cells.judge(FID, points, SCALE)
  assert (found.verdict, found.value, found.seeds, found.interval) == (PASS, 4.0, 2, None)
  assert 'mean of 2 seeds' in cells.table([FID], [found])


def test_a_cell_without_a_number_neither_passes_nor_fails():
  cell = FID._replace(paper=None, note='unstable')
  assert judged(record(4.0), cell=cell).verdict == NO_NUMBER
  assert '| row | FID | - | 4.00 | no number; unstable |' in cells.table([cell], [judged(record(4.0), cell=cell)])


def write_point(root, sweep, run, *lines):
  folder = root / f'{run}-s0-00000000'
  folder.mkdir(parents=True)
  (folder / 'point.json').write_text(json.dumps({'name': f'{run}-s0', 'run': run, 'seed': 0, 'sweep': sweep}))
  (folder / 'eval.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))


def test_reproduce_fills_the_table(tmp_path, capsys):
  sweep = 'experiments/ddpm_paper/sweep.py'
  ours = {'images': 800_000 * 128, 'steps': 1000, 'sampler': 'ancestral(variance=1.0)'}
  write_point(tmp_path, sweep, 'eps-simple', record(3.2, **ours), record(9.0, 'is', **ours))
  write_point(tmp_path, 'experiments/other/sweep.py', 'mu-bound', record(13.22, **ours))
  assert reproduce.main([f'--root={tmp_path}']) == 1  # IS is off
  out = capsys.readouterr().out
  assert '| eps, L_simple | FID | 3.17 | 3.20 | **pass** |' in out
  assert '| eps, L_simple | IS | 9.46 | 9.00 | **fail**: -0.46, and 0.19 is allowed |' in out
  assert '| mu, L, fixed isotropic | FID | 13.22 | - | not run |' in out
  assert '102,400,000 training images' in out and 'Tolerance: FID 5 %' in out
  commands = [line for line in out.splitlines() if line.startswith('  ')]
  assert any('diffusion_jax.sweep run experiments/ddpm_paper/sweep.py' in line for line in commands)
  assert any('--sampler=ddim(eta=0.2)' in line.replace("'", '') and '--sweep_steps=10,20,50,100,1000' in line
             for line in commands)
  assert any('diffusion_jax.likelihood' in line and '--split=train' in line for line in commands)


def test_reproduce_without_anything_runs_nothing(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(reproduce.subprocess, 'run', lambda *_, **__: pytest.fail('it ran something'))
  for paper in reproduce.PAPERS:
    assert reproduce.main([f'--root={tmp_path}', '--scale=tiny', f'--paper={paper}']) == 0
    out = capsys.readouterr().out
    assert "Another budget than the paper's: nothing is compared." in out and 'pass' not in out and 'fail' not in out
    assert f'experiments/{paper if paper == "iddpm" else "ddpm_paper"}/tiny.py' in out


def test_run_runs_the_sweep_and_then_what_its_points_lack(tmp_path, capsys, monkeypatch):
  ran = []

  def run(argv):
    ran.append(argv[2:])
    if argv[2] == 'diffusion_jax.sweep':
      write_point(tmp_path, 'experiments/iddpm/tiny.py', 'cifar10-1k-linear-simple',
                  record(9.0, 'fd_digits_200', steps=1000))
    return type('Ended', (), {'returncode': 75 if len(ran) > 1 else 0})()

  monkeypatch.setattr(reproduce.subprocess, 'run', run)
  assert reproduce.main([f'--root={tmp_path}', '--scale=tiny', '--paper=iddpm', '--run']) == 75
  assert [argv[0] for argv in ran] == ['diffusion_jax.sweep', 'diffusion_jax.likelihood']
  assert 'the same command continues' in capsys.readouterr().err


@pytest.mark.parametrize(('flags', 'said'), [
    (['--paper=x'], "--paper must be ddpm or iddpm, got 'x'"), (['--scale=big'], '--scale must be full or tiny'),
    (['--config.seed=1'], 'would change what is reproduced')])
def test_bad_flags_are_one_sentence(flags, said):
  with pytest.raises(config_lib.UserError, match=said):
    reproduce.main(flags)


def test_broken_point_folders_are_passed_over(tmp_path):
  for name, text in {'half': '{"run": ', 'list': '[]', 'number': '{"run": 3, "sweep": "x/sweep.py"}'}.items():
    (tmp_path / name).mkdir()
    (tmp_path / name / 'point.json').write_text(text)
  assert cells.read_points(tmp_path, 'experiments/x/sweep.py') == []
  assert isinstance(FID.where, Mapping)
