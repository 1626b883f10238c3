"""What training starts from: the parameters of another run, and those of encoders that others have trained."""
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion_jax.convert import autoencoder, clip, files
from diffusion_jax.model import Model
from diffusion_jax.nets import controlnet
from diffusion_jax.runtime import paths, snapshots
from diffusion_jax.runtime.config import UserError
from diffusion_jax.runtime.state import TrainState, named_leaves
from diffusion_jax.trained import restore

PARTS = 'net', 'text', 'codec', 'control'  # of another run
ENCODERS = {'codec': autoencoder, 'text': clip}  # parts of a model whose `weights` is a folder of another library


def load(model: Model, abstract: TrainState) -> dict[str, Any]:
  """{name: parameters on the host} of the parts of a model that do not start at random.

  They are those of the run config.start, and of the folders config.codec.weights and config.text.weights. Raises
  UserError if one cannot be read, if it is of another network than `abstract` has, or if there is none for a part that
  is not trained.
  """
  config, parts = model.config, {}
  if config.start:
    there = restore(paths.folder(config.start), '', None, lambda config: None).params
    parts = {name: jax.tree.map(snapshots.on_host, there[name]) for name in PARTS if name in there}
  for name, convert in ENCODERS.items():
    part = getattr(model, name)
    if folder := getattr(part, 'weights', ''):
      parts[name] = convert.from_theirs(part.net, files.read_weights(pathlib.Path(folder)), where=folder)
  for name in ENCODERS:
    if model.is_frozen(name) and name not in parts and hasattr(getattr(model, name), 'net'):
      raise UserError(f'config.{name} is not trained, and has no parameters: name the folder of a trained one by '
                      f'--config.{name}.weights, or a run that has it by --config.start')
  if model.beside and 'net' not in parts:
    what = {'lora': 'adapters are', 'control': 'a ControlNet is'}[model.beside]
    raise UserError(f'{what} trained beside a network that has been: name its run by --config.start')
  wanted = {**dict(abstract.frozen), **abstract.params}
  for name in parts.keys() & wanted.keys():
    _check_alike(name, parts[name], wanted[name])
  if model.control and 'control' not in parts:
    parts['control'] = {'encoder': controlnet.copied(wanted['control'], parts['net'])['encoder']}
  return parts


def place(state: TrainState, parts: Mapping[str, Any]) -> TrainState:
  """The state with those parameters, and all averages of them, that `load` gave in their place, each where it lies."""
  put = lambda found, like: jax.make_array_from_callback(
      like.shape, like.sharding, np.asarray(found, like.dtype).__getitem__)

  found = flatten_dict(parts)

  def replaced(tree):
    flat = flatten_dict(tree, keep_empty_nodes=True)
    return unflatten_dict({path: put(found[path], like) if path in found else like for path, like in flat.items()})

  return state.replace(params=replaced(state.params), emas={k: replaced(ema) for k, ema in state.emas.items()},
                       frozen=replaced(state.frozen) if state.frozen else ())


def _check_alike(name: str, found: Any, wanted: Any) -> None:
  have, want = ({path: tuple(leaf.shape) for path, leaf in named_leaves(tree)} for tree in (found, wanted))
  different = sorted(set(have.items()) ^ set(want.items()))
  if different:
    path = different[0][0]
    shape = lambda shapes: list(shapes[path]) if path in shapes else 'absent'
    raise UserError(f'config.{name} is another network than the one that it is to start from, first {path}: '
                    f'{shape(have)} there, {shape(want)} here')
