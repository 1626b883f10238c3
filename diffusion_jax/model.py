"""From a config to the parts that train, sample and evaluate share."""
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax.core import diffusion, ema, levels, losses, samplers, schedules, targets
from diffusion_jax.core.diffusion import Diffusion
from diffusion_jax.core.types import Array, Denoise
from diffusion_jax.data import sources
from diffusion_jax.nets import codecs, encoders, unet
from diffusion_jax.runtime import optim, sharding
from diffusion_jax.runtime.checkpoint import abstract_with
from diffusion_jax.runtime.config import Config, UserError, build, explain, flatten, nearest, spec
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
          'augment': 0.0,         # probability of each of EDM's augmentations, which the net is told of; 0: none
          'data_dir': '',         # where TFDS keeps its data; '': its default
          'manual_dir': '',       # where archives that you fetched lie
          'max_bad': 10,          # unreadable images that are skipped before it is an error
          'resident_gib': 1.0,    # data up to this size stays on the device; larger data is streamed
          'workers': 0,           # processes that decode streamed data; 0: threads
      },
      'codec': spec(codecs.pixels),  # what the net sees of an image
      'text': spec(encoders.none),  # what reads captions, for nets that are conditioned on text
      'process': spec(schedules.linear),
      'target': spec(targets.eps),
      'noise': spec(diffusion.timestep),  # the scalar by which the net knows the level
      'draw': spec(levels.uniform),
      'weight': spec(losses.simple),
      'net': spec(unet.UNet),
      'lora': {'rank': 0, 'pattern': '', 'scale': 1.0},  # with a rank, adapters are trained in the net's place
      'start': '',                # the run folder whose parameters training starts from; '': random ones
      'label_dropout': 0.1,       # share of labels and texts replaced by none, for guidance
      'optimizer': spec(optax.adam),
      'learning_rate': {'peak': 2e-4, 'warmup_images': 640_000, 'decay': 'constant'},
      'clip_norm': 1.0,
      'ema': {'main': spec(ema.constant)},
      'train': {
          'images': 102_400_000,
          'batch_size': 128,
          'accumulate': 1,        # microbatches per step
          'remat': 'none',        # what the backward pass computes again: none, or all but products (norms, ...)
          'reduce': 'float32',    # the type in which devices sum a bfloat16 net's gradients; bfloat16: half the bytes
          'moments': 'float32',   # the type of the optimizer's arrays; bfloat16, rounded at random: half the memory
          'ema_on_host': False,   # averages lie in the host's memory and pass through the device one by one
          'steps_per_call': 1,    # steps per dispatch: worth more than 1 on TPU and GPU
          'log_every': 128_000,
          'sample_every': 6_400_000,
          'checkpoint_every': 6_400_000,
          'keep': 2,              # checkpoints kept
          'snapshot_every': 1_280_000,  # snapshots of averages that are power functions, for posthoc_ema
      },
      'mesh': {'data': -1, 'fsdp': 1, 'tensor': 1, 'context': 1},
      'sharding': '',             # 'REGEX=AXES; ...': where parameters lie, before the rules of runtime/sharding.py
      'sample': {
          'sampler': spec(samplers.ddim),
          'grid': spec(levels.trailing),
          'steps': 50,
          'guidance': 1.0,        # scale of classifier-free guidance; 1: none
          'guidance_low': 0.0,    # guidance only where sigma / alpha is above this
          'guidance_high': 0.0,   # and at most this; 0: no limit
          'guidance_rescale': 0.0,  # share of the guided estimates' spread brought back to the conditional ones'
          'clip': True,           # keep x0 estimates within [-1, 1]
          'threshold': 0.0,       # percentile, such as 0.995, of dynamic thresholding before that; 0: none
          'batch_size': 64,
      },
      'eval': {
          'num_samples': 50_000,
          'features': 'pixels',   # or of a network: digits, cifar, inception, dinov2:FILE
          'split': 'train',       # the reference
          'held_out': 'test',     # scored against the reference as the floor; '': none
      },
  })


def open_data(data: Config, split: str) -> sources.Source:
  """A split of the data of a config (config.data); raises as `sources.load` does."""
  return sources.load(data.source, split, size=data.size, channels=data.channels, data_dir=data.data_dir,
                      manual_dir=data.manual_dir, max_bad=data.max_bad)


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
  if not 0 <= config.data.augment <= 1:
    raise UserError(f'config.data.augment must lie in [0, 1], got {config.data.augment}')
  for key, names in CHOICES.items():
    if flat[key] not in names:
      raise UserError(f'config.{key} must be {" or ".join(names)}, got {flat[key]!r}')
  if config.train.reduce != 'float32' and config.net.get('dtype', 'float32') == 'float32':
    raise UserError(f'config.train.reduce is {config.train.reduce}, but the gradients of a net with '
                    f'{"dtype float32" if "dtype" in config.net else "no dtype"} are float32: set '
                    f'config.net.dtype=bfloat16 as well, or leave config.train.reduce=float32')
  with explain('config.sharding'):
    sharding.parse_rules(config.sharding)
  for key, names in (('draw', levels.DRAWS), ('sample.grid', levels.GRIDS)):
    module, _, name = flat[f'{key}.fn'].partition(':')
    if module == levels.__name__ and name not in names:
      raise UserError(f'config.{key} cannot be {name!r}: there is {", ".join(names)}')
  if not config.ema or 'raw' in config.ema:
    raise UserError("config.ema must name at least one average, such as 'main'; 'raw' stands for no average")


AT_LEAST = {
    1: ['data.channels', 'train.images', 'train.batch_size', 'train.accumulate', 'train.steps_per_call',
        'train.log_every', 'train.sample_every', 'train.checkpoint_every', 'train.snapshot_every', 'train.keep',
        'sample.steps', 'sample.batch_size', 'eval.num_samples'],
    0: ['seed', 'lora.rank', 'data.size', 'data.max_bad', 'data.resident_gib', 'data.workers', 'sample.guidance_low',
        'sample.guidance_high', 'sample.threshold'],
}
CHOICES = {'train.remat': ('none', 'products'), 'train.reduce': ('float32', 'bfloat16'),
           'train.moments': ('float32', 'bfloat16')}


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
  codec: codecs.Pixels | codecs.KL
  shape: tuple[int, ...]  # (*S, C) of what the net sees
  image_shape: tuple[int, ...]
  num_classes: int        # labels that the model knows, of classes or of captions; 0: none
  draw: levels.Draw
  weight: losses.Weight
  text: encoders.Encoder | None = None
  captions: tuple[str, ...] = ()  # of a model of text: its data's, by label
  tokenise: Callable[[Sequence[str]], np.ndarray] | None = None
  null: np.ndarray | None = None  # the tokens of no text

  def init(self, key: Array) -> dict[str, Any]:
    """All parameters: 'net' and 'process', and 'weight', 'text', 'codec' and 'lora' where the config has them."""
    net_key, process_key = jax.random.split(key)
    parts = {'process': self.diffusion.process.init(process_key),
             'weight': self.weight.init(jax.random.fold_in(key, 2)),
             'text': self.text.init(jax.random.fold_in(key, 3)) if self.text else {},
             'codec': self.codec.init(jax.random.fold_in(key, 4), self.image_shape)}
    example = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.about_shapes(1))
    cond = self.cond(parts, example)
    parts['net'] = self.net.init(net_key, jnp.zeros((1, *self.shape)), jnp.zeros(1), cond)['params']
    if (adapters := self.config.lora).rank:
      from diffusion_jax.nets import lora
      parts['lora'] = lora.init(jax.random.fold_in(key, 5), parts['net'], adapters.rank, adapters.pattern)
    return {name: part for name, part in parts.items() if part or name in ('net', 'process')}

  def is_frozen(self, name: str) -> bool:
    """Whether the parameters of that name are used and not trained."""
    return {'codec': True, 'net': self.config.lora.rank > 0, 'text': self.text and not self.text.trained}.get(name, False)

  def whole(self, params: Mapping[str, Any], frozen: Mapping[str, Any] | tuple = ()) -> dict[str, Any]:
    """All parameters that the model runs with: those trained and those frozen, adapters merged into the net's."""
    parts = {**dict(frozen), **params}
    if adapters := parts.pop('lora', None):
      from diffusion_jax.nets import lora
      parts['net'] = lora.merge(parts['net'], adapters, self.config.lora.scale)
    return parts

  def about(self, labels: Array) -> dict[str, Array]:
    """What is known of examples by their labels [B], or by their tokens [B, L] for a model of text."""
    return {'tokens' if self.text else 'label': labels}

  def about_shapes(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of what is known of `size` examples while sampling."""
    shape = jax.ShapeDtypeStruct
    return self.about(shape((size, self.text.length) if self.text else (size,), jnp.int32))

  def labels(self, chosen: Sequence[int] | Sequence[str]) -> np.ndarray:
    """What `about` takes, of labels by number, or of texts: int32 [B], or tokens [B, L] for a model of text.

    Raises UserError for a text if the model knows none.
    """
    chosen = list(chosen)
    if self.text:
      texts = [one if isinstance(one, str) else self.captions[one] if self.captions else '' for one in chosen]
      return self.tokenise(texts) if texts else np.zeros((0, self.text.length), np.int32)
    if any(isinstance(one, str) for one in chosen):
      raise UserError('a prompt needs a model of text, and config.text of this one is none: give its class by --labels')
    return np.asarray(chosen, np.int32)

  def cond(self, params: Mapping[str, Any], about: Mapping[str, Array], drop: Array | None = None) -> dict[str, Array]:
    """What the net is conditioned on, of what is known of examples; where `drop` [B], the null class or no text."""
    cond = {name: value for name, value in about.items() if name not in ('label', 'tokens')}
    if self.text:
      tokens = about['tokens']
      tokens = tokens if drop is None else jnp.where(drop[:, None], self.null, tokens)
      cond |= self.text(params['text'], tokens)
    elif self.num_classes:
      cond['label'] = about['label']
    return cond | {'drop': drop} if drop is not None and (self.text or self.num_classes) else cond

  def denoiser(self, params: Mapping[str, Any], cond: Mapping[str, Array]) -> Denoise:
    """The denoiser of `params`, without dropout."""
    net = lambda x, noise: self.net.apply({'params': params['net']}, x, noise, cond)
    return diffusion.denoiser(net, self.diffusion, params['process'])


def make(config: Config, shape: tuple[int, ...], num_classes: int, captions: Sequence[str] = ()) -> Model:
  """The model of a config for images of `shape` (*S, C) with `num_classes` labels; UserError if they do not fit.

  captions: the text of each label, which a model of text reads in the label's place.
  """
  net, codec, text = build(config.net), build(config.codec), build(config.text)
  wanted = getattr(net, 'num_classes', 0)
  if wanted and wanted != num_classes:
    raise UserError(f'config.net.num_classes is {wanted}, but the data has {num_classes} classes: set it to '
                    f'{num_classes}' + (', or to 0 to ignore the labels' if num_classes else ''))
  with explain('config.codec'):
    latent = codec.latent(shape)
  tokenise = text.tokenise if text else None
  model = Model(config, net, Diffusion(build(config.process), build(config.target), build(config.noise)),
                codec, tuple(latent), tuple(shape), len(captions) if text else wanted, build(config.draw),
                build(config.weight), text, tuple(captions) if text else (), tokenise)
  with explain('config.net'):
    out = jax.eval_shape(lambda key: _denoised(model, model.whole(model.init(key))), jax.random.key(0))
  _check_fits(model, has_variance=out[1] is not None)
  return model


def _denoised(model: Model, params: Mapping[str, Any]) -> tuple:
  about = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), model.about_shapes(1))
  level = model.diffusion.process.path.level(jnp.zeros(1))
  return model.denoiser(params, model.cond(params, about)).both(jnp.zeros((1, *model.shape)), level)


def _check_fits(model: Model, has_variance: bool) -> None:
  """Raises UserError for parts of a config that cannot work together, each of them right by itself."""
  config, process, weight = model.config, model.diffusion.process, model.weight
  name = lambda part: part.fn.partition(':')[2]
  start = process.init(jax.random.key(0))
  if jax.tree.leaves(start) and not weight.ends:
    raise UserError(f'config.process {name(config.process)} is learned, and config.weight {name(config.weight)} would '
                    f'only drive it to where the loss is low: take the weight vlb or likelihood')
  if weight.bound and not process.num_steps:
    raise UserError(f'config.weight {name(config.weight)} needs the steps of a chain, and config.process '
                    f'{name(config.process)} is in continuous time: take a schedule with num_steps')
  if bool(weight.bound) != has_variance:
    raise UserError(f'config.weight {name(config.weight)} trains a variance output, and config.net has none: set '
                    f'config.net.variance=true' if weight.bound else
                    f'config.net has a variance output, and config.weight {name(config.weight)} does not train it: '
                    f'take the weight hybrid')
  sampler = config.sample.sampler
  if name(sampler) == 'ancestral_learned':
    if not has_variance:
      raise UserError('config.sample.sampler ancestral_learned needs a net with a variance output, and this one has '
                      'none: take ancestral')
    if sampler.kind != config.weight.get('variance', sampler.kind):
      raise UserError(f'config.sample.sampler reads the variance output as {sampler.kind!r}, and config.weight trains '
                      f'it as {config.weight.variance!r}: they must be the same')
  ends = process.path.level(jnp.asarray(schedules.evaluate(process, [0.0, 1.0], start), jnp.float32))
  if not all(np.isfinite(c).all() for c in targets.on(model.diffusion.target, process, start).coeffs(ends)):
    raise UserError(f'config.target {name(config.target)} says nothing of x0 where config.process '
                    f'{name(config.process)} leaves no signal (alpha = 0 at t = 1): take v or x0')


def key(seed: int, purpose: str) -> Array:
  """The key of a purpose ('init', 'train', 'sample'): a function of the two alone."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def abstract_params(model: Model, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Shapes, types and shardings of all parameters that the model runs with."""
  state = abstract_state(model, mesh)
  return {name: part for name, part in {**dict(state.frozen), **state.params}.items() if name != 'lora'}


def optimizer_of(config: Config) -> optax.GradientTransformation:
  """The optimizer of a config."""
  with explain('config.learning_rate'):
    rate = optim.learning_rate(**config.learning_rate, total_images=config.train.images,
                               batch_size=config.train.batch_size)
  with explain('config.optimizer'):
    return optim.make(config.optimizer, rate, config.clip_norm, config.train.moments)


def initial_state(model: Model, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
  """The state before the first step: every average starts at the parameters."""
  parts = model.init(key)
  params = {name: part for name, part in parts.items() if not model.is_frozen(name)}
  frozen = {name: part for name, part in parts.items() if model.is_frozen(name)}
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params),
                    emas={name: jax.tree.map(jnp.copy, params) for name in model.config.ema},
                    draw=model.draw.init(model.diffusion.process), frozen=frozen or ())


def abstract_state(model: Model, mesh: jax.sharding.Mesh) -> TrainState:
  """Shapes, types and shardings of the train state on `mesh`; UserError if it cannot be laid out as the config says."""
  config = model.config
  shapes = jax.eval_shape(lambda k: initial_state(model, optimizer_of(config), k), jax.random.key(0))
  with explain('config.sharding'):
    where = sharding.state(shapes, mesh, config.sharding)
  if config.train.ema_on_host:
    with explain('config.train.ema_on_host'):
      where = where.replace(emas=sharding.on_host(where.emas))
  whole = jax.tree.map(lambda _: sharding.replicated(mesh), shapes.draw)  # every device draws from all of it
  return abstract_with(shapes, where.replace(draw=whole))
