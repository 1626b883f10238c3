"""The points of a sweep: what a sweep file asks for, which folder each point has, and how far it is.

A sweep file is a config file with RUNS (names), SEEDS and get_config('NAME-sK'). A point is one run of one seed. Its
folder ROOT/<name>-<8 hex> is named by what decides its numbers: the resolved config and the code version. All state is
files: point.json (what it is), attempts.jsonl (what was done, a line each), finished.json (trained and evaluated), and
a lock on point.lock, which ends with the process that holds it, however that ends.

Nothing here imports jax, except where a sweep file is loaded or a record is written.
"""
import datetime
import fnmatch
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffusion_jax import records
from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime.config import Config, UserError, nearest

NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._=+-]{0,79}')


class Point(NamedTuple):
  """One run of one seed: a config, and the folder where it is trained and evaluated."""
  name: str           # RUN-sSEED
  run: str
  seed: int
  config_hash: str
  folder: pathlib.Path
  code: str           # the code version that the folder was made by


class Plan(NamedTuple):
  """A sweep: its points, every run with the first seed before any with the next: early results compare, and the runs
  of one config, which share compiled programs, do not begin together."""
  sweep: str          # the sweep file
  file_hash: str
  evaluate: tuple[str, ...] | None  # flags of `diffusion-jax evaluate`; None: points are trained only
  code: str
  points: tuple[Point, ...]


# What a sweep file asks for

def read_sweep(file: str) -> tuple[list[str], list[int], tuple[str, ...] | None]:
  """(RUNS, SEEDS, EVALUATE) of a sweep file; UserError where it is not one."""
  if not os.path.isfile(file) or not file.endswith('.py'):
    folder = pathlib.Path(file).parent
    names = [str(p) for p in [*folder.glob('*.py'), *folder.glob('*/sweep.py')]] if folder.is_dir() else []
    raise UserError(f'there is no sweep file {file!r}{nearest(file, names)}')
  with config_lib.executed(file, f'sweep file {file!r}') as module:
    pass
  for name in 'RUNS', 'SEEDS', 'get_config':
    if not hasattr(module, name):
      raise UserError(f'{file!r} has no {name}: a sweep file has RUNS, SEEDS and get_config(run)')
  runs, seeds, evaluate = _list(module.RUNS), _list(module.SEEDS), getattr(module, 'EVALUATE', ())
  for run in runs or ['']:
    if not isinstance(run, str) or not NAME.fullmatch(run) or '..' in run:
      raise UserError(f'{file!r}: RUNS must be names of letters, digits and ._=+- that begin with a letter or a digit, '
                      f'without "..", up to 80 characters, got {run!r}')
    if re.search(r'-s\d+$', run):
      raise UserError(f'{file!r}: the run {run!r} ends like a seed: name it otherwise')
  for seed in seeds or [None]:
    if type(seed) is not int or seed < 0:
      raise UserError(f'{file!r}: SEEDS must be whole numbers from 0, got {seed!r}')
  for name, found in ('RUNS', runs), ('SEEDS', seeds):
    if twice := [value for value in found if found.count(value) > 1]:
      raise UserError(f'{file!r}: {name} has {twice[0]!r} twice')
  if evaluate is not None:
    evaluate = _list(evaluate)
    for flag in evaluate:
      if not isinstance(flag, str) or not flag.startswith('--') or flag.startswith(('--workdir', '--watch')):
        raise UserError(f"{file!r}: EVALUATE must be flags of diffusion-jax evaluate like '--num=500', without "
                        f'--workdir and --watch, got {flag!r}')
    evaluate = tuple(evaluate)
  return runs, seeds, evaluate


def plan(file: str, root: pathlib.Path, again: bool = False) -> Plan:
  """The sweep, with every config resolved and the folder of every point chosen; writes nothing.

  A folder that was made for the same config by other code is taken where there is none by this code, unless `again`.
  """
  from diffusion_jax import model as model_lib
  runs, seeds, evaluate = read_sweep(file)
  code, made, points, hashes = code_version(), folders(root), [], {}
  for seed in seeds:
    for run in runs:
      name = f'{run}-s{seed}'
      config = config_lib.load(f'{file}:{name}')
      try:
        model_lib.check(config)
      except UserError as e:
        raise UserError(f'{file}:{name}: {e}') from e
      digest = config_hash(config)
      if (other := hashes.setdefault(digest, name)) != name:
        raise UserError(f'{file!r}: {other!r} and {name!r} are the same config: does get_config set config.seed?')
      points.append(place(root, Point(name, run, seed, digest, root, code), made, again))
  return Plan(file, file_hash(file), evaluate, code, tuple(points))


def place(root: pathlib.Path, point: Point, made: Mapping[str, list[dict]], again: bool = False) -> Point:
  """The point with its folder, and with the code version that this was made by."""
  alike = [about for about in made.get(point.name, []) if about.get('config_hash') == point.config_hash]
  if not again and alike and point.code not in [about.get('code') for about in alike]:
    return point._replace(folder=alike[-1]['folder'], code=str(alike[-1].get('code')))
  return point._replace(folder=root / f'{point.name}-{_digest(point.config_hash + point.code)[:8]}')


def select(points: Sequence[Point], pattern: str | None) -> list[Point]:
  """The points whose name or run matches a shell pattern, all for None; UserError where there is none."""
  found = [point for point in points if pattern is None or any(
      fnmatch.fnmatchcase(name, pattern) for name in (point.name, point.run))]
  if not found:
    raise UserError(f'--only={pattern} matches no point{nearest(pattern, [point.name for point in points])}')
  return found


# What identifies a point

def config_hash(config: Config | Mapping[str, Any]) -> str:
  """The SHA-256 of a config as canonical JSON: of one in memory and of its config.json alike."""
  return _digest(json.dumps(json.loads(config_lib.to_json(config)), sort_keys=True))


@functools.cache
def code_version() -> str:
  """12 hex of the SHA-256 of the sources that make the numbers of a run.

  Not the git revision: that changes with every page of documentation, and says nothing of edits not yet committed.
  """
  package, digest = pathlib.Path(__file__).parent, hashlib.sha256()
  for name in sources(package):
    digest.update(f'{name}\0{hashlib.sha256((package / name).read_bytes()).hexdigest()}\n'.encode())
  return digest.hexdigest()[:12]


def sources(package: pathlib.Path) -> list[str]:
  """The sources below the package that make numbers: its leaves, train, evaluate, and what these import."""
  found, waiting = {*package.glob('*/**/*.py')}, [package / 'train.py', package / 'evaluate.py']
  while waiting:
    path = waiting.pop()
    if path not in found and path.is_file():
      found.add(path)
      lines = re.findall(r'(?:from|import) diffusion_jax\b(.*)', path.read_text('utf-8'))
      waiting += (package / f'{name}.py' for line in lines for name in re.findall(r'\w+', line))
  return sorted(path.relative_to(package).as_posix() for path in found)


def file_hash(file: str) -> str:
  """The SHA-256 of a file, '' where it cannot be read."""
  try:
    return hashlib.sha256(pathlib.Path(file).read_bytes()).hexdigest()
  except OSError:
    return ''


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()


def _list(value: Any) -> list:
  return list(value) if isinstance(value, Mapping | Sequence | range) and not isinstance(value, str) else [value]


# Folders

def root_of(file: str, root: str | None) -> pathlib.Path:
  """Where the folders of the points are, of experiments/a/sweep.py runs/a, of experiments/a/b.py runs/a-b.

  UserError for a place without locks, and for one that holds another sweep.
  """
  if '://' in (root or ''):
    raise UserError(f'--root={root}: points need a file system that has locks; mount it, and give its folder')
  path = pathlib.Path(os.path.abspath(file))
  stem = '' if path.stem == 'sweep' else f'-{path.stem}'
  root = pathlib.Path(root or f'runs/{path.parent.name}{stem}')
  there = records.read_json(root / 'sweep.json').get('sweep')
  if isinstance(there, str) and pathlib.Path(os.path.abspath(there)).parts[-2:] != path.parts[-2:]:
    raise UserError(f'{root} holds the sweep {there}, not {file}: give another --root')
  return root


def folders(root: pathlib.Path) -> dict[str, list[dict]]:
  """{name: point.json of each folder made for the point of that name, with its 'folder', oldest first}."""
  found = {}
  for path in root.glob('*/point.json'):
    about = records.read_json(path)
    if isinstance(about.get('name'), str) and path.parent.name.startswith(about['name'] + '-'):
      found.setdefault(about['name'], []).append(about | {'folder': path.parent})
  return {name: sorted(alike, key=lambda about: str(about.get('made'))) for name, alike in found.items()}


def make(point: Point, sweep: str, evaluate: Sequence[str] | None) -> None:
  """Makes the folder of a point, or brings its evaluation flags up to date; whole or not at all."""
  from diffusion_jax.runtime import log
  path, about = point.folder / 'point.json', point._asdict()
  about |= {'folder': point.folder.name, 'sweep': sweep, 'evaluate': None if evaluate is None else list(evaluate)}
  old = records.read_json(path)
  if any(old.get(key) != value for key, value in about.items()):
    made = datetime.datetime.now(datetime.UTC).isoformat()  # finer than log.now: two may be made in one second
    # Later than the folders of this point that are there, though the clock may have gone back since.
    earlier = folders(point.folder.parent).get(point.name, [])
    made = max([made, *(f'{other["made"]}+' for other in earlier if other.get('made'))])
    log.write_json(path, {'made': made} | old | about)


def save_plan(root: pathlib.Path, plan: Plan) -> None:
  """Writes ROOT/sweep.json, which the commands that only look read."""
  from diffusion_jax.runtime import log
  points = [point._asdict() | {'folder': point.folder.name} for point in plan.points]
  log.write_json(root / 'sweep.json', plan._asdict() | {'points': points})


def load_plan(root: pathlib.Path) -> Plan:
  """The sweep as `run` last planned it; UserError where nothing was run."""
  path = root / 'sweep.json'
  if not path.is_file():
    raise UserError(f'there is no {path}: nothing was run there; begin with diffusion-jax sweep run FILE, '
                    f'or give its --root')
  try:
    saved = json.loads(path.read_text('utf-8'))
    points = [Point(**one | {'folder': root / pathlib.Path(one['folder']).name}) for one in saved['points']]
    evaluate = saved['evaluate']
    return Plan(**saved | {'points': tuple(points), 'evaluate': None if evaluate is None else tuple(evaluate)})
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UserError(f'{path} is not what `run` wrote ({type(e).__name__}: {e}): run the sweep again') from e
