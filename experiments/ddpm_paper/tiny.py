"""The rows of sweep.py as a minute's exercise on handwritten digits: does every row train, sample and score?

Another data set, net and budget than the papers': no number here compares with theirs. The chain keeps its 1000 steps.
"""
from diffusion_jax.core import ema
from diffusion_jax.nets import unet
from diffusion_jax.runtime.config import spec
from experiments.ddpm_paper import sweep

RUNS = {run: parts for run, parts in sweep.RUNS.items() if run != 'celeba'}
SEEDS = (0,)
EVALUATE = ['--ema=main', '--num=200']
CELLS = sweep.CELLS
METRICS = {'fid': 'fd_digits', 'is': ''}


def get_config(run='eps-simple'):
  return shrunk(sweep.get_config(run))


def shrunk(config):
  """A config of a paper on digits and in a small net, in place."""
  config.data.update({'source': 'digits', 'size': 0, 'flip': False})
  config.net = spec(unet.UNet, channels=16, multipliers=(1, 2), blocks=1, attention=(4,), dropout=0.0, groups=8,
                    variance=config.net.variance)
  images = 12_800
  config.learning_rate.update({'peak': 2e-3, 'warmup_images': 1_280, 'decay': 'cosine'})
  config.clip_norm = 1.0
  config.ema.main = spec(ema.constant, decay=0.99)
  config.train.update({'images': images, 'batch_size': 64, 'log_every': 3_200, 'sample_every': images,
                       'checkpoint_every': images})
  config.sample.batch_size = 100
  config.eval.update({'num_samples': 200, 'features': 'digits', 'held_out': 'test'})
  return config
