"""Runs a job on this machine and starts it again when it was interrupted.

  python -m launch.local --config=configs/digits.py --workdir=runs/digits [--restarts=3] [--dry_run] [--config.a.b=V]
"""
import argparse
import shlex
import signal
import subprocess
import sys

from launch.job import Job, retryable


def render(job: Job) -> str:
  """The shell command of a job."""
  return shlex.join(job.argv())


def run(job: Job, restarts: int) -> int:
  """Runs the job, starting it again after a retryable exit at most `restarts` times; returns the last exit status.

  Ctrl-C and SIGTERM are for the job: it saves and exits, and is not started again.
  """
  stopped = []
  for attempt in range(restarts + 1):
    process = subprocess.Popen(job.argv())

    def forward(number, frame, process=process):
      stopped.append(number)
      process.send_signal(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, forward)
    status = process.wait()
    if stopped or not retryable(status) or attempt == restarts:
      break
    print(f'exit status {status}: starting again ({attempt + 1} of {restarts})', file=sys.stderr)
  return 128 - status if status < 0 else status


def main(argv: list[str] | None = None) -> int:
  """Parses the flags and runs the job; --dry_run prints its command and starts nothing."""
  p = argparse.ArgumentParser(prog='launch.local', description=__doc__, allow_abbrev=False,
                              formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--config', required=True)
  p.add_argument('--workdir', required=True)
  p.add_argument('--restarts', type=int, default=3)
  p.add_argument('--dry_run', action='store_true')
  flags, rest = p.parse_known_args(argv)
  overrides = {}
  for word in rest:
    key, equals, value = word.partition('=')
    if not key.startswith('--config.') or not equals:
      p.error(f'{word!r} is neither a flag nor --config.KEY=VALUE')
    overrides[key.removeprefix('--config.')] = value
  job = Job(flags.config, flags.workdir, overrides)
  if flags.dry_run:
    print(render(job))
    return 0
  return run(job, flags.restarts)


if __name__ == '__main__':
  sys.exit(main())
