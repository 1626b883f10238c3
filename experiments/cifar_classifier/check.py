"""Does the Fréchet distance on the classifier's features see what it should? Prints a table, and the accuracy by class.

  python -m experiments.cifar_classifier.check --data=npz:PATH [--weights FILE]

Each row compares N images with N others of the training split; the corrupted ones are training images too.
"""
import argparse
import functools
import io
import pathlib
import sys

import jax
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from diffusion_jax.data import sources
from diffusion_jax.metrics import classifiers, frechet
from diffusion_jax.runtime import command

N = 10_000


def noisy(images, sigma, seed=1):
  """Images uint8 with normal noise of `sigma` grey levels."""
  noise = np.random.default_rng(seed).normal(0, sigma, images.shape)
  return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


def recoded(images, quality):
  """Images uint8 [N, H, W, 3] written as JPEG of `quality` (4:2:0) and read again."""
  def one(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'JPEG', quality=quality)
    return np.asarray(Image.open(file))
  return np.stack([one(image) for image in images])


def blurred(images, sigma):
  """Images uint8 [N, H, W, 3] under a Gaussian of `sigma` pixels."""
  return np.round(gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0))).astype(np.uint8)


def main(argv=None) -> int:
  """Prints the accuracy by class on the test split, then the table of distances."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--data', required=True, help='a data source with the splits train and test, such as npz:PATH')
  p.add_argument('--weights', default=pathlib.Path(classifiers.__file__).with_name('cifar.safetensors'))
  flags = p.parse_args(argv)
  variables, about = classifiers.parse(pathlib.Path(flags.weights).read_bytes())
  apply = jax.jit(functools.partial(classifiers.CifarClassifier().apply, variables))
  (images, kinds), (held_out, labels) = (sources.arrays(sources.load(flags.data, split)) for split in ('train', 'test'))
  order = np.random.default_rng(0).permutation(len(images))
  reference, others = images[order[:N]], images[order[N:2 * N]]

  def outputs(x):
    parts = [apply(x[i:i + 500] / np.float32(255)) for i in range(0, len(x), 500)]
    return [np.concatenate(part) for part in zip(*parts, strict=True)]

  features, logits = outputs(held_out)
  right = logits.argmax(-1) == labels
  print(f'{about}\n{100 * right.mean():.2f} % of {len(labels)} test images right')
  print('by class:', ', '.join(f'{k} {100 * right[labels == k].mean():.1f}' for k in np.unique(labels)))
  real = frechet.moments(outputs(reference)[0])
  show = lambda name, found: print(f'| {name} | {frechet.frechet_estimate(real, found).value:.4f} |', flush=True)
  show('other training images', outputs(others)[0])
  show('test split', features[:N])
  for quality in (95, 75, 30):
    show(f'JPEG again, quality {quality}', outputs(recoded(others, quality))[0])
  for sigma in (2, 8, 32):
    show(f'noise of {sigma} grey levels', outputs(noisy(others, sigma))[0])
  for sigma in (0.5, 1.0):
    show(f'blur of {sigma} pixels', outputs(blurred(others, sigma))[0])
  rest = order[N:]
  show('class 3 missing', outputs(images[rest[kinds[rest] != 3][:N]])[0])
  return 0


if __name__ == '__main__':
  sys.exit(command.run(main))
