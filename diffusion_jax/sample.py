"""COMMAND: draws images from a trained model, by id.

Sample i depends on (seed, i) alone: the same image in any batch, on any number of devices. The last batch is padded,
not compiled anew.
"""
import copy
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import model as model_lib
from diffusion_jax.core import adaptive, guidance, levels, samplers
from diffusion_jax.core.types import Denoise, Denoiser, Level
from diffusion_jax.model import Model
from diffusion_jax.pictures import STRIP_IMAGES, columns_of, npz, png, tile, write_trajectory
from diffusion_jax.runtime import command, distributed, log, paths, sharding, snapshots
from diffusion_jax.runtime.config import Config, UserError, build, explain, parse_call
from diffusion_jax.trained import Trained, restore

GUIDANCE = ('guidance', 'guidance_low', 'guidance_high', 'guidance_rescale', 'threshold')  # settings with a flag


class Generator:
  """generate(params, ids, labels) -> images, compiled once for one batch shape.

  config: the sampling settings (config.sample); seed: of all samples; labels: as `Model.labels` takes them, numbers or,
  for a model of text, prompts.
  negative: the class, or the prompt, that guidance leads away from; -1: from the model without either.
  """

  def __init__(self, model: Model, config: Config, seed: int, mesh: jax.sharding.Mesh, trajectory: bool = False,
               negative: int | str = -1):
    with explain('sampling'):
      sharding.check_divides(mesh, config.batch_size, 'batch_size')
    self.sampler = build(config.sampler)
    process, grid = model.diffusion.process, build(config.grid)
    self._grid_of = lambda params: grid(process, config.steps, params)
    with explain('sampling'):
      self.grid = self._grid_of(process.init(jax.random.key(0)))  # of a learned schedule: made again from its params
    if config.guidance != 1 and not (model.num_classes or model.text):
      raise UserError(f'guidance {config.guidance} needs a model with classes or text, and this one has none: use '
                      f'guidance 1')
    if negative != -1 and config.guidance == 1:
      raise UserError('a negative class or prompt needs guidance: give --guidance other than 1')
    self.batch_size, self.trajectory, self.mesh = config.batch_size, trajectory, mesh
    self.calls = self.sampler.nfe(config.steps) if self.sampler.calls else []  # a list: each sample has its own
    with explain('sampling'):
      guided(lambda x, level: x, lambda x, level: x, config)  # its settings are checked before anything is compiled
    self._networks = 1 if config.guidance == 1 else 2
    if _limited(config) and self.sampler.calls:
      ratio = _visited(self.sampler, self.grid)
      inside = (config.guidance_low < ratio) & (ratio <= (config.guidance_high or math.inf))
      self.calls, self._networks = self.calls + int(inside.sum()), 1
    self._compiled = None
    self.compile_seconds = 0.0
    self._model, self._root = model, model_lib.key(seed, 'sample')
    counts = not self.sampler.calls and not trajectory
    sampler = adaptive.counted(self.sampler) if counts else self.sampler

    def decode(params, x):
      one = lambda x: model.codec.decode(params.get('codec', {}), x)
      return one(x) if x.ndim == 1 + len(model.shape) else jax.lax.map(one, x)

    other = None if negative == -1 else model.labels([negative])[0]  # a number, or the tokens of a text

    def generate(params, root, grid, ids, about):
      keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(ids)
      if other is None:
        ref = model.cond(params, about, jnp.ones(len(ids), bool))
      else:
        ref = model.cond(params, {**about, **model.about(jnp.broadcast_to(other, (len(ids), *other.shape)))})
      denoise = guided(model.denoiser(params, model.cond(params, about)), model.denoiser(params, ref), config)
      x = samplers.prior(keys, model.shape, jax.tree.map(lambda a: a[0], grid))
      found = samplers.solve(sampler, denoise, x, grid, keys, trajectory)
      images, calls = found if counts else (found, ())
      return jax.tree.map(lambda x: decode(params, x), images), calls

    self._generate = jax.jit(generate)

  def reseeded(self, seed: int) -> 'Generator':
    """The same, compiled too, with another seed of all samples."""
    other = copy.copy(self)
    other._root = model_lib.key(seed, 'sample')
    if isinstance(other.calls, list):
      other.calls = []
    return other

  @property
  def nfe(self) -> int:
    """Network evaluations for a sample; guidance that is skipped does not count.

    Of an adaptive sampler: the mean of those drawn so far, 0 before the first, and as if guidance were never skipped.
    """
    calls = self.calls if isinstance(self.calls, int) else math.ceil(np.mean(self.calls or [0]))
    return calls * self._networks

  def compile(self, params: Any) -> 'jax.stages.Compiled':
    """Compiles, once, and notes the seconds it took."""
    if self._compiled is None:
      start = time.perf_counter()
      self._compiled = self._generate.lower(*self._arguments(params, np.zeros(0), [])).compile()
      self.compile_seconds = time.perf_counter() - start
    return self._compiled

  def trace(self, params: Any) -> Any:
    """What jax traces for `params`, arrays or their shapes with shardings, on a mesh that need not exist."""
    where = lambda tree, axes: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=axes), tree)
    ids = jax.ShapeDtypeStruct((self.batch_size,), jnp.uint32)
    shared, each = sharding.replicated(self.mesh), sharding.batch(self.mesh)
    return self._generate.trace(params, *where((self._root, self.grid), shared),
                                *where((ids, self._model.about_shapes(self.batch_size)), each))

  def __call__(self, params: Any, ids: Sequence[int], labels: Sequence[int] | Sequence[str]) -> Any:
    """uint8 images [n, *S, C] of at most batch_size ids; with a trajectory (images, (x [N, n, ...], x0 estimate))."""
    compiled = self.compile(params)
    found = compiled(*self._arguments(params, np.asarray(ids), labels))
    out, calls = jax.device_get(jax.tree.map(snapshots.on_host, found) if distributed.count() > 1 else found)
    if len(calls):
      self.calls += calls[:len(ids)].tolist()
    if not self.trajectory:
      return out[:len(ids)]
    return out[0][:len(ids)], jax.tree.map(lambda a: a[:, :len(ids)], out[1])

  def _arguments(self, params: Any, ids: np.ndarray, labels: Sequence[int] | Sequence[str]) -> tuple:
    grid = self._grid_of(params['process']) if jax.tree.leaves(params['process']) else self.grid
    root, grid = distributed.everywhere((self._root, grid), sharding.replicated(self.mesh))
    padded = lambda a: np.resize(a, (self.batch_size, *a.shape[1:]))  # repeats, or zeros from an empty array
    each = padded(ids.astype(np.uint32)), self._model.about(padded(self._model.labels(labels)))
    return params, root, grid, *distributed.everywhere(each, sharding.batch(self.mesh))


def guided(denoise: Denoise, ref: Denoise, config: Config) -> Denoise:
  """`denoise` led away from `ref`, within bounds, as the sampling settings say."""
  guide = lambda d: guidance.cfg(d, ref, config.guidance)
  rescaled = lambda d: guidance.rescale(d, guide, config.guidance_rescale) if config.guidance_rescale else guide(d)
  if _limited(config):
    denoise = guidance.interval(denoise, rescaled, config.guidance_low, config.guidance_high or math.inf)
  elif config.guidance != 1:
    denoise = rescaled(denoise)
  if config.threshold:
    denoise = guidance.threshold(denoise, config.threshold)
  return guidance.clip(denoise) if config.clip else denoise


def _limited(config: Config) -> bool:
  """Whether guidance acts at some levels alone."""
  return config.guidance != 1 and bool(config.guidance_low or config.guidance_high)


def _visited(sampler: samplers.Sampler, grid: Level) -> np.ndarray:
  """sigma / alpha at each call of the denoiser, in no order: found by a run on one number."""
  seen = []

  def both(x, level):
    jax.debug.callback(lambda logsnr: seen.append(float(logsnr)), level.logsnr)
    return x, jnp.zeros_like(x)

  key = jax.random.split(jax.random.key(0), 1)
  jax.block_until_ready(samplers.solve(sampler, Denoiser(both), jnp.zeros((1, 1, 1, 1)), grid, key))
  jax.effects_barrier()
  return np.exp(-0.5 * np.asarray(seen))


def labels_of(ids: Sequence[int], num_classes: int, labels: Sequence[int] = ()) -> list[int]:
  """The label of each id: `labels` in turn, or every class in turn; 0 without classes."""
  cycle = list(labels) or list(range(num_classes)) or [0]
  return [cycle[i % len(cycle)] for i in ids]


def add_flags(p: command.Parser) -> None:
  """The flags that sample and evaluate share."""
  p.add_argument('--workdir', required=True, help='the run folder that train wrote')
  p.add_argument('--num', type=int, help='how many samples, ids 0 to N-1')
  p.add_argument('--seed', type=int, default=0, help='the seed of all samples (default 0)')
  p.add_argument('--sampler', help=f"such as 'ddim(eta=0.5)': {', '.join(samplers.__all__)}")
  p.add_argument('--grid', help=f"which levels are visited: {', '.join(levels.GRIDS)}")
  p.add_argument('--steps', type=int, help='levels visited')
  p.add_argument('--guidance', type=float, help='scale of classifier-free guidance; 1: none')
  p.add_argument('--guidance_low', type=float, help='guidance only where sigma / alpha is above this')
  p.add_argument('--guidance_high', type=float, help='and at most this; 0: no limit')
  p.add_argument('--guidance_rescale', type=float, help='share of the spread that guidance gives back; 0: none')
  p.add_argument('--threshold', type=float, help='percentile, such as 0.995, of dynamic thresholding; 0: none')
  p.add_argument('--ema', default='', help="which average of the parameters (default: the config's first), 'raw' for "
                                           "none, or the file of one that posthoc_ema made")
  p.add_argument('--step', type=int, help='which checkpoint (default: the newest)')
  p.add_argument('--batch_size', type=int, help='samples compiled together')
  command.add_process_flags(p)


def open_run(flags: Any, apart: bool = False) -> tuple[Trained, Config]:
  """The trained model that the flags name, and its sampling settings with the flags' put in.

  Several processes hold it together, or each the whole of it on its own devices if they work `apart`.
  """
  if flags.num is not None and flags.num < 1:
    raise UserError(f'--num must be at least 1, got {flags.num}')
  if flags.seed < 0:
    raise UserError(f'--seed must be at least 0, got {flags.seed}')
  chosen = {name: parse_call(getattr(flags, name), module)
            for name, module in (('sampler', samplers), ('grid', levels)) if getattr(flags, name)}
  chosen |= {k: v for k in ('steps', *GUIDANCE, 'batch_size') if (v := getattr(flags, k)) is not None}

  def choose_devices(config):
    for key, value in chosen.items():
      config.sample[key] = value
    model_lib.check(config)
    processes = command.join(flags)
    sharding.use_cpu_cores(config.sample.batch_size // (1 if apart else processes))

  trained = restore(paths.folder(flags.workdir), flags.ema, flags.step, choose_devices)
  if apart and distributed.count() > 1:
    own = sharding.make_mesh(devices=jax.local_devices())
    place = lambda a: jax.device_put(snapshots.on_host(a), sharding.replicated(own))
    trained = trained._replace(mesh=own, params=jax.tree.map(place, trained.params))
  return trained, trained.model.config.sample


def describe(config: Config) -> dict[str, str]:
  """'ddim(eta=0.0)' and the like for the specs of the sampling settings."""
  def call(spec):
    arguments = ', '.join(f'{k}={v!r}' for k, v in spec.items() if k != 'fn')
    return f'{spec.fn.partition(":")[2]}({arguments})'
  return {'sampler': call(config.sampler), 'grid': call(config.grid)}


def parse_numbers(flag: str, text: str) -> list[int]:
  """'3,5,10-12' as [3, 5, 10, 11, 12]; UserError if it is not of that form."""
  numbers = []
  try:
    for part in text.split(','):
      low, dash, high = part.partition('-')
      numbers += range(int(low), int(high) + 1) if dash else [int(low)]
  except ValueError:
    numbers = []
  if not numbers:
    raise UserError(f"{flag} must be numbers like 3,5,10-12, got {text!r}")
  return numbers


def main(argv: Sequence[str] | None = None) -> int:
  """`diffusion-jax sample`: see --help."""
  p = command.parser('sample', 'Draws images from a trained model.')
  add_flags(p)
  p.add_argument('--ids', help='which samples, such as 3,5,10-12 (instead of --num)')
  p.add_argument('--labels', help='their classes in turn, by number or name: 7, or cat,dog (default: every class)')
  p.add_argument('--negative', help='the class that guidance leads away from (default: from no class)')
  p.add_argument('--trajectory', action='store_true', help='also a strip and a GIF of x and of the x0 estimate')
  p.add_argument('--out', help='a folder, or FILE.npz, or FILE.png for the grid alone (default: WORKDIR/samples/final)')
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError(f'sample takes its config from the run folder: --config.{next(iter(overrides))} is for train')
  ids = parse_numbers('--ids', flags.ids) if flags.ids else list(range(flags.num or 64))
  trained, config = open_run(flags)
  model = trained.model
  labels = labels_of(ids if not flags.labels else range(len(ids)), model.num_classes,
                     _labels('--labels', flags.labels, model, trained.class_names))
  negatives = _labels('--negative', flags.negative, model, trained.class_names) or [-1]
  if len(negatives) > 1:
    raise UserError(f'--negative must be one class, got {flags.negative!r}')

  generator = Generator(model, config, flags.seed, trained.mesh, negative=negatives[0])
  generator.compile(trained.params)
  start = time.perf_counter()
  images = np.concatenate([generator(trained.params, ids[i:i + config.batch_size], labels[i:i + config.batch_size])
                           for i in range(0, len(ids), config.batch_size)])
  seconds = time.perf_counter() - start

  traced = None
  if flags.trajectory:
    count = min(STRIP_IMAGES, len(ids))
    tracer = Generator(model, config, flags.seed, trained.mesh, trajectory=True, negative=negatives[0])
    _, traced = tracer(trained.params, ids[:count], labels[:count])
  if not distributed.is_writer():
    return 0
  out = paths.folder(flags.out or f'{flags.workdir}/samples/final')
  if out.suffix == '.npz':
    log.write(out, npz(image=images, id=np.asarray(ids), label=np.asarray(labels)))
  elif out.suffix == '.png':
    log.write(out, png(_grid(images, model)))
  else:
    log.write(out / 'grid.png', png(_grid(images, model)))
    for i, image in zip(ids, images, strict=True):
      log.write(out / f'{i:06d}.png', png(image))
  if traced:
    write_trajectory(out if not out.suffix else out.parent, *traced)
  print(f'{len(ids)} samples, {generator.nfe} network calls each, {len(ids) / seconds:.1f} samples/s '
        f'(compilation {generator.compile_seconds:.1f} s apart) -> {out}')
  return 0


def _grid(images: np.ndarray, model: Model) -> np.ndarray:
  if images.ndim != 4:
    raise UserError(f'images of shape {images.shape[1:]} cannot be a PNG: write arrays with --out=FILE.npz')
  return tile(images, columns_of(model, len(images)))


def _labels(flag: str, text: str | None, model: Model, class_names: tuple[str, ...]) -> list[int]:
  """The labels that a flag names."""
  if not text:
    return []
  if not model.num_classes:
    raise UserError(f'{flag}={text} needs a model with classes, and this one has none')
  numbers = []
  for word in text.split(','):
    number = class_names.index(word) if word in class_names else int(word) if word.isdigit() else -1
    if not 0 <= number < model.num_classes:
      raise UserError(f'{flag}: {word!r} is no class: there are 0 to {model.num_classes - 1}, '
                      f'named {", ".join(class_names[:20])}')
    numbers.append(number)
  return numbers


if __name__ == '__main__':
  sys.exit(command.run(main))
