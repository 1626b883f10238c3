"""Small classifiers whose last hidden layer serves as features, with no download: their weights lie beside this file.

digits  8x8 digits of scikit-learn, made by experiments/digits_classifier
cifar   32x32 RGB of the ten CIFAR-10 classes, made by experiments/cifar_classifier from JPEG-coded images

The metadata of each weight file says what it was made from and the test accuracy that it reached.
"""
import functools
import hashlib
import importlib.resources
import json
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load, save

from diffusion_jax.metrics import batches

__all__ = ['SHAPES', 'CifarClassifier', 'DigitsClassifier', 'about', 'classify', 'digest']
SHAPES = {'digits': (8, 8, 1), 'cifar': (32, 32, 3)}  # of the images that each one takes

Conv = functools.partial(nn.Conv, precision='highest')
Dense = functools.partial(nn.Dense, precision='highest')


class DigitsClassifier(nn.Module):
  """A small convolutional classifier: images float [N, 8, 8, 1] in [0, 1] -> (features [N, 64], logits [N, 10])."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(Conv(16, (3, 3), name='Conv_0')(x))
    x = nn.relu(Conv(32, (3, 3), strides=(2, 2), name='Conv_1')(x))
    x = nn.relu(Dense(64, name='Dense_0')(x.reshape(len(x), -1)))
    return x, Dense(10, name='Dense_1')(x)


class CifarClassifier(nn.Module):
  """A residual network: images float [N, 32, 32, 3] in [0, 1] -> (features [N, 128], logits [N, 10]).

  Small enough to be trained on a CPU: no layer works on all 32 x 32 pixels.

  conv  makes a convolution from (channels, kernel size, name=); training puts one with a batch norm here, which is
        folded into the kernel and bias of the plain one afterwards
  """
  conv: Callable[..., nn.Module] = Conv

  @nn.compact
  def __call__(self, x):
    x = nn.relu(self.conv(32, (3, 3), name='stem')(_blocks(2 * x - 1)))
    x = nn.relu(self.conv(64, (1, 1), name='down')(_blocks(x)))
    x = self.residual(x, 'fine')
    x = nn.relu(self.conv(128, (1, 1), name='down_again')(_blocks(x)))
    x = self.residual(x, 'coarse').mean((1, 2))
    return x, Dense(10, name='logits')(x)

  def residual(self, x, name):
    h = nn.relu(self.conv(x.shape[-1], (3, 3), name=f'{name}_1')(x))
    return nn.relu(x + self.conv(x.shape[-1], (3, 3), name=f'{name}_2')(h))


def _blocks(x):
  """[N, H, W, C] -> [N, H / 2, W / 2, 4 C]: the four pixels of each 2 x 2 block side by side."""
  n, h, w, c = x.shape
  return x.reshape(n, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, h // 2, w // 2, 4 * c)


NETS = {'digits': DigitsClassifier, 'cifar': CifarClassifier}


def classify(name: str, images: np.ndarray, batch_size: int = 512) -> dict[str, np.ndarray]:
  """What the classifier `name` makes of images uint8 [N, *SHAPES[name]].

  Returns {'features': float32 [N, D], its last hidden layer, at least 0; 'logits': float32 [N, K], one for each class}.
  The batch size changes speed and memory only: the last batch is filled up, so that one shape is compiled. Raises
  ValueError for an unknown name and for images of another shape or type.
  """
  _, variables, _ = _read(name)
  images = np.asarray(images)
  if images.shape[1:] != SHAPES[name]:
    raise ValueError(f'the {name} classifier takes images of shape {SHAPES[name]}, got {images.shape[1:]}: '
                     f"set config.eval.features to 'pixels'")
  if images.dtype != np.uint8:
    raise ValueError(f'the {name} classifier takes images of type uint8, got {images.dtype}: quantise them first')
  features, logits = batches.apply(functools.partial(_apply, name), variables, images, batch_size)
  return {'features': features, 'logits': logits}


def digest(name: str) -> str:
  """Identifies the classifier: hex SHA-256 of its weight file."""
  return _read(name)[0]


def about(name: str) -> dict[str, str]:
  """What its weight file says about the classifier: test_accuracy, made_by, seed and more."""
  return dict(_read(name)[2])


def pack(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
  """A weight file, the inverse of `parse`: the same bytes for the same content."""
  data = save(arrays, metadata=metadata)
  header, end = _header(data)
  text = json.dumps(header, sort_keys=True).encode()  # the library's own order of the metadata is a random one
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text + data[end:]


def parse(data: bytes) -> tuple[dict, dict[str, str]]:
  """(variables, metadata) of a weight file: tensors 'layer/parameter', and text in its header."""
  params = {}
  for name, array in load(data).items():
    layer, parameter = name.split('/')
    params.setdefault(layer, {})[parameter] = array
  return {'params': params}, _header(data)[0].get('__metadata__', {})


def _header(data):
  end = 8 + int.from_bytes(data[:8], 'little')
  return json.loads(data[8:end]), end


@functools.partial(jax.jit, static_argnums=0)
def _apply(name, variables, images):
  return NETS[name]().apply(variables, images.astype(jnp.float32) / 255)


@functools.cache
def _read(name):
  if name not in NETS:
    raise ValueError(f'there is no classifier {name!r}, only {", ".join(NETS)}')
  data = importlib.resources.files('diffusion_jax.metrics').joinpath(f'{name}.safetensors').read_bytes()
  return hashlib.sha256(data).hexdigest(), *parse(data)
