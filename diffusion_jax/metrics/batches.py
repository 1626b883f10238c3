"""A network over many images: in batches of one shape, each spread over the local devices."""
import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

__all__ = ['apply', 'place']


def apply(network: Callable[[Any, Any], Any], params: Any, images: np.ndarray, batch_size: int) -> Any:
  """network(params, images [batch_size, ...]) for all images [N, ...]: its tree of arrays, [N, ...] each, on the host.

  Each batch is cut over as many local devices as divide it; what fills up the last one is dropped again. Raises
  ValueError for a batch_size below 1.
  """
  if batch_size < 1:
    raise ValueError(f'batch_size must be at least 1, got {batch_size}')
  params, spread, parts = place(params, batch_size), NamedSharding(_mesh(batch_size), PartitionSpec('batch')), []
  for i in range(0, max(len(images), 1), batch_size):  # of no images too the shapes are known
    chunk = images[i:i + batch_size]
    filled = np.concatenate([chunk, np.zeros((batch_size - len(chunk), *chunk.shape[1:]), chunk.dtype)])
    kept = slice(len(chunk))
    found = jax.device_get(network(params, jax.device_put(filled, spread)))
    parts.append(jax.tree.map(operator.itemgetter(kept), found))
  return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def place(params: Any, batch_size: int) -> Any:
  """The parameters where `apply` wants them, which it then need not move with every call."""
  return jax.device_put(params, NamedSharding(_mesh(batch_size), PartitionSpec()))


def _mesh(batch_size):
  devices = max(n for n in range(1, jax.local_device_count() + 1) if batch_size % n == 0)
  return Mesh(jax.local_devices()[:devices], 'batch')
