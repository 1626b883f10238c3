"""COMMAND: trains the model that a config describes, in a run folder, and resumes it there to the bit.

As one of several processes it trains on the devices of all. Each reads its part of every batch and writes its part of
every checkpoint; process 0 writes the records.
"""
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np
import optax
from clu import profiler
from tqdm import tqdm

from diffusion_jax import model as model_lib
from diffusion_jax import start
from diffusion_jax.ahead import dry_run, step_arguments
from diffusion_jax.batches import Batches, open_source
from diffusion_jax.data import sources
from diffusion_jax.folder import NoRecords, claim, describe, write_about, write_card
from diffusion_jax.model import Model
from diffusion_jax.posthoc_ema import save_snapshot
from diffusion_jax.previews import Previews
from diffusion_jax.runtime import backend, checkpoint, command, distributed, lock, log, memory, paths, sharding
from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime.config import Config, UserError, explain
from diffusion_jax.runtime.snapshots import on_host
from diffusion_jax.runtime.state import TrainState, fingerprint, num_parameters
from diffusion_jax.step import Metrics, compile_step, initialise, make_step


class NotFinite(UserError):
  """The loss or a gradient is no longer a number."""
  status = 1


class Interrupt:
  """Notes Ctrl-C and SIGTERM, so that the loop can save and stop between two calls; a second of a kind stops at once.

  They are noted by a thread: the main one may be waiting for a program that waits for another process.
  """
  SIGNALS = signal.SIGINT, signal.SIGTERM

  def __enter__(self):
    self.received, (self.told, self.tell) = None, os.pipe()
    os.set_blocking(self.tell, False)
    self.thread = threading.Thread(target=self._note, daemon=True)
    self.thread.start()
    self.wakeup = signal.set_wakeup_fd(self.tell, warn_on_full_buffer=False)
    self.previous = {number: signal.signal(number, lambda *_: None) for number in self.SIGNALS}
    return self

  def _note(self):
    seen = set()
    while (number := int.from_bytes(os.read(self.told, 1))) > 0:
      if number in seen:
        os._exit(128 + number)
      if number in self.SIGNALS:
        seen.add(number)
        self.received = signal.Signals(number).name

  def __exit__(self, *_):
    for number, handler in self.previous.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(self.wakeup)
    os.close(self.tell)
    self.thread.join()
    os.close(self.told)


@dataclasses.dataclass
class Schedule:
  """Durations in steps. Everything happens at the end of a call, so all are multiples of steps_per_call."""
  total: int
  log: int
  sample: int
  checkpoint: int
  snapshot: int

  @classmethod
  def of(cls, train: Config) -> 'Schedule':
    calls = lambda images: max(1, -(-images // (train.batch_size * train.steps_per_call)))
    return cls(*(calls(images) * train.steps_per_call for images in
                 (train.images, train.log_every, train.sample_every, train.checkpoint_every, train.snapshot_every)))

  def due(self, every: int, step: int) -> bool:
    """Whether something done every so many steps, and at the end, is to be done after `step`."""
    return step % every == 0 or step == self.total


def train(config: Config, workdir: pathlib.Path, allow_changes: bool = False, profile: bool = False) -> int:
  """Trains, or resumes, in `workdir`; returns the exit status: 0 finished, 75 interrupted with everything saved.

  Nothing is written before everything that can be wrong with the input has been seen.
  """
  source = open_source(config)
  backend.keep_memory(source.shape)
  with explain('config'):
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_divides(mesh, config.train.batch_size // config.train.accumulate, 'train.batch_size / accumulate')
  model = model_lib.make(config, source.shape, source.num_classes, source.class_names, workdir)
  optimizer = model_lib.optimizer_of(config)
  previews = Previews(model, mesh, workdir, source)
  abstract = model_lib.abstract_state(model, mesh)
  make_step(model, optimizer, jax.tree.map(lambda a: a.sharding, abstract))  # builds the draw, the weight, the averages
  parts = {} if (workdir / 'config.json').exists() else start.load(model, abstract)
  with contextlib.ExitStack() as held:
    distributed.first(lambda: held.enter_context(lock.owned(workdir)))
    distributed.first(lambda: claim(workdir, config, allow_changes))
    return fit(model, optimizer, abstract, source, workdir, previews, held, profile, parts)


def fit(model: Model, optimizer: optax.GradientTransformation, abstract: TrainState, source: sources.Source,
        workdir: pathlib.Path, previews: Previews, held: contextlib.ExitStack, profile: bool,
        parts: Mapping[str, Any]) -> int:
  """The one training loop: restores or initialises, then step after step to the end or to an interrupt.

  What has to be closed, however it ends, is given to `held`. parts: what does not start at random, see start.load.
  """
  config, mesh, schedule = model.config, abstract.step.sharding.mesh, Schedule.of(model.config.train)
  done_path, writer = workdir / 'done.json', distributed.is_writer()
  interrupt, watchdog = held.enter_context(Interrupt()), held.enter_context(distributed.Watchdog.of_environment())
  checkpoints = held.enter_context(checkpoint.Checkpoints(workdir, config.train.keep, writer=True))
  restored = checkpoints.restore(abstract)
  if restored:
    state, meta = restored
    if distributed.agree(meta['step'] >= schedule.total and done_path.exists()):
      if writer:
        print(f'{workdir} is trained already: {json.loads(done_path.read_text())["images"]:,} images')
      return 0
  else:
    state, meta = None, {'step': 0, 'seconds': 0.0}
  with futures.ThreadPoolExecutor(1) as pool:  # the step is compiled while its arguments are made and data is read
    shapes = step_arguments(model, mesh, len(source), abstract)[1:]
    compiling = pool.submit(compile_step, model, optimizer, *shapes) if meta['step'] < schedule.total else None
    if not restored:
      state = initialise(model, optimizer, abstract)
      if parts := parts or start.load(model, abstract):
        state = start.place(state, parts)
    if writer:
      done_path.unlink(missing_ok=True)
      write_about(workdir, model, source, num_parameters(abstract.params))
    records = held.enter_context(contextlib.closing(log.Run(workdir) if writer else NoRecords()))
    batches = Batches(config, source, mesh, *([model.labels] if model.text else []))
    metrics = distributed.everywhere(Metrics.empty(), sharding.replicated(mesh))
    calls = batches(meta['step'], schedule.total)
    first = next(calls, None)
    if writer:
      write_card(workdir, config, source, [np.asarray(a) for a in batches.data or ()])
    take, compile_seconds = compiling.result() if compiling else (None, 0.0)
  if take and batches.data and batches.data[0].shape != shapes[2][0].shape:  # bad images are left out
    take, compile_seconds = compile_step(model, optimizer, state, metrics, batches.data, first)
  distributed.wait()  # here, and not in a collective, which has less patience
  if writer and take:
    print(memory.format_table(memory.memory_table(take.compiled, abstract, (batches.data, first))))
  if profile:
    profiler.start(str(workdir / 'profile'))

  step, seconds, last = meta['step'], meta['seconds'], time.perf_counter()
  bar = tqdm(total=schedule.total * config.train.batch_size, initial=step * config.train.batch_size, unit=' images',
             unit_scale=True, desc=workdir.name, disable=not (writer and sys.stderr.isatty()),
             dynamic_ncols=True)
  logged_step, logged_seconds, consensus = step, seconds, distributed.Consensus.of_processes(step)

  def clock():  # the time spent in steps: that of pictures and records is not charged to training
    nonlocal seconds, last
    seconds, last = seconds + time.perf_counter() - last, time.perf_counter()

  for batch in itertools.chain([first] if first is not None else [], calls):
    state, metrics = take(state, metrics, batches.data, batch)
    step += config.train.steps_per_call
    bar.update(config.train.batch_size * config.train.steps_per_call)
    watchdog.at(f'step {step}')
    stopping = consensus.reached(step, interrupt.received)
    saving = stopping or schedule.due(schedule.checkpoint, step)
    if saving or schedule.due(schedule.log, step):
      values = jax.device_get(metrics)
      clock()
      record = describe(values.compute(), config, step, logged_step, seconds, logged_seconds)
      record['count_by_logsnr'] = values.loss_by_logsnr.count.tolist()
      if not np.isfinite([record['loss'], record['grad_norm']]).all():
        raise NotFinite(f'the loss or its gradient is not finite between steps {logged_step} and {step} (loss '
                        f'{record["loss"]}, gradient norm {record["grad_norm"]}): the checkpoints before are '
                        f'untouched; try a lower config.learning_rate.peak or config.clip_norm')
      records.metrics(record)
      bar.set_postfix(loss=f'{record["loss"]:.4f}', refresh=False)
      metrics = distributed.everywhere(Metrics.empty(), sharding.replicated(mesh))
      logged_step, logged_seconds = step, seconds
      if saving:
        watchdog.at(f'the checkpoint of step {step}')
        records.flush()  # what a checkpoint says is done is in the records
        checkpoints.save(state, {'step': step, 'images': step * config.train.batch_size, 'seconds': seconds})
      last = time.perf_counter()
    if schedule.due(schedule.snapshot, step):
      jax.block_until_ready(state)
      clock()
      save_snapshot(workdir, config, state.emas, step * config.train.batch_size)
      last = time.perf_counter()
    if stopping:
      break
    if schedule.due(schedule.sample, step):
      watchdog.at(f'the pictures after step {step}')
      jax.block_until_ready(state)
      clock()
      records.image('samples', previews.write(state, step), step)
      last = time.perf_counter()

  bar.close()
  watchdog.at(f'the last checkpoint, of step {step}')
  consensus.close()
  checkpoints.close()
  records.close()
  if profile:
    profiler.stop()
  images = step * config.train.batch_size
  if step < schedule.total:
    if writer:
      print(f'{consensus.reason}: saved step {step} ({images:,} images); the same command continues from there')
    return command.INTERRUPTED
  rate = images / seconds if seconds else None
  whole = jax.tree.map(on_host, state.replace(opt_state=()))
  if not writer:
    return 0
  log.write_json(done_path, {'images': images, 'seconds': seconds, 'images_per_second': rate,
                             'compile_seconds': compile_seconds, 'fingerprint': fingerprint(whole)})
  print(f'{images:,} images in {seconds:.1f} s, {rate:,.0f} images/s (compilation {compile_seconds:.1f} s apart) '
        f'-> {workdir}')
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  """`diffusion-jax train`: see --help."""
  p = command.parser('train', 'Trains the model of a config; started again in the same folder, continues.')
  p.add_argument('--config', required=True, metavar='FILE[:RUN]', help='a config file; --config.a.b=value overrides')
  p.add_argument('--workdir', help='the run folder')
  p.add_argument('--override', action='store_true', help='continue a run although the config has changed')
  p.add_argument('--dry_run', action='store_true', help='print parameters, shapes, FLOPs and memory, then exit')
  p.add_argument('--profile', action='store_true', help='write a profile for TensorBoard into WORKDIR/profile')
  command.add_process_flags(p)
  flags, overrides = p.parse(argv)
  config = config_lib.load(flags.config)
  config_lib.override(config, overrides)
  model_lib.check(config)
  processes = command.join(flags) if not flags.dry_run else 1
  backend.prepare(config.train.batch_size // config.train.accumulate // processes)
  if flags.dry_run:
    return dry_run(config)
  if not flags.workdir:
    raise UserError('give --workdir=FOLDER, where the run is kept')
  if flags.profile and paths.is_remote(flags.workdir):
    raise UserError('--profile writes into a local folder: give a local --workdir')
  return train(config, paths.folder(flags.workdir), flags.override, flags.profile)


if __name__ == '__main__':
  sys.exit(command.run(main))
