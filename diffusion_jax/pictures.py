"""Images as pictures and files: grids, PNGs, arrays, and how a sample came about."""
import io
import math
import pathlib

import numpy as np
from PIL import Image

from diffusion_jax.model import Model
from diffusion_jax.runtime import log
from diffusion_jax.runtime.config import UserError, explain

STRIP_IMAGES, STRIP_LEVELS, GIF_FRAMES = 8, 12, 60
LINE = 96  # the grey between two images


def tile(images: np.ndarray, columns: int) -> np.ndarray:
  """Images uint8 [n, H, W, C] as one picture, row by row, a line apart; small ones are enlarged by a whole factor."""
  n, height, width, channels = images.shape
  scale, rows = max(1, 32 // max(height, width)), math.ceil(n / columns)
  picture = np.full((rows, height + 1, columns, width + 1, channels), LINE, np.uint8)
  for i, image in enumerate(images):
    picture[i // columns, :height, i % columns, :width] = image
  picture = picture.reshape(rows * (height + 1), columns * (width + 1), channels)
  return picture[:-1, :-1].repeat(scale, 0).repeat(scale, 1)


def columns_of(model: Model, count: int) -> int:
  """How many columns a grid has: one per class if that is legible."""
  return model.num_classes if 2 <= model.num_classes <= 16 else max(1, round(math.sqrt(count)))


def png(image: np.ndarray) -> bytes:
  """An image uint8 [H, W, C] as a PNG file; UserError if it has other axes or channels."""
  if image.ndim != 3 or image.shape[-1] not in (1, 3):
    raise UserError(f'an image of shape {image.shape} cannot be a PNG: write arrays with --out=FILE.npz')
  buffer = io.BytesIO()
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, 'PNG')
  return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
  """Arrays as a compressed .npz file."""
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **arrays)
  return buffer.getvalue()


def write_trajectory(folder: pathlib.Path, x: np.ndarray, x0: np.ndarray) -> None:
  """strip.png and trajectory.gif of x and, below it, of the x0 estimate, both uint8 [N, n, H, W, C], noise first."""
  x, x0 = x[:, :STRIP_IMAGES], x0[:, :STRIP_IMAGES]
  chosen = np.unique(np.linspace(0, len(x) - 1, STRIP_LEVELS).round().astype(int))
  rows = np.stack([x[chosen], x0[chosen]]).transpose(2, 0, 1, 3, 4, 5)  # image, x or x0, level
  log.write(folder / 'strip.png', png(tile(rows.reshape(-1, *x.shape[2:]), len(chosen))))
  chosen = np.unique(np.linspace(0, len(x) - 1, GIF_FRAMES).round().astype(int))
  frames = [Image.fromarray(tile(np.concatenate([x[i], x0[i]]), x.shape[1]).squeeze()) for i in chosen]
  buffer = io.BytesIO()
  durations = [80] * (len(frames) - 1) + [2000]
  frames[0].save(buffer, 'GIF', save_all=True, append_images=frames[1:], duration=durations, loop=0)
  log.write(folder / 'trajectory.gif', buffer.getvalue())


def given_picture(model: Model, image: str | None, mask: str | None) -> np.ndarray | None:
  """What the model is given of a picture in a file, [1, *S, c]; None for a model that is given none.

  Raises UserError if the files are not those that config.given takes, or cannot be read, or have other sizes.
  """
  files = {'--image': image, '--mask': mask}
  wanted = {'--mask' if name == 'mask' else '--image' for name in (model.given.takes if model.given else ())}
  for flag, file in files.items():
    if bool(file) != (flag in wanted):
      raise UserError(f'{flag} is ' + ('needed: this model draws the rest of a picture' if flag in wanted else
                                       f'for a model that is given it, and config.given of this one is '
                                       f'{model.config.given.fn.partition(":")[2]}'))
  if not model.given:
    return None
  pictures = {'mask' if flag == '--mask' else 'image': _read(flag, file, flag == '--mask' or model.image_shape[-1] == 1)
              for flag, file in files.items() if file}
  with explain('--image'):
    found = model.given.of(2 * pictures['image'] - 1, *([pictures['mask']] if 'mask' in pictures else []))
    wanted_shape = model.about_shapes(1)['image'].shape
    if found.shape != wanted_shape:
      raise ValueError(f'it makes {found.shape[1:-1]} of the picture, and the model draws {wanted_shape[1:-1]}: give a '
                       f'picture of the size that was trained with')
  return np.asarray(found)


def _read(flag: str, file: str, grey: bool) -> np.ndarray:
  """A picture as float32 [1, H, W, C] in [0, 1]."""
  try:
    with Image.open(file) as picture:
      array = np.asarray(picture.convert('L' if grey else 'RGB'), np.float32) / 255
  except OSError as e:
    raise UserError(f'{flag}={file} cannot be read as a picture: {e}') from e
  return (array[..., None] if array.ndim == 2 else array)[None]
