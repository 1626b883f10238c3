"""Low-rank adapters (LoRA, Hu et al. 2021): small trees beside the parameters of any network, added to them by `merge`.

Adapters are a tree of the modules that they change, each with `down` [*K, inputs, r] and `up` [r, outputs]: to a kernel
[*K, inputs, outputs] is added scale * down @ up, for K of no axis (Dense) or of any number (Conv). That is what a layer
of r channels followed by a pointwise one gives (Hu et al. 2021, eq. 3). A module may hold `alpha` too, a number without
a gradient; the sum is then scaled by alpha / r, and without it by 1, as if alpha were r: the convention of peft and
diffusers. Nothing but kernels is adapted: neither biases, norms and tables of embeddings, nor the network's program.

A network that normalises its kernels, such as edm2.UNet, normalises the sum: adapters turn its weights, which they
cannot make larger or smaller, and are as strong as they are large beside kernels of magnitude 1.
"""
import difflib
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

Array = jax.Array
Tree = Mapping[str, Any]
# What is usually adapted, in every network; 'out' of these two is no part of attention.
ATTENTION = r'(?<!embed)(?<!head)/(query|key|value|out|attention_in|attention_out)/kernel$'
SCANNED = 'blocks'  # the module of networks whose blocks are one loop: everything in it has a first axis of depth
BEFORE = 'kernel_before'  # beside a kernel that `merge` replaced, if it was told to keep it
NEAR = 5  # names in a message


def init(key: Array, params: Tree, rank: int, pattern: str = ATTENTION) -> dict:
  """Adapters of `rank` for every kernel whose path, such as 'middle_attention/query/kernel', holds `pattern`.

  up is zero, so that the network is as it was, and down is uniform with variance 1 / (3 fan_in), peft's, so that a
  learning rate means what it means there. An adapter's numbers depend on key and on its path alone. Of params only the
  shapes are used: ShapeDtypeStructs will do. Raises ValueError for a pattern that is no regular expression or is found
  in no path, or for a rank below 1.
  """
  if rank < 1:
    raise ValueError(f'rank must be at least 1, got {rank}')
  try:
    pattern = re.compile(pattern)
  except re.error as error:
    raise ValueError(f'{pattern!r} is no regular expression: {error}') from None
  kernels = {path: leaf.shape for path, leaf in flatten_dict(params).items() if path[-1] == 'kernel'}
  chosen = {path: shape for path, shape in kernels.items() if pattern.search('/'.join(path))}
  if not chosen:
    raise ValueError(f'no kernel has {pattern.pattern!r} in its path: {_nearest(pattern.pattern, kernels)}')
  adapters = {}
  for path, (*space, inputs, outputs) in chosen.items():
    scanned = SCANNED in path
    down = nn.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform', batch_axis=(0,) if scanned else ())
    seed = jax.random.fold_in(key, zlib.crc32('/'.join(path).encode()))
    adapters[(*path[:-1], 'down')] = down(seed, (*space, inputs, rank))
    adapters[(*path[:-1], 'up')] = jnp.zeros((*(_depth(space) if scanned else ()), rank, outputs))
  return unflatten_dict(adapters)


def merge(params: Tree, adapters: Tree | Sequence[tuple[Tree, Any]], scale: Any = 1.0, keep: bool = False) -> dict:
  """params with adapters, or with several of them as [(adapters, weight), ...], times `scale` added to its kernels.

  All products are of float32, whatever the layers compute in. Pure and differentiable; scale and weights may be traced.

  A sum of floating-point numbers is rounded, and many kernels have the same one: no subtraction can be trusted to
  bring a kernel back. With `keep`, each kernel that changes is therefore left in its module as 'kernel_before', which
  networks do not look at, until `unmerge` puts it back. Raises ValueError for adapters of another network.
  """
  mixture = [(adapters, 1.0)] if isinstance(adapters, Mapping) else adapters
  flat, added = flatten_dict(params, keep_empty_nodes=True), {}
  for tree, weight in mixture:
    for path, module in modules(tree).items():
      delta = scale * weight * _product(path, module, flat)
      added[path] = added[path] + delta if path in added else delta
  for path, delta in added.items():
    kernel = flat[(*path, 'kernel')]
    flat[(*path, 'kernel')] = (kernel + delta).astype(kernel.dtype)
    if keep:
      flat.setdefault((*path, BEFORE), kernel)
  return unflatten_dict(flat)


def unmerge(params: Tree) -> dict:
  """What was merged with `keep`, all of it undone: every bit as it was. To take one of several away, merge the others
  again. Raises ValueError if no kernel was kept.
  """
  flat = flatten_dict(params, keep_empty_nodes=True)
  kept = [path for path in flat if path[-1] == BEFORE]
  if not kept:
    raise ValueError('nothing can be unmerged: merge(..., keep=True) keeps the kernels that it replaces')
  for path in kept:
    flat[(*path[:-1], 'kernel')] = flat.pop(path)
  return unflatten_dict(flat)


def modules(adapters: Tree) -> dict[tuple[str, ...], dict[str, Array]]:
  """{path of a module: its down, up and perhaps alpha}; ValueError for a tree that is none of adapters."""
  found = {}
  for path, leaf in flatten_dict(adapters).items():
    found.setdefault(path[:-1], {})[path[-1]] = leaf
  for path, module in found.items():
    if set(module) - {'alpha'} != {'down', 'up'}:
      raise ValueError(f'an adapter has down, up and at most alpha, and {"/".join(path)!r} has {", ".join(module)}')
  return found


def _product(path: tuple[str, ...], module: Mapping[str, Array], flat: Mapping[tuple[str, ...], Array]) -> Array:
  """What an adapter adds to its kernel, for a scale of 1."""
  kernel = flat.get((*path, 'kernel'))
  if kernel is None:
    known = [p for p in flat if p[-1] == 'kernel']
    raise ValueError(f'the network has no kernel for the adapter {"/".join(path)!r}: {_nearest("/".join(path), known)}')
  down, up = (jnp.asarray(module[name], jnp.float32) for name in ('down', 'up'))
  rank = down.shape[-1]
  if (down.shape[:-1] != kernel.shape[:-1] or up.shape[-2:] != (rank, kernel.shape[-1])
      or up.shape[:-2] not in ((), _depth(kernel.shape[:-2]))):
    raise ValueError(f'the adapter {"/".join(path)!r} is for another network: down {list(down.shape)} and up '
                     f'{list(up.shape)} do not make a kernel {list(kernel.shape)}')
  delta = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
  return delta if 'alpha' not in module else delta * (jax.lax.stop_gradient(module['alpha']) / rank)


def _depth(space: Sequence[int]) -> tuple[int, ...]:
  """The first axes of `up` under SCANNED: the first of the kernel's, and ones."""
  return (*space[:1], *[1] * len(space[1:]))


def _nearest(name: str, paths: Iterable[tuple[str, ...]]) -> str:
  near = difflib.get_close_matches(name, ['/'.join(path) for path in paths], NEAR, cutoff=0.0)
  return f'the nearest are {", ".join(near)}' if near else 'there are no kernels'
