"""ADM on ImageNet at 64 x 64 (Dhariwal & Nichol 2021): 295,904,454 parameters, 540,000 steps of 2,048 images.

Reach: FID 2.07, precision 0.74 and recall 0.63 with labels and without guidance, 50,000 samples of 250 steps (table 5).
Reached: not run.
Recipe of table 11. The paper computes in float16, this in bfloat16. data/imagenet64 holds a folder for each class, of
pictures scaled and cropped as the paper's.
"""
import optax

from diffusion_jax.core import diffusion, ema, levels, losses, samplers, schedules, targets
from diffusion_jax.model import default_config
from diffusion_jax.nets import unet
from diffusion_jax.runtime.config import spec


def get_config():
  config = default_config()
  config.data.update({'source': 'folder:data/imagenet64', 'size': 64, 'flip': True})
  config.process = spec(schedules.cosine)
  config.target = spec(targets.eps)
  config.noise = spec(diffusion.timestep)
  config.draw = spec(levels.uniform)
  config.weight = spec(losses.hybrid)
  config.net = spec(unet.ADM, channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8),
                    head_channels=64, dropout=0.1, num_classes=1000, variance=True, dtype='bfloat16')
  config.label_dropout = 0.0
  config.optimizer = spec(optax.adam)
  config.learning_rate.update({'peak': 3e-4, 'warmup_images': 0, 'decay': 'constant'})
  config.clip_norm = 0.0
  config.ema.main = spec(ema.constant, decay=0.9999, warmup=False)
  config.train.update({'images': 540_000 * 2048, 'batch_size': 2048, 'sample_every': 20_480_000,
                       'checkpoint_every': 20_480_000})
  config.sample.sampler = spec(samplers.ancestral_learned)
  config.sample.grid = spec(levels.timesteps)
  config.sample.update({'steps': 250, 'batch_size': 128})
  config.eval.update({'features': 'inception', 'held_out': ''})
  return config
