"""From a config to the parts that train, sample and evaluate share."""
import json
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from diffusion_jax.core import diffusion, ema, guidance, levels, losses, samplers, schedules, targets
from diffusion_jax.core.diffusion import Diffusion
from diffusion_jax.core.types import Array, Denoise
from diffusion_jax.nets import codecs, unet
from diffusion_jax.runtime import optim, sharding
from diffusion_jax.runtime.checkpoint import Checkpoints, abstract_with
from diffusion_jax.runtime.config import Config, UserError, build, explain, flatten, from_json, nearest, spec
from diffusion_jax.runtime.state import TrainState


def default_config() -> Config:
  """Every key that a config has, at DDPM's values for CIFAR-10 where the paper gives one. Durations count images."""
  return Config({
      'seed': 0,
      'data': {
          'source': 'digits',     # digits, folder:PATH, zip:PATH, npz:PATH, tfds:NAME, synthetic:HxWxC
          'split': 'train',
          'size': 0,              # images are resized and cropped to size x size; 0: they have one size already
          'channels': 3,
          'flip': False,          # mirror each image left to right with probability 1/2
          'data_dir': '',         # where TFDS keeps its data; '': its default
          'manual_dir': '',       # where archives that you fetched lie
          'max_bad': 10,          # unreadable images that are skipped before it is an error
          'resident_gib': 1.0,    # data up to this size stays on the device; larger data is streamed
          'workers': 0,           # processes that decode streamed data; 0: threads
      },
      'process': spec(schedules.linear),
      'target': spec(targets.eps),
      'noise': spec(diffusion.timestep),  # the scalar by which the net knows the level
      'draw': spec(levels.uniform),
      'weight': spec(losses.simple),
      'net': spec(unet.UNet),
      'label_dropout': 0.1,       # share of labels replaced by the null class, for guidance; labelled nets only
      'optimizer': spec(optax.adam),
      'learning_rate': {'peak': 2e-4, 'warmup_images': 640_000, 'decay': 'constant'},
      'clip_norm': 1.0,
      'ema': {'main': spec(ema.constant)},
      'train': {
          'images': 102_400_000,
          'batch_size': 128,
          'accumulate': 1,        # microbatches per step
          'steps_per_call': 1,    # steps per dispatch: worth more than 1 on TPU and GPU
          'log_every': 128_000,
          'sample_every': 6_400_000,
          'checkpoint_every': 6_400_000,
          'keep': 2,              # checkpoints kept
      },
      'mesh': {'data': -1, 'fsdp': 1},
      'sample': {
          'sampler': spec(samplers.ddim),
          'grid': spec(levels.trailing),
          'steps': 50,
          'guidance': 1.0,        # scale of classifier-free guidance; 1: none
          'clip': True,           # keep x0 estimates within [-1, 1]
          'batch_size': 64,
      },
      'eval': {
          'num_samples': 50_000,
          'features': 'pixels',   # digits (a classifier's) or pixels
          'split': 'train',       # the reference
          'held_out': 'test',     # scored against the reference as the floor; '': none
      },
  })


def check(config: Config) -> None:
  """Raises UserError if a key is missing, unknown or out of range."""
  template = default_config()
  _check_keys(config, template, flatten(template))
  flat = flatten(config)
  for low, keys in AT_LEAST.items():
    for key in keys:
      if not flat[key] >= low:
        raise UserError(f'config.{key} must be at least {low}, got {flat[key]}')
  if not 0 <= config.label_dropout <= 1:
    raise UserError(f'config.label_dropout must lie in [0, 1], got {config.label_dropout}')
  if config.train.batch_size % config.train.accumulate:
    raise UserError(f'config.train.accumulate must divide the batch size: batch size {config.train.batch_size}, '
                    f'accumulate {config.train.accumulate}')
  for key, names in (('draw', levels.DRAWS), ('sample.grid', levels.GRIDS)):
    module, _, name = flat[f'{key}.fn'].partition(':')
    if module == levels.__name__ and name not in names:
      raise UserError(f'config.{key} cannot be {name!r}: there is {", ".join(names)}')
  if not config.ema or 'raw' in config.ema:
    raise UserError("config.ema must name at least one average, such as 'main'; 'raw' stands for no average")


AT_LEAST = {
    1: ['data.channels', 'train.images', 'train.batch_size', 'train.accumulate', 'train.steps_per_call',
        'train.log_every', 'train.sample_every', 'train.checkpoint_every', 'train.keep', 'sample.steps',
        'sample.batch_size', 'eval.num_samples'],
    0: ['seed', 'data.size', 'data.max_bad', 'data.resident_gib', 'data.workers'],
}


def _check_keys(config: Config, template: Config, known: Any, prefix: str = '') -> None:
  """The same keys at every depth, down to specs, whose keys `build` checks; the names under ema are free."""
  for key in {**config, **template}:
    name = prefix + key
    if key not in template:
      raise UserError(f'config has no key {name!r}{nearest(name, known)}')
    if key not in config:
      raise UserError(f'config lacks {name!r}: begin with diffusion_jax.model.default_config()')
    if not isinstance(config[key], (float, int) if isinstance(template[key], float) else type(template[key])):
      raise UserError(f'config.{name} must be like {template[key]!r}, got {config[key]!r}'.replace('\n', ' '))
    if isinstance(template[key], Config):
      specs = [config[key]] if 'fn' in template[key] else config[key].values() if key == 'ema' else []
      if any(not isinstance(spec, Config) or 'fn' not in spec for spec in specs):
        raise UserError(f'config.{name} must be made with spec(function, ...)')
      if not specs:
        _check_keys(config[key], template[key], known, f'{name}.')


class Model(NamedTuple):
  """What a config describes, for images of one shape."""
  config: Config
  net: nn.Module
  diffusion: Diffusion
  codec: codecs.Pixels
  shape: tuple[int, ...]  # (*S, C)
  num_classes: int        # labels that the net knows; 0: none

  def init(self, key: Array) -> dict[str, Any]:
    """The parameters {'net': ..., 'process': ...}."""
    net_key, process_key = jax.random.split(key)
    variables = self.net.init(net_key, jnp.zeros((1, *self.shape)), jnp.zeros(1), self.cond(jnp.zeros(1, jnp.int32)))
    return {'net': variables['params'], 'process': self.diffusion.process.init(process_key)}

  def cond(self, labels: Array, drop: Array | None = None) -> dict[str, Array]:
    """What the net is conditioned on, for labels [B]; those with `drop` [B] are the null class."""
    if not self.num_classes:
      return {}
    return {'label': labels} if drop is None else {'label': labels, 'drop': drop}

  def denoiser(self, params: Mapping[str, Any], cond: Mapping[str, Array]) -> Denoise:
    """The denoiser of `params`, without dropout."""
    net = lambda x, noise: self.net.apply({'params': params['net']}, x, noise, cond)
    return diffusion.denoiser(net, self.diffusion, params['process'])

  def sampling_denoiser(self, params: Mapping[str, Any], labels: Array, scale: float) -> Denoise:
    """The denoiser with the config's clipping, guided with `scale` towards labels [B]."""
    clip = guidance.clip if self.config.sample.clip else lambda denoise: denoise
    denoise = self.denoiser(params, self.cond(labels))
    if scale == 1:
      return clip(denoise)
    null = self.denoiser(params, self.cond(labels, jnp.ones(labels.shape, bool)))
    return clip(guidance.cfg(denoise, null, scale))


def make(config: Config, shape: tuple[int, ...], num_classes: int) -> Model:
  """The model of a config for images of `shape` (*S, C) with `num_classes` labels; UserError if they do not fit."""
  net = build(config.net)
  wanted = getattr(net, 'num_classes', 0)
  if wanted and wanted != num_classes:
    raise UserError(f'config.net.num_classes is {wanted}, but the data has {num_classes} classes: set it to '
                    f'{num_classes}' + (', or to 0 to ignore the labels' if num_classes else ''))
  model = Model(config, net, Diffusion(build(config.process), build(config.target), build(config.noise)),
                codecs.Pixels(), tuple(shape), wanted)
  with explain('config.net'):
    jax.eval_shape(model.init, jax.random.key(0))
  return model


def key(seed: int, purpose: str) -> Array:
  """The key of a purpose ('init', 'train', 'sample'): a function of the two alone."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


class Trained(NamedTuple):
  """A model and one set of its parameters out of a run folder, on every device of `mesh`."""
  model: Model
  mesh: jax.sharding.Mesh
  params: Any
  step: int
  images: int
  ema: str
  class_names: tuple[str, ...]


def restore(workdir: pathlib.Path, ema_name: str, step: int | None,
            choose_devices: Callable[[Config], None]) -> Trained:
  """The parameters of a run: the average `ema_name`, or 'raw'; of the newest whole checkpoint or of `step`.

  `choose_devices(config)` runs before anything touches a device. Raises UserError if the folder is not a run's.
  """
  config = from_json(workdir / 'config.json')
  check(config)
  names = [*config.ema, 'raw']
  if ema_name and ema_name not in names:
    raise UserError(f'there is no average {ema_name!r} in this run{nearest(ema_name, names)}')
  choose_devices(config)
  about = json.loads((workdir / 'data.json').read_text())
  model = make(config, about['shape'], about['num_classes'])
  checkpoints = Checkpoints(workdir)
  mesh = sharding.make_mesh()
  found = checkpoints.restore(abstract_state(model, mesh), step)
  checkpoints.close()
  if found is None:
    raise UserError(f'there is no checkpoint in {str(workdir)!r} yet: let train reach its first')
  state, meta = found
  name = ema_name or next(iter(config.ema))
  params = state.params if name == 'raw' else state.emas[name]
  return Trained(model, mesh, params, meta['step'], meta['images'], name, tuple(about['class_names']))


def optimizer_of(config: Config) -> optax.GradientTransformation:
  """The optimizer of a config."""
  with explain('config.learning_rate'):
    rate = optim.learning_rate(**config.learning_rate, total_images=config.train.images,
                               batch_size=config.train.batch_size)
  with explain('config.optimizer'):
    return optim.make(config.optimizer, rate, config.clip_norm)


def initial_state(model: Model, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
  """The state before the first step: every average starts at the parameters."""
  params = model.init(key)
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params),
                    emas={name: jax.tree.map(jnp.copy, params) for name in model.config.ema})


def abstract_state(model: Model, mesh: jax.sharding.Mesh) -> TrainState:
  """Shapes, types and shardings of the train state on `mesh`."""
  shapes = jax.eval_shape(lambda k: initial_state(model, optimizer_of(model.config), k), jax.random.key(0))
  return abstract_with(shapes, sharding.state(shapes, mesh))
