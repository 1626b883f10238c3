"""What is measured: the networks, and the work done with them. A new case is a new line of CASES."""
import dataclasses
import math
import os
import pathlib
import platform
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.runtime.config import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Net:
  """A network: its family (a key of `equal.FAMILIES`), what it sees, and the options of diffusion_jax's module."""
  family: str
  size: int      # of the images, or of the latents
  channels: int  # of those
  options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
  """net: a key of NETS, if there is a network; work: a key of WORK on each side; sides: the baselines first, ours last.

  A side is 'jax', or 'torch' and how it runs: 'torch' is eager and channels_last, 'torch-plain' in the default layout,
  'torch-compile' is channels_last through torch.compile. Of several baselines the quickest counts. A case with one
  side has no counterpart. The sides of 'overhead' and 'dispatch' are measured by one process; all others have one each.
  changes: options of the network that differ from those of NETS, `size` too.
  """
  net: str
  work: str
  batch: int
  about: str
  sides: Sequence[str] = ('torch', 'jax')
  steps: int = 20
  sampler: str = 'ddim'
  dtype: str = 'float32'
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


DDPM = {'blocks': 2, 'attention': (16,), 'groups': 32, 'dropout': 0.1}
ADM = {'multipliers': (1, 2, 3, 4), 'blocks': 3, 'attention': (32, 16, 8), 'head_channels': 64, 'dropout': 0.1}
NETS = {
    'small': Net('ddpm', 8, 1, {'channels': 32, 'multipliers': (1, 2), 'blocks': 1, 'attention': (4,), 'groups': 8,
                                'dropout': 0.1}),
    'cifar10': Net('ddpm', 32, 3, DDPM | {'channels': 128, 'multipliers': (1, 2, 2, 2)}),
    'scaling': Net('ddpm', 16, 3, {'channels': 64, 'multipliers': (1, 2), 'blocks': 1, 'attention': (8,), 'groups': 32,
                                   'dropout': 0.1}),
    'adm': Net('adm', 64, 3, ADM | {'channels': 64}),
    'adm64': Net('adm', 64, 3, ADM | {'channels': 192}),
    'text': Net('text', 32, 4, {'channels': 96, 'multipliers': (1, 2, 4, 4), 'depth': (1, 1, 1, 0), 'heads': 4,
                                'text': 768}),
    'sd15': Net('text', 64, 4, {'channels': 320, 'multipliers': (1, 2, 4, 4), 'depth': (1, 1, 1, 0), 'heads': 8,
                                'text': 768}),
    'autoencoder': Net('autoencoder', 64, 3, {'channels': (128, 256, 512, 512), 'blocks': 2, 'latent': 4}),
    'clip': Net('clip', 77, 0, {'width': 768, 'depth': 12, 'heads': 12, 'mlp': 3072}),
    'dit_s2': Net('dit', 32, 4, {'width': 384, 'depth': 12, 'heads': 6, 'patch': 2, 'num_classes': 1000}),
    'dit_b2': Net('dit', 32, 4, {'width': 768, 'depth': 12, 'heads': 12, 'patch': 2, 'num_classes': 1000}),
    'edm2_xs': Net('edm2', 32, 4, {'channels': 128}),
    'edm': Net('ddpmpp', 32, 3, {'channels': 128, 'multipliers': (2, 2, 2), 'blocks': 4, 'attention': (16,)}),
}
CPU = {
    'small_train': Case('small', 'train', 64, 'train step, 8x8, 0.7M parameters, batch 64'),
    'small_sample_16': Case('small', 'sample', 16, '20-step DDIM, 8x8, 0.7M parameters, batch 16'),
    'small_sample_64': Case('small', 'sample', 64, '20-step DDIM, 8x8, 0.7M parameters, batch 64'),
    'small_sample_256': Case('small', 'sample', 256, '20-step DDIM, 8x8, 0.7M parameters, batch 256'),
    'small_sample_50_steps': Case('small', 'sample', 16, '50-step DDIM, 8x8, 0.7M parameters, batch 16', steps=50),
    'small_sample_1000_steps': Case('small', 'sample', 16, '1000-step ancestral sampling, 8x8, 0.7M parameters, '
                                    'batch 16', steps=1000, sampler='ancestral'),
    'cifar10_forward': Case('cifar10', 'forward', 8, 'forward pass, 32x32, 35.7M parameters, batch 8'),
    'cifar10_train': Case('cifar10', 'train', 8, 'train step, 32x32, 35.7M parameters, batch 8'),
    'cifar10_sample': Case('cifar10', 'sample', 8, '20-step DDIM, 32x32, 35.7M parameters, batch 8'),
    'adm_forward': Case('adm', 'forward', 8, "forward pass, ADM's U-Net at a third of its width, 64x64, batch 8"),
    'text_unet_forward': Case('text', 'forward', 8, "forward pass, Stable Diffusion 1.5's U-Net at 0.3 of its width, "
                              '32x32 latents, batch 8'),
    'encode': Case('autoencoder', 'encode', 8, "Stable Diffusion's autoencoder encodes 64x64, batch 8"),
    'decode': Case('autoencoder', 'decode', 8, "Stable Diffusion's autoencoder decodes 64x64, batch 8"),
    'clip_text': Case('clip', 'forward', 8, 'CLIP ViT-L/14 reads 8 texts of 77 tokens'),
    'dit_forward': Case('dit_s2', 'forward', 8, 'forward pass, DiT-S/2, 32x32 latents, batch 8'),
    'edm2_forward': Case('edm2_xs', 'forward', 8, 'forward pass, EDM2-XS, 32x32 latents, batch 8', ('jax',)),
    'inception_features': Case('', 'features', 32, 'Inception features of 32x32 images, batch 32'),
    'text_to_image': Case('', 'draw', 4, '4 prompts to images of 64x64, 20 DDIM steps with guidance, a small Stable '
                          'Diffusion'),
    'read_32': Case('', 'read', 2048, 'reading 2048 JPEGs of 32x32, two processes that decode',
                    changes={'size': 32, 'workers': 2}),
    'read_64': Case('', 'read', 2048, 'reading 2048 JPEGs of 64x64, two processes that decode',
                    changes={'size': 64, 'workers': 2}),
    'read_64_threads': Case('', 'read', 2048, 'reading 2048 JPEGs of 64x64, our threads against two processes',
                            changes={'size': 64, 'workers': 0}),
    'checkpoint': Case('cifar10', 'checkpoint', 8, 'what a checkpoint of 35.7M parameters, Adam and an average holds '
                       'up the loop'),
    'overhead': Case('', 'overhead', 64, 'data and records of a digits run', ('bare', 'loop')),
    'dispatch': Case('', 'dispatch', 64, 'an iteration of the train loop around a step that does nothing', ('loop',)),
}
TORCH = ('torch', 'torch-plain', 'torch-compile', 'jax')


def accelerator(dtype: str) -> dict[str, Case]:
  """The cases of one accelerator in one type of numbers."""
  word = {'float32': 'f32', 'bfloat16': 'bf16'}[dtype]
  cases = {
      'cifar10_train': Case('cifar10', 'train', 256, 'train step, 32x32, 35.7M parameters, batch 256', TORCH),
      'cifar10_forward': Case('cifar10', 'forward', 256, 'forward pass, 32x32, 35.7M parameters, batch 256', TORCH),
      'cifar10_sample': Case('cifar10', 'sample', 256, '20-step DDIM, 32x32, 35.7M parameters, batch 256', TORCH),
      'edm_train': Case('edm', 'train', 512, "train step, EDM's DDPM++ for CIFAR-10, batch 512", ('jax',)),
      'adm64_train': Case('adm64', 'train', 64, 'train step, ADM-64, batch 64', TORCH),
      'sd15_forward': Case('sd15', 'forward', 16, "forward pass, Stable Diffusion 1.5's U-Net, 64x64 latents, batch 16",
                           TORCH),
      'decode': Case('autoencoder', 'decode', 16, "Stable Diffusion's autoencoder decodes 256x256, batch 16", TORCH,
                     changes={'size': 256}),
      'dit_b2_forward': Case('dit_b2', 'forward', 256, 'forward pass, DiT-B/2, 32x32 latents, batch 256', TORCH),
      'dit_b2_train': Case('dit_b2', 'train', 256, 'train step, DiT-B/2, 32x32 latents, batch 256', ('jax',),
                           changes={'num_classes': 0}),
      'edm2_forward': Case('edm2_xs', 'forward', 128, 'forward pass, EDM2-XS, 64x64 latents, batch 128', ('jax',),
                           changes={'size': 64}),
  }
  return {f'{name}_{word}': dataclasses.replace(case, about=f'{case.about}, {dtype}', dtype=dtype)
          for name, case in cases.items()}


ACCELERATOR = accelerator('bfloat16') | accelerator('float32')
CASES = CPU | ACCELERATOR
SUITES = {'cpu': tuple(CPU), 'gpu': tuple(ACCELERATOR), 'tpu': tuple(ACCELERATOR)}
# Of outputs, relative to the largest. Elsewhere than on a CPU both sides may multiply float32 as TF32.
TOLERANCE = {('cpu', 'float32'): 1e-4, ('gpu', 'float32'): 2e-2, ('tpu', 'float32'): 1e-1}
LOW_PRECISION_TOLERANCE = 1e-1
EXACTLY = {'read': 1e-9, 'draw': 2.5 / 255}  # of pictures, uint8
LEARNING_RATE, CLIP_NORM, EMA_DECAY = 2e-4, 1.0, 0.9999
EXAMPLES = 1024  # of the synthetic data set that both sides keep in memory
LATENT_FACTOR = 8  # of the autoencoder
# What is drawn from text, and by what: options of our modules.
PROMPT, NEGATIVE, GUIDANCE = 'A red bird on a branch.', 'blurred', 5.0
PIPELINE = {'size': 64, 'vae': {'channels': (32, 32, 64), 'blocks': 1},
            'unet': {'channels': 64, 'multipliers': (1, 2), 'blocks': 1, 'depth': (1, 1), 'heads': 4},
            'text': {'width': 128, 'depth': 2, 'heads': 4, 'mlp': 512}}
PICTURES, READ = 4096, 128  # files that are read, and those of a batch
READ_AGAINST = 2  # processes of PyTorch's loader: as many as ours has, or where ours has threads


def choose(kind: str, known: dict, name: str):
  """known[name]; UserError with the nearest name if there is none."""
  if name not in known:
    raise UserError(f'there is no {kind} {name!r}{nearest(name, known)}')
  return known[name]


def net_of(case: Case) -> Net:
  """The network of a case, with its changes."""
  net = NETS[case.net]
  changes = dict(case.changes)
  size = changes.pop('size', net.size)
  return dataclasses.replace(net, size=size, options={**net.options, **changes})


def tolerance(suite: str, case: Case) -> float:
  """How far outputs of two sides may lie apart, relative to the largest number."""
  if case.work in EXACTLY:
    return EXACTLY[case.work]
  return TOLERANCE[suite, 'float32'] if case.dtype == 'float32' else LOW_PRECISION_TOLERANCE


def inputs(case: Case) -> dict[str, np.ndarray]:
  """What a network is given, channels last, the same on both sides: x, and what its family needs beside."""
  net, rng = net_of(case), np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal((case.batch, *shape), np.float32)
  if net.family == 'clip':
    return {'ids': rng.integers(0, 49_408, (case.batch, net.size), np.int32)}
  if net.family == 'autoencoder':
    latents = net.size // LATENT_FACTOR
    return {'x': normal(latents, latents, net.options['latent']) if case.work == 'decode' else
            normal(net.size, net.size, net.channels)}
  found = {'x': normal(net.size, net.size, net.channels), 'noise': np.linspace(1, 999, case.batch, dtype=np.float32)}
  found['noise'] = np.round(found['noise'])
  if net.family == 'text':
    found['text'] = normal(77, net.options['text'])
  if net.options.get('num_classes'):
    found['label'] = rng.integers(0, net.options['num_classes'], case.batch, np.int32)
  return found


def shown(output: np.ndarray) -> list[float]:
  """Of an output [B, ...] the first and the last example, as numbers that the other side must have too."""
  return np.asarray(output, np.float32)[[0, -1]].ravel().tolist()


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
