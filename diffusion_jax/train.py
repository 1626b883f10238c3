"""COMMAND: trains the model that a config describes, in a run folder, and resumes it there to the bit."""
import dataclasses
import itertools
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Sequence
from concurrent import futures

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview, profiler
from tqdm import tqdm

from diffusion_jax import model as model_lib
from diffusion_jax.batches import Batches, open_source
from diffusion_jax.data import sources
from diffusion_jax.folder import claim, describe, write_about, write_card
from diffusion_jax.model import Model
from diffusion_jax.posthoc_ema import save_snapshot
from diffusion_jax.previews import Previews
from diffusion_jax.runtime import checkpoint, command, log, sharding
from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime.config import Config, UserError, explain
from diffusion_jax.runtime.state import fingerprint, num_parameters
from diffusion_jax.step import Metrics, compile_step, initialise, make_step


class NotFinite(UserError):
  """The loss or a gradient is no longer a number."""
  status = 1


class Interrupt:
  """Notes Ctrl-C and SIGTERM, so that the loop can save and stop between two calls; a second one stops at once."""

  def __enter__(self):
    self.received = None
    self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
    return self

  def _note(self, number, frame):
    self.received = signal.Signals(number).name
    signal.signal(number, signal.SIG_DFL)

  def __exit__(self, *_):
    for number, handler in self.previous.items():
      signal.signal(number, handler)


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
  with explain('config'):
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_divides(mesh, config.train.batch_size // config.train.accumulate, 'train.batch_size / accumulate')
  model = model_lib.make(config, source.shape, source.num_classes)
  optimizer = model_lib.optimizer_of(config)
  previews = Previews(model, mesh, workdir)
  make_step(model, optimizer)  # builds the draw, the weight and the averages
  claim(workdir, config, allow_changes)
  with Interrupt() as interrupt:
    return fit(model, optimizer, source, mesh, workdir, previews, interrupt, profile)


def fit(model: Model, optimizer: optax.GradientTransformation, source: sources.Source, mesh: jax.sharding.Mesh,
        workdir: pathlib.Path, previews: Previews, interrupt: Interrupt, profile: bool) -> int:
  """The one training loop: restores or initialises, then step after step to the end or to an interrupt."""
  config, done_path, schedule = model.config, workdir / 'done.json', Schedule.of(model.config.train)
  abstract = model_lib.abstract_state(model, mesh)
  checkpoints = checkpoint.Checkpoints(workdir, config.train.keep, writer=True)
  restored = checkpoints.restore(abstract)
  if restored:
    state, meta = restored
    if meta['step'] >= schedule.total and done_path.exists():
      checkpoints.close()
      print(f'{workdir} is trained already: {json.loads(done_path.read_text())["images"]:,} images')
      return 0
  else:
    state, meta = initialise(model, optimizer, abstract), {'step': 0, 'seconds': 0.0}
  done_path.unlink(missing_ok=True)
  write_about(workdir, model, source, num_parameters(abstract.params))
  records = log.Run(workdir)

  batches = Batches(config, source, mesh)
  metrics = jax.device_put(Metrics.empty(), sharding.replicated(mesh))
  calls = batches(meta['step'], schedule.total)
  first = next(calls, None)
  with futures.ThreadPoolExecutor(1) as pool:  # images are counted while the step is compiled
    counted = pool.submit(write_card, workdir, config, source, [np.asarray(a) for a in batches.data or ()])
    take, compile_seconds = compile_step(model, optimizer, state, metrics, batches.data, first)
    counted.result()
  if profile:
    profiler.start(str(workdir / 'profile'))

  step, seconds, last = meta['step'], meta['seconds'], time.perf_counter()
  bar = tqdm(total=schedule.total * config.train.batch_size, initial=step * config.train.batch_size, unit=' images',
             unit_scale=True, desc=workdir.name, disable=not sys.stderr.isatty(), dynamic_ncols=True)
  logged_step, logged_seconds = step, seconds

  def clock():  # the time spent in steps: that of pictures and records is not charged to training
    nonlocal seconds, last
    seconds, last = seconds + time.perf_counter() - last, time.perf_counter()

  for batch in itertools.chain([first] if first is not None else [], calls):
    state, metrics = take(state, metrics, batches.data, batch)
    step += config.train.steps_per_call
    bar.update(config.train.batch_size * config.train.steps_per_call)
    stopping = interrupt.received is not None
    saving = stopping or schedule.due(schedule.checkpoint, step)
    if saving or schedule.due(schedule.log, step):
      values = jax.device_get(metrics)
      clock()
      record = describe(values.compute(), config, step, logged_step, seconds, logged_seconds)
      record['count_by_logsnr'] = values.loss_by_logsnr.count.tolist()
      if not np.isfinite([record['loss'], record['grad_norm']]).all():
        checkpoints.close()
        records.close()
        raise NotFinite(f'the loss or its gradient is not finite between steps {logged_step} and {step} (loss '
                        f'{record["loss"]}, gradient norm {record["grad_norm"]}): the checkpoints before are '
                        f'untouched; try a lower config.learning_rate.peak or config.clip_norm')
      records.metrics(record)
      bar.set_postfix(loss=f'{record["loss"]:.4f}', refresh=False)
      metrics = jax.device_put(Metrics.empty(), sharding.replicated(mesh))
      logged_step, logged_seconds = step, seconds
      if saving:
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
      jax.block_until_ready(state)
      clock()
      records.image('samples', previews.write(state, step), step)
      last = time.perf_counter()

  bar.close()
  checkpoints.close()
  records.close()
  if profile:
    profiler.stop()
  images = step * config.train.batch_size
  if step < schedule.total:
    print(f'{interrupt.received}: saved step {step} ({images:,} images); the same command continues from there')
    return command.INTERRUPTED
  rate = images / seconds if seconds else None
  log.write_json(done_path, {'images': images, 'seconds': seconds, 'images_per_second': rate,
                             'compile_seconds': compile_seconds, 'fingerprint': fingerprint(state)})
  print(f'{images:,} images in {seconds:.1f} s, {rate:,.0f} images/s (compilation {compile_seconds:.1f} s apart) '
        f'-> {workdir}')
  return 0


def dry_run(config: Config) -> int:
  """Prints parameters, shapes, FLOPs and memory of the train step, and trains nothing."""
  shape = (config.data.size, config.data.size, config.data.channels)
  num_classes = config.net.get('num_classes', 0)
  if not config.data.size:  # only the data knows
    source = open_source(config)
    shape, num_classes = source.shape, source.num_classes
  with explain('config'):
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_divides(mesh, config.train.batch_size // config.train.accumulate, 'train.batch_size / accumulate')
  model = model_lib.make(config, shape, num_classes)
  optimizer = model_lib.optimizer_of(config)
  state = model_lib.abstract_state(model, mesh)
  size, count = config.train.batch_size, config.train.steps_per_call
  images = jax.ShapeDtypeStruct((count, size, *shape), jnp.uint8, sharding=sharding.batch(mesh, 1))
  labels = jax.ShapeDtypeStruct((count, size), jnp.int32, sharding=sharding.batch(mesh, 1))
  metrics = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding.replicated(mesh)),
                         jax.eval_shape(Metrics.empty))
  steps, seconds = compile_step(model, optimizer, state, metrics, None, (images, labels))
  memory, cost = steps.compiled.memory_analysis(), steps.compiled.cost_analysis() or {}
  print(parameter_overview.get_parameter_overview(state.params['net'], include_stats=False))
  gib = lambda n: f'{n / 2 ** 30:.3f} GiB'
  for name, value in {
      'batch': f'{size} x {shape} uint8, over a mesh of {dict(mesh.shape)}',
      'parameters': f'{num_parameters(state.params["net"]):,}',
      'train state': gib(sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))),
      'FLOPs of a step': f'{cost["flops"] * mesh.size / count:.3e}' if cost.get('flops', 0) > 0 else 'unknown here',
      'memory of a device': f'{gib(memory.argument_size_in_bytes)} arguments + {gib(memory.temp_size_in_bytes)} '
                            f'temporary' if memory else 'unknown here',
      'steps': f'{Schedule.of(config.train).total:,} of {size} images',
      'compilation': f'{seconds:.1f} s on {log.device()}'}.items():
    print(f'{name:>18}: {value}')
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  """`diffusion-jax train`: see --help."""
  p = command.parser('train', 'Trains the model of a config; started again in the same folder, continues.')
  p.add_argument('--config', required=True, metavar='FILE[:RUN]', help='a config file; --config.a.b=value overrides')
  p.add_argument('--workdir', help='the run folder')
  p.add_argument('--override', action='store_true', help='continue a run although the config has changed')
  p.add_argument('--dry_run', action='store_true', help='print parameters, shapes, FLOPs and memory, then exit')
  p.add_argument('--profile', action='store_true', help='write a profile for TensorBoard into WORKDIR/profile')
  flags, overrides = p.parse(argv)
  config = config_lib.load(flags.config)
  config_lib.override(config, overrides)
  model_lib.check(config)
  sharding.use_cpu_cores(config.train.batch_size // config.train.accumulate)
  if flags.dry_run:
    return dry_run(config)
  if not flags.workdir:
    raise UserError('give --workdir=FOLDER, where the run is kept')
  if int(os.environ.get('DIFFUSION_JAX_NUM_PROCESSES') or 1) > 1:  # each would write the same folder
    raise UserError('training runs in one process: launch it with one process on one node')
  return train(config, pathlib.Path(flags.workdir), flags.override, flags.profile)


if __name__ == '__main__':
  sys.exit(command.run(main))
