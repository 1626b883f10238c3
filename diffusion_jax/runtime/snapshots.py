"""Trees of arrays as safetensors files: written whole or not at all, read one array at a time, never unpickled."""
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.experimental import multihost_utils

from diffusion_jax.runtime import log
from diffusion_jax.runtime.config import UserError
from diffusion_jax.runtime.state import named_leaves


def on_host(leaf: Any) -> np.ndarray:
  """The whole array in host memory, wherever its parts lie; every process must ask."""
  whole = getattr(leaf, 'is_fully_addressable', True) or leaf.is_fully_replicated
  return np.asarray(jax.device_get(leaf) if whole else multihost_utils.process_allgather(leaf, tiled=True), order='C')


def write(path: pathlib.Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
  """Writes {name: array} and {key: value} of text or numbers beside them."""
  log.write(path, safetensors.numpy.save(dict(arrays), {k: str(v) for k, v in about.items()}))


class Snapshot:
  """An open file: `about` {key: text}, `shapes` {name: shape}, and [name] -> array. UserError if it is damaged."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    try:
      self.file = safetensors.safe_open(path, framework='numpy')
      self.about = self.file.metadata() or {}
      self.shapes = {name: tuple(self.file.get_slice(name).get_shape()) for name in self.file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as e:
      raise UserError(f'{str(path)!r} cannot be read: {e}') from e

  def __getitem__(self, name: str) -> np.ndarray:
    return self.file.get_tensor(name)


def load(path: pathlib.Path, like: Any) -> Any:
  """The arrays of a file as the tree `like` (arrays, or ShapeDtypeStructs with shardings), on its devices.

  Raises UserError if the file holds other arrays.
  """
  snapshot, wanted = Snapshot(path), {name: tuple(leaf.shape) for name, leaf in named_leaves(like)}
  different = sorted(set(wanted.items()) ^ set(snapshot.shapes.items()))
  if different:
    raise UserError(f'{str(path)!r} holds other arrays than this model, first {different[0][0]}')
  leaves = [jax.device_put(snapshot[name].astype(leaf.dtype), getattr(leaf, 'sharding', None))
            for name, leaf in named_leaves(like)]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)
