"""What a set of images looks like to a network: the extractors that quality is measured with, by name.

pixels          the images themselves, averaged down to 8 along each axis: blobs and colours, no objects
digits, cifar   classifiers of this package, trained by experiments/digits_classifier and experiments/cifar_classifier
inception       the network of FID, sFID, KID and IS; its weights are found, fetched, or named: inception:FILE
dinov2          the network of FD-DINOv2, whose weights are always named: dinov2:FILE
"""
import difflib
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save

from diffusion_jax.metrics import batches, classifiers, dinov2, inception, weights

__all__ = ['Extractor', 'make', 'names']
SIZE = 8    # of the pixels' averages
BATCH = 32  # images that a large network sees at once
SHAPE = (inception.SIZE, inception.SIZE, 3)  # of what the largest of them sees


class Extractor(NamedTuple):
  """A network, or less, that images are seen through.

  `extract` takes images uint8 [N, *S, C] and returns float32 arrays: 'features' [N, D], from classifiers also 'logits'
  [N, K], from Inception 'sfid' [N, 2023] too (its logits are those without bias). An image's are the same in any set.
  """
  name: str
  digest: str  # SHA-256 of what defines the extractor: the same weights have the same, whatever file they come from
  extract: Callable[[np.ndarray], dict[str, np.ndarray]]


def make(text: str) -> Extractor:
  """The extractor of 'NAME' or 'NAME:FILE', FILE being its weights.

  Raises ValueError for a name that does not exist and for weights that are not the network's, OSError for weights that
  cannot be found or fetched.
  """
  name, _, file = text.partition(':')
  if name not in _MAKERS:
    close = difflib.get_close_matches(name, _MAKERS, 1, 0.5)
    raise ValueError(f'there are no features {name!r}' + (f'; did you mean {close[0]!r}?' if close else
                                                          f': there is {", ".join(_MAKERS)}'))
  if file and name not in ('inception', 'dinov2'):
    raise ValueError(f'the features {name!r} need no file of weights, got {file!r}: write {name}')
  return _MAKERS[name](file)


def names() -> list[str]:
  """What `make` knows."""
  return list(_MAKERS)


def _pixels(file):
  def extract(images):
    x = images.astype(np.float32) / 255
    for axis in range(1, x.ndim - 1):
      n = x.shape[axis]
      edges = np.linspace(0, n, min(SIZE, n) + 1).round().astype(int)
      x = np.add.reduceat(x, edges[:-1], axis) / np.diff(edges).reshape((-1,) + (1,) * (x.ndim - 1 - axis))
    return {'features': x.reshape(len(x), -1)}

  return Extractor('pixels', _sha256(f'pixels {SIZE}'.encode()), extract)


def _classifier(name):
  return lambda file: Extractor(name, classifiers.digest(name), lambda images: classifiers.classify(name, images))


def _inception(file):
  path = weights.fetch(file)
  params = _converted(path)
  digest = _sha256(b'inception' + inception.to_safetensors(params))
  params = batches.place(params, BATCH)
  outputs = {'2048': 'features', 'sfid': 'sfid', 'logits_unbiased': 'logits'}

  def extract(images):
    found = inception.extract(params, images, BATCH, tuple(outputs))
    return {ours: found[name] for name, ours in outputs.items()}

  return Extractor('inception', digest, extract)


def _converted(path):
  """Inception's parameters of a weight file, which is read and converted once."""
  if path.suffix == '.safetensors':
    return inception.from_arrays(weights.read(path))
  kept = weights.cache() / f'inception-{weights.sha256(path)}.safetensors'
  if kept.is_file():
    try:
      return inception.load(kept)
    except (OSError, ValueError):
      pass  # damaged: it is made again
  params = inception.from_arrays(weights.read(path))
  weights.keep(kept, inception.to_safetensors(params))
  return params


def _dinov2(file):
  if not file:
    raise FileNotFoundError(
        'the features dinov2 need the weights of DINOv2 ViT-L/14: download model.safetensors of facebook/dinov2-large, '
        'or dinov2_vitl14_pretrain.pth, and write dinov2:FILE; digits, cifar and pixels need no weights')
  arrays = weights.read(weights.find(file))
  params = dinov2.from_arrays(arrays)
  content = save({name: np.ascontiguousarray(array) for name, array in sorted(_leaves(params))})
  params = batches.place(params, BATCH)
  return Extractor('dinov2', _sha256(b'dinov2' + content),
                   lambda images: {'features': dinov2.extract(params, images, BATCH)})


def _leaves(tree, prefix=''):
  for name, value in tree.items():
    if isinstance(value, dict):
      yield from _leaves(value, f'{prefix}{name}/')
    else:
      yield prefix + name, value


def _sha256(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


_MAKERS = {'pixels': _pixels, 'digits': _classifier('digits'), 'cifar': _classifier('cifar'), 'inception': _inception,
           'dinov2': _dinov2}
