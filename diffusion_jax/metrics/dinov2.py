"""The DINOv2 vision transformer of FD-DINOv2, with the weights of ViT-S/14, B/14 or L/14.

Oquab et al. 2023 (arXiv 2304.07193) trained it; Stein et al. 2023 (arXiv 2306.04675) compare images by the Fréchet
distance between its class tokens, from ViT-L/14 at 224 pixels. Images are resized as EDM2 does it (Karras et al. 2024,
arXiv 2312.02696), because published values of FD-DINOv2 are mostly measured so.
"""
import math
import re
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.metrics import batches

__all__ = ['DINOv2', 'extract', 'from_arrays', 'prepare', 'settings']

SIZE = 224  # pixels
PATCH = 14
HEAD = 64   # channels of a head, in every released model
EPSILON = 1e-6
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's channels, red first
# Our name of each module: the original's, Hugging Face's.
OUTSIDE = {'cls_token': ('cls_token', 'embeddings.cls_token'),
           'positions': ('pos_embed', 'embeddings.position_embeddings'),
           'patch': ('patch_embed.proj', 'embeddings.patch_embeddings.projection'),
           'norm': ('norm', 'layernorm')}
IN_BLOCK = {'norm1': ('norm1', 'norm1'),
            'qkv': ('attn.qkv', 'attention.attention'),
            'out': ('attn.proj', 'attention.output.dense'),
            'scale1': ('ls1.gamma', 'layer_scale1.lambda1'),
            'norm2': ('norm2', 'norm2'),
            'fc1': ('mlp.fc1', 'mlp.fc1'),
            'fc2': ('mlp.fc2', 'mlp.fc2'),
            'scale2': ('ls2.gamma', 'layer_scale2.lambda1')}
BLOCKS = ('blocks', 'encoder.layer')
ADVICE = 'give dinov2_vitl14_pretrain.pth, or model.safetensors of facebook/dinov2-large'


def prepare(images, size: int = SIZE):
  """images uint8 [N, H, W, 1 or 3] -> what the network sees: float32 [N, size, size, 3].

  Bicubic with antialias: Keys' kernel with a = -0.5, half-pixel centres, widened by H / size where that is above 1, and
  normalised over the pixels that exist. The result overshoots 0..255 and is neither clipped nor rounded. Then / 255,
  minus ImageNet's mean, over its standard deviation.
  """
  x = jnp.asarray(images).astype(jnp.float32)
  x = jax.image.resize(x, (len(x), size, size, x.shape[-1]), 'cubic', antialias=True)
  return (x / 255 - jnp.asarray(MEAN)) / jnp.asarray(STD)


class DINOv2(nn.Module):
  """x float32 [N, H, W, 3] as `prepare` gives it, H and W multiples of 14 -> class tokens float32 [N, width].

  They are taken after the last layer normalisation. `mlp` is the hidden width of each block's two layers, `grid` how
  many positions a side the weights hold: 37 in the released ones, which were trained at 518 pixels. Positions for
  another number of patches are interpolated bicubically as if for `offset` patches more: the original code, and so
  published values of FD-DINOv2, have 0.1 here, Hugging Face's Dinov2Model 0.
  """
  width: int = 1024
  depth: int = 24
  heads: int = 16
  mlp: int = 4096
  grid: int = 37
  offset: float = 0.1

  @nn.compact
  def __call__(self, x):
    n, rows, columns = x.shape[0], x.shape[1] // PATCH, x.shape[2] // PATCH
    positions = self.param('positions', nn.initializers.normal(0.02), (1 + self.grid ** 2, self.width))
    cls_token = self.param('cls_token', nn.initializers.normal(0.02), (self.width,))
    x = x.reshape(n, rows, PATCH, columns, PATCH, 3).swapaxes(2, 3).reshape(n, rows * columns, -1)
    x = _dense(self.width, 'patch')(x)
    x = jnp.concatenate([jnp.broadcast_to(cls_token, (n, 1, self.width)), x], 1)
    x += jnp.concatenate([positions[:1], self._resized(positions[1:], rows, columns)])
    for i in range(self.depth):
      x = Block(self.heads, self.mlp, name=f'block_{i}')(x)
    return _norm('norm')(x[:, 0])

  def _resized(self, positions, rows, columns):
    """[grid * grid, C] -> [rows * columns, C]."""
    if rows == columns == self.grid:
      return positions
    x = positions.reshape(self.grid, self.grid, -1)
    down, across = (interpolation(self.grid, n, self.offset) for n in (rows, columns))
    x = jnp.einsum('ri,sj,ijc->rsc', down, across, x, precision='highest')
    return x.reshape(rows * columns, -1)


class Block(nn.Module):
  """x [N, T, C] -> the same shape: attention and two dense layers, each normalised before and scaled after."""
  heads: int
  mlp: int

  @nn.compact
  def __call__(self, x):
    n, t, width = x.shape
    scale = lambda name: self.param(name, nn.initializers.ones, (width,))
    qkv = _dense(3 * width, 'qkv')(_norm('norm1')(x))
    q, k, v = jnp.moveaxis(qkv.reshape(n, t, 3, self.heads, -1), 2, 0)
    weights = jnp.einsum('nqhc,nkhc->nhqk', q, k, precision='highest') * q.shape[-1] ** -0.5
    y = jnp.einsum('nhqk,nkhc->nqhc', nn.softmax(weights), v, precision='highest').reshape(x.shape)
    x += scale('scale1') * _dense(width, 'out')(y)
    y = nn.gelu(_dense(self.mlp, 'fc1')(_norm('norm2')(x)), approximate=False)
    return x + scale('scale2') * _dense(width, 'fc2')(y)


def _dense(features, name):
  return nn.Dense(features, precision='highest', name=name)


def _norm(name):
  # Flax's default variance, E[x^2] - E[x]^2, loses digits where the mean is large.
  return nn.LayerNorm(EPSILON, use_fast_variance=False, name=name)


def interpolation(length: int, size: int, offset: float) -> np.ndarray:
  """The matrix [size, length] of a bicubic resize as PyTorch's without antialias: a = -0.75, edges repeated.

  Output i is at (i + 1/2) * length / (size + offset) - 1/2 of the input.
  """
  at = (np.arange(size) + 0.5) * length / (size + offset) - 0.5
  first = np.floor(at).astype(int) - 1
  matrix = np.zeros((size, length))
  for tap in range(4):
    d = np.abs(at - first - tap)
    weight = np.where(d <= 1, (1.25 * d - 2.25) * d * d + 1, ((-0.75 * d + 3.75) * d - 6) * d + 3)
    matrix[np.arange(size), np.clip(first + tap, 0, length - 1)] += weight
  return matrix.astype(np.float32)


def extract(params, images: np.ndarray, batch_size: int = 32) -> np.ndarray:
  """images uint8 [N, H, W, 3], or [N, H, W, 1] for grey -> the features of FD-DINOv2, float32 [N, D].

  D is 1024 for ViT-L/14. `params` come from `from_arrays`. The network is compiled for `batch_size` images, whatever
  their size, and runs on as many local devices as divide it. Raises ValueError for images of another shape or dtype.
  """
  if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8 or not images.size:
    raise ValueError(f'DINOv2 takes images uint8 [N, H, W, 3] or [N, H, W, 1], got {images.dtype} '
                     f'{list(images.shape)}: round to 0..255 and put channels last')
  return batches.apply(lambda params, batch: _network(params, _prepare(batch)), params, images, batch_size)


def settings(params) -> DINOv2:
  """The network that has these parameters."""
  width = params['cls_token'].shape[0]
  return DINOv2(width=width, depth=sum(name.startswith('block_') for name in params), heads=width // HEAD,
                mlp=params['block_0']['fc1']['bias'].shape[0], grid=math.isqrt(params['positions'].shape[0] - 1))


# Two programs: a new image size compiles the short one only.
_prepare = jax.jit(prepare)
_network = jax.jit(lambda params, x: settings(params).apply({'params': params}, x))


def from_arrays(arrays: Mapping[str, np.ndarray]) -> dict:
  """The parameters, from numpy arrays under the original's names or Hugging Face's.

  The original's are those of dinov2_vitl14_pretrain.pth ('blocks.0.attn.qkv.weight'), Hugging Face's those of
  Dinov2Model ('encoder.layer.0.attention.attention.query.weight'), with or without 'dinov2.' before them. The mask
  token, which only training needs, may be there or not. Width, depth, hidden width and the number of positions are
  what the shapes say; a head has 64 channels.

  Raises ValueError for a name that is missing or unknown, a wrong shape, values that are not finite, and for models
  that this is not: with register tokens, or with SwiGLU (the giant).
  """
  arrays = {name.removeprefix('dinov2.'): array for name, array in arrays.items()}
  for part, kind in (('register_tokens', 'register tokens'), ('mlp.w', 'SwiGLU')):
    if odd := [name for name in arrays if part in name]:
      raise ValueError(f'the weights are of a DINOv2 with {kind} ({odd[0]!r}), which FD-DINOv2 does not use: {ADVICE}')
  hugging = any(name.startswith('embeddings.') for name in arrays)
  shapes = _shapes(arrays, hugging)
  keys = {path: _sources(path, hugging) for path in shapes}
  wanted = [source for sources in keys.values() for source in sources]
  if missing := sorted(set(wanted) - set(arrays)):
    raise ValueError(f'the weights lack {missing[0]!r} ({len(missing)} of {len(wanted)} names): {ADVICE}')
  if unknown := sorted(set(arrays) - {*wanted, 'mask_token', 'embeddings.mask_token'}):
    raise ValueError(f'DINOv2 has no {unknown[0]!r} ({len(unknown)} unknown names in the weights): {ADVICE}')
  tree = {}
  for path, sources in keys.items():
    *modules, name = path
    leaves = tree
    for module in modules:
      leaves = leaves.setdefault(module, {})
    leaves[name] = _leaf(arrays, sources, path, shapes[path])
  return tree


def _shapes(arrays, hugging):
  """{path: shape} of the network that the arrays seem to be for."""
  def shape(name, dimensions):
    found = np.shape(arrays[name]) if name in arrays else ()
    if len(found) != dimensions:
      raise ValueError(f"the weights have no {name!r} of {dimensions} dimensions, so they are not DINOv2's: {ADVICE}")
    return found
  blocks = {match[1] for name in arrays if (match := re.match(rf'{re.escape(BLOCKS[hugging])}\.(\d+)\.', name))}
  width = shape(OUTSIDE['cls_token'][hugging], 3)[-1]
  positions = shape(OUTSIDE['positions'][hugging], 3)[1]
  mlp = shape(f'{BLOCKS[hugging]}.0.mlp.fc1.weight', 2)[0]
  grid = math.isqrt(max(positions - 1, 0))
  if not width or width % HEAD or grid < 1 or grid ** 2 + 1 != positions:
    raise ValueError(f'DINOv2 has a multiple of {HEAD} channels and a square of positions with one more for the class '
                     f'token, got {width} and {positions}: {ADVICE}')
  model = DINOv2(width, len(blocks), width // HEAD, mlp, grid)
  key, x = jax.eval_shape(lambda: (jax.random.key(0), jnp.zeros((1, PATCH, PATCH, 3))))
  tree = jax.eval_shape(model.init, key, x)['params']
  return {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _sources(path, hugging):
  """Where the arrays have a parameter: one name, or for Hugging Face's attention three."""
  name = OUTSIDE[path[0]][hugging] if path[0] in OUTSIDE else (
      f'{BLOCKS[hugging]}.{path[0].removeprefix("block_")}.{IN_BLOCK[path[1]][hugging]}')
  end = {'kernel': '.weight', 'scale': '.weight', 'bias': '.bias'}.get(path[-1], '')
  if hugging and 'qkv' in path:
    return [f'{name}.{part}{end}' for part in ('query', 'key', 'value')]
  return [name + end]


def _leaf(arrays, sources, path, shape):
  if path == ('patch', 'kernel'):
    wanted = (shape[1], 3, PATCH, PATCH)
  elif path[-1] == 'kernel':
    wanted = (shape[1] // len(sources), shape[0])
  else:
    ones = {'cls_token': (1, 1), 'positions': (1,)}.get(path[0], ())
    wanted = (*ones, shape[0] // len(sources), *shape[1:])
  parts = [np.asarray(arrays[source]) for source in sources]
  for source, array in zip(sources, parts, strict=True):
    if array.shape != wanted:
      raise ValueError(f'{source!r} must have the shape {list(wanted)}, got {list(array.shape)}: {ADVICE}')
    if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
      raise ValueError(f'{source!r} must hold finite floating-point numbers, got {array.dtype}: {ADVICE}')
  array = np.concatenate(parts)
  # Theirs have outputs first, and for patches channels before rows and columns.
  array = np.moveaxis(array, (0, 1), (-1, -2)) if path[-1] == 'kernel' else array
  return np.ascontiguousarray(array.reshape(shape), np.float32)
