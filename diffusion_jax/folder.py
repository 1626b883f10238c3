"""What a run folder says of its run: the config, the data, the schedule, what was run, and how it goes."""
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax import model as model_lib
from diffusion_jax.convert import tokenizer
from diffusion_jax.core import schedules
from diffusion_jax.data import card, sources
from diffusion_jax.model import TOKENIZER, Model
from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime import log, optim
from diffusion_jax.runtime.config import Config, UserError, explain
from diffusion_jax.step import BINS


class NoRecords:
  """What a process that writes no records has in the place of log.Run."""

  def metrics(self, record: dict[str, Any]) -> None:
    """Nothing."""

  def image(self, name: str, image: np.ndarray, step: int) -> None:
    """Nothing."""

  def flush(self) -> None:
    """Nothing."""

  def close(self) -> None:
    """Nothing."""


# Keys of a machine rather than of a run, which continues with others to the same numbers, but for rounding.
OF_THE_MACHINE = ('mesh.', 'sharding:', 'data.data_dir:', 'data.manual_dir:', 'data.workers:', 'data.resident_gib:',
                  'train.ema_on_host:', 'train.keep:')


def claim(workdir: pathlib.Path, config: Config, allow_changes: bool) -> None:
  """Writes config.json, or compares it with the one there: UserError names what differs, unless changes are allowed.

  Keys that are `OF_THE_MACHINE` may always differ. What differs is recorded in overrides.jsonl.
  """
  path = workdir / 'config.json'
  if path.exists():
    changed = config_lib.differences(config_lib.from_json(path), config)
    refused = [one for one in changed if not one.startswith(OF_THE_MACHINE)]
    if refused and not allow_changes:
      raise UserError(f'{str(workdir)!r} holds a run with another config ({"; ".join(refused[:5])}'
                      f'{f"; and {len(refused) - 5} more" if len(refused) > 5 else ""}): '
                      f'give another --workdir, or continue that run with this config by --override')
    if changed:
      log.append(workdir / 'overrides.jsonl', {'time': log.now(), 'changed': changed})
  log.write(path, config_lib.to_json(config))


def write_about(workdir: pathlib.Path, model: Model, source: sources.Source, parameters: int) -> None:
  """The records that say what is trained on what: data.json, schedule.json, run.json; and a copy of its tokenizer."""
  log.write_json(workdir / 'data.json', {
      'source': source.name, 'split': source.split, 'shape': source.shape, 'num_examples': len(source),
      'num_classes': source.num_classes, 'class_names': source.class_names})
  place = model.config.text.get('tokenizer', '')
  if place and not (workdir / TOKENIZER).exists():  # prompts are read in years to come, wherever that folder is then
    tokenizer.read(pathlib.Path(place)).write(workdir / TOKENIZER)
  process, t = model.diffusion.process, np.linspace(0, 1, 201)
  start = process.init(model_lib.key(model.config.seed, 'init'))  # a learned schedule's: where training begins
  level = process.path.level(jnp.asarray(schedules.evaluate(process, t, start), jnp.float32))
  log.write_json(workdir / 'schedule.json', {'t': t, **level._asdict()})
  log.write_json(workdir / 'run.json', {'started': log.now(), 'command': ['diffusion-jax', 'train', *sys.argv[1:]],
                                        'parameters': parameters, **log.provenance()})


def write_card(workdir: pathlib.Path, config: Config, source: sources.Source, arrays: Sequence[np.ndarray]) -> None:
  """data_card.json, unless one of the same settings is there; `arrays` are images and labels if they are in memory."""
  made_with = log.plain({**config.data, 'held_out': config.eval.held_out, 'count': len(source), 'shape': source.shape})
  if not card.matches(path := workdir / 'data_card.json', made_with):
    options = {key: config.data[key] for key in ('size', 'channels', 'data_dir', 'manual_dir', 'max_bad')}
    with explain('config.data'):
      about = card.card(source, *arrays, held_out=config.eval.held_out, **options)
    log.write_json(path, {**about, 'made_with': made_with})


def describe(values: dict[str, Any], config: Config, step: int, since: int, seconds: float,
             seconds_since: float) -> dict[str, Any]:
  """A record of metrics.jsonl: averages over the steps since the last one."""
  size = config.train.batch_size
  rate = optim.learning_rate(**config.learning_rate, total_images=config.train.images, batch_size=size)
  return {
      'step': step, 'images': step * size, 'seconds': seconds,
      'loss': float(values['loss']), 'grad_norm': float(values['grad_norm']),
      'images_per_second': (step - since) * size / max(seconds - seconds_since, 1e-9),
      'learning_rate': float(rate(step - 1)),
      'logsnr_bins': BINS.tolist(), 'loss_by_logsnr': values['loss_by_logsnr'].tolist()}
