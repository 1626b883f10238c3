"""Runs jobs on TPUs of a GKE cluster, each as a JobSet.

  python -m launch.gke --config=configs/cifar10.py --workdir=gs://BUCKET/runs/cifar10 --image=IMAGE --topology=2x4
"""
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from launch import job as job_lib
from launch.job import RETRYABLE, Job, LaunchError, option, output

WAITS = False
MOUNT = '/gcs'
# GKE's label of each generation, and the chips of a host for each topology; hosts of a 3-D torus always have 4.
FLAT = {'1x1': 1, '2x2': 4, '2x4': 8, '4x4': 4, '4x8': 4, '8x8': 4, '8x16': 4, '16x16': 4}
TPUS = {'v4': ('tpu-v4-podslice', None), 'v5e': ('tpu-v5-lite-podslice', FLAT), 'v5p': ('tpu-v5p-slice', None),
        'v6e': ('tpu-v6e-slice', FLAT)}
SMALL = ('2x2x1', '2x2x2', '2x2x4', '2x4x4')


@dataclasses.dataclass(frozen=True)
class Options:
  """What is asked of the cluster for each job."""
  image: str = option('', 'the container image: a checkout as its working folder, with diffusion_jax installed')
  tpu: str = option('v5e', 'generation: v4, v5e, v5p or v6e')
  topology: str = option('2x4', 'chips of a slice, such as 4x4 (v5e, v6e) or 2x2x2 (v4, v5p)')
  slices: int = option(1, 'slices per job, joined over the data-centre network')
  mounted: str = option('', job_lib.MOUNTED)
  restarts: int = option(20, 'how often a job is restarted after exit status 70, 75, 134, 137, 143 or a preemption')
  grace: int = option(120, 'seconds from SIGTERM to SIGKILL; a spot node has less')
  namespace: str = option('default', 'the namespace')
  queue: str = option('', "Kueue's local queue; without it the job starts as soon as there are nodes")
  service_account: str = option('', 'the Kubernetes service account that may write the bucket')
  spot: bool = option(False, 'run on spot nodes')


OPTIONS = Options


def hosts_of(tpu: str, topology: str) -> tuple[str, int, int]:
  """(GKE's label, chips per host, hosts) of a slice; LaunchError names the topologies that there are."""
  if tpu not in TPUS:
    raise LaunchError(f'--tpu={tpu} is not one of {", ".join(TPUS)}')
  label, flat = TPUS[tpu]
  sides = [int(side) for side in topology.split('x')] if re.fullmatch(r'\d{1,3}(x\d{1,3})+', topology) else []
  chips = math.prod(sides)
  if flat is not None:
    if topology not in flat:
      raise LaunchError(f'--topology={topology} is none of {tpu}: it has {", ".join(flat)}')
    return label, flat[topology], chips // flat[topology]
  cubes = len(sides) == 3 and all(side % 4 == 0 < side for side in sides) and sides == sorted(sides) and chips <= 4096
  if topology not in SMALL and not cubes:
    raise LaunchError(f'--topology={topology} is none of {tpu}: it has {", ".join(SMALL)}, and AxBxC of multiples of 4 '
                      f'with A <= B <= C and at most 4096 chips')
  return label, 4, chips // 4


def manifest(job: Job, options: Options) -> dict[str, Any]:
  """The JobSet of a job. Its name follows from the workdir, so that a cluster holds it once."""
  label, chips, hosts = hosts_of(options.tpu, options.topology)
  if not options.image:
    raise LaunchError('give --image=IMAGE: a container image with a checkout as its working folder and diffusion_jax '
                      'installed')
  if options.slices < 1 or options.restarts < 0:
    raise LaunchError(f'--slices={options.slices} must be at least 1, and --restarts={options.restarts} at least 0')
  name = name_of(job)
  job, bucket = job_lib.mounted(job, MOUNT, options.mounted)
  verbatim = lambda text: text.replace('$', '$$')  # Kubernetes would put variables in for $(NAME)
  command, env = list(job.argv), [{'name': key, 'value': verbatim(value)} for key, value in job.env.items()]
  if hosts * options.slices > 1:
    # Process ids count the hosts slice by slice; exec makes the job the process that SIGTERM reaches.
    command = ['sh', '-c', f'export DIFFUSION_JAX_PROCESS_ID=$((SLICE * {hosts} + JOB_COMPLETION_INDEX)); exec "$@"',
               'sh', *command]
    env += [{'name': 'DIFFUSION_JAX_COORDINATOR', 'value': f'{name}-worker-0-0.{name}:8476'},
            {'name': 'DIFFUSION_JAX_NUM_PROCESSES', 'value': str(hosts * options.slices)},
            {'name': 'SLICE', 'valueFrom': {'fieldRef': {
                'fieldPath': "metadata.annotations['jobset.sigs.k8s.io/job-index']"}}}]
  tpus = {'google.com/tpu': chips}
  pod = {
      'restartPolicy': 'Never', 'terminationGracePeriodSeconds': options.grace,
      'nodeSelector': {'cloud.google.com/gke-tpu-accelerator': label, 'cloud.google.com/gke-tpu-topology':
                       options.topology, **({'cloud.google.com/gke-spot': 'true'} if options.spot else {})},
      'tolerations': [{'key': 'google.com/tpu', 'operator': 'Exists', 'effect': 'NoSchedule'},
                      *([{'key': 'cloud.google.com/gke-spot', 'operator': 'Equal', 'value': 'true',
                          'effect': 'NoSchedule'}] if options.spot else [])],
      'containers': [{
          'name': 'worker', 'image': options.image, 'command': [*map(verbatim, command)], 'env': env,
          'resources': {'requests': tpus, 'limits': tpus},
          'volumeMounts': [{'name': 'bucket', 'mountPath': f'{MOUNT}/{bucket}'},
                           {'name': 'shm', 'mountPath': '/dev/shm'}]}],
      'volumes': [{'name': 'bucket', 'csi': {'driver': 'gcsfuse.csi.storage.gke.io', 'volumeAttributes': {
          'bucketName': bucket, 'mountOptions': 'implicit-dirs'}}},
                  {'name': 'shm', 'emptyDir': {'medium': 'Memory'}}]}
  if options.service_account:
    pod['serviceAccountName'] = options.service_account
  if options.slices > 1:  # what joins the slices is quicker without a layer between
    pod |= {'hostNetwork': True, 'dnsPolicy': 'ClusterFirstWithHostNet'}
  return {
      'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet',
      'metadata': {
          'name': name, 'namespace': options.namespace,
          'labels': {'app.kubernetes.io/name': 'diffusion-jax',
                     **({'kueue.x-k8s.io/queue-name': options.queue} if options.queue else {})},
          # The hosts of a slice are one pool of nodes, and it is theirs alone; single hosts share their pool.
          'annotations': {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'} if hosts > 1
                         else {}},
      'spec': {
          # What is not worth another start fails its Job by the pod failure policy; anything else restarts the JobSet.
          'failurePolicy': {'maxRestarts': options.restarts, 'rules': [
              {'name': 'notRetryable', 'action': 'FailJobSet', 'onJobFailureReasons': ['PodFailurePolicy']}]},
          'network': {'enableDNSHostnames': True},
          'replicatedJobs': [{
              'name': 'worker', 'replicas': options.slices,
              'template': {'spec': {
                  'parallelism': hosts, 'completions': hosts, 'completionMode': 'Indexed', 'backoffLimit': 0,
                  'podFailurePolicy': {'rules': [
                      {'action': 'Count', 'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}]},
                      {'action': 'FailJob', 'onExitCodes': {'containerName': 'worker', 'operator': 'NotIn',
                                                            'values': sorted(RETRYABLE)}}]},
                  'template': {'metadata': {'annotations': {'gke-gcsfuse/volumes': 'true'}}, 'spec': pod}}}}]}}


def name_of(job: Job) -> str:
  """The JobSet's name: short enough for the names that are made of it."""
  return job_lib.identifier(job.name, job.workdir, 36)


def scalar(value: Any) -> str:
  """A YAML scalar or empty collection; text is quoted unless it can only be text."""
  if isinstance(value, str):
    if re.fullmatch(r'[A-Za-z/][A-Za-z0-9./_-]*', value) and value.lower() not in (
        'true', 'false', 'yes', 'no', 'on', 'off', 'y', 'n', 'null'):
      return value
    escape = lambda c: f'\\{c}' if c in '"\\' else c if ' ' <= c <= '~' else f'\\U{ord(c):08x}'
    return f'"{"".join(map(escape, value))}"'
  return json.dumps(value)


def yaml(value: Any) -> Iterator[str]:
  """The lines of a block of YAML: dicts, lists, text, numbers and booleans."""
  if isinstance(value, dict) and value:
    for key, item in value.items():
      first, *rest = yaml(item)
      if isinstance(item, dict | list) and item:
        yield f'{scalar(key)}:'
        yield from (f'  {line}' for line in [first, *rest])
      else:
        yield f'{scalar(key)}: {first}'
  elif isinstance(value, list) and value:
    for item in value:
      first, *rest = yaml(item)
      yield f'- {first}'
      yield from (f'  {line}' for line in rest)
  else:
    yield scalar(value)


def render(jobs: Sequence[Job], options: Options) -> str:
  """The manifests, as documents of one YAML text."""
  return '---\n'.join('\n'.join(yaml(manifest(job, options))) + '\n' for job in jobs)


def submit(jobs: Sequence[Job], options: Options, folder: str) -> list[str]:
  """Applies the manifest of each job that the cluster does not hold, or whose last JobSet has ended; NAMESPACE/NAME."""
  texts = [render([job], options) for job in jobs]  # all that can be wrong is seen before anything is done
  for job, text in zip(jobs, texts, strict=True):
    name, where = name_of(job), ['--namespace', options.namespace]
    job_lib.write(os.path.join(folder, f'{name}.yaml'), text)
    found = output(['kubectl', 'get', 'jobset', name, *where, '--ignore-not-found', '--output=json'])
    if found.strip():
      if not ended(json.loads(found)):
        print(f'{job.name} is in the cluster already, as {name}', file=sys.stderr)
        continue
      output(['kubectl', 'delete', 'jobset', name, *where, '--ignore-not-found', '--cascade=foreground'])
    output(['kubectl', 'apply', '--filename=-'], input=text)
  return [f'{options.namespace}/{name_of(job)}' for job in jobs]


def ended(jobset: dict[str, Any]) -> bool:
  """Whether a JobSet, as kubectl shows it, has completed or failed for good."""
  return bool(jobset.get('status', {}).get('terminalState'))


def alive(ids: Iterable[str]) -> set[str]:
  """Those of the ids whose JobSet exists and has not ended."""
  ids = set(ids)
  live = set()
  for namespace in {i.split('/')[0] for i in ids}:
    found = json.loads(output(['kubectl', 'get', 'jobsets', '--namespace', namespace, '--output=json']))
    live |= {f'{namespace}/{jobset["metadata"]["name"]}' for jobset in found['items'] if not ended(jobset)}
  return ids & live


def cancel(ids: Iterable[str]) -> None:
  """Deletes the JobSets: their pods are told with SIGTERM to save, and are not restarted."""
  for namespace, name in (i.split('/') for i in ids):
    output(['kubectl', 'delete', 'jobset', name, '--namespace', namespace, '--ignore-not-found', '--wait=false'])


def main(argv: Sequence[str] | None = None) -> int:
  """Parses the flags and submits the job; --dry_run prints the manifest and submits nothing."""
  return job_lib.main(sys.modules[__name__], argv)


if __name__ == '__main__':
  sys.exit(main())
