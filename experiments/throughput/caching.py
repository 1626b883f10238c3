"""What feature caching gains and costs on a trained run, beside fewer steps of the same arithmetic.

python -m experiments.throughput.caching --help. Every setting draws the same ids; they take turns, round by round.
"""
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax import efficiency, encode
from diffusion_jax.generator import Generator, labels_of
from diffusion_jax.metrics import features, scores
from diffusion_jax.model import open_data
from diffusion_jax.runtime import backend, command, log
from diffusion_jax.runtime.config import Config, UserError
from diffusion_jax.sample import describe, parse_numbers
from diffusion_jax.trained import Trained, restore
from experiments.throughput import cases, run, stats

RESULTS = run.RESULTS / 'caching'
SETTINGS = 'steps', 'cache_every', 'cache_depth'


class Row(NamedTuple):
  """Sampling settings, and what an image costs by them."""
  steps: int
  cache_every: int
  cache_depth: int
  generator: Generator
  flops: float

  @property
  def settings(self) -> dict[str, int]:
    """As a record has them."""
    return {key: getattr(self, key) for key in SETTINGS}


def row_of(trained: Trained, steps: int, every: int = 1, depth: int = 0) -> Row:
  """The row of these settings, the others as the run has them."""
  settings = {'steps': steps, 'cache_every': every, 'cache_depth': depth}
  generator = Generator(trained.model, Config({**trained.model.config.sample, **settings}), 0, trained.mesh)
  return Row(steps, every, generator.depth, generator, efficiency.image_flops(generator, trained))


def rows_of(trained: Trained, every: Sequence[int], depths: Sequence[int]) -> list[Row]:
  """Caching at the run's number of steps, and after each such row the number of steps that costs nearest to as much."""
  steps = trained.model.config.sample.steps
  rows = [row_of(trained, steps)]
  for depth in depths:
    for n in every:
      if n > 1:
        cached = row_of(trained, steps, n, depth)
        fewer = row_of(trained, max(round(steps * cached.flops / rows[0].flops), 1))
        rows += [cached] + [fewer] * all(fewer.settings != row.settings for row in rows)
  return rows


def psnr(images: np.ndarray, plain: np.ndarray) -> float:
  """Of uint8 images [N, ...] against others, in dB: by the mean of the squares over all; infinite if none differ."""
  error = np.mean((images.astype(float) - plain) ** 2)
  return float(10 * np.log10(255 ** 2 / error)) if error else float('inf')


def draw(row: Row, trained: Trained, num: int) -> np.ndarray:
  """The images 0 .. num - 1."""
  size, labels = row.generator.batch_size, labels_of(range(num), trained.model.num_classes)
  return np.concatenate([row.generator(trained.params, range(i, min(i + size, num)), labels[i:i + size])
                         for i in range(0, num, size)])


def timed(row: Row, trained: Trained) -> tuple[float, float]:
  """(seconds, CPU seconds of all threads) of one batch."""
  began = time.perf_counter(), time.process_time()
  draw(row, trained, row.generator.batch_size)
  return time.perf_counter() - began[0], time.process_time() - began[1]


def measure(trained: Trained, rows: Sequence[Row], num: int, rounds: int) -> list[dict[str, Any]]:
  """A record of each row; the first is what the others are compared with."""
  config = trained.model.config
  extractor = features.make(config.eval.features)
  ref = encode.encode(open_data(config.data, config.eval.split), extractor, config.data.max_bad)
  images = [draw(row, trained, num) for row in rows]
  times = [[timed(row, trained) for row in rows] for _ in range(rounds)]
  records = []
  for i, row in enumerate(rows):
    wall, cpu = zip(*(one[i] for one in times), strict=True)
    base = [one[0][1] for one in times]
    score, = scores.scores(extractor.name, extractor.extract(images[i]), ref, None, ('fd',))
    records.append({
        **row.settings, **describe(config.sample), 'guidance': config.sample.guidance, 'nfe': row.generator.nfe,
        'whole_calls': row.generator.whole, 'flops_per_image': row.flops, 'num_samples': num, 'rounds': rounds,
        'batch_size': row.generator.batch_size, 'samples_per_second': row.generator.batch_size / stats.median(wall),
        'cpu_seconds': cpu, 'ratio': stats.ratio(base, cpu), 'interval': stats.interval(base, cpu),
        'metric': score.metric, 'value': score.value, 'ci': score.ci,
        'psnr': psnr(images[i], images[0]) if i else None, 'step': trained.step, 'ema': trained.ema,
        'cpu': cases.device(), 'time': log.now(), **log.provenance()})
  return records


def table(records: Sequence[dict[str, Any]]) -> str:
  """The records in Markdown."""
  lines = ['| steps | cached | calls, whole | MFLOP an image | samples/s | CPU time, uncached over this | '
           f'{records[0]["metric"]} (95 %) | PSNR, dB |', f'|{"---|" * 8}']
  for r in records:
    cached = f'1 of {r["cache_every"]} whole, depth {r["cache_depth"]}' if r['cache_every'] > 1 else 'no'
    near = '' if r['psnr'] is None else f'{r["psnr"]:.1f}'
    low, high = r['interval']
    fd = f'{r["value"]:.2f}' + (f' ({r["ci"][0]:.2f} to {r["ci"][1]:.2f})' if r['ci'] else '')
    lines.append(f'| {r["steps"]} | {cached} | {r["nfe"]}, {r["whole_calls"]} | {r["flops_per_image"] / 1e6:.0f} | '
                 f'{r["samples_per_second"]:.0f} | {r["ratio"]:.2f}x ({low:.2f} to {high:.2f}) | {fd} | {near} |')
  return '\n'.join(lines) + '\n'


def main(argv: Sequence[str] | None = None) -> int:
  """Measures a run's sampling with and without feature caching, and with fewer steps; prints and keeps the records."""
  p = command.Parser(prog='python -m experiments.throughput.caching', description=main.__doc__, allow_abbrev=False)
  p.add_argument('workdir', help='the folder of a trained run with a U-Net')
  p.add_argument('--num', type=int, default=500, help='images of each setting that are scored (default 500)')
  p.add_argument('--every', default='1,2,3,5', help='which cache_every (default 1,2,3,5)')
  p.add_argument('--depths', default='0', help='which cache_depth (default 0, the outermost level)')
  p.add_argument('--rounds', type=int, default=9, help='of one batch of each setting, timed (default 9)')
  p.add_argument('--out', help='the file of records (default results/caching/DEVICE.jsonl)')
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError('the config is the run\'s: --config overrides nothing here')
  if flags.num < 2 or flags.rounds < 2:
    raise UserError(f'--num and --rounds must be at least 2, got {flags.num} and {flags.rounds}')
  trained = restore(pathlib.Path(flags.workdir), '', None,
                    lambda config: backend.prepare(config.sample.batch_size))
  rows = rows_of(trained, *(parse_numbers(f'--{name}', getattr(flags, name)) for name in ('every', 'depths')))
  records = measure(trained, rows, flags.num, flags.rounds)
  log.append(pathlib.Path(flags.out or RESULTS / cases.file_name(cases.device())), *records)
  print(table(records))
  return 0


if __name__ == '__main__':
  sys.exit(command.run(main))
