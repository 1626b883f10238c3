"""The train step and the sampler compiled ahead of time, for devices that need not be there."""
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from clu import parameter_overview
from jax.sharding import Mesh

from diffusion_jax import model as model_lib
from diffusion_jax import step as step_lib
from diffusion_jax.batches import open_source
from diffusion_jax.generator import Generator
from diffusion_jax.model import Model
from diffusion_jax.programs import Collective, collectives, flops
from diffusion_jax.runtime import log, memory, sharding
from diffusion_jax.runtime.config import Config, UserError, explain
from diffusion_jax.runtime.state import num_parameters
from diffusion_jax.step import Metrics
from diffusion_jax.topology import as_if_on, explained

PLANNED = 64  # samples in the batch of a config that leaves it to the machine


class Program(NamedTuple):
  """What is known of one compiled program; bytes are of one device."""
  memory: list[tuple[str, int]]  # by part, and the 'total'; empty where the backend does not say
  flops: dict[str, float]        # of all devices, by type
  flops_by_xla: float            # of one device; 0: XLA does not say; loops count once
  bytes_accessed: float          # read and written, by XLA's count, in loops as often as they run; 0: not known
  collectives: list[Collective]
  compile_seconds: float


def model_on(config: Config, devices: Sequence[Any] | None = None) -> tuple[Model, Mesh]:
  """The model of a config, and its mesh of `devices` (default: this machine's, as many as it wants).

  Only a config without data.size needs its data, for the shape of its images.
  """
  shape, captions = (config.data.size, config.data.size, config.data.channels), ()
  num_classes = config.net.get('num_classes', 0)
  if not config.data.size:
    source = open_source(config)
    shape, num_classes, captions = source.shape, source.num_classes, source.class_names
  with explain('config'):
    mesh = sharding.make_mesh(**config.mesh, **({'devices': devices} if devices else {}))
    sharding.check_divides(mesh, config.train.batch_size // config.train.accumulate, 'train.batch_size / accumulate')
  if devices and mesh.size != len(devices):
    raise UserError(f'the mesh {dict(mesh.shape)} leaves some of the {len(devices)} devices idle: '
                    f'the product of its axes must be their number')
  return model_lib.make(config, shape, num_classes, captions), mesh


def placed(tree: Any, where: jax.sharding.Sharding) -> Any:
  """A tree of arrays as their shapes and types, at a place that need not exist."""
  return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where), tree)


def step_arguments(model: Model, mesh: Mesh, examples: int = 0, state: Any = None) -> tuple:
  """(root, state, metrics, data, batch) of the train step, as shapes, of the state as well; examples: see `step_on`."""
  train, shape = model.config.train, model.image_shape
  state, everywhere = state or model_lib.abstract_state(model, mesh), sharding.replicated(mesh)
  root, metrics = placed(jax.eval_shape(lambda: (step_lib.root_key(model.config), Metrics.empty())), everywhere)
  array = jax.ShapeDtypeStruct
  tokens = (model.text.length,) if model.text else ()
  data = placed((array((examples, *shape), jnp.uint8), array((examples, *tokens), jnp.int32)), everywhere)
  resident = 0 < data[0].size <= model.config.data.resident_gib * 2 ** 30  # as batches.Batches has it
  batch = (train.steps_per_call, train.batch_size)
  labels = array((*batch, *tokens), jnp.int32, sharding=sharding.batch(mesh, 1))
  indices = array(batch, jnp.int32, sharding=sharding.batch(mesh, 1))
  images = array((*batch, *shape), jnp.uint8, sharding=sharding.batch(mesh, 1))
  return (root, state, metrics, data, indices) if resident else (root, state, metrics, None, (images, labels))


def step_on(model: Model, mesh: Mesh, platform: str, examples: int = 0) -> tuple[Any, Callable]:
  """The train step as it is traced for `mesh`, and compiled -> the rows of its memory.

  examples: how many images the data set has, to keep it on every device as training does if it is small enough
  (config.data.resident_gib); 0: batches are streamed.
  """
  arguments = step_arguments(model, mesh, examples)
  with as_if_on(platform):
    traced = step_lib.jit_step(model, model_lib.optimizer_of(model.config), *arguments[1:3]).trace(*arguments)
  return traced, lambda compiled: memory.memory_table(compiled, arguments[1], arguments[3:])


def sampler_on(model: Model, mesh: Mesh, platform: str) -> tuple[Any, Callable, Generator]:
  """The sampler of config.sample as it is traced for `mesh`, compiled -> the rows of its memory, and its generator.

  Its batch is config.sample.batch_size, or 64 where that is 0, made a multiple of the devices that share it.
  """
  config, lanes = model.config.sample, sharding.lanes_of(mesh)
  with model.config.unlocked():
    settings = Config({**config, 'batch_size': (config.batch_size or PLANNED) // lanes * lanes or lanes})
  generator = Generator(model, settings, model.config.seed, mesh)
  params = model_lib.abstract_params(model, mesh)
  with as_if_on(platform):
    traced = generator.trace(params)

  def rows(compiled):
    measured, own = compiled.memory_analysis(), memory.device_bytes(params)
    if measured is None:
      return []
    found = [('parameters', own), ('rest', measured.argument_size_in_bytes - own),
             ('images', measured.output_size_in_bytes), ('activations', measured.temp_size_in_bytes)]
    return [*found, ('total', sum(size for _, size in found))]

  return traced, rows, generator


def compile_program(traced: Any, rows: Callable, num_devices: int, quick: bool = False) -> Program:
  """Compiles a traced program; `rows(compiled)` is its memory. UserError if it does not fit, or cannot be compiled.

  quick: with less optimisation, several times sooner; collectives and memory are then not those of a real run.
  """
  start = time.perf_counter()
  try:
    compiled = traced.lower().compile(compiler_options={'optimization_level': 'O1'} if quick else None)
  except TypeError as e:
    if not quick:
      raise
    raise UserError(f'--quick needs a newer jax than {jax.__version__}, which has no such option') from e
  except jax.errors.JaxRuntimeError as e:
    first = next(iter(str(e).strip().splitlines()), type(e).__name__)
    if 'RESOURCE_EXHAUSTED' in first:
      raise DoesNotFit(f'it does not fit, says XLA ({first}): take a smaller config.train.batch_size, '
                       f'config.train.accumulate=2, or more fsdp') from e
    raise UserError(explained(e) or f'XLA cannot compile this: {first}') from e
  seconds, counted = time.perf_counter() - start, flops(traced.jaxpr)
  cost = compiled.cost_analysis() or {}
  by_xla = max(cost.get('flops', 0.0), 0.0)
  # XLA counts what is in a loop once, and FLOPs know how often it runs.
  loops = max(1.0, sum(counted.values()) / num_devices / by_xla) if by_xla else 1.0
  return Program(rows(compiled), counted, by_xla, max(cost.get('bytes accessed', 0.0), 0.0) * loops,
                 collectives(compiled.as_text(), num_devices), seconds)


class DoesNotFit(UserError):
  """XLA refuses to compile a program for the memory of its chip."""
  status = 1


def dry_run(config: Config) -> int:
  """Prints parameters, FLOPs and memory of the train step on this machine, and trains nothing.

  What shapes alone tell comes first, since to compile a large step takes minutes. It is not compiled where its state is
  larger than the memory there is: it could not run.
  """
  model, mesh = model_on(config)
  state, platform = model_lib.abstract_state(model, mesh), jax.default_backend()
  net, train = model_lib.abstract_params(model, mesh)['net'], config.train
  gib = lambda n: f'{n / 2 ** 30:.3f} GiB'
  show = lambda name, value: print(f'{name:>18}: {value}', flush=True)
  print(parameter_overview.get_parameter_overview(net, include_stats=False))
  show('batch', f'{train.batch_size} x {model.image_shape} uint8, over a mesh of {dict(mesh.shape)}')
  show('parameters', f'{num_parameters(net):,}')
  show('train state', gib(sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state))))
  show('steps', f'{num_steps(config):,} of {train.batch_size} images')
  traced, rows = step_on(model, mesh, platform)
  show('FLOPs of a step', f'{sum(flops(traced.jaxpr).values()) / train.steps_per_call:.3e}')
  own, limit = memory.device_bytes(state), memory.limit(mesh.devices.flat[0], mesh.size)
  if own > limit:
    show('memory of a device', f'{gib(limit)}, and the train state alone takes {gib(own)}: it is not compiled here; '
                               f'`diffusion-jax plan` compiles for other machines')
    return 0
  program = compile_program(traced, rows, mesh.size)
  show('memory of a device', ', '.join(f'{part} {gib(size)}' for part, size in program.memory) or 'unknown here')
  show('compilation', f'{program.compile_seconds:.1f} s on {log.device()}')
  return 0


def num_steps(config: Config) -> int:
  """Of a whole training run."""
  train = config.train
  return -(-train.images // (train.batch_size * train.steps_per_call)) * train.steps_per_call
