"""The Inception network of FID, sFID and the Inception score: TensorFlow's graph of 2015-12-05, operation by operation.

Szegedy et al. 2016 (arXiv 1512.00567) describe the architecture. The graph that the metrics are defined by differs from
the Inception V3 of most libraries in the resize of its input, in its scale, in pools that leave padding out of their
mean, in one pool of the last block that takes the maximum, and in its 1008 classes. Modules have the names of the
PyTorch port, whose weights most people have.
"""
import functools
import os
import re
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from diffusion_jax.metrics import batches
from diffusion_jax.metrics.convolution import convolve

__all__ = ['OUTPUTS', 'Inception', 'extract', 'from_arrays', 'from_tensorflow', 'from_torch', 'load', 'prepare',
           'to_safetensors']

SIZE = 299
EPSILON = 1e-3  # of every batch normalisation
# What the network gives for each image, and how many numbers.
OUTPUTS = {'64': 64, '192': 192, '768': 768, '2048': 2048, 'sfid': 17 * 17 * 7, 'logits': 1008, 'logits_unbiased': 1008}
STEM = ('Conv2d_1a_3x3', 'Conv2d_2a_3x3', 'Conv2d_2b_3x3', 'Conv2d_3b_1x1', 'Conv2d_4a_3x3')
BLOCKS = ('5b', '5c', '5d', '6a', '6b', '6c', '6d', '6e', '7a', '7b', '7c')
TORCH = {'kernel': 'conv.weight', 'scale': 'bn.weight', 'bias': 'bn.bias', 'mean': 'bn.running_mean',
         'var': 'bn.running_var'}
TENSORFLOW = {'kernel': 'conv2d_params', 'scale': 'batchnorm/gamma', 'bias': 'batchnorm/beta',
              'mean': 'batchnorm/moving_mean', 'var': 'batchnorm/moving_variance'}


def prepare(images, size: int = SIZE):
  """images uint8 [N, H, W, 1 or 3] -> what the network sees: float32 [N, size, size, 3] in [-1, 1).

  Bilinear as in TensorFlow 1, at every H and W: output pixel i reads from i * H / size, with no half pixel and no
  antialiasing, and the result is not rounded to integers. Then (x - 128) / 128.
  """
  x = jnp.asarray(images).astype(jnp.float32)
  for axis in (2, 1):
    low, high, weight = _sources(x.shape[axis], size)
    weight = weight.reshape((-1,) + (1,) * (3 - axis))
    a, b = (jnp.take(x, index, axis) for index in (low, high))
    x = a + (b - a) * weight
  return (jnp.broadcast_to(x, (*x.shape[:3], 3)) - 128) / 128


def _sources(length, size):
  """Which two of `length` pixels each of `size` pixels lies between, and how far from the first."""
  at = np.arange(size, dtype=np.float32) * np.float32(length / size)  # the graph holds this ratio in float32
  low = at.astype(np.int32)
  return low, np.minimum(low + 1, length - 1), at - low


def average_pool(x):
  """The mean of the 3x3 neighbours that exist: at an edge, of fewer than nine."""
  total = lambda y: _neighbours(jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0))), 1, jnp.add)
  return total(x) / total(jnp.ones_like(x[:1, :, :, :1]))


def max_pool(x, stride: int = 1):
  """The maximum of the 3x3 neighbours that exist; with stride 2, only where all nine do."""
  if stride == 1:
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
  return _neighbours(x, stride, jnp.maximum)


def _neighbours(x, stride, join):
  """join of 3x3 neighbours, an axis at a time. XLA's own reductions over windows take four times as long on a CPU."""
  for axis in (1, 2):
    a, b, c = (lax.slice_in_dim(x, i, x.shape[axis] - 2 + i, stride, axis) for i in range(3))
    x = join(join(a, b), c)
  return x


class Conv(nn.Module):
  """Convolution without bias, batch normalisation by the running statistics, ReLU.

  With stride 1 the output has the size of the input, with stride 2 it is where the whole kernel finds input.
  """
  features: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1

  @nn.compact
  def __call__(self, x):
    param = lambda name, init, *shape: self.param(name, init, (*shape, self.features))
    kernel = param('kernel', nn.initializers.he_normal(), *self.kernel, x.shape[-1])
    scale, var = param('scale', nn.initializers.ones), param('var', nn.initializers.ones)
    bias, mean = param('bias', nn.initializers.zeros), param('mean', nn.initializers.zeros)
    x = convolve(x, kernel, self.stride)
    return nn.relu((x - mean) * (scale * lax.rsqrt(var + EPSILON)) + bias)


class Classifier(nn.Module):
  """The last layer, x [N, C] -> its outputs with and without the bias."""

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', nn.initializers.lecun_normal(), (x.shape[-1], 1008))
    logits = jnp.dot(x, kernel, precision='highest')
    return {'logits': logits + self.param('bias', nn.initializers.zeros, (1008,)), 'logits_unbiased': logits}


class Inception(nn.Module):
  """x float32 [N, 299, 299, 3] as `prepare` gives it -> {name: float32 [N, OUTPUTS[name]]}.

  '64', '192', '768' and '2048' are means over all positions, after the first and the second max pool, Mixed_6e and
  Mixed_7c; 2048 is FID's. 'sfid' is the first seven channels of Mixed_6d's 1x1 branch, rows first (Nash et al. 2021).
  'logits_unbiased' are the logits without the bias of the last layer, as the Inception score takes them.
  """

  @nn.compact
  def __call__(self, x):
    out = {}
    conv = self._convs('')
    # Two convolutions have no padding. XLA computes them several times as fast on a CPU with it, and the edge cut off.
    x = conv(STEM[0], x, 32, (3, 3), 2)
    x = conv(STEM[1], x, 32, (3, 3))[:, 1:-1, 1:-1]
    x = conv(STEM[2], x, 64, (3, 3))
    x = max_pool(x, 2)
    out['64'] = x.mean((1, 2))
    x = conv(STEM[3], x, 80)
    x = conv(STEM[4], x, 192, (3, 3))[:, 1:-1, 1:-1]
    x = max_pool(x, 2)
    out['192'] = x.mean((1, 2))
    for block, width in (('5b', 32), ('5c', 64), ('5d', 64)):
      x = _block_35(self._convs(block), x, width)
    x = _to_17(self._convs('6a'), x)
    for block, width in (('6b', 128), ('6c', 160), ('6d', 160), ('6e', 192)):
      x = _block_17(self._convs(block), x, width)
      if block == '6d':
        out['sfid'] = x[..., :7].reshape(len(x), -1)  # the 1x1 branch comes first in the block's output
    out['768'] = x.mean((1, 2))
    x = _to_8(self._convs('7a'), x)
    x = _block_8(self._convs('7b'), x, average_pool)
    x = _block_8(self._convs('7c'), x, max_pool)
    out['2048'] = x = x.mean((1, 2))
    return out | Classifier(name='fc')(x)

  def _convs(self, block):
    prefix = f'Mixed_{block}.' if block else ''
    return lambda name, x, *settings: Conv(*settings, name=prefix + name)(x)


def _chain(conv, x, prefix, *layers):
  for i, layer in enumerate(layers, 1):
    x = conv(f'{prefix}_{i}', x, *layer)
  return x


def _block_35(conv, x, width):
  return jnp.concatenate([
      conv('branch1x1', x, 64),
      _chain(conv, x, 'branch5x5', (48,), (64, (5, 5))),
      _chain(conv, x, 'branch3x3dbl', (64,), (96, (3, 3)), (96, (3, 3))),
      conv('branch_pool', average_pool(x), width)], -1)


def _to_17(conv, x):
  return jnp.concatenate([
      conv('branch3x3', x, 384, (3, 3), 2),
      _chain(conv, x, 'branch3x3dbl', (64,), (96, (3, 3)), (96, (3, 3), 2)),
      max_pool(x, 2)], -1)


def _block_17(conv, x, width):
  row, column = (width, (1, 7)), (width, (7, 1))
  return jnp.concatenate([
      conv('branch1x1', x, 192),
      _chain(conv, x, 'branch7x7', (width,), row, (192, (7, 1))),
      _chain(conv, x, 'branch7x7dbl', (width,), column, row, column, (192, (1, 7))),
      conv('branch_pool', average_pool(x), 192)], -1)


def _to_8(conv, x):
  return jnp.concatenate([
      _chain(conv, x, 'branch3x3', (192,), (320, (3, 3), 2)),
      _chain(conv, x, 'branch7x7x3', (192,), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), 2)),
      max_pool(x, 2)], -1)


def _block_8(conv, x, pool):
  y = conv('branch3x3_1', x, 384)
  z = _chain(conv, x, 'branch3x3dbl', (448,), (384, (3, 3)))
  return jnp.concatenate([
      conv('branch1x1', x, 320),
      conv('branch3x3_2a', y, 384, (1, 3)), conv('branch3x3_2b', y, 384, (3, 1)),
      conv('branch3x3dbl_3a', z, 384, (1, 3)), conv('branch3x3dbl_3b', z, 384, (3, 1)),
      conv('branch_pool', pool(x), 192)], -1)


def extract(params, images: np.ndarray, batch_size: int = 32,
            outputs: Sequence[str] = tuple(OUTPUTS)) -> dict[str, np.ndarray]:
  """images uint8 [N, H, W, 3], or [N, H, W, 1] for grey -> {name: float32 [N, OUTPUTS[name]]} for names in `outputs`.

  `params` come from `from_arrays` or `load`. The network is compiled for `batch_size` images, whatever their size, and
  runs on as many local devices as divide it; what fills up a last batch is dropped again. Raises
  ValueError for images of another shape or dtype.
  """
  if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8 or not images.size:
    raise ValueError(f'the Inception network takes images uint8 [N, H, W, 3] or [N, H, W, 1], got {images.dtype} '
                     f'{list(images.shape)}: round to 0..255 and put channels last')
  if unknown := sorted(set(outputs) - set(OUTPUTS)):
    raise ValueError(f'the Inception network has no output {unknown[0]!r}: choose from {", ".join(OUTPUTS)}')
  def network(params, batch):
    found = _network(params, _prepare(batch))
    return {name: found[name] for name in outputs}

  found = batches.apply(network, params, images, batch_size)
  return {name: found[name] for name in outputs}  # in this order


# Two programs: a new image size compiles the short one only.
_prepare = jax.jit(prepare)
_network = jax.jit(lambda params, x: Inception().apply({'params': params}, x))


@functools.cache
def shapes() -> dict[tuple[str, str], tuple[int, ...]]:
  """{(module, parameter): shape} of the network."""
  key, x = jax.eval_shape(lambda: (jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3))))
  tree = jax.eval_shape(Inception().init, key, x)['params']
  return {(module, name): leaf.shape for module, leaves in tree.items() for name, leaf in leaves.items()}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> dict:
  """The parameters, from whichever of these the names are of: TensorFlow's graph, the PyTorch port, `to_safetensors`.

  Raises ValueError as `from_torch` does.
  """
  if 'softmax/weights' in arrays:
    return from_tensorflow(arrays)
  if 'fc.kernel' in arrays:
    return _tree(arrays, _ours())
  return from_torch(arrays)


def from_torch(arrays: Mapping[str, np.ndarray]) -> dict:
  """The parameters, from the state dict of the PyTorch port ('Mixed_5b.branch1x1.conv.weight', ...) as numpy arrays.

  Counters ('...num_batches_tracked') may be there or not. Raises ValueError for a name that is missing or unknown, a
  wrong shape, and values that are not finite.
  """
  arrays = {name: array for name, array in arrays.items() if not name.endswith('.bn.num_batches_tracked')}
  last = {'kernel': 'weight', 'bias': 'bias'}
  names = {f'{module}.{last[leaf] if module == "fc" else TORCH[leaf]}': (module, leaf) for module, leaf in shapes()}
  return _tree(arrays, names, {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)})


def from_tensorflow(arrays: Mapping[str, np.ndarray]) -> dict:
  """The parameters, from the constants of classify_image_graph_def.pb ('mixed/tower/conv_1/conv2d_params', ...).

  Constants that are no parameters are passed over. Without any gamma the scale of the batch normalisations is 1. Raises
  ValueError as `from_torch` does.
  """
  last = {'kernel': 'softmax/weights', 'bias': 'softmax/biases'}
  names = {last[leaf] if module == 'fc' else f'{tensorflow_scope(module)}/{TENSORFLOW[leaf]}': (module, leaf)
           for module, leaf in shapes()}
  parameters = (*TENSORFLOW.values(), *last.values())
  arrays = {name: array for name, array in arrays.items() if name.endswith(parameters)}
  if not any(name.endswith('/gamma') for name in arrays):
    arrays |= {name: np.ones(shapes()[key], np.float32) for name, key in names.items() if key[1] == 'scale'}
  return _tree(arrays, names)


def tensorflow_scope(module: str) -> str:
  """The scope of a convolution in the graph: 'Mixed_5b.branch5x5_2' -> 'mixed/tower/conv_1'."""
  numbered = lambda word, i: f'{word}_{i}' if i else word
  if module in STEM:
    return numbered('conv', STEM.index(module))
  block, branch, step, half = re.fullmatch(r'Mixed_(..)\.branch(_pool|[^_]+)_?(\d*)([ab]?)', module).groups()
  if block == '6a':
    tower = {'3x3': '', '3x3dbl': 'tower/'}[branch]
  else:
    tower = {'1x1': '', '5x5': 'tower/', '7x7': 'tower/', '3x3': 'tower/', '_pool': 'tower_2/'}.get(branch, 'tower_1/')
  layer = {'': numbered('conv', int(step or 1) - 1), 'a': 'mixed/conv', 'b': 'mixed/conv_1'}[half]
  return f'{numbered("mixed", BLOCKS.index(block))}/{tower}{layer}'


def to_safetensors(params) -> bytes:
  """The parameters as the content of a file that `load` reads."""
  return save({f'{module}.{name}': np.ascontiguousarray(leaf)
               for module, leaves in params.items() for name, leaf in leaves.items()})


def load(path: str | os.PathLike) -> dict:
  """The parameters from a file of what `to_safetensors` gives. Raises OSError or ValueError if it is not one."""
  try:
    arrays = load_file(path)
  except SafetensorError as e:
    raise ValueError(f'{path} is not a whole safetensors file ({e}): convert the original weights again') from e
  return _tree(arrays, _ours())


def _ours():
  return {'.'.join(key): key for key in shapes()}


def _tree(arrays, keys, axes=None):
  """{module: {name: float32 array}} from {source name: array}.

  `keys` maps source names to (module, name). `axes` gives, for each number of dimensions, the order in which the source
  has our axes, if it is another.
  """
  advice = 'give the weights of the FID Inception, pt_inception-2015-12-05 or classify_image_graph_def.pb'
  if missing := sorted(set(keys) - set(arrays)):
    raise ValueError(f'the weights lack {missing[0]!r} ({len(missing)} of {len(keys)} names): {advice}')
  if unknown := sorted(set(arrays) - set(keys)):
    raise ValueError(f'the network has no {unknown[0]!r} ({len(unknown)} unknown names in the weights): {advice}')
  tree = {}
  for source, (module, name) in keys.items():
    array, shape = np.asarray(arrays[source]), shapes()[module, name]
    order = axes[len(shape)] if axes else tuple(range(len(shape)))
    wanted = tuple(shape[axis] for axis in order)
    if array.shape != wanted:
      raise ValueError(f'{source!r} must have the shape {list(wanted)}, got {list(array.shape)}: {advice}')
    if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
      raise ValueError(f'{source!r} must hold finite floating-point numbers, got {array.dtype}: {advice}')
    tree.setdefault(module, {})[name] = np.ascontiguousarray(array.transpose(np.argsort(order)), np.float32)
  return tree
