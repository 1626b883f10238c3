"""Name tables: the parameters of another library's module and of ours, from one table that is read both ways.

A table is {their module: our path}, such as {'conv_in': 'conv_in', 'mid_block.attentions.0.to_q': 'middle/query'}. It
may name modules that a network does not have, but each of the network's must be in it. What is in a module follows
from our name: a kernel is their weight with the outputs first, a scale or an embedding is their weight as it is.
"""
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np

from diffusion_jax.runtime.config import UserError

Tree = Mapping[str, Any]
LEAVES = {'kernel': 'weight', 'scale': 'weight', 'embedding': 'weight', 'bias': 'bias'}
SHOWN = 10  # names in a message
# Parts of blocks that many of diffusers' networks have.
RESNET = {'norm1': 'norm_0', 'conv1': 'conv_0', 'norm2': 'norm_1', 'conv2': 'conv_1', 'time_emb_proj': 'embed',
          'conv_shortcut': 'shortcut'}
ATTENTION = {'group_norm': 'norm', 'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'out'}
OLD_ATTENTION = {'query': 'to_q', 'key': 'to_k', 'value': 'to_v', 'proj_attn': 'to_out.0'}  # before diffusers 0.18


def parts(theirs: str, ours: str, names: Mapping[str, str]) -> dict[str, str]:
  """The table of one block: {'down.0.norm1': 'down_0/norm_0', ...} of `names` {'norm1': 'norm_0', ...}."""
  return {f'{theirs}.{their}': f'{ours}/{our}' for their, our in names.items()}


def from_theirs(table: Mapping[str, str], tensors: Mapping[str, np.ndarray], shapes: Tree, where: str) -> dict:
  """Our parameters, float32, from their tensors by name; `shapes` is our tree of ShapeDtypeStructs.

  Raises UserError that begins with `where` if names are missing or unknown (the first ten, with the nearest ones), or
  if a tensor has another shape or holds numbers that float32 cannot keep.
  """
  wanted = _wanted(table, shapes)
  missing, unknown = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
  if missing:
    raise UserError(f'{where} lacks {_listed(missing, unknown or tensors)}: it is another network than its config '
                    f'describes, or only a part of it')
  if unknown:
    raise UserError(f'{where} holds what the network of its config has no place for: {_listed(unknown, wanted)}')
  wrong = [f'{key} has {list(tensors[key].shape)} and not {list(_their_shape(path, shape))}'
           for key, (path, shape) in wanted.items() if tuple(tensors[key].shape) != _their_shape(path, shape)]
  if wrong:
    raise UserError(f'{where} has tensors of other shapes than its config says: {"; ".join(wrong[:SHOWN])}'
                    f'{_more(wrong)}')
  inexact = [f'{key} ({tensors[key].dtype})' for key in wanted if not _fits(tensors[key].dtype)]
  if inexact:
    raise UserError(f'{where}: float32 cannot hold {", ".join(inexact[:SHOWN])}{_more(inexact)}: save the weights as '
                    f'float32, float16 or bfloat16')
  return flax.traverse_util.unflatten_dict({
      path: np.ascontiguousarray(_turned(path, np.asarray(tensors[key])), np.float32)
      for key, (path, _) in wanted.items()})


def to_theirs(table: Mapping[str, str], params: Tree, dtype: Any = np.float32) -> dict[str, np.ndarray]:
  """Their tensors by name from our parameters: what `from_theirs` undoes, bit for bit."""
  flat = flax.traverse_util.flatten_dict(params)
  return {key: np.ascontiguousarray(_turned_back(path, np.asarray(flat[path])), dtype)
          for key, (path, _) in _wanted(table, params).items()}


def of_today(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The same tensors, where attention has the names of before diffusers 0.18, or is made of pointwise convolutions,
  as the matrices that it is now.
  """
  result = {}
  for key, tensor in tensors.items():
    if match := re.fullmatch(r'(.*\.attentions\.\d+\.)(query|key|value|proj_attn)(\.weight|\.bias)', key):
      key, tensor = match[1] + OLD_ATTENTION[match[2]] + match[3], tensor.reshape(tensor.shape[:2])
    result[key] = tensor
  return result


def shapes(net: Any, *inputs: Any, **more: Any) -> dict:
  """The tree of shapes of a network's parameters for inputs of these shapes, none of them computed."""
  return jax.eval_shape(lambda *a: net.init(jax.random.key(0), *a, **more), *inputs)['params']


def only(config: Mapping[str, Any], allowed: Mapping[str, tuple], where: str) -> None:
  """Raises UserError unless every option of `config` in `allowed` has one of the values there."""
  for key, values in allowed.items():
    if key in config and config[key] not in values:
      raise UserError(f'{where}: {key} is {config[key]!r}, and only {" or ".join(map(repr, values))} can be converted')


def get(config: Mapping[str, Any], key: str, where: str) -> Any:
  """config[key]; UserError if there is none."""
  if key not in config:
    raise UserError(f'{where} has no {key!r}: it is not the config of this kind of network, or not all of it')
  return config[key]


def _wanted(table, tree):
  """{their name: (our path, our leaf)} for every leaf of our tree."""
  modules = {ours: theirs for theirs, ours in table.items()}
  if len(modules) != len(table):
    raise ValueError('a name table must give every module a path of its own')
  wanted = {}
  for path, leaf in flax.traverse_util.flatten_dict(tree).items():
    module, whole = '/'.join(path[:-1]), '/'.join(path)
    if whole in modules:  # a table that is a parameter of the network itself
      wanted[f'{modules[whole]}.weight'] = path, leaf
    elif module in modules:
      wanted[f'{modules[module]}.{LEAVES[path[-1]]}'] = path, leaf
    else:
      raise ValueError(f'the name table has no {module!r}')
  return wanted


def _turned(path, tensor):
  return np.moveaxis(tensor, (0, 1), (-1, -2)) if path[-1] == 'kernel' else tensor


def _turned_back(path, array):
  return np.moveaxis(array, (-1, -2), (0, 1)) if path[-1] == 'kernel' else array


def _their_shape(path, leaf):
  shape = tuple(leaf.shape)
  return (*shape[:-3:-1], *shape[:-2]) if path[-1] == 'kernel' else shape


def _fits(dtype):
  return dtype.name in ('float32', 'float16', 'bfloat16')


def _listed(names: list[str], known: Iterable[str]) -> str:
  known, shown = list(known), []
  for name in names[:SHOWN]:
    near = difflib.get_close_matches(name, known, 1)
    shown.append(f'{name} (nearest: {near[0]})' if near else name)
  return f'{", ".join(shown)}{_more(names)}'


def _more(names: list[str]) -> str:
  return f', and {len(names) - SHOWN} more' if len(names) > SHOWN else ''
