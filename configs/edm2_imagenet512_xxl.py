"""EDM2-XXL on ImageNet at 512 x 512, in latents: 1,523 million parameters.

Reach: FID 1.91 (average of width 0.070) without guidance (Karras et al. 2024, table 2). Reached: not run.
A run of edm2_imagenet512, which says the rest.
"""
from configs import edm2_imagenet512


def get_config():
  return edm2_imagenet512.get_config('xxl')
