"""Pictures of samples while a model is trained."""
import pathlib

import jax
import numpy as np

from diffusion_jax import capacity
from diffusion_jax import model as model_lib
from diffusion_jax.data import sources
from diffusion_jax.generator import Generator, labels_of
from diffusion_jax.model import Model
from diffusion_jax.nets import codecs
from diffusion_jax.pictures import columns_of, png, tile
from diffusion_jax.runtime import distributed, log, memory, sharding
from diffusion_jax.runtime.config import Config
from diffusion_jax.runtime.state import TrainState

COUNT, MOST = 64, 100  # pictures where the batch is left to the memory, and in any case


class Previews:
  """Sample grids: the same ids each time, by the first average.

  A model that is given something of an image is given it of the first examples of `source`.
  """

  def __init__(self, model: Model, mesh: jax.sharding.Mesh, workdir: pathlib.Path,
               source: sources.Source | None = None):
    self.model, self.folder = model, workdir / 'samples'
    wanted = model.config.sample.batch_size
    size = wanted and (wanted // mesh.size * mesh.size or mesh.size)
    with model.config.unlocked():
      settings = Config({**model.config.sample, 'batch_size': size})
    self.count = min(size or COUNT, MOST)
    self.generator = Generator(model, settings, model.config.seed, mesh)
    self.image = None
    if model.given:
      examples = np.stack([source[i % len(source)][0] for i in range(self.count)])
      self.image = np.asarray(model.given(model_lib.key(model.config.seed, 'given'), codecs.floats(examples)))

  def write(self, state: TrainState, step: int) -> np.ndarray:
    """Writes samples/<images>.png and returns the picture; every process draws its part, the writer writes."""
    average = self.model.whole(sharding.on_device(state.emas[next(iter(state.emas))]), state.frozen)
    beside = memory.device_bytes(state) - memory.device_bytes(average)
    self.generator = capacity.fitted(self.generator, average, self.count, beside)
    ids = range(self.count)
    images = self.generator.draw(average, ids, labels_of(ids, self.model.num_classes), self.image)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
      return np.zeros((1, 1, 3), np.uint8)  # signals and volumes have no picture
    picture = tile(images, columns_of(self.model, len(images)))
    if distributed.is_writer():
      log.write(self.folder / f'{step * self.model.config.train.batch_size:09d}.png', png(picture))
    return picture
