"""What training carries from step to step."""
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.runtime.sharding import on_device

Tree = Any


@dataclasses.dataclass(frozen=True)
class TrainState:
  """step: steps taken, int32 []; params: what is trained; opt_state: optax's; emas: {name: average of params};
  draw: what the draw of levels remembers, () for most; frozen: parameters that are used and not trained, () for most.
  """
  step: jax.Array
  params: Tree
  opt_state: Tree
  emas: dict[str, Tree]
  draw: Tree = ()
  frozen: Tree = ()

  def replace(self, **changes: Any) -> 'TrainState':
    """The state with some fields changed."""
    return dataclasses.replace(self, **changes)


def _is_empty(tree: Tree) -> bool:
  return isinstance(tree, tuple) and not tree


def _flatten_with_keys(state: TrainState):
  # While one is (), it is no node of the tree: Orbax would ask for it in checkpoints that never had one.
  names = tuple(f.name for f in dataclasses.fields(state)
                if f.name not in ('draw', 'frozen') or not _is_empty(getattr(state, f.name)))
  return [(jax.tree_util.GetAttrKey(name), getattr(state, name)) for name in names], names


def _unflatten(names, fields):
  return TrainState(**dict(zip(names, fields, strict=True)))


jax.tree_util.register_pytree_with_keys(TrainState, _flatten_with_keys, _unflatten)


def named_leaves(tree: Tree) -> Iterator[tuple[str, Any]]:
  """('params/net/conv_in/kernel', leaf) in the tree's own fixed order."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield jax.tree_util.keystr(path, simple=True, separator='/'), leaf


def fingerprint(state: TrainState) -> str:
  """The `digest` of all parameters and averages."""
  return digest({'params': state.params, 'emas': state.emas})


def digest(tree: Tree) -> str:
  """SHA-256 over names, types, shapes and bytes of the arrays of a tree, in order of their names."""
  sha = hashlib.sha256()
  for name, leaf in sorted(named_leaves(tree)):
    array = np.asarray(jax.device_get(leaf))
    sha.update(f'{name} {array.dtype} {array.shape}\n'.encode())
    sha.update(np.ascontiguousarray(array).tobytes())
  return sha.hexdigest()


def num_parameters(params: Tree) -> int:
  """How many numbers a tree of arrays (or of their shapes) holds."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def checksums(tree: Tree) -> dict[str, list[int]]:
  """{name: two 32-bit sums of the array's bits}, computed where each array lies, whatever its sharding."""
  sums = {name: _sums(on_device(leaf)) for name, leaf in named_leaves(tree)}
  return {name: np.asarray(two).tolist() for name, two in sums.items()}


@jax.jit  # compiled once for a shape: a tree has hundreds of arrays and a few dozen shapes
def _sums(x: jax.Array) -> jax.Array:
  """Each word of x times an odd number that depends on its place, summed: one changed bit always changes the sums."""
  if jnp.issubdtype(x.dtype, jnp.bool_):
    x = x.astype(jnp.uint8)
  words = jax.lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}').astype(jnp.uint32).ravel()
  place = jnp.arange(words.size, dtype=jnp.uint32)
  mix = lambda a: (a ^ (a >> 15)) * jnp.uint32(0x2C1B3C6D)
  return jnp.stack([jnp.sum(words * (2 * mix(place + salt) + 1), dtype=jnp.uint32)
                    for salt in (jnp.uint32(0), jnp.uint32(0x9E3779B9))])
