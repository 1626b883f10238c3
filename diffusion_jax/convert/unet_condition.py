"""The U-Net of Stable Diffusion 1, 2 and XL: diffusers' UNet2DConditionModel <-> nets/text_unet.py."""
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.convert import names, unet2d
from diffusion_jax.nets.text_unet import TextUNet
from diffusion_jax.runtime.config import UserError

CLASSES = ('UNet2DConditionModel',)
# What Stable Diffusion's networks are among those that this class can be; the first value is diffusers' own.
FIXED = {'center_input_sample': (False,), 'flip_sin_to_cos': (True,), 'freq_shift': (0,),
         'mid_block_type': ('UNetMidBlock2DCrossAttn',), 'only_cross_attention': (False,), 'downsample_padding': (1,),
         'mid_block_scale_factor': (1,), 'act_fn': ('silu', 'swish'), 'norm_eps': (1e-5,),
         'reverse_transformer_layers_per_block': (None,), 'encoder_hid_dim': (None,), 'encoder_hid_dim_type': (None,),
         'num_attention_heads': (None,), 'dual_cross_attention': (False,), 'class_embed_type': (None,),
         'num_class_embeds': (None,), 'resnet_time_scale_shift': ('default',), 'resnet_skip_time_act': (False,),
         'resnet_out_scale_factor': (1.0,), 'time_embedding_type': ('positional',), 'time_embedding_dim': (None,),
         'time_embedding_act_fn': (None,), 'timestep_post_act': (None,), 'time_cond_proj_dim': (None,),
         'conv_in_kernel': (3,), 'conv_out_kernel': (3,), 'attention_type': ('default',),
         'class_embeddings_concat': (False,), 'mid_block_only_cross_attention': (None,),
         'cross_attention_norm': (None,)}
BLOCK = {'norm1': 'norm_0', 'norm2': 'norm_1', 'norm3': 'norm_2', 'ff.net.0.proj': 'ff_in', 'ff.net.2': 'ff_out',
         **{f'attn{number}.{theirs}': f'{kind}/{ours}' for number, kind in ((1, 'self'), (2, 'cross'))
            for theirs, ours in names.ATTENTION.items() if ours != 'norm'}}
SIZE_CHANNELS = 256  # by which each of SDXL's six sizes is told


def net(config: Mapping[str, Any], where: str = 'the config of UNet2DConditionModel') -> TextUNet:
  """The network of a config.json; UserError for one that cannot be converted.

  Input channels beyond those of the output are cond['image'], as for inpainting.
  """
  names.only(config, FIXED, where)
  channels = names.get(config, 'block_out_channels', where)
  levels, down = len(channels), list(names.get(config, 'down_block_types', where))
  reads = [kind == 'CrossAttnDownBlock2D' for kind in down]
  names.only({'down_block_types': down, 'up_block_types': list(names.get(config, 'up_block_types', where))}, {
      'down_block_types': (_kinds('Down', reads),), 'up_block_types': (_kinds('Up', reads[::-1]),)}, where)
  depth = config.get('transformer_layers_per_block', 1)
  depth = [depth] * levels if isinstance(depth, int) else list(depth)
  heads = config.get('attention_head_dim', 8)  # a misnomer that cannot be mended any more
  inputs, outputs = config.get('in_channels', 4), config.get('out_channels', 4)
  added = config.get('addition_embed_type')
  names.only({'addition_embed_type': added}, {'addition_embed_type': (None, 'text_time')}, where)
  for ok, message in [
      (not any(c % channels[0] for c in channels),
       f'block_out_channels must be multiples of the first, got {list(channels)}'),
      (inputs >= outputs, f'in_channels must be at least out_channels, got {inputs} and {outputs}'),
      (all(isinstance(n, int) for n in depth), f'transformer_layers_per_block must be one number a level, got {depth}'),
      (isinstance(config.get('layers_per_block', 2), int), 'layers_per_block must be one number'),
      (reads[-1] or depth[-1] == 1, f'a last level without text must have one transformer layer, got {depth[-1]}'),
  ]:
    if not ok:
      raise UserError(f'{where}: {message}')
  return TextUNet(
      channels=channels[0], multipliers=tuple(c // channels[0] for c in channels),
      blocks=config.get('layers_per_block', 2), groups=config.get('norm_num_groups', 32),
      dropout=config.get('dropout', 0.0), depth=tuple(n * read for n, read in zip(depth, reads, strict=True)),
      heads=heads if isinstance(heads, int) else tuple(heads), text=config.get('cross_attention_dim', 1280),
      vector=names.get(config, 'projection_class_embeddings_input_dim', where) if added else 0, image=inputs - outputs)


def config(net: TextUNet, size: int, channels: int = 4, linear: bool = False) -> dict[str, Any]:
  """The config.json of a network for latents of size x size with `channels`; linear: see `to_theirs`."""
  reads = [n > 0 for n in net.depth]
  added = {'addition_embed_type': 'text_time', 'addition_time_embed_dim': SIZE_CHANNELS,
           'projection_class_embeddings_input_dim': net.vector} if net.vector else {}
  return {'_class_name': 'UNet2DConditionModel', 'sample_size': size, 'in_channels': channels + net.image,
          'out_channels': channels, 'down_block_types': _kinds('Down', reads),
          'up_block_types': _kinds('Up', reads[::-1]),
          'block_out_channels': [net.channels * m for m in net.multipliers], 'layers_per_block': net.blocks,
          'dropout': net.dropout, 'norm_num_groups': net.groups, 'cross_attention_dim': net.text,
          'transformer_layers_per_block': [max(n, 1) for n in net.depth],
          'attention_head_dim': net.heads if isinstance(net.heads, int) else list(net.heads),
          'use_linear_projection': linear, **added, **{key: values[0] for key, values in FIXED.items()}}


def table(net: TextUNet) -> dict[str, str]:
  """{their module: our path}."""
  def attention(level):
    result = {'norm': 'norm', 'proj_in': 'in', 'proj_out': 'out'}
    for i in range(max(net.depth[level], 1)):
      result |= {f'transformer_blocks.{i}.{theirs}': f'block_{i}/{ours}' for theirs, ours in BLOCK.items()}
    return result
  return unet2d.table(net, attention) | {'add_embedding.linear_1': 'embed_vector_in',
                                         'add_embedding.linear_2': 'embed_vector_out'}


def shapes(net: TextUNet, channels: int = 4) -> dict:
  size = 2 ** (len(net.multipliers) - 1)
  image, noise, text, vector, concatenated = (jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in (
      (size, size, channels), (), (1, net.text), (net.vector,), (size, size, net.image)))
  return names.shapes(net, image, noise, {'text': text, 'vector': vector, 'image': concatenated})


def from_theirs(net: TextUNet, tensors: Mapping[str, np.ndarray], channels: int = 4,
                where: str = 'the file of UNet2DConditionModel') -> dict:
  """Our parameters for latents with `channels`; UserError as in names.from_theirs."""
  flat = {key: tensor.reshape(tensor.shape[:2]) if _projects(key) and tensor.shape[2:] == (1, 1) else tensor
          for key, tensor in tensors.items()}
  return names.from_theirs(table(net), flat, shapes(net, channels), where)


def to_theirs(net: TextUNet, params: Mapping[str, Any], dtype: Any = np.float32,
              linear: bool = False) -> dict[str, np.ndarray]:
  """Their tensors; linear: whether transformers begin and end with matrices, as in Stable Diffusion 2 and XL, or with
  pointwise convolutions, as in 1 (use_linear_projection in their config).
  """
  tensors = names.to_theirs(table(net), params, dtype)
  return {key: tensor[..., None, None] if _projects(key) and not linear else tensor for key, tensor in tensors.items()}


def _projects(key):
  return key.endswith(('.proj_in.weight', '.proj_out.weight'))


def _kinds(way, reads):
  return [f'CrossAttn{way}Block2D' if one else f'{way}Block2D' for one in reads]
