"""What of an image a network is given as cond['image'] [B, *S, c], so that it draws the rest: spec(givens.masked).

In training it is made of the data, given(key, x0); for sampling, of a user's own pictures, given.of(picture, ...).
Images are [B, *S, C] with values in [-1, 1] and one to three spatial axes. Image i of a batch depends on (key, i).
"""
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from diffusion_jax.core.types import Array, expand, require

__all__ = ['edges', 'grey', 'low_resolution', 'masked', 'none']
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


@dataclass(frozen=True)
class Given:
  """A task: what is known of an image, as channels beside the noisy one.

  channels  how many there are for images of C channels, which the net's `image` must be
  make      (key, x0 [B, *S, C]) -> [B, *S, channels(C)]; also called as given(key, x0)
  of        the same of pictures, those that `takes` names
  """
  channels: Callable[[int], int]
  make: Callable[[Array, Array], Array]
  of: Callable[..., Array]
  takes: tuple[str, ...]

  def __call__(self, key: Array, x0: Array) -> Array:
    return self.make(key, x0)


def none() -> Given:
  """Nothing is given: zero channels."""
  nothing = lambda x0: x0[..., :0]
  return Given(lambda c: 0, lambda key, x0: nothing(x0), nothing, ())


def low_resolution(factor: int = 4, noise: float = 0.0) -> Given:
  """Super-resolution: the image averaged over boxes of `factor` in every axis and interpolated linearly to its size.

  Conditioning by concatenation, as in SR3 (Saharia et al. 2021; there bicubic) and the upsamplers of Dhariwal & Nichol
  2021. With noise > 0, normal noise of a standard deviation drawn from U(0, noise) is added to the small image, and the
  deviation is given as one more channel (conditioning augmentation, Ho et al. 2021): the second model of a cascade then
  does not take what the first one drew for flawless.

  of(low [B, *S / factor, C], std=0.0, key=None): the picture that is to be enlarged; std is what the model is told, and
  noise of that deviation is added if there is a key.
  """
  require(factor >= 2, f'factor must be at least 2, got {factor}')
  require(noise >= 0, f'noise must be at least 0, got {noise}')

  def enlarge(low, std):
    size = tuple(factor * n for n in low.shape[1:-1])
    high = jax.image.resize(low, (len(low), *size, low.shape[-1]), 'linear')
    return jnp.concatenate([high, jnp.broadcast_to(expand(std, high), high[..., :1].shape)], -1) if noise else high

  def make(key, x0):
    low = _box(x0, factor)
    if not noise:
      return enlarge(low, None)
    keys = jax.vmap(jax.random.split)(_keys(key, len(x0)))
    std = noise * jax.vmap(jax.random.uniform)(keys[:, 0])
    return enlarge(_noisy(keys[:, 1], low, std), std)

  def of(low, std=0.0, key=None):
    require(0 <= std <= noise, f'the noise added to a small image must be from 0 to {noise}, as in training, got {std}')
    std = jnp.full(len(low), std, low.dtype)
    return enlarge(low if key is None else _noisy(_keys(key, len(low)), low, std), std)

  return Given(lambda c: c + (noise > 0), make, of, ('low',))


def masked(least: float = 0.1, most: float = 0.5) -> Given:
  """Inpainting: a channel that is 1 where the image is known and 0 elsewhere, then the image with the rest zeroed.

  In training the unknown part is a random box: its share of the image is drawn from U(least, most), its shape from all
  boxes of that share, its place from all where it fits. Sides are rounded to whole pixels.

  of(image [B, *S, C], mask [B, *S] or [B, *S, 1]): known where the mask is above 1/2.
  """
  require(0 <= least <= most <= 1, f'shares must be 0 <= least <= most <= 1, got least {least} and most {most}')

  def of(image, mask):
    mask = mask[..., None] if mask.ndim < image.ndim else mask
    require(mask.shape == (*image.shape[:-1], 1),
            f'a mask must have the sizes of its image, {image.shape[:-1]}, got {mask.shape[:-1]}')
    known = mask > 0.5
    return jnp.concatenate([known.astype(image.dtype), jnp.where(known, image, 0)], -1)

  def known(key, size):
    share_key, shape_key, place_key = jax.random.split(key, 3)
    share = jax.random.uniform(share_key, minval=least, maxval=most)
    # Sides share^w with weights w that sum to 1, uniform on the simplex: their product is the share.
    weights = jax.random.exponential(shape_key, (len(size),))
    weights /= weights.sum()
    inside = True
    for axis, (n, place) in enumerate(zip(size, jax.random.uniform(place_key, (len(size),)), strict=True)):
      side = jnp.round(n * share ** weights[axis])
      position = jnp.arange(n) - jnp.minimum(jnp.floor(place * (n - side + 1)), n - side)
      inside &= ((position >= 0) & (position < side)).reshape((n,) + (1,) * (len(size) - 1 - axis))
    return ~inside

  make = lambda key, x0: of(x0, jax.vmap(lambda k: known(k, x0.shape[1:-1]))(_keys(key, len(x0))))
  return Given(lambda c: c + 1, make, of, ('image', 'mask'))


def grey() -> Given:
  """Colourisation: the luma of an RGB image. of(image [B, *S, 3], or [B, *S, 1] that is grey already)."""
  return Given(lambda c: 1, lambda key, x0: _luma(x0), _luma, ('image',))


def edges() -> Given:
  """How steep the luma is, by Sobel's filter on any number of axes: -1 where it is flat, 1 where black meets white.

  One channel, what a ControlNet is often steered by (Zhang et al. 2023 take Canny's edges, which keep the steepest
  alone). of(image [B, *S, 3 or 1]): a picture whose edges are found.
  """
  def slope(x, along):
    for axis in range(1, x.ndim - 1):
      before, after = (jnp.take(x, jnp.clip(jnp.arange(n := x.shape[axis]) + i, 0, n - 1), axis) for i in (-1, 1))
      x = (after - before) / 2 if axis == along else (before + 2 * x + after) / 4
    return x

  def of(image):
    x = _luma(image)
    return 2 * jnp.minimum(jnp.sqrt(sum(slope(x, axis) ** 2 for axis in range(1, x.ndim - 1))), 1) - 1

  return Given(lambda c: 1, lambda key, x0: of(x0), of, ('image',))


def _keys(key, count):
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


def _luma(image):
  require(image.shape[-1] in (1, 3), f'luma is of 3 channels, or of 1 that has it already, got {image.shape[-1]}')
  return image if image.shape[-1] == 1 else jnp.sum(image * jnp.array(LUMA, image.dtype), -1, keepdims=True)


def _noisy(keys, x, std):
  """x [B, *S, C] with noise of the deviations std [B], each from its own key."""
  noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
  return x + expand(std, x) * noise


def _box(x, factor):
  """Means over boxes of `factor` in every spatial axis."""
  require(all(n % factor == 0 for n in x.shape[1:-1]),
          f'images of the sizes {x.shape[1:-1]} have no whole boxes of {factor}: give a factor that divides them')
  for axis in range(1, x.ndim - 1):
    x = x.reshape(*x.shape[:axis], -1, factor, *x.shape[axis + 1:]).mean(axis + 1)
  return x
