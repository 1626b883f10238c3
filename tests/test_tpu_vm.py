"""The TPU VM launcher against a stand-in for gcloud, which runs what is sent over ssh on this machine."""
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile

import pytest
from conftest import ROOT
from test_launch import HOSTILE, until

from launch import tpu_vm
from launch.job import Job, LaunchError

# Remembers each call. A folder per TPU is its home; `plan` says what happens: the states that each request goes
# through, and what each ssh does (run it, or end with a status, perhaps with the TPU taken away).
GCLOUD = '''#!{python} -IS
import fcntl, json, os, pathlib, shutil, sys
here = pathlib.Path(__file__).parent
words = sys.argv[1:]
lock = open(here / "lock", "a")
fcntl.flock(lock, fcntl.LOCK_EX)
with open(here / "calls", "a") as f: f.write(json.dumps(words) + "\\n")
plan = json.loads((here / "plan").read_text())
def save(): (here / "plan").write_text(json.dumps(plan))
assert words[:2] == ["compute", "tpus"] and "--zone=z" in words and "--quiet" in words, words
kind, verb, name = words[2], words[3], words[4]
given = dict(word.lstrip("-").partition("=")[::2] for word in words[4:] if word.startswith("--"))
home = here / "homes" / name.split(":")[0]
if (kind, verb) == ("queued-resources", "list"):
  print(*(p.name for p in (here / "homes").glob("*")), sep="\\n")
elif verb == "create":
  if plan.get("refuse"): sys.exit("quota")
  home.mkdir(parents=True)
  plan[name] = plan["states"].pop(0) if plan["states"] else ["ACTIVE"]; save()
elif not home.exists() and verb in ("describe", "delete", "ssh"):
  sys.exit("NOT_FOUND")
elif verb == "describe":
  if kind == "tpu-vm": print(json.dumps({{"state": plan.get("node", "READY")}}))
  else:
    print(json.dumps({{"state": {{"state": plan[name][0]}}}}))
    plan[name] = plan[name][1:] or plan[name]; save()
elif verb == "delete":
  assert given.get("force") == ""
  shutil.rmtree(home)
  plan.pop("node", None); save()
elif verb == "scp":
  target = words[5].partition(":")
  shutil.copy(words[4], here / "homes" / target[0] / target[2])
elif verb == "ssh":
  what = plan["ssh"].pop(0) if plan["ssh"] else "run"
  if what == "preempted": plan[name] = ["SUSPENDED"]
  if what == "node preempted": plan["node"] = "PREEMPTED"
  save()
  lock.close()
  env = {{**os.environ, "HOME": str(home)}}
  if what == "run": os.execvpe("bash", ["bash", "-c", given["command"]], env)
  sys.exit(255 if isinstance(what, str) else what)
'''
TOOLS = ['bash', 'cp', 'env', 'false', 'flock', 'git', 'grep', 'gzip', 'hostname', 'ls', 'mkdir', 'rm', 'sh', 'sleep',
         'tar', 'touch', 'true']
OPTIONS = tpu_vm.Options(zone='z', poll=0, restarts=2, setup=('echo set up',))


@pytest.fixture
def cloud(tmp_path, monkeypatch):
  """The stand-in's folder; PATH has nothing of the system's but the tools named above, so no real gcloud."""
  folder, tools, code = tmp_path / 'fakes', tmp_path / 'tools', tmp_path / 'code'
  for new in (folder, tools, code, folder / 'homes'):
    new.mkdir()
  for name in TOOLS:
    if not (found := shutil.which(name)):
      pytest.skip(f'{name} is not installed')
    (tools / name).symlink_to(found)
  (tools / 'python3').symlink_to(sys.executable)
  stubs = {'gcloud': GCLOUD.format(python=sys.executable), 'mountpoint': f'#!/bin/sh\n[ -e {tmp_path}/mounted ]\n',
           'gcsfuse': f'#!/bin/sh\necho "$@" >> {tmp_path}/mounted\n'}
  for name, text in stubs.items():
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)
  monkeypatch.setenv('PATH', f'{folder}:{tools}')
  monkeypatch.setattr(tpu_vm, 'MOUNT', str(tmp_path / 'gcs'))
  monkeypatch.chdir(code)
  subprocess.run(['git', 'init', '--quiet'], check=True)
  (code / 'here.py').write_text('print("from the checkout")\n')
  (code / '.gitignore').write_text('*.bin\n')
  (code / 'big.bin').write_text('x')
  plan(folder)
  return folder


def plan(folder, states=(), ssh=(), **more):
  (folder / 'plan').write_text(json.dumps({'states': list(states), 'ssh': list(ssh), **more}))


def calls(folder):
  """[verb or, for the TPU itself, tpu-vm verb] of every call but those that only look."""
  words = [json.loads(line)[2:] for line in (folder / 'calls').read_text().splitlines()]
  return [w[1] for w in words if w[1] not in ('describe', 'list')]


def job_of(*argv, name='run'):
  return Job(name, argv or ('true',), f'gs://bucket/{name}')


def test_only_the_stand_in_is_on_path(cloud):
  assert shutil.which('gcloud') == str(cloud / 'gcloud')


def test_a_job_runs_in_the_checkout_and_the_tpu_is_deleted(cloud, tmp_path):
  code = ('import here,json,os,sys; open(sys.argv[1]+"/said","w").write(json.dumps([sys.argv[2:],'
          'sorted({*os.listdir(".")} - {"__pycache__"}),os.environ["DIFFUSION_JAX_COORDINATOR"],os.environ["X"]]))')
  (workdir := tmp_path / 'gcs' / 'bucket' / 'run').mkdir(parents=True)
  job = Job('run', (sys.executable, '-c', code, 'gs://bucket/run', *HOSTILE), 'gs://bucket/run', {'X': "it's"})
  assert tpu_vm.run([job], OPTIONS) == [0]
  assert calls(cloud) == ['create', 'scp', 'ssh', 'delete']
  assert json.loads((workdir / 'said').read_text()) == [HOSTILE, ['.gitignore', 'here.py'], 'auto', "it's"]
  log, = workdir.glob('log.*.txt')
  assert log.read_text() == 'set up\nfrom the checkout\n'
  assert (tmp_path / 'mounted').read_text() == f'--implicit-dirs bucket {tmp_path}/gcs/bucket\n'
  assert not [*(cloud / 'homes').iterdir()] and not (tmp_path / 'code' / 'pwned').exists()


def test_it_waits_until_the_tpu_is_there(cloud):
  plan(cloud, [['ACCEPTED', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE']], [0])
  assert tpu_vm.run([job_of()], OPTIONS) == [0]
  assert calls(cloud) == ['create', 'scp', 'ssh', 'delete']
  looks = [line for line in (cloud / 'calls').read_text().splitlines() if '"queued-resources", "describe"' in line]
  assert len(looks) == 5  # none yet, and its four states


@pytest.mark.parametrize('how', ['preempted', 'node preempted'])
def test_a_preempted_tpu_is_asked_for_again(cloud, how):
  plan(cloud, [['PROVISIONING', 'ACTIVE'], ['WAITING_FOR_RESOURCES', 'ACTIVE']], [how, 0])
  assert tpu_vm.run([job_of()], OPTIONS) == [0]
  assert calls(cloud) == ['create', 'scp', 'ssh', 'delete', 'create', 'scp', 'ssh', 'delete']


def test_one_taken_away_before_it_was_used_is_asked_for_again(cloud):
  plan(cloud, [['PROVISIONING', 'SUSPENDED'], ['ACTIVE']], [0])
  assert tpu_vm.run([job_of()], OPTIONS) == [0]
  assert calls(cloud) == ['create', 'delete', 'create', 'scp', 'ssh', 'delete']


@pytest.mark.parametrize(('statuses', 'starts', 'status'), [
    ([0], 1, 0), ([137, 255, 0], 3, 0), ([2], 1, 2), ([75] * 9, 3, 75), ([255] * 9, 3, 75)])
def test_only_retryable_exits_and_a_broken_line_are_started_again(cloud, statuses, starts, status):
  plan(cloud, ssh=statuses)
  assert tpu_vm.run([job_of()], OPTIONS) == [status]
  assert calls(cloud).count('ssh') == starts
  assert calls(cloud).count('create') == calls(cloud).count('delete') == 1  # on the same TPU


@pytest.mark.parametrize('status', [0, 2, 75])
def test_the_status_of_the_job_comes_back(cloud, status):
  assert tpu_vm.run([job_of('sh', '-c', f'exit {status}')], OPTIONS) == [status]


def test_a_setup_that_fails_is_retried_and_does_not_run_the_job(cloud, tmp_path):
  options = tpu_vm.Options(zone='z', poll=0, restarts=1, setup=('false',))
  assert tpu_vm.run([job_of('touch', f'{tmp_path}/ran')], options) == [70]
  assert calls(cloud).count('ssh') == 2 and not (tmp_path / 'ran').exists()


def test_a_second_start_on_a_host_waits_for_the_first(cloud, tmp_path):
  """As when the line breaks and the job does not: the same script again, while the first still runs."""
  job = job_of('sh', '-c', f'touch {tmp_path}/on.$$; ls {tmp_path} | grep -c on. >> {tmp_path}/seen; '
                           f'sleep 0.5; rm {tmp_path}/on.$$')
  home = cloud / 'homes' / 'vm'
  home.mkdir()
  shutil.move(archive := tpu_vm.pack(str(home.parent)), home)
  env = {**os.environ, 'HOME': str(home)}
  script = tpu_vm.script(job, OPTIONS, os.path.basename(archive))
  both = [subprocess.Popen(['bash', '-c', script], env=env) for _ in range(2)]
  assert [process.wait(timeout=60) for process in both] == [0, 0]
  assert (tmp_path / 'seen').read_text() == '1\n1\n'


def test_jobs_have_tpus_of_their_own(cloud):
  jobs = [job_of(name=name) for name in 'abc']
  ids = tpu_vm.submit(jobs, OPTIONS, str(cloud / 'launch'))
  assert sorted(calls(cloud)) == sorted(['create', 'scp', 'ssh', 'delete'] * 3) and len({*ids}) == 3
  assert (cloud / 'launch' / 'tpu_vm.sh').read_text() == tpu_vm.render(jobs, OPTIONS)


def test_alive_and_cancel(cloud):
  assert tpu_vm.alive(['/z/none']) == set()
  subprocess.run(tpu_vm.create('one', OPTIONS), check=True)
  assert tpu_vm.alive(['/z/one', '/z/two']) == {'/z/one'}
  tpu_vm.cancel(['/z/one'])
  assert tpu_vm.alive(['/z/one']) == set()


def test_what_gcloud_refuses_is_said(cloud, capfd):
  plan(cloud, refuse=True)
  assert tpu_vm.run([job_of()], OPTIONS) == [2]
  said = capfd.readouterr().err
  assert 'quota' in said and 'error: no TPU could be asked for' in said
  plan(cloud, [['FAILED'], ['ACTIVE']])
  assert sorted(tpu_vm.run([job_of(name=name) for name in 'ab'], OPTIONS)) == [0, 2]  # the other one runs
  assert 'error: the request for TPU' in capfd.readouterr().err
  with pytest.raises(LaunchError, match='would be lost'):
    tpu_vm.run([job_of(), Job('j', ('true',), 'here')], OPTIONS)


def test_a_tpu_that_failed_before_is_asked_for_again(cloud):
  plan(cloud, [['FAILED'], ['ACTIVE']])
  subprocess.run(tpu_vm.create(tpu_vm.name_of(job_of()), OPTIONS), check=True)
  assert tpu_vm.run([job_of()], OPTIONS) == [0]


def test_ctrl_c_leaves_the_job_running(cloud, tmp_path):
  """The TPU is not deleted, and the command that deletes it is shown."""
  code = ('import signal; from launch import tpu_vm; from launch.job import Job\n'
          'signal.signal(signal.SIGINT, signal.default_int_handler)\n'  # a shell's background job ignores it from birth
          f'tpu_vm.MOUNT = {str(tmp_path / "gcs")!r}\n'
          f'print(tpu_vm.run([{job_of("sh", "-c", f"touch {tmp_path}/up; exec sleep 2")!r}], tpu_vm.{OPTIONS!r}))')
  launcher = subprocess.Popen([sys.executable, '-c', code], env={**os.environ, 'PYTHONPATH': str(ROOT)},
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  until((tmp_path / 'up').exists)
  launcher.send_signal(signal.SIGINT)
  out, err = launcher.communicate(timeout=30)
  assert out == '[75]\n' and shlex.join(tpu_vm.delete(tpu_vm.name_of(job_of()), OPTIONS)) in err
  assert 'delete' not in calls(cloud)


def test_the_commands_shown_do_the_same_in_a_shell(cloud, tmp_path):
  shown = tpu_vm.render([job_of('touch', f"{tmp_path}/it's up")], OPTIONS)
  shutil.move(tpu_vm.pack(str(tmp_path)), 'CHECKOUT.tar.gz')
  subprocess.run(['sh', '-ec', shown], check=True, stdout=subprocess.DEVNULL)
  assert calls(cloud) == ['create', 'scp', 'ssh', 'delete'] and (tmp_path / "it's up").exists()


def test_options_reach_gcloud():
  options = tpu_vm.Options(zone='us-west4-a', project='p', accelerator_type='v6e-16', runtime_version='v2-alpha-tpuv6e',
                           spot=True, service_account='me@x')
  where = {'--zone=us-west4-a', '--project=p', '--quiet'}
  asked = tpu_vm.create('n', options)
  assert asked[:6] == ['gcloud', 'compute', 'tpus', 'queued-resources', 'create', 'n']
  assert {*asked[6:]} == where | {'--node-id=n', '--accelerator-type=v6e-16', '--runtime-version=v2-alpha-tpuv6e',
                                  '--service-account=me@x', '--spot'}
  assert {*tpu_vm.ssh('n', options, 'a b')[6:]} == where | {'--worker=all', '--command=a b'}
  assert not {'--spot', '--project=', '--service-account='} & {*tpu_vm.create('n', OPTIONS)}


def test_the_archive_is_the_checkout_without_what_git_ignores(cloud, tmp_path):
  (tmp_path / 'code' / 'a b.py').write_text('1')
  (tmp_path / 'code' / 'gone.py').write_text('1')
  subprocess.run(['git', 'add', 'gone.py'], check=True)
  (tmp_path / 'code' / 'gone.py').unlink()
  with tarfile.open(path := tpu_vm.pack(str(tmp_path))) as tar:
    assert sorted(tar.getnames()) == ['.gitignore', 'a b.py', 'here.py']
  (tmp_path / 'code' / 'a b.py').write_text('2')
  assert tpu_vm.pack(str(tmp_path)) != path
