"""The ControlNet of Stable Diffusion 1, 2 and XL: diffusers' ControlNetModel <-> nets/controlnet.py."""
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.convert import names, unet_condition
from diffusion_jax.nets.controlnet import ControlNet
from diffusion_jax.runtime.config import UserError

CLASSES = ('ControlNetModel',)
FIXED = {'controlnet_conditioning_channel_order': ('rgb',), 'global_pool_conditions': (False,)}
# What its config says of the encoder, as that of UNet2DConditionModel does.
SHARED = ('in_channels', 'flip_sin_to_cos', 'freq_shift', 'down_block_types', 'mid_block_type', 'only_cross_attention',
          'block_out_channels', 'layers_per_block', 'downsample_padding', 'mid_block_scale_factor', 'act_fn',
          'norm_num_groups', 'norm_eps', 'cross_attention_dim', 'transformer_layers_per_block', 'encoder_hid_dim',
          'encoder_hid_dim_type', 'attention_head_dim', 'num_attention_heads', 'use_linear_projection',
          'class_embed_type', 'addition_embed_type', 'addition_time_embed_dim', 'num_class_embeds',
          'resnet_time_scale_shift', 'projection_class_embeddings_input_dim')


def net(config: Mapping[str, Any], channels: int = 4, where: str = 'the config of ControlNetModel') -> ControlNet:
  """The ControlNet of a config.json for latents with `channels`; UserError for one that cannot be converted.

  Input channels beyond those of the latents are cond['image'], as for inpainting.
  """
  names.only(config, FIXED, where)
  if config.get('in_channels', 4) < channels:
    raise UserError(f'{where}: in_channels must be at least the {channels} of the latents, got {config["in_channels"]}')
  reads = [kind == 'CrossAttnDownBlock2D' for kind in names.get(config, 'down_block_types', where)]
  widths = config.get('conditioning_embedding_out_channels', (16, 32, 96, 256))
  if not isinstance(widths, (list, tuple)) or not widths:
    raise UserError(f'{where}: conditioning_embedding_out_channels must be a list of numbers, got {widths!r}')
  unet = {**config, 'out_channels': channels, 'up_block_types': unet_condition._kinds('Up', reads[::-1])}
  return ControlNet(unet_condition.net(unet, where), hint=config.get('conditioning_channels', 3), widths=tuple(widths))


def config(net: ControlNet, channels: int = 4, linear: bool = False) -> dict[str, Any]:
  """The config.json of a ControlNet for latents with `channels`; linear: see `to_theirs`. It does not hold dropout."""
  unet = unet_condition.config(net.net, 0, channels, linear)
  return {'_class_name': 'ControlNetModel', **{key: unet[key] for key in SHARED if key in unet},
          'conditioning_channels': net.hint, 'conditioning_embedding_out_channels': list(net.widths),
          **{key: values[0] for key, values in FIXED.items()}}


def table(net: ControlNet) -> dict[str, str]:
  """{their module: our path}."""
  hint, levels = 'controlnet_cond_embedding', len(net.net.multipliers)
  result = {theirs: f'encoder/{ours}' for theirs, ours in unet_condition.table(net.net).items()}
  result |= {f'{hint}.conv_in': 'hint_in/in', f'{hint}.conv_out': 'hint_in/out', 'controlnet_mid_block': 'middle'}
  result |= {f'{hint}.blocks.{i}': f'hint_in/conv_{i}' for i in range(2 * (len(net.widths) - 1))}
  # The first convolution, the blocks, and between two levels the change of size.
  return result | {f'controlnet_down_blocks.{i}': f'skip_{i}' for i in range(levels * (net.net.blocks + 1))}


def shapes(net: ControlNet, channels: int = 4) -> dict:
  """Of the parameters for latents with `channels`."""
  size = 2 ** (len(net.net.multipliers) - 1)
  hint = size * 2 ** (len(net.widths) - 1)
  image, noise, text, vector, concatenated, hint = (jax.ShapeDtypeStruct((1, *shape), jnp.float32) for shape in (
      (size, size, channels), (), (1, net.net.text), (net.net.vector,), (size, size, net.net.image),
      (hint, hint, net.hint)))
  return names.shapes(net, image, noise, {'text': text, 'vector': vector, 'image': concatenated, 'hint': hint})


def from_theirs(net: ControlNet, tensors: Mapping[str, np.ndarray], channels: int = 4,
                where: str = 'the file of ControlNetModel') -> dict:
  """Our parameters for latents with `channels`; UserError as in names.from_theirs."""
  pointwise = lambda key, tensor: unet_condition._projects(key) and tensor.shape[2:] == (1, 1)
  flat = {key: tensor[..., 0, 0] if pointwise(key, tensor) else tensor for key, tensor in tensors.items()}
  return names.from_theirs(table(net), flat, shapes(net, channels), where)


def to_theirs(net: ControlNet, params: Mapping[str, Any], dtype: Any = np.float32,
              linear: bool = False) -> dict[str, np.ndarray]:
  """Their tensors; linear: as in unet_condition.to_theirs."""
  tensors = names.to_theirs(table(net), params, dtype)
  return {key: tensor[..., None, None] if unet_condition._projects(key) and not linear else tensor
          for key, tensor in tensors.items()}
