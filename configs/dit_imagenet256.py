"""DiT on ImageNet at 256 x 256, in latents of 32 x 32 (Peebles & Xie 2022): batches of 256.

Reach: XL/2 after 7,000,000 steps FID 9.62 without guidance and 2.27 with guidance 1.5 (tables 2 and 4), B/2 after
400,000 steps 43.47 without guidance (table 4), 250 steps of sampling. Reached: not run.
Runs: '' and 'xl' (XL/2: 674,834,720 parameters), 'b' (B/2: 130,315,808); each is also a file, dit_imagenet256_xl and
_b.
--config.codec.weights=FOLDER is Stable Diffusion's autoencoder (sd-vae-ft-ema). data/imagenet256 holds a folder for
each class, of pictures scaled and cropped as the paper's.
Differs: guidance acts on all four channels, where the paper's code leaves out the last.
"""
import optax

from diffusion_jax.core import diffusion, ema, levels, losses, samplers, schedules, targets
from diffusion_jax.model import default_config
from diffusion_jax.nets import codecs, dit
from diffusion_jax.runtime.config import choose, spec

SIZES = {'xl': (1152, 28, 16, 7_000_000, 1.5), 'b': (768, 12, 12, 400_000, 1.0)}  # width, depth, heads, steps, guidance
RUNS = {'': 'xl'} | {size: size for size in SIZES}


def get_config(run=''):
  config = default_config()
  config.data.update({'source': 'folder:data/imagenet256', 'size': 256, 'flip': True})
  config.codec = spec(codecs.kl)
  config.process = spec(schedules.linear)
  config.target = spec(targets.eps)
  config.noise = spec(diffusion.timestep)
  config.draw = spec(levels.uniform)
  config.weight = spec(losses.hybrid)
  width, depth, heads, steps, guidance = SIZES[choose(RUNS, run)]
  config.net = spec(dit.DiT, width=width, depth=depth, heads=heads, patch=2, num_classes=1000, variance=True,
                    dtype='bfloat16', remat='blocks', scan=True)
  config.label_dropout = 0.1
  config.optimizer = spec(optax.adamw, weight_decay=0.0)
  config.learning_rate.update({'peak': 1e-4, 'warmup_images': 0, 'decay': 'constant'})
  config.clip_norm = 0.0
  config.ema.main = spec(ema.constant, decay=0.9999, warmup=False)
  config.train.update({'images': steps * 256, 'batch_size': 256, 'sample_every': 5_120_000,
                       'checkpoint_every': 5_120_000})
  config.sample.sampler = spec(samplers.ancestral_learned)
  config.sample.grid = spec(levels.timesteps)
  config.sample.update({'steps': 250, 'guidance': guidance, 'clip': False, 'batch_size': 32})
  config.eval.update({'features': 'inception', 'held_out': ''})
  return config
