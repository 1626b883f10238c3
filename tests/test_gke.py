"""The GKE launcher: its manifests against the JobSet definition's schema, read back as YAML, and a stand-in kubectl."""
import copy
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from test_launch import HOSTILE

from launch import gke
from launch.job import RETRYABLE, Job, LaunchError, train

SCHEMA = json.loads((pathlib.Path(__file__).parent / 'fixtures' / 'jobset_schema.json').read_text('utf-8'))
TYPES = {'object': dict, 'array': list, 'string': str, 'integer': int, 'boolean': bool}
OPTIONS = gke.Options(image='image:1', tpu='v5e', topology='4x4')


def faults(value, schema, path=''):
  """What a JSON schema (of the few words that ours uses) has against a value."""
  names = schema.get('type', [])
  kinds = [TYPES[name] for name in ([names] if isinstance(names, str) else names)]
  if kinds and not any(type(value) is kind for kind in kinds):
    return [f'{path}: {value!r} is not {names}']
  if 'enum' in schema and value not in schema['enum']:
    return [f'{path}: {value!r} is not one of {schema["enum"]}']
  if isinstance(value, str) and not (re.search(schema.get('pattern', ''), value)
                                     and schema.get('minLength', 0) <= len(value) <= schema.get('maxLength', math.inf)):
    return [f'{path}: {value!r} has not the form {schema}']
  if isinstance(value, int) and not schema.get('minimum', -math.inf) <= value <= schema.get('maximum', math.inf):
    return [f'{path}: {value} is out of range']
  found = []
  if isinstance(value, list):
    for index, item in enumerate(value):
      found += faults(item, schema.get('items', {}), f'{path}[{index}]')
  if isinstance(value, dict):
    found += [f'{path}: no {key}' for key in schema.get('required', []) if key not in value]
    for key, item in value.items():
      rule = schema.get('properties', {}).get(key, schema.get('additionalProperties', {}))
      found += [f'{path}: unknown {key}'] if rule is False else faults(item, rule, f'{path}.{key}')
  return found


def run_of(name='run', overrides=None):
  return train('configs/cifar10.py', f'gs://bucket/runs/{name}', overrides)


def parsed(jobs, options=OPTIONS):
  return [*yaml.safe_load_all(gke.render(jobs, options))]


def pod_of(manifest):
  """The pod's specification."""
  return manifest['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']


TOPOLOGIES = [(tpu, topology) for tpu in ('v5e', 'v6e') for topology in gke.FLAT] + [
    (tpu, topology) for tpu in ('v4', 'v5p') for topology in (*gke.SMALL, '4x4x4', '4x4x8', '8x8x8', '8x16x16')]


@pytest.mark.parametrize(('tpu', 'topology'), TOPOLOGIES)
@pytest.mark.parametrize('change', [{}, {'slices': 2, 'queue': 'q', 'spot': True, 'service_account': 'me'}])
def test_manifests_are_valid_and_ask_for_all_chips(tpu, topology, change):
  options = gke.Options(image='image:1', tpu=tpu, topology=topology, **change)
  manifest, = parsed([run_of()], options)
  assert not faults(manifest, SCHEMA)
  assert manifest == gke.manifest(run_of(), options)  # the YAML says what was meant
  spec = manifest['spec']['replicatedJobs'][0]['template']['spec']
  container, = pod_of(manifest)['containers']
  assert container['resources']['limits'] == container['resources']['requests']
  chips = container['resources']['limits']['google.com/tpu']
  assert spec['parallelism'] == spec['completions']
  assert chips * spec['completions'] == math.prod(map(int, topology.split('x')))
  assert pod_of(manifest)['nodeSelector'].items() >= {
      'cloud.google.com/gke-tpu-topology': topology, 'cloud.google.com/gke-tpu-accelerator': {
          'v4': 'tpu-v4-podslice', 'v5e': 'tpu-v5-lite-podslice', 'v5p': 'tpu-v5p-slice', 'v6e': 'tpu-v6e-slice'}[tpu]
  }.items()
  assert manifest['spec']['replicatedJobs'][0]['replicas'] == options.slices
  # A slice of several hosts needs all of them from one pool of nodes; single hosts need not have a pool each.
  assert bool(manifest['metadata']['annotations']) == (spec['completions'] > 1)


@pytest.mark.parametrize(('tpu', 'chips', 'hosts'), [  # machine types ct5lp-hightpu-{1,4,8}t and ct4p-hightpu-4t
    (('v5e', '1x1'), 1, 1), (('v5e', '2x2'), 4, 1), (('v5e', '2x4'), 8, 1), (('v5e', '4x4'), 4, 4),
    (('v6e', '16x16'), 4, 64), (('v4', '2x2x1'), 4, 1), (('v5p', '4x4x4'), 4, 16)])
def test_chips_and_hosts_are_those_of_googles_tables(tpu, chips, hosts):
  assert gke.hosts_of(*tpu)[1:] == (chips, hosts)


@pytest.mark.parametrize(('tpu', 'topology', 'valid'), [
    ('v5e', '3x3', '2x4'), ('v5e', '4x2', '2x4'), ('v6e', '2x2x1', '16x16'), ('v5e', '', '4x4'), ('v4', '4x4', '2x2x1'),
    ('v5p', '8x4x4', 'A <= B <= C'), ('v5p', '0x4x4', '2x2x2'), ('v4', '16x16x32', '4096'), ('v4', '4x4xx4', '2x2x4'),
    ('v3', '2x2', 'v4, v5e, v5p, v6e'), ('v5e', '4x4\n', '4x8')])
def test_a_wrong_topology_is_answered_with_those_that_there_are(tpu, topology, valid):
  with pytest.raises(LaunchError, match=re.escape(valid)):
    gke.manifest(run_of(), gke.Options(image='i', tpu=tpu, topology=topology))


def replaced(manifest, path, value):
  """The manifest with something else at a path; None takes it away."""
  manifest = copy.deepcopy(manifest)
  *there, last = path
  place = manifest
  for key in there:
    place = place[key]
  if value is None:
    del place[last]
  else:
    place[last] = value
  return manifest


ONE = ('spec', 'replicatedJobs', 0)
POD = (*ONE, 'template', 'spec', 'template', 'spec')


@pytest.mark.parametrize(('path', 'value', 'message'), [
    (('spec', 'failurePolicy', 'maxRestart'), 3, 'unknown maxRestart'),
    (('spec', 'failurePolicy', 'maxRestarts'), '3', 'is not integer'),
    (('spec', 'failurePolicy', 'rules', 0, 'action'), 'Fail', 'is not one of'),
    (('spec', 'failurePolicy', 'rules', 0, 'name'), None, 'no name'),
    ((*ONE, 'replicas'), 'two', 'is not integer'), ((*ONE, 'name'), None, 'no name'),
    ((*ONE, 'template', 'spec', 'podFailurePolicy', 'rules', 1, 'onExitCodes', 'values'), ['75'], 'is not integer'),
    ((*ONE, 'template', 'spec', 'podFailurePolicy', 'rules', 1, 'onExitCodes', 'operator'), None, 'no operator'),
    ((*POD, 'nodeSelectors'), {}, 'unknown nodeSelectors'),
    ((*POD, 'nodeSelector', 'cloud.google.com/gke-tpu-topology'), 4, 'is not string'),
    ((*POD, 'tolerations', 0, 'op'), 'Exists', 'unknown op'),
    ((*POD, 'containers', 0, 'name'), None, 'no name'), ((*POD, 'containers', 0, 'command'), 'sh', 'is not array'),
    ((*POD, 'containers', 0, 'env', 0, 'value'), 1, 'is not string'),
    ((*POD, 'containers', 0, 'resources', 'limit'), {}, 'unknown limit'),
    ((*POD, 'volumes', 0, 'csi', 'driver'), None, 'no driver'), ((*POD, 'hostNetwork'), 'yes', 'is not boolean'),
    (('specs',), {}, 'unknown specs'), (('spec', 'replicatedJobs'), {}, 'is not array')])
def test_a_planted_error_is_seen_by_the_schema(path, value, message):
  good = gke.manifest(run_of(), OPTIONS)
  assert not faults(good, SCHEMA)
  found = faults(replaced(good, path, value), SCHEMA)
  assert len(found) == 1 and message in found[0]


def kubernetes(words, env):
  """Words as the kubelet hands them to a container: `$$` is a dollar, `$(NAME)` the variable if there is one."""
  return [re.sub(r'\$\$|\$\((\w+)\)', lambda m: env.get(m[1], m[0]) if m[1] else '$', word) for word in words]


@pytest.mark.parametrize(('topology', 'slices'), [('2x4', 1), ('4x4', 1), ('4x4', 3), ('1x1', 2)])
def test_the_command_arrives_word_by_word_and_processes_are_numbered(topology, slices, tmp_path):
  code = ('import json,os,sys;print(json.dumps([sys.argv[1:],*(os.environ.get("DIFFUSION_JAX_" + k) '
          'for k in ("PROCESS_ID","NUM_PROCESSES","COORDINATOR"))]))')
  words = [*HOSTILE, '$(A)', '$$', '$$(A)']
  options = gke.Options(image='i', topology=topology, slices=slices)
  job = Job('j', (sys.executable, '-IS', '-c', code, *words), 'gs://b/w', {'A': '$(B) $$'})
  manifest = gke.manifest(job, options)
  container, = pod_of(manifest)['containers']
  hosts = manifest['spec']['replicatedJobs'][0]['template']['spec']['completions']
  env = dict(zip([e['name'] for e in container['env']], kubernetes(
      [e.get('value', '') for e in container['env']], {'B': 'b'}), strict=True))
  assert env['A'] == '$(B) $$'
  found = []
  for index in range(hosts * slices):
    where = {'SLICE': str(index // hosts), 'JOB_COMPLETION_INDEX': str(index % hosts)}
    said = subprocess.run(kubernetes(container['command'], env), env={'PATH': os.environ['PATH'], **env, **where},
                          cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    found.append(json.loads(said))
  if hosts * slices == 1:
    assert found == [[words, None, None, None]]
  else:
    name = manifest['metadata']['name']
    assert found == [[words, str(index), str(hosts * slices), f'{name}-worker-0-0.{name}:8476']
                     for index in range(hosts * slices)]
    assert container['env'][-1]['valueFrom']['fieldRef']['fieldPath'] == (
        "metadata.annotations['jobset.sigs.k8s.io/job-index']")


def test_what_is_not_retryable_ends_the_jobset_and_what_is_restarts_it():
  spec = gke.manifest(run_of(), gke.Options(image='i', restarts=7))['spec']
  disrupted, codes = spec['replicatedJobs'][0]['template']['spec']['podFailurePolicy']['rules']
  assert disrupted['onPodConditions'][0]['type'] == 'DisruptionTarget' and disrupted['action'] == 'Count'
  assert codes['action'] == 'FailJob' and codes['onExitCodes']['operator'] == 'NotIn'
  assert {*codes['onExitCodes']['values']} == RETRYABLE
  assert codes['onExitCodes']['values'] == sorted(codes['onExitCodes']['values'])  # as the API wants them
  assert spec['failurePolicy']['maxRestarts'] == 7
  assert spec['failurePolicy']['rules'][0]['onJobFailureReasons'] == ['PodFailurePolicy']
  # A pod failure policy is allowed only with these.
  assert spec['replicatedJobs'][0]['template']['spec']['backoffLimit'] == 0
  assert spec['replicatedJobs'][0]['template']['spec']['template']['spec']['restartPolicy'] == 'Never'


def test_the_bucket_is_mounted_where_the_command_looks():
  manifest, = parsed([run_of(overrides={'data.data_dir': 'gs://bucket/tfds'})])
  pod = pod_of(manifest)
  mount = next(m['mountPath'] for m in pod['containers'][0]['volumeMounts'] if m['name'] == 'bucket')
  assert f'--workdir={mount}/runs/run' in pod['containers'][0]['command']
  assert f'--config.data.data_dir={mount}/tfds' in pod['containers'][0]['command']
  assert pod['volumes'][0]['csi']['volumeAttributes']['bucketName'] == 'bucket'
  annotations = manifest['spec']['replicatedJobs'][0]['template']['spec']['template']['metadata']['annotations']
  assert annotations == {'gke-gcsfuse/volumes': 'true'}


@pytest.mark.parametrize('name', [*HOSTILE, 'x' * 200])
def test_names_are_labels_and_follow_from_the_workdir(name):
  """With what JobSet adds (-worker-<slice>-<host>) they are DNS labels of at most 63 characters."""
  one, two = (gke.manifest(Job(name, ('a',), f'gs://b/{name}{i}'), OPTIONS)['metadata']['name'] for i in '12')
  assert one != two and re.fullmatch(r'[a-z][a-z0-9-]*[a-z0-9]', one) and len(f'{one}-worker-99-9999-abcde') <= 63


values = st.recursive(st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(
    ['yes', 'No', 'null', '~', '1e3', '0x1f', '1:30', '2024-01-01', '- a', 'a: b', '=', '<<', '!x', '\x85\u2028\ufeff',
     'é']),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@settings(max_examples=50, deadline=None)
@given(values)
def test_yaml_is_read_back_as_it_was_written(value):
  assert yaml.safe_load('\n'.join(gke.yaml(value))) == value


KUBECTL = '''#!/bin/sh
echo "$1 $3" >> "$FAKES/calls"
case $1 in
get) if [ "$2" = jobsets ]; then echo '{"items":['; cat "$FAKES/items" 2>/dev/null; echo ']}'
     else cat "$FAKES/$3" 2>/dev/null; fi ;;
apply) cat > "$FAKES/applied"; name=$(sed -n 's/^  name: //p' "$FAKES/applied"); echo '{}' > "$FAKES/$name" ;;
delete) rm "$FAKES/$3" ;;
esac
exit 0
'''


@pytest.fixture
def fakes(tmp_path, monkeypatch):
  """A folder with a stand-in for kubectl; nothing but it and the system's small tools is on PATH."""
  folder, tools = tmp_path / 'fakes', tmp_path / 'tools'
  folder.mkdir()
  tools.mkdir()
  (folder / 'kubectl').write_text(KUBECTL)
  (folder / 'kubectl').chmod(0o755)
  for name in ('sh', 'cat', 'sed', 'rm', 'echo'):
    (tools / name).symlink_to(f'/bin/{name}')
  monkeypatch.setenv('PATH', f'{folder}:{tools}')
  monkeypatch.setenv('FAKES', str(folder))
  return folder


def calls(folder, verb):
  return sum(line.startswith(f'{verb} ') for line in (folder / 'calls').read_text().splitlines())


def test_a_jobset_is_applied_once_and_again_only_when_it_has_ended(fakes, tmp_path, capsys):
  submit = lambda: gke.submit([run_of('a'), run_of('b')], OPTIONS, str(tmp_path / 'launch'))
  ids = submit()
  assert calls(fakes, 'apply') == 2 and len({*ids}) == 2 and all(i.startswith('default/') for i in ids)
  assert (fakes / 'applied').read_text() == gke.render([run_of('b')], OPTIONS)
  assert submit() == ids and calls(fakes, 'apply') == 2
  assert capsys.readouterr().err.count('in the cluster already') == 2
  (fakes / ids[0].split('/')[1]).write_text('{"status": {"terminalState": "Failed"}}')
  assert submit() == ids and calls(fakes, 'apply') == 3 and calls(fakes, 'delete') == 1
  assert {p.name for p in (tmp_path / 'launch').iterdir()} == {f'{i.split("/")[1]}.yaml' for i in ids}
  gke.cancel(ids)
  assert calls(fakes, 'delete') == 3 and not (fakes / ids[0].split('/')[1]).exists()


def test_alive_are_those_that_have_not_ended(fakes):
  (fakes / 'items').write_text(','.join(json.dumps({'metadata': {'name': name}, 'status': status}) for name, status in [
      ('a', {}), ('b', {'terminalState': 'Completed'}), ('c', {'restarts': 2}), ('other', {})]))
  assert gke.alive(['ns/a', 'ns/b', 'ns/c', 'ns/d']) == {'ns/a', 'ns/c'}
  assert gke.alive([]) == set()


def test_what_kubectl_refuses_is_said_and_a_wrong_job_stops_all(fakes, tmp_path):
  (fakes / 'kubectl').write_text('#!/bin/sh\necho "no such cluster" >&2; exit 1\n')
  with pytest.raises(LaunchError, match='no such cluster'):
    gke.submit([run_of()], OPTIONS, str(tmp_path))
  with pytest.raises(LaunchError, match='would be lost'):
    gke.submit([run_of(), train('c', 'here')], OPTIONS, str(tmp_path / 'other'))
  assert not (tmp_path / 'other').exists()
