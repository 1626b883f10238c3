"""The autoencoder of latent diffusion: diffusers' AutoencoderKL <-> nets/autoencoder.py."""
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.convert import names
from diffusion_jax.nets.autoencoder import AutoencoderKL

CLASSES = ('AutoencoderKL',)
FIXED = {'act_fn': ('silu',), 'mid_block_add_attention': (True,), 'latents_mean': (None,), 'latents_std': (None,)}
DOWN, UP = 'DownEncoderBlock2D', 'UpDecoderBlock2D'


def net(config: Mapping[str, Any], where: str = 'the config of AutoencoderKL') -> AutoencoderKL:
  """The network of a config.json; UserError for one that cannot be converted."""
  channels = tuple(names.get(config, 'block_out_channels', where))
  blocks = {'down_block_types': ([DOWN] * len(channels),), 'up_block_types': ([UP] * len(channels),)}
  names.only({**config, **{key: list(config[key]) for key in blocks if key in config}}, {**FIXED, **blocks}, where)
  names.only(config, {'out_channels': (config.get('in_channels', 3),)}, where)
  return AutoencoderKL(
      channels=channels, blocks=config.get('layers_per_block', 1), latent=config.get('latent_channels', 4),
      outputs=config.get('in_channels', 3), groups=config.get('norm_num_groups', 32),
      scaling=config.get('scaling_factor', 0.18215), shift=config.get('shift_factor') or 0.0,
      quant=config.get('use_quant_conv', True), post_quant=config.get('use_post_quant_conv', True))


def config(net: AutoencoderKL, sample_size: int = 512) -> dict[str, Any]:
  """The config.json of a network, whose images are usually of `sample_size`."""
  levels = len(net.channels)
  return {'_class_name': 'AutoencoderKL', 'in_channels': net.outputs, 'out_channels': net.outputs,
          'down_block_types': [DOWN] * levels, 'up_block_types': [UP] * levels,
          'block_out_channels': list(net.channels), 'layers_per_block': net.blocks, 'act_fn': 'silu',
          'latent_channels': net.latent, 'norm_num_groups': net.groups, 'sample_size': sample_size,
          'scaling_factor': net.scaling, 'shift_factor': net.shift or None, 'use_quant_conv': net.quant,
          'use_post_quant_conv': net.post_quant}


def table(net: AutoencoderKL) -> dict[str, str]:
  """{their module: our path}. Theirs counts the decoder's levels from the smallest, ours from the largest."""
  last = len(net.channels) - 1
  result = {'quant_conv': 'quantise', 'post_quant_conv': 'dequantise'}
  for part in ('encoder', 'decoder'):
    result |= names.parts(part, part, {'conv_in': 'conv_in', 'conv_norm_out': 'norm_out', 'conv_out': 'conv_out'})
    result |= names.parts(f'{part}.mid_block.attentions.0', f'{part}/middle_attention', names.ATTENTION)
    for i in range(2):
      result |= names.parts(f'{part}.mid_block.resnets.{i}', f'{part}/middle_block_{i}', names.RESNET)
  for level in range(last + 1):
    down, up = f'encoder.down_blocks.{level}', f'decoder.up_blocks.{last - level}'
    for i in range(net.blocks + 1):
      result |= names.parts(f'{down}.resnets.{i}', f'encoder/down_{level}_block_{i}', names.RESNET)
      result |= names.parts(f'{up}.resnets.{i}', f'decoder/up_{level}_block_{i}', names.RESNET)
    result[f'{down}.downsamplers.0.conv'] = f'encoder/down_{level}_downsample'
    result[f'{up}.upsamplers.0.conv'] = f'decoder/up_{level}_upsample'
  return result


def shapes(net: AutoencoderKL) -> dict:
  size = 2 ** (len(net.channels) - 1)
  return names.shapes(net, jax.ShapeDtypeStruct((1, size, size, net.outputs), jnp.float32))


def from_theirs(net: AutoencoderKL, tensors: Mapping[str, np.ndarray],
                where: str = 'the file of AutoencoderKL') -> dict:
  """Our parameters; the names that attention had before diffusers 0.18 are known too. UserError as in names."""
  return names.from_theirs(table(net), names.of_today(tensors), shapes(net), where)


def to_theirs(net: AutoencoderKL, params: Mapping[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
  return names.to_theirs(table(net), params, dtype)
