"""The batches of a run, as the train step takes them."""
import collections
import itertools
from collections.abc import Callable, Iterator
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
  """The batches of a config, as step functions take them: a function of (seed, step).

  Data of at most data.resident_gib stays on the devices, and a batch is the numbers of its examples. Larger data is
  streamed: read and decoded ahead on the host, and AHEAD batches are on their way to the devices before they are used.
  read: what the model takes in place of labels [n], if it is not themselves.
  """
  AHEAD = 2

  def __init__(self, config: Config, source: Any, mesh: jax.sharding.Mesh,
               read: Callable[[np.ndarray], np.ndarray] = lambda labels: labels):
    self.config, self.source, self.mesh, self.read = config, source, mesh, read
    self.data = None
    if source.nbytes <= config.data.resident_gib * 2 ** 30:
      with explain('config.data'):
        images, labels = sources.arrays(source, config.data.max_bad)
      # Every process has read all of it; device_put would compare what they have, byte by byte.
      self.data = tuple(jax.make_array_from_callback(a.shape, sharding.replicated(mesh), a.__getitem__)
                        for a in (images, read(labels)))

  def __call__(self, start: int, stop: int) -> Iterator[Any]:
    """What each call of the steps start .. stop takes, steps_per_call steps at a time."""
    seed, size = self.config.seed, self.config.train.batch_size
    rows = sharding.rows(self.mesh, size)  # those that this process's devices hold
    if self.data is not None:
      singles = (pipeline.indices(seed, step, size, len(self.data[0]))[rows].astype(np.int32)
                 for step in range(start, stop))
    else:
      singles = pipeline.stream(self.source, seed, size, start, stop, rows=rows, workers=self.config.data.workers,
                                max_bad=self.config.data.max_bad)
    with explain('config.data'):
      yield from ahead(self._put(singles), self.AHEAD)

  def _put(self, singles):
    if self.data is None:
      singles = ((images, self.read(labels)) for images, labels in singles)
    while group := tuple(itertools.islice(singles, self.config.train.steps_per_call)):
      yield jax.tree.map(lambda *a: sharding.put_batch(np.stack(a), self.mesh, axis=1), *group)


def ahead(items: Iterator[Any], count: int) -> Iterator[Any]:
  """The same items, with `count` more taken from the iterator before one is handed out."""
  ready = collections.deque(itertools.islice(items, count))
  for item in items:
    ready.append(item)
    yield ready.popleft()
  yield from ready
