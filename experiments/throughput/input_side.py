"""Our side of reading: the stream of the train command, from files on a disk to batches on the host."""
import pathlib

import numpy as np

from diffusion_jax.batches import open_source
from diffusion_jax.data import pipeline
from diffusion_jax.model import default_config
from diffusion_jax.runtime import log
from experiments.input_pipeline import pictures
from experiments.throughput import cases
from experiments.throughput.worker import Job, Prepared, reading


def write(folder: pathlib.Path, size: int, count: int) -> None:
  """JPEG files, in a folder for each class; their order by path is that of their numbers within a class."""
  for i in range(count):
    data, label = pictures.encoded(size, i, 'JPEG')
    log.write(folder / str(label) / f'{i:06d}.jpg', data)


def read(job: Job) -> Prepared:
  """Batches of decoded pictures, uint8 [b, S, S, 3] and labels [b]."""
  size, workers = job.case.changes['size'], job.case.changes['workers']
  write(folder := job.folder / 'pictures', size, cases.PICTURES)
  config = default_config()
  config.data.update({'source': f'folder:{folder}'})
  source = open_source(config)
  batches = lambda: pipeline.stream(source, 0, cases.READ, 0, None, workers=workers)
  images, labels = next(batches())
  setting = f'{workers} processes' if workers else 'threads'
  return Prepared(reading(batches()), [], 0.0, setting, log.versions(),
                  outputs={'images': cases.shown(images), 'labels': np.asarray(labels, float).tolist()})
