"""What fewer bits cost and give: python -m experiments.throughput.precision --help.

Of a run: the Fréchet distance of the same ids, and PSNR against the images of the run's own precision. Of it, and of
networks with random weights: the error of one output, the bytes of the parameters, and the time of a forward pass in
which the precisions take turns.
"""
import argparse
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import encode, score
from diffusion_jax.generator import Generator, labels_of
from diffusion_jax.metrics import features
from diffusion_jax.model import open_data
from diffusion_jax.nets import quantise
from diffusion_jax.runtime import command, log
from diffusion_jax.runtime.config import Config, UserError, explain
from diffusion_jax.sample import add_flags, describe, open_run
from diffusion_jax.settings import CHOICES
from diffusion_jax.trained import Trained, reduced
from experiments.throughput import cases, equal, run, stats

PRECISIONS = CHOICES['sample.precision']
RESULTS = run.RESULTS / 'precision'
COLUMNS = {  # of the table
    'what': lambda r: r['what'], 'precision': lambda r: r['precision'] or 'as trained',
    'parameters, MiB': lambda r: f'{r["bytes"] / 2 ** 20:.1f}', 'error of an output': lambda r: f'{r["error"]:.1e}',
    'distance': lambda r: f'{r["distance"]:.2f} [{r["ci"][0]:.1f}, {r["ci"][1]:.1f}]' if 'distance' in r else '-',
    'PSNR, dB': lambda r: f'{r["psnr"]:.1f}' if r.get('psnr') else '-',
    'speed by CPU time (95 %)': lambda r: f'{r["cpu_speed"]:.2f}x ({r["interval"][0]:.2f} to {r["interval"][1]:.2f})',
    'jax': lambda r: r['versions']['jax']}


def psnr(images: np.ndarray, exact: np.ndarray) -> float:
  """10 log10 (255^2 / mean square difference) of uint8 images, infinite for equal ones."""
  square = np.mean((images.astype(np.float64) - exact) ** 2)
  return float(10 * np.log10(255 ** 2 / square)) if square else float('inf')


def passes(calls: Mapping[str, Callable[[], jax.Array]], rounds: int) -> dict[str, dict[str, Any]]:
  """{precision: what a forward pass gives and takes}, beside the first, the precisions taking turns.

  A speed is the first's time over the precision's: above 1, it is faster.
  """
  outputs = {name: np.asarray(call(), np.float64) for name, call in calls.items()}
  wall, cpu = ({name: [] for name in calls} for _ in range(2))
  for i in range(rounds):
    for name in list(calls)[::1 if i % 2 else -1]:
      began = time.perf_counter(), time.process_time()
      jax.block_until_ready(calls[name]())
      wall[name].append(time.perf_counter() - began[0])
      cpu[name].append(time.process_time() - began[1])
  first = next(iter(calls))
  exact = outputs[first]
  return {name: {
      'error': float(np.linalg.norm(outputs[name] - exact) / np.linalg.norm(exact)),
      'speed': stats.ratio(wall[first], wall[name]), 'cpu_speed': stats.ratio(cpu[first], cpu[name]),
      'interval': stats.interval(cpu[first], cpu[name]), 'spread': stats.spread(cpu[name]), 'cpu_seconds': cpu[name]}
      for name in calls}


def held(params: Any) -> int:
  """The bytes of parameters."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def of_net(name: str, rounds: int) -> list[dict[str, Any]]:
  """The records of a network of cases.NETS with random weights, one for each precision."""
  net = cases.choose('network', cases.NETS, name)
  case = cases.Case(name, 'forward', 8, f'{name}, random weights, batch 8')
  module, given = equal.module(net), jax.device_put(cases.inputs(case))
  exact = jax.device_put(equal.random_params(equal.shapes(module, case)))
  made = {p: quantise.reduced(module, exact, p) if p else (module, exact) for p in PRECISIONS}
  call = lambda net, params: functools.partial(jax.jit(equal.call(net, case.work)), params, given)
  found = passes({p: call(*both) for p, both in made.items()}, rounds)
  return [{'what': case.about, 'precision': p, 'bytes': held(params), **found[p]} for p, (_, params) in made.items()]


def of_run(flags: argparse.Namespace) -> list[dict[str, Any]]:
  """The records of a run, one for each precision."""
  trained, settings = open_run(flags)
  config, num = trained.model.config, flags.num or 500
  settings = Config({**settings, 'batch_size': settings.batch_size or 64})
  with explain('--features'):
    extractor = features.make(flags.features or config.eval.features)
  with explain('config.data'):
    ref = encode.encode(open_data(config.data, config.eval.split), extractor, config.data.max_bad)
  against, records, calls, exact = score.Against(extractor, ref, None, ('fd',), True), [], {}, None
  for precision in PRECISIONS:
    made = reduced(trained, precision)
    generator = Generator(made.model, settings, flags.seed, made.mesh)
    images = generator.draw(made.params, range(num), labels_of(range(num), made.model.num_classes))
    exact = images if exact is None else exact
    line = score.score(extractor.extract(images), against, None)[0]
    records.append({
        'what': f'{pathlib.Path(flags.workdir).resolve().name}, {num} samples', 'precision': precision,
        'bytes': held(made.params['net']), 'metric': line['metric'], 'distance': line['value'], 'ci': line['ci'],
        'psnr': psnr(images, exact) if precision else None, 'num_samples': num,
        **describe(settings), **{key: settings[key] for key in ('steps', 'batch_size')}, 'seed': flags.seed,
        'step': trained.step})
    calls[precision] = forward(made, settings.batch_size)
  found = passes(calls, flags.rounds)
  return [record | found[record['precision']] for record in records]


def forward(trained: Trained, size: int) -> Callable[[], jax.Array]:
  """A call of the denoiser on `size` noisy examples, halfway through the process."""
  model, params = trained.model, trained.params
  about = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), model.about_shapes(size))
  x = jax.random.normal(jax.random.key(0), (size, *model.shape))

  def call(params, x, about):
    level = model.diffusion.process.level(jnp.full(size, 0.5), params['process'])
    return model.denoiser(params, model.cond(params, about))(x, level)

  return functools.partial(jax.jit(call), params, x, about)


def table(records: Sequence[Mapping[str, Any]]) -> str:
  """Records in Markdown."""
  return '\n'.join([f'| {" | ".join(COLUMNS)} |', f'|{"---|" * len(COLUMNS)}'] + [
      f'| {" | ".join(cell(record) for cell in COLUMNS.values())} |' for record in records])


def main(argv: Sequence[str] | None = None) -> int:
  """Compares precisions of a run (--workdir, and the flags of sample), or of networks with random weights (--nets)."""
  p = command.Parser(prog='python -m experiments.throughput.precision', description=main.__doc__, allow_abbrev=False)
  add_flags(p)
  next(action for action in p._actions if action.dest == 'workdir').required = False
  p.add_argument('--features', help="what looks at the samples (default: the config's)")
  p.add_argument('--nets', help=f'of {", ".join(cases.NETS)}')
  p.add_argument('--rounds', type=int, default=15, help='passes of each precision that are timed (default 15)')
  p.add_argument('--out', help='a file to which records are added (default results/precision/DEVICE.jsonl)')
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError(f'a run has its own config: --config.{next(iter(overrides))} is for train')
  if not flags.workdir and not flags.nets:
    raise UserError('nothing to compare: give --workdir=RUN, or --nets=cifar10')
  if flags.rounds < 2:
    raise UserError(f'--rounds must be at least 2, got {flags.rounds}')
  records = of_run(flags) if flags.workdir else []
  for name in flags.nets.split(',') if flags.nets else ():
    records += of_net(name, flags.rounds)
  device = cases.device() if jax.default_backend() == 'cpu' else log.device()
  common = {'time': log.now(), 'rounds': flags.rounds, **log.provenance(), 'device': device}
  path = pathlib.Path(flags.out) if flags.out else RESULTS / cases.file_name(device)
  records = [{**common, **record} for record in records]
  log.append(path, *records)
  print(table(records))
  print(f'-> {path}')
  return 0


if __name__ == '__main__':
  sys.exit(command.run(main))
