"""Parameters of a network in fewer bits, for sampling: kernels held as bfloat16, or as eight-bit integers.

`int8` replaces a kernel [*K, inputs, outputs] by integers and a scale for each output, rounded once; the layers of
`nets.layers` then round what they are given too, in every call, and multiply integers (Dettmers et al. 2022, section
2.1, vector-wise; nothing is learned or calibrated). What the image, the level or a condition enters by, and what gives
F, stays as it was: these few are where rounding shows. Norms, biases and tables of embeddings are no kernels.

qwix does the same by replacing functions of jax while a network is traced, and knows a weight as the array that
reaches them: kernels that are reshaped, mixed (`products.winograd`) or multiplied by `@` are none to it.
"""
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion_jax.nets.layers import SCALE, VALUES, rounded

Array = jax.Array
Tree = Mapping[str, Any]
# Modules whose kernels stay: the first and the last of each network, and those of embeddings.
KEPT = re.compile(r'(^|/)(conv_in|conv_out|embed_\w+|embed/(in|out)|patches/embed|head/out|down_0_input/conv)$')
SCANNED = 'blocks'  # the module of networks whose blocks are one loop: everything in it has a first axis of depth


def reduced(net: nn.Module, params: Tree, precision: str) -> tuple[nn.Module, dict]:
  """The net and its parameters in 'bfloat16' or 'int8'. Raises ValueError for a net that cannot."""
  if not hasattr(net, 'dtype'):
    raise ValueError(f'the products of {type(net).__name__} have no dtype to choose')
  if precision == 'bfloat16':
    return net.clone(dtype=precision), jax.jit(bfloat16)(params)
  project = getattr(net, 'project', lambda params: params)  # of kernels that are used only normalised
  return net, jax.jit(lambda params: int8(project(params)))(params)


def int8(params: Tree) -> dict:
  """The parameters with integers in the place of kernels: a quarter of their bytes. For layers of `nets.layers` alone.

  Other layers do not find their kernel then, and flax says so. Raises ValueError if there is no kernel to replace.
  """
  def replaced(path, kernel):
    values, scale = rounded(kernel, range(path[0] == SCANNED, kernel.ndim - 1))
    return {VALUES: values, SCALE: scale.reshape(*kernel.shape[:path[0] == SCANNED], kernel.shape[-1])}
  return _changed(params, replaced)


def bfloat16(params: Tree) -> dict:
  """The parameters with kernels in bfloat16: half of their bytes, and what layers with that dtype multiply by anyway.

  Raises ValueError if there is no kernel to replace.
  """
  return _changed(params, lambda path, kernel: {'kernel': kernel.astype(jnp.bfloat16)})


def _changed(params: Tree, replaced: Callable[[tuple[str, ...], Array], dict[str, Array]]) -> dict:
  flat = flatten_dict(params, keep_empty_nodes=True)
  chosen = [path for path in flat if path[-1] == 'kernel' and not KEPT.search('/'.join(path[:-1]))]
  if not chosen:
    raise ValueError('the network has no kernels between its first and its last layer')
  for path in chosen:
    flat |= {(*path[:-1], name): leaf for name, leaf in replaced(path, flat.pop(path)).items()}
  return unflatten_dict(flat)
