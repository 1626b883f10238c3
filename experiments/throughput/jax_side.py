"""Our side: what the commands run, with the devices that they choose."""
import importlib
import itertools
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import ahead, topology
from diffusion_jax import model as model_lib
from diffusion_jax import train as train_lib
from diffusion_jax.core import levels, samplers, schedules
from diffusion_jax.generator import Generator
from diffusion_jax.metrics import batches, inception
from diffusion_jax.programs import flops
from diffusion_jax.runtime import backend, log, sharding
from diffusion_jax.runtime.config import Config, spec
from experiments.throughput import cases, equal
from experiments.throughput.cases import Case
from experiments.throughput.worker import Job, Prepared, best, repeat


def config_of(case: Case) -> Config:
  """The case as a config: DDPM, unlabelled."""
  net, config = cases.net_of(case), model_lib.default_config()
  config.data.update({'source': f'synthetic:{net.size}x{net.size}x{net.channels}:{cases.EXAMPLES}'})
  config.net = spec(equal.FAMILIES[net.family], **net.options, dtype=case.dtype)
  config.process = spec(schedules.linear)
  config.learning_rate.update({'peak': cases.LEARNING_RATE, 'warmup_images': 0})
  config.clip_norm = cases.CLIP_NORM
  config.ema.main.decay = cases.EMA_DECAY
  config.train.update({'batch_size': case.batch})
  ancestral = case.sampler == 'ancestral'
  config.sample.sampler = spec(samplers.ancestral if ancestral else samplers.ddim)
  config.sample.grid = spec(levels.timesteps if ancestral else levels.trailing)
  config.sample.update({'steps': case.steps, 'batch_size': case.batch})
  model_lib.check(config)
  return config


def prepared(params: Any, run: Any, compile_seconds: float, mesh: jax.sharding.Mesh, **more: Any) -> Prepared:
  """What all work hands to the worker."""
  sizes = [leaf.size for leaf in jax.tree.leaves(params)]
  on_cpu = jax.default_backend() == 'cpu'
  return Prepared(run, sizes, compile_seconds, f'{mesh.size} device{"s" if mesh.size > 1 else ""}', log.versions(),
                  device='' if on_cpu else log.device(), peak_bytes=None if on_cpu else _peak_bytes, **more)


def _peak_bytes() -> int:
  return max((device.memory_stats() or {}).get('peak_bytes_in_use', 0) for device in jax.local_devices())


def quickly(init: Any, shardings: Any) -> Any:
  """init(key) compiled without optimisation, as train does: it runs once."""
  options = {'xla_backend_optimization_level': 0} if jax.default_backend() == 'cpu' else None
  return jax.jit(init, out_shardings=shardings).lower(jax.random.key(0)).compile(compiler_options=options)(
      jax.random.key(0))


def counted(traced: Any) -> float:
  """FLOPs of what was traced as for an accelerator, where convolutions are what they are by definition.

  On a CPU some are computed with fewer multiplications (nets/products.py): the work is counted, not how it is done.
  """
  return sum(flops(traced.jaxpr).values())


class Trainer:
  """What train.train makes before its loop, and its call of the step; compiled: whether there is a step."""

  def __init__(self, config: Config, compiled: bool = True):
    backend.prepare(config.train.batch_size)
    source = train_lib.open_source(config)
    backend.keep_memory(source.shape)
    self.mesh = sharding.make_mesh(**config.mesh)
    self.model, optimizer = model_lib.make(config, source.shape, source.num_classes), model_lib.optimizer_of(config)
    shardings = jax.tree.map(lambda a: a.sharding, model_lib.abstract_state(self.model, self.mesh))
    self.state = quickly(lambda key: model_lib.initial_state(self.model, optimizer, key), shardings)
    if not compiled:
      return
    self.metrics = jax.device_put(train_lib.Metrics.empty(), sharding.replicated(self.mesh))
    batches = train_lib.Batches(config, source, self.mesh)
    self.data, self.calls = batches.data, batches(0, sys.maxsize)
    self.step, self.compile_seconds = train_lib.compile_step(self.model, optimizer, self.state, self.metrics,
                                                             self.data, next(self.calls))

  def __call__(self, batches: Iterable[Any]) -> None:
    """Takes a step with each batch, and waits for the last."""
    for batch in batches:
      self.state, self.metrics = self.step(self.state, self.metrics, self.data, batch)
    jax.block_until_ready((self.state, self.metrics))

  def flops(self) -> float:
    """Of a step."""
    return counted(ahead.step_on(self.model, self.mesh, 'tpu', cases.EXAMPLES)[0])


def train(job: Job) -> Prepared:
  """The train step that the train command compiles, fed by its batches."""
  trainer, net = Trainer(config_of(job.case)), cases.net_of(job.case)
  equal.write(job.folder, equal.module(net), net, jax.device_get(trainer.state.params['net']))
  return prepared(trainer.state.params, lambda k: trainer(itertools.islice(trainer.calls, k)), trainer.compile_seconds,
                  trainer.mesh, flops=trainer.flops())


def sample(job: Job) -> Prepared:
  """The generator of the sample command: ids to uint8 images."""
  case, net = job.case, cases.net_of(job.case)
  config = config_of(case)
  shape = (net.size, net.size, net.channels)
  backend.prepare(config.sample.batch_size)
  backend.keep_memory(shape)
  mesh, model = sharding.make_mesh(), model_lib.make(config, shape, 0)
  params = quickly(model.init, sharding.replicated(mesh))
  equal.write(job.folder, equal.module(net), net, jax.device_get(params['net']))
  generator = Generator(model, config.sample, config.seed, mesh)
  generator.compile(params)
  ids = (range(start, start + case.batch) for start in itertools.count(0, case.batch))
  run = repeat(lambda: generator(params, next(ids), [0] * case.batch))
  return prepared(params, run, generator.compile_seconds, mesh,
                  flops=counted(ahead.sampler_on(model, mesh, 'tpu')[0]))


def forward(job: Job) -> Prepared:
  """One pass of the network on the devices that the sample command would choose; so of the autoencoder's halves."""
  case, about = job.case, cases.net_of(job.case)
  backend.prepare(case.batch)
  backend.keep_memory((about.size, about.size, about.channels))
  mesh, net = sharding.make_mesh(), equal.module(about, case.dtype)
  host = equal.random_params(equal.shapes(net, case))
  equal.write(job.folder, net, about, host)
  params = jax.device_put(host, sharding.replicated(mesh))
  given = {name: sharding.put_batch(a, mesh) for name, a in cases.inputs(case).items()}
  start = time.perf_counter()
  compiled = jax.jit(equal.call(net, case.work)).lower(params, given).compile()
  seconds = time.perf_counter() - start
  with topology.as_if_on('tpu'):
    work = counted(jax.jit(equal.call(net, case.work)).trace(params, given))
  return prepared(params, repeat(lambda: jax.block_until_ready(compiled(params, given))), seconds, mesh, flops=work,
                  outputs={'output': cases.shown(compiled(params, given))})


def inception_shapes() -> dict[str, tuple[int, ...]]:
  """{name in the PyTorch port: shape there}, of all parameters of the Inception network."""
  names = inception.TORCH | {('fc', 'kernel'): 'weight', ('fc', 'bias'): 'bias'}
  there = lambda shape: tuple(shape[axis] for axis in {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[len(shape)])
  return {f'{module}.{names.get((module, leaf), names[leaf])}': there(shape)
          for (module, leaf), shape in inception.shapes().items()}


def features(job: Job) -> Prepared:
  """What evaluate calls: images uint8 to all outputs of the Inception network, in batches."""
  case = job.case
  backend.prepare(case.batch)
  backend.keep_memory((inception.SIZE, inception.SIZE, 3))
  params, images = inception.from_torch(cases.weights(inception_shapes())), cases.images(case)
  params = batches.place(params, case.batch)
  call = lambda: inception.extract(params, images, case.batch)
  times = [time.perf_counter()]
  for _ in range(2):
    found = call()
    times.append(time.perf_counter())
  compile_seconds = times[1] - times[0] - (times[2] - times[1])  # the first call also runs
  outputs = {name: values[:2].ravel().tolist() for name, values in found.items()}
  x = jax.ShapeDtypeStruct((case.batch, inception.SIZE, inception.SIZE, 3), jnp.float32)
  work = counted(jax.jit(lambda params, x: inception.Inception().apply({'params': params}, x)).trace(params, x))
  return prepared(params, repeat(call), compile_seconds, sharding.make_mesh(), flops=work, outputs=outputs)


def limits(job: Job) -> Prepared:
  """run(k): the most FLOP/s of a matrix product in each type, and bytes/s of a copy, out of k of each."""
  size, length = job.sizes()
  a = {dtype: jnp.full((size, size), 0.5, dtype) for dtype in job.dtypes()}
  long = jnp.zeros(length, jnp.float32)
  product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + 1)

  def run(k):
    wait = jax.block_until_ready
    rates = {dtype: 2 * size ** 3 / best(lambda dtype=dtype: wait(product(a[dtype])), k) for dtype in a}
    return {'rates': {**rates, 'copy': 2 * long.nbytes / best(lambda: wait(copy(long)), k)}}

  return prepared({}, run, 0.0, sharding.make_mesh())


def _of(module, name):
  def work(job):
    found = importlib.import_module(f'experiments.throughput.{module}')  # which needs this module
    return getattr(found, name)(job)
  return work


WORK = {'train': train, 'sample': sample, 'forward': forward, 'encode': forward, 'decode': forward,
        'features': features, 'limits': limits, 'overhead': _of('loop_side', 'overhead'),
        'dispatch': _of('loop_side', 'dispatch'), 'checkpoint': _of('loop_side', 'save'),
        'draw': _of('pipeline_side', 'draw'), 'read': _of('input_side', 'read')}
