"""Folders of diffusers and transformers: a config.json beside weights in safetensors. Pickles are never read."""
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from diffusion_jax.runtime import log
from diffusion_jax.runtime.config import UserError

STEMS = ('diffusion_pytorch_model', 'model')  # of diffusers and of transformers
PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')
DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'I64': np.int64,
          'I32': np.int32, 'U8': np.uint8, 'BOOL': np.bool_}


def read_config(folder: pathlib.Path, name: str = 'config.json') -> dict[str, Any]:
  """The JSON object in a folder's config; UserError if there is none."""
  path = pathlib.Path(folder) / name
  try:
    config = json.loads(path.read_text('utf-8'))
  except FileNotFoundError:
    raise UserError(f'{folder} has no {name}: give the folder of one model, such as the one called unet or vae in a '
                    f'pipeline') from None
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read: {error}') from None
  if not isinstance(config, dict):
    raise UserError(f'{path} must hold an object, got {type(config).__name__}')
  return config


def class_name(config: Mapping[str, Any], known: tuple[str, ...], where: Any) -> str:
  """The class whose config this is, as diffusers or transformers write it; UserError unless it is `known`."""
  found = config.get('_class_name') or next(iter(config.get('architectures') or ()), None)
  if found not in known:
    raise UserError(f'{where} is of class {found!r}; those that can be converted are {", ".join(known)}')
  return found


def read_weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a folder by name, from one safetensors file or from several with an index.

  Raises UserError if there are none, if there are only pickles, or if a file is damaged.
  """
  folder = pathlib.Path(folder)
  for stem in STEMS:
    if (path := folder / f'{stem}.safetensors').is_file():
      return read_safetensors(path)
    if (index := folder / f'{stem}.safetensors.index.json').is_file():
      return _read_parts(folder, index)
  found = sorted(path.name for path in folder.glob('*') if path.is_file()) if folder.is_dir() else []
  wanted = ' or '.join(f'{stem}.safetensors' for stem in STEMS)
  if pickles := [name for name in found if pathlib.PurePath(name).suffix in PICKLES]:
    raise UserError(f'{folder} has its weights in {pickles[0]}, a pickle, which runs code when it is opened, so it is '
                    f'not read: load the model where you trust it and save it again with '
                    f'model.save_pretrained({str(folder)!r}, safe_serialization=True), which writes {wanted}')
  others = [name for name in found if name.endswith('.safetensors')]
  hint = f' (it has {", ".join(others[:10])}: rename the one that you mean)' if others else ''
  raise UserError(f'{folder} has no {wanted}{hint}')


def _read_parts(folder, index):
  try:
    parts = sorted(set(json.loads(index.read_text('utf-8'))['weight_map'].values()))
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{index} is no index of weights: {error!r}') from None
  tensors = {}
  for part in parts:
    if not isinstance(part, str) or pathlib.PurePath(part).name != part:
      raise UserError(f'{index} names a file outside its folder: {part!r}')
    tensors |= read_safetensors(folder / part)
  return tensors


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of one file by name; UserError if it is missing, cut short or no safetensors file."""
  try:
    parts = safetensors.deserialize(pathlib.Path(path).read_bytes())
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror}') from None
  except safetensors.SafetensorError as error:
    raise UserError(f'{path} is damaged or no safetensors file ({error}): fetch it again') from None
  if odd := [f'{name} ({part["dtype"]})' for name, part in parts if part['dtype'] not in DTYPES]:
    raise UserError(f'{path} holds numbers of a kind that cannot be converted: {", ".join(odd[:10])}')
  return {name: np.frombuffer(part['data'], DTYPES[part['dtype']]).reshape(part['shape']) for name, part in parts}


def write(folder: pathlib.Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], stem: str) -> None:
  """A folder that the other library loads: the weights first, then config.json, each whole or not at all."""
  folder = pathlib.Path(folder)
  # PyTorch's libraries refuse a file that does not say from which framework its layout is.
  log.write(folder / f'{stem}.safetensors', safetensors.numpy.save(dict(tensors), metadata={'format': 'pt'}))
  log.write_json(folder / 'config.json', config)
