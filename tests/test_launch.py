"""Laws of what launchers share and of the local one, with stand-ins for the trainer."""
import argparse
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from launch import gke, job, local, slurm, tpu_vm
from launch.job import Job, LaunchError

LAUNCHERS = [local, slurm, gke, tpu_vm]
HOSTILE = ["it's", 'two words', '$(touch pwned)', '`id`', 'a;b&c|d', '*', '"', '\\', 'new\nline', '#', '--', '$HOME',
           'é']


def script(tmp_path, text, name='stub'):
  """A job that runs a shell script."""
  path = tmp_path / name
  path.write_text(f'#!/bin/sh\n{text}')
  path.chmod(0o755)
  return Job(name, (str(path),), str(tmp_path / f'{name}-run'))


def ending(tmp_path, statuses, name='stub'):
  """A job that ends with the next of `statuses` each time it is started, and writes down that it was."""
  return script(tmp_path, f'echo x >> {tmp_path}/{name}-starts\nset -- {" ".join(map(str, statuses))}\n'
                          f'shift $(($(wc -l < {tmp_path}/{name}-starts) - 1))\nexit $1\n', name)


def until(condition, seconds=30):
  """Waits until something is so."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'it did not happen'
    time.sleep(0.02)


@pytest.mark.parametrize(('statuses', 'starts', 'status'), [
    ([0], 1, 0), ([75, 137, 0], 3, 0), ([2, 0], 1, 2), ([1, 0], 1, 1), ([75] * 9, 4, 75)])
def test_only_retryable_exits_are_started_again(tmp_path, statuses, starts, status):
  assert local.run([ending(tmp_path, statuses)], local.Options(restarts=3)) == [status]
  assert (tmp_path / 'stub-starts').read_text().count('x') == starts


def test_a_kill_is_retryable():
  assert job.retryable(-signal.SIGKILL)
  assert job.retryable(-signal.SIGTERM)
  assert not job.retryable(-signal.SIGSEGV)


def test_dry_run_prints_a_command_that_the_shell_reads_back(capsys):
  assert local.main(['--config=my configs/a.py:run', '--workdir=w', '--config.seed=1', '--dry_run']) == 0
  words = subprocess.run(['sh', '-c', f'for w in {capsys.readouterr().out.strip()}; do echo "$w"; done'],
                         capture_output=True, text=True, check=True).stdout.splitlines()
  assert words == [sys.executable, '-m', 'diffusion_jax.train', '--config=my configs/a.py:run', '--workdir=w',
                   '--config.seed=1']


def test_ctrl_c_reaches_the_job_once_and_ends_the_launcher(tmp_path):
  stub = script(tmp_path, f"trap 'echo saved >> {tmp_path}/saved; sleep 0.3; exit 75' TERM INT\ntouch {tmp_path}/up\n"
                          'while :; do sleep 0.05; done\n')
  code = f'import sys; from launch import job, local; sys.exit(local.run([job.{stub!r}], local.Options())[0])'
  launcher = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, env=os.environ, start_new_session=True)
  until((tmp_path / 'up').exists)
  os.killpg(launcher.pid, signal.SIGINT)  # as a terminal does, to all that are in front
  time.sleep(0.1)
  launcher.send_signal(signal.SIGTERM)
  assert launcher.wait(timeout=30) == 75
  assert (tmp_path / 'saved').read_text() == 'saved\n'


def test_a_second_ctrl_c_kills(tmp_path):
  stub = script(tmp_path, f"trap '' TERM INT\ntouch {tmp_path}/up\nwhile :; do sleep 0.05; done\n")
  code = f'import sys; from launch import job, local; sys.exit(local.run([job.{stub!r}], local.Options())[0])'
  launcher = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, env=os.environ)
  until((tmp_path / 'up').exists)
  launcher.send_signal(signal.SIGINT)
  time.sleep(0.2)
  assert launcher.poll() is None  # it waits
  launcher.send_signal(signal.SIGINT)
  assert launcher.wait(timeout=30) == 137


def test_slots_bound_what_runs_at_once_and_everything_runs(tmp_path):
  text = (f'touch {tmp_path}/on-$$; ls {tmp_path} | grep -c on- >> {tmp_path}/seen; sleep 0.2; rm {tmp_path}/on-$$\n'
          'echo ok')
  jobs = [script(tmp_path, text, f'j{i}') for i in range(5)]
  assert local.submit(jobs, local.Options(slots=2), str(tmp_path / 'launch')) == ['0'] * 5
  assert sorted((tmp_path / 'seen').read_text().split())[-1] == '2'
  assert all((tmp_path / f'j{i}-run' / 'log.txt').read_text() == 'ok\n' for i in range(5))
  assert (tmp_path / 'launch' / 'local.sh').read_text().count('\n') == 5


def test_one_job_that_fails_does_not_stop_the_others(tmp_path):
  jobs = [ending(tmp_path, [2], 'a'), Job('b', (str(tmp_path / 'nothing'),), str(tmp_path / 'b')),
          ending(tmp_path, [137, 0], 'c'), ending(tmp_path, [75, 75], 'd')]
  assert local.submit(jobs, local.Options(restarts=1), str(tmp_path)) == ['2', '127', '0', '75']


def test_slots_share_cores_and_gpus(tmp_path):
  code = "import os,time;time.sleep(.3);print(sorted(os.sched_getaffinity(0)),os.environ['CUDA_VISIBLE_DEVICES'])"
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < 2:
    pytest.skip(f'one core cannot be shared: {cores}')
  jobs = [Job(f'{i}', (sys.executable, '-c', code), str(tmp_path / f'{i}')) for i in range(2)]
  assert local.submit(jobs, local.Options(slots=2, gpus='0,1,2'), str(tmp_path)) == ['0', '0']
  said = [(tmp_path / f'{i}' / 'log.txt').read_text().strip() for i in range(2)]
  half = len(cores) // 2
  assert said == [f'{cores[:half]} 0', f'{cores[half:]} 1,2']
  with pytest.raises(LaunchError, match='--gpus=0,1 is too few for 4'):
    local.Options(slots=2, processes=2, gpus='0,1')


@pytest.mark.parametrize('count', [1, 2, 3, 7])
def test_shares_are_a_partition_into_even_parts(count):
  parts = [local.share(range(7), i, count) for i in range(count)]
  assert [thing for part in parts for thing in part] == list(range(7))
  assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_gang_knows_its_members_and_meets(tmp_path):
  """Three processes that find each other by what the environment says."""
  code = ('import os, socket\nn, i = (int(os.environ["DIFFUSION_JAX_" + k]) for k in ("NUM_PROCESSES", "PROCESS_ID"))\n'
          'host, port = os.environ["DIFFUSION_JAX_COORDINATOR"].split(":")\n'
          'if i == 0:\n  s = socket.create_server((host, int(port))); s.settimeout(20)\n'
          '  print(n, sorted(s.accept()[0].recv(9).decode() for _ in range(n - 1)))\n'
          'while i:\n  try:\n    c = socket.create_connection((host, int(port)), 20)\n    c.sendall(str(i).encode())\n'
          '    break\n  except ConnectionRefusedError:\n    pass\n')
  assert local.submit([Job('g', (sys.executable, '-c', code), str(tmp_path / 'g'))], local.Options(processes=3),
                      str(tmp_path)) == ['0']
  assert (tmp_path / 'g' / 'log.txt').read_text() == "3 ['1', '2']\n"
  assert {p.name for p in (tmp_path / 'g').iterdir()} == {'log.txt', 'log.1.txt', 'log.2.txt'}


@pytest.mark.parametrize('deaf', [False, True])
def test_the_death_of_a_member_ends_and_restarts_its_gang(tmp_path, deaf):
  """Member 1 dies once; the others are told, or killed if they do not listen; then all three run again to the end."""
  stub = script(tmp_path, f'''
i=$DIFFUSION_JAX_PROCESS_ID
echo $i >> {tmp_path}/starts
[ -e {tmp_path}/died ] && exit 0
trap '{'' if deaf else f'echo $i >> {tmp_path}/told; exit 143'}' TERM
if [ $i = 1 ]; then
  while [ $(wc -l < {tmp_path}/starts) -lt 3 ]; do sleep 0.02; done; sleep 0.1; touch {tmp_path}/died; exit 134; fi
while :; do sleep 0.05; done
''')
  assert local.run([stub], local.Options(processes=3, grace=0 if deaf else 30), shown=False) == [0]
  assert sorted((tmp_path / 'starts').read_text().split()) == ['0', '0', '1', '1', '2', '2']
  assert deaf or sorted((tmp_path / 'told').read_text().split()) == ['0', '2']


def test_the_status_of_a_gang_is_that_of_the_first_death(tmp_path):
  stub = script(tmp_path, '[ $DIFFUSION_JAX_PROCESS_ID = 1 ] && exit 3\nsleep 20\n')
  assert local.run([stub], local.Options(processes=2), shown=False) == [3]


def test_a_gang_is_shown_as_commands(tmp_path):
  text = local.render([Job('j', ('echo', 'a b'), 'w', {'X': 'y z'})], local.Options(processes=2))
  assert [line.split()[3] for line in text.splitlines()] == ['DIFFUSION_JAX_COORDINATOR=localhost:PORT'] * 2
  done = subprocess.run(['sh', '-c', text], capture_output=True, text=True, check=True)
  assert done.stdout == 'a b\na b\n'


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_a_dry_run_does_nothing(launcher, tmp_path, capsys, monkeypatch):
  """With no program on PATH, in a folder in which nothing may be written."""
  monkeypatch.setenv('PATH', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  bucket = launcher in (gke, tpu_vm)
  extra = ['--image=i'] if launcher is gke else ['--zone=z'] if launcher is tpu_vm else []
  argv = ['--config=c.py', f'--workdir={"gs://b/" if bucket else ""}w', '--config.seed=3', *extra]
  assert launcher.main([*argv, '--dry_run']) == 0
  said = capsys.readouterr().out
  assert 'diffusion_jax.train' in said and '--config.seed=3' in said and said.endswith('\n')
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(('launcher', 'program', 'argv'), [
    (slurm, 'squeue', ['--workdir=w']), (gke, 'kubectl', ['--workdir=gs://b/w', '--image=i']),
    (tpu_vm, 'git', ['--workdir=gs://b/w', '--zone=z'])])
def test_a_missing_program_is_named(launcher, program, argv, tmp_path, capsys, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  monkeypatch.chdir(tmp_path)
  assert launcher.main(['--config=c.py', *argv]) == 2
  assert f'cannot run {program!r}' in (error := capsys.readouterr().err)
  assert error.splitlines()[-1].startswith('error: ')


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_flags_that_are_none_end_with_status_2(launcher, capsys):
  for argv, message in [(['--config=c', '--workdir=w', '--nonsense'], "'--nonsense' is neither a flag"),
                        (['--config=c'], '--workdir'), (['--config=c', '--workdir=w', '--restarts=x'], 'restarts')]:
    with pytest.raises(SystemExit) as stop:
      launcher.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(('launcher', 'argv', 'message'), [
    (local, ['--workdir=w', '--gpus=0', '--slots=2'], '--gpus=0 is too few for 2'),
    (local, ['--workdir=w', '--slots=0'], '--slots=0'), (local, ['--workdir=gs://b/w'], 'gs://b/w is not a folder'),
    (slurm, ['--workdir=gs://b/w'], 'gs://b/w is not a folder'), (slurm, ['--workdir=w', '--mem=1 G'], "'--mem=1 G'"),
    (gke, ['--workdir=w', '--image=i'], '--workdir=w would be lost'), (gke, ['--workdir=gs://b/w'], '--image'),
    (tpu_vm, ['--workdir=w', '--zone=z'], '--workdir=w would be lost'), (tpu_vm, ['--workdir=gs://b/w'], '--zone')])
def test_wrong_values_are_said_in_one_sentence(launcher, argv, message, capsys):
  assert launcher.main(['--config=c', '--dry_run', *argv]) == 2
  said = capsys.readouterr()
  assert not said.out and said.err.startswith('error: ') and said.err.count('\n') == 1 and message in said.err


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_every_option_is_a_flag_with_help(launcher):
  parser = argparse.ArgumentParser()
  job.add_options(parser, launcher.OPTIONS)
  assert job.read_options(launcher.OPTIONS, parser.parse_args([])) == launcher.OPTIONS()
  shown = ' '.join(parser.format_help().split())
  for name in launcher.OPTIONS.__dataclass_fields__:
    assert f'--{name} ' in shown or f'--{name}]' in shown


def test_options_are_read_by_their_kind():
  parser = argparse.ArgumentParser()
  job.add_options(parser, slurm.OPTIONS)
  got = job.read_options(slurm.OPTIONS, parser.parse_args(['--gpus=2', '--extra=--exclusive', '--extra=--x=1']))
  assert (got.gpus, got.extra, got.setup) == (2, ('--exclusive', '--x=1'), ())


@pytest.mark.parametrize('name', [*HOSTILE, '', 'x' * 300, '9', '日本', 'UPPER_case.3'])
def test_identifiers_are_labels_for_every_system(name):
  got = job.identifier(name, 'key', 36)
  assert len(got) <= 36
  assert got[0].isalpha() and all(c.isascii() and (c.isdigit() or c.islower() or c == '-') for c in got)
  assert got != job.identifier(name, 'another key', 36)


def test_a_bucket_is_mounted_in_every_word():
  here = job.train('c.py', 'gs://b/r/x', {'data.data_dir': 'gs://b/d', 'other': 'gs://bb/d'})
  got, bucket = job.mounted(here, '/gcs')
  assert bucket == 'b' and got.workdir == '/gcs/b/r/x'
  assert got.argv == ('python3', '-m', 'diffusion_jax.train', '--config=c.py', '--workdir=/gcs/b/r/x',
                      '--config.data.data_dir=/gcs/b/d', '--config.other=gs://bb/d')
  below, bucket = job.mounted(Job('n', ('p', '--root=/mnt/b/r', '/x/mnt/b/r', '/mnt/bb'), '/mnt/b/r/x'), '/gcs',
                              'b=/mnt/b/')
  assert bucket == 'b' and below.argv == ('p', '--root=/gcs/b/r', '/x/mnt/b/r', '/mnt/bb')
  assert below.workdir == '/gcs/b/r/x'
  for workdir, at in [('w', ''), ('gs://b', ''), ('/mnt/bb/x', 'b=/mnt/b'), ('gs://b/x', 'b'), ('s3://b/x', '')]:
    with pytest.raises(LaunchError, match=r'--mounted=b is not|lost with the machine'):
      job.mounted(Job('n', ('p',), workdir), '/gcs', at)
