"""EDM2 on ImageNet at 512 x 512, in latents (Karras et al. 2024): 896 to 2,048 Mi images in batches of 2,048.

Reach: FID without guidance and with 63 network evaluations, of the average of the width in brackets (table 2;
`posthoc_ema --std=`; the lowest of three times 50,000 samples: `evaluate --seeds=0-2`): XS 3.53 (0.135), S 2.56
(0.130), M 2.25 (0.100), L 2.06 (0.085), XL 1.96 (0.085), XXL 1.91 (0.070). Reached: not run.
Runs: '' (S), 'xs', 's', 'm', 'l', 'xl', 'xxl'; each is also a file of its own, edm2_imagenet512_xs and so on.
--config.codec.weights=FOLDER is Stable Diffusion's autoencoder (sd-vae-ft-mse). data/imagenet512 holds a folder for
each class, of pictures scaled and cropped as the paper's.
Differs: bfloat16 for the paper's float16; u(level) of the loss is not normalised; pictures are encoded in [-1, 1], and
the moments that give latents mean 0 and deviation 0.5 in every channel are those of 256 x 256 as in the public code of
IMM (Zhou et al. 2025): the paper's are of pictures in [0, 1].
"""
from configs import edm2_imagenet64_s
from diffusion_jax.nets import codecs, edm2
from diffusion_jax.runtime.config import choose, spec

MI = 2 ** 20
MEAN, DEVIATION = (0.86488, -0.27787343, 0.21616915, 0.3738409), (4.85503674, 5.31922414, 3.93725398, 3.9870003)
SIZES = {'xs': (0.0120, 0.0, 2048), 's': (0.0100, 0.0, 2048), 'm': (0.0090, 0.1, 2048), 'l': (0.0080, 0.1, 1792),
         'xl': (0.0070, 0.1, 1280), 'xxl': (0.0065, 0.1, 896)}  # learning rate, dropout, Mi images
RUNS = {'': 's'} | {size: size for size in SIZES}


def get_config(run=''):
  config = edm2_imagenet64_s.get_config()
  size = choose(RUNS, run)
  peak, dropout, images = SIZES[size]
  config.data.update({'source': 'folder:data/imagenet512', 'size': 512})
  config.codec = spec(codecs.kl, shift=MEAN, scaling=tuple(0.5 / deviation for deviation in DEVIATION))
  config.draw.update({'mean': -0.4, 'std': 1.0})
  config.net.update({'channels': edm2.CHANNELS[size], 'dropout': dropout})
  config.optimizer.eps = 1e-8 / (64 * 64 * 4)
  config.learning_rate.update({'peak': peak, 'steady_images': 70_000 * 2048})
  config.train.update({'images': images * MI})
  config.sample.batch_size = 32
  return config
