"""DDPM's tables 1 and 2 and DDIM's table 1: the models behind every row, at the paper's scale.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models"; Song et al. 2021, "Denoising Diffusion Implicit Models".
`python -m experiments.ddpm_paper.reproduce` puts what they reach beside the papers' numbers, which CELLS holds.
"""
import math
import re

from configs import ddpm_cifar10
from diffusion_jax.core import levels, losses, samplers, targets
from diffusion_jax.nets import unet
from diffusion_jax.runtime.config import choose, spec
from experiments.ddpm_paper.cells import Cell

# {run: (target, objective)}: table 2 is {mu, eps} x {L with learned variance, L with a fixed one, L_simple}.
RUNS = {
    'eps-simple': ('eps', 'simple'),
    'eps-bound': ('eps', 'bound'),
    'eps-bound-learned': ('eps', 'learned'),
    'mu-bound': ('mu', 'bound'),
    'mu-bound-learned': ('mu', 'learned'),
    'celeba': ('eps', 'simple'),
}
SEEDS = (0,)  # as in the papers: each model was trained once
EVALUATE = ['--ema=main', '--num=50000']


def get_config(run='eps-simple'):
  name, seed = re.fullmatch(r'(.*?)(?:-s(\d+))?', run).groups()
  target, objective = choose(RUNS, name)
  config = ddpm_cifar10.get_config()
  config.seed = int(seed or 0)
  config.target = spec(getattr(targets, target))
  if objective == 'bound':
    config.weight = spec(losses.vlb)
  if objective == 'learned':  # log 2: both parts in nats, as they are in L
    config.weight = spec(losses.hybrid, weight='vlb', scale=math.log(2), variance='diagonal')
    config.net.variance = True
    config.sample.sampler = spec(samplers.ancestral_learned, kind='diagonal')
  if name == 'celeba':
    config.data.update({'source': 'tfds:celeb_a', 'size': 64})
    config.net = spec(unet.UNet, channels=128, multipliers=(1, 2, 2, 2, 4), blocks=2, attention=(16,), dropout=0.1)
    config.train.images = 500_000 * 128
    config.sample.sampler, config.sample.grid = spec(samplers.ddim), spec(levels.leading)
    config.sample.steps = 100
  return config


# The cells

ANCESTRAL = 'ancestral(variance=1.0)'
NOT_SAID = 'the paper calls it unstable'


def _ddpm():
  """Tables 1 and 2 (CIFAR-10). NLL is of the test split, and of the training split in brackets."""
  for run, words, is_, fid, test, train in (
      ('eps-bound', 'eps, L, fixed isotropic', 7.67, 13.51, 3.70, 3.69),
      ('eps-simple', 'eps, L_simple', 9.46, 3.17, 3.75, 3.72)):
    yield Cell('DDPM table 1', words, 'IS', is_, run, 'is', {'sampler': ANCESTRAL, 'steps': 1000})
    yield Cell('DDPM table 1', words, 'FID', fid, run, 'fid', {'sampler': ANCESTRAL, 'steps': 1000})
    for split, value in (('test', test), ('train', train)):
      yield Cell('DDPM table 1', words, f'NLL {split}', value, run, 'bits_per_dim_discrete_vlb', {'split': split})
  for run, words, is_, fid in (
      ('mu-bound-learned', 'mu, L, learned diagonal', 7.28, 23.69),
      ('mu-bound', 'mu, L, fixed isotropic', 8.06, 13.22),
      ('', 'mu, unweighted MSE', None, None),
      ('eps-bound-learned', 'eps, L, learned diagonal', None, None),
      ('eps-bound', 'eps, L, fixed isotropic', 7.67, 13.51),
      ('eps-simple', 'eps, L_simple', 9.46, 3.17)):
    sampler = "ancestral_learned(kind='diagonal')" if run.endswith('learned') else ANCESTRAL
    note = NOT_SAID * (fid is None) + '; no weight here stands for it' * (not run)
    for column, value in (('IS', is_), ('FID', fid)):
      yield Cell('DDPM table 2', words, column, value, run, column.lower(), {'sampler': sampler, 'steps': 1000}, note)


STEPS = (10, 20, 50, 100, 1000)
SAMPLERS = {'eta 0': 'ddim(eta=0.0)', 'eta 0.2': 'ddim(eta=0.2)', 'eta 0.5': 'ddim(eta=0.5)', 'eta 1': 'ddim(eta=1.0)',
            'sigma-hat': ANCESTRAL}
DDIM = {
    ('CIFAR-10', 'eps-simple', 'quadratic(reach=0.8)'): (
        (13.36, 6.84, 4.67, 4.16, 4.04), (14.04, 7.11, 4.77, 4.25, 4.09), (16.66, 8.35, 5.25, 4.46, 4.29),
        (41.07, 18.36, 8.01, 5.78, 4.73), (367.43, 133.37, 32.72, 9.99, 3.17)),
    ('CelebA', 'celeba', 'leading(last=True, offset=0)'): (
        (17.33, 13.73, 9.17, 6.53, 3.51), (17.66, 14.11, 9.51, 6.79, 3.64), (19.86, 16.06, 11.01, 8.09, 4.28),
        (33.12, 26.03, 18.48, 13.93, 5.98), (299.71, 183.83, 71.71, 45.20, 3.26)),
}


def _ddim():
  """Table 1: FID by the number of steps, one model for all cells of a data set."""
  for (data, run, grid), rows in DDIM.items():
    for (words, sampler), values in zip(SAMPLERS.items(), rows, strict=True):
      for steps, value in zip(STEPS, values, strict=True):
        yield Cell(f'DDIM table 1, {data}', words, f'FID, S = {steps}', value, run, 'fid',
                   {'sampler': sampler, 'grid': grid, 'steps': steps})


CELLS = (*_ddpm(), *_ddim())
