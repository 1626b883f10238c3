"""A curve joins what differs in one thing, its knee is where more is not shown to be better, no axis mixes costs."""
import itertools
import random
import re

import pytest
from test_quality import runs_of
from test_report import HOSTILE, Page, measured

from diffusion_jax import tradeoff
from diffusion_jax.tradeoff import Point, knee

RULE = {'lower is better': min, 'higher is better': max}


def quality(nfe, value, half=.5, **more):
  ci = None if half is None else [value - half, value + half]
  return measured('fid_5k', value, ci, **{'nfe': nfe, 'steps': nfe, 'evaluation': f'{nfe} {more}', **more})


def cost(metric, nfe, value, **more):
  return measured(metric, value, **{'nfe': nfe, 'steps': nfe, 'batch_size': 64, **more})


def drawn(folder, *lines):
  """The part of the page on these runs."""
  return Page(tradeoff.against_cost(runs_of(folder, *lines)))


def charts(page):
  return [found['aria-label'] for found in page.all('svg')]


def of_class(page, name, tag='path'):
  return [found for found in page.all(tag) if name in found['class'].split()]


def sizes(page):
  """How many points each curve has."""
  return [len(re.findall('[ML]', path['d'])) for path in of_class(page, 'curve')]


@pytest.mark.parametrize('better', RULE)
@pytest.mark.parametrize('seed', range(20))
def test_the_knee_is_the_cheapest_point_that_is_not_separable_from_the_best(better, seed):
  draw = random.Random(seed)
  points = [Point(x, v := draw.uniform(0, 10), v - draw.uniform(0, 2), v + draw.uniform(0, 2), {}) for x in range(8)]
  draw.shuffle(points)
  best, enough = knee(points, better)
  assert best.value == RULE[better](p.value for p in points)
  apart = lambda p: p.high < best.low or p.low > best.high
  assert not apart(enough) and all(apart(p) for p in points if p.x < enough.x)


def test_a_point_without_an_interval_is_never_enough():
  points = [Point(1, 7., None, None, {}), Point(5, 7.2, 7., 7.4, {}), Point(9, 7., 6.9, 7.1, {})]
  assert [p.x for p in knee(points[1:], 'lower is better')] == [9, 5]
  assert [p.x for p in knee([points[0]._replace(value=7.1), *points[1:]], 'lower is better')] == [9, 5]
  assert [p.x for p in knee([Point(5, 7.2, 7., 7.4, {}), Point(9, 7., None, None, {})], 'lower is better')] == [9, 9]


def test_quality_is_drawn_against_calls_time_and_price_and_the_knee_is_said(tmp_path):
  lines = [quality(5, 12.), quality(10, 7.2, .2), quality(50, 7.1, .2)]
  for nfe in 5, 10, 50:
    lines += [cost('samples_per_second', nfe, 1000 / nfe), cost('latency_seconds', nfe, .1 * nfe, batch_size=1),
              cost('cost_per_1000_images', nfe, .01 * nfe, unit='$')]
  page = drawn(tmp_path, lines)
  on = 'on cpu x2 in batches of 64'
  assert charts(page) == ['fid_5k against network calls', f'fid_5k against time {on}', f'fid_5k against price {on}']
  words = '10 network calls are enough: fid_5k 7.20 [7.00, 7.40] against 7.10 [6.90, 7.30] at 50'
  assert words in page.text
  assert sizes(page) == [3, 3, 3] and len(of_class(page, 'bar')) == 9
  # Each chart is of the same three points, and the ring lies on the second.
  for ring in of_class(page, 'ring', 'circle'):
    assert (ring['cx'], ring['cy']) in [(dot['cx'], dot['cy']) for dot in of_class(page, 'dot', 'circle')[1::3]]
  assert len(of_class(page, 'ring', 'circle')) == 3
  for words in ('ms an image', '$ for 1,000 images',
                'ddim(eta=0.0): 7.20 at 10', 'network calls for an image',
                'cheapest that is not separable from the best'):
    assert words in page.text


def test_latency_stands_in_where_no_throughput_was_measured(tmp_path):
  lines = [line for nfe in (5, 10) for line in (quality(nfe, 9.), cost('latency_seconds', nfe, .1 * nfe, batch_size=1))]
  assert charts(drawn(tmp_path, lines)) == [
    'fid_5k against network calls', 'fid_5k against latency on cpu x2 in batches of 1']


@pytest.mark.parametrize('lines, words', [
  ([quality(5, 9., 1), quality(10, 7., 1), quality(20, 5., .5)],
   'fid_5k is best at 20 network calls, 5.00 [4.50, 5.50], and separable from all with fewer; more may be better'),
  ([quality(5, 9., 1), quality(10, 5., 1), quality(20, 7., .5)],
   'fid_5k is best at 10 network calls, 5.00 [4.00, 6.00], and separable from all with fewer.'),
  ([quality(5, 9., None), quality(10, 5., None)],
   'fid_5k is best at 10 network calls, 5.00; it has no interval to tell it from the others.'),
  ([quality(1, 5.1), quality(10, 5.)],
   '1 network call is enough: fid_5k 5.10 [4.60, 5.60] against 5.00 [4.50, 5.50] at 10; the intervals overlap.'),
  ([{**quality(n, v), 'metric': 'is_5k'} for n, v in ((5, 8.), (10, 9.), (20, 9.1))],
   '10 network calls are enough: is_5k')])
def test_the_knee_in_words(tmp_path, lines, words):
  assert words in drawn(tmp_path, lines).text


@pytest.mark.parametrize('change', [
  {'ema': 'raw'}, {'sampler': 'heun'}, {'grid': 'karras'}, {'seed': 1}, {'num_samples': 9}, {'step': 10},
  {'guidance': 2.}, {'clip': True}, {'guidance_low': .5}, {'reference_hash': 'x'}, {'features_hash': 'x'},
  {'quantisation': 'x'}])
def test_points_that_differ_in_anything_else_are_not_joined(tmp_path, change):
  assert 'network calls' not in drawn(tmp_path, [quality(5, 9.), quality(10, 7., **change)]).text
  page = drawn(tmp_path, [quality(5, 9.), quality(10, 7.), quality(20, 6., **change), quality(30, 5., **change)])
  assert set(sizes(page)) == {2}
  unlike = {'reference_hash', 'features_hash', 'quantisation', 'num_samples'} & {*change}
  # An earlier checkpoint is left out, unlike values have a chart of their own, and all else a curve beside the other.
  assert charts(page) == ['fid_5k against network calls'] * (2 if unlike else 1)
  assert len(sizes(page)) == (1 if 'step' in change else 2)


def test_curves_are_told_apart_by_what_differs(tmp_path):
  lines = [quality(n, 9., **more) for n in (5, 10) for more in ({}, {'ema': 'raw'}, {'sampler': 'heun'})]
  page = drawn(tmp_path, lines, lines[::3])
  for words in ('a, EMA main, ddim(eta=0.0)', 'a, raw weights, ddim(eta=0.0)', 'a, EMA main, heun', 'b, EMA main, d'):
    assert words in page.text
  assert {path['class'].split()[1] for path in of_class(page, 'curve')} == {'c0', 'c1', 'c2', 'c3'}


def test_unlike_costs_never_share_an_axis(tmp_path):
  lines = [[line for nfe in (5, 10)
            for line in (quality(nfe, 9., seed=seed), cost('samples_per_second', nfe, 9., **more))]
           for seed, more in enumerate([{'device': 'cpu'}, {'device': 'tpu'}, {'device': 'cpu', 'batch_size': 1}])]
  page = drawn(tmp_path, *lines)
  costs = ('on cpu in batches of 64', 'on tpu in batches of 64', 'on cpu in batches of 1')
  assert charts(page) == ['fid_5k against network calls', *(f'fid_5k against time {on}' for on in costs)]
  assert sizes(page) == [2, 2, 2, 2, 2, 2]


def test_means_over_seeds_are_drawn_instead_of_single_seeds_at_the_cost_of_those(tmp_path):
  lines = []
  for nfe, seed in itertools.product((5, 10), (0, 1)):
    lines += [quality(nfe, 9. + seed, seed=seed), cost('samples_per_second', nfe, 9., seed=seed)]
  for nfe in 5, 10:
    lines += [{**quality(nfe, 9.5, seed=None, seeds=[0, 1]), 'metric': f'fid_5k_{over}'} for over in ('mean', 'min')]
  page = drawn(tmp_path, lines)
  assert [title.split(' on ')[0] for title in charts(page)] == [
    'fid_5k_mean against network calls', 'fid_5k_mean against time']
  assert sizes(page) == [2, 2]


def test_guidance_is_drawn_with_what_it_gains_and_loses(tmp_path):
  lines = []
  for guidance, value in (1, 9.), (1.5, 7.3), (2., 7.), (4., 8.):
    more = {'guidance': guidance, 'nfe': 50 if guidance == 1 else 100, 'steps': 50}
    lines.append({**quality(50, value, .2), **more})
    lines += [measured(metric, value / 20, **more) for metric in ('precision_5k', 'recall_5k', 'kid_5k')]
  page = drawn(tmp_path, lines)
  assert charts(page) == ['fid_5k against guidance', 'precision and recall against guidance']
  assert sizes(page) == [4, 4, 4]
  assert 'fid_5k is best at guidance 2, 7.00 [6.80, 7.20]; not separable from it: 1.5.' in page.text
  assert not of_class(page, 'ring', 'circle')


def test_nothing_is_drawn_where_nothing_was_swept(tmp_path):
  for lines in [], [quality(5, 9.)], [quality(5, 9.), quality(5, 8.)], [cost('latency_seconds', n, 1.) for n in (5, 9)]:
    assert tradeoff.against_cost(runs_of(tmp_path, lines)) == ''


@pytest.mark.parametrize('odd', [
  None, 'x', '9', True, [], {}, float('nan'), float('inf'), -float('inf'), 10**400, 1e-320, -5, 0, '\ud800', *HOSTILE])
@pytest.mark.parametrize('key', [
  'nfe', 'value', 'ci', 'guidance', 'step', 'seeds', 'device', 'unit', 'sampler', 'metric'])
def test_odd_values_neither_break_the_page_nor_get_on_it(tmp_path, key, odd):
  lines = [line for n in (5, 10, 20) for line in (
    quality(n, 9., guidance=n), quality(n, 9.), *(cost(metric, n, 9., guidance=n) for metric in tradeoff.COSTS))]
  tame = {'p', 'ul', 'li', 'div', 'figure', 'figcaption', 'small', 'svg', 'text', 'path', 'circle', 'title', 'span',
          'strong', 'g'}
  changed = [{**line, key: odd} for line in lines]
  page = drawn(tmp_path / 'odd', lines + changed, changed)
  assert {tag for tag, _ in page.tags} <= tame
  for _, attrs in page.tags:
    assert not {*attrs} - {'class', 'd', 'x', 'y', 'cx', 'cy', 'r', 'viewbox', 'role', 'aria-label'}
    assert not any(word in attrs.get(name, '') for name in ('d', 'cx', 'cy', 'x', 'y') for word in ('nan', 'inf'))
