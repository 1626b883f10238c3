"""Who may import whom. Read from the source, so that an import inside a function counts too."""
import ast
import importlib
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted([*ROOT.glob('diffusion_jax/**/*.py'), *ROOT.glob('launch/**/*.py')])
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
# Commands that work where no jax is installed, and what they are made of: the standard library and each other.
ALONE = {'report', 'compare', 'diff', 'records', 'seeds', 'quality', 'comparison', 'tradeoff', 'verdict', 'gallery',
         'curves', 'svg', 'terminal'}
LEAVES = {'core', 'nets', 'data', 'metrics', 'runtime'}
every_file = pytest.mark.parametrize('name', NAMES)


def imports(source):
  """The dotted names of everything that a source imports, anywhere in it: {'jax.numpy', 'diffusion_jax.svg', ...}."""
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {f'{"." * node.level}{node.module or ""}.{alias.name}' for alias in node.names}
  return found


def broken_rules(name, source):
  """The imports of the file `name` that break a rule."""
  place, found = pathlib.PurePath(name).parts, imports(source)
  top = {dotted: dotted.split('.')[0] for dotted in found}
  inside = lambda *packages: {d for d in found if any(d == p or d.startswith(f'{p}.') for p in packages)}
  standard = {d for d in found if top[d] in sys.stdlib_module_names}
  # Relative imports would hide from these rules; pickles run code; two of the frameworks are one too many.
  broken = {d for d in found if top[d] in ('', 'tensorflow', 'torch', 'pickle', 'cloudpickle', 'dill', 'joblib')}
  if place[0] == 'launch':
    broken |= found - standard - inside('launch')
  elif place[1].removesuffix('.py') in ALONE:
    broken |= found - standard - inside(*(f'diffusion_jax.{one}' for one in ALONE - {'report', 'compare', 'diff'}))
    broken |= inside('diffusion_jax') if place[1] in ('svg.py', 'verdict.py', 'seeds.py') else set()
  elif place[1] in LEAVES:
    others = {f'diffusion_jax.{leaf}' for leaf in LEAVES - {place[1]}}
    # Leaves do not know the commands on top of them either.
    broken |= inside(*others) | (inside('diffusion_jax') - inside(f'diffusion_jax.{place[1]}'))
  elif place[1] == 'convert' and place[-1] != '__main__.py':  # which is a command
    allowed = ('convert', 'core', 'nets', 'runtime')
    broken |= inside('diffusion_jax') - inside(*(f'diffusion_jax.{one}' for one in allowed))
  if place[1] == 'core':
    broken |= found - standard - inside('jax', 'numpy', 'diffusion_jax.core')
  if place[1] == 'data' and place[-1] != 'augment.py':  # which is a part of the train step
    broken |= inside('jax', 'jaxlib', 'flax')
  return broken


@every_file
def test_imports_keep_to_the_layers(name):
  assert not broken_rules(name, (ROOT / name).read_text('utf-8'))


@pytest.mark.parametrize(('name', 'source'), [
    ('diffusion_jax/core/a.py', 'import flax'), ('diffusion_jax/core/a.py', 'from diffusion_jax.runtime import log'),
    ('diffusion_jax/core/a.py', 'from diffusion_jax import runtime'), ('diffusion_jax/core/a.py', 'from . import b'),
    ('diffusion_jax/core/a.py', 'def f():\n  import scipy.stats'), ('diffusion_jax/data/a.py', 'import jax.numpy'),
    ('diffusion_jax/data/a.py', 'from flax import struct'), ('diffusion_jax/nets/a.py', 'import diffusion_jax.core'),
    ('diffusion_jax/metrics/a.py', 'from diffusion_jax.data.sources import load'),
    ('diffusion_jax/runtime/a.py', 'from diffusion_jax import model'), ('diffusion_jax/a.py', 'import pickle'),
    ('diffusion_jax/a.py', 'import tensorflow as tf'), ('diffusion_jax/nets/a.py', 'from torch import nn'),
    ('diffusion_jax/report.py', 'import numpy'), ('diffusion_jax/report.py', 'from diffusion_jax.runtime import log'),
    ('diffusion_jax/svg.py', 'from diffusion_jax import report'), ('diffusion_jax/records.py', 'import scipy'),
    ('diffusion_jax/svg.py', 'from diffusion_jax import records'), ('diffusion_jax/compare.py', 'import jax'),
    ('diffusion_jax/records.py', 'from diffusion_jax import compare'),
    ('diffusion_jax/tradeoff.py', 'from diffusion_jax.metrics import frechet'),
    ('diffusion_jax/compare.py', 'from diffusion_jax.runtime import log'), ('launch/a.py', 'import yaml'),
    ('diffusion_jax/diff.py', 'import jax'), ('diffusion_jax/diff.py', 'from diffusion_jax import report'),
    ('diffusion_jax/verdict.py', 'import scipy'), ('diffusion_jax/verdict.py', 'from diffusion_jax import records'),
    ('diffusion_jax/comparison.py', 'import numpy'), ('diffusion_jax/gallery.py', 'from PIL import Image'),
    ('diffusion_jax/convert/a.py', 'from diffusion_jax.data import sources'),
    ('diffusion_jax/convert/a.py', 'from diffusion_jax import model'),
    ('launch/a.py', 'from diffusion_jax.runtime import config')])
def test_a_broken_rule_is_seen(name, source):
  assert broken_rules(name, source)


def test_the_rules_let_pass_what_they_should():
  assert len(NAMES) > 25 and any(name.startswith('launch') for name in NAMES)
  for name, source in [
      ('diffusion_jax/core/a.py', 'import functools\nimport jax.numpy as jnp\nfrom diffusion_jax.core import types'),
      ('diffusion_jax/data/a.py', 'import tensorflow_datasets as tfds\nfrom diffusion_jax.data import sources'),
      ('diffusion_jax/report.py', 'import json\nfrom diffusion_jax import svg\nfrom diffusion_jax.svg import shown'),
      ('diffusion_jax/compare.py', 'import os\nfrom diffusion_jax import records\nfrom diffusion_jax.svg import shown'),
      ('diffusion_jax/train.py', 'from diffusion_jax.core import schedules\nfrom diffusion_jax.runtime import log'),
      ('diffusion_jax/convert/a.py', 'from diffusion_jax.nets import clip\nfrom diffusion_jax.convert import names'),
      ('launch/a.py', 'import shlex\nfrom launch import job')]:
    assert not broken_rules(name, source)


@pytest.mark.parametrize('name', [name for name in NAMES if name.endswith('__init__.py')])
def test_init_files_are_empty(name):
  assert not (ROOT / name).read_bytes()


@every_file
def test_nothing_reads_pickles(name):
  for node in ast.walk(ast.parse((ROOT / name).read_text('utf-8'))):
    if isinstance(node, ast.keyword) and node.arg == 'allow_pickle':
      assert isinstance(node.value, ast.Constant) and node.value.value is False


def lists_names(name):
  tree = ast.parse((ROOT / name).read_text('utf-8'))
  return any(isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '__all__' for node in tree.body)


@pytest.mark.parametrize('name', [*filter(lists_names, NAMES)])
def test_listed_names_exist(name):
  module = importlib.import_module('.'.join(pathlib.PurePath(name).with_suffix('').parts))
  assert len(set(module.__all__)) == len(module.__all__) > 0
  for listed in module.__all__:
    assert hasattr(module, listed) and not listed.startswith('_')
