"""EDM's non-leaky augmentation (Karras et al. 2022, appendix F.2, table 6), jax only: it runs inside the train step.

An image is flipped, scaled, turned, stretched and moved by eight random numbers; the network is told what was done
through nine labels (cond['augment']), which are zero for an image as it was. Sampling gives zeros, so that nothing of
the augmentation leaks into samples.

    label  what is done to the image                    parameter                drawn with probability
    0      flipped left to right                        a0 of {0, 1}             1
    1      flipped top to bottom                        a1 of {0, 1}             p
    2      made larger by 2^(0.2 a2)                    a2 ~ N(0, 1)             p
    3, 4   turned by a3: cos a3 - 1, sin a3             a3 ~ U(-pi, pi)          p
    5, 6   stretched by 2^(0.2 a5) along the direction  a4 ~ U(-pi, pi),         p
           a4, squeezed across: a5 cos a4, a5 sin a4    a5 ~ N(0, 1)
    7, 8   moved by a6 / 8 of the width, a7 / 8 of the  a6, a7 ~ N(0, 1)         p
           height

Pixels beyond the border are the image's mirror image. The image is resampled as in that pipeline and in Karras et al.
2020: doubled, read with linear interpolation at twice the final density, and halved, by two filters that undo each
other. Those here are the symmetric biorthogonal pair of Cohen, Daubechies & Feauveau (1992; the 9/7 of JPEG 2000) and
not the paper's nearly symmetric wavelet: moves by whole pixels and quarter turns are then exact, border included.
"""
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
SCALE, SHIFT = 0.2, 1 / 8  # of a2 and a5 in octaves, of a6 and a7 in widths
# Taps 0, 1, 2, ... of either side. Halving sums to 1, doubling to 2, one for each of its two phases.
HALVE = (0.6029490182363579, 0.2668641184428723, -0.07822326652898785, -0.01686411844287495, 0.02674875741080976)
DOUBLE = (1.115087052456994, 0.5912717631142470, -0.05754352622849957, -0.09127176311424948)


def augment(key: Array, x: Array, probability: float) -> tuple[Array, Array]:
  """Images x [B,H,W,C] in [-1, 1] -> (augmented images [B,H,W,C], labels [B,9]) by the table at the top of this file.

  Image i depends on (key, i) and on itself, not on B. Probability 0 returns the very bits of x and zeros; with any
  other one, half of the images are flipped left to right. What is resampled may pass beyond [-1, 1] by a little.
  Raises ValueError for images without two spatial axes and for a probability that is none.
  """
  if not 0 <= probability <= 1:
    raise ValueError(f'the probability of each augmentation must be from 0 to 1, got {probability}')
  if x.ndim != 4:
    raise ValueError(f'augmentation is of images with two spatial axes [B,H,W,C], got {x.shape}')
  labels = jax.vmap(lambda i: draw(jax.random.fold_in(key, i), probability))(jnp.arange(len(x)))
  return transform(x, labels), labels


def draw(key: Array, probability: float) -> Array:
  """The labels [9] of one image."""
  keys = jax.random.split(key, 4)
  x_flip, y_flip = jax.random.bernoulli(keys[0], shape=(2,)).astype(jnp.float32)
  size, stretch, right, down = jax.random.normal(keys[1], (4,))
  turn, along = jax.random.uniform(keys[2], (2,), minval=-np.pi, maxval=np.pi)
  labels = jnp.stack([x_flip, y_flip, size, jnp.cos(turn) - 1, jnp.sin(turn),
                      stretch * jnp.cos(along), stretch * jnp.sin(along), right, down])
  chosen = jax.random.uniform(keys[3], (6,)) < jnp.array([probability > 0] + [probability] * 5, jnp.float32)
  return jnp.where(chosen[np.array([0, 1, 2, 3, 3, 4, 4, 5, 5])], labels, 0)


def transform(x: Array, labels: Array) -> Array:
  """What the labels [B,9] say, done to the images x [B,H,W,C]; where they are zero, x as it is, bit for bit."""
  where = lambda chosen, a, b: jnp.where(chosen[:, None, None, None], a, b)
  x = where(labels[:, 0] > 0.5, x[:, :, ::-1], x)
  x = where(labels[:, 1] > 0.5, x[:, ::-1], x)
  moved = jax.vmap(_resampled)(x.astype(jnp.float32), *_sources(labels, *x.shape[1:3]))
  return where((labels[:, 2:] != 0).any(1), moved.astype(x.dtype), x)


def _sources(labels, height, width):
  """Where a pixel at p (right and down from the centre) comes from: matrix @ (p - shift), as [B,2,2] and [B,2]."""
  labels = labels.astype(jnp.float32)
  square = lambda a, b, c, d: jnp.stack([jnp.stack([a, b], -1), jnp.stack([c, d], -1)], -2)
  cos, sin = labels[:, 3] + 1, labels[:, 4]
  back = square(cos, -sin, sin, cos)  # anticlockwise on the screen, where y grows downwards, is undone
  amount, twice = jnp.hypot(labels[:, 5], labels[:, 6]), 2 * jnp.arctan2(labels[:, 6], labels[:, 5])
  squeeze = np.log(2) * SCALE * amount  # the stretch is symmetric, with the eigenvalues e^squeeze and e^-squeeze
  c, s = jnp.sinh(squeeze) * jnp.cos(twice), jnp.sinh(squeeze) * jnp.sin(twice)
  relax = square(jnp.cosh(squeeze) - c, -s, -s, jnp.cosh(squeeze) + c)
  smaller = 2 ** (-SCALE * labels[:, 2])
  matrix = smaller[:, None, None] * jnp.einsum('bij,bjk->bik', back, relax, precision='highest')
  return matrix, SHIFT * labels[:, 7:] * jnp.array([width, height], jnp.float32)


def _resampled(x, matrix, shift):
  """One image x [H,W,C], transformed. Positions count half pixels, as the doubled image does."""
  height, width, channels = x.shape
  doubled = _both_axes(_double(height), _double(width), x)
  rows, columns = 2 * height - 1, 2 * width - 1
  margin = len(HALVE) - 1
  right = jnp.arange(-margin, columns + margin) - (width - 1.0) - 2 * shift[0]
  down = jnp.arange(-margin, rows + margin)[:, None] - (height - 1.0) - 2 * shift[1]
  column = matrix[0, 0] * right + matrix[0, 1] * down + (width - 1)
  row = matrix[1, 0] * right + matrix[1, 1] * down + (height - 1)
  left, top = jnp.floor(column), jnp.floor(row)
  across, along = (column - left)[..., None], (row - top)[..., None]
  left, top, flat = left.astype(jnp.int32), top.astype(jnp.int32), doubled.reshape(-1, channels)
  at = lambda i, j: flat[_mirrored(i, rows) * columns + _mirrored(j, columns)]
  upper = (1 - across) * at(top, left) + across * at(top, left + 1)
  lower = (1 - across) * at(top + 1, left) + across * at(top + 1, left + 1)
  return _both_axes(_halve(height), _halve(width), (1 - along) * upper + along * lower)


def _both_axes(down, across, x):
  return jnp.einsum('ih,jw,hwc->ijc', jnp.asarray(down), jnp.asarray(across), x, precision='highest')


def _double(size):
  """[2 size - 1, size]: between two pixels there is one more, and what is beyond the border is mirrored."""
  inputs = np.arange(-1, size + 1)
  return _taps(DOUBLE, np.arange(2 * size - 1)[:, None] - 2 * inputs) @ np.eye(size)[_mirrored(inputs, size)]


def _halve(size):
  """[size, 2 size - 1 + 2 margin]: every second element of the filtered ones, given a margin on either side."""
  margin = len(HALVE) - 1
  return _taps(HALVE, 2 * np.arange(size)[:, None] - np.arange(-margin, 2 * size - 1 + margin))


def _taps(taps, distance):
  return np.array([*taps, 0.0])[np.minimum(abs(distance), len(taps))]


def _mirrored(i, size):
  """Indices of any size brought to 0 .. size - 1 by reflection at the first and the last element."""
  return size - 1 - abs(i % max(2 * size - 2, 1) - (size - 1))
