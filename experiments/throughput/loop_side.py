"""Our side of what the train loop adds to its steps: data and records, and the beginning of a checkpoint."""
import itertools
import pathlib
import tempfile
import time
from unittest import mock

import jax
import numpy as np

from configs import digits
from diffusion_jax import train as train_lib
from diffusion_jax.runtime import checkpoint
from diffusion_jax.runtime.config import Config
from experiments.throughput import cases, equal
from experiments.throughput.jax_side import Trainer, config_of, prepared
from experiments.throughput.worker import Job, Prepared

LOG_STEPS = 50  # between two records of the digits config
DISPATCHES = 200  # in an interval


def digits_config(steps: int) -> Config:
  """configs/digits.py for so many steps; pictures and checkpoints only at the end, after the last record."""
  config = digits.get_config()
  images = steps * config.train.batch_size
  config.train.update({'images': images, 'log_every': LOG_STEPS * config.train.batch_size, 'sample_every': images,
                       'checkpoint_every': images})
  config.sample.steps = 1
  return config


def overhead(job: Job) -> Prepared:
  """run(k): one train.train run of the digits config, in which k intervals between records take turns with as many
  bare steps.

  Both are measured in one process and seconds apart: on a shared machine, the difference between two processes or two
  minutes is larger than what is asked for. The loop waits for its next batch while the bare steps run.
  """
  trainer = Trainer(digits_config(LOG_STEPS))
  same = next(trainer.calls)

  def run(k):
    times = {'bare': [], 'loop': []}

    class Batches(train_lib.Batches):
      def __call__(self, start, stop):
        clock, since = lambda: np.array([time.perf_counter(), time.process_time()]), None

        def note(side):
          times[side].append(((clock() - since) / LOG_STEPS).tolist())

        for i, batch in enumerate(super().__call__(start, stop)):
          if i and i % LOG_STEPS == 0:  # the record of the interval before is written; nothing is in flight
            if since is not None:
              note('loop')
            since = clock()
            trainer(itertools.repeat(same, LOG_STEPS))
            note('bare')
            since = clock()
          yield batch
        note('loop')

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(train_lib, 'Batches', Batches):
      # The first interval is not counted: the step is compiled after its first batch.
      train_lib.train(digits_config(LOG_STEPS * (1 + k)), pathlib.Path(folder))
    return times

  return prepared(trainer.state.params, run, trainer.compile_seconds, trainer.mesh)


def dispatch(job: Job) -> Prepared:
  """run(k): one train.train run of the digits config whose step does nothing, in k intervals of DISPATCHES calls.

  What is left is what the loop adds to the start of a program: a batch is chosen and put on the devices, and the loop
  asks itself what is due. Nothing is recorded between the calls.
  """
  trainer = Trainer(digits_config(1), compiled=False)

  class Nothing:
    compiled = None  # of which no memory is asked

    def __init__(self, metrics):
      self.seen = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), metrics)

    def __call__(self, state, metrics, data, batch):
      return state, self.seen

  def run(k):
    marks = []

    class Batches(train_lib.Batches):
      def __call__(self, start, stop):
        for i, batch in enumerate(super().__call__(start, stop)):
          if i % DISPATCHES == 0:
            marks.append([time.perf_counter(), time.process_time()])
          yield batch

    with (tempfile.TemporaryDirectory() as folder, mock.patch.object(train_lib, 'Batches', Batches),
          mock.patch.object(train_lib, 'compile_step', lambda model, optimizer, *shapes: (Nothing(shapes[1]), 0.0)),
          mock.patch.object(train_lib.memory, 'memory_table', lambda *_: [('total', 0)])):
      config = digits_config(DISPATCHES * (1 + k) + 1)
      config.train.log_every = config.train.images
      train_lib.train(config, pathlib.Path(folder))
    return {'loop': (np.diff(marks, axis=0)[1:] / DISPATCHES).tolist()}  # the first waits for the compiler

  return prepared(trainer.state.params, run, 0.0, trainer.mesh)


def save(job: Job) -> Prepared:
  """run(k): k checkpoints of a train state. A step ends, the loop saves, and only its wait is counted.

  Before the next one begins, the one before is on the disk: `written_seconds`, which a loop spends in its steps.
  """
  trainer = Trainer(config_of(job.case), compiled=False)
  equal.write(job.folder, equal.module(cases.net_of(job.case)), cases.net_of(job.case),
              jax.device_get(trainer.state.params['net']))
  folder = tempfile.TemporaryDirectory(dir=job.folder)  # which the run removes, whole
  checkpoints = checkpoint.Checkpoints(pathlib.Path(folder.name), keep=1, writer=True)
  numbers = itertools.count(1)

  def run(k):
    seconds = []
    for _ in range(k):
      state = trainer.state.replace(step=trainer.state.step * 0 + next(numbers))
      jax.block_until_ready(state)
      start, cpu = time.perf_counter(), time.process_time()
      checkpoints.save(state, {'step': int(state.step)})
      held, cpu = time.perf_counter() - start, time.process_time() - cpu
      checkpoints.wait()
      seconds.append((held, cpu, time.perf_counter() - start))
    held, cpu, written = np.mean(seconds, 0).tolist()
    return {'seconds': held, 'cpu_seconds': cpu, 'written_seconds': written}

  return prepared(trainer.state.params, run, 0.0, trainer.mesh)
