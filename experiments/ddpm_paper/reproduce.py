"""Fills our column beside a paper's numbers, from the records of the point folders of a sweep.

python -m experiments.ddpm_paper.reproduce [--paper ddpm|iddpm] [--scale tiny|full] [--root ROOT] [--run]

Trains nothing by itself: what is missing is 'not run', and the commands that make it are printed; --run runs them. Each
cell passes or fails by a tolerance that is printed too. At another budget than the paper's nothing is compared.
The exit status is 1 if a cell fails.
"""
import importlib
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion_jax.runtime import command
from diffusion_jax.runtime.config import UserError
from experiments.ddpm_paper import cells
from experiments.ddpm_paper.cells import NOT_RUN, Cell, Point, Scale

PAPERS = {'ddpm': 'experiments/ddpm_paper', 'iddpm': 'experiments/iddpm'}
SCALES = {'full': 'sweep', 'tiny': 'tiny'}


def scale_of(paper: str, scale: str) -> tuple[Any, Scale]:
  """The sweep module of a scale, and what its runs are to be compared with."""
  file = f'{PAPERS[paper]}/{SCALES[scale]}.py'
  module = importlib.import_module(file.removesuffix('.py').replace('/', '.'))
  images = {run: module.get_config(run).train.images for run in module.RUNS}
  return module, Scale(file, images, scale == 'full', getattr(module, 'METRICS', {}))


def commands(module: Any, scale: Scale, points: Sequence[Point], missing: Sequence[Cell],
             root: pathlib.Path) -> list[list[str]]:
  """What makes the missing cells: of runs without a point folder the sweep, of the others their evaluations."""
  python, made, found = [sys.executable, '-m'], {point.run for point in points}, []
  if any(cell.run in module.RUNS and cell.run not in made for cell in missing):
    found.append([*python, 'diffusion_jax.sweep', 'run', scale.sweep, f'--root={root}'])
  for point in points:
    lacking = [cell for cell in missing if cell.run == point.run and not cells.found(
        cell, scale.metrics.get(cell.metric, cell.metric), point)]
    for flags in dict.fromkeys(tuple(_flags(cell.where)) for cell in lacking if 'split' not in cell.where):
      steps = sorted({cell.where['steps'] for cell in lacking
                      if 'split' not in cell.where and tuple(_flags(cell.where)) == flags and 'steps' in cell.where})
      sweep = [f'--sweep_steps={",".join(map(str, steps))}'] if steps else []
      found.append([*python, 'diffusion_jax.evaluate', f'--workdir={point.folder}', *module.EVALUATE, *flags, *sweep])
    for split in dict.fromkeys(cell.where['split'] for cell in lacking if 'split' in cell.where):
      found.append([*python, 'diffusion_jax.likelihood', f'--workdir={point.folder}', '--ema=main',
                    '--estimator=discrete_vlb', f'--split={split}'])
  return found


def _flags(where: Mapping[str, Any]) -> list[str]:
  return [f'--{key}={where[key]}' for key in ('sampler', 'grid') if key in where]


def state(paper: str, scale_name: str, root: pathlib.Path):
  """(module, scale, points, results): all that is known now."""
  module, scale = scale_of(paper, scale_name)
  points = cells.read_points(root, scale.sweep)
  return module, scale, points, [cells.judge(cell, points, scale) for cell in module.CELLS]


def wanted(module: Any, scale: Scale, results: Sequence[cells.Result]) -> list[Cell]:
  """The cells that are not run, and could be."""
  return [cell for cell, result in zip(module.CELLS, results, strict=True)
          if result.verdict == NOT_RUN and cell.run in module.RUNS and scale.metrics.get(cell.metric, cell.metric)]


def main(argv: Sequence[str] | None = None) -> int:
  p = command.parser('reproduce', 'A paper\'s numbers beside ours.')
  p.add_argument('--paper', default='ddpm', help=f'{" or ".join(PAPERS)} (default ddpm, with DDIM)')
  p.add_argument('--scale', default='full', help=f'{" or ".join(SCALES)} (default full)')
  p.add_argument('--root', help='where the point folders are (default runs/PAPER-SCALE)')
  p.add_argument('--run', action='store_true', help='train and evaluate what is missing')
  flags, overrides = p.parse(argv)
  for name, known in (('paper', PAPERS), ('scale', SCALES)):
    if getattr(flags, name) not in known:
      raise UserError(f'--{name} must be {" or ".join(known)}, got {getattr(flags, name)!r}')
  if overrides:
    raise UserError(f'reproduce takes its configs from the sweep file: --config.{next(iter(overrides))} would change '
                    'what is reproduced')
  root = pathlib.Path(flags.root or f'runs/{flags.paper}-{flags.scale}')
  module, scale, points, results = state(flags.paper, flags.scale, root)
  done = set()
  while flags.run:  # the sweep first, and then what its points lack
    todo = [c for c in commands(module, scale, points, wanted(module, scale, results), root) if tuple(c) not in done]
    if not todo:
      break
    done.add(tuple(todo[0]))
    print(shlex.join(todo[0]), flush=True)
    if status := subprocess.run(todo[0]).returncode:
      print(f'ended with status {status}; the same command continues', file=sys.stderr)
      return status
    module, scale, points, results = state(flags.paper, flags.scale, root)
  budgets = sorted(set(scale.images.values()))
  print(f'Scale {flags.scale}: {" or ".join(f"{n:,}" for n in budgets)} training images a model, '
        f'{len(points)} points under {root}. ' + (f'Tolerance: {cells.TOLERANCE}.' if scale.comparable else
                                                  'Another budget than the paper\'s: nothing is compared.'))
  print(cells.table(module.CELLS, results))
  print(f'\n{cells.counted(results)} of {len(results)} cells')
  todo = commands(module, scale, points, wanted(module, scale, results), root)
  if todo:
    print('\nWhat is not run is made by --run, or by:')
    print('\n'.join(f'  {shlex.join(line)}' for line in todo))
  return int(any(result.verdict == cells.FAIL for result in results))


if __name__ == '__main__':
  sys.exit(command.run(main))
