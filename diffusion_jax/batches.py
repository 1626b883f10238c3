"""The batches of a run, as the train step takes them."""
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from diffusion_jax import model as model_lib
from diffusion_jax.data import pipeline, sources
from diffusion_jax.runtime import sharding
from diffusion_jax.runtime.config import Config, explain


def open_source(config: Config) -> sources.Source:
  """The data set that a config names; UserError if it cannot be had."""
  with explain('config.data'):
    return model_lib.open_data(config.data, config.data.split)


class Batches:
  """The batches of a config, as step functions take them: a function of (seed, step, process)."""

  def __init__(self, config: Config, source: Any, mesh: jax.sharding.Mesh):
    self.config, self.source, self.mesh = config, source, mesh
    self.data = None
    if source.nbytes <= config.data.resident_gib * 2 ** 30:
      with explain('config.data'):
        arrays = sources.arrays(source, config.data.max_bad)
      self.data = tuple(jax.device_put(a, sharding.replicated(mesh)) for a in arrays)

  def __call__(self, start: int, stop: int) -> Iterator[Any]:
    """What each call of the steps start .. stop takes, steps_per_call steps at a time."""
    train, where = self.config.train, (jax.process_index(), jax.process_count())
    if self.data is not None:
      singles = (pipeline.indices(self.config.seed, step, train.batch_size, len(self.data[0]), *where).astype(np.int32)
                 for step in range(start, stop))
    else:
      singles = pipeline.stream(self.source, self.config.seed, train.batch_size, start, stop, process=where[0],
                                num_processes=where[1], workers=self.config.data.workers,
                                max_bad=self.config.data.max_bad)
    with explain('config.data'):
      while group := tuple(itertools.islice(singles, train.steps_per_call)):
        yield jax.tree.map(lambda *a: sharding.put_batch(np.stack(a), self.mesh, axis=1), *group)
