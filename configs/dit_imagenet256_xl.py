"""DiT-XL/2 on ImageNet at 256 x 256, in latents: 674,834,720 parameters, 7,000,000 steps of 256 images.

Reach: FID 9.62 without guidance and 2.27 with guidance 1.5 (Peebles & Xie 2022, tables 2 and 4). Reached: not run.
A run of dit_imagenet256, which says the rest.
"""
from configs import dit_imagenet256


def get_config():
  return dit_imagenet256.get_config('xl')
