"""COMMAND: weights and settings from diffusers to a run folder, and back; PyTorch is not needed."""
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from diffusion_jax import bridge
from diffusion_jax.runtime import command
from diffusion_jax.runtime.config import UserError
from diffusion_jax.trained import restore

FROM, TO = 'from-diffusers', 'to-diffusers'
DTYPES = {'float32': np.float32, 'float16': np.float16}


def main(argv: Sequence[str] | None = None) -> int:
  """`diffusion-jax convert`: see --help."""
  p = command.parser('convert', f'{FROM} DIR --workdir=W makes a run folder of a pipeline, or keeps a network or a '
                                f'LoRA file by our names; {TO} W DIR is the way back.')
  p.add_argument('way', choices=(FROM, TO))
  p.add_argument('source', help=f'{FROM}: a folder of diffusers, or a LoRA file; {TO}: a run folder, or one made so')
  p.add_argument('target', nargs='?', help=f'{TO}: the folder to be made')
  p.add_argument('--workdir', help=f'{FROM}: the folder to be made')
  p.add_argument('--base', help=f'{FROM}, of a LoRA file: the run folder of the model that it adapts')
  p.add_argument('--ema', default='', help=f"{TO}: which average of the parameters (default: the config's first)")
  p.add_argument('--step', type=int, help=f'{TO}: which checkpoint (default: the newest)')
  p.add_argument('--dtype', default='float32', choices=DTYPES, help=f'{TO}: of the weights (default float32)')
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError(f'convert changes no settings: --config.{next(iter(overrides))} is for train')
  target = flags.workdir if flags.way == FROM else flags.target
  if not target or (flags.target if flags.way == FROM else flags.workdir):
    raise UserError(f'write {FROM} DIR --workdir=W, or {TO} W DIR: the folder to be made comes last')
  source, target = pathlib.Path(flags.source), pathlib.Path(target)
  if not source.exists():
    raise UserError(f'there is no {str(source)!r}')
  what = _from(source, target, flags.base) if flags.way == FROM else _to(source, target, flags)
  print(f'{source} -> {target}: {what}')
  return 0


def _from(source, target, base):
  if source.is_file() or (source / bridge.lora.NAME).exists():
    if not base:
      raise UserError('a LoRA file says nothing of the network that it adapts: name the run folder of one by --base')
    return f'adapters of {", ".join(bridge.from_lora(source, _restored(base), target))}'
  if not (source / bridge.INDEX).exists():
    return f'the network of a {bridge.from_part(source, target)}'
  model = bridge.from_pipeline(source, target)
  return f'a model of images {model.image_shape}; diffusion-jax sample --workdir={target} draws some'


def _to(source, target, flags):
  dtype = DTYPES[flags.dtype]
  if (source / bridge.PART).exists():
    return f'a folder of {bridge.to_part(source, target, dtype)}'
  trained = _restored(source, flags.ema, flags.step)
  if trained.adapters is not None:
    return f'a {bridge.to_lora(trained, target, dtype)}'
  return f'a {bridge.to_pipeline(trained, source, target, dtype)}'


def _restored(folder, ema='', step=None):
  return restore(pathlib.Path(folder), ema, step, lambda config: None)


if __name__ == '__main__':
  sys.exit(command.run(main))
