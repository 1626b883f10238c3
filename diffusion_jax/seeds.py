"""Which run folders are one run of several seeds: what may be averaged, and under which name.

Pure functions of what `records` read, with the standard library alone. Runs are together where they have one name in a
sweep, configs that agree in all but the seed, and seeds that differ; of two attempts at one seed none is chosen
silently: those of other code are a group of their own.
"""
import json
import re
from collections.abc import Sequence


def point(run) -> str:
  """The name of a run in its sweep, without its seed; '' where it is in none."""
  names = [name for name in (run.point.get('run'), run.point.get('name')) if isinstance(name, str)]
  return min((name.removesuffix(f'-s{run.seed}') for name in names), key=len, default='')


def groups(runs: Sequence) -> list[str]:
  """The name of each run's group; no two groups share one."""
  same = {}
  for run in runs:
    config = {key: value for key, value in run.config.items() if key != 'seed'}
    same.setdefault((point(run), json.dumps(config, sort_keys=True)), []).append(run)
  parts = [part for alike in same.values() for part in by_seed(alike)]
  names, found = [stem(part) for part in parts], {}
  for part, name in zip(parts, names, strict=True):
    name = name if names.count(name) == 1 else f'{name} ({part[0].label})'
    while name in found.values():  # a folder that was given twice
      name += ' again'
    found |= {run.index: name for run in part}
  return [found[run.index] for run in runs]


def by_seed(runs: Sequence) -> list[list]:
  """Alike runs as they may be averaged: together where each has a seed of its own, else of one code, else alone."""
  distinct = lambda part: len({run.seed for run in part} - {None}) == len(part)
  if distinct(runs):
    return [list(runs)]
  codes = {}
  for run in runs:
    codes.setdefault(json.dumps(run.point.get('code'), sort_keys=True), []).append(run)
  return [part for same in codes.values() for part in ([same] if distinct(same) else [[run] for run in same])]


def stem(runs: Sequence) -> str:
  """The name of a group: of its sweep, or of its labels without their seeds: 'cosine' of cosine-s0 and cosine-s1."""
  first = runs[0].label
  if point(runs[0]) or len(runs) == 1:
    return point(runs[0]) or first
  bare = {re.sub(r'[-_. ]*(s|seed)?[-_. ]*\d+$', '', run.label) for run in runs}
  return bare.pop() or first if len(bare) == 1 else f'{first} and {len(runs) - 1} more'
