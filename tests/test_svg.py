"""Charts keep inside their axes and drop nothing; numbers read as one would say them."""
import itertools
import math
import re

import pytest

from diffusion_jax import svg


def curves(source):
  """The paths of the curves of a chart."""
  return re.findall(r'<path class="curve[^"]*" d="([^"]*)"', source)


def test_a_chart_lifts_its_pen_at_gaps():
  values = [1, 2, None, 3, float('nan'), float('inf'), -float('inf'), 10**400, 4, 5, 'x', True]
  source = svg.chart('a', 'x', [svg.Series('s', list(enumerate(svg.numbers(values))))])
  path, = curves(source)
  assert path.count('M') == 3 and path.count('L') == 2
  assert 'nan' not in source and 'inf' not in source


def test_a_chart_of_nothing_is_nothing():
  assert svg.chart('a', 'x', []) == ''
  assert svg.chart('a', 'x', [svg.Series('s', [(0, None), (None, 1)])]) == ''


@pytest.mark.parametrize('log', [False, True])
@pytest.mark.parametrize('values', [
  [5], [0, 0], [1e-320, 2e-320], [1e99, -1e99], [1e-99, 1e99], [1e16, 1e16 + 2], [.1, .9], [3, 4000], [-1, 0, 3]])
def test_every_range_has_axes_and_stays_inside(values, log):
  path, = curves(svg.chart('a', 'x', [svg.Series('s', list(enumerate(values)))], log))
  places = [tuple(map(float, pair)) for pair in re.findall(r'([\d.-]+),([\d.-]+)', path)]
  assert len(places) == len(values)
  assert all(44 <= x <= 408 and 8 <= y <= 214 for x, y in places)
  assert places == sorted(places, key=lambda place: place[0])
  by_value = [places[i][1] for i in sorted(range(len(values)), key=values.__getitem__)]
  assert by_value == sorted(by_value, reverse=True)  # greater is higher


@pytest.mark.parametrize('log', [False, True])
@pytest.mark.parametrize('log_x', [False, True])
@pytest.mark.parametrize('xs', [[5], [1, 1000], [1e-320, 2e-320], [0, 1], [-3, 3], [1e-99, 1, 1e99]])
def test_measured_points_their_intervals_and_a_ring_stay_inside(xs, log, log_x):
  points = [(x, 5 + i) for i, x in enumerate(xs)]
  bars = [(x, y / 10, 10 * y) for x, y in points]
  source = svg.chart('a', 'x', [svg.Series('s', points, bars=bars, ring=points[-1])], log, log_x, 'look')
  marks = re.findall(r'<path class="bar[^"]*" d="M([\d.-]+),([\d.-]+)V([\d.-]+)', source)
  dots = [tuple(map(float, dot)) for dot in re.findall(r'<circle class="dot[^"]*" cx="([^"]*)" cy="([^"]*)"', source)]
  ring, = re.findall(r'<circle class="ring[^"]*" cx="([^"]*)" cy="([^"]*)"', source)
  assert len(marks) == len(dots) == len(xs) and tuple(map(float, ring)) == dots[-1] and 'look' in source
  for (x, low, high), (at, y) in zip((map(float, mark) for mark in marks), dots, strict=True):
    assert x == at and 44 <= x <= 408 and 214 >= low > y > high >= 8
  assert [x for x, _ in dots] == sorted(x for x, _ in dots)


def test_a_log_axis_makes_equal_factors_equal_steps():
  source = svg.chart('a', 'x', [svg.Series('s', [(x, 1) for x in (10, 20, 40, 80, 160)])], log_x=True)
  places = [float(x) for x in re.findall(r'cx="([^"]*)"', source)]
  assert [b - a for a, b in itertools.pairwise(places)] == pytest.approx([91] * 4, abs=.11)  # 364 pixels in 4 parts
  assert '(log scale across)' in source
  assert '(log' not in svg.chart('a', 'x', [svg.Series('s', [(0, 1), (1, 1)])], log_x=True)


@pytest.mark.parametrize('value, words', [
  (1.0, '1'), (1.5, '1.5'), (5000, '5,000'), ('a', 'a'), (None, 'None'), (True, 'True'), (float('nan'), 'nan')])
def test_settings_read_as_they_were_set(value, words):
  assert svg.setting(value) == words


@pytest.mark.parametrize('low, high', [(0, 1), (-7.3, 12), (0, 64000), (1e-9, 2e-9), (.999, 1.001), (-1e99, 1e99)])
def test_ticks_are_few_round_and_inside(low, high):
  ticks = svg.ticks(low, high)
  assert 2 <= len(ticks) <= 7 and low <= min(ticks) and max(ticks) <= high
  steps = {float(f'{b - a:.6g}') for a, b in itertools.pairwise(ticks)}
  assert len(steps) == 1 and f'{steps.pop():.6e}'[0] in '125'


@pytest.mark.parametrize('low, high', [(.13, 11), (1e-6, 3), (.02, .3), (1e-99, 1e99)])
def test_log_ticks_are_few_round_and_inside(low, high):
  ticks = svg.ticks(low, high, log=True)
  assert 2 <= len(ticks) <= 8 and low <= min(ticks) and max(ticks) <= high
  assert all(f'{tick:.6e}'[:8] in ('1.000000', '2.000000', '5.000000') for tick in ticks)


@pytest.mark.parametrize('curve', [
  [(x, 40 * math.sin(x / 20)) for x in range(300)], [(x, 3 * x) for x in range(300)], [(0, 0)], [(0, 0), (1, 5)],
  [(x, (x * 7919) % 101) for x in range(99)], [(math.cos(i / 9), math.sin(i / 9)) for i in range(57)]])
def test_a_straightened_curve_is_nowhere_far_from_the_whole(curve):
  kept = svg.straightened(curve)
  assert kept[0] == curve[0] and kept[-1] == curve[-1] and set(kept) <= set(curve)

  def away(point):
    def from_segment(a, b):
      along = [q - p for p, q in zip(a, b, strict=True)]
      share = sum(d * (p - s) for d, p, s in zip(along, point, a, strict=True)) / (sum(d * d for d in along) or 1)
      return math.dist(point, [s + min(max(share, 0), 1) * d for s, d in zip(a, along, strict=True)])
    return min(from_segment(a, b) for a, b in itertools.pairwise(kept)) if len(kept) > 1 else 0

  assert max(map(away, curve)) <= svg.BEND + 1e-9


def test_a_straight_line_is_its_ends():
  assert svg.straightened([(x, 2 * x) for x in range(50)]) == [(0, 0), (49, 98)]


def test_a_long_curve_keeps_its_mean_and_its_extremes():
  points = [(i, math.sin(i)) for i in range(1000)]
  curve, band = svg.thinned(points)
  assert len(curve) == len(band) <= 200
  assert sum(y for _, y in curve) / len(curve) == pytest.approx(sum(y for _, y in points) / 1000)
  assert max(high for *_, high in band) == max(y for _, y in points)
  assert all(low <= y <= high for (_, y), (_, low, high) in zip(curve, band, strict=True))
  assert svg.thinned(points[:200]) == (points[:200], [])


@pytest.mark.parametrize('value, words', [
  (64000, '64,000'), (9.354, '9.35'), (8.7, '8.70'), (812.3, '812'), (.01234, '0.0123'), (1234.5, '1,234'),
  (0., '0.00'), (1.5e-7, '1.50e-07'), (-3.14159, '-3.14'), (None, svg.NOTHING),
  (math.nan, svg.NOTHING), ('9', svg.NOTHING)])
def test_numbers_read_well(value, words):
  assert svg.shown(value) == words


@pytest.mark.parametrize('metric, value, words', [
  ('latency_seconds', .0123, '12.3 ms'), ('latency_seconds', 58, '58 s'), ('compile_seconds', 75, '1 min 15 s'),
  ('x_seconds', 7500, '2 h 5 min'), ('x_seconds', 273600, '3 d 4 h'), ('x_bytes', 512, '512 B'), ('x_bytes', 0, '0 B'),
  ('x_bytes', 3 * 2**29, '1.5 GiB'), ('x_bytes', 2**62, '4.194e+06 TiB'), ('x_bytes', None, svg.NOTHING)])
def test_units_follow_the_name_of_the_metric(metric, value, words):
  assert svg.quantity(metric, value) == words


def test_curves_together_are_their_mean_between_their_least_and_greatest():
  a, b, c = [(0, 1.), (1, 4.), (2, None)], [(0, 3.), (1, 5.), (2, 1.)], [(1, 9.), (0, 2.), (5, 7.)]
  assert svg.together([]) == ([], []) and svg.together([a]) == (a, [])
  points, band = svg.together([a, b])
  assert points == [(0, 2.), (1, 4.5), (2, None)] and band == [(0, 1., 3.), (1, 4., 5.), (2, None, None)]
  points, band = svg.together([a, b, c])  # what one of them lacks is left out, whatever the order
  assert points == [(0, 2.), (1, 6.)] and band == [(0, 1., 3.), (1, 4., 9.)]


def test_sixteen_colours_are_told_apart():
  assert len({svg.coloured(i) for i in range(16)}) == 16
