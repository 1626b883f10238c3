"""The peers' sets and numbers for the tests of the metrics, and what it means that intervals cover."""
import json
import pathlib

import numpy as np

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
EXPECTED = json.loads((FIXTURES / 'metrics.json').read_text())
SETS = dict(np.load(FIXTURES / 'metrics.npz'))


def covers(cis, truth, low=0.95, high=0.95):
  """The part of the intervals that hold the truth is from `low` to `high`, within four standard errors."""
  held = np.mean([a <= truth <= b for a, b in cis])
  spread = 4 * np.sqrt(0.95 * 0.05 / len(cis))
  return low - spread <= held <= high + spread
