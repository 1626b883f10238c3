"""A TFDS data set of procedural pictures in array_record files, made without TensorFlow."""
import io
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from diffusion_jax.data import sources

FORMATS = {32: 'PNG', 64: 'JPEG'}  # as TFDS keeps CIFAR-10, and as ImageNet comes
CLASSES = 4


def encoded(size: int, i: int, form: str) -> tuple[bytes, int]:
  """(the file of picture i, its label), in one of PIL's formats."""
  image, label = sources.load(f'synthetic:{size}x{size}x3:{i + 1}')[i]
  noise = np.random.default_rng(i).integers(0, 32, image.shape, np.uint8)
  file = io.BytesIO()
  Image.fromarray(image // 8 * 7 + noise).save(file, form, quality=90)
  return file.getvalue(), label


class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Coloured blobs with noise of 5 bits, which no PNG can compress: about the bytes of a photograph of that size."""

  VERSION = tfds.core.Version('1.0.0')
  size, count = 32, 1024

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        'image': tfds.features.Image(shape=(self.size, self.size, 3), encoding_format=FORMATS[self.size].lower()),
        'label': tfds.features.ClassLabel(num_classes=CLASSES)}))

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(self.count):
      data, label = encoded(self.size, i, FORMATS[self.size])
      yield i, {'image': io.BytesIO(data), 'label': label}


class Pictures32(Pictures, skip_registration=True):
  """Of CIFAR-10's size."""


class Pictures64(Pictures, skip_registration=True):
  """Of the size of downsampled ImageNet."""
  size = 64


def prepare(folder: pathlib.Path, size: int, count: int) -> str:
  """Makes `count` pictures of size x size below `folder`; returns the name of the data set, as config.data.source."""
  builder = {32: Pictures32, 64: Pictures64}[size](data_dir=folder, file_format='array_record')
  builder.count = count
  builder.download_and_prepare()
  return f'tfds:{builder.name}'
