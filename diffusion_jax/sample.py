"""COMMAND: draws images from a trained model, by id."""
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diffusion_jax import bridge, capacity
from diffusion_jax import model as model_lib
from diffusion_jax.core import levels, samplers
from diffusion_jax.generator import Generator, labels_of
from diffusion_jax.model import Model
from diffusion_jax.pictures import STRIP_IMAGES, columns_of, given_picture, npz, png, tile, write_trajectory
from diffusion_jax.runtime import backend, command, distributed, log, paths, sharding, snapshots
from diffusion_jax.runtime.config import Config, UserError, parse_call
from diffusion_jax.trained import Trained, reduced, restore

GUIDANCE = ('guidance', 'guidance_low', 'guidance_high', 'guidance_rescale', 'threshold')  # settings with a flag
CACHE = ('cache_every', 'cache_depth')


def add_flags(p: command.Parser) -> None:
  """The flags that sample and evaluate share."""
  p.add_argument('--workdir', required=True, help='the run folder that train wrote')
  p.add_argument('--num', type=int, help='how many samples, ids 0 to N-1')
  p.add_argument('--seed', type=int, default=0, help='the seed of all samples (default 0)')
  p.add_argument('--sampler', help=f"such as 'ddim(eta=0.5)': {', '.join(samplers.__all__)}")
  p.add_argument('--grid', help=f"which levels are visited: {', '.join(levels.GRIDS)}")
  p.add_argument('--steps', type=int, help='levels visited')
  p.add_argument('--guidance', type=float, help='scale of classifier-free guidance; 1: none')
  p.add_argument('--guidance_low', type=float, help='guidance only where sigma / alpha is above this')
  p.add_argument('--guidance_high', type=float, help='and at most this; 0: no limit')
  p.add_argument('--guidance_rescale', type=float, help='share of the spread that guidance gives back; 0: none')
  p.add_argument('--threshold', type=float, help='percentile, such as 0.995, of dynamic thresholding; 0: none')
  p.add_argument('--cache_every', type=int, help='1 of N network calls is whole, others take its deep features')
  p.add_argument('--cache_depth', type=int, help='skip connections that they compute; 0: of the outermost level')
  p.add_argument('--ema', default='', help="which average of the parameters (default: the config's first), 'raw' for "
                                           "none, or the file of one that posthoc_ema made")
  p.add_argument('--lora', action='append', metavar='FILE[=SCALE]', help='a LoRA file of diffusers, or several, merged')
  p.add_argument('--step', type=int, help='which checkpoint (default: the newest)')
  p.add_argument('--batch_size', type=int, help='samples compiled together; 0: auto, as many as fit in memory')
  p.add_argument('--precision', help="of the net's products and kernels: bfloat16 or int8 (default: as trained)")
  command.add_process_flags(p)


def open_run(flags: Any, apart: bool = False, wanted: int = 64) -> tuple[Trained, Config]:
  """The trained model that the flags name, and its sampling settings with the flags' put in.

  Several processes hold it together, or each the whole of it on its own devices if they work `apart`. wanted: how many
  samples, where their batch is not given.
  """
  if flags.num is not None and flags.num < 1:
    raise UserError(f'--num must be at least 1, got {flags.num}')
  if flags.seed < 0:
    raise UserError(f'--seed must be at least 0, got {flags.seed}')
  chosen = {name: parse_call(getattr(flags, name), module)
            for name, module in (('sampler', samplers), ('grid', levels)) if getattr(flags, name)}
  plain = ('steps', *GUIDANCE, *CACHE, 'batch_size', 'precision')
  chosen |= {k: v for k in plain if (v := getattr(flags, k)) is not None}

  def choose_devices(config):
    for key, value in chosen.items():
      config.sample[key] = value
    model_lib.check(config)
    processes = command.join(flags)
    # Devices that share a batch must divide it: one that is chosen later is a multiple of them.
    size = config.sample.batch_size or 2 ** int(math.log2(wanted))
    backend.prepare(size // (1 if apart else processes))

  trained = restore(paths.folder(flags.workdir), flags.ema, flags.step, choose_devices)
  if flags.lora:
    trained = bridge.adapted(trained, flags.lora)
  if apart and distributed.count() > 1:
    own = sharding.make_mesh(devices=jax.local_devices())
    place = lambda a: jax.device_put(snapshots.on_host(a), sharding.replicated(own))
    trained = trained._replace(mesh=own, params=jax.tree.map(place, trained.params))
  return trained, trained.model.config.sample


def describe(config: Config) -> dict[str, str]:
  """'ddim(eta=0.0)' and the like for the specs of the sampling settings."""
  def call(spec):
    arguments = ', '.join(f'{k}={v!r}' for k, v in spec.items() if k != 'fn')
    return f'{spec.fn.partition(":")[2]}({arguments})'
  return {'sampler': call(config.sampler), 'grid': call(config.grid)}


def parse_numbers(flag: str, text: str) -> list[int]:
  """'3,5,10-12' as [3, 5, 10, 11, 12]; UserError if it is not of that form."""
  numbers = []
  try:
    for part in text.split(','):
      low, dash, high = part.partition('-')
      numbers += range(int(low), int(high) + 1) if dash else [int(low)]
  except ValueError:
    numbers = []
  if not numbers:
    raise UserError(f"{flag} must be numbers like 3,5,10-12, got {text!r}")
  return numbers


def main(argv: Sequence[str] | None = None) -> int:
  """`diffusion-jax sample`: see --help."""
  p = command.parser('sample', 'Draws images from a trained model.')
  add_flags(p)
  p.add_argument('--ids', help='which samples, such as 3,5,10-12 (instead of --num)')
  p.add_argument('--labels', help='their classes in turn, by number or name: 7, or cat,dog (default: every class)')
  p.add_argument('--prompt', action='append', metavar='TEXT', help='of a model of text; given again, they take turns')
  p.add_argument('--negative', help='the class, or the prompt, that guidance leads away from (default: from none)')
  p.add_argument('--image', help='the picture that a model of config.given enlarges, fills in, colours or follows')
  p.add_argument('--mask', help='beside --image for inpainting: white where the picture is known')
  p.add_argument('--trajectory', action='store_true', help='also a strip and a GIF of x and of the x0 estimate')
  p.add_argument('--out', help='a folder, or FILE.npz, or FILE.png for the grid alone (default: WORKDIR/samples/final)')
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError(f'sample takes its config from the run folder: --config.{next(iter(overrides))} is for train')
  ids = parse_numbers('--ids', flags.ids) if flags.ids else list(range(flags.num or 64))
  trained, config = open_run(flags, wanted=len(ids))
  trained = reduced(trained, config.precision)
  model = trained.model
  if flags.prompt and flags.labels:
    raise UserError(f'--prompt and --labels={flags.labels} both say what is drawn: give one of the two')
  if flags.prompt:
    labels = [flags.prompt[i % len(flags.prompt)] for i in range(len(ids))]
  else:
    labels = labels_of(ids if not flags.labels else range(len(ids)), model.num_classes,
                       _labels('--labels', flags.labels, model, trained.class_names))
  negatives = [flags.negative or -1] if model.text else (
      _labels('--negative', flags.negative, model, trained.class_names) or [-1])
  if len(negatives) > 1:
    raise UserError(f'--negative must be one class, got {flags.negative!r}')
  image = given_picture(model, flags.image, flags.mask)

  generator = capacity.fitted(Generator(model, config, flags.seed, trained.mesh, negative=negatives[0]),
                              trained.params, len(ids))
  generator.compile(trained.params)
  start = time.perf_counter()
  images = generator.draw(trained.params, ids, labels, image)
  seconds = time.perf_counter() - start

  traced = None
  if flags.trajectory:
    count = min(STRIP_IMAGES, len(ids))
    tracer = Generator(model, config, flags.seed, trained.mesh, trajectory=True, negative=negatives[0])
    tracer = capacity.fitted(tracer, trained.params, count)
    _, traced = tracer(trained.params, ids[:count], labels[:count], image)
  if not distributed.is_writer():
    return 0
  out = paths.folder(flags.out or f'{flags.workdir}/samples/final')
  if out.suffix == '.npz':
    log.write(out, npz(image=images, id=np.asarray(ids), label=np.asarray(labels)))
  elif out.suffix == '.png':
    log.write(out, png(_grid(images, model)))
  else:
    log.write(out / 'grid.png', png(_grid(images, model)))
    for i, image in zip(ids, images, strict=True):
      log.write(out / f'{i:06d}.png', png(image))
  if traced:
    write_trajectory(out if not out.suffix else out.parent, *traced)
  whole = f', {generator.whole} of them whole' if generator.depth else ''
  print(f'{len(ids)} samples, {generator.nfe} network calls each{whole}, {len(ids) / seconds:.1f} samples/s '
        f'(compilation {generator.compile_seconds:.1f} s apart) -> {out}')
  return 0


def _grid(images: np.ndarray, model: Model) -> np.ndarray:
  if images.ndim != 4:
    raise UserError(f'images of shape {images.shape[1:]} cannot be a PNG: write arrays with --out=FILE.npz')
  return tile(images, columns_of(model, len(images)))


def _labels(flag: str, text: str | None, model: Model, class_names: tuple[str, ...]) -> list[int]:
  """The labels that a flag names."""
  if not text:
    return []
  if not model.num_classes:
    raise UserError(f'{flag}={text} needs a model with classes, and this one has none')
  numbers = []
  for word in text.split(','):
    number = class_names.index(word) if word in class_names else int(word) if word.isdigit() else -1
    if not 0 <= number < model.num_classes:
      raise UserError(f'{flag}: {word!r} is no class: there are 0 to {model.num_classes - 1}, '
                      f'named {", ".join(class_names[:20])}')
    numbers.append(number)
  return numbers


if __name__ == '__main__':
  sys.exit(command.run(main))
