"""A small labelled TFDS data set in array_record files, several to a split; made without TensorFlow."""
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

COUNTS = {'train': 30, 'test': 7}


def pixels(split, i):
  """Picture i of a split: uint8 [6,5,3] noise."""
  return np.random.default_rng([len(split), i]).integers(0, 256, (6, 5, 3), np.uint8)


class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Noise whose class is its number modulo 3."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
        'image': tfds.features.Image(shape=(6, 5, 3)), 'label': tfds.features.ClassLabel(num_classes=3)}))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(split, count) for split, count in COUNTS.items()}

  def _generate_examples(self, split, count):
    for i in range(count):
      file = io.BytesIO()
      Image.fromarray(pixels(split, i)).save(file, 'PNG')
      file.seek(0)
      yield i, {'image': file, 'label': i % 3}


def prepare(folder, num_shards=3):
  """Prepares it below `folder` and returns that folder as text."""
  config = tfds.download.DownloadConfig(num_shards=num_shards)
  Toy(data_dir=folder, file_format='array_record').download_and_prepare(download_config=config)
  return str(folder)
