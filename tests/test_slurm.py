"""The SLURM launcher: its script run by bash, submissions to a stand-in queue, and jobs on a cluster if one answers."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_launch import HOSTILE, until

from launch import slurm
from launch.job import RETRYABLE, Job, LaunchError

SRUN = 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"'
SCONTROL = 'echo "$@" >> "$FAKES/scontrol-calls"; [ "$1" = show ] && echo node1 && echo node2; exit 1'
SBATCH = '''for script; do :; done
touch "$FAKES/busy-$$"; sleep ${SLOW:-0}
name=$(sed -n 's/^#SBATCH --job-name=//p' "$script")
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
id=$(($(cat "$FAKES/last" 2>/dev/null || echo 100) + 1)); echo $id > "$FAKES/last"
for i in $(seq 0 $last); do echo "${id}_$i|PENDING|$name" >> "$FAKES/queue"; done
sleep ${SLOW:-0}; rm "$FAKES/busy-$$"; echo "$id;cluster"'''
SQUEUE = 'touch "$FAKES/queue"; cat "$FAKES/queue"; echo "7_0|RUNNING|of|somebody else"'
SCANCEL = 'for id; do sed -i "s/^$id|[A-Z]*/$id|CANCELLED/" "$FAKES/queue"; done'
FAKES = {'srun': SRUN, 'scontrol': SCONTROL, 'sbatch': SBATCH, 'squeue': SQUEUE, 'scancel': SCANCEL}


@pytest.fixture
def fakes(tmp_path, monkeypatch):
  """A folder with stand-ins for SLURM's programs, alone on PATH with the system's tools."""
  folder = tmp_path / 'fakes'
  folder.mkdir()
  for name, text in FAKES.items():
    (folder / name).write_text(f'#!/bin/sh\n{text}\n')
    (folder / name).chmod(0o755)
  monkeypatch.setenv('PATH', f'{folder}:/usr/bin:/bin')
  monkeypatch.setenv('FAKES', str(folder))
  return folder


def bash(text, task=0, **env):
  """Runs a rendered script as SLURM would run a task of the array."""
  env = {'SLURM_ARRAY_TASK_ID': str(task), 'SLURM_ARRAY_JOB_ID': '42', 'SLURM_JOB_ID': '43', **env}
  return subprocess.run(['bash', '-s'], input=text, text=True, env={**os.environ, **env}, capture_output=True)


def directives(text):
  """{option: value} of the #SBATCH lines."""
  lines = [line for line in text.splitlines() if line.startswith('#SBATCH')]
  return dict(line.removeprefix('#SBATCH --').partition('=')[::2] for line in lines)


def test_options_become_directives_and_what_is_not_given_is_left_out():
  jobs = [Job(f'{i}', ('true',), 'w') for i in range(3)]
  got = directives(slurm.render(jobs, slurm.Options()))
  assert got == {'job-name': 'diffusion-jax', 'array': '0-2', 'nodes': '1', 'ntasks-per-node': '1',
                 'signal': 'TERM@120', 'open-mode': 'append', 'requeue': ''}
  got = directives(slurm.render(jobs, slurm.Options(
      partition='p', account='a', time='1-02:00:00', gpus=4, cpus=8, mem='64G', nodes=2, processes=4, warning=60,
      parallel=2, constraint='[a100|h100]&ib', extra=('--exclusive', '--mail-user=me@x.org'))))
  assert got == {'job-name': 'diffusion-jax', 'array': '0-2%2', 'partition': 'p', 'account': 'a', 'time': '1-02:00:00',
                 'nodes': '2', 'ntasks-per-node': '4', 'gpus-per-node': '4', 'cpus-per-task': '8', 'mem': '64G',
                 'constraint': '[a100|h100]&ib', 'signal': 'TERM@60', 'open-mode': 'append', 'requeue': '',
                 'exclusive': '', 'mail-user': 'me@x.org'}


@pytest.mark.parametrize('value', ['a b', 'a\n#SBATCH --x', "a'", 'a"', 'a\\', 'a#b', 'é'])
def test_a_directive_takes_no_words_that_sbatch_would_read_otherwise(value):
  with pytest.raises(LaunchError, match='#SBATCH'):
    slurm.render([Job('j', ('true',), 'w')], slurm.Options(partition=value))
  with pytest.raises(LaunchError, match='environment'):
    slurm.render([Job('j', ('true',), 'w', {value: '1'})], slurm.Options())


@pytest.mark.parametrize(('nodes', 'processes'), [(1, 1), (2, 3)])
def test_each_task_runs_its_own_job_with_every_word_as_it_is(fakes, tmp_path, nodes, processes):
  code = 'import json,os,sys;print(json.dumps([sys.argv[1:],os.environ["W"],os.getcwd()]))'
  jobs = [Job(word, (sys.executable, '-c', code, word, *HOSTILE), str(tmp_path / f'runs {word}'), {'W': word})
          for word in HOSTILE]
  text = slurm.render(jobs, slurm.Options(nodes=nodes, processes=processes, setup=('export SET=up', 'echo "$SET"')))
  for task, word in enumerate(HOSTILE):
    done = bash(text, task, SLURM_PROCID='5', SLURM_NTASKS='6', SLURM_JOB_NODELIST='node[1-2]')
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
    up, said = (tmp_path / f'runs {word}' / 'log.txt').read_text().splitlines()
    assert up == 'up' and json.loads(said) == [[word, *HOSTILE], word, os.getcwd()]
  assert not (tmp_path / 'pwned').exists() and not os.path.exists('pwned')


def test_a_setup_that_fails_ends_the_task(fakes, tmp_path):
  job = Job('j', ('touch', str(tmp_path / 'ran')), str(tmp_path))
  assert bash(slurm.render([job], slurm.Options(setup=('true', 'false')))).returncode == 1
  assert (tmp_path / 'log.txt').read_text() == 'setup ended with status 1\n' and not (tmp_path / 'ran').exists()


def test_the_processes_of_several_nodes_know_their_place(fakes, tmp_path):
  code = ('import os;print(*(os.environ["DIFFUSION_JAX_" + k] for k in ("COORDINATOR","PROCESS_ID","NUM_PROCESSES")))')
  text = slurm.render([Job('j', (sys.executable, '-c', code), str(tmp_path))], slurm.Options(nodes=2, processes=3))
  assert bash(text, SLURM_PROCID='4', SLURM_NTASKS='6', SLURM_JOB_NODELIST='node[1-2]').returncode == 0
  assert (tmp_path / 'log.txt').read_text() == 'node1:20043 4 6\n'


@pytest.mark.parametrize('status', [0, 1, 2, 70, 75, 127, 134, 137, 143])
def test_retryable_exits_are_requeued_as_often_as_allowed(fakes, tmp_path, status):
  text = slurm.render([Job('j', ('sh', '-c', f'exit {status}'), str(tmp_path / 'w'))], slurm.Options(restarts=2))
  for count in range(4):
    assert bash(text, SLURM_RESTART_COUNT=str(count)).returncode == status
  assert bash(text).returncode == status  # the first start has no count
  calls = (fakes / 'scontrol-calls').read_text().splitlines() if (fakes / 'scontrol-calls').exists() else []
  assert calls == ['requeue 42_0'] * (3 if status in RETRYABLE else 0)


def test_a_cancelled_job_is_not_requeued(fakes, tmp_path):
  """scancel tells both the script and the step."""
  text = f'trap "exit 75" TERM; touch {tmp_path}/up; while :; do sleep 0.05; done'
  stub = Job('j', ('sh', '-c', text), str(tmp_path))
  (tmp_path / 'script').write_text(slurm.render([stub], slurm.Options()))
  process = subprocess.Popen(['bash', str(tmp_path / 'script')], start_new_session=True,
                             env={**os.environ, 'SLURM_ARRAY_TASK_ID': '0', 'SLURM_ARRAY_JOB_ID': '42'})
  until((tmp_path / 'up').exists)
  os.killpg(process.pid, signal.SIGTERM)
  assert process.wait(timeout=30) == 75
  assert not (fakes / 'scontrol-calls').exists()


def jobs_of(tmp_path, names):
  return [Job(name, ('true',), str(tmp_path / name)) for name in names]


def test_what_is_in_the_queue_is_not_submitted_again(fakes, tmp_path, capsys):
  submit = lambda names: slurm.submit(jobs_of(tmp_path, names), slurm.Options(), str(tmp_path / 'the %j sweep'))
  first = submit('abc')
  assert first == ['101_0', '101_1', '101_2'] and not capsys.readouterr().err
  assert submit('abc') == first
  assert capsys.readouterr().err.count('in the queue already') == 3
  assert submit('cd') == ['101_2', '102_0']  # only what is new
  assert slurm.alive([*first, '102_0', '99_0']) == {*first, '102_0'}
  slurm.cancel(first)
  slurm.cancel([])
  assert slurm.alive([*first, '102_0']) == {'102_0'}
  assert submit('ad') == ['103_0', '102_0']  # a cancelled one is submitted again
  scripts = sorted(path.name for path in (tmp_path / 'the %j sweep').glob('*.sh'))
  assert scripts == ['slurm-0.sh', 'slurm-1.sh', 'slurm-2.sh']
  assert not {p.name for p in tmp_path.iterdir()} & set('abcd')  # folders of runs are the runs' business


def test_a_task_that_cannot_be_cancelled_now_is_cancelled_a_moment_later(fakes, tmp_path):
  ids = slurm.submit(jobs_of(tmp_path, 'ab'), slurm.Options(), str(tmp_path / 'f'))
  refuses = '[ -e "$FAKES/asked" ] || { touch "$FAKES/asked"; echo "not now" >&2; exit 1; }'
  (fakes / 'scancel').write_text(f'#!/bin/sh\n{refuses}\n{SCANCEL}\n')
  slurm.cancel(ids)
  assert not slurm.alive(ids)


def test_another_folder_is_another_sweep(fakes, tmp_path):
  one, two = (slurm.submit(jobs_of(tmp_path / f, 'a'), slurm.Options(), str(tmp_path / f / 'launch')) for f in 'xy')
  assert one != two


@pytest.mark.parametrize('moment', ['busy-*', 'queue'])
def test_a_submission_killed_half_way_is_not_doubled(fakes, tmp_path, monkeypatch, moment):
  """kill -9 of the launcher while sbatch works: before the job is in the queue, and after, when nobody hears its id."""
  (fakes / 'squeue').write_text('#!/bin/sh\ncat "$FAKES/queue" 2>/dev/null\nexit 0\n')
  code = ('import sys; from launch import slurm; from launch.job import Job\n'
          'print(slurm.submit([Job(n, ("true",), sys.argv[1] + n) for n in "ab"], slurm.Options(), sys.argv[1] + "f"))')
  process = subprocess.Popen([sys.executable, '-c', code, f'{tmp_path}/'], cwd=ROOT, env={**os.environ, 'SLOW': '0.7'})
  until(lambda: [*fakes.glob(moment)])
  process.kill()
  process.wait()
  assert moment == 'queue' or not (fakes / 'queue').exists()
  ids = slurm.submit(jobs_of(tmp_path, 'ab'), slurm.Options(), str(tmp_path / 'f'))
  until(lambda: not [*fakes.glob('busy-*')])  # sbatch has outlived the one who called it
  assert ids == ['101_0', '101_1']
  assert len((fakes / 'queue').read_text().splitlines()) == 2


@pytest.mark.parametrize(('program', 'text', 'message'), [
    ('squeue', 'echo down >&2; exit 1', 'down'), ('sbatch', 'echo no such partition >&2; exit 1', 'no such partition'),
    ('sbatch', 'echo Submitted batch job', 'no job id')])
def test_what_slurm_refuses_is_said(fakes, tmp_path, program, text, message):
  (fakes / program).write_text(f'#!/bin/sh\n{text}\n')
  with pytest.raises(LaunchError, match=message):
    slurm.submit(jobs_of(tmp_path, 'a'), slurm.Options(), str(tmp_path))
  assert not (fakes / 'queue').exists() or not (fakes / 'queue').read_text()


# On a cluster, if one answers.


def why_no_cluster():
  """'' if jobs can be run, else the reason."""
  if not shutil.which('sbatch'):
    return 'SLURM is not installed: no sbatch on PATH'
  try:
    done = subprocess.run(['sinfo', '--noheader', '--responding', '--format=%D %T'], capture_output=True, text=True,
                          timeout=20)
  except (OSError, subprocess.TimeoutExpired) as e:
    return f'sinfo does not answer: {e}'
  return '' if not done.returncode and done.stdout.strip() else f'no cluster answers: {done.stderr.strip()}'


REASON = why_no_cluster()
on_a_cluster = pytest.mark.skipif(bool(REASON), reason=REASON or 'a cluster answers')
# Writes a line at each start; then does what the last arguments say.
STUB = '''import os, signal, sys, time
folder, then = sys.argv[1:]
starts = os.path.join(folder, "starts")
with open(starts, "a") as f: f.write("x")
signal.signal(signal.SIGTERM, lambda *_: (open(os.path.join(folder, "told"), "a").write("x"), sys.exit(75)))
count = os.path.getsize(starts)
if then == "75 first" and count == 1: sys.exit(75)
if then == "sleep" or then == "sleep first" and count == 1: time.sleep(300)
print("done", os.environ.get("DIFFUSION_JAX_PROCESS_ID", "alone"), flush=True)
'''


def stub(tmp_path, name, then='nothing'):
  return Job(name, (sys.executable, '-c', STUB, str(tmp_path / name), then), str(tmp_path / name))


def starts(tmp_path, name):
  path = tmp_path / name / 'starts'
  return path.stat().st_size if path.exists() else 0


def ended(ids, seconds=150):
  """Waits until no id is alive; a requeued job, which SLURM holds for two minutes, is let go at once."""
  end = time.monotonic() + seconds
  while living := slurm.alive(ids):
    assert time.monotonic() < end, f'{living} did not end'
    for one in living:
      subprocess.run(['scontrol', 'update', f'JobId={one}', 'StartTime=now'], capture_output=True)
    time.sleep(1)


@pytest.fixture
def cluster(tmp_path):
  """Submits jobs, and leaves none behind."""
  ids = []

  def submit(jobs, **options):
    ids.extend(slurm.submit(jobs, slurm.Options(time='5', **options), str(tmp_path / 'sweep')))
    return ids
  yield submit
  slurm.cancel(slurm.alive(ids))


@on_a_cluster
def test_an_array_runs_to_its_end_and_75_is_requeued(cluster, tmp_path):
  jobs = [stub(tmp_path, 'a b'), stub(tmp_path, 'c'), stub(tmp_path, "d'", '75 first')]
  ids = cluster(jobs, parallel=2)
  assert cluster(jobs[:1])[:3] == ids[:3] and len({*ids}) == 3  # nothing is submitted twice
  ended(ids)
  assert [starts(tmp_path, one.name) for one in jobs] == [1, 1, 2]
  assert all((tmp_path / one.name / 'log.txt').read_text().endswith('done alone\n') for one in jobs)
  assert 'exit status 75: requeued (0 of 20)' in (tmp_path / "d'" / 'log.txt').read_text()


@on_a_cluster
def test_a_preempted_job_is_told_and_comes_back(cluster, tmp_path):
  """TERM to the steps, as before a time limit."""
  ids = cluster([stub(tmp_path, 'p', 'sleep first')])
  until(lambda: starts(tmp_path, 'p'), 60)
  time.sleep(1)
  until(lambda: not subprocess.run(['scancel', '--signal=TERM', *ids]).returncode)
  until((tmp_path / 'p' / 'told').exists, 30)
  ended(ids)
  assert starts(tmp_path, 'p') == 2
  assert (tmp_path / 'p' / 'told').read_text() == 'x'
  assert (tmp_path / 'p' / 'log.txt').read_text().endswith('done alone\n')


@on_a_cluster
def test_a_cancelled_job_is_told_and_stays_away(cluster, tmp_path):
  ids = cluster([stub(tmp_path, 'q', 'sleep')])
  until(lambda: starts(tmp_path, 'q'), 60)
  time.sleep(1)
  slurm.cancel(ids)
  until(lambda: not slurm.alive(ids), 60)
  assert (tmp_path / 'q' / 'told').read_text() == 'x'
  time.sleep(3)
  assert not slurm.alive(ids) and starts(tmp_path, 'q') == 1


@on_a_cluster
def test_two_nodes_make_one_job(cluster, tmp_path):
  nodes = subprocess.run(['sinfo', '--noheader', '--responding', '--format=%D'], capture_output=True, text=True).stdout
  if sum(map(int, nodes.split())) < 2:
    pytest.skip(f'the cluster has {nodes.split()} nodes, this takes 2')
  ended(cluster([stub(tmp_path, 'm')], nodes=2))
  assert starts(tmp_path, 'm') == 2
  assert sorted((tmp_path / 'm' / 'log.txt').read_text().splitlines()) == ['done 0', 'done 1']
