"""What every command does with its command line: `--config.a.b=value` overrides, and errors in one sentence."""
import argparse
import errno
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence

import jax

from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime import distributed
from diffusion_jax.runtime.config import UserError

INTERRUPTED = 75  # EX_TEMPFAIL: state is saved, start the same command again


class Parser(argparse.ArgumentParser):
  """argparse with one sentence, the nearest flag, and status 2 for bad input."""

  def error(self, message: str):
    raise UserError(f'{message} (see {self.prog} --help)')

  def parse(self, argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, str]]:
    """(flags, config overrides {'a.b': text}); `--config.a.b value` is accepted as well as with `=`."""
    argv, overrides, rest = list(sys.argv[1:] if argv is None else argv), {}, []
    while argv:
      word = argv.pop(0)
      if word.startswith('--config.'):
        key, equals, text = word.removeprefix('--config.').partition('=')
        if not equals and (not argv or argv[0].startswith('--')):
          raise UserError(f'{word} needs a value: write {word}=VALUE')
        overrides[key] = text if equals else argv.pop(0)
      else:
        rest.append(word)
    flags, unknown = self.parse_known_args(rest)
    if unknown:
      known = [o for action in self._actions for o in action.option_strings]
      raise UserError(f'{self.prog} has no flag {unknown[0]!r}{config_lib.nearest(unknown[0].split("=")[0], known)}')
    for package in getattr(flags, 'allow', []):
      config_lib.allow(package)
    return flags, overrides


def parser(name: str, description: str) -> Parser:
  """A parser with the flag that every command has."""
  p = Parser(prog=f'diffusion-jax {name}', description=description, allow_abbrev=False)
  p.add_argument('--allow', action='append', default=[], metavar='PACKAGE',
                 help='a package of your own whose functions configs may call')
  return p


def add_process_flags(p: Parser) -> None:
  """The flags of a command that may run as several processes; see distributed.initialise, which takes them."""
  p.add_argument('--coordinator', default='', metavar='HOST:PORT', help='where process 0 of several is found')
  p.add_argument('--num_processes', type=int, default=0, metavar='N', help='how many processes run this command')
  p.add_argument('--process_id', type=int, default=-1, metavar='I', help='which of them this is, from 0')


def join(flags: argparse.Namespace) -> int:
  """Joins the other processes, if there are any, as the flags or the environment say; how many there are."""
  return distributed.initialise(flags.coordinator, flags.num_processes, flags.process_id)


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
  """main(argv), with compiled programs kept for the next time, and a UserError printed as one sentence.

  One of several processes never waits for the others at its end if it fails: it says why, and exits.
  """
  if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
    cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'diffusion_jax'
    jax.config.update('jax_compilation_cache_dir', str(cache))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.05)  # dozens of small ones come to seconds
  try:
    try:
      status = main(argv)
    except SystemExit as e:  # argparse, after --help
      status = e.code or 0
    sys.stdout.flush()  # here, since what this raises at exit nobody can catch
    return status
  except UserError as e:
    print(f'error: {e}', file=sys.stderr)
    return distributed.leave(e.status)
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    return distributed.leave(130)
  except BrokenPipeError:  # who read the output has gone: `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return distributed.leave(141)
  except OSError as e:
    if e.errno not in (errno.ENOSPC, errno.EDQUOT):
      return failed(e)
    print(f'error: {e.filename or "a file"} cannot be written: {e.strerror}; make space, and the same command '
          f'continues', file=sys.stderr)
    return distributed.leave(1)
  except Exception as e:
    return failed(e)


def failed(error: Exception) -> int:
  """Raises an error that nobody foresaw; one of several processes ends here with status 70, and the others then do."""
  if distributed.count() == 1:
    raise error
  if not isinstance(error, jax.errors.JaxRuntimeError):  # which is how a lost peer shows itself
    traceback.print_exception(error)
  words = str(error).strip().splitlines() or ['']
  distributed.end(distributed.FAILED, f'{type(error).__name__}: {words[0][:300]}')
