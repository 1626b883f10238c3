"""Our side: what the commands run, with the devices that they choose; and the overhead of the train loop."""
import itertools
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import Any
from unittest import mock

import jax
import numpy as np

from configs import digits
from diffusion_jax import model as model_lib
from diffusion_jax import sample as sample_lib
from diffusion_jax import train as train_lib
from diffusion_jax.core import levels, samplers, schedules
from diffusion_jax.metrics import batches, inception
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


def inception_shapes() -> dict[str, tuple[int, ...]]:
  """{name in the PyTorch port: shape there}, of all parameters of the Inception network."""
  names = inception.TORCH | {('fc', 'kernel'): 'weight', ('fc', 'bias'): 'bias'}
  there = lambda shape: tuple(shape[axis] for axis in {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[len(shape)])
  return {f'{module}.{names.get((module, leaf), names[leaf])}': there(shape)
          for (module, leaf), shape in inception.shapes().items()}


def features(case: Case) -> Prepared:
  """What evaluate calls: images uint8 to all outputs of the Inception network, in batches."""
  sharding.use_cpu_cores(case.batch)
  params, images = inception.from_torch(cases.weights(inception_shapes())), cases.images(case)
  params = batches.place(params, case.batch)
  call = lambda: inception.extract(params, images, case.batch)
  times = [time.perf_counter()]
  for _ in range(2):
    found = call()
    times.append(time.perf_counter())
  compile_seconds = times[1] - times[0] - (times[2] - times[1])  # the first call also runs
  outputs = {name: values[:2].ravel().tolist() for name, values in found.items()}
  return _prepared(params, repeat(call), compile_seconds, sharding.make_mesh())._replace(outputs=outputs)


def digits_config(steps: int) -> Config:
  """configs/digits.py for so many steps; pictures and checkpoints only at the end, after the last record."""
  config = digits.get_config()
  images = steps * config.train.batch_size
  config.train.update({'images': images, 'log_every': LOG_STEPS * config.train.batch_size, 'sample_every': images,
                       'checkpoint_every': images})
  config.sample.steps = 1
  return config


def overhead(case: Case) -> Prepared:
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

  return _prepared(trainer.state.params, run, trainer.compile_seconds, trainer.mesh)


WORK = {'train': train, 'sample': sample, 'forward': forward, 'features': features, 'overhead': overhead}
