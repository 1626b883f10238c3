"""What U-Nets are made of: residual blocks, attention, embeddings of labels, and what conditioning brings in."""
import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.nets.layers import Conv, Dense, GroupNorm, attention
from diffusion_jax.nets.resample import BOX, blur, down, up

Array = jax.Array


class ResBlock(nn.Module):
  """norm, swish, conv; plus the embedding; norm, swish, dropout, conv; plus the input: [B, *S, C] -> [B, *S', features]

  resample: '' or 'down' or 'up', which resamples by `taps` what the first convolution and the shortcut see;
  scale_shift: the embedding scales and shifts the second norm's output instead of being added before it;
  skip_scale: of the sum; project: whether a shortcut that resamples has weights even where the width stays;
  init_scale: of the first convolution, the shortcut and the embedding.
  """
  features: int
  dropout: float
  groups: int
  dtype: str
  resample: str = ''
  taps: Sequence[float] = BOX
  scale_shift: bool = False
  skip_scale: float = 1.0
  project: bool = False
  init_scale: float = 1.0
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Array, emb: Array, train: bool) -> Array:
    sized = {'': lambda a, taps: a, 'down': down, 'up': up}[self.resample]
    h = sized(nn.swish(GroupNorm(self.groups, self.epsilon, name='norm_0')(x)), self.taps)
    h = Conv(self.features, init_scale=self.init_scale, dtype=self.dtype, name='conv_0')(h)
    shift = Dense(self.features * (1 + self.scale_shift), init_scale=self.init_scale, name='embed')(emb).astype(h.dtype)
    shift = shift.reshape((len(x),) + (1,) * (x.ndim - 2) + shift.shape[-1:])
    norm = GroupNorm(self.groups, self.epsilon, name='norm_1')
    if self.scale_shift:
      scale, shift = jnp.split(shift, 2, axis=-1)
      h = norm(h) * (1 + scale) + shift
    else:
      h += shift
      h = norm(h)
    h = nn.Dropout(self.dropout, deterministic=not train)(nn.swish(h))
    h = Conv(self.features, init_scale=0.0, dtype=self.dtype, name='conv_1')(h)
    x = sized(x, self.taps)
    if x.shape[-1] != self.features or (self.project and self.resample):
      x = Conv(self.features, size=1, init_scale=self.init_scale, dtype=self.dtype, name='shortcut')(x)
    return _scaled(x + h, self.skip_scale)


class SelfAttention(nn.Module):
  """Attention over all positions, each head scaled by its width^-1/2, added to the input.

  head_channels: the width of a head, which must divide the channels; 0: one head.
  """
  groups: int
  dtype: str
  head_channels: int = 0
  skip_scale: float = 1.0
  init_scale: float = 1.0
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    channels = x.shape[-1]
    width = self.head_channels or channels
    if channels % width:
      raise ValueError(f'head_channels must divide the channels: {channels} channels, head_channels {width}')
    h = GroupNorm(self.groups, self.epsilon, name='norm')(x)
    query, key, value = (
        Dense(channels, init_scale=self.init_scale, dtype=self.dtype, name=name)(h).reshape(
            len(x), math.prod(x.shape[1:-1]), channels // width, width)
        for name in ('query', 'key', 'value'))
    h = attention(query, key, value).reshape(x.shape)
    return _scaled(x + Dense(channels, init_scale=0.0, dtype=self.dtype, name='out')(h), self.skip_scale)


class FilteredConv(nn.Module):
  """`resample.down` of a convolution of size 3: x [B, *S, C] -> [B, *S // 2, features], zero outside as deep as needed.

  Computed the other way round, the filter on the few channels of x and then a convolution of stride 2.
  """
  features: int
  taps: Sequence[float]
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Array) -> Array:
    # The filtered signal reaches one element beyond either end; a second one behind keeps the size even, so that Conv
    # pads behind alone, and gives it an output too many.
    reach = len(self.taps) // 2
    h = blur(x, self.taps, reach, reach + 1)
    h = Conv(self.features, stride=2, dtype=self.dtype, name='conv')(h)
    return h[(slice(None), *(slice(n // 2) for n in x.shape[1:-1]))]


def _scaled(x: Array, scale: float) -> Array:
  return x if scale == 1 else x * jnp.asarray(scale, x.dtype)


def upsample(x: Array) -> Array:
  """Doubles every spatial axis of x [B, *S, C], repeating each element."""
  for axis in range(1, x.ndim - 1):
    x = jnp.repeat(x, 2, axis=axis)
  return x


# Embeddings


def cosines_and_sines(noise: Array, dim: int) -> Array:
  """Of noise [B] at dim // 2 frequencies, as ADM orders them, from 1 to just above 1 / 10,000: [B, dim]."""
  half = dim // 2
  angles = noise.astype(jnp.float32)[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
  return jnp.pad(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1), ((0, 0), (0, dim % 2)))


def fourier_frequencies(count: int) -> Array:
  """Like `count` draws from a standard normal, without any randomness: its quantiles."""
  return jax.scipy.special.ndtri((jnp.arange(count) + 0.5) / count)


def fourier_embedding(noise: Array, dim: int, scale: float = 16.0) -> Array:
  """Cosines, then sines, of 2 pi noise [B] at dim // 2 frequencies of spread `scale` (Song et al. 2021): [B, dim]."""
  angles = 2 * jnp.pi * scale * noise.astype(jnp.float32)[:, None] * fourier_frequencies(dim // 2)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=1)


def one_hot_labels(cond: Mapping[str, Array], num_classes: int) -> Array:
  """cond['label'] [B] as rows of a unit matrix [B, num_classes]; of the null class, and where cond['drop'], zeros."""
  label = cond['label']
  label = jnp.where(cond['drop'], num_classes, label) if 'drop' in cond else label
  return jax.nn.one_hot(label, num_classes)


# What else conditioning brings


def with_image(x: Array, cond: Mapping[str, Array], channels: int) -> Array:
  """x [B, *S, C] with cond['image'] [B, *S, channels] behind it; x alone for channels = 0."""
  if not channels:
    return x
  image = cond.get('image')
  if image is None or image.shape[1:] != (*x.shape[1:-1], channels):
    raise ValueError(f"cond['image'] must be {[*x.shape[:-1], channels]} for an input of {list(x.shape)}, got "
                     f'{"none" if image is None else list(image.shape)}')
  return jnp.concatenate([x, image.astype(x.dtype)], axis=-1)


def add_control(skips: Sequence[Array], middle: Array, cond: Mapping[str, Array],
                outer: bool = False) -> tuple[list[Array], Array]:
  """Adds cond['control'], if it is there: residuals of every skip, in the encoder's order, and of the middle.

  This is where a ControlNet enters (Zhang et al. 2023, section 3.2); each example has residuals of its own. outer:
  `skips` are only the outermost, and `middle` is what lies behind them: it stays as it is.
  """
  control = cond.get('control')
  if control is None:
    return list(skips), middle
  if outer:
    return [a + c.astype(a.dtype) for a, c in zip(skips, control, strict=False)], middle
  places = [*skips, middle]
  if [c.shape for c in control] != [a.shape for a in places]:
    raise ValueError(f"cond['control'] must be residuals of the shapes {[a.shape for a in places]}, "
                     f'got {[c.shape for c in control]}')
  *skips, middle = (a + c.astype(a.dtype) for a, c in zip(places, control, strict=True))
  return skips, middle


def check_depth(depth: int, num_skips: int) -> None:
  """ValueError unless a network of so many skip connections can be cut behind its outermost `depth`; 0: not cut."""
  if not 0 <= depth <= num_skips:
    raise ValueError(f'the depth must lie in 1 to {num_skips}, the skip connections of this network, got {depth}')
