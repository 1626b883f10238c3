"""The pure parts of experiments/throughput: no clock is read here."""
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.nets import unet
from diffusion_jax.runtime.config import UserError
from experiments.throughput import cases, stats, table

WITH_NET = sorted({case.net for case in cases.CASES.values() if case.net})


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


def record(case, time, ms, device='a cpu, 2 cores', share=None):
  side = {'median_ms': ms, 'cpu_ms': None if share else 2 * ms, 'compile_seconds': 1.0, 'peak_bytes': 2 ** 28}
  return {'case': case, 'about': f'about {case}', 'device': device, 'time': time, 'ratio': 1.25, 'interval': [1.2, 1.3],
          'share_percent': share, 'verdict': 'faster', 'sides': {'torch': side, 'jax': side}}


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


@pytest.mark.parametrize('name', WITH_NET)
def test_both_sides_have_arrays_of_the_same_sizes(name):
  missing = [m for m in ('torch', 'diffusers') if importlib.util.find_spec(m) is None]
  if missing:
    pytest.skip(f"{' and '.join(missing)} missing: install the parity extra")
  import torch

  from experiments.throughput import jax_side, torch_side
  net = cases.NETS[name]
  x = jnp.zeros((1, net.size, net.size, net.image_channels))
  ours = jax.eval_shape(lambda: unet.UNet(**jax_side.network(net)).init(jax.random.key(0), x, jnp.zeros(1), {}))
  with torch.device('meta'):
    theirs = [p.numel() for p in torch_side.unet(net).parameters()]
  assert cases.shapes_agree([leaf.size for leaf in jax.tree.leaves(ours)], theirs)
  assert not cases.shapes_agree(theirs, [*theirs[1:], theirs[0] + 1])
