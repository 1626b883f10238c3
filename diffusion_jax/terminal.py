"""How the commands that need no jax answer at the terminal."""
import os
import sys
from collections.abc import Callable

from diffusion_jax.records import Unusable
from diffusion_jax.svg import plain


def answer(make: Callable[[], str]) -> int:
  """Prints make(), or its error in one sentence; returns the exit status, 0 or 2."""
  try:
    text = make()
  except (Unusable, OSError) as e:
    print(f'error: {plain(str(e))}', file=sys.stderr)
    return 2
  encoding = sys.stdout.encoding or 'utf-8'
  try:
    print(text.encode(encoding, 'replace').decode(encoding), flush=True)
  except BrokenPipeError:  # the reader has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return 0
