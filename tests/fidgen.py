"""Random weights for the FID Inception and fixed images, rebuilt from a seed bit for bit on every machine.

Integers, exact conversions and single multiplications only. The statistics of the batch normalisations are calibrated,
not random: they are part of the fixture.
"""
import hashlib
import json
import math
import pathlib

import numpy as np

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'


def bits(name, n, seed=0):
  """n words of 64 bits: a splitmix64 counter stream keyed by seed and name."""
  key = int.from_bytes(hashlib.sha256(f'{seed}:{name}'.encode()).digest()[:8], 'little')
  with np.errstate(over='ignore'):
    z = np.uint64(key) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(name, shape):
  """float64 in [-1, 1)."""
  u = (bits(name, math.prod(shape)) >> np.uint64(11)).astype(np.float64) * 2.0 ** -53
  return (u * 2 - 1).reshape(shape)


def state_dict():
  """{name in the PyTorch port: array}, 472 names without the counters."""
  shapes = json.loads((FIXTURES / 'inception_keys.json').read_text())
  stats, start, arrays = np.load(FIXTURES / 'inception.npz')['bn_stats'], 0, {}
  for name, shape in shapes.items():
    kind = '.'.join(name.split('.')[-2:])
    if kind.startswith('bn.running'):
      arrays[name], start = stats[start:start + shape[0]], start + shape[0]
    elif kind == 'conv.weight':
      arrays[name] = uniform(name, shape) * math.sqrt(6 / math.prod(shape[1:]))
    elif kind == 'fc.weight':
      arrays[name] = uniform(name, shape) * (6 * math.sqrt(3 / shape[1]))
    elif kind == 'fc.bias':
      arrays[name] = 0.5 * uniform(name, shape)
    else:
      arrays[name] = {'bn.weight': 0.6, 'bn.bias': 0.5}[kind] + 0.3 * uniform(name, shape)
    arrays[name] = arrays[name].astype(np.float32)
  return arrays


def images(size, n):
  """uint8 [n, size, size, 3], the first n of the set b<size>: a smooth field of colours, a rectangle, noise."""
  name, out = f'b{size}', np.empty((n, size, size, 3), np.uint8)
  headers = bits(f'img:{name}:hdr', n * 8).reshape(n, 8)
  for i, header in enumerate(headers):
    grid = 2 + int(header[0] % np.uint64(8))
    field = (bits(f'img:{name}:{i}:low', grid * grid * 3) >> np.uint64(56)).astype(np.int64)
    image = _upsample(field.reshape(grid, grid, 3), size)
    (y0, y1), (x0, x1) = (sorted(int(v % np.uint64(size)) for v in pair) for pair in (header[1:3], header[3:5]))
    if int(header[6] & np.uint64(1)):
      image[y0:y1 + 1, x0:x1 + 1] = [int((header[5] >> np.uint64(8 * j)) & np.uint64(255)) for j in range(3)]
    noise = (bits(f'img:{name}:{i}:noise', size * size * 3) >> np.uint64(40)).astype(np.int64) % 49 - 24
    out[i] = np.clip(image + noise.reshape(size, size, 3), 0, 255)
  return out


def _upsample(low, size):
  """Bilinear in integers: [g, g, c] -> [size, size, c]."""
  g = len(low)
  at = np.arange(size, dtype=np.int64) * (g - 1) * 256 // (size - 1)
  i = np.minimum(at // 256, g - 2)
  f = at - i * 256
  rows = low[i] * (256 - f)[:, None, None] + low[i + 1] * f[:, None, None]
  return (rows[:, i] * (256 - f)[None, :, None] + rows[:, i + 1] * f[None, :, None]) // 65536
