"""One of several processes under test: trains, samples and evaluates. Started by test_processes.py; not a test."""
import os
import sys

import conftest  # noqa: F401  the tests' settings of XLA
import jax

from diffusion_jax import evaluate, sample, train
from diffusion_jax.runtime import command, sharding

jax.config.update('jax_num_cpu_devices', int(os.environ['JAX_NUM_CPU_DEVICES']))
sharding.MIN_SHARDED_SIZE = 0  # these nets are small
COMMANDS = {'train': train.main, 'sample': sample.main, 'evaluate': evaluate.main}


def main(words):
  """COMMAND FLAGS , COMMAND FLAGS ...: one after another in this process."""
  words = [*words, ',']
  while words:
    end = words.index(',')
    name, *flags = words[:end]
    words = words[end + 1:]
    if status := COMMANDS[name]([*flags, '--allow=nets']):
      return status
  return 0


if __name__ == '__main__':
  sys.exit(command.run(main, sys.argv[1:]))
