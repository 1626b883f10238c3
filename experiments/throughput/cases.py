"""What is measured: the networks, and the work done with them. A new case is a new line of CASES."""
import dataclasses
import math
import os
import pathlib
import platform
import re
import zlib
from collections.abc import Mapping

import numpy as np

from diffusion_jax.runtime.config import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Net:
  """A U-Net in the words of diffusion_jax; both sides build it from these numbers."""
  size: int
  image_channels: int
  channels: int
  multipliers: tuple[int, ...]
  blocks: int
  attention: tuple[int, ...]
  groups: int
  dropout: float = 0.1


@dataclasses.dataclass(frozen=True)
class Case:
  """net: a key of NETS, if it is a U-Net; work: a key of WORK on each side; sides: the two that are compared, the
  baseline first.

  The two sides of the overhead are measured by one process; all others have one each.
  """
  net: str
  work: str
  batch: int
  about: str
  sides: tuple[str, str] = ('torch', 'jax')


NETS = {
    'small': Net(size=8, image_channels=1, channels=32, multipliers=(1, 2), blocks=1, attention=(4,), groups=8),
    'cifar10': Net(size=32, image_channels=3, channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,),
                   groups=32),
}
CASES = {
    'small_train': Case('small', 'train', 64, 'train step, 8x8, 0.7M parameters, batch 64'),
    'small_sample_16': Case('small', 'sample', 16, '20-step DDIM, 8x8, 0.7M parameters, batch 16'),
    'small_sample_64': Case('small', 'sample', 64, '20-step DDIM, 8x8, 0.7M parameters, batch 64'),
    'cifar10_forward': Case('cifar10', 'forward', 8, 'forward pass, 32x32, 35.7M parameters, batch 8'),
    'cifar10_train': Case('cifar10', 'train', 8, 'train step, 32x32, 35.7M parameters, batch 8'),
    'inception_features': Case('', 'features', 32, 'Inception features of 32x32 images, batch 32'),
    'overhead': Case('', 'overhead', 64, 'data and records of a digits run', ('bare', 'loop')),
}
SUITES = {'cpu': tuple(CASES)}
SAMPLING_STEPS = 20
LEARNING_RATE, CLIP_NORM, EMA_DECAY = 2e-4, 1.0, 0.9999
EXAMPLES = 1024  # of the synthetic data set that both sides keep in memory


def choose(kind: str, known: dict, name: str):
  """known[name]; UserError with the nearest name if there is none."""
  if name not in known:
    raise UserError(f'there is no {kind} {name!r}{nearest(name, known)}')
  return known[name]


def images(case: Case) -> np.ndarray:
  """The images of a case of features: uint8 [batch, 32, 32, 3]."""
  return np.random.default_rng(0).integers(0, 256, (case.batch, 32, 32, 3), np.uint8)


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Random float32 arrays by name, the same on both sides; they keep the scale of what passes through the network.

  Kernels have outputs first, and names end as a state dict's do: weight, bias, running_mean, running_var.
  """
  arrays = {}
  for name, shape in shapes.items():
    x = np.random.default_rng(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    if len(shape) > 1:
      x *= math.sqrt(6 / math.prod(shape[1:]))  # He et al. 2015, for ReLUs
    else:
      x = 0.3 * x + name.endswith(('bn.weight', 'running_var'))
    arrays[name] = x.astype(np.float32)
  return arrays


def cores() -> int:
  """How many cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def device() -> str:
  """'Intel(R) Xeon(R) Processor @ 2.50GHz, 2 cores'."""
  info = pathlib.Path('/proc/cpuinfo')
  named = re.search(r'^model name\s*: (.*)$', info.read_text() if info.exists() else '', re.MULTILINE)
  return f'{named[1].strip() if named else platform.processor() or platform.machine()}, {cores()} cores'


def file_name(device: str) -> str:
  """The device as the name of its file of records."""
  return re.sub(r'[^a-z0-9.]+', '-', re.sub(r'\((r|tm)\)', '', device.lower())).strip('-') + '.jsonl'


def count(sizes: list[int]) -> str:
  """The number of parameters, of which `sizes` lists each array's: '35,746,307'."""
  return f'{sum(sizes):,}'


def shapes_agree(a: list[int], b: list[int]) -> bool:
  """Whether two networks have arrays of the same sizes, in whatever order and layout."""
  return math.fsum(a) == math.fsum(b) and sorted(a) == sorted(b)


def difference(a: Mapping[str, list], b: Mapping[str, list]) -> float:
  """The largest difference between two sides' outputs, {name: numbers}, of each in units of its largest number."""
  if a.keys() != b.keys() or any(np.shape(a[name]) != np.shape(b[name]) for name in a):
    return math.inf
  relative = [np.abs(np.subtract(a[name], b[name])).max() / np.abs(a[name]).max() for name in a]
  return float(np.max(relative))  # nan if any is
