"""DiT on ImageNet at 64 x 64, in pixels: 16 x 16 patches of 4 x 4, 300,000 steps of 1,024 images.

Reach: the DiT paper has no pixels; U-ViT-L/4, the nearest network, reaches FID 4.26 at this size (Bao et al.
2023). Reached: not run. Recipe of Peebles & Xie 2022, section 4: AdamW at a constant rate without weight
decay, average 0.9999.
Runs: '' (L/4, the width and depth of DiT-L: 457,889,840 parameters), 's' (S/4: 32,883,504), 'xl' (XL/4: 674,890,032).
"""
import optax

from diffusion_jax.core import ema, samplers, schedules, targets
from diffusion_jax.model import default_config
from diffusion_jax.nets import dit
from diffusion_jax.runtime.config import choose, spec

RUNS = {'': (1024, 24, 16), 's': (384, 12, 6), 'xl': (1152, 28, 16)}


def get_config(run=''):
  config = default_config()
  config.data.update({'source': 'tfds:imagenet_resized/64x64', 'size': 64, 'flip': True})
  config.process = spec(schedules.cosine)
  config.target = spec(targets.eps)
  width, depth, heads = choose(RUNS, run)
  config.net = spec(dit.DiT, width=width, depth=depth, heads=heads, patch=4, num_classes=1000, dtype='bfloat16',
                    remat='blocks', scan=True)
  config.optimizer = spec(optax.adamw, weight_decay=0.0)
  config.learning_rate.update({'peak': 1e-4, 'warmup_images': 0, 'decay': 'constant'})
  config.ema.main = spec(ema.constant, decay=0.9999)
  config.train.update({'images': 300_000 * 1024, 'batch_size': 1024, 'sample_every': 10_240_000,
                       'checkpoint_every': 10_240_000})
  config.sample.sampler = spec(samplers.ddim)
  config.sample.update({'steps': 250, 'batch_size': 256})
  config.eval.update({'features': 'inception'})
  return config
