"""What differs between two runs is said, what does not is not, and a difference is weighed by its interval."""
import math
import random
import statistics

import pytest
from test_report import HOSTILE, make_run, measured, png, put

from diffusion_jax import diff


@pytest.fixture
def pair(tmp_path):
  return make_run(tmp_path / 'one'), make_run(tmp_path / 'two')


def answer(capsys, *argv):
  """(status, the parts of the answer by title, stderr)."""
  status = diff.main([*map(str, argv)])
  said = capsys.readouterr()
  parts = [part.split('\n') for part in said.out.rstrip('\n').split('\n\n')]
  return status, {lines[0].split(':')[0]: lines for lines in parts}, said.err


def test_equal_runs_do_not_differ(pair, capsys):
  status, parts, err = answer(capsys, *pair)
  assert status == 0 and not err
  for title in ('config', 'code and versions', 'training'):
    assert parts[title] == [f'{title}: no difference in the records']
  assert parts['data'] == ['data: no difference in the records: there are none']
  values = [line for line in parts['values'] if line.startswith('  fd_digits')]
  assert len(values) == 2 and all(line.endswith('the same') for line in values)


def test_the_keys_that_differ_are_named_with_both_values_and_no_others(pair, capsys):
  one, two = pair
  put(one / 'config.json', {'seed': 0, 'net': {'fn': 'm:UNet', 'channels': 16, 'groups': 4}, 'only': 1})
  put(two / 'config.json', {'seed': 0, 'net': {'fn': 'm:DiT', 'channels': 32, 'groups': 4}})
  put(one / 'data_card.json', {'hash': 'ab', 'split': 'train'})
  put(two / 'data_card.json', {'hash': 'cd', 'split': 'train'})
  put(one / 'run.json', {'git_revision': 'aa', 'versions': {'jax': '1', 'numpy': '2'}, 'device': 'cpu'})
  put(two / 'run.json', {'git_revision': 'bb+', 'versions': {'jax': '3', 'numpy': '2'}, 'device': 'tpu'})
  _, parts, _ = answer(capsys, *pair)
  cells = lambda title: [line.split() for line in parts[title][2:]]
  assert cells('config') == [['net', 'UNet', 'DiT'], ['net.channels', '16', '32'], ['only', '1', '-']]
  assert cells('data') == [['hash', 'ab', 'cd']]
  assert cells('code and versions') == [['git_revision', 'aa', 'bb+'], ['jax', '1', '3']]
  assert cells('training') == [['device', 'cpu', 'tpu']]


def said_of(capsys, pair, a, b):
  """The line of the metric of both records."""
  for folder, record in zip(pair, (a, b), strict=True):
    put(folder / 'eval.jsonl', record)
  _, parts, _ = answer(capsys, *pair)
  return next(line for line in parts['values'] if line.startswith(f'  {a["metric"]}'))


@pytest.mark.parametrize('metric, a, b, words', [
  ('fid', (9., .5), (6., .5), 'b is better by 3.00, p < 0.001'),
  ('precision', (.9, .01), (.6, .01), 'a is better by 0.300, p < 0.001'),
  ('fid', (9., 3.), (6., 4.), 'not separable'), ('mine', (9., .5), (6., .5), 'a is higher by 3.00')])
def test_a_difference_is_weighed(pair, capsys, metric, a, b, words):
  records = [measured(metric, value, [value - half, value + half], ci_level=.95) for value, half in (a, b)]
  assert words in said_of(capsys, pair, *records)


@pytest.mark.parametrize('level', [.5, .9, .95, .99])
def test_p_is_what_the_level_says(level):
  """Two values apart by exactly the half-width of the difference at a level differ with p = 1 - level."""
  half_a, half_b = .3, .4  # a difference's is .5
  a, b = (measured('fid', value, [value - half, value + half], ci_level=level)
          for value, half in ((1., half_a), (1.5, half_b)))
  assert diff.tested(a, b) == pytest.approx(1 - level)
  assert diff.tested(b, a) == pytest.approx(1 - level)
  other = level + .005
  assert diff.tested(a, {**b, 'ci_level': other}) is None and diff.tested(a, {**b, 'ci': None}) is None


def test_equal_values_are_called_different_as_rarely_as_promised():
  """Of pairs that differ by chance alone, 5 % have p < 0.05; of ten scores corrected together, at most 5 % have any."""
  draw, normal = random.Random(0), statistics.NormalDist()
  half, families, false, alone = normal.inv_cdf(.975), 1000, 0, 0
  for _ in range(families):
    ps = []
    for _ in range(10):
      a, b = (measured('fid', v := draw.gauss(0, 1), [v - half, v + half]) for _ in range(2))
      ps.append(diff.tested(a, b))
    alone += ps[0] < .05
    false += min(diff.holm(ps)) < .05
  spread = 4 * math.sqrt(.05 * .95 / families)
  assert abs(alone / families - .05) < spread and false / families < .05 + spread


@pytest.mark.parametrize('ps', [[], [.2], [.01, .04, .03], [.5, .001, .5, .02], [1., 1.]])
def test_corrected_p_keep_their_order_and_lie_between_p_and_bonferroni(ps):
  corrected = diff.holm(ps)
  for p, c in zip(ps, corrected, strict=True):
    assert p <= c <= min(1, p * len(ps))
  by_p = [corrected[i] for i in sorted(range(len(ps)), key=ps.__getitem__)]
  assert by_p == sorted(by_p)
  if ps:
    assert min(corrected) == min(1, min(ps) * len(ps))  # the least is corrected for all


def test_unlike_values_are_not_paired_and_the_reason_is_said(pair, capsys):
  put(pair[0] / 'eval.jsonl', measured('fid', 9., [8, 10]), measured('fid', 8., nfe=10))
  put(pair[1] / 'eval.jsonl', measured('fid', 5., [4, 6], reference_hash='other'))
  _, parts, _ = answer(capsys, *pair)
  text = '\n'.join(next(lines for title, lines in parts.items() if title.startswith('values')))
  assert 'better' not in text and 'not compared: fid of a is against ab12, of b against other' in text
  assert 'only a has, of samples made so: fid' in text


def test_pictures_of_the_same_ids_are_compared(pair, capsys):
  for i, width in enumerate((8, 9)):
    for name in range(3):
      (pair[i] / f'samples/final/{name:06d}.png').write_bytes(png(8 if name == 1 else width))
  (pair[0] / 'samples/final/000007.png').write_bytes(png())
  _, parts, _ = answer(capsys, *pair)
  assert parts['images'][1:] == ['  samples/final: 3 ids in both, 1 of them the same picture; 1 ids in one only']


def test_long_answers_are_cut_and_all_shows_them(pair, capsys):
  put(pair[0] / 'config.json', {f'key{i:02d}': 'x' * 200 for i in range(40)})
  _, short, _ = answer(capsys, *pair)
  _, full, _ = answer(capsys, *pair, '--all')
  assert len(short['config']) < len(full['config']) and '--all shows them' in short['config'][-1]
  for i in range(40):
    assert sum(f'key{i:02d}' in line and 'x' * 200 in line for line in full['config']) == 1
  assert not any('x' * 100 in line for line in short['config'])


@pytest.mark.parametrize('word', [*HOSTILE, '\x1b[2J\x07', 'two\nlines', '\ud800'])
def test_a_record_cannot_command_the_terminal(tmp_path, capsys, word):
  one, two = make_run(tmp_path / 'one', 'tame'), make_run(tmp_path / 'two', word)
  status, parts, err = answer(capsys, one, two)
  assert status == 0 and not err
  assert all(line.isprintable() for lines in parts.values() for line in lines)


@pytest.mark.parametrize('name', ['run.json', 'done.json', 'metrics.jsonl', 'eval.jsonl', 'data.json', 'point.json'])
@pytest.mark.parametrize('content', [
  '', '{"step": 1, "lo', '[]', '{"versions": 3, "loss": "x", "images": [], "metric": 5, "value": {}, "seconds": "1"}'])
def test_a_broken_record_is_a_missing_one(pair, capsys, name, content):
  (pair[0] / name).write_text(content)
  assert answer(capsys, *pair)[0] == 0


def test_bad_input_is_answered_with_a_sentence(pair, tmp_path, capsys):
  for argv in ((pair[0], tmp_path / 'nowhere'), (tmp_path, pair[1])):
    status, parts, err = answer(capsys, *argv)
    assert status == 2 and parts == {'': ['']} and err.startswith('error: ') and err.count('\n') == 1
