"""`diffusion-jax`: what it does before a command begins, and where nobody reads what it prints."""
import os
import pathlib
import subprocess
import sys

import pytest

from diffusion_jax import cli

ROOT = pathlib.Path(__file__).parents[1]


def unread(*words):
  """(status, standard error) of Python whose reader has gone."""
  read, write = os.pipe()
  os.close(read)
  environment = {key: value for key, value in os.environ.items() if key != 'PYTHONUNBUFFERED'}
  done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, env=environment)
  os.close(write)
  return done.returncode, done.stderr.decode()


@pytest.mark.parametrize('words', [['--help'], ['report', '--help'], ['diff', '--help'], ['sweep', '--help']])
def test_help_that_nobody_reads_says_nothing(words):
  assert unread('-m', 'diffusion_jax.cli', *words) == (141, '')


@pytest.mark.parametrize('main', ["lambda argv: print('x')", "lambda argv: print('x' * 99999)",
                                  "lambda argv: command.parser('name', 'what it does').parse(['--help'])"])
def test_neither_does_a_command(main):
  """However little it prints: what fits in the buffer is written at the end."""
  assert unread('-c', f'import sys; from diffusion_jax.runtime import command; sys.exit(command.run({main}))') == (
      141, '')


def test_help_names_every_command_and_imports_none(capsys, monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['diffusion-jax', '--help'])
  assert cli.main() == 0
  shown = capsys.readouterr().out
  assert all(f'  {name} ' in shown for name in cli.COMMANDS)
  code = ("import sys; sys.argv = ['diffusion-jax', '--help']; from diffusion_jax import cli; cli.main(); "
          "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)")
  assert not subprocess.run([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode
