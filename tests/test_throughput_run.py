"""How experiments/throughput asks the sides and judges what they say, with fakes: no clock is read here."""
import dataclasses
import pathlib
import time
from types import SimpleNamespace

import jax
import pytest

from diffusion_jax import topology
from diffusion_jax.runtime import log
from diffusion_jax.runtime.config import UserError
from experiments.throughput import cases, equal, jax_side, processes, run, scaling, stats, worker


def ready(outputs=None, **more):
  return {'sizes': [6], 'outputs': outputs, 'compile_seconds': 0.5, 'setting': '', 'versions': {}, **more}


def test_sides_whose_outputs_differ_are_not_timed():
  a = {'x': [1.0, -10.0], 'y': [100.0, 0.0]}
  check = lambda *both: run.check_equal('case', ('torch', 'jax'), both, 1e-4)
  assert cases.difference(a, a) == 0
  near, far = {'x': [1.0001, -10.0], 'y': [100.0, 0.0]}, {'x': [1.01, -10.0], 'y': [100.0, 0.0]}
  assert cases.difference(a, near) == pytest.approx(1e-5)
  assert cases.difference(a, far) == pytest.approx(1e-3)
  check(ready(a), ready(near))
  check(ready(), ready())
  nan, short, other = {**a, 'y': [100.0, float('nan')]}, {**a, 'y': [100.0]}, {'x': a['x'], 'z': a['y']}
  for outputs in (far, nan, short, other):
    with pytest.raises(UserError, match='the outputs of torch and jax differ by'):
      check(ready(a), ready(outputs))
  with pytest.raises(UserError, match='the two networks differ: torch has 6 parameters and jax 7'):
    check(ready(), {**ready(), 'sizes': [7]})


class FakeWorker:
  """A side whose iterations take as many seconds as its name says, and which writes down what it is asked."""
  log = None

  def __init__(self, side, name, case, platform, folder):
    self.side, self.case = side, case

  def ask(self, do, **request):
    self.log.append((self.side, do))
    if do == 'warm_up':
      if self.side == 'torch-plain':
        raise run.WorkerDied('no such layout here')
      return ready({'x': [1.0]}, flops=4e9 if self.side == 'jax' else None)
    seconds = {'jax': 0.25, 'torch': 1.0, 'torch-compile': 0.5}[self.side]
    return {'seconds': seconds, 'cpu_seconds': seconds, 'peak_bytes': 1}

  def close(self):
    self.log.append((self.side, 'close'))


@pytest.fixture
def asked(monkeypatch):
  """What fake workers were asked, on a machine that is quiet."""
  monkeypatch.setattr(FakeWorker, 'log', log := [])
  monkeypatch.setattr(run, 'Worker', FakeWorker)
  monkeypatch.setattr(run, 'Watch', lambda workers: SimpleNamespace(share=lambda: 0.0))
  return log


def test_a_case_is_judged_against_the_quickest_baseline_that_works_and_the_peak(asked, capsys):
  limit = {'rates': {'float32': 32e9, 'copy': 1e10}, 'by': {'float32': 'jax', 'copy': 'jax'}, 'device': 'a GPU x1'}
  found = run.measure('c', cases.Case('', 'forward', 8, '', cases.TORCH), 'gpu', limit, 4, False)
  assert found['baseline'] == 'torch-compile' and found['ratio'] == 2.0 and found['device'] == 'a GPU x1'
  assert list(found['sides']) == ['torch', 'torch-compile', 'jax'] and 'without torch-plain' in capsys.readouterr().out
  assert found['sides']['jax']['peak_share'] == pytest.approx(0.5)
  assert found['sides']['torch']['peak_share'] == pytest.approx(0.125)
  assert found['sides']['jax']['items_per_second'] == pytest.approx(32)
  assert asked[0] == ('jax', 'warm_up')  # it writes the weights of the others
  measured = [side for side, do in asked if do == 'measure'][3:]  # after one of each that says how long they take
  assert sorted(measured[:3]) == sorted(measured[3:6]) and len(measured) == 12
  assert {measured[i] for i in range(0, 12, 3)} == set(found['sides'])  # all begin a round
  assert {side for side, do in asked if do == 'close'} == set(cases.TORCH)
  run.report(found)


def test_a_case_without_a_counterpart_has_times_and_no_ratio(asked):
  found = run.measure('c', cases.Case('', 'forward', 8, '', ('jax',)), 'cpu', None, 2, False)
  assert found['ratio'] is None and found['baseline'] is None and found['verdict'] == 'no counterpart'
  assert found['sides']['jax']['flops_per_second'] == pytest.approx(16e9)
  assert found['sides']['jax']['peak_share'] is None
  run.report(found)


def test_no_verdict_while_others_use_the_machine(asked, monkeypatch):
  monkeypatch.setattr(run, 'Watch', lambda workers: SimpleNamespace(share=lambda: 0.5))
  found = run.measure('c', cases.Case('', 'forward', 8, ''), 'cpu', None, 3, False)
  assert found['verdict'] == 'machine too busy for a verdict' and found['others'] == 0.5


def test_what_others_take_of_the_machine():
  stat = 'cpu  100 20 30 1000 50 1 2 7 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n'
  assert processes.busy_ticks(stat) == (160, 1210)
  if pathlib.Path('/proc/self/stat').exists():
    assert worker.group_seconds() > 0.8 * time.process_time() > 0
    assert not list(worker.group_ticks([-1]))
  assert stats.others_share((100, 1000, 50), (300, 1400, 150)) == pytest.approx(0.25)
  assert stats.others_share((100, 1000, 50), (110, 1400, 90)) == 0  # ticks are rounded
  assert stats.quiet(0.05) and stats.quiet(None) and not stats.quiet(0.2)


def test_slow_work_is_measured_less_often():
  fast, slow, slower = (run.plan(seconds, None, False) for seconds in (0.01, 3.0, 100.0))
  assert fast['refill'] and not slow['refill'] and fast['iterations'] > slow['iterations'] == 1
  assert fast['rounds'] > slow['rounds'] > slower['rounds'] >= 5
  assert run.plan(100.0, 3, False)['rounds'] == 3
  assert run.plan(0.01, None, True)['rounds'] < fast['rounds']


def test_a_limit_is_the_most_that_was_met():
  answers = [[{'rates': {'float32': 1.0, 'copy': 5.0}}, {'rates': {'float32': 3.0, 'copy': 4.0}}],
             [{'rates': {'float32': 2.0, 'copy': 6.0}}]]
  found = processes.best_of(['jax', 'torch'], [{'device': ''}, {'device': 'a GPU x1'}], answers)
  assert found == {'device': 'a GPU x1', 'rates': {'float32': 3.0, 'copy': 6.0}, 'by': {'float32': 'jax',
                                                                                       'copy': 'torch'}}


def test_warming_up_takes_less_of_what_takes_long(monkeypatch):
  clock, calls = iter(range(0, 1000, 4)), []
  monkeypatch.setattr(worker.time, 'perf_counter', lambda: next(clock))
  worker.warm_up(calls.append)
  assert calls == [1, 1]
  monkeypatch.setattr(worker.time, 'perf_counter', lambda: 0.0)
  worker.warm_up(calls.append)
  assert len(calls) == 2 + worker.WARM_UP_ITERATIONS


def point(sweep, value, exponent, time='1', **more):
  ms = 3.0 * value ** exponent
  return {'sweep': sweep, 'value': value, 'time': time, 'median_ms': ms, 'flops': 1e6 * value, 'device': 'a cpu',
          'times_ms': [0.9 * ms, ms, 1.1 * ms], **more}


def test_the_exponents_of_time_and_arithmetic_are_those_of_the_points():
  assert scaling.slope([(x, 7 * x ** 1.7) for x in (3, 5, 40)]) == pytest.approx(1.7)
  records = [point('batch', n, 0.8) for n in (8, 16, 32)] + [point('steps', 10, 1.0)]
  words = scaling.summary(scaling.newest(records))
  assert 'exponent 0.80, arithmetic with 1.00' in words and '10: 30.0 ms' in words


def test_the_newest_point_of_each_value_is_drawn(tmp_path, capsys):
  old, new = point('width', 64, 1.0, '1'), point('width', 64, 2.0, '2')
  other = point('width', 32, 1.0, '1')
  curves = scaling.newest([new, old, other, point('of_the_past', 1, 1.0)])
  assert curves == {'width': [other, new]}
  log.append(tmp_path / 'a-cpu.jsonl', *curves['width'])
  assert scaling.main(['--draw', f'--out={tmp_path}']) == 0
  assert (tmp_path / 'a-cpu.png').read_bytes().startswith(b'\x89PNG')
  with pytest.raises(UserError, match='no records to draw'):
    scaling.main(['--draw', f'--out={tmp_path / "none"}'])
  with pytest.raises(UserError, match="'wdth'; did you mean 'width'"):
    scaling.main(['--sweeps=wdth'])


@pytest.mark.parametrize(('sweep', 'least', 'most'), [('batch', 2, 2), ('width', 2, 4), ('resolution', 3.5, 16)])
def test_one_thing_changes_along_a_sweep_and_the_arithmetic_grows_with_it(sweep, least, most):
  first, second = (scaling.case_of(sweep, value) for value in scaling.SWEEPS[sweep][:2])
  changed = [f.name for f in dataclasses.fields(first) if getattr(first, f.name) != getattr(second, f.name)]
  assert len(changed) == 1

  def work(case):  # of a pass, with convolutions as they are by definition
    net = equal.module(cases.net_of(case))
    with topology.as_if_on('tpu'):
      return jax_side.counted(jax.jit(equal.call(net, 'forward')).trace(equal.shapes(net, case), cases.inputs(case)))

  assert least * 0.999 <= work(second) / work(first) <= most * 1.001
