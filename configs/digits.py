"""Handwritten digits, 8x8, in a minute on two cores.

Reach: digits that anyone can read. Reached: see the README's table.
Runs: '' (conditional on the digit), 'uncond'.
"""
import optax

from diffusion_jax.core import ema, levels, samplers, schedules, targets
from diffusion_jax.model import default_config
from diffusion_jax.nets import unet
from diffusion_jax.runtime.config import choose, spec

RUNS = {'': 10, 'uncond': 0}


def get_config(run=''):
  config = default_config()
  config.data.source = 'digits'
  config.process = spec(schedules.cosine)
  config.target = spec(targets.eps)
  config.draw = spec(levels.low_discrepancy)
  config.net = spec(unet.UNet, channels=16, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.0, groups=8,
                    num_classes=choose(RUNS, run))
  config.optimizer = spec(optax.adam)
  config.learning_rate.update({'peak': 4e-3, 'warmup_images': 3_200, 'decay': 'cosine'})
  config.ema.main = spec(ema.constant, decay=0.995)
  config.train.update({'images': 51_200, 'batch_size': 64, 'log_every': 3_200, 'sample_every': 12_800,
                       'checkpoint_every': 12_800})
  config.sample.sampler = spec(samplers.ddim)
  config.sample.update({'steps': 50, 'batch_size': 100})
  config.eval.update({'num_samples': 500, 'features': 'digits'})
  return config
