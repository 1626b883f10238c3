"""CLIP's text encoder: transformers' CLIPTextModel and CLIPTextModelWithProjection <-> nets/clip.py."""
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.convert import names
from diffusion_jax.nets.clip import ACTIVATIONS, CLIPText

CLASSES = ('CLIPTextModel', 'CLIPTextModelWithProjection')
PREFIX = 'text_model.'
# transformers writes only what differs from these (CLIPTextConfig).
DEFAULTS = {'vocab_size': 49_408, 'hidden_size': 512, 'intermediate_size': 2048, 'projection_dim': 512,
            'num_hidden_layers': 12, 'num_attention_heads': 8, 'max_position_embeddings': 77,
            'hidden_act': 'quick_gelu', 'layer_norm_eps': 1e-5, 'eos_token_id': 49_407}
FIELDS = {'vocabulary': 'vocab_size', 'width': 'hidden_size', 'mlp': 'intermediate_size', 'depth': 'num_hidden_layers',
          'heads': 'num_attention_heads', 'length': 'max_position_embeddings', 'activation': 'hidden_act',
          'epsilon': 'layer_norm_eps', 'end': 'eos_token_id'}
LAYER = {'layer_norm1': 'norm_0', 'self_attn.q_proj': 'query', 'self_attn.k_proj': 'key', 'self_attn.v_proj': 'value',
         'self_attn.out_proj': 'out', 'layer_norm2': 'norm_1', 'mlp.fc1': 'mlp_in', 'mlp.fc2': 'mlp_out'}


def net(config: Mapping[str, Any], where: str = 'the config of CLIP') -> CLIPText:
  """The network of a config.json; UserError for one that cannot be converted."""
  config = {**DEFAULTS, **config}
  names.only(config, {'hidden_act': tuple(ACTIVATIONS)}, where)
  projected = 'CLIPTextModelWithProjection' in (config.get('architectures') or ())
  return CLIPText(**{ours: config[theirs] for ours, theirs in FIELDS.items()},
                  projection=config['projection_dim'] if projected else 0)


def config(net: CLIPText) -> dict[str, Any]:
  """The config.json of a network."""
  return {'architectures': [CLASSES[bool(net.projection)]], 'model_type': 'clip_text_model',
          **{theirs: getattr(net, ours) for ours, theirs in FIELDS.items()},
          **({'projection_dim': net.projection} if net.projection else {})}


def table(net: CLIPText) -> dict[str, str]:
  """{their module: our path}, without the prefix 'text_model.'."""
  result = {'embeddings.token_embedding': 'tokens', 'embeddings.position_embedding': 'positions',
            'final_layer_norm': 'norm', 'text_projection': 'projection'}
  for i in range(net.depth):
    result |= names.parts(f'encoder.layers.{i}', f'block_{i}', LAYER)
  return result


def shapes(net: CLIPText) -> dict:
  return names.shapes(net, jax.ShapeDtypeStruct((1, net.length), jnp.int32))


def from_theirs(net: CLIPText, tensors: Mapping[str, np.ndarray], where: str = 'the file of CLIP') -> dict:
  """Our parameters; names may begin with 'text_model.' or not, and the table of places that old files hold is no
  parameter. UserError as in names.from_theirs.
  """
  tensors = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
  tensors.pop('embeddings.position_ids', None)
  return names.from_theirs(table(net), tensors, shapes(net), where)


def to_theirs(net: CLIPText, params: Mapping[str, Any], dtype: Any = np.float32,
              prefix: str = PREFIX) -> dict[str, np.ndarray]:
  """Their tensors; the projection lies beside the encoder, and has no prefix."""
  tensors = names.to_theirs(table(net), params, dtype)
  return {key if key.startswith('text_projection') else prefix + key: tensor for key, tensor in tensors.items()}
