"""The comparison of sweep.py on CIFAR-10 coded as JPEG, for one GPU. Not the CIFAR-10 that papers report on.

The environment variable CIFAR10_JPEG names the folder with train.npz and test.npz (`image` uint8 [N, 32, 32, 3] and
`label` [N]); without it, data/cifar10_jpeg. Scores are fd_cifar: they compare with each other, and with no paper.
"""
import os

from diffusion_jax.core import ema
from diffusion_jax.nets import unet
from diffusion_jax.runtime.config import spec
from experiments.noise_schedules import sweep

RUNS, SEEDS = sweep.RUNS, sweep.SEEDS
EVALUATE = ['--ema=main', '--num=10000']


def get_config(run='cosine-v'):
  config = sweep.compared(run)
  config.data.update({'source': f'npz:{os.environ.get("CIFAR10_JPEG") or "data/cifar10_jpeg"}', 'flip': True})
  config.net = spec(unet.UNet, channels=64, multipliers=(1, 2, 2, 2), blocks=2, attention=(16,), dropout=0.1,
                    dtype='bfloat16')
  config.learning_rate.update({'peak': 4e-4, 'warmup_images': 128_000, 'decay': 'cosine'})
  config.ema.main = spec(ema.constant, decay=0.9995)
  images = 5_120_000  # 40,000 steps
  config.train.update({'images': images, 'batch_size': 128, 'steps_per_call': 10, 'log_every': 128_000,
                       'sample_every': images, 'checkpoint_every': 1_280_000})
  config.sample.batch_size = 500
  config.eval.update({'num_samples': 10_000, 'features': 'cifar'})
  return config
