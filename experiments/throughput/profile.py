"""Where the time of one of our cases goes: python -m experiments.throughput.profile --help.

A few iterations under jax.profiler: every operation that ran, by the name that it has in the compiled program, whose
text says which module and which kind of work it belongs to (hlo.py).
"""
import collections
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from diffusion_jax.runtime import command, log
from diffusion_jax.runtime.config import UserError
from experiments.throughput import cases, hlo
from experiments.throughput.cases import CASES, choose
from experiments.throughput.processes import PLATFORMS
from experiments.throughput.worker import Job, warm_up

WITHOUT_PROGRAM = ('overhead', 'checkpoint', 'read', 'dispatch', 'limits')  # what they measure is not a program
SHORTEST_SHARE = 0.002  # of all time, below which a row of the tables by kind and module is left out


class Row(NamedTuple):
  """An operation of the program: seconds of all its runs on all devices, without those of what it calls."""
  name: str
  runs: int
  seconds: float
  kind: str
  path: tuple[str, ...]
  backward: bool
  flops: float  # of a run
  shape: str


class Event(NamedTuple):
  """Of a trace. program: '' for those that are no operation of one."""
  name: str
  program: str
  start: float
  seconds: float


def events(folder: pathlib.Path) -> list[Event]:
  """The operations of all programs, and the ends of those that end later, from what jax.profiler wrote.

  An accelerator's are those that it says itself: the host's are of their start.
  """
  planes = [plane for file in folder.glob('plugins/profile/*/*.xplane.pb')
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes]
  found = {plane.name: list(_operations(plane)) for plane in planes}
  devices = [own for name, own in found.items() if name.startswith('/device:') and own]
  return [event for own in devices or found.values() for event in own]


def _operations(plane: Any) -> Iterator[Event]:
  lines = list(plane.lines)
  for line in [line for line in lines if line.name == 'XLA Ops'] or lines:  # a TPU has others, which sum these up
    for event in line.events:
      if event.name.startswith(('$', 'ThreadpoolListener')):
        continue
      stats, times = dict(event.stats), (event.start_ns / 1e9, event.duration_ns / 1e9)
      if 'hlo_op' in stats:
        yield Event(str(stats['hlo_op']), str(stats['hlo_module']), *times)
      elif line.name == 'XLA Ops':  # named by their whole text
        yield Event(re.match(r'%?([\w.-]+)', event.name)[1], str(stats.get('hlo_module', 'TPU')), *times)
      elif event.name.startswith('end: '):
        yield Event(event.name[5:], '', *times)


def main_program(found: Iterable[Event]) -> str:
  """The program that took the most time."""
  total = collections.Counter()
  for event in found:
    if event.program:
      total[event.program] += event.seconds
  if not total:
    raise UserError('the trace holds no operation of a compiled program')
  return total.most_common(1)[0][0]


def spent(found: Iterable[Event], program: str) -> dict[str, tuple[int, float]]:
  """{operation: (runs, seconds)}; an operation that ends on another thread lasts until its end, if all of them say so.

  The sum of times from beginnings to ends is that of the ends less that of the beginnings, however they belong
  together.
  """
  runs, ends = collections.defaultdict(list), collections.defaultdict(list)
  for event in found:
    if event.program == program:
      runs[event.name].append(event)
    elif not event.program:
      ends[event.name].append(event)
  seconds = {}
  for name, own in runs.items():
    took = sum(e.seconds for e in own)
    if len(ends[name]) == len(own):
      base = own[0].start
      took = max(took, sum(e.start - base for e in ends[name]) - sum(e.start - base for e in own))
    seconds[name] = len(own), took
  return seconds


def rows(program: hlo.Program, times: Mapping[str, tuple[int, float]]) -> list[Row]:
  """Every operation that ran, the longest first."""
  found = []
  for name, (runs, seconds) in times.items():
    if name not in program.ops:
      found.append(Row(name, runs, seconds, 'unknown', (), False, 0.0, ''))
      continue
    own = seconds - sum(times[inner][1] for inner in program.children(name) if inner in times)
    label = hlo.label(program, name)
    found.append(Row(name, runs, max(own, 0.0), hlo.kind(program, name), hlo.path(label), hlo.is_backward(label),
                     hlo.flops(program, name), program.ops[name].shape))
  return sorted(found, key=lambda row: -row.seconds)


def table(title: str, lines: Sequence[Sequence[str]]) -> str:
  """Aligned columns, the first of text."""
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  shown = ['  '.join(cell.ljust(w) if i == 0 or i == len(line) - 1 else cell.rjust(w)
                     for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip() for line in lines]
  return '\n'.join([title, *('  ' + line for line in shown)])


def grouped(title: str, found: Sequence[Row], key: Callable[[Row], str], scale: float, most: int) -> str:
  """ms of an iteration by `key`, forward and backward, and GFLOP/s where there are products."""
  groups, total = collections.defaultdict(list), sum(row.seconds for row in found)
  for row in found:
    groups[key(row)].append(row)
  seconds = lambda own: sum(row.seconds for row in own)
  lines = [('', 'ms', 'share', 'forward', 'backward', 'operations', 'GFLOP/s')]
  for name, own in sorted(groups.items(), key=lambda item: -seconds(item[1]))[:most]:
    if seconds(own) < SHORTEST_SHARE * total:
      continue
    back, work = seconds(row for row in own if row.backward), sum(row.flops * row.runs for row in own)
    lines.append((name, f'{seconds(own) * scale:.2f}', f'{100 * seconds(own) / total:.1f} %',
                  f'{(seconds(own) - back) * scale:.2f}', f'{back * scale:.2f}', str(len(own)),
                  f'{work / seconds(own) / 1e9:.0f}' if work else ''))
  return table(title, lines)


def module(row: Row) -> str:
  """The modules of an operation, numbers left out, and its kind: 'UNet/down_*_block_*/conv_* convolution'."""
  return f'{re.sub(r"[0-9]+", "*", "/".join(row.path)) or "(no module)"}: {row.kind}'


def render(found: Sequence[Row], iterations: int, devices: int, wall: float, top: int) -> str:
  """The tables; wall: seconds of an iteration without the profiler."""
  scale, total = 1e3 / iterations / devices, sum(row.seconds for row in found)
  lines = [('', 'ms', 'share', 'runs', 'GFLOP/s', 'what')]
  for row in found[:top]:
    lines.append((row.name, f'{row.seconds * scale:.2f}', f'{100 * row.seconds / total:.1f} %',
                  f'{row.runs / iterations / devices:g}',
                  f'{row.flops * row.runs / row.seconds / 1e9:.0f}' if row.flops and row.seconds else '',
                  f'{row.kind}{", backward" if row.backward else ""}, {"/".join(row.path) or "-"}, '
                  f'{re.sub(r"{[^}]*}", "", row.shape)}'))
  return '\n\n'.join([
      f'{1e3 * wall:.2f} ms an iteration without the profiler; operations of {total * scale:.2f} ms with it, on each '
      f'of {devices} device{"s" * (devices > 1)}; GFLOP/s are of one device',
      grouped('By kind', found, lambda row: row.kind, scale, len(found)),
      grouped('By module', found, module, scale, top),
      table(f'The longest {min(top, len(found))} of {len(found)} operations', lines)]) + '\n'


def text_of(program: str, times: Mapping[str, Any]) -> str:
  """The text of the program of that name which has the most of the operations that ran."""
  texts = ['\n'.join(m.to_string() for m in executable.hlo_modules())
           for executable in jax.devices()[0].client.live_executables() if executable.hlo_modules()[0].name == program]
  if not texts:
    raise UserError(f'the program {program!r} that ran is not held by any function')
  return max(texts, key=lambda text: sum(f'%{name} = ' in text for name in times))


def profile(run: Callable[[int], Any], iterations: int, folder: pathlib.Path) -> tuple[list[Row], float]:
  """(every operation of run(iterations), seconds of an iteration before the profiler was on)."""
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  start = time.perf_counter()
  run(iterations)
  wall = (time.perf_counter() - start) / iterations
  with jax.profiler.trace(str(folder), profiler_options=options):
    run(iterations)
  found = events(folder)
  times = spent(found, name := main_program(found))
  return rows(hlo.parse(text_of(name, times)), times), wall


def main(argv: Sequence[str] | None = None) -> int:
  """Prints where the time of each chosen case goes."""
  p = command.Parser(prog='python -m experiments.throughput.profile', allow_abbrev=False,
                     description='Prints where the time of our side of a case goes: by kind of work, by module and by '
                                 'operation.')
  p.add_argument('--cases', required=True, help='with commas between them; those of experiments.throughput.run')
  p.add_argument('--suite', default='cpu', help=f'where: {", ".join(PLATFORMS)} (default cpu)')
  p.add_argument('--iterations', type=int, default=3, help='that are traced (default 3)')
  p.add_argument('--top', type=int, default=20, help='rows of the longest operations and modules (default 20)')
  p.add_argument('--out', help='a folder for the tables, as CASE.txt, beside what is printed')
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError('cases are fixed: --config overrides nothing here')
  for name in ('iterations', 'top'):
    if getattr(flags, name) < 1:
      raise UserError(f'--{name} must be at least 1, got {getattr(flags, name)}')
  platform = choose('suite', PLATFORMS, flags.suite)['JAX_PLATFORMS']
  chosen = {name.strip(): choose('case', CASES, name.strip()) for name in flags.cases.split(',')}
  if absent := [name for name, case in chosen.items() if case.work in WITHOUT_PROGRAM]:
    raise UserError(f'{absent[0]} is not the time of one program: choose another case')
  jax.config.update('jax_platforms', platform)
  # A program from the cache has the names of the code that it was compiled from, unless they are part of its key.
  jax.config.update('jax_compilation_cache_include_metadata_in_key', True)
  from experiments.throughput import jax_side
  for name, case in chosen.items():
    with tempfile.TemporaryDirectory() as folder:
      prepared = jax_side.WORK[case.work](Job(case, pathlib.Path(folder), flags.suite))
      warm_up(prepared.run)
      found, wall = profile(prepared.run, flags.iterations, pathlib.Path(folder) / 'profile')
    text = render(found, flags.iterations, int(re.match(r'\d+', prepared.setting)[0]), wall, flags.top)
    print(f'{name}: {case.about}\n{text}', flush=True)
    if flags.out:
      head = f'{case.about}, {cases.device()}, {log.git_revision()}\n'
      log.write(pathlib.Path(flags.out) / f'{name}.txt', head + text)
  return 0


if __name__ == '__main__':
  sys.exit(command.run(main))
