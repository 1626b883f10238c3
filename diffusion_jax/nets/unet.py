"""The U-Net of DDPM (Ho et al. 2020, appendix B) for one, two or three spatial axes."""
import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.nets.layers import Conv, Dense, GroupNorm, timestep_embedding

Array = jax.Array


class UNet(nn.Module):
  """x [B, *S, C], noise [B], cond -> F [B, *S, C]. Zero at initialisation.

  channels: width of the first level; multipliers: widths of the levels relative to it, each at half the size of the
  one before; blocks: residual blocks per level; attention: the sizes (of the longest axis) at which self-attention
  follows each block; dropout in [0, 1); groups: of the normalisations, must divide every width; num_classes: 0, or the
  number of labels in cond['label'] [B], of which those with cond['drop'] [B] true are replaced by the null class;
  dtype: of the products, 'float32' or 'bfloat16' (parameters, their gradients and norms stay float32); variance:
  whether as many channels of a variance output follow those of F, [B, *S, 2 C].
  """
  channels: int = 128
  multipliers: Sequence[int] = (1, 2, 2, 2)
  blocks: int = 2
  attention: Sequence[int] = (16,)
  dropout: float = 0.1
  groups: int = 32
  num_classes: int = 0
  dtype: str = 'float32'
  variance: bool = False

  def __post_init__(self):
    checks = [
        (self.channels >= 4 and self.blocks >= 1 and len(self.multipliers) >= 1,
         f'channels, blocks and multipliers must be at least 4, 1 and one level, '
         f'got {self.channels}, {self.blocks} and {tuple(self.multipliers)}'),
        (all(m >= 1 and self.channels * m % max(self.groups, 1) == 0 for m in self.multipliers) and self.groups >= 1,
         f'groups must divide the width of every level: widths '
         f'{[self.channels * m for m in self.multipliers]}, groups {self.groups}'),
        (0 <= self.dropout < 1, f'dropout must lie in [0, 1), got {self.dropout}'),
        (self.num_classes >= 0, f'num_classes must be at least 0, got {self.num_classes}'),
        (self.dtype in ('float32', 'bfloat16'), f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}"),
    ]
    for ok, message in checks:
      if not ok:
        raise ValueError(message)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, noise: Array, cond: Mapping[str, Array], train: bool = False) -> Array:
    factor = 2 ** (len(self.multipliers) - 1)
    if any(n % factor for n in x.shape[1:-1]):
      raise ValueError(f'{len(self.multipliers)} levels need sizes divisible by {factor}, got {x.shape[1:-1]}')
    emb = timestep_embedding(noise, self.channels)
    emb = Dense(4 * self.channels, name='embed_in')(emb)
    emb = Dense(4 * self.channels, name='embed_out')(nn.swish(emb))
    if self.num_classes:
      label = cond['label']
      label = jnp.where(cond['drop'], self.num_classes, label) if 'drop' in cond else label
      emb += nn.Embed(self.num_classes + 1, 4 * self.channels, name='embed_label')(label)
    emb = nn.swish(emb)

    def block(h, width, name):
      return ResBlock(width, self.dropout, self.groups, self.dtype, name=name)(h, emb, train)

    def attend(h, name):
      return SelfAttention(self.groups, self.dtype, name=name)(h)

    h = Conv(self.channels, dtype=self.dtype, name='conv_in')(x)
    skips = [h]
    for level, multiplier in enumerate(self.multipliers):
      for i in range(self.blocks):
        h = block(h, multiplier * self.channels, f'down_{level}_block_{i}')
        if max(h.shape[1:-1]) in self.attention:
          h = attend(h, f'down_{level}_attention_{i}')
        skips.append(h)
      if level < len(self.multipliers) - 1:
        h = Conv(h.shape[-1], stride=2, dtype=self.dtype, name=f'down_{level}_downsample')(h)
        skips.append(h)

    h = block(h, h.shape[-1], 'middle_block_0')
    h = attend(h, 'middle_attention')
    h = block(h, h.shape[-1], 'middle_block_1')

    for level, multiplier in reversed(list(enumerate(self.multipliers))):
      for i in range(self.blocks + 1):
        h = block(jnp.concatenate([h, skips.pop()], axis=-1), multiplier * self.channels, f'up_{level}_block_{i}')
        if max(h.shape[1:-1]) in self.attention:
          h = attend(h, f'up_{level}_attention_{i}')
      if level:
        h = Conv(h.shape[-1], dtype=self.dtype, name=f'up_{level}_upsample')(upsample(h))

    h = nn.swish(GroupNorm(self.groups, name='norm_out')(h))
    return Conv(x.shape[-1] * (1 + self.variance), init_scale=0.0, dtype=self.dtype, name='conv_out')(h).astype(x.dtype)


class ResBlock(nn.Module):
  """norm, swish, conv; plus the embedding; norm, swish, dropout, conv; plus the input."""
  features: int
  dropout: float
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array, emb: Array, train: bool) -> Array:
    h = nn.swish(GroupNorm(self.groups, name='norm_0')(x))
    h = Conv(self.features, dtype=self.dtype, name='conv_0')(h)
    shift = Dense(self.features, name='embed')(emb).astype(h.dtype)
    h += shift.reshape((len(x),) + (1,) * (x.ndim - 2) + (self.features,))
    h = nn.swish(GroupNorm(self.groups, name='norm_1')(h))
    h = nn.Dropout(self.dropout, deterministic=not train)(h)
    h = Conv(self.features, init_scale=0.0, dtype=self.dtype, name='conv_1')(h)
    if x.shape[-1] != self.features:
      x = Conv(self.features, size=1, dtype=self.dtype, name='shortcut')(x)
    return x + h


class SelfAttention(nn.Module):
  """One head over all positions, scaled by C^-1/2, added to the input."""
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    channels = x.shape[-1]
    h = GroupNorm(self.groups, name='norm')(x)
    query, key, value = (
        Dense(channels, dtype=self.dtype, name=name)(h).reshape(len(x), math.prod(x.shape[1:-1]), 1, channels)
        for name in ('query', 'key', 'value'))
    h = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
    return x + Dense(channels, init_scale=0.0, dtype=self.dtype, name='out')(h)


def upsample(x: Array) -> Array:
  """Doubles every spatial axis of x [B, *S, C], repeating each element."""
  for axis in range(1, x.ndim - 1):
    x = jnp.repeat(x, 2, axis=axis)
  return x
