"""`diffusion-jax <command>`, the same as `python -m diffusion_jax.<command>`."""
import difflib
import importlib
import os
import sys

COMMANDS = {
    'train': 'trains the model of a config, or continues',
    'plan': 'compiles a config for a pod or a cluster: does it fit, how fast, at what price',
    'sample': 'draws images from a trained model',
    'evaluate': 'scores a trained model against real images',
    'likelihood': 'bits per dimension of a data split under a trained model',
    'score': 'scores images that lie somewhere, made by whatever program',
    'encode': 'makes the statistics of a data set that samples are scored against',
    'report': 'makes one HTML page from run folders',
    'compare': 'prints the scores of runs side by side, if they are alike',
    'diff': 'prints what differs between two runs',
    'sweep': 'runs the points of a sweep file anywhere, and says how far they are',
    'convert': 'brings weights from diffusers, and takes them there',
    'posthoc_ema': 'makes an average of any length from the snapshots of a run',
}


def main() -> int:
  """The command that the first word names; 141 if who read its output has gone: `| head`."""
  try:
    try:
      status = run(sys.argv[1:])
    except SystemExit as e:  # argparse, after --help
      status = e.code or 0
    sys.stdout.flush()  # here, since what this raises at exit nobody can catch
    return status
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def run(words: list[str]) -> int:
  """Imports the command that the first word names and runs it; help costs no import of jax."""
  if not words or words[0] in ('-h', '--help', 'help'):
    print('usage: diffusion-jax COMMAND [flags]\n')
    for name, what in COMMANDS.items():
      print(f'  {name:13}{what}')
    print('\ndiffusion-jax COMMAND --help lists the flags of a command.')
    return 0
  name, *rest = words
  if name not in COMMANDS:
    match = difflib.get_close_matches(name, COMMANDS, 1)
    print(f'error: there is no command {name!r}' + (f'; did you mean {match[0]!r}?' if match else
                                                    f', only {", ".join(COMMANDS)}'), file=sys.stderr)
    return 2
  module = importlib.import_module(f'diffusion_jax.{name}' + ('.__main__' if name == 'convert' else ''))
  if name in ('report', 'compare', 'diff', 'sweep'):  # they need no jax, and stand alone
    return module.main(rest)
  from diffusion_jax.runtime import command
  return command.run(module.main, rest)


if __name__ == '__main__':
  sys.exit(main())
