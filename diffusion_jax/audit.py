"""Are samples copies of training images? What `evaluate --audit` writes: records, a picture and every distance.

FOLDER/audit.png: the closest samples, each with its nearest training image and its nearest held-out one (left, middle,
right), closest first; by features and then, below a wider line, by the pixels themselves. FOLDER/audit.npz: for either
space the arrays SPACE_ratio, _to_train, _to_held_out, _train_index, _held_out_index and _closest of
`metrics.memorisation.Space`; distances in pixels are in levels of 255.
"""
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.metrics import memorisation, scores
from diffusion_jax.metrics.memorisation import Audit
from diffusion_jax.pictures import LINE, npz, png, tile
from diffusion_jax.runtime import log
from diffusion_jax.runtime.config import explain

PAIRS, COLUMNS, BAND = 50, 5, 8  # pairs shown of each space, so many in a row, and pixels between the spaces
LEGIBLE = 32  # smaller images are enlarged to about this
SPLIT = 1e-4  # a split whose p is below this is warned about; of random ones less than 1 % are
Images = tuple[np.ndarray, Mapping[str, np.ndarray]]  # uint8 [N, *S, C], and features [N, D] of each by name
RULE = (f'1 if in a space the near copies (samples whose ratio of distances, nearest training image over nearest '
        f'held-out image, is below that of all but {100 * memorisation.RATE:g} % of held-out images) are at least '
        f'{memorisation.TWICE:g} times as many as chance gives, and as those of held-out images, or at least '
        f'{memorisation.MANY:g} of the samples are closer to the training images than to as many held-out ones, and '
        f'chance alone gives so many with a probability below {memorisation.LEVEL:g} / (2 spaces); a false alarm in '
        f'less than 1 % of audits')


def run(folder: pathlib.Path, images: np.ndarray, found: Mapping[str, np.ndarray], train: Images, held_out: Images,
        seed: int = 0) -> list[dict[str, Any]]:
  """Audits samples uint8 [N, *S, C] with features `found`; writes the files and returns the records.

  UserError for fewer than 20 training or held-out images, or sets of unlike shapes, names or numbers.
  """
  with explain('audit'):
    sets = [_spaces(*s) for s in ((images, found), train, held_out)]
    result = memorisation.audit(*sets, seed=seed)
  arrays = {f'{name}_{key}': value for name, space in result.spaces.items() for key, value in space._asdict().items()
            if isinstance(value, np.ndarray)}
  log.write(folder / 'audit.npz', npz(id=np.arange(len(images)), **arrays))
  for name, space in result.spaces.items():
    if space.split_p < SPLIT:
      warnings.warn(f'the held-out images are not like the training ones ({name}), and samples may be nearer to either '
                    f'for that alone: draw the held-out split at random', stacklevel=2)
  if images.ndim == 4 and images.shape[-1] in (1, 3):
    log.write(folder / 'audit.png', png(picture(result, images, train[0], held_out[0])))
  else:
    print(f'no picture of the closest pairs: images of shape {images.shape[1:]} cannot be a PNG')
  return records(result, len(train[0]), len(held_out[0]))


def records(result: Audit, training_images: int, held_out_images: int) -> list[dict[str, Any]]:
  """A record of each value; the metrics' names carry the number of samples unless that is 50,000."""
  samples = len(next(iter(result.spaces.values())).ratio)
  number = scores.carried(samples)
  sizes = {'unit': '', 'training_images': training_images, 'held_out_images': held_out_images}
  made = []
  for name, s in result.spaces.items():
    made += [
        {'metric': f'memorised_share_{name}{number}', 'value': s.memorised_share.value, 'ci': s.memorised_share.ci,
         'chance': s.chance, 'chance_ratio_mirrored': s.mirrored,
         'ratio_below': s.threshold, 'p': s.memorised_p, 'flagged': s.copies, **sizes},
        {'metric': f'closer_to_train_share_{name}{number}', 'value': s.closer_to_train_share.value,
         'ci': s.closer_to_train_share.ci, 'chance': 0.5, 'p': s.closer_p, 'flagged': s.closer, **sizes},
        {'metric': f'memorisation_ratio_median_{name}{number}', 'value': s.median_ratio, 'ci': None, **sizes}]
  alarms = [name for name, s in result.spaces.items() if s.flagged]
  unlike = [name for name, s in result.spaces.items() if s.split_p < SPLIT]
  return [*made, {'metric': f'memorisation_flagged{number}', 'value': int(result.flagged), 'ci': None,
                  'flagged': result.flagged, 'rule': RULE, 'flagged_in': alarms, 'held_out_unlike_train_in': unlike,
                  **sizes}]


def picture(result: Audit, images: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
  """The closest samples of each space, each beside its nearest training and held-out image, uint8 [H, W, C]."""
  scale, shown = max(1, LEGIBLE // max(images.shape[1:3])), []
  for space in result.spaces.values():
    ids = space.closest[:PAIRS]
    rows = np.concatenate([images[ids], train[space.train_index[ids]], held_out[space.held_out_index[ids]]], axis=2)
    shown.append(tile(rows.repeat(scale, 1).repeat(scale, 2), COLUMNS))
    shown.append(np.full((BAND, *shown[0].shape[1:]), LINE, np.uint8))
  return np.concatenate(shown[:-1])


def _spaces(images, found):
  """The features, and the pixels themselves, [N, D] each."""
  for name, values in found.items():
    if len(values) != len(images):
      raise ValueError(f'there are {len(images)} images and {len(values)} of their features ({name})')
  return {**found, 'pixels': images.reshape(len(images), -1)}
