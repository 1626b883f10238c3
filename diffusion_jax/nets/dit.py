"""Transformers over patches, for one to three spatial axes: DiT (Peebles & Xie 2022) and MMDiT (Esser et al. 2024)."""
import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.nets import layers
from diffusion_jax.nets.blocks import cosines_and_sines, with_image
from diffusion_jax.nets.layers import Dense

Array = jax.Array
FREQUENCIES = 256  # numbers by which the level is given to the first layer


class DiT(nn.Module):
  """x [B, *S, C], noise [B], cond -> F [B, *S, C]: DiT with adaLN-zero. Zero at initialisation.

  The paper's sizes as (width, depth, heads), table 1: S (384, 12, 6), B (768, 12, 12), L (1024, 24, 16),
  XL (1152, 28, 16); 'XL/2' has patch 2.

  patch: the side of a patch, or one side per spatial axis; each must divide its axis; mlp: hidden width of the
  two dense layers of a block, relative to width; positions: 'sincos' (fixed, as in the paper) or 'learned';
  num_classes: 0, or the number of labels in cond['label'] [B], of which those with cond['drop'] [B] true are
  replaced by the null class; dtype: of the products, 'float32' or 'bfloat16' (parameters, their gradients and the
  norms stay float32); variance: whether as many channels of a variance output follow those of F, [B, *S, 2 C];
  image: 0, or the channels of cond['image'] [B, *S, image], which the patches have too;
  remat: 'none', or 'blocks' to compute each block again for the gradient instead of keeping what is inside it;
  scan: whether the blocks are one program in a loop, with parameters [depth, ...] under 'blocks' in place of
  'block_0', 'block_1', ...: the same function, which compiles in a time that does not grow with depth.
  """
  width: int = 1152
  depth: int = 28
  heads: int = 16
  patch: int | Sequence[int] = 2
  mlp: int = 4
  positions: str = 'sincos'
  num_classes: int = 0
  dtype: str = 'float32'
  variance: bool = False
  image: int = 0
  remat: str = 'none'
  scan: bool = False

  def __post_init__(self):
    _check(self)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, noise: Array, cond: Mapping[str, Array], train: bool = False) -> Array:
    sides = _sides(self.patch, x)
    emb = LevelEmbedding(self.width, name='embed')(noise)
    if self.num_classes:
      label = cond['label']
      label = jnp.where(cond['drop'], self.num_classes, label) if 'drop' in cond else label
      init = nn.initializers.normal(0.02)
      emb += nn.Embed(self.num_classes + 1, self.width, embedding_init=init, name='embed_label')(label)
    emb = nn.swish(emb)
    h = Patches(self.width, sides, self.positions, self.dtype, name='patches')(with_image(x, cond, self.image))

    make = nn.remat(Block) if self.remat == 'blocks' else Block
    if self.scan:
      blocks = make(self.width, self.heads, self.mlp, self.dtype, name='blocks')
      loop = nn.scan(lambda block, h, _: (block(h, emb), None), length=self.depth,
                     variable_axes={'params': 0}, split_rngs={'params': True})
      h, _ = loop(blocks, h, None)
    else:
      for i in range(self.depth):
        h = make(self.width, self.heads, self.mlp, self.dtype, name=f'block_{i}')(h, emb)
    return Head(x.shape, sides, 1 + self.variance, self.dtype, name='head')(h, emb).astype(x.dtype)


class MMDiT(nn.Module):
  """x [B, *S, C], noise [B], cond['text'] [B, L, D] -> F [B, *S, C]. Zero at initialisation.

  Image patches and text tokens are two streams with weights of their own, which attend to all tokens of both.
  cond['text_mask'] [B, L] is true for tokens that are text: the others change nothing. Samples with cond['drop'] [B]
  true get one learned token instead of their text. The last block has no use for a new text, and does not make one.
  The mean text token is added to the level's embedding. Other arguments as in DiT; labels are not used.
  """
  width: int = 384
  depth: int = 12
  heads: int = 6
  patch: int | Sequence[int] = 2
  mlp: int = 4
  positions: str = 'sincos'
  dtype: str = 'float32'
  variance: bool = False
  image: int = 0
  remat: str = 'none'

  def __post_init__(self):
    _check(self)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, noise: Array, cond: Mapping[str, Array], train: bool = False) -> Array:
    sides, text = _sides(self.patch, x), cond['text']
    mask = cond['text_mask'].astype(bool) if 'text_mask' in cond else jnp.ones(text.shape[:2], bool)
    null = self.param('null', nn.initializers.normal(0.02), text.shape[-1:])
    if 'drop' in cond:
      text = jnp.where(cond['drop'][:, None, None], null.astype(text.dtype), text)
      mask = jnp.where(cond['drop'][:, None], jnp.arange(text.shape[1]) == 0, mask)
    text = Dense(self.width, dtype=self.dtype, name='embed_text')(text)
    mean = jnp.sum(text, 1, jnp.float32, where=mask[..., None]) / jnp.maximum(mask.sum(1, keepdims=True), 1)
    emb = LevelEmbedding(self.width, name='embed')(noise) + Dense(self.width, name='embed_mean')(mean)
    emb = nn.swish(emb)
    h = Patches(self.width, sides, self.positions, self.dtype, name='patches')(with_image(x, cond, self.image))

    make = nn.remat(JointBlock) if self.remat == 'blocks' else JointBlock
    for i in range(self.depth):
      h, text = make(self.width, self.heads, self.mlp, self.dtype, last=i == self.depth - 1, name=f'block_{i}')(
          h, text, mask, emb)
    return Head(x.shape, sides, 1 + self.variance, self.dtype, name='head')(h, emb).astype(x.dtype)


def _check(net) -> None:
  """Raises ValueError for arguments that no network has."""
  sides = (net.patch,) if isinstance(net.patch, int) else tuple(net.patch)
  checks = [
      (net.width >= 1 and net.depth >= 1 and net.mlp >= 1,
       f'width, depth and mlp must be at least 1, got {net.width}, {net.depth} and {net.mlp}'),
      (net.heads >= 1 and net.width % net.heads == 0, f'heads must divide width: width {net.width}, heads {net.heads}'),
      (all(side >= 1 for side in sides), f'patch must be at least 1 along every axis, got {net.patch}'),
      (net.positions in ('sincos', 'learned'), f"positions must be 'sincos' or 'learned', got {net.positions!r}"),
      (getattr(net, 'num_classes', 0) >= 0, f'num_classes must be at least 0, got {getattr(net, "num_classes", 0)}'),
      (net.image >= 0, f'image must be at least 0, got {net.image}'),
      (net.dtype in ('float32', 'bfloat16'), f"dtype must be 'float32' or 'bfloat16', got {net.dtype!r}"),
      (net.remat in ('none', 'blocks'), f"remat must be 'none' or 'blocks', got {net.remat!r}"),
  ]
  for ok, message in checks:
    if not ok:
      raise ValueError(message)


def _sides(patch: int | Sequence[int], x: Array) -> tuple[int, ...]:
  """The side of a patch along every spatial axis of x; ValueError if they do not fit."""
  space = x.shape[1:-1]
  sides = (patch,) * len(space) if isinstance(patch, int) else tuple(patch)
  if len(sides) != len(space) or any(n % side for n, side in zip(space, sides, strict=True)):
    raise ValueError(f'patches of {sides} must divide every spatial axis, got sizes {space}')
  return sides


class LevelEmbedding(nn.Module):
  """noise [B] -> [B, width]: cosines and sines at 128 frequencies, then two layers, in float32."""
  width: int

  @nn.compact
  def __call__(self, noise: Array) -> Array:
    dense = lambda name: nn.Dense(self.width, kernel_init=nn.initializers.normal(0.02), name=name)
    return dense('out')(nn.swish(dense('in')(cosines_and_sines(noise, FREQUENCIES))))


class Patches(nn.Module):
  """x [B, *S, C] -> tokens [B, T, width] that know their place, T = prod(S / sides), the last axis running fastest."""
  width: int
  sides: tuple[int, ...]
  positions: str
  dtype: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    grid = tuple(n // side for n, side in zip(x.shape[1:-1], self.sides, strict=True))
    h = Dense(self.width, dtype=self.dtype, name='embed')(patchify(x, self.sides))
    if self.positions == 'learned':
      places = self.param('positions', nn.initializers.normal(0.02), (math.prod(grid), self.width))
    else:
      places = sincos_positions(grid, self.width)
    return (h + places).astype(self.dtype)


class Head(nn.Module):
  """Tokens [B, T, width] -> [B, *S, outputs * C] for `shape` (B, *S, C): zero at initialisation."""
  shape: tuple[int, ...]
  sides: tuple[int, ...]
  outputs: int
  dtype: str

  @nn.compact
  def __call__(self, h: Array, emb: Array) -> Array:
    shift, scale = _modulation(Dense(2 * h.shape[-1], init_scale=0.0, dtype=self.dtype, name='modulation'), emb, 2)
    features = self.outputs * self.shape[-1]
    h = Dense(features * math.prod(self.sides), init_scale=0.0, dtype=self.dtype, name='out')(
        _modulated(h, shift, scale))
    return unpatchify(h, (*self.shape[:-1], features), self.sides)


class Stream(nn.Module):
  """The weights that one kind of tokens [B, T, width] meets in a block: `enter`, then attention, then `leave`.

  last: the tokens are only looked at; there is no `leave`.
  """
  width: int
  heads: int
  mlp: int
  dtype: str
  last: bool = False

  def setup(self):
    # As one matrix of three, Glorot's variance would be half of what it is for three.
    self.query, self.key, self.value = (Dense(self.width, init_scale=0.5, dtype=self.dtype) for _ in range(3))
    self.modulation = Dense((2 if self.last else 6) * self.width, init_scale=0.0, dtype=self.dtype)
    if not self.last:
      self.out = Dense(self.width, dtype=self.dtype)
      self.mlp_in = Dense(self.mlp * self.width, dtype=self.dtype)
      self.mlp_out = Dense(self.width, dtype=self.dtype)

  def enter(self, h: Array, emb: Array) -> tuple[list[Array], list[Array]]:
    """Query, key and value [B, T, heads, width / heads], and what `leave` needs of emb."""
    shift, scale, *rest = _modulation(self.modulation, emb, 2 if self.last else 6)
    y = _modulated(h, shift, scale)
    return [layer(y).reshape(*h.shape[:2], self.heads, -1) for layer in (self.query, self.key, self.value)], rest

  def leave(self, h: Array, attended: Array, rest: list[Array]) -> Array:
    """h plus what attention gave, plus two layers of that: each through a gate that is shut at initialisation."""
    gate, shift, scale, gate_mlp = rest
    h = h + gate * self.out(attended.reshape(h.shape))
    return h + gate_mlp * self.mlp_out(nn.gelu(self.mlp_in(_modulated(h, shift, scale)), approximate=True))


class Block(Stream):
  """DiT's block, adaLN-zero (figure 3): tokens [B, T, width], emb [B, width] -> tokens."""

  def __call__(self, h: Array, emb: Array) -> Array:
    qkv, rest = self.enter(h, emb)
    return self.leave(h, layers.attention(*qkv), rest)


class JointBlock(nn.Module):
  """MMDiT's block (figure 2): two streams, one attention over the tokens of both, text outside `mask` left out."""
  width: int
  heads: int
  mlp: int
  dtype: str
  last: bool

  @nn.compact
  def __call__(self, h: Array, text: Array, mask: Array, emb: Array) -> tuple[Array, Array]:
    sizes = self.width, self.heads, self.mlp, self.dtype
    image_stream, text_stream = Stream(*sizes, name='image'), Stream(*sizes, last=self.last, name='text')
    of_image, rest = image_stream.enter(h, emb)
    of_text, text_rest = text_stream.enter(text, emb)
    query, key, value = (jnp.concatenate(pair, 1) for pair in zip(of_image, of_text, strict=True))
    seen = jnp.concatenate([jnp.ones(h.shape[:2], bool), mask], 1)
    attended = layers.attention(query[:, :h.shape[1]] if self.last else query, key, value,
                                mask=seen[:, None, None, :])
    if not self.last:
      text = text_stream.leave(text, attended[:, h.shape[1]:], text_rest)
    return image_stream.leave(h, attended[:, :h.shape[1]], rest), text


def _modulation(layer: Dense, emb: Array, count: int) -> list[Array]:
  """`count` numbers for every channel, [B, 1, width] each."""
  return jnp.split(layer(emb)[:, None], count, axis=-1)


def _modulated(h: Array, shift: Array, scale: Array) -> Array:
  """Every token with mean 0 and variance 1, then scaled and shifted; computed in float32."""
  y = h.astype(jnp.float32)
  y -= y.mean(-1, keepdims=True)
  y *= jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6)
  return (y * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(h.dtype)


def patchify(x: Array, sides: Sequence[int]) -> Array:
  """x [B, *S, C] -> [B, T, prod(sides) * C]: the patches in order, the last axis running fastest, then in each."""
  pairs = [k for n, side in zip(x.shape[1:-1], sides, strict=True) for k in (n // side, side)]
  dims = len(sides)
  order = (0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1)
  return x.reshape(len(x), *pairs, x.shape[-1]).transpose(order).reshape(len(x), -1, math.prod(sides) * x.shape[-1])


def unpatchify(h: Array, shape: Sequence[int], sides: Sequence[int]) -> Array:
  """The inverse of patchify: h [B, T, prod(sides) * C] -> x of `shape` [B, *S, C]."""
  dims = len(sides)
  grid = [n // side for n, side in zip(shape[1:-1], sides, strict=True)]
  order = (0, *(i for axis in range(dims) for i in (1 + axis, 1 + dims + axis)), 2 * dims + 1)
  return h.reshape(-1, *grid, *sides, shape[-1]).transpose(order).reshape(shape)


def sincos_positions(grid: Sequence[int], width: int) -> Array:
  """Places on a grid as numbers in [-1, 1], [prod(grid), width]: sines, then cosines, of the place along each axis.

  The axes share the width equally, the last axis first, as in DiT's checkpoints; what is left over stays zero.
  """
  count = width // (2 * len(grid))
  omega = 10_000.0 ** (-jnp.arange(count) / max(count, 1))
  parts = []
  for place in reversed(jnp.meshgrid(*map(jnp.arange, grid), indexing='ij')):
    angles = place.reshape(-1, 1) * omega
    parts += [jnp.sin(angles), jnp.cos(angles)]
  return jnp.pad(jnp.concatenate(parts, 1), ((0, 0), (0, width - 2 * count * len(grid))))
