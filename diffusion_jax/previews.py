"""Pictures of samples while a model is trained."""
import pathlib

import jax
import numpy as np

from diffusion_jax import model as model_lib
from diffusion_jax.data import sources
from diffusion_jax.generator import Generator, labels_of
from diffusion_jax.model import Model
from diffusion_jax.nets import codecs
from diffusion_jax.pictures import columns_of, png, tile
from diffusion_jax.runtime import distributed, log, sharding
from diffusion_jax.runtime.config import Config
from diffusion_jax.runtime.state import TrainState


class Previews:
  """Sample grids: the same ids each time, by the first average.

  A model that is given something of an image is given it of the first examples of `source`.
  """

  def __init__(self, model: Model, mesh: jax.sharding.Mesh, workdir: pathlib.Path,
               source: sources.Source | None = None):
    self.model, self.folder = model, workdir / 'samples'
    count = model.config.sample.batch_size // mesh.size * mesh.size or mesh.size
    with model.config.unlocked():
      settings = Config({**model.config.sample, 'batch_size': count})
    self.generator = Generator(model, settings, model.config.seed, mesh)
    self.image = None
    if model.given:
      examples = np.stack([source[i % len(source)][0] for i in range(min(count, 100))])
      self.image = np.asarray(model.given(model_lib.key(model.config.seed, 'given'), codecs.floats(examples)))

  def write(self, state: TrainState, step: int) -> np.ndarray:
    """Writes samples/<images>.png and returns the picture; every process draws its part, the writer writes."""
    average = self.model.whole(sharding.on_device(state.emas[next(iter(state.emas))]), state.frozen)
    ids = range(min(self.generator.batch_size, 100))
    images = self.generator(average, ids, labels_of(ids, self.model.num_classes), self.image)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
      return np.zeros((1, 1, 3), np.uint8)  # signals and volumes have no picture
    picture = tile(images, columns_of(self.model, len(images)))
    if distributed.is_writer():
      log.write(self.folder / f'{step * self.model.config.train.batch_size:09d}.png', png(picture))
    return picture
