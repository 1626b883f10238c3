"""Improved DDPM's ablations: linear against cosine, and three objectives, on CIFAR-10 and ImageNet 64 x 64.

Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", tables 1 and 2. What they reach, beside the
paper's numbers (CELLS): `python -m experiments.ddpm_paper.reproduce --paper=iddpm`.
"""
import math
import re

from configs import ddpm_cifar10
from diffusion_jax.core import levels, losses, samplers, schedules
from diffusion_jax.nets import unet
from diffusion_jax.runtime.config import choose, spec
from experiments.ddpm_paper.cells import Cell

ROWS = ('1k-linear-simple', '4k-linear-simple', '4k-linear-hybrid', '4k-cosine-simple', '4k-cosine-hybrid',
        '4k-cosine-vlb')
STEPS = {'cifar10': 500_000, 'imagenet64': 200_000, 'imagenet64-long': 1_500_000}
# {run: (data, steps of the chain, schedule, objective)}
RUNS = {f'{data}-{row}': (data, *row.split('-')) for data in STEPS for row in ROWS
        if data != 'imagenet64-long' or row in ROWS[-2:]}
SEEDS = (0,)  # as in the paper
EVALUATE = ['--ema=main', '--num=50000']


def get_config(run='cifar10-4k-cosine-hybrid'):
  name, seed = re.fullmatch(r'(.*?)(?:-s(\d+))?', run).groups()
  data, chain, schedule, objective = choose(RUNS, name)
  config, T = ddpm_cifar10.get_config(), {'1k': 1000, '4k': 4000}[chain]
  config.seed = int(seed or 0)
  if schedule == 'cosine':
    config.process = spec(schedules.cosine, num_steps=T)
  else:  # the same betas per unit of time
    config.process = spec(schedules.linear, num_steps=T, beta_start=0.1 / T, beta_end=20.0 / T)
  config.net.update({'blocks': 3, 'dropout': 0.3})
  if objective == 'simple':
    config.sample.sampler = spec(samplers.ancestral, variance=1.0)
  else:
    config.net.variance = True
    config.sample.sampler = spec(samplers.ancestral_learned, kind='range')
  if objective == 'hybrid':
    config.weight = spec(losses.hybrid)
  if objective == 'vlb':  # log 2: both parts in nats, as they are in L
    config.weight = spec(losses.hybrid, weight='vlb', scale=math.log(2))
    config.draw = spec(levels.importance)
  if data != 'cifar10':
    config.data.update({'source': 'tfds:downsampled_imagenet/64x64', 'size': 64, 'flip': False})
    config.net = spec(unet.UNet, channels=128, multipliers=(1, 2, 3, 4), blocks=3, attention=(16, 8), dropout=0.0,
                      variance=config.net.variance)
    config.eval.held_out = 'validation'
  config.learning_rate.update({'peak': 1e-4, 'warmup_images': 0, 'decay': 'constant'})
  config.clip_norm = 0.0
  config.train.images = STEPS[data] * 128
  config.sample.steps = T
  return config


# {data: (table, NLL and FID of each row)}
PAPER = {
    'cifar10': ('iDDPM table 2, CIFAR-10, 500K', (
        (3.73, 3.29), (3.37, 2.90), (3.26, 3.07), (3.26, 3.05), (3.17, 3.19), (2.94, 11.47))),
    'imagenet64': ('iDDPM table 1, ImageNet 64, 200K', (
        (3.99, 32.5), (3.77, 31.3), (3.66, 32.2), (3.68, 27.0), (3.62, 28.0), (3.57, 56.7))),
    'imagenet64-long': ('iDDPM table 1, ImageNet 64, 1.5M', ((3.57, 19.2), (3.53, 40.1))),
}


def _cells():
  for data, (table, values) in PAPER.items():
    for run, (nll, fid) in zip([run for run in RUNS if RUNS[run][0] == data], values, strict=True):
      words, split = ', '.join(RUNS[run][1:]), 'test' if data == 'cifar10' else 'validation'
      yield Cell(table, words, 'NLL', nll, run, 'bits_per_dim_discrete_vlb', {'split': split})
      yield Cell(table, words, 'FID', fid, run, 'fid', {'steps': {'1k': 1000, '4k': 4000}[RUNS[run][1]]})


CELLS = tuple(_cells())
