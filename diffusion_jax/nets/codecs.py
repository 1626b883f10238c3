"""Between stored images and what a diffusion model sees: pixels, or the latents of an autoencoder.

A codec is given its parameters, {} where it has none: `encode(params, image, key) -> x0` of floats in [-1, 1], and
`decode(params, x) -> uint8`. `latent(shape)` is the shape of x for images of `shape` (*S, C), and `init(key, shape)`
makes the parameters.
"""
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.nets.autoencoder import AutoencoderKL

Array = jax.Array
Params = Mapping[str, Any]


def floats(image: Array) -> Array:
  """uint8 [B, *S, C] -> float32 in [-1, 1]."""
  return image.astype(jnp.float32) / 127.5 - 1


def integers(x: Array) -> Array:
  """Rounds to the nearest of the 256 values, clipping what lies outside [-1, 1]."""
  return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Pixels:
  """The identity."""

  def latent(self, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape)

  def init(self, key: Array, shape: Sequence[int]) -> dict[str, Any]:
    return {}

  def encode(self, params: Params, image: Array, key: Array) -> Array:
    return image

  def decode(self, params: Params, x: Array) -> Array:
    return integers(x)


@dataclasses.dataclass(frozen=True)
class KL:
  """The latents of an autoencoder, drawn by their distribution (Rombach et al. 2022), and scaled as it says.

  weights: the folder that its parameters are read from when training begins.
  """
  net: AutoencoderKL
  weights: str = ''

  def latent(self, shape: Sequence[int]) -> tuple[int, ...]:
    """ValueError if images of this shape cannot be encoded."""
    moments = jax.eval_shape(lambda key: self.net.init_with_output(key, jnp.zeros((1, *shape)), method='encode')[0],
                             jax.random.key(0))
    return moments.mean.shape[1:]

  def init(self, key: Array, shape: Sequence[int]) -> dict[str, Any]:
    return self.net.init(key, jnp.zeros((1, *shape)))['params']

  def encode(self, params: Params, image: Array, key: Array) -> Array:
    found = self.net.apply({'params': params}, image, method='encode')
    return self.net.scale(found.sample(jax.random.normal(key, found.mean.shape)))

  def decode(self, params: Params, x: Array) -> Array:
    return integers(self.net.apply({'params': params}, self.net.unscale(x), method='decode'))


def pixels() -> Pixels:
  """The net sees images as they are."""
  return Pixels()


def kl(weights: str = '', channels: Sequence[int] = (128, 256, 512, 512), blocks: int = 2, latent: int = 4,
       outputs: int = 3, groups: int = 32, scaling: float | Sequence[float] = 0.18215,
       shift: float | Sequence[float] = 0.0, quant: bool = True, post_quant: bool = True,
       dtype: str = 'float32') -> KL:
  """The net sees latents. weights: a folder of diffusers' AutoencoderKL; the rest as in `AutoencoderKL`."""
  return KL(AutoencoderKL(channels, blocks, latent, outputs, groups, scaling, shift, quant, post_quant, dtype), weights)
