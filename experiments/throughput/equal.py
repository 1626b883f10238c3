"""The same network on both sides: ours, with random weights, written as a folder that the other library loads."""
import math
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from diffusion_jax.convert import autoencoder, clip, files, names, unet2d, unet_condition
from diffusion_jax.nets import autoencoder as autoencoder_net
from diffusion_jax.nets import clip as clip_net
from diffusion_jax.nets import dit, edm2, text_unet, unet
from experiments.throughput import cases
from experiments.throughput.cases import Case, Net

FAMILIES = {'ddpm': unet.UNet, 'adm': unet.ADM, 'ddpmpp': unet.DDPMpp, 'text': text_unet.TextUNet, 'dit': dit.DiT,
            'edm2': edm2.UNet, 'autoencoder': autoencoder_net.AutoencoderKL, 'clip': clip_net.CLIPText}


def module(net: Net, dtype: str = 'float32') -> nn.Module:
  """Our network."""
  return FAMILIES[net.family](**net.options, dtype=dtype)


def call(net: nn.Module, work: str) -> Callable[[Any, Mapping[str, Any]], jax.Array]:
  """(params, inputs of `cases.inputs`) -> the output that is compared."""
  def run(params, given):
    more = {k: v for k, v in given.items() if k not in ('x', 'noise', 'ids')}
    apply = lambda *a, **how: net.apply({'params': params}, *a, **how)
    if work in ('encode', 'decode'):
      found = apply(given['x'], method=work)
      return found.mean if work == 'encode' else found
    if 'ids' in given:
      return apply(given['ids']).text
    return apply(given['x'], given['noise'], more)
  return run


def shapes(net: nn.Module, case: Case) -> dict:
  """The tree of the parameters' shapes, for the inputs of a case."""
  given = cases.inputs(case)
  if case.work in ('encode', 'decode'):
    return autoencoder.shapes(net)
  arguments = (given['ids'],) if 'ids' in given else (
      given['x'], given['noise'], {k: v for k, v in given.items() if k not in ('x', 'noise')})
  return names.shapes(net, *jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments))


def random_params(tree: Mapping[str, Any]) -> dict:
  """Random float32 arrays for a tree of shapes. Nothing is zero, as some layers are at initialisation: all counts."""
  found = {}
  for path, leaf in flax.traverse_util.flatten_dict(tree).items():
    x = np.random.default_rng(zlib.crc32('/'.join(path).encode())).random(leaf.shape, np.float32) * 2 - 1
    if path[-1] == 'kernel':
      x *= math.sqrt(3 / math.prod(leaf.shape[:-1]))  # keeps the variance
    elif path[-1] == 'scale':
      x = 1 + 0.2 * x
    else:
      x *= 0.2
    found[path] = x
  return flax.traverse_util.unflatten_dict(found)


def write(folder: pathlib.Path, net: nn.Module, about: Net, params: Mapping[str, Any] | None) -> bool:
  """Writes config.json, and the weights if there are any; False for a family that the other side does not have."""
  if about.family in ('ddpm', 'adm'):
    config, convert = unet2d.config(net, about.size, about.channels), unet2d.to_theirs
  elif about.family == 'text':
    config, convert = unet_condition.config(net, about.size, about.channels), unet_condition.to_theirs
  elif about.family == 'autoencoder':
    config, convert = autoencoder.config(net, about.size), autoencoder.to_theirs
  elif about.family == 'clip':
    config, convert = clip.config(net), clip.to_theirs
  elif about.family == 'dit' and net.num_classes:
    config, convert = dit_config(net, about.size, about.channels), dit_to_theirs
  else:
    return False
  tensors = convert(net, params) if params is not None else {}
  files.write(folder, config, tensors, files.STEMS[about.family == 'clip'])
  return True


def dit_config(net: dit.DiT, size: int, channels: int) -> dict[str, Any]:
  """Of diffusers' DiTTransformer2DModel."""
  return {'_class_name': 'DiTTransformer2DModel', 'num_attention_heads': net.heads,
          'attention_head_dim': net.width // net.heads, 'in_channels': channels, 'out_channels': channels,
          'num_layers': net.depth, 'sample_size': size, 'patch_size': net.patch, 'num_embeds_ada_norm': net.num_classes,
          'attention_bias': True, 'norm_eps': 1e-6}


def dit_to_theirs(net: dit.DiT, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Our DiT by the names of diffusers', in which every block has its own copy of the embedding."""
  params = jax.tree.map(np.asarray, dict(params))
  patches = params['patches']
  kernel = patches['embed']['kernel'].reshape(net.patch, net.patch, -1, net.width)
  embedding = {'timestep_embedder.linear_1': params['embed']['in'],
               'timestep_embedder.linear_2': params['embed']['out'],
               'class_embedder.embedding_table': params['embed_label']}
  modules = {'pos_embed.proj': {'kernel': kernel, 'bias': patches['embed']['bias']},
             'proj_out_1': params['head']['modulation'], 'proj_out_2': params['head']['out']}
  table = {'query': 'attn1.to_q', 'key': 'attn1.to_k', 'value': 'attn1.to_v', 'out': 'attn1.to_out.0',
           'modulation': 'norm1.linear', 'mlp_in': 'ff.net.0.proj', 'mlp_out': 'ff.net.2'}
  for i in range(net.depth):
    block = f'transformer_blocks.{i}'
    modules |= {f'{block}.{theirs}': params[f'block_{i}'][ours] for ours, theirs in table.items()}
    modules |= {f'{block}.norm1.emb.{name}': leaves for name, leaves in embedding.items()}
  return {f'{name}.{names.LEAVES[leaf]}': np.ascontiguousarray(
      np.moveaxis(a, (-1, -2), (0, 1)) if leaf == 'kernel' else a)
      for name, leaves in modules.items() for leaf, a in leaves.items()}
