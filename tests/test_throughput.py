"""The pure parts of experiments/throughput: no clock is read here."""
import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_jax.data import pipeline
from diffusion_jax.metrics import inception
from diffusion_jax.runtime.config import UserError, build
from experiments.throughput import cases, equal, jax_side, run, stats, table


def rounds(median, noise, seed, n=20):
  return median * np.exp(noise * np.random.default_rng(seed).standard_normal(n))


@pytest.mark.parametrize('true', [0.8, 1.0, 1.5])
def test_the_interval_contains_the_true_ratio_about_as_often_as_it_says(true):
  intervals = [stats.interval(rounds(true, 0.03, 2 * i), rounds(1.0, 0.03, 2 * i + 1)) for i in range(60)]
  assert sum(low <= true <= high for low, high in intervals) >= 50
  assert all(high - low < 0.15 * true for low, high in intervals)


def test_the_ratio_is_above_one_where_ours_is_faster_and_ignores_an_outlier():
  baseline, ours = rounds(3.0, 0.01, 0), rounds(2.0, 0.01, 1)
  assert stats.ratio(baseline, ours) == pytest.approx(1.5, rel=0.02)
  ours[3] = 1000.0
  assert stats.ratio(baseline, ours) == pytest.approx(1.5, rel=0.02)
  assert stats.ratio(7 * baseline, 7 * ours) == pytest.approx(stats.ratio(baseline, ours))


def test_verdicts():
  fast, slow = rounds(1.0, 0.02, 0), rounds(1.5, 0.02, 1)
  assert stats.verdict(slow, fast) == 'faster'
  assert stats.verdict(fast, slow) == 'slower'
  assert stats.verdict(fast, rounds(1.0, 0.02, 2)) == 'no difference'


@pytest.mark.parametrize('swap', [False, True])
def test_no_verdict_if_either_side_is_noisy(swap):
  sides = [rounds(1.0, 0.01, 0), rounds(5.0, 0.5, 1)]
  assert stats.verdict(*sides[::-1] if swap else sides) == 'too noisy for a verdict'


def test_the_overhead_is_judged_by_its_interval():
  bare = rounds(1.0, 0.002, 0)
  assert stats.overhead_verdict(bare, rounds(1.01, 0.002, 1)) == 'within 3 %'
  assert stats.overhead_verdict(bare, rounds(1.10, 0.002, 2)) == 'above 3 %'
  assert stats.overhead_verdict(bare, rounds(1.031, 0.03, 3)) == 'not told from 3 %'
  assert stats.share_percent(0.97) == pytest.approx(3)
  # What both times of a pair share does not matter, however much it varies.
  drift = rounds(1.0, 0.5, 4)
  assert stats.overhead_verdict(bare * drift, rounds(1.01, 0.002, 5) * drift) == 'within 3 %'


def record(case, time, ms, device='a cpu, 2 cores', share=None, **more):
  side = {'median_ms': ms, 'cpu_ms': None if share else 2 * ms, 'compile_seconds': 1.0, 'peak_bytes': 2 ** 28}
  return {'case': case, 'about': f'about {case}', 'device': device, 'time': time, 'ratio': 1.25, 'interval': [1.2, 1.3],
          'share_percent': share, 'verdict': 'faster', 'sides': {'torch': side, 'jax': side}, **more}


def test_the_table_shows_the_newest_record_of_each_case_and_is_put_in_once():
  records = [record('overhead', '2', 3.0, share=2.0), record('small_train', '3', 7.0), record('small_train', '1', 9.0),
             record('small_train', '1', 5.0, 'b cpu, 8 cores'), record('a_case_of_the_past', '9', 1.0)]
  text = table.render(records)
  assert text == table.render(reversed(records))
  assert '7.0' in text and '9.0' not in text and 'past' not in text
  assert text.count('about small_train') == 2 and text.index('about small_train') < text.index('about overhead')
  page = f'before\n{table.BEGIN}\nold\n{table.END}\nafter\n'
  once = table.insert(page, text)
  assert once == table.insert(once, text)
  assert once.startswith('before\n') and once.endswith('\nafter\n') and 'old' not in once and text in once
  assert table.insert(once, '') == f'before\n{table.BEGIN}\n{table.END}\nafter\n'
  with pytest.raises(UserError, match='lacks the lines'):
    table.insert('no markers', text)


def test_the_readme_has_a_place_for_the_table():
  table.insert((table.FOLDER / 'README.md').read_text(), 'x\n')


def test_names_that_do_not_exist_are_refused_with_the_nearest():
  with pytest.raises(UserError, match="'smal_train'; did you mean 'small_train'"):
    cases.choose('case', cases.CASES, 'smal_train')
  assert all(name in cases.CASES for suite in cases.SUITES.values() for name in suite)


def test_the_file_of_a_device_is_named_plainly():
  assert cases.file_name('Intel(R) Xeon(R) CPU @ 2.50GHz, 2 cores') == 'intel-xeon-cpu-2.50ghz-2-cores.jsonl'


def test_the_table_names_the_quickest_baseline_and_the_limits_of_the_machine():
  side = lambda ms, share: {'median_ms': ms, 'cpu_ms': ms, 'compile_seconds': 0.0, 'peak_bytes': 2 ** 20,
                            'peak_share': share}
  limit = {'rates': {'float32': 2e11, 'copy': 1.25e10}, 'by': {'float32': 'torch', 'copy': 'jax'}, 'device': ''}
  several = record('cifar10_train', '1', 0.0, limits=limit, baseline='torch-compile', sides={
      'torch': side(11.0, 0.31), 'torch-compile': side(7.0, 0.47), 'jax': side(5.0, 0.66)})
  alone = record('edm2_forward', '1', 0.0, limits=limit, baseline=None, ratio=None, interval=None,
                 verdict='no counterpart', sides={'jax': side(3.0, 0.5)})
  lines = table.render([several, alone]).splitlines()
  assert '200 GFLOP/s (torch)' in lines[2] and '12.5 GB/s (jax)' in lines[2]
  cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[4:]]
  assert len({len(row) for row in cells}) == 1
  assert cells[2][1:3] == ['7.0', '5.0'] and '47 / 66' in cells[2]
  assert cells[3][1:5] == ['-', '3.0', 'alone', 'no counterpart'] and '- / 50' in cells[3]


@pytest.mark.parametrize('name', cases.CASES)
def test_every_case_is_one_that_both_sides_can_be_asked(name):
  case = cases.CASES[name]
  assert case.work in jax_side.WORK
  again = cases.Case(**json.loads(json.dumps(dataclasses.asdict(case))))  # as it reaches a worker
  assert dataclasses.asdict(again) == json.loads(json.dumps(dataclasses.asdict(case)))
  if not case.net:
    return
  about = cases.net_of(again)
  given = cases.inputs(dataclasses.replace(again, batch=2))
  assert all(len(a) == 2 for a in given.values())
  equal.module(about, case.dtype)
  if case.work in ('train', 'sample'):
    config = jax_side.config_of(again)  # which checks it
    assert build(config.sample.sampler).nfe(case.steps) == build(config.sample.grid)(
        build(config.process), case.steps, {}).logsnr.size == case.steps


@pytest.fixture
def tiny(monkeypatch):
  """Small networks of every family that the other library has, and the work that compares them."""
  small = {
      'ddpm': cases.Net('ddpm', 8, 3, {'channels': 32, 'multipliers': (1, 2), 'blocks': 1, 'attention': (4,)}),
      'adm': cases.Net('adm', 8, 3, {'channels': 32, 'multipliers': (1, 2), 'blocks': 1, 'attention': (4,),
                                     'head_channels': 16}),
      'text': cases.Net('text', 4, 4, {'channels': 32, 'multipliers': (1, 1), 'blocks': 1, 'depth': (1, 0), 'heads': 2,
                                       'text': 8}),
      'autoencoder': cases.Net('autoencoder', 16, 3, {'channels': (32,) * 4, 'blocks': 1, 'latent': 4}),
      'clip': cases.Net('clip', 77, 0, {'width': 16, 'depth': 2, 'heads': 2, 'mlp': 32}),
      'dit': cases.Net('dit', 4, 4, {'width': 24, 'depth': 2, 'heads': 2, 'patch': 2, 'num_classes': 5})}
  monkeypatch.setattr(cases, 'NETS', small)
  return lambda family: cases.Case(family, {'autoencoder': 'decode'}.get(family, 'forward'), 2, '')


@pytest.mark.parametrize('family', ['ddpm', 'adm', 'text', 'autoencoder', 'clip', 'dit'])
def test_both_sides_are_the_same_function(family, tiny, tmp_path):
  needs_baseline()
  from experiments.throughput import torch_side
  from experiments.throughput.worker import Job
  case = tiny(family)
  about = cases.net_of(case)
  net = equal.module(about)
  params = equal.random_params(equal.shapes(net, case))
  assert equal.write(tmp_path, net, about, params)
  ours, given = jax.jit(equal.call(net, case.work)), cases.inputs(case)
  theirs = torch_side.forward(Job(case, tmp_path, 'cpu', ''))
  apart = lambda params: cases.difference(theirs.outputs, {'output': cases.shown(ours(params, given))})
  assert apart(params) < cases.TOLERANCE['cpu', 'float32'] < apart(jax.tree.map(lambda a: 1.01 * a, params))
  assert cases.shapes_agree([leaf.size for leaf in jax.tree.leaves(params)], theirs.sizes)


def needs_baseline():
  missing = [m for m in run.BASELINE_NEEDS if importlib.util.find_spec(m) is None]
  if missing:
    pytest.skip(f"{' and '.join(missing)} missing: install the parity extra")


PIPELINE = {'size': 16, 'unet': {'channels': 8, 'multipliers': (1, 2), 'blocks': 1, 'groups': 4, 'depth': (1, 0),
                                 'heads': 2},
            'vae': {'channels': (8, 8), 'blocks': 1, 'groups': 4}, 'text': {'width': 16, 'depth': 1, 'heads': 2,
                                                                            'mlp': 16}}


def test_both_sides_draw_the_same_images_from_text(tmp_path, monkeypatch):
  needs_baseline()
  from experiments.throughput import pipeline_side, torch_side
  from experiments.throughput.worker import Job
  job = Job(cases.Case('', 'draw', 8, '', steps=3, changes=PIPELINE), tmp_path, 'cpu', '')
  ours, theirs = pipeline_side.draw(job), torch_side.draw(job)
  allowed = cases.tolerance('cpu', job.case)
  assert cases.shapes_agree(ours.sizes, theirs.sizes)
  assert np.std(ours.outputs['images']) > 10
  assert cases.difference(ours.outputs, theirs.outputs) < allowed
  monkeypatch.setattr(cases, 'NEGATIVE', 'a')
  assert cases.difference(ours.outputs, torch_side.draw(job).outputs) > allowed


@pytest.fixture
def few(monkeypatch, tmp_path):
  """A job that reads four batches of few pictures, without processes."""
  from experiments.throughput.worker import Job
  for name, value in [('PICTURES', 24), ('READ', 6), ('READ_AGAINST', 0)]:
    monkeypatch.setattr(cases, name, value)
  return Job(cases.Case('', 'read', 0, '', changes={'size': 32, 'workers': 0}), tmp_path, 'cpu', '')


def test_what_is_read_is_what_the_files_hold(few):
  from experiments.throughput import input_side
  ours = input_side.read(few)
  files = sorted((few.folder / 'pictures').glob('*/*.jpg'))
  assert len(files) == 24 and len({file.parent for file in files}) > 1
  chosen = [files[i] for i in pipeline.indices(0, 0, 6, 24)]
  assert ours.outputs['images'] == cases.shown(np.stack([np.asarray(Image.open(file)) for file in chosen]))
  assert ours.outputs['labels'] == [float(file.parent.name) for file in chosen]
  assert ours.run(1)['seconds'] > 0


def test_both_sides_read_the_same_images_in_the_same_order(few):
  needs_baseline()
  from experiments.throughput import input_side, torch_side
  ours, theirs = input_side.read(few), torch_side.read(few)
  assert cases.difference(ours.outputs, theirs.outputs) == 0
  assert theirs.run(1)['seconds'] > 0


def test_networks_without_a_counterpart_are_not_written(tmp_path):
  about = cases.NETS['edm2_xs']
  assert not equal.write(tmp_path, equal.module(about), about, None) and not list(tmp_path.iterdir())


def test_no_array_is_zero_and_all_depend_on_their_names_alone():
  tree = {'a': {'kernel': jnp.zeros((3, 3, 16, 64)), 'bias': jnp.zeros(64)}, 'b': {'scale': jnp.zeros(64)}}
  params = equal.random_params(tree)
  assert all((np.abs(leaf) > 0).mean() > 0.99 for leaf in jax.tree.leaves(params))
  assert params['a']['kernel'].var() == pytest.approx(1 / (3 * 3 * 16), rel=0.05)
  assert (equal.random_params({'b': tree['b']})['b']['scale'] == params['b']['scale']).all()


@pytest.fixture
def inception_shapes():
  """The names and shapes of the PyTorch port."""
  return json.loads((pathlib.Path(__file__).parent / 'fixtures' / 'inception_keys.json').read_text())


def test_both_sides_take_the_same_weights_of_the_inception_network(inception_shapes):
  assert {name: list(shape) for name, shape in jax_side.inception_shapes().items()} == inception_shapes
  arrays = cases.weights(inception_shapes)
  params = inception.from_torch(arrays)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(a.size for a in arrays.values())


def test_weights_depend_on_their_name_and_shape_alone():
  shapes = {'a.conv.weight': (64, 32, 3, 3), 'a.bn.weight': (64,), 'a.bn.running_var': (64,), 'a.bn.bias': (64,)}
  arrays, again = cases.weights(shapes), cases.weights(dict(reversed(shapes.items())))
  assert all((arrays[name] == again[name]).all() and arrays[name].shape == shape for name, shape in shapes.items())
  assert arrays['a.conv.weight'].std() == pytest.approx(np.sqrt(2 / (32 * 3 * 3)), rel=0.02)
  assert min(arrays['a.bn.running_var'].min(), arrays['a.bn.weight'].min()) > 0.5
  assert not np.array_equal(arrays['a.bn.running_var'], arrays['a.bn.weight'])
  assert np.abs(arrays['a.bn.bias']).max() <= 0.3


def test_the_baseline_is_the_inception_network(inception_shapes):
  torch = pytest.importorskip('torch', reason='torch missing: install the parity extra')
  from experiments.throughput import torch_inception
  with torch.device('meta'):
    found = torch_inception.Inception().state_dict()
  names = {name: list(a.shape) for name, a in found.items() if not name.endswith('num_batches_tracked')}
  assert names == inception_shapes
  for size in (17, 32, 299, 320):
    images = np.random.default_rng(size).integers(0, 256, (2, size, size + 3, 3), np.uint8)
    theirs = torch_inception.prepare(torch.from_numpy(images)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(inception.prepare(images), theirs, rtol=0, atol=2e-6)
