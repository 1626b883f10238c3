"""The FID Inception in torch.nn, the baseline of our features: eager, float32, nothing folded or fused by hand.

Names are those of the PyTorch port, so that both sides take the same state dict.
"""
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

SIZE = 299


class Conv(nn.Module):
  """Convolution without bias, batch normalisation by the running statistics, ReLU."""

  def __init__(self, inputs, outputs, kernel=1, stride=1, padded=True):
    super().__init__()
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = [k // 2 if padded and stride == 1 else 0 for k in kernel]
    self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
    self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

  def forward(self, x):
    return F.relu(self.bn(self.conv(x)), inplace=True)


def average_pool(x):
  """The mean of the neighbours that exist."""
  return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max_pool(x):
  """The maximum of the neighbours that exist."""
  return F.max_pool2d(x, 3, 1, 1)


class Block(nn.ModuleDict):
  """Convolutions by name, each with its outputs, kernel and stride; the links of a chain follow each other."""

  def __init__(self, inputs, **layers):
    super().__init__()
    chains = {}
    for name, layer in layers.items():
      chain = name[:-1] if name[-1] in 'ab' else name  # both halves of a split take what came before them
      before = chains.get(chain.rpartition('_')[0], inputs)
      self[name] = Conv(before, *layer)
      if name[-1] != 'a':
        chains[chain.rpartition('_')[0]] = layer[0]

  def chain(self, prefix, x):
    """prefix_1, prefix_2, ... one after the other."""
    i = 1
    while f'{prefix}_{i}' in self:
      x = self[f'{prefix}_{i}'](x)
      i += 1
    return x


class Block35(Block):
  """Mixed_5b to 5d."""

  def __init__(self, inputs, width):
    super().__init__(inputs, branch1x1=(64,), branch5x5_1=(48,), branch5x5_2=(64, 5), branch3x3dbl_1=(64,),
                     branch3x3dbl_2=(96, 3), branch3x3dbl_3=(96, 3), branch_pool=(width,))

  def forward(self, x):
    return torch.cat([self['branch1x1'](x), self.chain('branch5x5', x), self.chain('branch3x3dbl', x),
                      self['branch_pool'](average_pool(x))], 1)


class To17(Block):
  """Mixed_6a."""

  def __init__(self, inputs):
    super().__init__(inputs, branch3x3=(384, 3, 2), branch3x3dbl_1=(64,), branch3x3dbl_2=(96, 3),
                     branch3x3dbl_3=(96, 3, 2))

  def forward(self, x):
    return torch.cat([self['branch3x3'](x), self.chain('branch3x3dbl', x), F.max_pool2d(x, 3, 2)], 1)


class Block17(Block):
  """Mixed_6b to 6e."""

  def __init__(self, inputs, width):
    row, column = (1, 7), (7, 1)
    super().__init__(inputs, branch1x1=(192,), branch7x7_1=(width,), branch7x7_2=(width, row),
                     branch7x7_3=(192, column), branch7x7dbl_1=(width,), branch7x7dbl_2=(width, column),
                     branch7x7dbl_3=(width, row), branch7x7dbl_4=(width, column), branch7x7dbl_5=(192, row),
                     branch_pool=(192,))

  def forward(self, x):
    return torch.cat([self['branch1x1'](x), self.chain('branch7x7', x), self.chain('branch7x7dbl', x),
                      self['branch_pool'](average_pool(x))], 1)


class To8(Block):
  """Mixed_7a."""

  def __init__(self, inputs):
    super().__init__(inputs, branch3x3_1=(192,), branch3x3_2=(320, 3, 2), branch7x7x3_1=(192,),
                     branch7x7x3_2=(192, (1, 7)), branch7x7x3_3=(192, (7, 1)), branch7x7x3_4=(192, 3, 2))

  def forward(self, x):
    return torch.cat([self.chain('branch3x3', x), self.chain('branch7x7x3', x), F.max_pool2d(x, 3, 2)], 1)


class Block8(Block):
  """Mixed_7b and 7c, which differ in their pool."""

  def __init__(self, inputs, pool):
    super().__init__(inputs, branch1x1=(320,), branch3x3_1=(384,), branch3x3_2a=(384, (1, 3)),
                     branch3x3_2b=(384, (3, 1)), branch3x3dbl_1=(448,), branch3x3dbl_2=(384, 3),
                     branch3x3dbl_3a=(384, (1, 3)), branch3x3dbl_3b=(384, (3, 1)), branch_pool=(192,))
    self.pool = pool

  def forward(self, x):
    y, z = self.chain('branch3x3', x), self.chain('branch3x3dbl', x)
    return torch.cat([self['branch1x1'](x), self['branch3x3_2a'](y), self['branch3x3_2b'](y),
                      self['branch3x3dbl_3a'](z), self['branch3x3dbl_3b'](z), self['branch_pool'](self.pool(x))], 1)


class Inception(nn.Module):
  """images uint8 [N, H, W, 3] -> {name: float32 [N, ...]}, all that our network gives."""

  def __init__(self):
    super().__init__()
    stem = {'1a_3x3': (3, 32, 3, 2), '2a_3x3': (32, 32, 3, 1, False), '2b_3x3': (32, 64, 3), '3b_1x1': (64, 80),
            '4a_3x3': (80, 192, 3, 1, False)}
    for name, layer in stem.items():
      self.add_module(f'Conv2d_{name}', Conv(*layer))
    blocks = {'5b': Block35(192, 32), '5c': Block35(256, 64), '5d': Block35(288, 64), '6a': To17(288),
              '6b': Block17(768, 128), '6c': Block17(768, 160), '6d': Block17(768, 160), '6e': Block17(768, 192),
              '7a': To8(768), '7b': Block8(1280, average_pool), '7c': Block8(2048, max_pool)}
    for name, block in blocks.items():
      self.add_module(f'Mixed_{name}', block)
    self.blocks, self.fc = list(blocks), nn.Linear(2048, 1008)

  def forward(self, images):
    mean = lambda x: x.mean((2, 3))
    x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(prepare(images))))
    x = F.max_pool2d(x, 3, 2)
    out = {'64': mean(x)}
    x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
    out['192'] = mean(x)
    for name in self.blocks:
      x = getattr(self, f'Mixed_{name}')(x)
      if name == '6d':
        out['sfid'] = x[:, :7].permute(0, 2, 3, 1).flatten(1)
      if name == '6e':
        out['768'] = mean(x)
    out['2048'] = x = mean(x)
    logits = F.linear(x, self.fc.weight)
    return out | {'logits': logits + self.fc.bias, 'logits_unbiased': logits}


def prepare(images: torch.Tensor) -> torch.Tensor:
  """uint8 [N, H, W, 3] -> float32 [N, 3, 299, 299], channels last in memory, in [-1, 1); resized as in TensorFlow 1."""
  x = images.float()
  for axis in (2, 1):
    length = x.shape[axis]
    at = np.arange(SIZE, dtype=np.float32) * np.float32(length / SIZE)
    low = at.astype(np.int64)
    a, b = (x.index_select(axis, torch.from_numpy(i)) for i in (low, np.minimum(low + 1, length - 1)))
    x = torch.lerp(a, b, torch.from_numpy(at % 1).reshape((-1,) + (1,) * (3 - axis)))
  return x.sub_(128).div_(128).permute(0, 3, 1, 2)
