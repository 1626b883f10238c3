"""COMMAND: runs the points of a sweep file wherever a launcher brings them, and says how far they are.

  diffusion-jax sweep run|retry|status|collect|cancel FILE [--root ROOT] [--only PATTERN] ...

`run` makes the folders, then hands one job per unfinished point to a launcher; a job is `sweep point FILE --name NAME`,
which trains, evaluates and continues where it was stopped. Whoever is killed when: a point holds the lock of its folder
while it runs, so it is never doubled, and all state is in files, so the same command goes on. See docs/sweeps.md.
"""
import argparse
import importlib
import os
import pathlib
import signal
import socket
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from diffusion_jax import attempt, collect, points, progress, records
from diffusion_jax.attempt import STOPPED
from diffusion_jax.compare import plain
from diffusion_jax.points import Plan, Point
from diffusion_jax.progress import FAILED, FINISHED, INTERRUPTED, RUNNING, WAITING
from diffusion_jax.runtime.config import UserError
from diffusion_jax.svg import duration, number

LAUNCHERS = 'local', 'slurm', 'gke', 'tpu_vm'


# run and retry

def run(flags: argparse.Namespace, launcher: ModuleType, options: Any) -> int:
  """`sweep run` and `sweep retry`: hands to the launcher what is to be run, says of every other point why it is not.

  Returns 0; with a launcher that waits: 1 if a point failed, 75 if one is not finished.
  """
  root = points.root_of(flags.file, flags.root)
  plan = points.plan(flags.file, root, flags.again)
  chosen, queued = points.select(plan.points, flags.only), queue(root)
  todo = []
  for point in chosen:
    now = progress.state(point, plan.evaluate)
    why = reason_to_skip(point, now, plan, flags, queued)
    print(f'{"skip" if why else "run "}  {point.name}  {plain(why or now.state)}')
    if not why:
      todo.append(point)
  current = {point.folder for point in plan.points}
  if others := [about for alike in points.folders(root).values() for about in alike if about['folder'] not in current]:
    print(f'{len(others)} folders in {root} are of other configs, seeds or code, and are left alone')
  jobs = [job_of(point, flags) for point in todo]
  if flags.dry_run:
    print(launcher.render(jobs, options).rstrip('\n') if jobs else 'nothing to run')
    return 0
  points.save_plan(root, plan)
  if jobs:
    submit(root, plan, todo, jobs, flags.launcher, launcher, options)
  if not launcher.WAITS:
    return 0
  states = [progress.state(point, plan.evaluate) for point in chosen]
  print(summary(states))
  for point, now in zip(chosen, states, strict=True):
    if now.state != FINISHED:
      print(f'{point.name}: {now.state} {plain(now.note)}'.rstrip())
  kinds = {now.state for now in states}
  return 1 if FAILED in kinds else 0 if kinds == {FINISHED} else STOPPED


def reason_to_skip(point: Point, now: progress.State, plan: Plan, flags: argparse.Namespace, queued: set[str]) -> str:
  """Why a point is not run now; '' if it is."""
  other = f'by other code ({point.code}, now it is {plan.code})' if point.code != plan.code else ''
  if now.state == FINISHED:
    return f'finished {other}; --again trains it anew' if other else 'finished'
  if now.state == RUNNING:
    return f'running, {now.note}'
  if point.name in queued:
    return 'submitted already, and not started'
  if other and not flags.any_code:
    return f'begun {other}; --any_code continues it, --again trains it anew'
  if now.state == FAILED and not (flags.command == 'retry' and flags.all):
    return f'failed, {now.note}; sweep retry --all runs it again'
  if now.state == WAITING and flags.command == 'retry':
    return 'never started; sweep run starts it'
  return ''


def submit(root: pathlib.Path, plan: Plan, todo: Sequence[Point], jobs: Sequence[Any], name: str, launcher: ModuleType,
           options: Any) -> None:
  """Makes the folders, then submits. Killed anywhere, it can be done again: see `point`."""
  from diffusion_jax.runtime import log
  for point in todo:
    points.make(point, plan.sweep, plan.evaluate)
    log.append(point.folder / 'attempts.jsonl', {'event': 'submit', 'time': log.now(), 'launcher': name})
  ids = launcher.submit(jobs, options, str(root / 'launch'))
  log.append(root / 'submissions.jsonl', {
      'time': log.now(), 'launcher': name, 'ids': dict(zip([point.name for point in todo], ids, strict=True))})


def job_of(point: Point, flags: argparse.Namespace) -> Any:
  """The launcher's job that runs a point."""
  from launch.job import Job
  more = [*(f'--allow={package}' for package in flags.allow), *(['--any_code'] if flags.any_code else [])]
  root = points.root_of(flags.file, flags.root)
  argv = (sys.executable, '-m', 'diffusion_jax.sweep', 'point', flags.file, '--name', point.name, '--root', str(root),
          *more)
  return Job(name=point.folder.name, argv=argv, workdir=str(point.folder))


def queue(root: pathlib.Path) -> set[str]:
  """The names of the points whose newest submission the launcher says to be alive; those it cannot tell are not."""
  from launch.job import LaunchError
  found = set()
  for name, ids in submitted(root).items():
    try:
      living = launcher_of(name).alive(sorted(set(ids.values())))
    except (OSError, LaunchError) as e:
      print(f'{name} does not say what is queued ({plain(str(e))}): a point may be submitted twice, and run once',
            file=sys.stderr)
      continue
    found |= {point for point, one in ids.items() if one in living}
  return found


def submitted(root: pathlib.Path) -> dict[str, dict[str, str]]:
  """{launcher: {name of a point: id}} of the newest submission of each point."""
  newest, found = {}, {}
  for line in records.read_lines(root / 'submissions.jsonl'):
    if line.get('launcher') in LAUNCHERS and isinstance(line.get('ids'), dict):
      newest |= {point: (line['launcher'], str(one)) for point, one in line['ids'].items()}
  for point, (name, one) in newest.items():
    found.setdefault(name, {})[point] = one
  return found


# status and cancel

def status(flags: argparse.Namespace) -> int:
  """`sweep status`: a table of all points; --watch prints it again and again until nothing runs or waits."""
  root = points.root_of(flags.file, flags.root)
  while True:
    plan = points.load_plan(root)
    chosen = points.select(plan.points, flags.only)
    states = [progress.state(point, plan.evaluate) for point in chosen]
    if flags.watch and sys.stdout.isatty():
      print('\033[H\033[2J', end='')
    print('\n'.join(collect.columns([('point', 'state', 'progress', 'images/s', 'left', '')] + [
        line(point, now) for point, now in zip(chosen, states, strict=True)])))
    print('\n'.join([summary(states), *collect.stale(flags.file, plan)]), flush=True)
    if not flags.watch or not any(now.state in (RUNNING, WAITING, INTERRUPTED) for now in states):
      return 0
    time.sleep(flags.every)


def line(point: Point, now: progress.State) -> tuple[str, ...]:
  """A row of the table."""
  last = progress.tail(point.folder / 'metrics.jsonl')
  train = records.read_json(point.folder / 'config.json').get('train')
  total = number(train.get('images')) if isinstance(train, dict) else None
  images, rate = number(last.get('images')), number(last.get('images_per_second'))
  trained = (point.folder / 'done.json').exists()
  share = 'trained' if trained else f'{min(images / total, 1):.0%}' if total and images is not None else ''
  if trained and now.state == RUNNING:
    share = 'evaluating'
  left = duration(max(total - images, 0) / rate) if (
      now.state == RUNNING and not trained and total and images is not None and rate) else ''
  words = (point.name, now.state, share, f'{rate:,.0f}' if rate else '', left, now.note)
  return tuple(word[:120] for word in words)


def summary(states: Sequence[progress.State]) -> str:
  """'4 points: 3 finished, 1 running'."""
  kinds = [now.state for now in states]
  counts = [f'{kinds.count(kind)} {kind}' for kind in progress.STATES[::-1] if kind in kinds]
  return f'{len(states)} point{"s" * (len(states) != 1)}: {", ".join(counts)}'


def cancel(flags: argparse.Namespace) -> int:
  """`sweep cancel`: stops what runs and what is queued; both can be run again and continue."""
  from diffusion_jax.runtime import log
  root = points.root_of(flags.file, flags.root)
  plan = points.load_plan(root)
  ids = {point: (name, one) for name, found in submitted(root).items() for point, one in found.items()}
  wanted = {}
  for one in points.select(plan.points, flags.only):
    now = progress.state(one, plan.evaluate)
    if now.state in (FINISHED, FAILED) or not (one.folder / 'attempts.jsonl').exists():
      continue
    # Before the signal: a launcher that starts the point again finds this.
    log.append(one.folder / 'attempts.jsonl', {'event': 'cancel', 'time': log.now()})
    name, known = ids.get(one.name, ('local', ''))
    if name != 'local':
      wanted.setdefault(name, []).append(known)
    print(f'{one.name}: {stop(now) if now.state == RUNNING else "not started again before run or retry"}')
  for name, known in wanted.items():
    launcher_of(name).cancel(sorted(set(known)))
    print(f'{name}: cancelled {", ".join(sorted(set(known)))}')
  return 0


def stop(now: progress.State) -> str:
  """Sends a SIGTERM to a running point of this machine; what came of it, in words."""
  pid, host = now.last.get('pid'), now.last.get('host')
  if host != socket.gethostname() or type(pid) is not int or pid < 2:
    return f'runs on {plain(str(host))}, and stops where the launcher can stop it'
  try:
    command = pathlib.Path(f'/proc/{pid}/cmdline')
    if command.exists() and b'point' not in command.read_bytes().split(b'\0'):
      return f'pid {pid} is another program by now; what was started by it ends by itself'
    os.kill(pid, signal.SIGTERM)
  except (ProcessLookupError, FileNotFoundError):
    return f'pid {pid} has ended'
  except PermissionError:
    return f'pid {pid} is not yours to stop'
  return f'stopping pid {pid}'


# The command line

class Parser(argparse.ArgumentParser):
  """argparse whose errors are one sentence and status 2."""

  def error(self, message: str):
    raise UserError(f'{message} (see {self.prog} --help)')


def launcher_of(name: str) -> ModuleType:
  """The module of a launcher."""
  progress.need_launch()
  try:
    return importlib.import_module(f'launch.{name}')
  except ImportError as e:
    raise UserError(f'the launcher {name!r} cannot be imported: {e}') from e


def main(argv: Sequence[str] | None = None) -> int:
  """The command."""
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    return command(argv)
  except (UserError, records.Unusable, OSError) as e:
    if isinstance(e, BrokenPipeError):  # the reader has seen enough
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return 0
    print(f'error: {plain(str(e))}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    return 130


def command(argv: list[str]) -> int:
  """Reads the flags and does what they say."""
  p = Parser('diffusion-jax sweep', allow_abbrev=False, description='Runs the points of a sweep file.')
  words = p.add_subparsers(dest='command', required=True, metavar='COMMAND')
  add = {name: words.add_parser(name, help=what, description=what, allow_abbrev=False) for name, what in {
      'run': 'runs what is not finished', 'retry': 'runs again what was interrupted; --all: and what failed',
      'status': 'says how far every point is', 'collect': 'makes one table, averaged over seeds',
      'cancel': 'stops what runs and what is queued', 'point': 'runs one point; what every job does'}.items()}
  for name, parser in add.items():
    parser.add_argument('file', metavar='FILE', help='a sweep file, such as experiments/QUESTION/sweep.py')
    parser.add_argument('--root', help="where the points' folders are (default: runs/QUESTION, of QUESTION/other.py "
                        'runs/QUESTION-other)')
    if name in ('run', 'retry', 'point'):
      parser.add_argument('--allow', action='append', default=[], metavar='PACKAGE',
                          help='a package of your own whose functions configs may call')
      parser.add_argument('--any_code', action='store_true', help='continue points that other code has begun')
    if name != 'point':
      parser.add_argument('--only', metavar='PATTERN', help='the points whose name or run matches, such as cosine-*')
  add['point'].add_argument('--name', required=True, help='RUN-sSEED')
  add['status'].add_argument('--watch', action='store_true', help='again and again, until all are finished or failed')
  add['status'].add_argument('--every', type=float, default=5.0, help='seconds between two tables of --watch [5]')
  add['retry'].add_argument('--all', action='store_true', help='also points that failed')
  collect.add_flags(add['collect'])
  launching = argv[:1] and argv[0] in ('run', 'retry')
  if launching:
    add['retry'].set_defaults(again=False)
    add['run'].add_argument('--again', action='store_true', help='train anew what other code has begun or finished')
    add[argv[0]].add_argument('--launcher', choices=LAUNCHERS, default='local', help='what brings points to machines')
    add[argv[0]].add_argument('--dry_run', action='store_true', help='print what would be done, and do nothing')
    name = next((word.partition('=')[2] or after for word, after in zip(argv, [*argv[1:], ''], strict=True)
                 if word.partition('=')[0] == '--launcher'), 'local')
    if name in LAUNCHERS:
      launcher = launcher_of(name)
      from launch import job
      job.add_options(add[argv[0]], launcher.OPTIONS)
  flags = p.parse_args(argv)
  if not launching:
    progress.need_launch()
    commands = {'status': status, 'collect': collect.collect, 'cancel': cancel, 'point': attempt.point}
    return commands[flags.command](flags)
  try:
    return run(flags, launcher, job.read_options(launcher.OPTIONS, flags))
  except job.LaunchError as e:
    raise UserError(str(e)) from e


if __name__ == '__main__':
  sys.exit(main())
