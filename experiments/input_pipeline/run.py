"""How long the train step waits for streamed data: python -m experiments.input_pipeline.run --help."""
import collections
import itertools
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from diffusion_jax.batches import Batches, open_source
from diffusion_jax.model import default_config
from diffusion_jax.runtime import command, log, sharding
from diffusion_jax.runtime.config import UserError
from experiments.input_pipeline import pictures
from experiments.throughput import cases

RESULTS = pathlib.Path(__file__).parent / 'results'
IN_FLIGHT = 8   # as the trainer's: the host runs ahead of the device by so many steps
WARM_UP = 16    # steps that are not counted: readers start, and the queue fills


class StandIn:
  """A device that takes `seconds` for each step, one after another, while the host goes on preparing the next.

  The host waits when IN_FLIGHT steps are unfinished, as the trainer does, and in `finish` until all are, as it does
  when it writes a record. idle: seconds in which the device had nothing to do since the clock of `restart`.
  """

  def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter,
               sleep: Callable[[float], None] = time.sleep):
    self.seconds, self.clock, self.sleep = seconds, clock, sleep
    self.ends = collections.deque()
    self.restart()

  def restart(self) -> None:
    """Begins to count anew, from now or from the end of what is queued."""
    self.free = self.began = max([self.clock(), *self.ends])
    self.idle = 0.0

  def step(self) -> None:
    """Queues a step, of which the data is there."""
    now = self.clock()
    self.idle += max(0.0, now - self.free)
    self.free = max(now, self.free) + self.seconds
    self.ends.append(self.free)
    if len(self.ends) == IN_FLIGHT:
      self._wait(self.ends.popleft())

  def finish(self) -> None:
    """Returns when the device has done all its steps."""
    self.ends.clear()
    self._wait(self.free)

  def share(self) -> float:
    """The part of the time from the start of the count to the end of the last step in which the device was idle."""
    return self.idle / max(self.free - self.began, 1e-9)

  def _wait(self, until: float) -> None:
    if (left := until - self.clock()) > 0:
      self.sleep(left)


def waiting(calls: Iterable[Any], step_seconds: float, log_every: int) -> float:
  """The share of time that a device waits for `calls`, batches, with a record written every `log_every` steps."""
  device = StandIn(step_seconds)
  for i, batch in enumerate(calls, 1):
    jax.block_until_ready(batch)
    device.step()
    if i % log_every == 0:
      device.finish()
    if i == WARM_UP:
      device.restart()
  return device.share()


def alone(calls: Iterable[Any]) -> tuple[float, float]:
  """(batches per second that arrive on the device where nothing else is done, CPU seconds of this process for each)."""
  cpu = time.process_time()
  for batch in itertools.islice(calls := iter(calls), WARM_UP):
    jax.block_until_ready(batch)
  count, began = 0, time.perf_counter()
  for batch in calls:
    jax.block_until_ready(batch)
    count += 1
  return count / (time.perf_counter() - began), (time.process_time() - cpu) / (WARM_UP + count)


def measure(config: Any, size: int, workers: int, flags: Any) -> dict[str, Any]:
  """The record of one size and number of workers."""
  config.data.workers = workers
  source, mesh = open_source(config), sharding.make_mesh(devices=jax.devices()[:1])
  batches, load = Batches(config, source, mesh), os.getloadavg()[0]
  steps = WARM_UP + flags.steps
  rate, cpu = alone(batches(0, steps))
  share = waiting(batches(0, steps), flags.step_ms / 1e3, flags.log_every)
  return {'size': size, 'format': pictures.FORMATS[size], 'images': len(source), 'workers': workers,
          'batch_size': flags.batch_size, 'step_ms': flags.step_ms, 'log_every': flags.log_every, 'steps': flags.steps,
          'images_per_second_alone': rate * flags.batch_size, 'cpu_ms_per_batch': None if workers else 1e3 * cpu,
          'share_waiting': share, 'load_before': load, 'device': cases.device(), 'time': log.now(),
          'git_revision': log.git_revision()}


def main(argv: Sequence[str] | None = None) -> int:
  """Measures every size and number of workers, prints each and keeps its record."""
  p = command.Parser(prog='python -m experiments.input_pipeline.run', allow_abbrev=False,
                     description='Measures how long a train step of a stated duration waits for streamed data.')
  p.add_argument('--sizes', default='32,64', help='32 (CIFAR-10), 64 (downsampled ImageNet) (default 32,64)')
  p.add_argument('--workers', default='0', help='processes that decode; 0: threads (default 0; several: 0,2)')
  p.add_argument('--batch_size', type=int, default=128)
  p.add_argument('--step_ms', type=float, default=100.0, help='of the stand-in for a train step (default 100)')
  p.add_argument('--log_every', type=int, default=50, help='steps between two records (default 50)')
  p.add_argument('--steps', type=int, default=200, help=f'that are counted, after {WARM_UP} others (default 200)')
  p.add_argument('--images', type=int, default=20_000, help='in the data set that is made (default 20000)')
  p.add_argument('--out', help='the file of records (default results/DEVICE.jsonl)')
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError('the data is fixed: --config overrides nothing here')
  for name in ('batch_size', 'log_every', 'steps', 'images'):
    if getattr(flags, name) < 1:
      raise UserError(f'--{name} must be at least 1, got {getattr(flags, name)}')
  sizes, workers = _numbers('--sizes', flags.sizes), _numbers('--workers', flags.workers)
  if unknown := set(sizes) - set(pictures.FORMATS):
    raise UserError(f'--sizes are of {", ".join(map(str, pictures.FORMATS))}, got {min(unknown)}')
  out = pathlib.Path(flags.out) if flags.out else RESULTS / cases.file_name(cases.device())
  with tempfile.TemporaryDirectory() as folder:
    for size in sizes:
      config = default_config()
      config.data.update({'source': pictures.prepare(pathlib.Path(folder), size, flags.images), 'data_dir': folder,
                          'resident_gib': 0.0})
      config.train.batch_size = flags.batch_size
      for count in workers:
        found = measure(config, size, count, flags)
        log.append(out, found)
        by = f'{count} processes' if count else f'threads ({found["cpu_ms_per_batch"]:.0f} ms of a core for a batch)'
        print(f'{size}x{size} {found["format"]}, decoded by {by}: the step waits {100 * found["share_waiting"]:.2f} % '
              f'of the time ({flags.batch_size} images in {flags.step_ms:g} ms; the pipeline alone makes '
              f'{found["images_per_second_alone"]:,.0f} images/s, load {found["load_before"]:.1f} before)', flush=True)
  return 0


def _numbers(flag: str, text: str) -> list[int]:
  try:
    return [int(word) for word in text.split(',')]
  except ValueError:
    raise UserError(f'{flag} must be numbers like 0,2, got {text!r}') from None


if __name__ == '__main__':
  sys.exit(command.run(main))
