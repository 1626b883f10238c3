"""Strong and weak scaling of the train step over 1, 2, 4 and 8 virtual devices, as collectives and bytes, not time.

`python -m experiments.pod_plan.scaling` compiles the step of configs/digits.py, of one level and six times as wide, for
each and prints the table of the README. Nothing is timed: the devices share the cores of this machine.
"""
import os
import sys

import jax

from diffusion_jax import ahead
from diffusion_jax.runtime import config as config_lib

DEVICES = (1, 2, 4, 8)
BATCH = 64  # of the strong scaling; and 8 a device of the weak, so that both end at the same step
MESHES = {'data': {'fsdp': '1'}, 'fsdp': {'data': '1', 'fsdp': '-1'}}


def program(devices, mesh, batch):
  """The compiled step of a batch of `batch` images on so many devices."""
  config = config_lib.load('configs/digits.py')
  # Of narrower layers nothing would be divided: small arrays stay whole.
  wide = {'net.channels': '96', 'net.multipliers': '(1,)'}
  changes = {f'mesh.{axis}': size for axis, size in MESHES[mesh].items()}
  config_lib.override(config, wide | changes | {'train.batch_size': str(batch)})
  model, where = ahead.model_on(config, jax.devices()[:devices])
  return ahead.compile_program(*ahead.step_on(model, where, 'tpu'), devices)  # convolutions as they are there


def rows():
  """(scaling, mesh, devices, images, FLOPs, state, activations, collectives) for each; the last four of one device."""
  for scaling, batch in (('strong', lambda n: BATCH), ('weak', lambda n: BATCH * n // DEVICES[-1])):
    for mesh in MESHES:
      for devices in DEVICES:
        found = program(devices, mesh, batch(devices))
        memory = dict(found.memory)
        state = memory['parameters'] + memory['optimizer'] + memory['averages']
        yield scaling, mesh, devices, batch(devices), sum(found.flops.values()) / devices, state, memory[
            'activations'], found.collectives


def main():
  os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')  # of code that never runs
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', DEVICES[-1])
  kib = lambda size: f'{size / 1024:,.0f}'
  print('| scaling | mesh | devices | images | MFLOP | state KiB | activations KiB | collectives: KiB sent (count) | '
        'sent KiB |\n|---|---|---|---|---|---|---|---|---|')
  for scaling, mesh, devices, images, flops, state, activations, collectives in rows():
    kinds = ', '.join(f'{c.kind} {c.dtype} {kib(c.sent)} ({c.count})' for c in collectives if c.sent >= 1024)
    print(f'| {scaling} | {mesh} | {devices} | {images} | {flops / 1e6:,.1f} | {kib(state)} | {kib(activations)} | '
          f'{kinds or "none"} | {kib(sum(c.sent for c in collectives))} |', flush=True)
  return 0


if __name__ == '__main__':
  sys.exit(main())
