"""Which examples make which batch, and a stream of those batches.

The order is a function of (seed, step) alone: never of the number of processes, workers or threads, and never of what
was read before. A run resumes at step k by asking for step k, with as many processes and workers as it then has: each
process reads those rows of the global batch that its devices hold.
"""
import functools
import sys
import warnings
import weakref

import numpy as np

from diffusion_jax.data import sources


def indices(seed, step, batch_size, num_examples):
  """Which examples make batch `step`, over all processes: int64 [batch_size].

  The examples form one endless stream: epoch e is a permutation of range(num_examples) drawn from (seed, e), and
  epochs follow each other without a gap, so a batch may cross into the next one (or several) and nothing is dropped.
  Batch `step` is positions step * batch_size to (step + 1) * batch_size - 1 of that stream.
  """
  _check(seed, step, batch_size, num_examples)
  first, n = step * batch_size, num_examples
  epochs = range(first // n, (first + batch_size - 1) // n + 1)
  return np.concatenate([_epoch(seed, e, n)[max(first - e * n, 0):first + batch_size - e * n] for e in epochs])


def stream(source, seed, batch_size, start_step, stop_step, *, rows=None, workers=0, threads=8, max_bad=10):
  """Yields the batches start_step to stop_step - 1 (without end if stop_step is None), or this process's rows of them.

  A batch is (images uint8 [b,*S,C], labels int32 [b]), the examples that `indices` names; `rows`, ints [b] from 0 to
  batch_size - 1, chooses among them (None: all). A bad record is replaced by the next good one (i + 1, and so on round
  to 0) with a warning; more than max_bad of them raise ValueError, counted by each process that reads.

  Reading runs ahead on `threads` threads, or on `workers` processes if workers > 0, which takes seconds to start and
  pays when decoding is slow. The batches are the same. The generator's close() stops the threads and processes; so
  does its end.
  """
  _check(seed, start_step, batch_size, len(source))
  rows = np.arange(batch_size) if rows is None else np.asarray(rows)
  if not len(rows) or rows.min() < 0 or rows.max() >= batch_size:
    raise ValueError(f'The rows are {rows.tolist()[:5]} ..., expected at least one from 0 to {batch_size - 1}.')
  if workers < 0 or threads < 1:
    raise ValueError(f'data.workers is {workers} and data.threads is {threads}, expected at least 0 and 1.')
  if stop_step is None:
    stop_step = sys.maxsize
  read = _Reader(source, seed, batch_size, rows, max_bad)
  batches = _drain(read, start_step, max(start_step, stop_step), workers, threads)
  # Closes a stream that is still open at exit, where grain's workers would otherwise die with a page of tracebacks.
  weakref.finalize(batches, lambda ref: ref() and ref().close(), weakref.ref(batches))
  return batches


def _drain(read, start_step, stop_step, workers, threads):
  import grain
  threads = max(1, threads // max(1, workers))
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
  # An element is a whole batch that depends on its step only: that is what makes the number of workers invisible.
  data = grain.MapDataset.range(start_step, stop_step).map(read).to_iter_dataset(options)
  if workers:
    from absl import flags
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # grain's workers read their flags, which only an absl program has parsed
    data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2))
    # Batches travel by pipe: shared memory is small in containers, and grain leaves some of it behind at exit.
    data = grain.experimental.WithOptionsIterDataset(data, grain.experimental.DatasetOptions(min_shm_size=sys.maxsize))
  iterator = iter(data)
  try:
    yield from iterator
  finally:
    iterator.close()


class _Reader:
  """step -> (images uint8 [b,*S,C], labels int32 [b]); remembers the bad records that this process has met."""

  def __init__(self, source, seed, batch_size, rows, max_bad):
    self.source, self.rows, self.max_bad, self.bad = source, rows, max_bad, {}
    self.indices = functools.partial(indices, seed, batch_size=batch_size, num_examples=len(source))

  def __call__(self, step):
    images, labels = zip(*[self._good(int(i)) for i in self.indices(int(step))[self.rows]], strict=True)
    return np.stack(images), np.asarray(labels, np.int32)

  def _good(self, i):
    while True:  # ends: check_bad raises when no record is good
      if i not in self.bad:
        try:
          return self.source[i]
        except sources.BadRecord as error:
          self.bad[i] = str(error)
          warnings.warn(f'a bad record of {self.source.name} is replaced by the next: {error}', stacklevel=2)
          sources.check_bad(self.source, list(self.bad.values()), self.max_bad)
      i = (i + 1) % len(self.source)


@functools.lru_cache(maxsize=4)
def _epoch(seed, epoch, num_examples):
  order = sources.permutation([seed, epoch], num_examples)
  order.flags.writeable = False  # the cache hands the same array to every caller
  return order


def _check(seed, step, batch_size, num_examples):
  for what, value, least in [('seed', seed, 0), ('step', step, 0), ('batch size', batch_size, 1),
                             ('number of examples', num_examples, 1)]:
    if value < least:
      raise ValueError(f'The {what} is {value}, expected at least {least}.')
