"""The comparison of sweep.py on CIFAR-10 through TFDS, at the scale of papers: DDPM's net and number of steps."""
from configs import ddpm_cifar10
from experiments.noise_schedules import sweep

RUNS, SEEDS = sweep.RUNS, sweep.SEEDS
EVALUATE = ['--ema=main', '--num=50000']


def get_config(run='cosine-v'):
  config, paper = sweep.compared(run), ddpm_cifar10.get_config()
  for key in ('data', 'net', 'learning_rate', 'clip_norm', 'ema', 'train', 'eval'):
    config[key] = paper[key]
  config.sample.batch_size = 256
  return config
