"""diffusers' U-Nets as our trees of parameters."""
import re
import zlib

import numpy as np

NAMES = [
    (r'time_embedding\.linear_1', 'embed_in'), (r'time_embedding\.linear_2', 'embed_out'),
    (r'add_embedding\.linear_1', 'embed_vector_in'), (r'add_embedding\.linear_2', 'embed_vector_out'),
    ('conv_norm_out', 'norm_out'),
    (r'mid_block\.attentions\.0', 'middle_attention'), (r'mid_block\.resnets\.(\d)', r'middle_block_\1'),
    (r'(down|up)_blocks\.(\d)\.(down|up)samplers\.0(\.conv\b)?', r'\1_\2_\3sample'),
    (r'(down|up)_blocks\.(\d)\.resnets\.(\d)', r'\1_\2_block_\3'),
    (r'(down|up)_blocks\.(\d)\.attentions\.(\d)', r'\1_\2_attention_\3'),
    (r'\btransformer_blocks\.(\d)', r'block_\1'), (r'\bproj_(in|out)\b', r'\1'),
    (r'\bff\.net\.0\.proj', 'ff_in'), (r'\bff\.net\.2', 'ff_out'), (r'\battn1', 'self'), (r'\battn2', 'cross'),
    (r'\bnorm([123])\b', lambda match: f'norm_{int(match[1]) - 1}'),
    (r'\bconv([12])\b', lambda match: f'conv_{int(match[1]) - 1}'),
    (r'\btime_emb_proj', 'embed'), (r'\bconv_shortcut', 'shortcut'), (r'\.group_norm', '.norm'),
    (r'\.to_q', '.query'), (r'\.to_k', '.key'), (r'\.to_v', '.value'), (r'\.to_out\.0', '.out')]


def ours(key, levels):
  """The path in our tree of a key of diffusers' U-Net with so many levels."""
  for pattern, name in NAMES:
    key = re.sub(pattern, name, key)
  # diffusers counts the way up from the smallest level, we name levels by their size on both ways.
  return tuple(re.sub(r'^up_(\d)', lambda match: f'up_{levels - 1 - int(match[1])}', key).split('.'))


def converted(weights, levels):
  """diffusers' tensors as our tree: NCHW kernels to channels last, linear ones transposed, 1x1 ones to linear."""
  tree = {}
  for key, tensor in weights.items():
    if key == 'class_embedding.weight':
      tree['embed_label'] = tensor
      continue
    *path, kind = ours(key, levels)
    if kind == 'weight':
      kind = 'scale' if tensor.ndim == 1 else 'kernel'
      tensor = tensor.transpose({1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}[tensor.ndim])
      if path[-1] in ('in', 'out'):
        tensor = tensor.reshape(tensor.shape[-2:])
    node = tree
    for name in path:
      node = node.setdefault(name, {})
    node[kind] = tensor
  return tree


def remade(lines, prefix):
  """The random weights that a fixture was made with, from its lines 'key:3,4,5': {key: tensor}."""
  made = {}
  for line in lines:
    key, _, shape = str(line).partition(':')
    shape = tuple(map(int, shape.split(',')))
    noise = np.random.RandomState(zlib.crc32(f'{prefix}.{key}'.encode())).standard_normal(shape)
    noise = noise / np.sqrt(max(np.prod(shape[1:]), 1))
    made[key] = (1 + 0.1 * noise if 'norm' in key and key.endswith('weight') else noise).astype(np.float32)
  return made


def last(a):
  """Channels last."""
  return a.transpose(0, 2, 3, 1)
