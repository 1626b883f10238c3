"""Our side: what the commands run, with the devices that they choose. Also both sides of the overhead."""
import itertools
import json
import pathlib
import struct
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from tensorboardX.proto import event_pb2

from configs import digits
from diffusion_jax import model as model_lib
from diffusion_jax import sample as sample_lib
from diffusion_jax import train as train_lib
from diffusion_jax.core import levels, samplers, schedules
from diffusion_jax.model import Model
from diffusion_jax.nets import unet
from diffusion_jax.runtime import log, sharding
from diffusion_jax.runtime.config import Config, spec
from experiments.throughput import cases
from experiments.throughput.cases import Case, Net
from experiments.throughput.worker import Prepared, repeat

LOG_STEPS = 50  # between two records of the digits config


def config_of(case: Case) -> Config:
  """The case as a config: DDPM, unlabelled, float32."""
  net, config = cases.NETS[case.net], model_lib.default_config()
  config.data.update({'source': f'synthetic:{net.size}x{net.size}x{net.image_channels}:{cases.EXAMPLES}'})
  config.net = spec(unet.UNet, **network(net))
  config.process = spec(schedules.linear)
  config.learning_rate.update({'peak': cases.LEARNING_RATE, 'warmup_images': 0})
  config.clip_norm = cases.CLIP_NORM
  config.ema.main.decay = cases.EMA_DECAY
  config.train.update({'batch_size': case.batch})
  config.sample.update({'sampler': spec(samplers.ddim), 'grid': spec(levels.trailing), 'steps': cases.SAMPLING_STEPS,
                        'batch_size': case.batch})
  model_lib.check(config)
  return config


def network(net: Net) -> dict[str, Any]:
  """The arguments of unet.UNet."""
  return {'channels': net.channels, 'multipliers': net.multipliers, 'blocks': net.blocks, 'attention': net.attention,
          'groups': net.groups, 'dropout': net.dropout}


def _params(model: Model, mesh: jax.sharding.Mesh) -> Any:
  return _quickly(model.init, sharding.replicated(mesh))


def _quickly(init: Any, shardings: Any) -> Any:
  """init(key) compiled without optimisation, as train does: it runs once."""
  compiled = jax.jit(init, out_shardings=shardings).lower(jax.random.key(0))
  return compiled.compile(compiler_options={'xla_backend_optimization_level': 0})(jax.random.key(0))


def _prepared(params: Any, run: Any, compile_seconds: float, mesh: jax.sharding.Mesh) -> Prepared:
  sizes = [leaf.size for leaf in jax.tree.leaves(params)]
  return Prepared(run, sizes, compile_seconds, f'{mesh.size} device{"s" if mesh.size > 1 else ""}', log.versions())


class Trainer:
  """What train.train makes before its loop, and its call of the step."""

  def __init__(self, config: Config):
    sharding.use_cpu_cores(config.train.batch_size)
    self.mesh = sharding.make_mesh(**config.mesh)
    source = train_lib.open_source(config)
    model, optimizer = model_lib.make(config, source.shape, source.num_classes), model_lib.optimizer_of(config)
    shardings = jax.tree.map(lambda a: a.sharding, model_lib.abstract_state(model, self.mesh))
    self.state = _quickly(lambda key: model_lib.initial_state(model, optimizer, key), shardings)
    self.metrics = jax.device_put(train_lib.Metrics.empty(), sharding.replicated(self.mesh))
    batches = train_lib.Batches(config, source, self.mesh)
    self.data, self.calls = batches.data, batches(0, sys.maxsize)
    self.step, self.compile_seconds = train_lib.compile_step(model, optimizer, self.state, self.metrics, self.data,
                                                             next(self.calls))

  def __call__(self, batches: Iterable[Any]) -> None:
    """Takes a step with each batch, and waits for the last."""
    for batch in batches:
      self.state, self.metrics = self.step(self.state, self.metrics, self.data, batch)
    jax.block_until_ready((self.state, self.metrics))


def train(case: Case) -> Prepared:
  """The train step that the train command compiles, fed by its batches."""
  trainer = Trainer(config_of(case))
  return _prepared(trainer.state.params, lambda k: trainer(itertools.islice(trainer.calls, k)), trainer.compile_seconds,
                   trainer.mesh)


def sample(case: Case) -> Prepared:
  """The generator of the sample command: ids to uint8 images."""
  config = config_of(case)
  sharding.use_cpu_cores(config.sample.batch_size)
  mesh, net = sharding.make_mesh(), cases.NETS[case.net]
  model = model_lib.make(config, (net.size, net.size, net.image_channels), 0)
  params = _quickly(model.init, sharding.replicated(mesh))
  generator = sample_lib.Generator(model, config.sample, config.seed, mesh)
  generator.compile(params)
  ids = (range(start, start + case.batch) for start in itertools.count(0, case.batch))
  run = repeat(lambda: generator(params, next(ids), [0] * case.batch))
  return _prepared(params, run, generator.compile_seconds, mesh)


def forward(case: Case) -> Prepared:
  """One pass of the network on the devices that the sample command would choose."""
  config = config_of(case)
  sharding.use_cpu_cores(case.batch)
  mesh, net = sharding.make_mesh(), cases.NETS[case.net]
  model = model_lib.make(config, (net.size, net.size, net.image_channels), 0)
  params = _quickly(model.init, sharding.replicated(mesh))
  x = sharding.put_batch(np.random.default_rng(0).standard_normal((case.batch, *model.shape), np.float32), mesh)
  noise = sharding.put_batch(np.full(case.batch, 500, np.float32), mesh)
  start = time.perf_counter()
  call = jax.jit(lambda params, x, noise: model.net.apply({'params': params['net']}, x, noise, {}))
  compiled = call.lower(params, x, noise).compile()
  seconds = time.perf_counter() - start
  return _prepared(params, repeat(lambda: jax.block_until_ready(compiled(params, x, noise))), seconds, mesh)


def digits_config(steps: int) -> Config:
  """configs/digits.py for so many steps; pictures and checkpoints only at the end, after the last record."""
  config = digits.get_config()
  images = steps * config.train.batch_size
  config.train.update({'images': images, 'log_every': LOG_STEPS * config.train.batch_size, 'sample_every': images,
                       'checkpoint_every': images})
  config.sample.steps = 1
  return config


def bare(case: Case) -> Prepared:
  """The compiled step of the digits config again and again on one batch: no data, no records."""
  trainer = Trainer(digits_config(LOG_STEPS))
  batch = next(trainer.calls)
  return _prepared(trainer.state.params, lambda k: trainer(itertools.repeat(batch, k)), trainer.compile_seconds,
                   trainer.mesh)


def loop(case: Case) -> Prepared:
  """Whole runs of train.train on the digits config; a run's time is that between its first record and its last.

  The clock is the wall's, as the event file notes it with each record. The seconds in metrics.jsonl will not do:
  train.py stops its own clock while it writes records, and they are part of what is asked for here.
  """
  sharding.use_cpu_cores(case.batch)

  def run(k):
    if k % LOG_STEPS:
      return None  # each run begins with an interval that is not counted: it needs no warm-up
    with tempfile.TemporaryDirectory() as folder:
      workdir = pathlib.Path(folder)
      train_lib.train(digits_config(LOG_STEPS + k), workdir)
      times = record_times(next(workdir.glob('events.out.tfevents.*')))
      sizes[:] = [json.loads((workdir / 'run.json').read_text())['parameters']]
    return {'seconds': (times[-1] - times[0]) / k, 'cpu_seconds': None}

  sizes = []
  run(LOG_STEPS)
  mesh = sharding.make_mesh()
  return _prepared([], run, 0.0, mesh)._replace(sizes=sizes)


def record_times(path: pathlib.Path) -> list[float]:
  """When each record was written, from an event file: length 8 bytes, checksum 4, event, checksum 4, and so on."""
  data, at, times = path.read_bytes(), 0, []
  while at < len(data):
    length, = struct.unpack_from('<Q', data, at)
    event = event_pb2.Event.FromString(data[at + 12:at + 12 + length])
    times += [event.wall_time for value in event.summary.value if value.tag == 'loss']
    at += 16 + length
  return times


WORK = {'train': train, 'sample': sample, 'forward': forward, 'bare': bare, 'loop': loop}
