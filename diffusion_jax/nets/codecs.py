"""Between stored images and what a diffusion model sees."""
import jax
import jax.numpy as jnp

Array = jax.Array


class Pixels:
  """The identity codec: uint8 [B, *S, C] <-> float32 in [-1, 1]."""

  def encode(self, image: Array) -> Array:
    """0 .. 255 -> -1 .. 1."""
    return image.astype(jnp.float32) / 127.5 - 1

  def decode(self, x: Array) -> Array:
    """Rounds to the nearest of the 256 values, clipping what lies outside [-1, 1]."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)
