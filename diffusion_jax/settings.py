"""The settings of a run: every key that a config has, and what is wrong with one."""
from typing import Any

import optax

from diffusion_jax.core import diffusion, ema, givens, levels, losses, samplers, schedules, targets
from diffusion_jax.data import sources
from diffusion_jax.nets import codecs, encoders, lora, unet
from diffusion_jax.runtime import sharding
from diffusion_jax.runtime.config import Config, UserError, explain, flatten, nearest, spec


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
      'given': spec(givens.none),  # what of an image the net is given, as for super-resolution
      'process': spec(schedules.linear),
      'target': spec(targets.eps),
      'noise': spec(diffusion.timestep),  # the scalar by which the net knows the level
      'draw': spec(levels.uniform),
      'weight': spec(losses.simple),
      'net': spec(unet.UNet),
      'lora': {'rank': 0, 'pattern': lora.ATTENTION, 'scale': 1.0},  # with a rank, adapters are trained, not the net
      'control': False,           # what is given steers a ControlNet, which is trained, not the net
      'start': '',                # the run folder whose parameters training starts from; '': random ones
      'label_dropout': 0.1,       # share of labels and texts replaced by none, for guidance
      'optimizer': spec(optax.adam),
      'learning_rate': {'peak': 2e-4, 'warmup_images': 640_000, 'decay': 'constant',
                        'steady_images': 0},  # before the decay inverse_sqrt begins
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
          'batch_size': 64,       # samples compiled together; 0: as many as fit in memory and are of use
          'precision': '',        # of the net in `sample` and `evaluate`: bfloat16 or int8; '': as trained
          'cache_every': 1,       # 1 of so many network calls is whole, and the others take its deep features
          'cache_depth': 0,       # skip connections that the others compute anew; 0: those of the outermost level
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
  if config.control and config.lora.rank:
    raise UserError('config.control trains a ControlNet beside the net, and config.lora.rank adapters: choose one, and '
                    'give the LoRA file to `sample --lora`')
  for key, names in CHOICES.items():
    if flat[key] not in names:
      raise UserError(f'config.{key} must be {" or ".join(name or "empty" for name in names)}, got {flat[key]!r}')
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
        'sample.steps', 'sample.cache_every', 'eval.num_samples'],
    0: ['seed', 'lora.rank', 'data.size', 'data.max_bad', 'data.resident_gib', 'data.workers', 'sample.guidance_low',
        'sample.guidance_high', 'sample.threshold', 'sample.batch_size', 'sample.cache_depth'],
}
CHOICES = {'train.remat': ('none', 'products'), 'train.reduce': ('float32', 'bfloat16'),
           'train.moments': ('float32', 'bfloat16'), 'sample.precision': ('', 'bfloat16', 'int8')}


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
