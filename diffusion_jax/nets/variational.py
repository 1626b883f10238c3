"""The U-Nets of two papers about likelihood: improved DDPM (Nichol & Dhariwal 2021) and VDM (Kingma et al. 2021)."""
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.nets.text_unet import halved
from diffusion_jax.nets.unet import ADM, UNet

Array = jax.Array


class IDDPM(ADM):
  """Improved DDPM's (appendix A): ADM with convolutions that change the size, as DDPM's, and `heads` in all attention.

  `heads` takes the place of head_channels, which is not used; it must divide every width with attention.
  """
  channels: int = 128
  attention: Sequence[int] = (16, 8)
  dropout: float = 0.0
  heads: int = 4

  @nn.nowrap
  def attention_options(self, channels):
    if channels % self.heads:
      raise ValueError(f'heads must divide every width with attention: width {channels}, heads {self.heads}')
    return {**super().attention_options(channels), 'head_channels': channels // self.heads}

  @nn.nowrap
  def halve(self, h, inputs, block, level):
    return halved(h, h.shape[-1], self.dtype, f'down_{level}_downsample'), inputs

  double = UNet.double


class VDM(UNet):
  """VDM's (appendix B): one level of many blocks, attention in the middle alone, and x beside its Fourier features.

  frequencies: the n of sin and cos of 2^n 2 pi x, which show what of x is finer than one of 256 values. F is x plus
  what the layers give: x itself at initialisation. There can be no variance output.
  """
  multipliers: Sequence[int] = (1,)
  blocks: int = 32
  attention: Sequence[int] = ()
  frequencies: Sequence[int] = (6, 7)

  @nn.nowrap
  def shown(self, x, cond):
    angles = jnp.concatenate([2.0 ** n * 2 * math.pi * x for n in self.frequencies], axis=-1)
    return jnp.concatenate([super().shown(x, cond), jnp.sin(angles), jnp.cos(angles)], axis=-1)

  def __call__(self, x, noise, cond, train=False, hint=None):
    if self.variance:
      raise ValueError('VDM has no variance output: leave variance false')
    out = super().__call__(x, noise, cond, train, hint)
    return x + out if hint is None else out
