"""Every sampler and schedule on data whose best denoiser is known: python -m experiments.analytic.run --help."""
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from diffusion_jax.core import adaptive, levels, samplers, schedules
from diffusion_jax.core.schedules import Process
from diffusion_jax.core.types import Level
from diffusion_jax.runtime import command, log
from diffusion_jax.runtime.config import UserError
from experiments.analytic import distance, exact, measure, page
from experiments.analytic.measure import BUDGETS, WHOLE_CHAIN, Judge, Walker

OUT = pathlib.Path('runs/analytic')
SAMPLED = ('ellipse', 'three', 'ring', 'digits')      # where every sampler runs
SCHEDULED = ('three', 'moons')                        # where every schedule and every grid runs, with these samplers:
FEW = ('ancestral', 'ddim', 'dpmpp_2m')
PICTURED = (('ancestral', 5), ('ancestral', 20), ('ddim', 20), ('dpmpp_2m', 20))
TOLERANCES = (1e-1, 1e-2, 1e-3)                       # of the samplers that choose their own steps
SHOWN = 400                                           # points, or a tenth of it images, in a picture


class Study:
  """All that is measured, as records and as pictures."""

  def __init__(self, quick: bool, seed: int, only: Sequence[str] = ()):
    self.quick, self.seed, self.only = quick, seed, only
    self.records, self.pictures, self.skipped = [], [], {}
    self.cases, self.judges, self.walkers = measure.cases(quick), {}, {}
    self.about = {'experiment': 'analytic', **log.provenance(), 'time': log.now(), 'seed': seed, 'quick': quick}
    self.budgets = (5, 10, 20, 50) if quick else BUDGETS

  def judge(self, name: str) -> Judge:
    """The judge of a distribution; its floor is recorded when it is made."""
    if name not in self.judges:
      self.judges[name] = judge = Judge(self.cases[name], self.seed)
      self.record(name, self.cases[name].distance + '_floor', float(np.mean(judge.floor)),
                  range=[min(judge.floor), max(judge.floor)], repeats=len(judge.floor))
    return self.judges[name]

  def walker(self, data: str, name: str) -> Walker:
    """The compiled sampler, with its defaults, on the denoiser of a distribution."""
    if (data, name) not in self.walkers:
      self.walkers[data, name] = Walker(getattr(samplers, name)(), self.cases[data].data.denoise)
    return self.walkers[data, name]

  def record(self, data: str, metric: str, value: float, **settings: Any) -> None:
    """Keeps one value with all that it takes to know what it is."""
    case = self.cases[data]
    self.records.append({**self.about, 'data': data, 'dims': case.data.dims, 'num_samples': case.size,
                         'groups': case.groups, **settings, 'metric': metric, 'value': value})

  def measure(self, part: str, data: str, sampler: str, grid: str, process: Process, budget: int, schedule: str,
              params: Any = None, ode: bool = False) -> np.ndarray:
    """Samples within a budget, and keeps their distance to the data; the samples, [groups * size, D]."""
    walker = self.walker(data, sampler)
    count = measure.num_levels(walker.sampler, budget)
    if not count:
      return None
    table = getattr(levels, grid)()(process, count, params)
    x = self.judge(data).start(table)
    x0 = np.asarray(walker(x, table, self.judge(data).keys))
    settings = {'part': part, 'sampler': sampler, 'family': family(sampler, walker.random), 'schedule': schedule,
                'path': process.path.name, 'grid': grid, 'levels': count, 'budget': budget,
                'nfe': walker.sampler.nfe(count)}
    self.keep(data, x0, x if ode and not walker.random else None, table, settings)
    return x0

  def adapt(self, data: str, sampler: str, process: Process, schedule: str) -> None:
    """A sampler that chooses its own steps, at several tolerances: it is told its two ends alone."""
    table = levels.uniform_logsnr()(process, 2)
    x, keys = self.judge(data).start(table), self.judge(data).keys
    for tolerance in TOLERANCES[1:2] if self.quick else TOLERANCES:
      counting = adaptive.counted(getattr(samplers, sampler)(rtol=tolerance, atol=tolerance))
      walker = Walker(counting, self.cases[data].data.denoise)
      x0, calls = map(np.asarray, walker(x, table, keys))
      nfe = int(np.ceil(calls.mean()))
      settings = {'part': 'samplers', 'sampler': sampler, 'family': family(sampler, walker.random),
                  'schedule': schedule, 'path': process.path.name, 'grid': 'its own', 'levels': 2, 'budget': nfe,
                  'nfe': nfe, 'tolerance': tolerance}
      self.keep(data, x0, x, table, settings)

  def keep(self, data: str, x0: np.ndarray, x: jax.Array | None, grid: Level, settings: dict[str, Any]) -> None:
    """Records how far samples are from the data, and with their start x also from the exact solution of the ODE."""
    judge = self.judge(data)
    each = judge.distances(x0)
    self.record(data, self.cases[data].distance, float(np.mean(each)), range=[min(each), max(each)], **settings)
    if x is not None:
      self.record(data, 'ode_error', judge.ode_error(x0, x, grid), **settings)
    if data == 'digits':
      near = distance.nearest(x0[:256], exact.points_of(exact.sources.load('digits', 'train')))
      self.record(data, 'nearest_training_digit', float(np.mean(near)), **settings)

  def attempt(self, kind: str, name: str, do: Callable[[], None]) -> None:
    """Runs `do`, unless others were asked for; what cannot run is skipped, and its reason printed once."""
    what = f'{kind} {name}'
    if self.only and name not in self.only:
      return
    try:
      do()
    except ValueError as e:  # bad input, by its own sentence; anything else is a fault
      if what not in self.skipped:
        self.skipped[what] = str(e).split('\n')[0]
        print(f'skipped {what}: {self.skipped[what]}', flush=True)

  # The three sweeps

  def all_samplers(self) -> None:
    """Every sampler on DDPM's linear chain in equal steps of logsnr, and the whole chain of 1,000 steps."""
    process = schedules.linear()
    for data in ('three', 'ring') if self.quick else SAMPLED:
      began = time.perf_counter()
      for name in samplers.__all__:
        def sweep(data=data, name=name):
          if self.walker(data, name).sampler.calls == 0:
            return self.adapt(data, name, process, 'linear')
          for budget in self.budgets if data != 'digits' else self.budgets[:-1]:  # large: the last costs the most
            x0 = self.measure('samplers', data, name, 'uniform_logsnr', process, budget, 'linear', ode=True)
            if (name, budget) in PICTURED and x0 is not None:
              self.picture(data, f'{name}, {budget} evaluations', x0)
        self.attempt('sampler', name, sweep)
      if not self.quick:
        whole = self.measure('whole chain', data, 'ancestral', 'timesteps', process, WHOLE_CHAIN, 'linear')
        self.picture(data, f"ancestral, DDPM's {WHOLE_CHAIN:,} steps", whole)
      self.picture(data, 'the data', np.concatenate(self.judge(data).sets))
      print(f'{data}: every sampler in {time.perf_counter() - began:.0f} s', flush=True)

  def all_schedules(self) -> None:
    """Every schedule in equal steps of its own time."""
    began = time.perf_counter()
    for name in schedules.__all__:
      def sweep(name=name):
        process = getattr(schedules, name)()
        params = process.init(jax.random.key(0))
        for data in SCHEDULED[:1] if self.quick else SCHEDULED:
          for sampler in FEW:
            for budget in (10, 20) if self.quick else (10, 20, 50):
              self.measure('schedules', data, sampler, 'timesteps', process, budget, name, params)
      self.attempt('schedule', name, sweep)
    print(f'every schedule in {time.perf_counter() - began:.0f} s', flush=True)

  def all_grids(self) -> None:
    """Every grid on DDPM's linear chain."""
    began, process = time.perf_counter(), schedules.linear()
    for name, data, sampler in itertools.product(levels.GRIDS, SCHEDULED[:1] if self.quick else SCHEDULED, FEW):
      def sweep(name=name, data=data, sampler=sampler):
        for budget in self.budgets[:5]:
          self.measure('grids', data, sampler, name, process, budget, 'linear')
      self.attempt('grid', name, sweep)
    print(f'every grid in {time.perf_counter() - began:.0f} s', flush=True)

  def held_out(self) -> None:
    """How far digits that the finite set does not hold are from it."""
    judge, test = self.judge('digits'), exact.points_of(exact.sources.load('digits', 'test'))
    rng = np.random.default_rng([self.seed, 2])
    each = [judge.distance(rng.permutation(test)[:len(a)], a) for a in judge.sets]
    self.record('digits', 'energy', float(np.mean(each)), range=[min(each), max(each)], part='held out')
    near = distance.nearest(test, exact.points_of(exact.sources.load('digits', 'train')))
    self.record('digits', 'nearest_training_digit', float(np.mean(near)), part='held out')

  def picture(self, data: str, caption: str, x0: np.ndarray) -> None:
    """Keeps some samples to be shown."""
    self.pictures.append((data, caption, np.asarray(x0[:SHOWN if data != 'digits' else SHOWN // 10], np.float64)))


def family(sampler: str, random: bool) -> str:
  """The family under which a sampler is shown, from what it does and where it lives."""
  return 'random' if random else 'multistep' if 'multistep' in getattr(samplers, sampler).__module__ else 'one'


def main(argv: Sequence[str] | None = None) -> int:
  """Measures, writes the records and the page, prints a table."""
  p = command.Parser(prog='python -m experiments.analytic.run', allow_abbrev=False,
                     description='Every sampler, schedule and grid with exact denoisers: error against evaluations.')
  p.add_argument('--out', type=pathlib.Path, default=OUT, help=f'folder of results.jsonl and page.html (default {OUT})')
  p.add_argument('--quick', action='store_true', help='small sets and few budgets, to see that it works')
  p.add_argument('--only', default='', help='only these samplers, schedules and grids, with commas between them')
  p.add_argument('--seed', type=int, default=0, help='of the samples and the data (default 0)')
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError('this experiment has no config: --config overrides nothing here')
  only = [name.strip() for name in flags.only.split(',') if name.strip()]
  known = [*samplers.__all__, *schedules.__all__, *levels.GRIDS]
  for name in only:
    if name not in known:
      raise UserError(f'--only knows no sampler, schedule or grid {name!r}')

  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)  # many small programs, the same each time
  began = time.perf_counter()
  study = Study(flags.quick, flags.seed, only)
  study.all_samplers()
  study.all_schedules()
  study.all_grids()
  if not flags.quick:
    study.held_out()
  seconds = time.perf_counter() - began
  flags.out.mkdir(parents=True, exist_ok=True)
  records, target = flags.out / 'results.jsonl', flags.out / 'page.html'
  log.write(records, ''.join(json.dumps(log.plain(record)) + '\n' for record in study.records))
  log.write(target, page.render(study.records, study.pictures, study.skipped, seconds))
  print('\n' + page.markdown(study.records))
  print(f'\n{len(study.records)} values in {seconds:.0f} s: {records}\n{target}')
  return 0


if __name__ == '__main__':
  sys.exit(command.run(main))
