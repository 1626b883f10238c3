"""Your own pictures, 32 x 32: give the folder with --config.data.source=folder:PATH.

Reach: no number; look at the samples. Runs: '' (pictures as they come), 'flip' (mirrored too: not for text or digits).
"""
import optax

from diffusion_jax.core import ema, samplers, schedules, targets
from diffusion_jax.model import default_config
from diffusion_jax.nets import unet
from diffusion_jax.runtime.config import choose, spec

RUNS = {'': False, 'flip': True}


def get_config(run=''):
  config = default_config()
  config.data.update({'source': 'folder:images', 'size': 32, 'flip': choose(RUNS, run)})
  config.process = spec(schedules.cosine)
  config.target = spec(targets.v)
  config.net = spec(unet.UNet, channels=64, multipliers=(1, 2, 2), blocks=2, attention=(8,), dropout=0.1)
  config.optimizer = spec(optax.adam)
  config.learning_rate.update({'peak': 4e-4, 'warmup_images': 64_000, 'decay': 'cosine'})
  config.ema.main = spec(ema.half_life, images=100_000)
  config.train.update({'images': 6_400_000, 'batch_size': 64, 'log_every': 6_400, 'sample_every': 64_000,
                       'checkpoint_every': 64_000})
  config.sample.sampler = spec(samplers.dpmpp_2m)
  config.sample.steps = 25
  config.eval.update({'num_samples': 2_000, 'held_out': ''})
  return config
