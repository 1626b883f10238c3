"""DDPM on CIFAR-10 (Ho et al. 2020): 35,746,307 parameters, 800,000 steps of 128 images.

Reach: FID 3.17 and Inception score 9.46 against the training set, 50,000 samples (table 1). Reached: not run.
Runs: '' (the paper's data, tfds:cifar10, which prepares itself), 'arrays' (data.source=npz:FOLDER with train.npz and
test.npz of the same shape, given on the command line).
"""
import optax

from diffusion_jax.core import diffusion, ema, levels, losses, samplers, schedules, targets
from diffusion_jax.model import default_config
from diffusion_jax.nets import unet
from diffusion_jax.runtime.config import choose, spec

RUNS = {'': 'tfds:cifar10', 'arrays': 'npz:data'}


def get_config(run=''):
  config = default_config()
  config.data.update({'source': choose(RUNS, run), 'size': 32, 'flip': True})
  config.process = spec(schedules.linear)
  config.target = spec(targets.eps)
  config.noise = spec(diffusion.timestep)
  config.draw = spec(levels.uniform)
  config.weight = spec(losses.simple)
  config.net = spec(unet.UNet, channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1)
  config.optimizer = spec(optax.adam)
  config.learning_rate.update({'peak': 2e-4, 'warmup_images': 5_000 * 128, 'decay': 'constant'})
  config.ema.main = spec(ema.constant, decay=0.9999)
  config.train.update({'images': 800_000 * 128, 'batch_size': 128})
  config.sample.sampler = spec(samplers.ancestral, variance=1.0)
  config.sample.grid = spec(levels.timesteps)
  config.sample.update({'steps': 1000, 'batch_size': 256})
  config.eval.features = 'cifar' if run == 'arrays' else 'inception'
  return config
