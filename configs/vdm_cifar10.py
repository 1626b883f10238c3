"""Variational diffusion on CIFAR-10 (Kingma et al. 2021): a U-Net that never halves, 10,000,000 steps of 128 images.

Reach: 2.64 bits/dim without augmentation (public checkpoint 2.637: `diffusion-jax likelihood
--estimator=continuous_vlb`). Reached: not run.
Recipe of the public code. Differs: pictures lie on the 256 values of [-1, 1] and not half a bin inside, the schedule is
the paper's monotone network where the public config learns its two ends alone, and weight decay spares no biases.
"""
import optax

from diffusion_jax.core import diffusion, ema, levels, losses, samplers, schedules, targets
from diffusion_jax.model import default_config
from diffusion_jax.nets import variational
from diffusion_jax.runtime.config import spec


def get_config():
  config = default_config()
  config.data.update({'source': 'tfds:cifar10', 'size': 32, 'flip': False})
  config.process = spec(schedules.learned, logsnr_min=-5.0, logsnr_max=13.3)
  config.target = spec(targets.eps)
  config.noise = spec(diffusion.log_sigma, scale=2000 / 18.3)  # a thousand over the schedule's first range
  config.draw = spec(levels.low_discrepancy)
  config.weight = spec(losses.vlb)
  config.net = spec(variational.VDM, dropout=0.1)
  config.optimizer = spec(optax.adamw, b2=0.99, weight_decay=0.01)
  config.learning_rate.update({'peak': 2e-4, 'warmup_images': 100 * 128, 'decay': 'constant'})
  config.clip_norm = 0.0
  config.ema.main = spec(ema.constant, decay=0.9999, warmup=False)
  config.train.update({'images': 10_000_000 * 128, 'batch_size': 128, 'sample_every': 12_800_000,
                       'checkpoint_every': 12_800_000})
  config.sample.sampler = spec(samplers.ancestral)
  config.sample.grid = spec(levels.timesteps)
  config.sample.update({'steps': 1000, 'clip': False, 'batch_size': 128})
  config.eval.features = 'inception'
  return config
