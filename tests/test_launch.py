"""Laws of the local launcher, with a stand-in for the trainer."""
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from launch import job, local


def fake_job(tmp_path, statuses):
  """A job that ends with the next of `statuses` each time it is started, and writes down that it was."""
  script = tmp_path / 'python'
  script.write_text(f'#!/bin/sh\necho x >> {tmp_path}/starts\nset -- {" ".join(map(str, statuses))}\n'
                    f'shift $(($(wc -l < {tmp_path}/starts) - 1))\nexit $1\n')
  script.chmod(0o755)
  return job.Job('c.py', 'w', python=str(script))


@pytest.mark.parametrize(('statuses', 'starts', 'status'), [
    ([0], 1, 0), ([75, 137, 0], 3, 0), ([2, 0], 1, 2), ([1, 0], 1, 1), ([75] * 9, 4, 75)])
def test_only_retryable_exits_are_started_again(tmp_path, statuses, starts, status):
  assert local.run(fake_job(tmp_path, statuses), restarts=3) == status
  assert (tmp_path / 'starts').read_text().count('x') == starts


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


def test_ctrl_c_reaches_the_job_and_ends_the_launcher(tmp_path):
  script = tmp_path / 'python'
  script.write_text(f"#!/bin/sh\ntrap 'echo saved > {tmp_path}/saved; exit 75' TERM\ntouch {tmp_path}/up\n"
                    'while :; do sleep 0.05; done\n')
  script.chmod(0o755)
  code = f"import sys; from launch import job, local; sys.exit(local.run(job.Job('c', 'w', python={str(script)!r}), 3))"
  launcher = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, env=os.environ)
  while not (tmp_path / 'up').exists():
    time.sleep(0.02)
  launcher.send_signal(signal.SIGINT)
  assert launcher.wait(timeout=30) == 75
  assert (tmp_path / 'saved').read_text() == 'saved\n'
