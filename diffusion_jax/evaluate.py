"""COMMAND: samples from a checkpoint, scores them against real images, and writes how each number was made.

One evaluation is one set of samples (checkpoint, average, sampling settings, seed) as one network sees them, against
one reference. Samples and features are kept under WORKDIR/eval/<settings>, so that an interrupted evaluation continues
where it stopped; what WORKDIR/eval.jsonl holds already is printed, not made again. Of several processes each makes a
part of the files, on its own devices, and process 0 scores them all.
"""
import argparse
import hashlib
import itertools
import json
import math
import pathlib
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diffusion_jax import audit, capacity, efficiency, encode
from diffusion_jax.data import sources
from diffusion_jax.drawn import Asked, Samples
from diffusion_jax.generator import Generator
from diffusion_jax.metrics import features, intervals, scores
from diffusion_jax.model import open_data
from diffusion_jax.runtime import command, distributed, log, paths
from diffusion_jax.runtime.checkpoint import Checkpoints
from diffusion_jax.runtime.config import Config, UserError, explain, from_json, nearest
from diffusion_jax.runtime.state import digest
from diffusion_jax.sample import CACHE, GUIDANCE, add_flags, describe, open_run, parse_numbers
from diffusion_jax.score import FEATURES, Against, given, kinds_of, score, show
from diffusion_jax.trained import reduced

LOWER_IS_BETTER = ('f', 'sf', 'kid')  # how the names begin whose minimum over seeds is worth a line


class Evaluator:
  """Evaluates checkpoints of one run as the flags say, compiling each sampler once."""

  def __init__(self, flags: argparse.Namespace, config: Config):
    self.flags, self.config, self.workdir = flags, config, paths.folder(flags.workdir)
    self.num = flags.num or config.eval.num_samples
    if self.num < 2:
      raise UserError(f'a distance needs at least 2 samples, got --num={self.num}')
    self.emas = flags.ema.split(',') if flags.ema else [next(iter(config.ema)), 'raw']
    known = [*config.ema, 'raw']
    for ema in self.emas:
      if ema not in known and not ema.endswith('.safetensors'):
        raise UserError(f'there is no average {ema!r} in this run{nearest(ema, known)}')
    self.seeds = parse_numbers('--seeds', flags.seeds) if flags.seeds else [flags.seed]
    self.sweep = list(itertools.product(_numbers('--sweep_steps', flags.sweep_steps, int),
                                        _numbers('--sweep_guidance', flags.sweep_guidance, float)))
    self.against = self.asked = None  # what needs the data and the networks is made at the first evaluation
    self.generators, self.costs = {}, {}
    self.records = self.workdir / 'eval.jsonl'

  def step(self, step: int | None) -> None:
    """Every evaluation of a checkpoint, the newest if `step` is None."""
    for ema in self.emas:
      trained, sampling = open_run(argparse.Namespace(**{**vars(self.flags), 'ema': ema, 'step': step}), apart=True,
                                   wanted=self.num)
      params_hash = digest(trained.params)  # as trained, whatever they are sampled in
      trained = reduced(trained, sampling.precision)
      if self.against is None:
        self._generators(trained, sampling)
        self._ask(trained.model)
        self.against = [self._against(text) for text in (self.flags.features or self.config.eval.features).split(',')]
      for point in self.sweep:
        rows = [self._point(trained, sampling, params_hash, point, seed) for seed in self.seeds]
        if len(rows) > 1 and distributed.is_writer():
          for over_seeds in zip(*rows, strict=True):
            self._summary(over_seeds)

  def _generators(self, trained, sampling):
    """A generator for each point: settings that do not fit are known before anything is computed."""
    for point in self.sweep:
      settings = self._settings(sampling, point)
      generator = capacity.fitted(Generator(trained.model, settings, 0, trained.mesh), trained.params,
                                  -(-self.num // distributed.count()))
      self.generators[point] = generator, Config({**settings, 'batch_size': generator.batch_size})

  def _ask(self, model):
    """What samples are asked for: of a model that is given something, the rest of the held-out images."""
    self.asked, self.given = Asked(model), {}
    if model.given:
      data, settings = self.config.data, self.config.eval
      with explain('config.data'):
        try:
          source = open_data(data, settings.held_out or settings.split)
        except (ValueError, OSError) as e:
          warnings.warn(f'there are no held-out images to be given, those of {settings.split} are: {e}', stacklevel=2)
          source = open_data(data, settings.split)
        images_hash, _ = encode.identify(source, data.max_bad)
      how = self.config.given
      self.given = {'given': f'{how.fn.partition(":")[2]} of {source.name}/{source.split}',
                    'given_hash': _hash([how.to_dict(), images_hash])}
      self.asked = Asked(model, source)

  @staticmethod
  def _settings(sampling, point):
    chosen = {key: value for key, value in zip(('steps', 'guidance'), point, strict=True) if value is not None}
    return Config({**sampling, **chosen})

  def _against(self, text):
    """Everything that samples are scored by in the features of one network."""
    data, split, held = self.config.data, self.config.eval.split, self.config.eval.held_out
    with explain('--features' if self.flags.features else 'config.eval.features'):
      extractor = features.make(text)
    kinds = kinds_of(self.flags.metrics, extractor)
    if not distributed.is_writer():
      return Against(extractor, None, None, kinds, bool(self.flags.metrics))
    with explain('config.data'):
      if self.flags.reference:
        ref = given(self.flags.reference, extractor)
      else:
        ref = encode.encode(open_data(data, split), extractor, data.max_bad)
      held_out = None
      if held and ref.about['features_hash']:  # of published moments nobody says which weights saw them
        try:
          held_out = encode.encode(open_data(data, held), extractor, data.max_bad).features[:self.num]
        except (ValueError, OSError) as e:
          warnings.warn(f'no floor is measured: {e}', stacklevel=2)
    return Against(extractor, ref, held_out, kinds, bool(self.flags.metrics))

  def _point(self, trained, sampling, params_hash, point, seed):
    """One set of samples, by every network: the quality records of each, as they stand in eval.jsonl."""
    generator, settings = self.generators[point]
    generator = generator.reseeded(seed)
    about = {
        'step': trained.step, 'images': trained.images, 'ema': trained.ema, 'params_hash': params_hash,
        **describe(settings), 'steps': settings.steps, **{key: settings[key] for key in GUIDANCE},
        'clip': settings.clip, 'seed': seed, 'batch_size': settings.batch_size, **self.given,
        **({'precision': settings.precision} if settings.precision else {}),
        **({key: settings[key] for key in CACHE} if settings.cache_every > 1 else {})}
    folder = self.workdir / 'eval' / _hash(about)
    samples = Samples(generator, trained, self.num, folder, self.asked)
    return [self._evaluation(samples, point, {'run': self.workdir.resolve().name, **about}, against)
            for against in self.against]

  def _evaluation(self, samples, point, about, against):
    began = time.perf_counter()
    flags, ref, extractor = self.flags, against.ref, against.extractor
    if not distributed.is_writer():  # it only helps to make what the writer scores
      if not distributed.agree(None):
        samples.features(extractor)
      return []
    common = {**about, 'num_samples': self.num, 'features': extractor.name, 'features_hash': extractor.digest,
              **{key: ref.about[key] for key in ('reference', 'reference_hash', 'reference_samples')},
              'quantisation': 'round'}
    identity = {key: value for key, value in common.items() if key not in ('run', 'reference')}
    evaluation = _hash({**identity, 'kinds': against.kinds, 'price': flags.price_per_hour, 'audit': flags.audit})
    found = [record for record in log.read_lines(self.records) if record.get('evaluation') == evaluation]
    found = list({record['metric']: record for record in found}.values())
    if distributed.agree(bool(found) and len(found) >= found[0]['lines']):
      print(f"{_title(found[0])}: found in {self.records}")
      show(found)
      return found
    with explain('features'):
      seen = samples.features(extractor)
    classes = samples.trained.model.num_classes
    with explain('metrics'):
      labels = self.asked.labels(range(self.num)) if _classes(seen) == classes else None
      lines = score(seen, against, labels)
    if self.given:
      size = samples.generator.batch_size
      psnr = scores.psnr((images, self.asked.images(range(i * size, i * size + len(images))))
                         for i, (_, images) in enumerate(samples.batches()))
      lines.append({'metric': psnr.metric, 'value': psnr.value, 'ci': psnr.ci, 'unit': ''})
    if flags.audit:
      lines += self._audit(samples, seen, against)
    lines += efficiency.throughput(samples.generator, samples.seconds, samples.made, flags.price_per_hour)
    if point not in self.costs:
      settings = self.generators[point][1]
      self.costs[point] = efficiency.fixed(samples.generator, samples.trained, settings, about['seed'], self.asked)
    lines += self.costs[point]
    common |= {'evaluation': evaluation, 'nfe': samples.generator.nfe, 'lines': len(lines),
               'seconds': time.perf_counter() - began, 'time': log.now(), **log.provenance()}
    if distributed.count() > 1:
      common['device'] = f'{jax.devices()[0].device_kind} x{samples.generator.mesh.size}'  # one process made a batch
    records = [{**common, 'ci_level': 0.95 if line['ci'] else None, **line} for line in lines]
    log.append(self.records, *records)
    print(_title(records[0]))
    show(records)
    return records

  def _audit(self, samples, seen, against):
    """Records on whether samples are copies of training images, and their picture."""
    data, held = self.config.data, self.config.eval.held_out
    if not held:
      raise UserError("--audit compares with held-out images: set config.eval.held_out when training")
    with explain('--audit'):
      real = [sources.arrays(open_data(data, split), data.max_bad)[0] for split in (data.split, held)]
      name = against.extractor.name
      spaces = [{name: against.extractor.extract(images)['features']} for images in real]
      return audit.run(samples.folder, samples.images(), {name: seen['features']},
                       *zip(real, spaces, strict=True))

  def _summary(self, over_seeds):
    """Mean -+ standard errors and minimum over the seeds, as records of their own."""
    first = over_seeds[0][0]
    evaluation = _hash({'evaluations': sorted(records[0]['evaluation'] for records in over_seeds)})
    if any(record.get('evaluation') == evaluation for record in log.read_lines(self.records)):
      return
    lines = []
    for record in over_seeds[0]:
      if record.get('unit') or record['metric'].endswith('_floor'):
        continue  # a cost, or no property of the samples
      values = [next(r['value'] for r in records if r['metric'] == record['metric']) for records in over_seeds]
      lines += over(record['metric'], values)
    every = [record for records in over_seeds for record in records]
    common = {key: value for key, value in first.items() if all(key in r and r[key] == value for r in every)}
    common |= {'seed': None, 'seeds': self.seeds, 'evaluation': evaluation, 'lines': len(lines), 'time': log.now()}
    records = [{**common, **line} for line in lines]
    log.append(self.records, *records)
    print(f'{len(self.seeds)} seeds')
    show(records)


def over(metric: str, values: Sequence[float]) -> list[dict[str, Any]]:
  """The lines of a metric's values over seeds: mean -+ t standard errors, and for distances the minimum."""
  mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
  spread = intervals.student(len(values) - 1) * error
  lines = [{'metric': f'{metric}_mean', 'value': mean, 'ci': (mean - spread, mean + spread), 'ci_level': 0.95,
            'unit': '', 'standard_error': error}]
  if metric.startswith(LOWER_IS_BETTER):
    lines.append({'metric': f'{metric}_min', 'value': min(values), 'ci': None, 'ci_level': None, 'unit': ''})
  return lines


def watch(flags: argparse.Namespace, path: pathlib.Path) -> int:
  """Evaluates every checkpoint of a run that is there or still comes, until the run is done."""
  if flags.step is not None:
    raise UserError('--watch evaluates every checkpoint: give it without --step')
  while not distributed.agree(path.exists()):
    print(f'waiting for {path}')
    time.sleep(flags.poll_seconds)
  evaluator, seen = Evaluator(flags, from_json(path)), set()
  while True:
    # Asked first, so that no last checkpoint is missed.
    done, begun = distributed.agree([(path.parent / 'done.json').exists(), (path.parent / 'checkpoints').is_dir()])
    if begun:
      checkpoints = Checkpoints(path.parent)
      steps = distributed.agree([step for step in checkpoints.steps() if step not in seen])
      checkpoints.close()
      for step in steps:
        try:
          evaluator.step(step)
        except UserError as e:
          if (path.parent / 'checkpoints' / str(step)).exists():
            raise
          print(f'step {step} is gone, newer ones have replaced it ({e})')
        seen.add(step)
    if done:
      distributed.wait()
      return 0
    time.sleep(flags.poll_seconds)


def main(argv: Sequence[str] | None = None) -> int:
  """`diffusion-jax evaluate`: see --help."""
  p = command.parser('evaluate', 'Scores a trained model: one self-describing line per value in WORKDIR/eval.jsonl.')
  add_flags(p)
  p.add_argument('--features', help=FEATURES)
  p.add_argument('--metrics', help=f"which of {', '.join(scores.KINDS)} (default: by the features)")
  p.add_argument('--reference', help='FILE of encode, or .npz with mu and sigma (default: made of the run\'s data)')
  p.add_argument('--seeds', help='several seeds, such as 0-2: also their mean with standard error, and minimum')
  p.add_argument('--sweep_steps', help='an evaluation for each number of levels, such as 5,10,20,50')
  p.add_argument('--sweep_guidance', help='and for each guidance scale, such as 1,1.5,2')
  p.add_argument('--price_per_hour', type=float, default=0.0, help='of one device, in $: adds the cost of 1,000 images')
  p.add_argument('--audit', action='store_true', help='are samples copies of training images? With a picture')
  p.add_argument('--watch', action='store_true', help='every checkpoint of a run, those to come too')
  p.add_argument('--poll_seconds', type=float, default=30.0, help='how often --watch looks (default 30)')
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError(f'evaluate takes its config from the run folder: --config.{next(iter(overrides))} is for train')
  if not flags.price_per_hour >= 0:
    raise UserError(f'--price_per_hour must be at least 0, got {flags.price_per_hour}')
  path = paths.folder(flags.workdir) / 'config.json'
  command.join(flags)
  if flags.watch:
    return watch(flags, path)
  evaluator = Evaluator(flags, from_json(path))
  evaluator.step(flags.step)
  distributed.wait()  # processes part together
  if distributed.is_writer():
    print(f'-> {evaluator.records}')
  return 0


def _numbers(flag, text, kind):
  """'1,2.5' as numbers; [None] if there is no text."""
  if not text:
    return [None]
  try:
    return [kind(word) for word in text.split(',')]
  except ValueError:
    raise UserError(f'{flag} must be numbers like 5,10,20, got {text!r}') from None


def _classes(seen):
  return seen['logits'].shape[1] if 'logits' in seen else 0


def _hash(value):
  return hashlib.sha256(json.dumps(log.plain(value), sort_keys=True).encode()).hexdigest()[:12]


def _title(record):
  guidance = '' if record['guidance'] == 1 else f', guidance {record["guidance"]:g}'
  precision = f', {record["precision"]}' if record.get('precision') else ''
  return (f'{record["ema"]} at step {record["step"]}, {record["sampler"]}, {record["nfe"]} network calls{guidance}'
          f'{precision}, seed {record["seed"]}, {record["num_samples"]:,} samples')


if __name__ == '__main__':
  sys.exit(command.run(main))
