"""A small text-to-image pipeline of Stable Diffusion 1's parts: text encoder, U-Net with guidance, autoencoder.

It is written as a folder of diffusers', which the other side loads, and converted as our sample command needs it.
"""
import itertools
import pathlib

import jax
import numpy as np

from diffusion_jax import bridge, sample, topology
from diffusion_jax import model as model_lib
from diffusion_jax.convert import autoencoder, clip, files, tokenizer, unet_condition
from diffusion_jax.core import samplers
from diffusion_jax.generator import Generator
from diffusion_jax.nets.autoencoder import AutoencoderKL
from diffusion_jax.nets.clip import CLIPText
from diffusion_jax.nets.text_unet import TextUNet
from diffusion_jax.runtime import command, log
from experiments.throughput import cases, equal
from experiments.throughput.jax_side import counted, prepared
from experiments.throughput.worker import Job, Prepared, repeat

NOISE = 'noise.npy'  # of the images that are compared, channels first
# Stable Diffusion 1's.
SCHEDULER = {'_class_name': 'DDIMScheduler', 'num_train_timesteps': 1000, 'beta_schedule': 'scaled_linear',
             'beta_start': 0.00085, 'beta_end': 0.012, 'clip_sample': False, 'set_alpha_to_one': False,
             'steps_offset': 1, 'prediction_type': 'epsilon', 'timestep_spacing': 'leading'}


def write_tokenizer(folder: pathlib.Path) -> int:
  """CLIP's files with a token for each byte, within a word and at its end; how many tokens there are."""
  letters = sorted(tokenizer.ALPHABET)
  tokens = [*letters, *(c + tokenizer.END_OF_WORD for c in letters), *dict.fromkeys(tokenizer.SPECIAL.values())]
  log.write_json(folder / 'vocab.json', {token: i for i, token in enumerate(tokens)})
  log.write(folder / 'merges.txt', '#version: 0.2\n')
  log.write_json(folder / 'tokenizer_config.json', {'tokenizer_class': 'CLIPTokenizer',
                                                    'model_max_length': tokenizer.LENGTH, **tokenizer.SPECIAL})
  log.write_json(folder / 'special_tokens_map.json', tokenizer.SPECIAL)
  return len(tokens)


def write(folder: pathlib.Path, size: int, unet: dict, vae: dict, text: dict) -> None:
  """A StableDiffusionPipeline of size x size images with random weights; the options are those of our modules."""
  count = write_tokenizer(folder / 'tokenizer')
  encoder = CLIPText(**text, vocabulary=count, end=count - 1)
  net, codec = TextUNet(**unet, text=encoder.width), AutoencoderKL(**vae)
  latents = size // 2 ** (len(codec.channels) - 1)
  parts = {'unet': (unet_condition, net, unet_condition.config(net, latents)),
           'vae': (autoencoder, codec, autoencoder.config(codec, size)),
           'text_encoder': (clip, encoder, clip.config(encoder))}
  for name, (convert, module, config) in parts.items():
    params = equal.random_params(convert.shapes(module))
    files.write(folder / name, config, convert.to_theirs(module, params), files.STEMS[name == 'text_encoder'])
  log.write_json(folder / 'scheduler' / 'scheduler_config.json', SCHEDULER)
  classes = {'unet': ('diffusers', 'UNet2DConditionModel'), 'vae': ('diffusers', 'AutoencoderKL'),
             'text_encoder': ('transformers', 'CLIPTextModel'), 'tokenizer': ('transformers', 'CLIPTokenizer'),
             'scheduler': ('diffusers', 'DDIMScheduler')}
  absent = dict.fromkeys(('safety_checker', 'feature_extractor', 'image_encoder'), (None, None))
  log.write_json(folder / 'model_index.json', {
      '_class_name': 'StableDiffusionPipeline', '_diffusers_version': '0.35.0', 'requires_safety_checker': False,
      **classes, **absent})


def draw(job: Job) -> Prepared:
  """The sample command on the converted folder: prompts to uint8 images."""
  case, theirs, workdir = job.case, job.folder / 'theirs', job.folder / 'ours'
  write(theirs, **(cases.PIPELINE | dict(case.changes)))
  bridge.from_pipeline(theirs, workdir)
  p = command.parser('sample', '')
  sample.add_flags(p)
  flags, _ = p.parse([f'--workdir={workdir}', f'--steps={case.steps}', f'--batch_size={case.batch}',
                      f'--guidance={cases.GUIDANCE}'])
  trained, config = sample.open_run(flags)
  generator = Generator(trained.model, config, flags.seed, trained.mesh, negative=cases.NEGATIVE)
  generator.compile(trained.params)
  first, prompts = range(case.batch), [cases.PROMPT] * case.batch
  np.save(job.folder / NOISE, noise(generator, trained.model, flags.seed, first))
  ids = (range(start, start + case.batch) for start in itertools.count(0, case.batch))
  with topology.as_if_on('tpu'):
    work = counted(generator.trace(trained.params))
  params = {name: trained.params[name] for name in ('net', 'codec', 'text')}
  return prepared(params, repeat(lambda: generator(trained.params, next(ids), prompts)), generator.compile_seconds,
                  trained.mesh, flops=work,
                  outputs={'images': cases.shown(generator(trained.params, first, prompts))})


def noise(generator: Generator, model: model_lib.Model, seed: int, ids: range) -> np.ndarray:
  """Where samples begin, [n, C, *S]."""
  keys = jax.vmap(lambda i: jax.random.fold_in(model_lib.key(seed, 'sample'), i))(np.asarray(ids))
  x = samplers.prior(keys, model.shape, jax.tree.map(lambda a: a[0], generator.grid))
  return np.moveaxis(np.asarray(x), -1, 1)
