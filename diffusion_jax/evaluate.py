"""COMMAND: samples from a checkpoint, scores them against real images, and writes how each number was made.

Samples are kept by id under WORKDIR/eval/<settings>, so that an interrupted evaluation continues where it stopped and a
larger one begins with what is there.
"""
import hashlib
import json
import pathlib
import statistics
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from diffusion_jax.data import sources
from diffusion_jax.metrics import features as extractors
from diffusion_jax.metrics import intervals
from diffusion_jax.metrics.features import Features
from diffusion_jax.metrics.frechet import Moments, frechet_distance, moments
from diffusion_jax.model import Trained
from diffusion_jax.runtime import command, log, sharding
from diffusion_jax.runtime.config import Config, UserError, explain, nearest
from diffusion_jax.sample import GUIDANCE, Generator, add_flags, describe, labels_of, npz, open_run

LATENCY_ROUNDS = 3


def generate(generator: Generator, trained: Trained, num: int, folder: pathlib.Path) -> tuple[np.ndarray, float, int]:
  """Samples 0 .. num-1 uint8, made now or found in `folder`, the seconds that making them took, and how many were made.

  A file holds one batch of ids and appears whole or not at all.
  """
  images, seconds, made = [], 0.0, 0
  for start in range(0, num, generator.batch_size):
    ids = np.arange(start, start + generator.batch_size)
    path = folder / f'{start:06d}-{ids[-1]:06d}.npz'
    try:
      with np.load(path, allow_pickle=False) as found:
        batch, took = found['image'], float(found['seconds'])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):  # absent, or not what was written
      generator.compile(trained.params)
      began = time.perf_counter()
      batch = generator(trained.params, ids, labels_of(ids, trained.model.num_classes))
      took = time.perf_counter() - began
      log.write(path, npz(image=batch, id=ids, seconds=np.asarray(took)))
    images.append(batch)
    seconds, made = seconds + took, made + len(batch)
  return np.concatenate(images)[:num], seconds, made


def reference(config: Config, split: str, extract: Callable[[np.ndarray], Features]) -> tuple[np.ndarray, str]:
  """Features [N, D] of a split of the run's data, and the SHA-256 of its images and labels."""
  d = config.data
  source = sources.load(d.source, split, size=d.size, channels=d.channels, data_dir=d.data_dir,
                        manual_dir=d.manual_dir, max_bad=d.max_bad)
  images, labels = sources.arrays(source, d.max_bad)
  return extract(images).values, sources.digest(images, labels)


def scores(found: Features, labels: Sequence[int], name: str, ref: Moments, held_out: np.ndarray | None,
           labelled: bool) -> list[dict[str, Any]]:
  """The quality records: the Fréchet distance, its floor (real held-out images, scored alike), and the accuracy."""
  distance = lambda values: frechet_distance(moments(values), ref)
  records = [{'metric': f'fd_{name}', 'value': distance(found.values),
              'ci': intervals.bootstrap(distance, found.values), 'unit': ''}]
  if held_out is not None:
    records.append({'metric': f'fd_{name}_floor', 'value': distance(held_out), 'unit': '',
                    'ci': intervals.bootstrap(distance, held_out), 'floor_samples': len(held_out)})
  if labelled and found.classes is not None:
    right = int((found.classes == np.asarray(labels)).sum())
    records.append({'metric': f'accuracy_{name}', 'value': right / len(labels), 'unit': '',
                    'ci': intervals.proportion(right, len(labels))})
  return records


def speed(generator: Generator, trained: Trained, config: Config, seed: int, seconds: float,
          made: int) -> list[dict[str, Any]]:
  """The cost records: samples per second, latency of one image alone, compilation, memory."""
  single = Generator(trained.model, Config({**config, 'batch_size': 1}), seed, sharding.make_mesh(1, 1))
  params = jax.device_put(trained.params, jax.devices()[0])
  single.compile(params)
  rounds = []
  for i in range(LATENCY_ROUNDS):
    began = time.perf_counter()
    single(params, [i], labels_of([i], trained.model.num_classes))
    rounds.append(time.perf_counter() - began)
  compiled = generator.compile(trained.params)
  stats, memory = jax.devices()[0].memory_stats(), compiled.memory_analysis()
  if stats and 'peak_bytes_in_use' in stats:
    peak, source = stats['peak_bytes_in_use'], 'the device, since the process began'
  else:
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    source = "the compiled sampler's arguments, outputs and temporaries"
  return [
      {'metric': 'samples_per_second', 'value': made / seconds, 'ci': None, 'unit': '1/s',
       'batch_size': generator.batch_size},
      {'metric': 'latency_seconds', 'value': statistics.median(rounds), 'ci': [min(rounds), max(rounds)],
       'ci_level': None, 'unit': 's', 'batch_size': 1},
      {'metric': 'compile_seconds', 'value': generator.compile_seconds, 'ci': None, 'unit': 's'},
      {'metric': 'peak_memory_bytes', 'value': peak, 'ci': None, 'unit': 'B', 'memory_of': source}]


def main(argv: Sequence[str] | None = None) -> int:
  """`diffusion-jax evaluate`: see --help."""
  p = command.parser('evaluate', 'Scores a trained model: one self-describing line per value in WORKDIR/eval.jsonl.')
  add_flags(p)
  p.add_argument('--features', help=f"what the distance is measured in: {', '.join(extractors.__all__)}")
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError(f'evaluate takes its config from the run folder: --config.{next(iter(overrides))} is for train')
  began = time.perf_counter()
  trained, sampling = open_run(flags)
  model, config, workdir = trained.model, trained.model.config, pathlib.Path(flags.workdir)
  name = flags.features or config.eval.features
  if name not in extractors.__all__:
    raise UserError(f'there are no features {name!r}{nearest(name, extractors.__all__)}')
  extract = getattr(extractors, name)
  num = flags.num or config.eval.num_samples
  if num < 2:
    raise UserError(f'a distance needs at least 2 samples, got --num={num}')

  with explain('config.data'):
    real, ref_hash = reference(config, config.eval.split, extract)
    held_out = _held_out(config, extract, num)
  settings = {
      'run': workdir.resolve().name, 'step': trained.step, 'images': trained.images, 'ema': trained.ema,
      **describe(sampling), 'steps': sampling.steps, **{key: sampling[key] for key in GUIDANCE}, 'clip': sampling.clip,
      'seed': flags.seed, 'batch_size': sampling.batch_size}
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
  folder = workdir / 'eval' / digest
  generator = Generator(model, sampling, flags.seed, trained.mesh)
  images, seconds, made = generate(generator, trained, num, folder)
  labels = labels_of(range(num), model.num_classes)
  with explain('features'):
    found = extract(images)
  log.write(folder / f'features_{name}_{num}.npz', npz(features=found.values, label=np.asarray(labels)))

  with explain('metrics'):
    quality = scores(found, labels, name, moments(real), held_out, bool(model.num_classes))
  common = {**settings, 'nfe': generator.nfe, 'num_samples': num,
            'reference': f'{config.data.source}/{config.eval.split}', 'reference_hash': ref_hash,
            'reference_samples': len(real), 'features': name, 'features_hash': found.extractor_hash,
            'time': log.now(), **log.provenance()}
  for record in quality + speed(generator, trained, sampling, flags.seed, seconds, made):
    log.append(workdir / 'eval.jsonl', {'ci_level': 0.95 if record['ci'] else None, **record, **common,
                                        'seconds': time.perf_counter() - began})
    interval = '' if record['ci'] is None else f' [{record["ci"][0]:.4g}, {record["ci"][1]:.4g}]'
    print(f'{record["metric"]:>20}: {record["value"]:.4g}{interval} {record["unit"]}'.rstrip())
  print(f'{num} samples, {generator.nfe} network calls each -> {workdir / "eval.jsonl"}')
  return 0


def _held_out(config: Config, extract: Callable, num: int) -> np.ndarray | None:
  """Features of as many held-out images as there are samples, if there are so many; None without a held-out split."""
  if not config.eval.held_out:
    return None
  try:
    return reference(config, config.eval.held_out, extract)[0][:num]
  except (ValueError, OSError) as e:
    warnings.warn(f'no floor is measured: {e}', stacklevel=2)
    return None


if __name__ == '__main__':
  sys.exit(command.run(main))
