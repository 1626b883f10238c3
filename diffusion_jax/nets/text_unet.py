"""The U-Net of latent diffusion (Rombach et al. 2022, section 3.3), built as that of Stable Diffusion 1, 2 and XL."""
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.nets import blocks, layers, products
from diffusion_jax.nets.layers import Conv, Dense, GroupNorm
from diffusion_jax.nets.unet import UNet

Array = jax.Array


class TextUNet(UNet):
  """`unet.UNet` with transformers that read cond['text'] [B, L, D] in place of its attention. Zero at initialisation.

  depth: transformer blocks after each residual block of a level, in place of `attention` (0: none; the middle has the
  last level's number, or 1); heads: of every level, or one number for each; text: D; vector: 0, or the channels of
  cond['vector'] [B, vector], which joins the embedding (SDXL's pooled text and sizes). cond['text_mask'] [B, L] is
  True where there is a token; without it all are.
  """
  channels: int = 320
  multipliers: Sequence[int] = (1, 2, 4, 4)
  attention: Sequence[int] = ()
  dropout: float = 0.0
  depth: Sequence[int] = (1, 1, 1, 0)
  heads: int | Sequence[int] = 8
  text: int = 768
  vector: int = 0

  def __post_init__(self):
    heads = [self.heads] * len(self.multipliers) if isinstance(self.heads, int) else self.heads
    if not len(self.depth) == len(heads) == len(self.multipliers):
      raise ValueError(f'depth and heads must have a number for each of the {len(self.multipliers)} levels, '
                       f'got {tuple(self.depth)} and {self.heads}')
    widths = [self.channels * m for m in self.multipliers]
    if any(n < 1 or width % n for n, width in zip(heads, widths, strict=True)):
      raise ValueError(f'heads must divide the width of every level: widths {widths}, heads {self.heads}')
    super().__post_init__()

  @nn.nowrap
  def block_options(self):
    return {'epsilon': 1e-5}

  @nn.nowrap
  def attends(self, h, level, i=None):
    return self.depth[level] > 0

  @nn.nowrap
  def attend(self, h, cond, level, name):
    text = cond.get('text')
    if text is None or text.ndim != 3 or text.shape[-1] != self.text:
      raise ValueError(f"cond['text'] must be [batch, tokens, {self.text}], "
                       f"got {'none' if text is None else list(text.shape)}")
    mask = cond.get('text_mask')
    mask = jnp.ones(text.shape[:2], bool) if mask is None else mask
    heads = self.heads if isinstance(self.heads, int) else self.heads[level]
    make = nn.remat(Transformer) if self.remat == 'blocks' else Transformer
    return make(heads, max(self.depth[level], 1), self.groups, self.dtype, name=name)(h, text, mask)

  @nn.nowrap
  def embed(self, noise, cond):
    emb = blocks.cosines_and_sines(noise, self.channels)
    emb = Dense(4 * self.channels, name='embed_in')(emb)
    emb = Dense(4 * self.channels, name='embed_out')(nn.swish(emb))
    if self.num_classes:
      rows = self.param('embed_label', nn.initializers.normal(1.0), (self.num_classes, 4 * self.channels))
      emb += blocks.one_hot_labels(cond, self.num_classes) @ rows
    if self.vector:
      vector = Dense(4 * self.channels, name='embed_vector_in')(cond['vector'])
      emb += Dense(4 * self.channels, name='embed_vector_out')(nn.swish(vector))
    return emb

  @nn.nowrap
  def halve(self, h, inputs, block, level):
    return halved(h, h.shape[-1], self.dtype, f'down_{level}_downsample'), inputs


def halved(x: Array, features: int, dtype: str, name: str) -> Array:
  """A convolution of stride 2 padded by one on both sides, unlike DDPM's: x [B, *S, C] -> [B, *S // 2, features].

  S must be even. To be called where submodules may be made.
  """
  # Conv pads behind alone: here it gives an output too many.
  space = x.shape[1:-1]
  x = jnp.pad(x, [(0, 0), *[(1, 1)] * len(space), (0, 0)])
  x = Conv(features, stride=2, dtype=dtype, name=name)(x)
  return x[(slice(None), *(slice(n // 2) for n in space))]


class Transformer(nn.Module):
  """`depth` blocks over all positions of x [B, *S, C], reading text [B, L, D] where mask [B, L] is True; added to x."""
  heads: int
  depth: int
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array, text: Array, mask: Array) -> Array:
    channels = x.shape[-1]
    h = GroupNorm(self.groups, name='norm')(x).reshape(len(x), math.prod(x.shape[1:-1]), channels)
    h = Dense(channels, dtype=self.dtype, name='in')(h)
    for i in range(self.depth):
      h = TextBlock(self.heads, self.dtype, name=f'block_{i}')(h, text, mask)
    return x + Dense(channels, init_scale=0.0, dtype=self.dtype, name='out')(h).reshape(x.shape)


class TextBlock(nn.Module):
  """Self-attention, attention to the text, and a gated dense layer, each after a norm and added to h [B, N, C]."""
  heads: int
  dtype: str

  @nn.compact
  def __call__(self, h: Array, text: Array, mask: Array) -> Array:
    norm = lambda name, h: nn.LayerNorm(1e-5, name=name)(h).astype(h.dtype)
    g = norm('norm_0', h)
    h += Attention(self.heads, self.dtype, name='self')(g, g)
    h += Attention(self.heads, self.dtype, name='cross')(norm('norm_1', h), text, mask)
    g, gate = jnp.split(Dense(8 * h.shape[-1], dtype=self.dtype, name='ff_in')(norm('norm_2', h)), 2, axis=-1)
    return h + Dense(h.shape[-1], dtype=self.dtype, name='ff_out')(g * nn.gelu(gate, approximate=False))


class Attention(nn.Module):
  """Of h [B, N, C] to what [B, L, D] holds where mask [B, L] is True: [B, N, C]; where it nowhere is, to nothing."""
  heads: int
  dtype: str

  @nn.compact
  def __call__(self, h: Array, what: Array, mask: Array | None = None) -> Array:
    channels = h.shape[-1]
    query, key, value = (
        _Product(channels, self.dtype, name=name)(a).reshape(*a.shape[:2], self.heads, channels // self.heads)
        for name, a in (('query', h), ('key', what), ('value', what)))
    seen = layers.attention(query, key, value, mask=None if mask is None else mask[:, None, None])
    if mask is not None:
      seen = jnp.where(mask.any(1)[:, None, None, None], seen, 0)
    return Dense(channels, dtype=self.dtype, name='out')(seen.reshape(h.shape))


class _Product(nn.Module):
  """A dense layer without a bias."""
  features: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel, bias = layers.kernel_of(self, layers.uniform_init(), (x.shape[-1], self.features)), jnp.zeros(self.features)
    if isinstance(kernel, layers.Integers):
      return layers.in_integers(x, kernel, bias, self.dtype)
    return layers.affine(products.dot, products.dot_kernel_grad, x, kernel, bias, self.dtype)
