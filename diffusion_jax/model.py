"""From a config to the parts that train, sample and evaluate share."""
import functools
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax.convert import tokenizer
from diffusion_jax.core import diffusion, givens, levels, losses, schedules, targets
from diffusion_jax.core.diffusion import Diffusion
from diffusion_jax.core.types import Array, Denoise, Net
from diffusion_jax.nets import codecs, controlnet, encoders, lora
from diffusion_jax.runtime import optim, sharding
from diffusion_jax.runtime.checkpoint import abstract_with
from diffusion_jax.runtime.config import Config, UserError, build, explain
from diffusion_jax.runtime.state import TrainState
from diffusion_jax.settings import check, default_config, open_data  # noqa: F401  a model's users look for them here

TOKENIZER = 'tokenizer'  # the folder of a tokenizer's files in a run folder


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
  given: givens.Given | None = None
  control: controlnet.ControlNet | None = None  # what `given` goes to in the net's place

  @property
  def beside(self) -> str:
    """The name of what is trained beside a net that is frozen: 'lora', 'control', or '' if the net itself is."""
    return 'lora' if self.config.lora.rank else 'control' if self.control else ''

  def init(self, key: Array) -> dict[str, Any]:
    """All parameters: 'net' and 'process', and 'weight', 'text', 'codec' and `beside` where the config has them."""
    net_key, process_key = jax.random.split(key)
    parts = {'process': self.diffusion.process.init(process_key),
             'weight': self.weight.init(jax.random.fold_in(key, 2)),
             'text': self.text.init(jax.random.fold_in(key, 3)) if self.text else {},
             'codec': self.codec.init(jax.random.fold_in(key, 4), self.image_shape)}
    example = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.about_shapes(1))
    cond = self.cond(parts, example)
    inputs = jnp.zeros((1, *self.shape)), jnp.zeros(1), cond
    parts['net'] = self.net.init(net_key, *inputs)['params']
    if self.beside == 'lora':
      adapters = self.config.lora
      parts['lora'] = lora.init(jax.random.fold_in(key, 5), parts['net'], adapters.rank, adapters.pattern)
    elif self.beside == 'control':
      parts['control'] = self.control.init(jax.random.fold_in(key, 6), *inputs)['params']
    return {name: part for name, part in parts.items() if part or name in ('net', 'process')}

  def is_frozen(self, name: str) -> bool:
    """Whether the parameters of that name are used and not trained."""
    frozen = {'codec': True, 'net': self.beside, 'text': self.beside or (self.text and not self.text.trained)}
    return bool(frozen.get(name))

  def whole(self, params: Mapping[str, Any], frozen: Mapping[str, Any] | tuple = ()) -> dict[str, Any]:
    """All parameters that the model runs with: those trained and those frozen, adapters merged into the net's."""
    parts = {**dict(frozen), **params}
    if adapters := parts.pop('lora', None):
      parts['net'] = lora.merge(parts['net'], adapters, self.config.lora.scale)
    return parts

  def about(self, labels: Array) -> dict[str, Array]:
    """What is known of examples by their labels [B], or by their tokens [B, L] for a model of text."""
    return {'tokens' if self.text else 'label': labels}

  def about_shapes(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of what is known of `size` examples while sampling."""
    shape = jax.ShapeDtypeStruct
    about = self.about(shape((size, self.text.length) if self.text else (size,), jnp.int32))
    if self.given:
      *space, channels = self.image_shape
      about['image'] = shape((size, *space, self.given.channels(channels)), jnp.float32)
    return about

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
    if self.control:
      cond['hint'] = (cond.pop('image') + 1) / 2
    if self.text:
      tokens = about['tokens']
      tokens = tokens if drop is None else jnp.where(drop[:, None], self.tokenise(['']), tokens)
      cond |= self.text(params['text'], tokens)
    elif self.num_classes:
      cond['label'] = about['label']
    return cond | {'drop': drop} if drop is not None and (self.text or self.num_classes) else cond

  def apply(self, params: Mapping[str, Any], x: Array, noise: Array, cond: Mapping[str, Array],
            cut: Mapping[str, Any] | None = None, **how: Any) -> Array:
    """The network's output, steered by the ControlNet if there is one; how: train and rngs; cut: depth and deep."""
    if self.control:
      cond = {**cond, 'control': self.control.apply({'params': params['control']}, x, noise, cond, **how)}
    return self.net.apply({'params': params['net']}, x, noise, cond, **how, **(cut or {}))

  def denoiser(self, params: Mapping[str, Any], cond: Mapping[str, Array],
               change: Callable[[Callable], Net] | None = None) -> Denoise:
    """The denoiser of `params`, without dropout. change: what is made of its net(x, noise, **cut)."""
    net = lambda x, noise, **cut: self.apply(params, x, noise, cond, cut)
    return diffusion.denoiser(change(net) if change else net, self.diffusion, params['process'])


def make(config: Config, shape: tuple[int, ...], num_classes: int, captions: Sequence[str] = (),
         folder: pathlib.Path | None = None) -> Model:
  """The model of a config for images of `shape` (*S, C) with `num_classes` labels; UserError if they do not fit.

  captions: the text of each label, which a model of text reads in the label's place; folder: its run's, if it has one.
  """
  net, codec, text, given = (build(config[part]) for part in ('net', 'codec', 'text', 'given'))
  wanted = getattr(net, 'num_classes', 0)
  if wanted and wanted != num_classes:
    raise UserError(f'config.net.num_classes is {wanted}, but the data has {num_classes} classes: set it to '
                    f'{num_classes}' + (', or to 0 to ignore the labels' if num_classes else ''))
  with explain('config.codec'):
    latent = codec.latent(shape)
  given, control = given if given.takes else None, None
  if config.control:
    if not given:
      raise UserError('config.control needs to know what of an image steers: set config.given to edges, or to another')
    with explain('config.control'):
      control = controlnet.beside(net, given.channels(shape[-1]), shape[0] // latent[0])
  elif given and tuple(latent) != tuple(shape):
    raise UserError('config.given is of images, and the net sees latents: take the codec pixels, or given none, or set '
                    'config.control')
  tokenise = text and (text.tokenise or functools.partial(_tokenise, config, folder, text.length))
  model = Model(config, net, Diffusion(build(config.process), build(config.target), build(config.noise)),
                codec, tuple(latent), tuple(shape), len(captions) if text else wanted, build(config.draw),
                build(config.weight), text, tuple(captions) if text else (), tokenise, given, control)
  with explain('config.net'):
    out = jax.eval_shape(lambda key: denoised(model, model.whole(model.init(key))), jax.random.key(0))
  _check_fits(model, has_variance=out[1] is not None)
  return model


def _tokenise(config: Config, folder: pathlib.Path | None, length: int, prompts: Sequence[str]) -> np.ndarray:
  """Tokens by the files of CLIP's tokenizer, which a run keeps a copy of."""
  own = folder / TOKENIZER if folder else None
  place = own if own and own.exists() else config.text.tokenizer
  if not place:
    raise UserError('prompts need the files of a tokenizer: give a folder that has vocab.json and merges.txt by '
                    '--config.text.tokenizer')
  return _read_tokenizer(pathlib.Path(place))(prompts, length)


_read_tokenizer = functools.cache(tokenizer.read)


def denoised(model: Model, params: Mapping[str, Any]) -> tuple:
  """What the denoiser of `params` gives for one example: to be traced, to see that the parts fit."""
  about = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), model.about_shapes(1))
  level = model.diffusion.process.path.level(jnp.zeros(1))
  return model.denoiser(params, model.cond(params, about)).both(jnp.zeros((1, *model.shape)), level)


def _check_fits(model: Model, has_variance: bool) -> None:
  """Raises UserError for parts of a config that cannot work together, each of them right by itself."""
  config, process, weight = model.config, model.diffusion.process, model.weight
  wanted = model.given.channels(model.shape[-1]) if model.given and not model.control else 0
  for key, found, needed, what in [('image', getattr(model.net, 'image', 0), wanted, 'config.given'),
                                   ('augment', getattr(model.net, 'augment', 0), 9, 'config.data.augment')]:
    if found != needed and (key == 'image' or config.data.augment):
      raise UserError(f'config.net.{key} is {found}, and {what} gives the net {needed} channels: set it to {needed}')
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
