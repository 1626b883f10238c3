"""EDM2-S on ImageNet at 64 x 64 (Karras et al. 2024): 1,024 Mi images in batches of 2,048.

Reach: FID 1.58 with labels and without guidance, 63 network evaluations, of the average of width 0.075 (table 3;
`posthoc_ema --std=0.075`; the lowest of three times 50,000 samples: `evaluate --seeds=0-2`). Reached: not run.
The paper computes in float16, this in bfloat16; u(level) of the loss is not normalised here. data/imagenet64 holds a
folder for each class, of pictures scaled and cropped as the paper's.
"""
import optax

from diffusion_jax.core import diffusion, ema, levels, losses, samplers, schedules, targets
from diffusion_jax.model import default_config
from diffusion_jax.nets import edm2
from diffusion_jax.runtime.config import spec

MI = 2 ** 20


def get_config():
  config = default_config()
  config.data.update({'source': 'folder:data/imagenet64', 'size': 64, 'flip': False})
  config.process = spec(schedules.karras)
  config.target = spec(targets.edm)
  config.noise = spec(diffusion.log_sigma)
  config.draw = spec(levels.lognormal, mean=-0.8, std=1.6)
  config.weight = spec(losses.learned_uncertainty)
  config.net = spec(edm2.UNet, channels=edm2.CHANNELS['s'], dropout=0.0, num_classes=1000, dtype='bfloat16')
  config.label_dropout = 0.0
  config.optimizer = spec(optax.adam, b2=0.99, eps=1e-8 / (64 * 64 * 3))  # the paper's loss is a sum over the image
  config.learning_rate.update({'peak': 0.0100, 'warmup_images': 10_000_000, 'decay': 'inverse_sqrt',
                               'steady_images': 35_000 * 2048})
  config.clip_norm = 0.0
  config.ema.main = spec(ema.power_function, std=0.05)
  config.ema.wide = spec(ema.power_function, std=0.1)
  config.train.update({'images': 1024 * MI, 'batch_size': 2048, 'sample_every': 32 * MI, 'snapshot_every': 8 * MI,
                       'checkpoint_every': 128 * MI})
  config.sample.sampler = spec(samplers.heun)
  config.sample.grid = spec(levels.karras)
  config.sample.update({'steps': 32, 'clip': False, 'batch_size': 64})
  config.eval.update({'features': 'inception', 'held_out': ''})
  return config
