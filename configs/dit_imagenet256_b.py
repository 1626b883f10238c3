"""DiT-B/2 on ImageNet at 256 x 256, in latents: 130,315,808 parameters, 400,000 steps of 256 images.

Reach: FID 43.47 without guidance (Peebles & Xie 2022, table 4). Reached: not run.
A run of dit_imagenet256, which says the rest.
"""
from configs import dit_imagenet256


def get_config():
  return dit_imagenet256.get_config('b')
