"""The verdict: tables and closed forms of its distribution, and its error rates by simulation."""
import math
import random

import pytest

from diffusion_jax import verdict
from diffusion_jax.verdict import chance, critical, judge


# Harter's table of the studentised range (Annals of Mathematical Statistics 31, 1960): upper points by (k, df).
@pytest.mark.parametrize(('alpha', 'k', 'df', 'q'), [
    (0.05, 2, 1, 17.97), (0.05, 2, 2, 6.085), (0.05, 3, 5, 4.602), (0.05, 3, 10, 3.877), (0.05, 4, 20, 3.958),
    (0.05, 8, 16, 4.90), (0.05, 10, 20, 5.008), (0.01, 3, 10, 5.270), (0.01, 5, 20, 5.294), (0.05, 20, 60, 5.241)])
def test_published_points_of_the_studentised_range(alpha, k, df, q):
  assert critical(k, df, alpha) == pytest.approx(q, rel=2e-4, abs=6e-3 if q == 4.90 else 6e-4)
  assert chance(critical(k, df, alpha), k, df) == pytest.approx(alpha, rel=1e-6)


@pytest.mark.parametrize('t', [0.1, 1, 4.303, 50, 1000])
def test_the_range_of_two_is_students_t(t):
  q = math.sqrt(2) * t
  assert chance(q, 2, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-5)
  assert chance(q, 2, 2) == pytest.approx(2 / (math.sqrt(2 + t * t) * (math.sqrt(2 + t * t) + t)), rel=1e-5)


def test_the_chance_falls_with_the_range_and_rises_with_the_runs():
  assert chance(0, 3, 4) == 1
  values = [chance(q, 3, 4.5) for q in (0.01, 0.5, 1, 3, 10, 100)]
  assert values == sorted(values, reverse=True) and len(set(values)) == len(values)
  assert values[0] == pytest.approx(1, abs=1e-4)
  by_runs = [chance(4, k, 6) for k in (2, 3, 8, 16)]
  assert by_runs == sorted(by_runs)
  by_df = [chance(4, 5, df) for df in (0.5, 1, 2.5, 7, 30, 1e6)]
  assert by_df == sorted(by_df, reverse=True)


# The error rate. Runs that are in truth the same are called different in at most 5 % of sweeps.

DRAWS = {
    'normal': lambda rng, i, k: rng.gauss(0, 1),
    # Student's t of 3 degrees of freedom, whose fourth moment is infinite.
    'heavy tails': lambda rng, i, k: rng.gauss(0, 1) / math.sqrt(rng.gammavariate(1.5, 2 / 3)),
    'one wide': lambda rng, i, k: rng.gauss(0, 1) * (1 if i else 10),
    'half wide': lambda rng, i, k: rng.gauss(0, 1) * (5 if i < k / 2 else 1),
}
# Of few runs there are more sweeps, since each takes less time.
SWEEPS = {2: 2000, 3: 800, 8: 200, 16: 50}


def false_rate(k, draw, sweeps, seeds, common=0.0):
  """How many of `sweeps` sweeps of k equal runs call any run better than another; seeds(i) are those of run i."""
  rng, wrong = random.Random(k), 0
  for _ in range(sweeps):
    shared = [rng.gauss(0, common) for _ in range(9)]
    wrong += any(pair.separable for pair in judge(
        {f'run{i}': {s: shared[s] + draw(rng, i, k) for s in seeds(i)} for i in range(k)}).pairs)
  return wrong / sweeps


@pytest.mark.parametrize('draw', DRAWS)
@pytest.mark.parametrize(('k', 'same_seeds'), [*((k, True) for k in SWEEPS), (2, False), (3, False)])
def test_equal_runs_are_called_different_in_at_most_five_percent(k, draw, same_seeds):
  sweeps = SWEEPS[k]
  rate = false_rate(k, DRAWS[draw], sweeps, lambda i: range(3) if same_seeds else range(i % 2, 3 + i % 2))
  assert rate <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / sweeps)


def test_two_paired_runs_are_called_different_in_just_five_percent():
  """The paired t test is exact, so the rate cannot be lower either."""
  rate = false_rate(2, DRAWS['one wide'], 4000, lambda i: range(3), common=20)
  assert rate == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 4000))


@pytest.mark.parametrize('k', [2, 8])
def test_the_simulation_sees_a_rule_that_counts_no_comparisons(k, monkeypatch):
  """A rule of |difference| > t s would fail the test above for eight runs, but not for two."""
  monkeypatch.setattr(verdict, 'critical', lambda k, df, alpha=0.05: critical(2, df, 0.05))
  rate = false_rate(k, DRAWS['normal'], 300, lambda i: range(3))
  assert (rate > 0.15) == (k == 8)


@pytest.mark.parametrize('k', [2, 8])
def test_a_large_difference_is_found(k):
  rng, found = random.Random(0), 0
  for _ in range(100):
    verdict_ = judge({f'run{i}': {s: rng.gauss(0 if i == 1 else 10, 1) for s in range(3)} for i in range(k)})
    found += verdict_.group == ('run1',)
  assert found >= 90


def test_pairs_take_out_what_a_seed_does_to_all():
  """Seeds differ by 100, runs by 1: told apart where the seeds are the same, and only there."""
  noise = {'a': (0.01, -0.02, 0.01, 0.0), 'b': (-0.02, 0.01, 0.02, 0.01), 'c': (0.02, 0.0, -0.01, 0.01)}
  rows = {run: {s: 100 * s + i + e for s, e in enumerate(row)} for i, (run, row) in enumerate(noise.items())}
  assert judge(rows).group == ('a',) and judge(rows).paired
  del rows['c'][3]
  assert judge(rows).group == ('a', 'c', 'b') or judge(rows).group == ('c', 'a', 'b')
  assert not judge(rows).paired


# By hand.

def test_two_paired_runs_by_hand():
  """Differences 1, 2, 3: mean 2, s = 1, t(0.975; 2) = 4.3027, so 2 -+ 4.3027 / sqrt(3); t = 2 sqrt(3)."""
  found = judge({'linear': {0: 11.0, 1: 14.0, 2: 13.0}, 'cosine': {0: 10.0, 1: 12.0, 2: 10.0}})
  pair, = found.pairs
  assert (pair.better, pair.worse, pair.difference) == ('cosine', 'linear', pytest.approx(2))
  margin = 4.302653 / math.sqrt(3)
  assert (pair.low, pair.high) == (pytest.approx(2 - margin, abs=1e-4), pytest.approx(2 + margin, abs=1e-4))
  t = 2 * math.sqrt(3)
  assert pair.p == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-4)
  assert found.group == ('cosine', 'linear') and not pair.separable
  assert found.text == ('Not separable at this budget: cosine has the best mean, 10.67, and differs from linear by '
                        '2.0 [-0.5, 4.5] (3 seeds each, 95 %).')


def apart(means, deviations):
  """Runs of these means with the same deviations over seeds, no seed in common."""
  n = len(deviations)
  return {f'r{i}': {n * i + j: mean + d for j, d in enumerate(deviations)} for i, mean in enumerate(means)}


def test_tukeys_margin_by_hand():
  """Ten runs of 13 seeds, s^2 = 182 / 12: q(0.95; 10, 120) = 4.560 (Harter), and the margin is q s / sqrt(13)."""
  found = judge(apart([0.0] * 9 + [100.0], range(-6, 7)))
  for pair in found.pairs:
    assert pair.high - pair.difference == pytest.approx(4.560 * math.sqrt(182 / 12 / 13), rel=3e-4)
  assert 'r9' not in found.group and len(found.group) == 9


def test_welchs_margin_by_hand():
  """Four runs of two seeds, s^2 = 0.02: 1 + 1 - 2 / 4 degrees of freedom each, 3 a pair, whose t has a tail in closed
  form."""
  found = judge(apart([5.0, 8.0, 8.0, 8.0], [-0.1, 0.1]))
  for pair in found.pairs:
    t = (pair.high - pair.difference) / math.sqrt(0.02)
    u = t / math.sqrt(3)
    assert 1 - 2 / math.pi * (math.atan(u) + u / (1 + u * u)) == pytest.approx(0.05 / 4, rel=1e-4)
    assert t > 5.757 / math.sqrt(2)  # Tukey's for 4 runs and 4 degrees of freedom
  assert found.group == ('r0',) and 'with the comparisons of 4 runs counted' in found.text


def test_an_interval_says_what_p_says():
  rng = random.Random(3)
  for k in (2, 3, 6):
    for pair in judge({f'r{i}': {s: rng.gauss(i, 1) for s in range(4)} for i in range(k)}).pairs:
      assert pair.difference >= 0 and (pair.low > 0) == pair.separable
      assert (pair.p < 0.05) == pair.separable


@pytest.mark.parametrize('lower', [True, False])
def test_better_may_be_lower_or_higher(lower):
  values = {'low': {0: 1.0, 1: 1.1, 2: 0.9}, 'high': {0: 9.0, 1: 9.1, 2: 8.8}}
  found = judge(values, lower=lower)
  flipped = judge({run: {s: -v for s, v in seeds.items()} for run, seeds in values.items()}, lower=not lower)
  assert found.best == flipped.best == ('low' if lower else 'high')
  assert found.pairs == flipped.pairs


@pytest.mark.parametrize(('factor', 'offset'), [(1000.0, 0.0), (1.0, -50.0)])
def test_units_do_not_matter(factor, offset):
  rng = random.Random(4)
  values = {f'r{i}': {s: rng.gauss(i, 1) for s in range(3)} for i in range(4)}
  moved = {run: {s: factor * v + offset for s, v in seeds.items()} for run, seeds in values.items()}
  one, other = judge(values), judge(moved)
  assert one.group == other.group
  for a, b in zip(one.pairs, other.pairs, strict=True):
    assert (a.better, a.worse) == (b.better, b.worse)
    assert b.low == pytest.approx(factor * a.low) and b.p == pytest.approx(a.p, rel=1e-4)


# What there may be too little of.

def test_one_seed_gives_no_verdict():
  found = judge({'a': {0: 1.0}, 'b': {0: 100.0}})
  assert (found.best, found.group, found.pairs, found.unjudged) == ('', (), (), ('a', 'b'))
  assert found.text.startswith('No verdict: one seed tells nothing')


def test_a_run_of_one_seed_is_named_and_not_judged():
  found = judge({'a': {0: 1.0, 1: 1.1}, 'b': {0: 9.0, 1: 9.1}, 'lucky': {0: 0.1}})
  assert found.best == 'a' and found.unjudged == ('lucky',)
  assert 'Of one seed, and not judged: lucky.' in found.text
  assert all('lucky' not in (pair.better, pair.worse) for pair in found.pairs)


@pytest.mark.parametrize('lost', [None, float('nan'), float('inf')])
def test_values_that_are_missing_are_named(lost):
  found = judge({'a': {0: 1.0, 1: 1.1, 2: lost}, 'b': {0: 9.0, 1: 9.2, 2: 9.1}})
  assert 'Without finite values, and left out: a (seeds 2).' in found.text
  assert '2 to 3 seeds each' in found.text and not found.paired
  kept = judge({'a': {0: 1.0, 1: 1.1}, 'b': {0: 9.0, 1: 9.2, 2: 9.1}})
  assert found.pairs == kept.pairs


def test_values_that_never_change_judge_nothing():
  found = judge({'a': {0: 7.1, 1: 7.1, 2: 7.1}, 'b': {0: 9.3, 1: 9.3, 2: 9.3}})
  assert found.group == ('a', 'b') and not found.pairs[0].separable
  assert found.text.startswith('No verdict:') and 'no scatter to judge by' in found.text


def test_one_run_that_never_changes_is_judged_by_the_others():
  rng = random.Random(1)
  values = {f'r{i}': {s: 5 + rng.gauss(0, 1) for s in range(i, i + 3)} for i in range(3)} | {'still': {8: 5.0, 9: 5.0}}
  found = judge(values)
  assert all(pair.high < math.inf and pair.p > 0.05 for pair in found.pairs) and len(found.group) == 4


@pytest.mark.parametrize('values', [{}, {'a': {0: 1.0, 1: 2.0}}, {'a': {}}])
def test_nothing_to_compare(values):
  found = judge(values)
  assert found.pairs == () and found.text.startswith('No verdict: there is nothing to compare')


def test_the_group_holds_the_best_and_all_that_are_not_separable_from_it():
  rng = random.Random(2)
  values = {name: {s: mean + rng.gauss(0, 0.1) for s in range(3)}
            for name, mean in {'far': 9, 'close': 1.05, 'best': 1, 'farther': 20}.items()}
  found = judge(values)
  assert set(found.group) == {'best', 'close'} and len(found.pairs) == 6
  assert 'not separable at this budget' in found.text and 'is better than far by' in found.text
  chosen = [pair.worse for pair in found.pairs if pair.better == found.best and not pair.separable]
  assert found.group == (found.best, *chosen)


def test_the_words_for_many_runs_stay_few():
  rng = random.Random(5)
  found = judge({f'run-{i}': {s: 100 * i + rng.gauss(0, 1) for s in range(3)} for i in range(16)})
  assert found.text.count('[') == 2 and all(f'run-{i}' in found.text for i in range(16))
