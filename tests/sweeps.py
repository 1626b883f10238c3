"""What tests of sweeps share: a sweep of two runs and two seeds, a launcher, and points that train in no time."""
import dataclasses
import json
import pathlib
import sys

from diffusion_jax import attempt, points, progress, sweep
from diffusion_jax.runtime import log

SWEEP = '''
from conftest import tiny_config
RUNS, SEEDS = {'cosine': 'cosine', 'linear': 'linear'}, range(2)
EVALUATE = ['--ema=main', '--num=24', '--features=digits']
def get_config(run):
  name, _, seed = run.rpartition('-s')
  return tiny_config(process=RUNS[name], seed=seed, train__images=64, sample__steps=2, eval__held_out='')
'''
NAMES = ['cosine-s0', 'linear-s0', 'cosine-s1', 'linear-s1']
# A config that costs nothing to load, for processes that are killed; no train ever reads it.
LIGHT = '''
from diffusion_jax.runtime.config import Config
RUNS, SEEDS = ['a'], [0]
def get_config(run): return Config({'seed': 0})
'''


def put(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  return str(path)


def put_lines(path, *records):
  put(path, ''.join(json.dumps(record) + '\n' for record in records))


Options = dataclasses.make_dataclass('Options', [
    ('flavour', str, dataclasses.field(default='plain', metadata={'help': 'a taste'}))])


@dataclasses.dataclass
class Fake:
  """A launcher that runs points here: `slurm`, replaced."""
  calls: list = dataclasses.field(default_factory=list)      # names of the jobs submitted
  cancelled: list = dataclasses.field(default_factory=list)
  living: set = dataclasses.field(default_factory=set)
  die: int = 10 ** 9         # raises Killed at this job
  here: bool = True          # runs what is submitted
  WAITS: bool = False
  OPTIONS: type = Options

  def render(self, jobs, options):
    return f'{options.flavour}: ' + ' '.join(job.argv[job.argv.index('--name') + 1] for job in jobs)

  def submit(self, jobs, options, folder):
    for job in jobs:
      if not self.die:
        raise Killed
      self.die -= 1
      self.calls.append(job.argv[job.argv.index('--name') + 1])
      if self.here:
        assert job.argv[1:4] == ('-m', 'diffusion_jax.sweep', 'point')
        sweep.main(list(job.argv[3:]))
    return [f'id-{job.name}' for job in jobs]

  def alive(self, ids):
    return {one for one in ids if one in self.living}

  def cancel(self, ids):
    self.cancelled += ids


class Killed(BaseException):
  """The process is gone: nothing may catch it."""


class Children(attempt.Children):
  """Trains and evaluates in no time; `ends` are the exit statuses of what is to come, 0 when there is none."""
  ends, trained = (), ()

  def run(self, command, *flags):
    status = self.ends.pop(0) if self.ends else 0
    folder = pathlib.Path(next(flag for flag in flags if flag.startswith('--workdir=')).partition('=')[2])
    if command == 'train':
      name = next(flag for flag in flags if flag.startswith('--config=')).rpartition(':')[2]
      config = points.config_lib.load(str(self.file) + ':' + name)
      log.write(folder / 'config.json', points.config_lib.to_json(config))
      self.trained.append(name)
      if not status:
        put(folder / 'done.json', '{"images": 64}')
    elif not status:
      record = {'metric': 'fd_digits_24', 'value': float(config_seed(folder)), 'ema': 'main', 'step': 4, 'seed': 0}
      log.append(folder / 'eval.jsonl', record)
    self.said = 'a sad story'
    if status == 'killed':
      raise Killed
    return status


def config_seed(folder):
  return json.loads((folder / 'config.json').read_text())['seed']


def make_world(tmp_path, monkeypatch):
  """world(words) is sweep.main with FILE and --root put in; its launcher and its children are fake."""
  monkeypatch.setattr(attempt, 'Children', Children)
  monkeypatch.setattr(Children, 'ends', [])
  monkeypatch.setattr(Children, 'trained', [])
  file = put(tmp_path / 'question' / 'sweep.py', SWEEP)
  monkeypatch.setattr(Children, 'file', file, raising=False)
  fake = Fake()
  monkeypatch.setitem(sys.modules, 'launch.slurm', fake)

  def main(words, *more):
    command, *rest = words.split()
    launcher = ['--launcher=slurm'] if command in ('run', 'retry') else []
    return sweep.main([command, file, f'--root={tmp_path}/root', *launcher, *rest, *more])

  main.file, main.root, main.fake = file, tmp_path / 'root', fake
  main.states = lambda: {point.name: progress.state(point, points.load_plan(main.root).evaluate).state
                         for point in points.load_plan(main.root).points}
  main.folder = lambda name: next(main.root.glob(f'{name}-????????'))
  return main
