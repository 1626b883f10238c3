"""What a launcher starts, and what all launchers share. Nothing of diffusion_jax is imported: launchers start commands.

A launcher is a module with `OPTIONS` (a dataclass), `render(jobs, options) -> str` (pure: what would be done),
`submit(jobs, options, folder) -> ids` (does it; one id per job), `alive(ids) -> set` and `cancel(ids)`. If it `WAITS`,
it runs the jobs itself, and `run(jobs, options) -> statuses` returns when they have ended. Else a scheduler runs them.
"""
import argparse
import dataclasses
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from typing import Any

# Exit statuses after which the same command may be started again: it continues where it was.
RETRYABLE = {70, 75, 134, 137, 143}
INTERRUPTED = 75
MOUNTED = 'BUCKET=/FOLDER if the bucket is mounted on this machine: then --workdir may be a path below that folder'


class LaunchError(Exception):
  """Something that the user can put right, said in one sentence."""


@dataclasses.dataclass(frozen=True)
class Job:
  """One command, to be run in the checkout. Starting it again continues it."""
  name: str
  argv: tuple[str, ...]
  workdir: str  # where it keeps everything; a path, or gs://BUCKET/PATH for launchers that mount buckets
  env: Mapping[str, str] = dataclasses.field(default_factory=dict)


def train(config: str, workdir: str, overrides: Mapping[str, str] | None = None, python: str = sys.executable) -> Job:
  """The job that trains `config` (FILE[:RUN]) in `workdir`; overrides are {'train.images': '6400'}."""
  argv = (python, '-m', 'diffusion_jax.train', f'--config={config}', f'--workdir={workdir}',
          *(f'--config.{key}={value}' for key, value in (overrides or {}).items()))
  return Job(os.path.basename(workdir.rstrip('/')) or 'run', argv, workdir)


def shell_status(status: int) -> int:
  """A process killed by signal n has the status -n in Python, and 128 + n here as in a shell."""
  return 128 - status if status < 0 else status


def retryable(status: int) -> bool:
  """Whether to start again after `status`, be it Python's or a shell's."""
  return shell_status(status) in RETRYABLE


def identifier(name: str, key: str, longest: int = 40) -> str:
  """`name` in lower-case letters, digits and single dashes, a letter first, with 8 hex digits of the hash of `key`."""
  safe = re.sub(r'[^a-z0-9]+', '-', name.lower())[:longest - 9].strip('-')
  return f'{safe if safe[:1].isalpha() else f"r{safe}"[:longest - 9]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}'


def local_folder(job: Job) -> str:
  """The job's workdir; LaunchError if it is in a bucket, which this launcher does not mount."""
  if '://' in job.workdir:
    raise LaunchError(f'--workdir={job.workdir} is not a folder of this machine: mount the bucket (gcsfuse) and give '
                      f'the mounted folder, or use launch.gke or launch.tpu_vm, which mount it')
  return job.workdir


def mounted(job: Job, root: str, here: str = '') -> tuple[Job, str]:
  """(the job with its workdir's gs://BUCKET read as ROOT/BUCKET in every word, BUCKET): machines will mount it there.

  `here` is BUCKET=FOLDER if the bucket is mounted on this machine too: then paths below FOLDER are read likewise. The
  job's own Python becomes `python3`: that of this machine is not there.
  """
  bucket, _, folder = here.partition('=')
  if here and not (bucket and folder.startswith('/')):
    raise LaunchError(f'--mounted={here} is not BUCKET=/FOLDER')
  in_folder = rf'(?<![\w/.-]){re.escape(folder.rstrip("/"))}(?=/|$)' if here else None
  named = lambda text: re.sub(in_folder, lambda _: f'gs://{bucket}', text) if here else text
  found = re.match(r'gs://([a-z0-9][a-z0-9._-]*)/.', named(job.workdir))
  if not found:
    raise LaunchError(f'--workdir={job.workdir} would be lost with the machine: give gs://BUCKET/PATH, or a path below '
                      f'the folder of --mounted=BUCKET=/FOLDER')
  swap = lambda text: re.sub(rf'gs://{re.escape(found[1])}(?=/|$)', lambda _: f'{root}/{found[1]}', named(text))
  argv = ('python3', *job.argv[1:]) if job.argv[0] == sys.executable else job.argv
  return Job(job.name, tuple(map(swap, argv)), swap(job.workdir), {k: swap(v) for k, v in job.env.items()}), found[1]


def write(path: str, text: str) -> None:
  """Writes a file whole or not at all."""
  os.makedirs(folder := os.path.dirname(path) or '.', exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=folder, prefix='.', suffix='.tmp')
  with os.fdopen(handle, 'w', encoding='utf-8') as f:
    f.write(text)
  os.replace(temporary, path)


def tool(argv: Sequence[str], **how: Any) -> subprocess.CompletedProcess:
  """Runs a program of the system to its end, its standard output as text; LaunchError if there is no such program."""
  try:
    return subprocess.run(list(argv), stdout=subprocess.PIPE, text=True, **how)
  except OSError as e:
    raise LaunchError(f'cannot run {argv[0]!r} ({e.strerror}): is it installed, and on PATH?') from e


def output(argv: Sequence[str], **how: Any) -> str:
  """What a program prints; LaunchError with its complaint if it fails."""
  done = tool(argv, stderr=subprocess.PIPE, **how)
  if done.returncode:
    raise LaunchError(f'{" ".join(argv[:3])} ended with status {done.returncode}: '
                      f'{done.stderr.strip() or "it does not say why"}')
  return done.stdout


def option(default: Any, help: str) -> Any:
  """A field of a launcher's OPTIONS."""
  return dataclasses.field(default=default, metadata={'help': help})


def add_options(parser: argparse.ArgumentParser, options: type) -> None:
  """Gives the parser a flag for each field of the dataclass: a switch for a bool, a repeatable flag for a tuple."""
  for field in dataclasses.fields(options):
    kind = {'action': 'store_true'} if field.default is False else {'type': type(field.default), 'metavar': 'X'}
    if isinstance(field.default, tuple):
      kind = {'action': 'append', 'metavar': 'X'}
    shown = f' [{field.default}]' if isinstance(field.default, str | int) and str(field.default or '') else ''
    parser.add_argument(f'--{field.name}', help=f'{field.metadata["help"]}{shown}'.replace('%', '%%'), default=None,
                        **kind)


def read_options(options: type, flags: argparse.Namespace) -> Any:
  """The dataclass with what the flags say."""
  given = {f.name: getattr(flags, f.name) for f in dataclasses.fields(options) if getattr(flags, f.name) is not None}
  return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def main(launcher: types.ModuleType, argv: Sequence[str] | None = None) -> int:
  """`python -m launch.NAME`: starts one training run; --dry_run prints what would be done and does nothing."""
  p = argparse.ArgumentParser(prog=launcher.__spec__.name if launcher.__spec__ else 'launch', allow_abbrev=False,
                              description=launcher.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--config', required=True, metavar='FILE[:RUN]', help='--config.a.b=value overrides')
  p.add_argument('--workdir', required=True, help='the run folder')
  p.add_argument('--dry_run', action='store_true', help='print what would be done, and do nothing')
  add_options(p, launcher.OPTIONS)
  flags, rest = p.parse_known_args(argv)
  overrides = {}
  for word in rest:
    key, equals, value = word.partition('=')
    if not key.startswith('--config.') or not equals:
      p.error(f'{word!r} is neither a flag nor --config.KEY=VALUE')
    overrides[key.removeprefix('--config.')] = value
  job = train(flags.config, flags.workdir, overrides)
  try:
    options = read_options(launcher.OPTIONS, flags)
    if flags.dry_run:
      print(launcher.render([job], options), end='')
      return 0
    if launcher.WAITS:
      return launcher.run([job], options)[0]
    # What was submitted is kept beside the run, or in this folder if the run is in a bucket.
    folder = os.path.join('launched', identifier(job.name, job.workdir)) if '://' in flags.workdir else flags.workdir
    print(*launcher.submit([job], options, folder), sep='\n')
    return 0
  except LaunchError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
