"""The CIFAR-10 rows of sweep.py as an exercise on handwritten digits: no number here compares with the paper's."""
from experiments.ddpm_paper import tiny
from experiments.iddpm import sweep

RUNS = {run: parts for run, parts in sweep.RUNS.items() if parts[0] == 'cifar10'}
SEEDS = (0,)
EVALUATE = tiny.EVALUATE
CELLS = sweep.CELLS
METRICS = tiny.METRICS


def get_config(run='cifar10-4k-cosine-hybrid'):
  return tiny.shrunk(sweep.get_config(run))
