"""The U-Nets of DDPM and ADM: diffusers' UNet2DModel <-> nets/unet.py."""
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.convert import names
from diffusion_jax.nets.unet import ADM, UNet
from diffusion_jax.runtime.config import UserError

CLASSES = ('UNet2DModel',)
# What both networks are among those that this class can be; the first value is diffusers' own.
FIXED = {'center_input_sample': (False,), 'time_embedding_type': ('positional',), 'mid_block_scale_factor': (1,),
         'act_fn': ('silu',), 'add_attention': (True,), 'class_embed_type': (None,),
         'mid_block_type': ('UNetMidBlock2D',)}
# What each is; a config must say it.
OWN = {
    UNet: {'resnet_time_scale_shift': ('default',), 'freq_shift': (1,), 'flip_sin_to_cos': (False,),
           'downsample_padding': (0,), 'norm_eps': (1e-6,), 'attention_head_dim': (None,)},
    ADM: {'resnet_time_scale_shift': ('scale_shift',), 'freq_shift': (0,), 'flip_sin_to_cos': (True,),
          'norm_eps': (1e-5,), 'downsample_type': ('resnet',), 'upsample_type': ('resnet',)},
}
# DDPM's, which is also diffusers' own.
SILENT = {'downsample_type': ('conv',), 'upsample_type': ('conv',), 'attn_norm_num_groups': (None,)}


def net(config: Mapping[str, Any], where: str = 'the config of UNet2DModel') -> UNet | ADM:
  """The network of a config.json; UserError for one that cannot be converted.

  Of `num_class_embeds` labels, the last is the null class of DDPM's; ADM's null class has no number.
  """
  family = ADM if config.get('resnet_time_scale_shift') == 'scale_shift' else UNet
  config = {'resnet_time_scale_shift': 'default', **config}
  names.only({key: names.get(config, key, where) for key in OWN[family]}, OWN[family], where)
  groups = config.get('norm_num_groups') or 32
  # Where the embedding scales, diffusers' middle attention has no norm unless the config names its groups.
  names.only({'attn_norm_num_groups': None, **config}, FIXED | (
      {'attn_norm_num_groups': (groups,)} if family is ADM else SILENT), where)
  channels, size = names.get(config, 'block_out_channels', where), names.get(config, 'sample_size', where)
  down, up = names.get(config, 'down_block_types', where), names.get(config, 'up_block_types', where)
  attends = [kind == 'AttnDownBlock2D' for kind in down]
  names.only({'down_block_types': list(down), 'up_block_types': list(up)}, {
      'down_block_types': (_kinds('Down', attends, family),), 'up_block_types': (_kinds('Up', attends[::-1], family),)},
      where)
  size = max(size) if isinstance(size, (list, tuple)) else size
  inputs, outputs = config.get('in_channels', 3), config.get('out_channels', 3)
  names.only({'out_channels': outputs}, {'out_channels': (inputs, 2 * inputs)}, where)
  if any(c % channels[0] for c in channels):
    raise UserError(f'{where}: block_out_channels must be multiples of the first, got {list(channels)}')
  labels = config.get('num_class_embeds') or 0
  own = {'head_channels': names.get(config, 'attention_head_dim', where) or 0} if family is ADM else {}
  return family(
      channels=channels[0], multipliers=tuple(c // channels[0] for c in channels),
      blocks=config.get('layers_per_block', 2), groups=groups,
      attention=tuple(size >> level for level, attended in enumerate(attends) if attended),
      dropout=config.get('dropout', 0.0), num_classes=labels if family is ADM else max(labels - 1, 0),
      variance=outputs != inputs, **own)


def config(net: UNet | ADM, size: int, channels: int = 3) -> dict[str, Any]:
  """The config.json of a network for images of size x size with `channels`.

  Raises UserError for a network that is no UNet2DModel: of another family, or with inputs of images or augmentation.
  """
  family = type(net)
  more = {key: getattr(net, key, 0) for key in ('image', 'augment')}
  if family not in OWN or any(more.values()):
    raise UserError(f'a network can be written as UNet2DModel if it is of {" or ".join(f.__name__ for f in OWN)} '
                    f'without image or augment, got {family.__name__}, image {more["image"]}, '
                    f'augment {more["augment"]}')
  attends = [size >> level in net.attention for level in range(len(net.multipliers))]
  own = {'attention_head_dim': net.head_channels or None, 'attn_norm_num_groups': net.groups} if family is ADM else {}
  labels = net.num_classes + (family is UNet) if net.num_classes else None
  return {'_class_name': 'UNet2DModel', 'sample_size': size, 'in_channels': channels,
          'out_channels': channels * (1 + net.variance), 'down_block_types': _kinds('Down', attends, family),
          'up_block_types': _kinds('Up', attends[::-1], family), 'layers_per_block': net.blocks, 'dropout': net.dropout,
          'block_out_channels': [net.channels * m for m in net.multipliers], 'norm_num_groups': net.groups,
          'num_class_embeds': labels,
          **{key: values[0] for key, values in (SILENT | FIXED | OWN[family]).items()}, **own}


def table(net: UNet, attention: Callable[[int], Mapping[str, str]] = lambda level: names.ATTENTION) -> dict[str, str]:
  """{their module: our path}; attention: the names in it at a level. Theirs counts levels from the smallest on the
  way up, ours from the largest.
  """
  last = len(net.multipliers) - 1
  result = {'conv_in': 'conv_in', 'time_embedding.linear_1': 'embed_in', 'time_embedding.linear_2': 'embed_out',
            'class_embedding': 'embed_label', 'conv_norm_out': 'norm_out', 'conv_out': 'conv_out'}
  result |= names.parts('mid_block.attentions.0', 'middle_attention', attention(last))
  for i in range(2):
    result |= names.parts(f'mid_block.resnets.{i}', f'middle_block_{i}', names.RESNET)
  for level in range(last + 1):
    for theirs, ours in ((f'down_blocks.{level}', f'down_{level}'), (f'up_blocks.{last - level}', f'up_{level}')):
      for i in range(net.blocks + 1):
        result |= names.parts(f'{theirs}.resnets.{i}', f'{ours}_block_{i}', names.RESNET)
        result |= names.parts(f'{theirs}.attentions.{i}', f'{ours}_attention_{i}', attention(level))
      resampler = 'downsample' if theirs.startswith('down') else 'upsample'
      result[f'{theirs}.{resampler}rs.0.conv'] = f'{ours}_{resampler}'
      result |= names.parts(f'{theirs}.{resampler}rs.0', f'{ours}_{resampler}', names.RESNET)  # if blocks resample
  return result


def shapes(net: UNet | ADM, size: int, channels: int = 3) -> dict:
  """For images of size x size: at which levels there is attention depends on it."""
  image = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
  one = jax.ShapeDtypeStruct((1,), jnp.float32)
  return names.shapes(net, image, one, {'label': jax.ShapeDtypeStruct((1,), jnp.int32)})


def from_theirs(net: UNet | ADM, tensors: Mapping[str, np.ndarray], size: int, channels: int = 3,
                where: str = 'the file of UNet2DModel') -> dict:
  """Our parameters; the names that attention had before diffusers 0.18 are known too. UserError as in names."""
  return names.from_theirs(table(net), names.of_today(tensors), shapes(net, size, channels), where)


def to_theirs(net: UNet | ADM, params: Mapping[str, Any], dtype: Any = np.float32) -> dict[str, np.ndarray]:
  return names.to_theirs(table(net), params, dtype)


def _kinds(way, attends, family):
  plain = f'Resnet{way}sampleBlock2D' if family is ADM else f'{way}Block2D'
  return [f'Attn{way}Block2D' if attended else plain for attended in attends]
