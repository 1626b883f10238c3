"""The compiled sampler: images by id.

Sample i depends on (seed, i) alone: the same image in any batch, on any number of devices. The last batch is padded,
not compiled anew.
"""
import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import capacity
from diffusion_jax import model as model_lib
from diffusion_jax.core import adaptive, caching, guidance, samplers
from diffusion_jax.core.types import Denoise, Denoiser, Level
from diffusion_jax.model import Model
from diffusion_jax.nets import layers
from diffusion_jax.nets.blocks import check_depth
from diffusion_jax.runtime import distributed, sharding, snapshots
from diffusion_jax.runtime.config import Config, UserError, build, explain


class Generator:
  """generate(params, ids, labels) -> images, compiled once for one batch shape.

  Where config.batch_size is 0 it has none yet: see `resized`, and capacity.fitted, which chooses it.

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
      raise UserError(f'a negative {"prompt" if model.text else "class"} needs guidance: give --guidance other than 1')
    self.batch_size, self.trajectory, self.mesh = config.batch_size, trajectory, mesh
    self.calls = self.sampler.nfe(config.steps) if self.sampler.calls else []  # a list: each sample has its own
    with explain('sampling'):
      guided(lambda x, level: x, lambda x, level: x, config)  # its settings are checked before anything is compiled
    self._networks = 1 if config.guidance == 1 else 2
    self.depth = _cache_depth(model, self.sampler, config)
    of_each = [self.calls] * self._networks
    if _limited(config) and self.sampler.calls:
      ratio = _visited(self.sampler, self.grid)
      inside = (config.guidance_low < ratio) & (ratio <= (config.guidance_high or math.inf))
      of_each = [self.calls, int(inside.sum())]
      self.calls, self._networks = sum(of_each), 1
    self._whole = sum(math.ceil(calls / config.cache_every) for calls in of_each) if self.depth else 0
    self._compiled = None
    self.compile_seconds = 0.0
    self._model, self._root = model, model_lib.key(seed, 'sample')
    counts = not self.sampler.calls and not trajectory
    sampler = adaptive.counted(self.sampler) if counts else self.sampler

    def decode(params, x):
      one = lambda x: model.codec.decode(params.get('codec', {}), x)
      return one(x) if x.ndim == 1 + len(model.shape) else jax.lax.map(one, x)

    # What guidance leads away from: a number or the tokens of a text, and whether it is dropped: one program for all.
    plain = negative == -1
    self._led_from = model.labels(['' if model.text else 0] if plain else [negative])[0], np.bool_(plain)

    def generate(params, root, grid, led_from, ids, about):
      keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(ids)
      other, dropped = (jnp.broadcast_to(a, (len(ids), *a.shape)) for a in led_from)
      ref = model.cond(params, {**about, **model.about(other)}, dropped)
      cache = caching.Cache(config.cache_every, self.depth)
      denoise = guided(model.denoiser(params, model.cond(params, about), cache.net),
                       model.denoiser(params, ref, cache.net if config.guidance != 1 else None), config, cache.cond)
      x = samplers.prior(keys, model.shape, jax.tree.map(lambda a: a[0], grid))
      found = samplers.solve(cache.sampler(sampler), denoise, x, grid, keys, trajectory)
      images, calls = found if counts else (found, ())
      return jax.tree.map(lambda x: decode(params, x), images), calls

    self._generate = jax.jit(layers.placed(sharding.over_batch(mesh))(generate))

  def reseeded(self, seed: int) -> 'Generator':
    """The same, compiled too, with another seed of all samples."""
    other = self._copied()
    other._root = model_lib.key(seed, 'sample')
    return other

  def resized(self, batch_size: int) -> 'Generator':
    """The same for batches of another size, not compiled yet; it must be a multiple of the devices that share one."""
    other = self._copied()
    other.batch_size, other._compiled, other.compile_seconds = batch_size, None, 0.0
    return other

  def _copied(self):
    other = copy.copy(self)
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

  @property
  def whole(self) -> int:
    """Those of the `nfe` that compute the whole network: all, unless features are cached."""
    return self._whole if self.depth else self.nfe

  def compile(self, params: Any) -> 'jax.stages.Compiled':
    """Compiles, once, and notes the seconds it took."""
    if self._compiled is None:
      start = time.perf_counter()
      with capacity.explained(self, params):
        self._compiled = self._generate.lower(*self._arguments(params, np.zeros(0), [])).compile()
      self.compile_seconds = time.perf_counter() - start
    return self._compiled

  def trace(self, params: Any) -> Any:
    """What jax traces for `params`, arrays or their shapes with shardings, on a mesh that need not exist."""
    where = lambda tree, axes: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=axes), tree)
    ids = jax.ShapeDtypeStruct((self.batch_size,), jnp.uint32)
    shared, each = sharding.replicated(self.mesh), sharding.batch(self.mesh)
    return self._generate.trace(params, *where((self._root, self.grid, self._led_from), shared),
                                *where((ids, self._model.about_shapes(self.batch_size)), each))

  def __call__(self, params: Any, ids: Sequence[int], labels: Sequence[int] | Sequence[str],
               image: np.ndarray | None = None) -> Any:
    """uint8 images [n, *S, C] of at most batch_size ids; with a trajectory (images, (x [N, n, ...], x0 estimate)).

    image: [n, *S, c] or [1, *S, c], for a model that is given one: what config.given makes of pictures.
    """
    compiled = self.compile(params)
    with capacity.explained(self, params, compiled):
      found = compiled(*self._arguments(params, np.asarray(ids), labels, image))
      out, calls = jax.device_get(jax.tree.map(snapshots.on_host, found) if distributed.count() > 1 else found)
    if len(calls):
      self.calls += calls[:len(ids)].tolist()
    if not self.trajectory:
      return out[:len(ids)]
    return out[0][:len(ids)], jax.tree.map(lambda a: a[:, :len(ids)], out[1])

  def draw(self, params: Any, ids: Sequence[int], labels: Sequence[int] | Sequence[str],
           image: np.ndarray | None = None) -> np.ndarray:
    """uint8 images [n, *S, C] of any number of ids, batch after batch; image: as for a call."""
    size, each = self.batch_size, image is not None and len(image) > 1
    parts = [slice(i, i + size) for i in range(0, len(ids), size)]
    return np.concatenate([self(params, ids[part], labels[part], image[part] if each else image) for part in parts])

  def _arguments(self, params: Any, ids: np.ndarray, labels: Sequence[int] | Sequence[str],
                 image: np.ndarray | None = None) -> tuple:
    grid = self._grid_of(params['process']) if jax.tree.leaves(params['process']) else self.grid
    shared = distributed.everywhere((self._root, grid, self._led_from), sharding.replicated(self.mesh))
    padded = lambda a: np.resize(a, (self.batch_size, *a.shape[1:]))  # repeats, or zeros from an empty array
    about = self._model.about(padded(self._model.labels(labels)))
    if 'image' in (shapes := self._model.about_shapes(self.batch_size)):
      if image is None and len(ids):
        raise UserError('this model draws the rest of a picture that it is given, and it is given none')
      about['image'] = padded(np.zeros((0, *shapes['image'].shape[1:])) if image is None else image).astype(np.float32)
    each = distributed.everywhere((padded(ids.astype(np.uint32)), about), sharding.batch(self.mesh))
    return params, *shared, *each


def guided(denoise: Denoise, ref: Denoise, config: Config, cond: Callable = jax.lax.cond) -> Denoise:
  """`denoise` led away from `ref`, within bounds, as the sampling settings say; cond: as of `guidance.interval`."""
  guide = lambda d: guidance.cfg(d, ref, config.guidance)
  rescaled = lambda d: guidance.rescale(d, guide, config.guidance_rescale) if config.guidance_rescale else guide(d)
  if _limited(config):
    denoise = guidance.interval(denoise, rescaled, config.guidance_low, config.guidance_high or math.inf, cond)
  elif config.guidance != 1:
    denoise = rescaled(denoise)
  if config.threshold:
    denoise = guidance.threshold(denoise, config.threshold)
  return guidance.clip(denoise) if config.clip else denoise


def _cache_depth(model: Model, sampler: samplers.Sampler, config: Config) -> int:
  """How many skip connections a call computes anew that is not whole; 0: all calls are. UserError if none can be."""
  if config.cache_every == 1:
    return 0
  skips = getattr(model.net, 'num_skips', 0)
  if not skips:
    raise UserError(f'cache_every {config.cache_every} needs a U-Net, whose skip connections pass by what is cached, '
                    f'and config.net is a {type(model.net).__name__}: use cache_every 1')
  with explain(f'cache_every {config.cache_every}'):
    caching.check(sampler)
  depth = config.cache_depth or model.net.blocks + 1
  with explain('cache_depth'):
    check_depth(depth, skips)
  return depth


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
