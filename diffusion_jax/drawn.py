"""A set of samples and their features, kept as files: made once, by several processes or by whoever comes next."""
import io
import pathlib
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from diffusion_jax import model as model_lib
from diffusion_jax.data.sources import Source
from diffusion_jax.generator import Generator, labels_of
from diffusion_jax.metrics.features import Extractor
from diffusion_jax.model import Model
from diffusion_jax.nets import codecs
from diffusion_jax.pictures import npz
from diffusion_jax.runtime import distributed, log
from diffusion_jax.runtime.config import explain
from diffusion_jax.trained import Trained

DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)  # of a file that is not whole


class Asked:
  """What samples are asked to be: every class in turn; or of a model that is given something of an image, what is
  known of image i mod N of `source`, and its label, for sample i. What is hidden of it depends on i alone.
  """

  def __init__(self, model: Model, source: Source | None = None):
    self.model, self.source, key = model, source, model_lib.key(0, 'given')
    one = lambda i, image: model.given(jax.random.fold_in(key, i), codecs.floats(image[None]))[0]
    self._given = jax.jit(jax.vmap(one))

  def labels(self, ids: Sequence[int]) -> list[int]:
    """Their classes by number, those of `source` where there is one."""
    if not self.source:
      return labels_of(ids, self.model.num_classes)
    return [label for _, label in self._examples(ids)]

  def images(self, ids: Sequence[int]) -> np.ndarray:
    """The images of `source` that they are given something of, uint8 [n, *S, C]."""
    return np.stack([image for image, _ in self._examples(ids)])

  def __call__(self, ids: Sequence[int]) -> tuple:
    """What a Generator takes behind its ids."""
    if not self.source:
      return self.labels(ids), None
    images, labels = zip(*self._examples(ids), strict=True)
    if self.model.text:  # captions of another split have other numbers
      labels = [self.source.class_names[label] for label in labels]
    return labels, np.asarray(self._given(np.asarray(ids, np.uint32), np.stack(images)))

  def _examples(self, ids):
    with explain('config.data'):
      return [self.source[int(i) % len(self.source)] for i in ids]


class Samples:
  """Samples 0 .. num-1 of one generator, made now or found in `folder`, a file for each batch.

  A file appears whole or not at all. seconds and made: how long making how many took, whenever that was.
  """

  def __init__(self, generator: Generator, trained: Trained, num: int, folder: pathlib.Path, asked: Asked):
    self.generator, self.trained, self.num, self.folder, self.asked = generator, trained, num, folder, asked
    self.seconds, self.made = 0.0, 0

  def batches(self, first: int = 0, every: int = 1) -> Iterator[tuple[str, np.ndarray]]:
    """(name, images uint8 [b, *S, C]) of each batch, in order of the ids; of every `every`-th, from `first` on."""
    size = self.generator.batch_size
    self.seconds, self.made, adaptive = 0.0, 0, isinstance(self.generator.calls, list)
    if adaptive:
      self.generator.calls = []
    for start in range(first * size, self.num, every * size):
      ids = np.arange(start, start + size)
      path = self.folder / f'{start:06d}-{ids[-1]:06d}.npz'
      try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as found:
          images, seconds, calls = found['image'], float(found['seconds']), found['calls'] if adaptive else ()
        self.generator.calls += list(calls) if adaptive else 0
      except DAMAGED:
        self.generator.compile(self.trained.params)
        known, began = len(self.generator.calls) if adaptive else 0, time.perf_counter()
        images = self.generator(self.trained.params, ids, *self.asked(ids))
        seconds = time.perf_counter() - began
        calls = np.asarray(self.generator.calls[known:] if adaptive else [], np.float64)
        log.write(path, npz(image=images, id=ids, seconds=np.asarray(seconds), calls=calls))
      self.seconds, self.made = self.seconds + seconds, self.made + len(images)
      yield path.stem, images[:self.num - start]

  def features(self, extractor: Extractor) -> dict[str, np.ndarray]:
    """What the extractor gives for all samples, made now or found beside them; on the writer, {} elsewhere.

    Every process must ask, and makes the files of its own batches first.
    """
    processes = distributed.count()
    if processes > 1:
      for _ in self._parts(extractor, jax.process_index(), processes):
        pass
      distributed.wait()
    if not distributed.is_writer():
      return {}
    parts = list(self._parts(extractor))
    return {output: np.concatenate([part[output] for part in parts]) for output in parts[0]}

  def _parts(self, extractor, *which):
    folder = self.folder / f'{extractor.name}-{extractor.digest[:12]}'
    for name, images in self.batches(*which):
      path = folder / f'{name}.npz'
      try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as found:
          seen = {output: found[output] for output in found.files}
        if len(seen['features']) < len(images):
          raise KeyError('made for fewer samples')
      except DAMAGED:
        seen = extractor.extract(images)
        log.write(path, npz(**seen))
      yield {output: values[:len(images)] for output, values in seen.items()}

  def images(self) -> np.ndarray:
    """All of them, in memory."""
    return np.concatenate([images for _, images in self.batches()])
