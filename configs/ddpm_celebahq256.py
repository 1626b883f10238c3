"""DDPM at 256 x 256 (Ho et al. 2020): 113,673,219 parameters; CelebA-HQ takes 500,000 steps of 64 images.

Reach: the paper gives no FID for CelebA-HQ; its LSUN Bedroom run of this net reaches 6.36 (table 3). Reached: not run.
"""
import optax

from diffusion_jax.core import ema, levels, samplers, schedules, targets
from diffusion_jax.model import default_config
from diffusion_jax.nets import unet
from diffusion_jax.runtime.config import spec


def get_config():
  config = default_config()
  config.data.update({'source': 'folder:data/celebahq256', 'size': 256, 'flip': True})
  config.process = spec(schedules.linear)
  config.target = spec(targets.eps)
  config.net = spec(unet.UNet, channels=128, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention=(16,), dropout=0.0)
  config.optimizer = spec(optax.adam)
  config.learning_rate.update({'peak': 2e-5, 'warmup_images': 5_000 * 64, 'decay': 'constant'})
  config.ema.main = spec(ema.constant, decay=0.9999)
  config.train.update({'images': 500_000 * 64, 'batch_size': 64, 'sample_every': 640_000, 'checkpoint_every': 640_000})
  config.sample.sampler = spec(samplers.ancestral, variance=1.0)
  config.sample.grid = spec(levels.timesteps)
  config.sample.update({'steps': 1000, 'batch_size': 16})
  config.eval.update({'features': 'inception', 'held_out': ''})
  return config
