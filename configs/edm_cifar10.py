"""EDM on CIFAR-10 (Karras et al. 2022, config F): 55,733,891 parameters, 200 million images in batches of 512.

Reach: FID 1.97 without and 1.79 with labels, NCSN++ 1.98 and 1.79, 35 network evaluations (table 2, row F; the lowest
of three times 50,000 samples: `evaluate --seeds=0-2`). Reached: not run.
Runs: '' (DDPM++), 'cond' (with labels), 've' and 've_cond' (NCSN++).
Differs: augmented images are resampled by other filters (data/augment.py), and gradients that are not finite end the
run, where the paper's code replaces them.
"""
import optax

from diffusion_jax.core import diffusion, ema, levels, losses, samplers, schedules, targets
from diffusion_jax.model import default_config
from diffusion_jax.nets import unet
from diffusion_jax.runtime.config import choose, spec

RUNS = {'': (unet.DDPMpp, 0), 'cond': (unet.DDPMpp, 10), 've': (unet.NCSNpp, 0), 've_cond': (unet.NCSNpp, 10)}


def get_config(run=''):
  config = default_config()
  config.data.update({'source': 'tfds:cifar10', 'size': 32, 'flip': False, 'augment': 0.12})
  config.process = spec(schedules.karras)
  config.target = spec(targets.edm)
  config.noise = spec(diffusion.log_sigma)
  config.draw = spec(levels.lognormal, mean=-1.2, std=1.2)
  config.weight = spec(losses.edm)
  net, num_classes = choose(RUNS, run)
  config.net = spec(net, dropout=0.13, augment=9, num_classes=num_classes)
  config.label_dropout = 0.0
  config.optimizer = spec(optax.adam, eps=1e-8 / (32 * 32 * 3))  # the paper's loss is a sum over the image
  config.learning_rate.update({'peak': 1e-3, 'warmup_images': 10_000_000, 'decay': 'constant'})
  config.clip_norm = 0.0
  config.ema.main = spec(ema.half_life, images=500_000, rampup=0.05)
  config.train.update({'images': 200_000_000, 'batch_size': 512, 'checkpoint_every': 10_000_000})
  config.sample.sampler = spec(samplers.heun)
  config.sample.grid = spec(levels.karras)
  config.sample.update({'steps': 18, 'clip': False, 'batch_size': 256})
  config.eval.features = 'inception'
  return config
