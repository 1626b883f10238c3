"""The batch law, and the stream that follows it whatever reads ahead."""
import collections
import subprocess
import sys

import numpy as np
import pytest

from diffusion_jax.data import pipeline, sources


class Flawed(sources.Synthetic):
  """A synthetic source in which some records are bad."""

  def __init__(self, num_examples, flaws):
    super().__init__('flawed', 'train', (4, 4, 1), num_examples)
    self.flaws = flaws

  def __getitem__(self, i):
    if i in self.flaws:
      raise sources.BadRecord(f'record {i} is broken')
    return super().__getitem__(i)


def take(seed, steps, batch_size, num_examples):
  """The examples of steps 0, 1, ... one after another."""
  return np.concatenate([pipeline.indices(seed, step, batch_size, num_examples) for step in range(steps)])


def check_equal(batches, expected):
  """Two streams hold the same batches, and the same number of them."""
  for (images, labels), (expected_images, expected_labels) in zip(batches, expected, strict=True):
    np.testing.assert_array_equal(images, expected_images)
    np.testing.assert_array_equal(labels, expected_labels)
    assert images.dtype == np.uint8 and labels.dtype == np.int32


@pytest.mark.parametrize(('batch_size', 'num_examples'), [(4, 12), (5, 12), (12, 12), (30, 7), (1, 1)])
def test_every_epoch_is_a_permutation_whether_or_not_batches_end_with_it(batch_size, num_examples):
  positions = take(3, -(-4 * num_examples // batch_size), batch_size, num_examples)[:4 * num_examples]
  assert positions.dtype == np.int64
  for epoch in positions.reshape(4, num_examples):
    assert sorted(epoch) == list(range(num_examples))


def test_a_batch_larger_than_the_data_set_repeats_examples_evenly():
  counts = collections.Counter(pipeline.indices(0, 5, 23, 7).tolist())
  assert set(counts) == set(range(7)) and max(counts.values()) <= min(counts.values()) + 2


def test_epochs_and_seeds_differ():
  first, second = take(0, 2, 50, 50).reshape(2, 50)
  assert (first != second).any()
  assert (first != pipeline.indices(1, 0, 50, 50)).any()


@pytest.mark.parametrize('batch_size', [10, 20, 60])
def test_the_stream_of_examples_does_not_depend_on_the_batch_size(batch_size):
  np.testing.assert_array_equal(take(2, 120 // batch_size, batch_size, 17), take(2, 24, 5, 17))


def test_a_batch_is_a_function_of_seed_and_step_whatever_was_asked_before():
  expected = [pipeline.indices(4, step, 8, 11) for step in range(20)]
  for step in np.random.default_rng(0).permutation(20):
    pipeline.indices(9, int(step), 3, 11)
    np.testing.assert_array_equal(pipeline.indices(4, step, 8, 11), expected[step])


def test_changing_a_batch_in_place_does_not_change_the_next_call():
  expected = pipeline.indices(0, 0, 6, 6).copy()
  pipeline.indices(0, 0, 6, 6)[:] = 0
  np.testing.assert_array_equal(pipeline.indices(0, 0, 6, 6), expected)


@pytest.mark.parametrize(('wrong', 'text'), [
    ({'seed': -1}, 'seed is -1'), ({'step': -2}, 'step is -2'), ({'batch_size': 0}, 'batch size is 0'),
    ({'num_examples': 0}, 'examples is 0'),
])
def test_arguments_out_of_range_are_named(wrong, text):
  with pytest.raises(ValueError, match=text):
    pipeline.indices(**{'seed': 0, 'step': 0, 'batch_size': 8, 'num_examples': 5} | wrong)


@pytest.mark.parametrize('rows', [None, [0, 1, 2, 3], [4, 5, 6, 7], [2, 3, 6, 7], [5]])
def test_the_stream_is_the_gather_of_the_resident_arrays(rows):
  source = sources.load('synthetic:4x5x3:30')
  images, labels = sources.arrays(source)
  batches = [pipeline.indices(1, step, 8, 30)[slice(None) if rows is None else rows] for step in range(2, 9)]
  expected = [(images[b], labels[b]) for b in batches]
  for threads in (1, 5):
    check_equal(pipeline.stream(source, 1, 8, 2, 9, rows=rows, threads=threads), expected)


@pytest.mark.filterwarnings('ignore:a bad record')
def test_worker_processes_give_the_same_batches_replace_bad_records_and_report_too_many():
  source = Flawed(20, {3, 7})
  expected = list(pipeline.stream(source, 0, 4, 1, 6))
  check_equal(pipeline.stream(source, 0, 4, 1, 6, workers=2), expected)
  with pytest.raises(ValueError, match=r'record . is broken.*data\.max_bad'):
    list(pipeline.stream(source, 0, 20, 0, 3, workers=1, max_bad=1))


def test_a_stream_from_step_k_is_the_tail_and_an_endless_one_begins_the_same():
  source = sources.load('synthetic:4x4x1:10')
  batches = list(pipeline.stream(source, 0, 4, 0, 7))
  check_equal(pipeline.stream(source, 0, 4, 5, 7), batches[5:])
  assert list(pipeline.stream(source, 0, 4, 7, 7)) == []
  endless = pipeline.stream(source, 0, 4, 0, None)
  check_equal([next(endless) for _ in batches], batches)
  endless.close()
  assert list(endless) == []


PROGRAM = '''
from diffusion_jax.data import pipeline, sources
if __name__ == '__main__':
  batches = pipeline.stream(sources.load('synthetic:4x4x1:10'), 0, 4, 0, None, workers=1)
  next(batches)
'''


def test_a_stream_left_open_ends_quietly_with_the_program(tmp_path):
  (tmp_path / 'program.py').write_text(PROGRAM)
  done = subprocess.run([sys.executable, tmp_path / 'program.py'], check=True, capture_output=True, timeout=120)
  assert done.stderr == b''


@pytest.mark.filterwarnings('ignore:a bad record')
def test_a_bad_record_is_replaced_by_the_next_good_one_round_the_end():
  source = Flawed(10, {4, 5, 9})
  good = {4: 6, 5: 6, 9: 0}
  with pytest.warns(UserWarning, match='record 9 is broken'):
    batches = list(pipeline.stream(source, 0, 5, 0, 4, max_bad=3))
  for step, (images, labels) in enumerate(batches):
    for i, image, label in zip(pipeline.indices(0, step, 5, 10), images, labels, strict=True):
      expected, expected_label = source[good.get(int(i), int(i))]
      np.testing.assert_array_equal(image, expected)
      assert label == expected_label


@pytest.mark.filterwarnings('ignore:a bad record')
def test_too_many_bad_records_are_an_error_that_names_the_option():
  with pytest.raises(ValueError, match=r'3 of the 10 records of flawed are bad and 2 are allowed.*data\.max_bad'):
    list(pipeline.stream(Flawed(10, {1, 2, 3}), 0, 10, 0, 1, max_bad=2))
  with pytest.raises(ValueError, match='All 10 records of flawed are bad'):
    list(pipeline.stream(Flawed(10, set(range(10))), 0, 1, 0, 1, max_bad=99))


def test_stream_checks_its_arguments_before_the_first_batch():
  source = sources.load('synthetic:4x4x1:10')
  for rows in ([], [8], [-1, 0]):
    with pytest.raises(ValueError, match='expected at least one from 0 to 7'):
      pipeline.stream(source, 0, 8, 0, 1, rows=rows)
  with pytest.raises(ValueError, match=r'data\.workers is -1'):
    pipeline.stream(source, 0, 8, 0, 1, workers=-1)
