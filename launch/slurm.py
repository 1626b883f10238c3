"""Runs jobs on a SLURM cluster, as one array with requeueing.

  python -m launch.slurm --config=configs/cifar10.py --workdir=runs/cifar10 --gpus=1 --time=04:00:00 [--dry_run]
"""
import dataclasses
import fcntl
import glob
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence

from launch import job as job_lib
from launch.job import RETRYABLE, Job, LaunchError, option, output, tool

WAITS = False
# What squeue says of tasks that will not run again; everything else is alive, a requeued task among it.
ENDED = {'BOOT_FAIL', 'CANCELLED', 'COMPLETED', 'DEADLINE', 'FAILED', 'NODE_FAIL', 'OUT_OF_MEMORY', 'PREEMPTED',
         'REVOKED', 'TIMEOUT'}


@dataclasses.dataclass(frozen=True)
class Options:
  """What is asked of SLURM for each job; what is not given is left to the cluster."""
  partition: str = option('', 'the partition')
  account: str = option('', 'the account that is charged')
  time: str = option('', 'time limit of one start, such as 04:00:00; a job that reaches it saves and is requeued')
  gpus: int = option(0, 'GPUs per node')
  cpus: int = option(0, 'CPU cores per process')
  mem: str = option('', 'memory per node, such as 32G')
  nodes: int = option(1, 'nodes per job')
  processes: int = option(1, 'processes per node')
  constraint: str = option('', 'features that the nodes must have')
  parallel: int = option(0, 'jobs of the array that run at once; 0 for all')
  restarts: int = option(20, 'how often a job is requeued after exit status 70, 75, 134, 137 or 143')
  warning: int = option(120, 'seconds before the time limit at which the job is told to save')
  extra: tuple[str, ...] = option((), 'a further option of sbatch, as --extra=--exclusive; repeatable')
  setup: tuple[str, ...] = option((), 'a line of shell run before the job, as --setup="module load cuda"; repeatable')


OPTIONS = Options

SETUP = '{{ {line}\n}} || {{ echo "setup ended with status $?"; exit 1; }}'
# 75 and the like mean that the same command continues. The warning before the time limit reaches the steps alone: if
# the shell itself has been told to end, somebody does not want the job any more. scontrol ends this script: it waits.
END = '''\
status=$?
case $status in
{retryable})
  if [ -z "$cancelled" ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
    echo "exit status $status: requeued (${{SLURM_RESTART_COUNT:-0}} of {restarts})"
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID" && sleep 300
  fi ;;
esac
exit $status
'''


def render(jobs: Sequence[Job], options: Options, name: str = 'diffusion-jax') -> str:
  """The sbatch script of an array with one task per job."""
  asked = {
      'job-name': name, 'array': f'0-{len(jobs) - 1}' + (f'%{options.parallel}' if options.parallel else ''),
      'partition': options.partition, 'account': options.account, 'time': options.time,
      'nodes': options.nodes, 'ntasks-per-node': options.processes, 'gpus-per-node': options.gpus,
      'cpus-per-task': options.cpus, 'mem': options.mem, 'constraint': options.constraint,
      'signal': f'TERM@{options.warning}', 'open-mode': 'append'}
  lines = [*(f'--{key}={value}' for key, value in asked.items() if value), '--requeue', *options.extra]
  for line in lines:
    if not re.fullmatch(r'[!$-&(-\[\]-_a-~]+', line):  # one printable word without quotes, backslashes and #
      raise LaunchError(f'{line!r} cannot stand in an #SBATCH line: write it without spaces, quotes, backslashes and #')
  script = ['#!/bin/bash', *(f'#SBATCH {line}' for line in lines), '', 'case $SLURM_ARRAY_TASK_ID in']
  for index, job in enumerate(jobs):
    for key in job.env:
      if not re.fullmatch(r'[A-Za-z_]\w*', key, re.ASCII):
        raise LaunchError(f'{key!r} is no name for an environment variable')
    script += [f'{index})', f'  workdir={shlex.quote(job_lib.local_folder(job))}', f'  job=({shlex.join(job.argv)})',
               *(f'  export {key}={shlex.quote(value)}' for key, value in job.env.items()), '  ;;']
  script += ['esac', 'mkdir -p -- "$workdir" && exec >>"$workdir/log.txt" 2>&1', 'export PYTHONUNBUFFERED=1',
             *(SETUP.format(line=line) for line in options.setup), "cancelled=; trap 'cancelled=1' TERM"]
  srun = f'srun --kill-on-bad-exit=1{f" --cpus-per-task={options.cpus}" if options.cpus else ""}'
  if options.nodes * options.processes > 1:
    script += [
        'export DIFFUSION_JAX_COORDINATOR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        ':$((20000 + SLURM_JOB_ID % 10000))"', 'export DIFFUSION_JAX_NUM_PROCESSES=$SLURM_NTASKS',
        f"""{srun} bash -c 'DIFFUSION_JAX_PROCESS_ID=$SLURM_PROCID exec "$@"' bash "${{job[@]}}\""""]
  else:
    script.append(f'{srun} "${{job[@]}}"')
  return '\n'.join(script) + '\n' + END.format(retryable='|'.join(map(str, sorted(RETRYABLE))),
                                               restarts=options.restarts)


def queue() -> dict[str, str]:
  """{'ARRAY_INDEX': job name} of this user's tasks that run or will run."""
  live = {}
  for line in output(['squeue', '--me', '--array', '--noheader', '--states=all', '--format=%F_%K|%T|%j']).splitlines():
    task, state, name = line.strip().split('|', 2)
    if state not in ENDED:
      live[task] = name
  return live


def submit(jobs: Sequence[Job], options: Options, folder: str) -> list[str]:
  """Submits the jobs that are not in the queue already, as one array; the ids of all are ARRAY_INDEX.

  Each submission has a name of its own, derived from the folder and written there before sbatch is called, with the
  workdirs in the order of the array. So what reached the queue is found there, even if nobody lived to read the answer.
  """
  where = {}
  os.makedirs(folder, exist_ok=True)
  with open(os.path.join(folder, 'slurm.lock'), 'a') as lock:
    # sbatch inherits the lock: if this process is killed, the next one waits until sbatch has ended.
    fcntl.flock(lock, fcntl.LOCK_EX)
    submissions = {}
    for path in glob.glob(os.path.join(glob.escape(folder), 'slurm-*.json')):
      with open(path, encoding='utf-8') as f:
        record = json.load(f)
      submissions[record['name']] = record['workdirs']
    for task, name in queue().items():
      if name in submissions:
        where[submissions[name][int(task.split('_')[1])]] = task
    missing = [job for job in jobs if os.path.abspath(job_lib.local_folder(job)) not in where]
    for job in jobs:
      if job not in missing:
        print(f'{job.name} is in the queue already, as {where[os.path.abspath(job.workdir)]}', file=sys.stderr)
    if missing:
      number, place = len(submissions), os.path.abspath(folder)
      name = f'{job_lib.identifier(" ".join(place.split(os.sep)[-2:]), place)}-{number}'
      script, workdirs = render(missing, options, name), [os.path.abspath(job.workdir) for job in missing]
      path = os.path.join(folder, f'slurm-{number}')
      job_lib.write(f'{path}.sh', script)
      job_lib.write(f'{path}.json', json.dumps({'name': name, 'workdirs': workdirs}) + '\n')
      said = output(['sbatch', '--parsable', f'--output={path.replace("%", "%%")}-%a.out', f'{path}.sh'],
                    pass_fds=[lock.fileno()])
      array = said.strip().split(';')[0]  # ID or ID;CLUSTER
      if not array.isdecimal():
        raise LaunchError(f'sbatch said {said.strip()!r}, which is no job id: see squeue --name={name}')
      where |= {workdir: f'{array}_{index}' for index, workdir in enumerate(workdirs)}
  return [where[os.path.abspath(job.workdir)] for job in jobs]


def alive(ids: Iterable[str]) -> set[str]:
  """Those of the ids that run or will run."""
  return set(ids) & set(queue())


def cancel(ids: Iterable[str]) -> None:
  """Ends the tasks: a running one is told with SIGTERM to save, and is not requeued."""
  for wait in (0, 1, 2, 4):  # a task that is just being started or requeued refuses for a moment
    time.sleep(wait)
    if not (living := sorted(alive(ids := set(ids)))):
      return
    done = tool(['scancel', *living], stderr=subprocess.PIPE)
    if not done.returncode:
      return
  raise LaunchError(f'scancel {" ".join(living)} ended with status {done.returncode}: {done.stderr.strip()}')


def main(argv: Sequence[str] | None = None) -> int:
  """Parses the flags and submits the job; --dry_run prints the script and submits nothing."""
  return job_lib.main(sys.modules[__name__], argv)


if __name__ == '__main__':
  sys.exit(main())
