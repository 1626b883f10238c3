"""Tiny pipelines of diffusers as folders, with random weights: made here, since nothing can be fetched."""
import itertools
import json

import numpy as np
from nets import filled

from diffusion_jax.convert import autoencoder, clip, files, tokenizer, unet2d, unet_condition
from diffusion_jax.nets.autoencoder import AutoencoderKL
from diffusion_jax.nets.clip import CLIPText
from diffusion_jax.nets.text_unet import TextUNet
from diffusion_jax.nets.unet import UNet

END = '</w>'
STEM = 'diffusion_pytorch_model'
WORDS = ['cat', 'hat', 'photo', 'the']
CHAIN = {'_class_name': 'DDIMScheduler', 'num_train_timesteps': 1000, 'beta_schedule': 'linear', 'beta_start': 1e-4,
         'beta_end': 0.02, 'clip_sample': True, 'set_alpha_to_one': True, 'prediction_type': 'epsilon',
         'timestep_spacing': 'leading', 'steps_offset': 0}
# Stable Diffusion 1's.
LATENT = {**CHAIN, 'beta_schedule': 'scaled_linear', 'beta_start': 0.00085, 'beta_end': 0.012, 'clip_sample': False,
          'set_alpha_to_one': False, 'steps_offset': 1}


def write_tokenizer(folder):
  """CLIP's files with a few words as tokens; returns how many tokens there are."""
  letters = sorted(tokenizer.ALPHABET)
  merges = []
  for word in WORDS:
    parts = [*word[:-1], word[-1] + END]
    while len(parts) > 1:
      merges.append((parts[0], parts[1]))
      parts[:2] = [''.join(parts[:2])]
  merges = list(dict.fromkeys(merges))
  tokens = [*letters, *(c + END for c in letters), *map(''.join, merges), '<|startoftext|>', '<|endoftext|>']
  folder.mkdir(parents=True)
  (folder / 'vocab.json').write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
  (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *map(' '.join, merges), '']))
  special = {'bos_token': '<|startoftext|>', 'eos_token': '<|endoftext|>', 'unk_token': '<|endoftext|>',
             'pad_token': '<|endoftext|>'}
  (folder / 'tokenizer_config.json').write_text(json.dumps(
      {'tokenizer_class': 'CLIPTokenizer', 'model_max_length': 77, **special}))
  (folder / 'special_tokens_map.json').write_text(json.dumps(special))
  return len(tokens)


def _index(folder, kind, parts):
  (folder / 'model_index.json').write_text(json.dumps({'_class_name': kind, '_diffusers_version': '0.35.0', **parts}))


def _scheduler(folder, config):
  (folder / 'scheduler').mkdir()
  (folder / 'scheduler' / 'scheduler_config.json').write_text(json.dumps(config))


def unconditional(folder):
  """A DDIMPipeline of 8x8 images."""
  net = UNet(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), groups=4, dropout=0.0)
  folder.mkdir()
  files.write(folder / 'unet', unet2d.config(net, 8), unet2d.to_theirs(net, filled(unet2d.shapes(net, 8))), STEM)
  _scheduler(folder, CHAIN)
  _index(folder, 'DDIMPipeline', {'unet': ['diffusers', 'UNet2DModel'], 'scheduler': ['diffusers', 'DDIMScheduler']})
  return folder


def text_to_image(folder):
  """A StableDiffusionPipeline of 16x16 images, with latents of half the size."""
  folder.mkdir()
  count = write_tokenizer(folder / 'tokenizer')
  net = TextUNet(channels=8, multipliers=(1, 2), blocks=1, groups=4, depth=(1, 0), heads=2, text=12)
  vae = AutoencoderKL(channels=(4, 8), blocks=1, groups=2)
  text = CLIPText(vocabulary=count, width=12, depth=2, heads=2, mlp=16, end=count - 1)
  seeds = itertools.count()
  new = lambda shapes: filled(shapes, next(seeds))
  files.write(folder / 'unet', unet_condition.config(net, 8), unet_condition.to_theirs(
      net, new(unet_condition.shapes(net))), STEM)
  files.write(folder / 'vae', autoencoder.config(vae, 16), autoencoder.to_theirs(vae, new(autoencoder.shapes(vae))),
              STEM)
  files.write(folder / 'text_encoder', clip.config(text), clip.to_theirs(text, new(clip.shapes(text))), 'model')
  _scheduler(folder, LATENT)
  _index(folder, 'StableDiffusionPipeline', {
      'unet': ['diffusers', 'UNet2DConditionModel'], 'vae': ['diffusers', 'AutoencoderKL'],
      'text_encoder': ['transformers', 'CLIPTextModel'], 'tokenizer': ['transformers', 'CLIPTokenizer'],
      'scheduler': ['diffusers', 'DDIMScheduler'], 'safety_checker': [None, None], 'feature_extractor': [None, None],
      'image_encoder': [None, None], 'requires_safety_checker': False})
  return folder


def tensors(folder):
  """{'unet/name': array} of every network of a folder."""
  found = {}
  for path in sorted(folder.rglob('*.safetensors')):
    found |= {f'{path.parent.name}/{key}': np.array(a) for key, a in files.read_safetensors(path).items()}
  return found
