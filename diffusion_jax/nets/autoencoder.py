"""The autoencoder with a KL term of latent diffusion (Rombach et al. 2022), as Stable Diffusion uses it."""
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.nets.blocks import SelfAttention, upsample
from diffusion_jax.nets.layers import Conv, GroupNorm

Array = jax.Array


class Gaussian(NamedTuple):
  """Independent normal variables of `mean` and log variance `logvar`, [B, *S, C] each."""
  mean: Array
  logvar: Array

  def sample(self, eps: Array) -> Array:
    """The draw that belongs to the standard normal draw eps [B, *S, C]."""
    return self.mean + jnp.exp(self.logvar / 2) * eps

  def kl(self) -> Array:
    """KL divergence from the standard normal in nats, [B]."""
    terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1 - self.logvar
    return terms.sum(range(1, terms.ndim)) / 2


class AutoencoderKL(nn.Module):
  """x [B, *S, C] in [-1, 1] <-> latents [B, *S / 2^(levels - 1), latent].

  channels: widths of the levels, each at half the size of the one before; blocks: residual blocks per level of the
  encoder, the decoder has one more; groups: of the normalisations; scaling, shift: latents of a diffusion model are
  (z - shift) * scaling, each one number or one per channel; quant, post_quant: whether a pointwise layer comes after
  the encoder and before the decoder; dtype: of the products. The defaults are those of Stable Diffusion 1.
  """
  channels: Sequence[int] = (128, 256, 512, 512)
  blocks: int = 2
  latent: int = 4
  outputs: int = 3
  groups: int = 32
  scaling: float | Sequence[float] = 0.18215
  shift: float | Sequence[float] = 0.0
  quant: bool = True
  post_quant: bool = True
  dtype: str = 'float32'

  def __post_init__(self):
    if not self.channels or self.groups < 1 or any(c % self.groups for c in self.channels):
      raise ValueError(f'groups must divide every width: widths {tuple(self.channels)}, groups {self.groups}')
    super().__post_init__()

  def setup(self):
    parts = tuple(self.channels), self.blocks, self.groups, self.dtype
    self.encoder = Encoder(2 * self.latent, *parts)
    self.decoder = Decoder(self.outputs, *parts)
    if self.quant:
      self.quantise = Conv(2 * self.latent, size=1, dtype=self.dtype)
    if self.post_quant:
      self.dequantise = Conv(self.latent, size=1, dtype=self.dtype)

  def __call__(self, x: Array) -> Array:
    """Through the mean of the latents and back."""
    return self.decode(self.encode(x).mean)

  def encode(self, x: Array) -> Gaussian:
    """The distribution of the latents of images, not scaled. ValueError if a size is no multiple of the factor."""
    factor = 2 ** (len(self.channels) - 1)
    if any(n % factor for n in x.shape[1:-1]):
      raise ValueError(f'{len(self.channels)} levels need sizes divisible by {factor}, got {x.shape[1:-1]}')
    h = self.encoder(x)
    mean, logvar = jnp.split((self.quantise(h) if self.quant else h).astype(jnp.float32), 2, axis=-1)
    return Gaussian(mean, jnp.clip(logvar, -30.0, 20.0))

  def decode(self, z: Array) -> Array:
    """Images of latents that are not scaled; they may lie outside [-1, 1]."""
    return self.decoder(self.dequantise(z) if self.post_quant else z).astype(jnp.float32)

  def scale(self, z: Array) -> Array:
    """Latents as a diffusion model takes them, of about unit variance."""
    return (z - jnp.asarray(self.shift)) * jnp.asarray(self.scaling)

  def unscale(self, x: Array) -> Array:
    """The inverse of `scale`."""
    return x / jnp.asarray(self.scaling) + jnp.asarray(self.shift)


class Encoder(nn.Module):
  """x [B, *S, C] -> h [B, *S / 2^(levels - 1), outputs]."""
  outputs: int
  channels: tuple[int, ...]
  blocks: int
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    h = Conv(self.channels[0], dtype=self.dtype, name='conv_in')(x)
    for level, width in enumerate(self.channels):
      for i in range(self.blocks):
        h = Block(width, self.groups, self.dtype, name=f'down_{level}_block_{i}')(h)
      if level < len(self.channels) - 1:
        h = Conv(width, stride=2, dtype=self.dtype, name=f'down_{level}_downsample')(h)
    return _finish(self, _middle(self, h))


class Decoder(nn.Module):
  """h [B, *S, latent] -> x [B, *S * 2^(levels - 1), outputs]. Levels have the encoder's numbers."""
  outputs: int
  channels: tuple[int, ...]
  blocks: int
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, h: Array) -> Array:
    h = _middle(self, Conv(self.channels[-1], dtype=self.dtype, name='conv_in')(h))
    for level, width in reversed(list(enumerate(self.channels))):
      for i in range(self.blocks + 1):
        h = Block(width, self.groups, self.dtype, name=f'up_{level}_block_{i}')(h)
      if level:
        h = Conv(width, dtype=self.dtype, name=f'up_{level}_upsample')(upsample(h))
    return _finish(self, h)


def _middle(part: Encoder | Decoder, h: Array) -> Array:
  """Two blocks at the smallest size, with attention between them."""
  block = lambda i: Block(part.channels[-1], part.groups, part.dtype, name=f'middle_block_{i}')
  h = SelfAttention(groups=part.groups, dtype=part.dtype, name='middle_attention')(block(0)(h))
  return block(1)(h)


def _finish(part: Encoder | Decoder, h: Array) -> Array:
  h = nn.swish(GroupNorm(part.groups, name='norm_out')(h))
  return Conv(part.outputs, dtype=part.dtype, name='conv_out')(h)


class Block(nn.Module):
  """Twice norm, swish, convolution; plus the input."""
  features: int
  groups: int
  dtype: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    h = x
    for i in range(2):
      h = nn.swish(GroupNorm(self.groups, name=f'norm_{i}')(h))
      h = Conv(self.features, dtype=self.dtype, name=f'conv_{i}')(h)
    if x.shape[-1] != self.features:
      x = Conv(self.features, size=1, dtype=self.dtype, name='shortcut')(x)
    return x + h
