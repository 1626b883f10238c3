"""Which noise schedule is best, by how much, and how sure? On handwritten digits, for two cores of a CPU.

Eight schedules x {eps, v}, and EDM as published: 16 runs, equal in everything but the schedule and the target. The
README says what is held equal and why. Larger scales: cifar10_jpeg.py and cifar10.py, the same RUNS.
"""
import re

import optax

from diffusion_jax.core import diffusion, ema, levels, losses, samplers, schedules, targets
from diffusion_jax.model import default_config
from diffusion_jax.nets import unet
from diffusion_jax.runtime.config import Config, choose, spec

SCHEDULES = {
    'linear': spec(schedules.linear),
    'cosine': spec(schedules.cosine),
    'sigmoid': spec(schedules.sigmoid),
    'laplace': spec(schedules.laplace),
    'flow': spec(schedules.rectified_flow),
    'edm': spec(schedules.karras),
    'shifted': spec(schedules.shifted, process='cosine_continuous', shift=2.0),
    'zero-snr': spec(schedules.zero_terminal_snr, process='linear'),
}
# {run: (schedule, target)}. Without zero-snr-eps: where nothing is left of the data, its noise says nothing of it.
RUNS = {f'{schedule}-{target}': (schedule, target) for schedule in SCHEDULES for target in ('eps', 'v')
        if (schedule, target) != ('zero-snr', 'eps')} | {'edm-published': ('edm', 'edm')}
SEEDS = (0, 1, 2)
EVALUATE = ['--ema=main', '--num=500']


def compared(run: str) -> Config:
  """The config of 'RUN' or 'RUN-sSEED' with what all scales share; data, net and durations are the scale's."""
  name, seed = re.fullmatch(r'(.*?)(?:-s(\d+))?', run).groups()
  schedule, target = choose(RUNS, name)
  config = default_config()
  config.seed = int(seed or 0)
  config.process = SCHEDULES[schedule].copy_and_resolve_references()
  config.target = spec(getattr(targets, target))
  config.noise = spec(diffusion.timestep)
  config.draw = spec(levels.low_discrepancy)
  config.weight = spec(losses.simple)
  if schedule == 'edm':  # its schedule is this draw: karras is but the range and the grid
    config.draw = spec(levels.lognormal)
  if name == 'edm-published':
    config.noise, config.weight = spec(diffusion.log_sigma), spec(losses.edm)
  config.optimizer = spec(optax.adam)
  # One grid of levels for all, within what each was trained on: sampling is equal, what differs is training.
  config.sample.sampler = spec(samplers.dpmpp_2m)
  config.sample.grid = spec(levels.karras, sigma_min=0.02, sigma_max=80.0)
  config.sample.steps = 25
  return config


def get_config(run='cosine-v'):
  config = compared(run)
  config.data.source = 'digits'
  config.net = spec(unet.UNet, channels=16, multipliers=(1, 2), blocks=1, attention=(), dropout=0.0, groups=8,
                    num_classes=10)
  config.learning_rate.update({'peak': 4e-3, 'warmup_images': 1_600, 'decay': 'cosine'})
  config.ema.main = spec(ema.constant, decay=0.99)
  config.mesh.data = 1  # one device compiles faster, and points run side by side
  images = 16_000
  config.train.update({'images': images, 'batch_size': 64, 'log_every': 1_600, 'sample_every': images,
                       'checkpoint_every': images})
  config.sample.batch_size = 100
  config.eval.update({'num_samples': 500, 'features': 'digits'})
  return config
