"""Goals, papers' figures, the log of changes and the plot of experiments/throughput."""
import json

import pytest

from diffusion_jax.runtime.config import UserError
from experiments.throughput import cases, changes, goals, table


def record(case, ratio=1.2, interval=(1.1, 1.3), **more):
  side = {'median_ms': 100.0, 'items_per_second': 1280.0, 'cpu_ms': 1.0, 'compile_seconds': 1.0, 'peak_bytes': 1,
          'peak_share': 0.45, **more.pop('side', {})}
  return {'case': case, 'about': case, 'device': 'a cpu, 2 cores', 'time': '1', 'ratio': ratio,
          'interval': interval and list(interval), 'share_percent': None, 'verdict': 'faster',
          'sides': {'torch': side, 'jax': side}, **more}


def test_goals_are_of_cases_that_exist():
  assert {*goals.GOALS, *goals.PUBLISHED} <= set(cases.CASES)
  assert all(name in goals.PUBLISHED for name, goal in goals.GOALS.items() if goal.kind == 'published')


@pytest.mark.parametrize(('name', 'more', 'words'), [
    ('small_train', {'interval': (1.5, 1.6)}, 'at least 1.5x: reached'),
    ('small_train', {'interval': (1.3, 1.49)}, 'at least 1.5x: not reached'),
    ('small_train', {'interval': (1.4, 1.6)}, 'at least 1.5x: not told'),
    ('small_train', {'interval': (1.6, 1.7), 'verdict': 'too noisy for a verdict'}, 'at least 1.5x: not told'),
    ('small_train', {'interval': None, 'ratio': None}, 'at least 1.5x: not measured'),
    ('overhead', {'interval': (0.975, 0.99)}, 'at most 3 %: reached'),
    ('overhead', {'interval': (0.93, 0.96)}, 'at most 3 %: not reached'),
    ('overhead', {'interval': (0.96, 0.99)}, 'at most 3 %: not told'),
    ('dit_b2_train_bf16', {'interval': None}, 'at least 40 % of the peak: reached'),
    ('dit_b2_train_bf16', {'interval': None, 'side': {'peak_share': 0.3}}, 'at least 40 % of the peak: not reached'),
    ('dit_b2_train_bf16', {'interval': None, 'side': {'peak_share': None}},
     'at least 40 % of the peak: not measured'),
    ('edm_train_bf16', {'interval': None}, 'at least 8x of the published: reached'),
    ('edm_train_bf16', {'interval': None, 'side': {'items_per_second': 1000.0}},
     'at least 8x of the published: not reached'),
    ('clip_text', {}, '')])
def test_goals_are_reached_or_not_or_not_told(name, more, words):
  assert goals.goal(record(name, **more)) == words


def test_papers_figures_stand_beside_ours_with_their_source():
  assert goals.published(record('edm_train_bf16')).startswith('8.8x of 145 images/s, one V100, EDM (Karras')
  # 1280 images of 20 evaluations each.
  drawn = goals.published(record('cifar10_sample_f32', steps=20))
  assert drawn.startswith('1.7x of 15,059 network evaluations/s') and 'Ho et al. 2020' in drawn
  text = table.render([record('edm_train_bf16', None, None)])
  assert '| at least 8x of the published: reached |' in text and 'Beside what papers give:' in text
  assert 'papers' not in table.render([record('small_train')])


def test_the_plot_has_what_has_a_ratio(tmp_path):
  records = [record('small_train'), record('edm2_forward', None, None), record('overhead', share_percent=1.0),
             record('clip_text', device='b cpu, 8 cores')]
  drawn = table.pictures(records)
  assert sorted(drawn) == ['a-cpu-2-cores.png', 'b-cpu-8-cores.png']
  assert all(data.startswith(b'\x89PNG') for data in drawn.values())
  assert table.pictures([record('edm2_forward', None, None)]) == {}


def test_the_log_of_changes_is_whole_and_shown():
  lines = changes.read(table.FOLDER / 'results' / changes.NAME)
  text = changes.render(lines)
  assert len(lines) > 10 and text.count('\n') == len(lines) + 2
  assert len({row.count(' | ') for row in text.splitlines() if not row.startswith('|---')}) == 1
  table.insert((table.FOLDER / 'README.md').read_text(), text, table.CHANGES)


@pytest.mark.parametrize('change', [{'prediction': None}, {'after': ' '}, {'more': 'x'}, {'kept': True}])
def test_a_change_that_lacks_something_is_refused(change, tmp_path):
  line = dict.fromkeys(changes.FIELDS, 'x')
  path = tmp_path / changes.NAME
  path.write_text(json.dumps(line) + '\n')
  assert changes.read(path) == [line]
  path.write_text(json.dumps(line) + '\n' + json.dumps({k: v for k, v in {**line, **change}.items() if v is not None}))
  with pytest.raises(UserError, match='line 2 must have a text for each of date, what'):
    changes.read(path)
