"""Folders of diffusers and run folders, both ways: pipelines, single networks, and LoRA files.

A converted pipeline is a run folder without checkpoints: its parameters lie in `weights.safetensors`. A single network,
or a LoRA file, has a `part.json` beside them instead of a config.json: it is no run. diffusers.json keeps the configs
that were read, for what our own say otherwise or not at all.
"""
import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from diffusion_jax import model as model_lib
from diffusion_jax.convert import (
  autoencoder,
  clip,
  controlnet,
  files,
  lora,
  schedulers,
  tokenizer,
  unet2d,
  unet_condition,
)
from diffusion_jax.model import TOKENIZER, Model
from diffusion_jax.nets import codecs, encoders
from diffusion_jax.nets import lora as lora_nets
from diffusion_jax.nets.text_unet import TextUNet
from diffusion_jax.runtime import log, snapshots
from diffusion_jax.runtime.config import Config, UserError, build, spec
from diffusion_jax.runtime.state import named_leaves
from diffusion_jax.trained import WEIGHTS, Trained

INDEX, PART, ORIGIN = 'model_index.json', 'part.json', 'diffusers.json'
UNETS = (*unet2d.CLASSES, *unet_condition.CLASSES)
CLASSES = (*UNETS, *autoencoder.CLASSES, *clip.CLASSES, *controlnet.CLASSES)
# Parts of a pipeline that are converted, and those that are left out: they change no image that they let pass.
KNOWN, LEFT_OUT = ('unet', 'scheduler', 'vae', 'text_encoder', 'tokenizer'), ('safety_checker', 'feature_extractor')
STEMS = {**dict.fromkeys(('unet', 'vae', 'controlnet'), 'diffusion_pytorch_model'), 'text_encoder': 'model'}
GUIDANCE = 7.5  # of text, where a pipeline does not say


@contextlib.contextmanager
def whole(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder to write into, which becomes `folder` at the end, or vanishes; UserError if there is something there."""
  folder = pathlib.Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise UserError(f'{str(folder)!r} exists and is not empty: give a folder that is new')
  folder.parent.mkdir(parents=True, exist_ok=True)
  partial = folder.with_name(f'.{folder.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  try:
    yield partial
    if folder.exists():
      folder.rmdir()
    partial.rename(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def save(folder: pathlib.Path, params: Mapping[str, Any]) -> None:
  """weights.safetensors, by our names."""
  snapshots.write(folder / WEIGHTS, {name: np.asarray(leaf) for name, leaf in named_leaves(params)}, {'images': 0})


def spec_of(net: nn.Module, fn: Any = None) -> Config:
  """The spec that makes a network again, or another function with arguments of the same names."""
  fields = {f.name: getattr(net, f.name) for f in dataclasses.fields(net) if f.name not in ('parent', 'name')}
  tuples = {name: tuple(value) if isinstance(value, (list, tuple)) else value for name, value in fields.items()}
  return spec(fn or type(net), **{name: value for name, value in tuples.items() if value is not None})


# From diffusers


def from_pipeline(folder: pathlib.Path, workdir: pathlib.Path) -> Model:
  """Makes a run folder of a pipeline's; UserError, and no folder, for one that cannot be converted."""
  folder = pathlib.Path(folder)
  index = files.read_config(folder, INDEX)
  parts = {name: value for name, value in index.items() if isinstance(value, list) and value[0]}
  if odd := sorted(set(parts) - {*KNOWN, *LEFT_OUT}):
    raise UserError(f'{folder} is a {index.get("_class_name")} with {", ".join(odd)}, which cannot be converted: '
                    f'pipelines may have {", ".join(KNOWN)}')
  if missing := [name for name in ('unet', 'scheduler') if name not in parts]:
    raise UserError(f'{folder / INDEX} names no {" and no ".join(missing)}: this is no pipeline of a U-Net')
  origin = {name: files.read_config(folder / name) for name in parts if name in STEMS}
  origin['scheduler'] = files.read_config(folder / 'scheduler', 'scheduler_config.json')
  found = schedulers.from_theirs(origin['scheduler'], where=str(folder / 'scheduler'))
  config, params = model_lib.default_config(), {}

  unet, where = origin['unet'], str(folder / 'unet')
  text = files.class_name(unet, UNETS, where) in unet_condition.CLASSES
  outputs, inputs = unet.get('out_channels', 4), unet.get('in_channels', 4)
  channels = outputs if text else inputs
  convert = unet_condition if text else unet2d
  net, size = convert.net(unet, where), unet.get('sample_size')
  if not isinstance(size, int):
    raise UserError(f'{where}: sample_size must be one number, got {size!r}')
  shapes = (channels,) if text else (size, channels)
  params['net'] = convert.from_theirs(net, files.read_weights(folder / 'unet'), *shapes, where=where)
  image = {'size': size, 'channels': channels}
  with config.unlocked():
    config.net = spec_of(net)
    for name in ('process', 'target', 'noise'):
      config[name] = found[name]
    if 'vae' in origin:
      files.class_name(origin['vae'], autoencoder.CLASSES, folder / 'vae')
      vae = autoencoder.net(origin['vae'], str(folder / 'vae'))
      params['codec'] = autoencoder.from_theirs(vae, files.read_weights(folder / 'vae'), str(folder / 'vae'))
      config.codec = spec_of(vae, codecs.kl)
      image = {'size': size * 2 ** (len(vae.channels) - 1), 'channels': vae.outputs}
    if 'text_encoder' in origin:
      files.class_name(origin['text_encoder'], clip.CLASSES, folder / 'text_encoder')
      encoder = clip.net(origin['text_encoder'], str(folder / 'text_encoder'))
      params['text'] = clip.from_theirs(encoder, files.read_weights(folder / 'text_encoder'),
                                        str(folder / 'text_encoder'))
      config.text = spec_of(encoder, encoders.clip)
    config.data.update({'source': 'none', **image})
    guided = 'text_encoder' in origin
    config.sample.update({'guidance': GUIDANCE if guided else 1.0, 'batch_size': 4 if guided else 64})
    for name in ('sampler', 'grid', 'clip', 'threshold'):
      config.sample[name] = found[name]
  return _write_run(workdir, config, params, origin, folder)


def _write_run(workdir, config, params, origin, folder):
  """The run folder of a converted pipeline."""
  shape = (config.data.size, config.data.size, config.data.channels)
  num_classes = config.net.get('num_classes', 0)
  model_lib.check(config)
  with whole(workdir) as made:
    if 'text' in params:
      tokenizer.read(folder / TOKENIZER).write(made / TOKENIZER)
    model = model_lib.make(config, shape, num_classes, folder=made)
    save(made, {'process': {}, **params})
    log.write_json(made / ORIGIN, origin)
    log.write_json(made / 'data.json', {'source': 'none', 'split': '', 'shape': shape, 'num_examples': 0,
                                        'num_classes': num_classes, 'class_names': list(map(str, range(num_classes)))})
    log.write_json(made / 'run.json', {'started': log.now(), 'converted_from': str(folder), **log.provenance()})
    log.write(made / 'config.json', json.dumps(config.to_dict(), indent=1) + '\n')
  return model


def from_part(folder: pathlib.Path, workdir: pathlib.Path) -> str:
  """Makes a folder with part.json of a single network's; the name of its class."""
  config = files.read_config(folder)
  name = files.class_name(config, CLASSES, folder)
  params = _read_part(name, config, files.read_weights(folder), str(folder))
  with whole(workdir) as made:
    save(made, params)
    log.write_json(made / PART, {'class': name, 'config': config})
  return name


def _read_part(name, config, tensors, where):
  if name in unet2d.CLASSES:
    net = unet2d.net(config, where)
    return unet2d.from_theirs(net, tensors, config['sample_size'], config.get('in_channels', 3), where)
  if name in unet_condition.CLASSES:
    net = unet_condition.net(config, where)
    return unet_condition.from_theirs(net, tensors, config.get('out_channels', 4), where)
  convert = next(module for module in (autoencoder, clip, controlnet) if name in module.CLASSES)
  return convert.from_theirs(convert.net(config, where=where), tensors, where=where)


def from_lora(path: pathlib.Path, base: Trained, workdir: pathlib.Path) -> list[str]:
  """Makes a folder with part.json of a LoRA file for the model `base`; the parts of a pipeline that it adapts."""
  found = lora.read(path, lora_parts(base.model, base.params))
  with whole(workdir) as made:
    save(made, found)
    log.write_json(made / PART, {'class': 'LoRA', 'net': base.model.config.net.to_dict(),
                                 'text': base.model.config.text.to_dict(), 'shape': list(base.model.shape)})
  return sorted(found)


def lora_parts(model: Model, params: Mapping[str, Any]) -> dict[str, tuple]:
  """The networks of a model that a LoRA file may adapt, as convert/lora.py takes them."""
  convert = unet_condition if isinstance(model.net, TextUNet) else unet2d
  parts = {'unet': (convert.table(model.net), params['net'])}
  if isinstance(getattr(model.text, 'net', None), encoders.CLIPText):
    parts['text_encoder'] = clip.table(model.text.net), params['text']
  return parts


def adapted(trained: Trained, given: Sequence[str]) -> Trained:
  """A trained model with LoRA files merged into its networks; each is 'FILE' or 'FILE=SCALE'. UserError if one is not
  of its networks.
  """
  params = dict(trained.params)
  for text in given:
    file, equals, scale = text.rpartition('=')
    try:
      file, scale = (file, float(scale)) if equals else (text, 1.0)
    except ValueError:
      raise UserError(f'--lora must be FILE or FILE=SCALE, got {text!r}') from None
    path = pathlib.Path(file)
    if not path.exists():
      raise UserError(f'--lora: there is no {file!r}')
    for part, adapters in lora.read(path, lora_parts(trained.model, params)).items():
      name = 'net' if part == 'unet' else 'text'
      params[name] = lora_nets.merge(params[name], adapters, scale)
  return trained._replace(params=params, ema=f'{trained.ema} with {", ".join(given)}')


# To diffusers


def to_pipeline(trained: Trained, workdir: pathlib.Path, folder: pathlib.Path, dtype: Any = np.float32) -> str:
  """Makes a folder that DiffusionPipeline.from_pretrained loads of a trained model; the class of the pipeline."""
  model, params = trained.model, trained.params
  text, config, size = isinstance(model.net, TextUNet), model.config, model.shape[0]
  if len(model.shape) != 3 or size != model.shape[1]:
    raise UserError(f'diffusers has networks of square images, and this one is of {list(model.shape)}')
  origin = json.loads((workdir / ORIGIN).read_text()) if (workdir / ORIGIN).exists() else {}
  parts, channels = {}, model.shape[-1]
  if text:
    linear = origin.get('unet', {}).get('use_linear_projection', False)
    parts['unet'] = (unet_condition.config(model.net, size, channels, linear),
                     unet_condition.to_theirs(model.net, params['net'], dtype, linear))
  else:
    parts['unet'] = unet2d.config(model.net, size, channels), unet2d.to_theirs(model.net, params['net'], dtype)
  if isinstance(model.codec, codecs.KL):
    parts['vae'] = (autoencoder.config(model.codec.net, model.image_shape[0]),
                    autoencoder.to_theirs(model.codec.net, params['codec'], dtype))
  if text:
    if not isinstance(getattr(model.text, 'net', None), encoders.CLIPText) or 'vae' not in parts:
      raise UserError('diffusers has text with the text encoder of CLIP and an autoencoder alone: config.text must be '
                      'clip, and config.codec kl')
    parts['text_encoder'] = clip.config(model.text.net), clip.to_theirs(model.text.net, params['text'], dtype)
    if model.control:
      parts['controlnet'] = (controlnet.config(model.control, channels, linear),
                             controlnet.to_theirs(model.control, params['control'], dtype, linear))
  elif 'vae' in parts:
    raise UserError('diffusers has no pipeline of latents without text: config.codec must be pixels')
  elif model.control:
    raise UserError('diffusers has a ControlNet of text-to-image networks alone, and config.net is none of those')
  settings = {name: config[name] for name in ('process', 'target', 'noise')}
  settings |= {name: config.sample[name] for name in ('sampler', 'grid', 'clip', 'threshold')}
  scheduler = schedulers.to_theirs(settings, config.sample.steps)

  kind = ('StableDiffusionControlNetPipeline' if model.control else 'StableDiffusionPipeline' if text else
          'DDPMPipeline' if 'DDPM' in scheduler['_class_name'] else 'DDIMPipeline')
  with whole(folder) as made:
    for name, (about, tensors) in parts.items():
      files.write(made / name, about, tensors, STEMS[name])
    log.write_json(made / 'scheduler' / 'scheduler_config.json', scheduler)
    if text:
      own = workdir / TOKENIZER
      tokenizer.read(own if own.exists() else pathlib.Path(config.text.tokenizer)).write(made / 'tokenizer')
    libraries = {'text_encoder': ('transformers', 'CLIPTextModel'), 'tokenizer': ('transformers', 'CLIPTokenizer'),
                 **{name: ('diffusers', about['_class_name']) for name, (about, _) in parts.items()
                    if name != 'text_encoder'},
                 'scheduler': ('diffusers', scheduler['_class_name'])}
    index = {name: list(libraries[name]) for name in ('unet', 'scheduler', *parts, *(['tokenizer'] if text else []))}
    none = {name: [None, None] for name in (*LEFT_OUT, 'image_encoder')} | {'requires_safety_checker': False}
    log.write_json(made / INDEX, {'_class_name': kind, '_diffusers_version': '0.35.0', **index,
                                  **(none if text else {})})
  return kind


def to_lora(trained: Trained, folder: pathlib.Path, dtype: Any = np.float32) -> str:
  """Makes a folder with the LoRA file of a run that trained adapters: their scale is its alpha."""
  scale = trained.model.config.lora.scale
  flat = {path: {**module, 'alpha': scale * module['down'].shape[-1]} if scale != 1 else module
          for path, module in lora_nets.modules(trained.adapters).items()}
  adapters = nest({'/'.join((*path, name)): leaf for path, module in flat.items() for name, leaf in module.items()})
  with whole(folder) as made:
    lora.write(made, lora_parts(trained.model, trained.params), {'unet': adapters}, dtype)
  return 'LoRA file'


def to_part(workdir: pathlib.Path, folder: pathlib.Path, dtype: Any = np.float32) -> str:
  """Makes a folder of diffusers of one that `from_part` or `from_lora` made; the name of its class."""
  about = files.read_config(workdir, PART)
  snapshot = snapshots.Snapshot(workdir / WEIGHTS)
  params = nest({name: snapshot[name] for name in snapshot.shapes})
  with whole(folder) as made:
    if about['class'] == 'LoRA':
      net, text = build(about['net']), build(about['text'])
      *_, channels = shape = about['shape']
      if isinstance(net, TextUNet):
        parts = {'unet': (unet_condition.table(net), unet_condition.shapes(net, channels))}
      else:
        parts = {'unet': (unet2d.table(net), unet2d.shapes(net, shape[0], channels))}
      if text:
        parts['text_encoder'] = clip.table(text.net), clip.shapes(text.net)
      lora.write(made, parts, params, dtype)
      return 'LoRA'
    write_part(made, about['class'], about['config'], params, dtype)
  return about['class']


def write_part(folder: pathlib.Path, name: str, config: Mapping[str, Any], params: Mapping[str, Any],
               dtype: Any) -> None:
  """One network's folder, with the config that it came with."""
  linear = {'linear': bool(config.get('use_linear_projection', False))}
  convert, more = next((module, linear if module in (unet_condition, controlnet) else {}) for module in (
      unet2d, unet_condition, autoencoder, clip, controlnet) if name in module.CLASSES)
  net = convert.net(config, where=str(folder))
  files.write(folder, config, convert.to_theirs(net, params, dtype, **more),
              STEMS['text_encoder' if convert is clip else 'unet'])


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """{'a/b': leaf} as a tree."""
  tree: dict[str, Any] = {}
  for name, leaf in flat.items():
    *path, last = name.split('/')
    node = tree
    for key in path:
      node = node.setdefault(key, {})
    node[last] = leaf
  return tree
