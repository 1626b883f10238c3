"""Feature extractors that need no download. Each is extract(images uint8 [N, *S, C]) -> Features."""
import functools
import hashlib
import importlib.resources
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load

__all__ = ['digits', 'pixels']
WEIGHTS = 'digits.safetensors'


class Features(NamedTuple):
  """What a set of images looks like to an extractor."""
  values: np.ndarray              # [N, D] float32
  classes: np.ndarray | None      # [N], the class that each image looks like, where the extractor knows classes
  extractor_hash: str             # SHA-256 of what defines the extractor


class DigitsClassifier(nn.Module):
  """A small convolutional classifier: images float [N, 8, 8, 1] in [0, 1] -> (features [N, 64], logits [N, 10])."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(16, (3, 3), precision='highest')(x))
    x = nn.relu(nn.Conv(32, (3, 3), strides=(2, 2), precision='highest')(x))
    x = nn.relu(nn.Dense(64, precision='highest')(x.reshape(len(x), -1)))
    return x, nn.Dense(10, precision='highest')(x)


def digits(images: np.ndarray, batch_size: int = 512) -> Features:
  """The last hidden layer of a classifier of 8x8 digits, made by experiments/digits_classifier."""
  if images.shape[1:] != (8, 8, 1):
    raise ValueError(f'the digits classifier takes images of shape (8, 8, 1), got {images.shape[1:]}: '
                     f"set config.eval.features to 'pixels'")
  variables, digest = _digits_weights()
  parts = []
  for i in range(0, len(images), batch_size):
    chunk = images[i:i + batch_size]
    padded = np.concatenate([chunk, np.zeros((batch_size - len(chunk), 8, 8, 1), np.uint8)])  # one compiled shape
    parts.append([np.asarray(a)[:len(chunk)] for a in _classify(variables, padded)])
  values, logits = (np.concatenate(p) for p in zip(*parts, strict=True))
  return Features(values, logits.argmax(-1), digest)


def pixels(images: np.ndarray, size: int = 8) -> Features:
  """The images themselves, averaged down to at most `size` along each axis: it sees blobs and colours, no objects."""
  x = images.astype(np.float32) / 255
  for axis in range(1, x.ndim - 1):
    n = x.shape[axis]
    edges = np.linspace(0, n, min(size, n) + 1).round().astype(int)
    x = np.add.reduceat(x, edges[:-1], axis) / np.diff(edges).reshape((-1,) + (1,) * (x.ndim - 1 - axis))
  return Features(x.reshape(len(x), -1), None, hashlib.sha256(f'pixels {size}'.encode()).hexdigest())


@jax.jit
def _classify(variables, images):
  return DigitsClassifier().apply(variables, images.astype(jnp.float32) / 255)


@functools.cache
def _digits_weights():
  data = importlib.resources.files('diffusion_jax.metrics').joinpath(WEIGHTS).read_bytes()
  params = {}
  for name, array in load(data).items():
    layer, parameter = name.split('/')
    params.setdefault(layer, {})[parameter] = array
  return {'params': params}, hashlib.sha256(data).hexdigest()
