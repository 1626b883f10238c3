"""Runs jobs on Cloud TPU VMs: asks for one as a queued resource, copies the checkout there, runs, and deletes it.

  python -m launch.tpu_vm --config=configs/cifar10.py --workdir=gs://BUCKET/runs/cifar10 --zone=us-west4-a --spot
"""
import dataclasses
import gzip
import hashlib
import io
import json
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterable, Sequence
from concurrent import futures

from launch import job as job_lib
from launch.job import INTERRUPTED, Job, LaunchError, option, retryable, shell_status

WAITS = True
MOUNT = '/tmp/gcs'
SSH_BROKE = 255
# States of a queued resource or TPU that will not run anything any more.
GONE = {'FAILED', 'SUSPENDING', 'SUSPENDED', 'PREEMPTED', 'TERMINATED', 'STOPPED', 'STOPPING', 'DELETING'}
CHECKOUT = 'CHECKOUT.tar.gz'  # how the archive is called in what `render` shows


@dataclasses.dataclass(frozen=True)
class Options:
  """What is asked of Google Cloud for each job."""
  zone: str = option('', 'the zone')
  project: str = option('', "the project; without it gcloud's own")
  accelerator_type: str = option('v5litepod-8', 'the TPU, such as v5litepod-8 or v6e-16')
  runtime_version: str = option('v2-alpha-tpuv5-lite', 'its software, such as v2-alpha-tpuv6e')
  service_account: str = option('', 'the account that may write the bucket')
  spot: bool = option(False, 'a spot TPU: cheaper, and taken away at any time')
  mounted: str = option('', job_lib.MOUNTED)
  slots: int = option(8, 'jobs at once, each on a TPU of its own')
  restarts: int = option(20, 'how often a job is started again after a preemption or exit status 70, 75, 134, 137, 143')
  poll: int = option(30, 'seconds between looks at a TPU that is not ready, and before a restart')
  keep: bool = option(False, 'leave the TPU there at the end')
  setup: tuple[str, ...] = option((
      'python3 -m pip install --quiet uv', 'python3 -m uv venv --quiet --allow-existing --python 3.12 ~/venv',
      "python3 -m uv pip install --quiet --python ~/venv/bin/python -e '.[tpu]'"),
      'a line of shell run in the checkout before the job; repeatable, in place of these')


OPTIONS = Options


def name_of(job: Job) -> str:
  """The TPU's name, and that of its queued resource: it follows from the workdir, so that a job has one TPU."""
  return job_lib.identifier(job.name, job.workdir)


def gcloud(options: Options, *words: str) -> list[str]:
  """A command of gcloud about TPUs."""
  if not options.zone:
    raise LaunchError('give --zone=ZONE: the zone of the TPU')
  return ['gcloud', 'compute', 'tpus', *words, f'--zone={options.zone}', '--quiet',
          *([f'--project={options.project}'] if options.project else [])]


def create(name: str, options: Options) -> list[str]:
  """Asks for a TPU."""
  return gcloud(options, 'queued-resources', 'create', name, f'--node-id={name}',
                f'--accelerator-type={options.accelerator_type}', f'--runtime-version={options.runtime_version}',
                *([f'--service-account={options.service_account}'] if options.service_account else []),
                *(['--spot'] if options.spot else []))


def describe(name: str, options: Options, kind: str = 'queued-resources') -> list[str]:
  """Looks at the request, or at the TPU ('tpu-vm')."""
  return gcloud(options, kind, 'describe', name, '--format=json')


def scp(name: str, options: Options, path: str, target: str) -> list[str]:
  """Copies a file to all hosts of the TPU."""
  return gcloud(options, 'tpu-vm', 'scp', path, f'{name}:{target}', '--worker=all')


def ssh(name: str, options: Options, script: str) -> list[str]:
  """Runs a shell script on all hosts of the TPU."""
  return gcloud(options, 'tpu-vm', 'ssh', name, '--worker=all', f'--command={script}')


def delete(name: str, options: Options) -> list[str]:
  """Deletes the TPU with its request."""
  return gcloud(options, 'queued-resources', 'delete', name, '--force')


def script(job: Job, options: Options, archive: str) -> str:
  """What each host runs. A second start on the same host waits for the first, then finds its work done."""
  name = name_of(job)
  job, bucket = job_lib.mounted(job, MOUNT, options.mounted)
  code, mount = f'~/{archive.removesuffix(".tar.gz")}', shlex.quote(f'{MOUNT}/{bucket}')
  log, env = f'~/{name}.log', {'DIFFUSION_JAX_COORDINATOR': 'auto', **job.env}
  inner = [
      f'mkdir -p {code} {mount} && tar -xzf ~/{archive} -C {code} && cd {code} || exit 70',
      *(f'{{ {line}\n}} || exit 70' for line in options.setup),
      'export PATH=~/venv/bin:"$PATH"',
      f'mountpoint -q {mount} || gcsfuse --implicit-dirs {shlex.quote(bucket)} {mount} || exit 70',
      shlex.join(['env', *(f'{key}={value}' for key, value in env.items()), *job.argv]),
      'status=$?', f'cp {log} {shlex.quote(job.workdir)}/log."$(hostname)".txt', 'exit $status']
  return f'flock ~/{name}.lock bash -c {shlex.quote(chr(10).join(inner))} >>{log} 2>&1 </dev/null'


def render(jobs: Sequence[Job], options: Options) -> str:
  """The commands for each job as a shell takes them; those before the last are repeated after a preemption."""
  return ''.join(f'{shlex.join(argv)}\n' for job in jobs for name in [name_of(job)] for argv in [
      create(name, options), describe(name, options), scp(name, options, CHECKOUT, CHECKOUT),
      ssh(name, options, script(job, options, CHECKOUT)), *([] if options.keep else [delete(name, options)])])


def pack(folder: str) -> str:
  """Writes the checkout, without what git ignores, as FOLDER/diffusion_jax-<hash>.tar.gz; returns the path."""
  listed = job_lib.output(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'])
  buffer = io.BytesIO()
  with gzip.GzipFile(fileobj=buffer, mode='wb', mtime=0) as zipped, tarfile.open(fileobj=zipped, mode='w') as tar:
    for path in sorted({*listed.split('\0')} - {''}):
      if os.path.isfile(path):
        tar.add(path)
  path = os.path.join(folder, f'diffusion_jax-{hashlib.sha256(buffer.getvalue()).hexdigest()[:8]}.tar.gz')
  with open(path, 'wb') as f:
    f.write(buffer.getvalue())
  return path


def call(argv: Sequence[str], quiet: bool = False) -> subprocess.CompletedProcess:
  """Runs one command of gcloud; everything goes through here. What goes wrong is in the status that comes back."""
  return job_lib.tool(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL if quiet else None)


def state(name: str, options: Options) -> str:
  """ACTIVE for a TPU that can be used, '' if nobody has asked for it, else the state of the request or of the TPU."""
  request = call(describe(name, options), quiet=True)
  if request.returncode:
    # No such request, or no answer: only a list tells which.
    listed = call(gcloud(options, 'queued-resources', 'list', '--format=value(name)'))
    if listed.returncode:
      raise LaunchError(f'gcloud does not list the queued resources of {options.zone}: see its message above')
    return '' if name not in {line.split('/')[-1].strip() for line in listed.stdout.splitlines()} else 'UNKNOWN'
  found = json.loads(request.stdout)['state']
  found = found['state'] if isinstance(found, dict) else found
  if found != 'ACTIVE':
    return found
  node = call(describe(name, options, 'tpu-vm'), quiet=True)
  found = json.loads(node.stdout).get('state', 'UNKNOWN') if not node.returncode else 'UNKNOWN'
  return 'ACTIVE' if found == 'READY' else found


def acquire(name: str, options: Options, stop: threading.Event) -> bool:
  """Asks for the TPU if there is none, again if it has been taken away, and waits for it; False if told to stop."""
  asked = False
  while not stop.is_set():
    found = state(name, options)
    if found == 'ACTIVE':
      return True
    if found == 'FAILED' and asked:
      raise LaunchError(f'the request for TPU {name} ({options.accelerator_type} in {options.zone}) failed: see '
                        f'{shlex.join(describe(name, options))}')
    if found in GONE:
      print(f'{name}: {found}; deleted', file=sys.stderr)
      if call(delete(name, options)).returncode:
        stop.wait(options.poll)
    elif not found:
      if call(create(name, options)).returncode:
        raise LaunchError(f'no TPU could be asked for as {name}: see the message of gcloud above')
      print(f'{name}: asked for', file=sys.stderr)
      asked = True
    else:
      stop.wait(options.poll)
  return False


def drive(job: Job, options: Options, archive: str, stop: threading.Event) -> int:
  """Runs one job to its end, on as many TPUs as that takes; returns its exit status."""
  name, status = name_of(job), INTERRUPTED
  target = os.path.basename(archive)
  for attempt in range(options.restarts + 1):
    if not acquire(name, options, stop):
      return INTERRUPTED
    status = call(scp(name, options, archive, target)).returncode and SSH_BROKE
    status = status or shell_status(call(ssh(name, options, script(job, options, target))).returncode)
    if stop.is_set() or not (retryable(status) or status == SSH_BROKE):
      break
    print(f'{name}: status {status} ({attempt} of {options.restarts} restarts)', file=sys.stderr)
    stop.wait(options.poll if attempt < options.restarts else 0)
  if not options.keep and not stop.is_set():
    call(delete(name, options))
  return INTERRUPTED if stop.is_set() or status == SSH_BROKE else status


def run(jobs: Sequence[Job], options: Options) -> list[int]:
  """Runs the jobs to their ends, each on its own TPU, and returns their exit statuses.

  Ctrl-C ends only the watching: the jobs go on, and the same command watches them again.
  """
  render(jobs, options)  # all that can be wrong is seen before anything is done
  for name in map(name_of, jobs):
    print(f'to look: {shlex.join(ssh(name, options, f"tail -n 20 ~/{name}.log"))}', file=sys.stderr)
  stop = threading.Event()
  with tempfile.TemporaryDirectory() as folder, futures.ThreadPoolExecutor(options.slots) as pool:
    archive = pack(folder)
    running = [pool.submit(drive, job, options, archive, stop) for job in jobs]
    try:
      return [result(future) for future in running]
    except KeyboardInterrupt:
      print('\n'.join(['the jobs go on; the same command watches them again, and these end them:',
                       *(shlex.join(delete(name_of(job), options)) for job in jobs)]), file=sys.stderr)
      return [INTERRUPTED] * len(jobs)
    finally:
      stop.set()


def result(future: futures.Future) -> int:
  """The exit status of a job, 2 if it could not be started; the others go on."""
  try:
    return future.result()
  except LaunchError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2


def submit(jobs: Sequence[Job], options: Options, folder: str) -> list[str]:
  """Runs the jobs, and returns when all have ended; the ids are PROJECT/ZONE/NAME."""
  job_lib.write(os.path.join(folder, 'tpu_vm.sh'), render(jobs, options))
  run(jobs, options)
  return [f'{options.project}/{options.zone}/{name_of(job)}' for job in jobs]


def apart(identity: str) -> tuple[str, Options]:
  """The name in an id, and options with its project and zone."""
  project, zone, name = identity.split('/')
  return name, Options(project=project, zone=zone)


def alive(ids: Iterable[str]) -> set[str]:
  """Those of the ids whose TPU is there or asked for."""
  return {i for i in ids if state(*apart(i)) not in GONE | {''}}


def cancel(ids: Iterable[str]) -> None:
  """Deletes the TPUs; what a job has not saved is lost, and it continues from its last checkpoint elsewhere."""
  for i in ids:
    call(delete(*apart(i)))


def main(argv: Sequence[str] | None = None) -> int:
  """Parses the flags and runs the job; --dry_run prints the commands and runs none."""
  return job_lib.main(sys.modules[__name__], argv)


if __name__ == '__main__':
  sys.exit(main())
