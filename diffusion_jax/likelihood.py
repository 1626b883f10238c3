"""COMMAND: bits per dimension of a data split under a trained model, by up to three estimators (core/likelihood.py).

What is estimated for an example depends on (seed, index of the example) alone, whatever the batches and the devices
are; --num takes examples that are drawn evenly from the split, the same ones for every seed and estimator. Batches are
kept under WORKDIR/likelihood/<evaluation>, so that a job that was interrupted continues where it stopped; beside that
folder lie the values of every example and level (.npz) and the curves that a report draws (.json).

A value is the mean over the examples -+ Z standard errors. The interval covers what the mean would come to over all
the data that the split was drawn from and over the estimator's own noise, which each example has for itself. It says
nothing of the solver's error, nor of a model that was trained again.
"""
import hashlib
import json
import math
import pathlib
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from diffusion_jax import model as model_lib
from diffusion_jax import trained as trained_lib
from diffusion_jax.core import guidance, levels, likelihood
from diffusion_jax.data import sources
from diffusion_jax.metrics import intervals, scores
from diffusion_jax.model import Model
from diffusion_jax.nets import codecs
from diffusion_jax.runtime import backend, command, log, sharding
from diffusion_jax.runtime.config import Config, UserError, explain, flatten, nearest
from diffusion_jax.sample import npz
from diffusion_jax.trained import Trained

# The ODE's density is that of the samples only so far as its solver and its last level are fine enough.
ESTIMATORS = {'discrete_vlb': 'upper bound', 'continuous_vlb': 'upper bound', 'ode': 'estimate'}
ODE_STEPS, TIMES = 100, 100  # unless the user says
BATCH = 64  # where config.sample.batch_size leaves it to the sampler's memory
SUMS = ('count', 'sum', 'squares', 'mse')  # for each level, over the examples


class Data(NamedTuple):
  """The examples of a split that are used."""
  index: np.ndarray   # [n] their places in the split, rising
  images: np.ndarray  # [n, *S, C] uint8
  labels: np.ndarray  # [n]
  size: int           # of the whole split
  digest: str         # SHA-256 of the whole split


class Job(NamedTuple):
  """One estimator with all that its value depends on."""
  estimator: str
  metric: str
  settings: dict[str, Any]  # the estimator's own
  common: dict[str, Any]    # those of all estimators
  evaluation: str           # identifies the two
  grid: Any                 # levels that are visited; () where times are drawn


def load(config: Config, split: str, num: int | None, model: Model) -> Data:
  """All examples of a split of the run's data, or `num` of them; UserError if they do not fit the model."""
  with explain('data'):
    source = model_lib.open_data(config.data, split)
    images, labels = sources.arrays(source, config.data.max_bad)
  if images.shape[1:] != model.shape:
    raise UserError(f'the {split} split has images of shape {images.shape[1:]}, and the model was trained on '
                    f'{model.shape}: give a split of such images')
  if model.num_classes and not (source.num_classes and labels.max() < model.num_classes):
    raise UserError(f'the model knows {model.num_classes} classes, and the {split} split has {source.num_classes}: '
                    'give a split with the same classes')
  size = len(images)
  if size < (num or 2):
    raise UserError(f'the {split} split has {size} examples, and {num or 2} are needed: take fewer or another split')
  index = np.sort(sources.permutation([0], size)[:num])  # a split may be sorted by class: its first are no sample of it
  return Data(index, images[index], labels[index], size, sources.digest(images, labels))


def variance_of(model: Model) -> float | str:
  """The variance of the reverse chain: what the run's sampler uses, if it has one, or what the net has learned."""
  sampler, weight = model.config.sample.sampler, model.config.weight
  if sampler.fn.endswith(':ancestral'):
    return sampler.variance
  kinds = [v for k, v in flatten(weight).items() if k.rpartition('.')[2] == 'variance']  # the weight may be wrapped
  return (kinds or ['range'])[0] if model.weight.bound else 0.0


def settings_of(name: str, model: Model, flags: Any) -> dict[str, Any]:
  """The settings of an estimator, for its record; nfe counts the calls of the network for one example.

  Estimates of x0 are clipped if sampling clips them: the ODE's slope stays Lipschitz, so that its density exists.
  """
  clip = model.config.sample.clip
  if name == 'discrete_vlb':
    steps = model.diffusion.process.num_steps if flags.steps is None else flags.steps
    return {'grid': 'timesteps', 'steps': steps, 'subset': flags.subset, 'variance': variance_of(model),
            'clip': clip, 'nfe': flags.subset or steps}
  if name == 'continuous_vlb':
    return {'times': flags.times, 'decoder': 'bins', 'clip': clip, 'nfe': flags.times}
  steps = ODE_STEPS if flags.steps is None else flags.steps
  return {'grid': 'uniform_logsnr', 'steps': steps, 'method': 'heun', 'dequantiser': 'uniform', 'clip': clip,
          'trace': 'hutchinson' if flags.probes else 'exact', 'probes': flags.probes, 'probe': 'rademacher',
          'nfe': 2 * (steps - 1)}


def estimator(job: Job, model: Model) -> Callable[..., dict[str, jax.Array]]:
  """run(params, grid, root key, images, labels, ids) -> {'bits': [B], ...}: all that it finds, examples last."""
  s, process = job.settings, model.diffusion.process

  def run(params, grid, root, images, labels, ids):
    keys, x0 = jax.vmap(lambda i: jax.random.fold_in(root, i))(ids), codecs.floats(images)

    def denoiser(labels):
      denoise = model.denoiser(params, model.cond(params, model.about(labels)))
      return guidance.clip(denoise) if s['clip'] else denoise

    if job.estimator == 'discrete_vlb':
      vlb = likelihood.discrete_vlb(denoiser(labels), grid, x0, keys, s['variance'], s['subset'])
      return {**vlb._asdict(), 'decoder': vlb.steps[-1]}
    if job.estimator == 'continuous_vlb':  # its times are shared by a batch: here each example is one
      one = lambda x0, label, key: likelihood.continuous_vlb(denoiser(label[None]), process, x0[None], key,
                                                             params['process'], s['times'], s['decoder'])
      return {k: v[:, 0] for k, v in jax.vmap(one)(x0, labels, keys)._asdict().items()}
    return {'bits': likelihood.ode_bits(denoiser(labels), grid, x0, keys, method=s['method'], trace=s['trace'],
                                        probes=s['probes'] or 1, probe=s['probe'])}

  return run


def prepare(jobs: Sequence[Job], trained: Trained, batch_size: int) -> list[Callable[..., dict[str, np.ndarray]]]:
  """For each job compute(images, labels, ids) of at most batch_size examples. All are checked before one is begun."""
  model, mesh = trained.model, trained.mesh
  with explain('likelihood'):
    sharding.check_divides(mesh, batch_size, 'batch_size')

  def bind(job):
    program = jax.jit(estimator(job, model))
    key = model_lib.key(job.common['seed'], 'likelihood')
    shared = jax.device_put((job.grid, key), sharding.replicated(mesh))

    def arguments(images, labels, ids):
      fill = lambda a, dtype: np.resize(a, (batch_size, *a.shape[1:])).astype(dtype)  # the last batch repeats its own
      batch = fill(images, np.uint8), fill(model.labels(labels.astype(int)), np.int32), fill(ids, np.uint32)
      return trained.params, *shared, *(sharding.put_batch(a, mesh) for a in batch)

    def compute(images, labels, ids):
      return {k: v[..., :len(ids)] for k, v in jax.device_get(program(*arguments(images, labels, ids))).items()}

    with explain(job.estimator):
      jax.eval_shape(program, *arguments(np.zeros((1, *model.shape)), np.zeros(1), np.zeros(1)))
    return compute

  return [bind(job) for job in jobs]


def level_sums(found: Mapping[str, np.ndarray], num_levels: int) -> dict[str, np.ndarray]:
  """Sums over examples [num_levels] for each level of the grid, from the terms [N, n] of the levels that were drawn."""
  index = found['index'].ravel()
  total = lambda a: np.bincount(index, np.asarray(a, np.float64).ravel(), num_levels)
  return {'count': np.bincount(index, minlength=num_levels), 'sum': total(found['steps']),
          'squares': total(np.float64(found['steps']) ** 2), 'mse': total(found['mse'])}


def measure(job: Job, compute: Callable, data: Data, batch_size: int, folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Per-example values [n] and, of a chain, sums over the examples for each level, from batches made now or found."""
  batches = []
  for start in tqdm(range(0, len(data.index), batch_size), desc=job.metric, disable=not sys.stderr.isatty()):
    part = slice(start, start + batch_size)
    ids = data.index[part]
    path = folder / f'{start:06d}-{start + len(ids) - 1:06d}.npz'
    try:
      with np.load(path, allow_pickle=False) as file:
        batch = dict(file)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):  # absent, or not what was written
      batch = _kept(job, compute(data.images[part], data.labels[part], ids), ids)
      log.write(path, npz(**batch))
    batches.append(batch)
  return {key: (np.sum if key in SUMS else np.concatenate)([b[key] for b in batches], axis=0) for key in batches[0]}


def _kept(job: Job, found: Mapping[str, np.ndarray], ids: np.ndarray) -> dict[str, np.ndarray]:
  """What is kept of a batch: of a chain's terms only their sums. UserError if an example's value is not finite."""
  bad = ids[~np.isfinite(found['bits'])]
  if len(bad):
    raise UserError(f'{job.estimator} is not finite for {len(bad)} of {len(ids)} examples, first {bad[0]}: look at '
                    'samples of this checkpoint, or take another')
  sums = level_sums(found, job.settings['steps']) if 'steps' in found else {}
  return {k: v for k, v in found.items() if v.ndim == 1} | sums


def terms_of(job: Job, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Of a chain, arrays [N] noise first: logsnr, mean bits/dim of each term with its standard error, how many examples
  each mean is over, mse, and if no level lacks examples the rate and RMSE of progressive coding."""
  count, total = found['count'], found['sum']
  with np.errstate(divide='ignore', invalid='ignore'):
    mean, mse = total / count, found['mse'] / count
    spread = np.maximum(found['squares'] - total * mean, 0) / (count - 1)
    error = np.where(count > 1, np.sqrt(spread / count), np.nan)
  terms = {'index': np.arange(len(count)), 'logsnr': np.asarray(job.grid.logsnr, np.float64), 'level_bits': mean,
           'level_bits_error': error, 'level_count': count, 'level_mse': mse}
  if not count.all():
    return terms
  prior = jnp.mean(found['prior'], keepdims=True)
  vlb = likelihood.DiscreteVlb(prior, prior, jnp.asarray(mean)[:, None], jnp.asarray(mse)[:, None], ())
  return terms | dict(zip(('rate', 'rmse'), map(np.asarray, likelihood.rate_distortion(vlb)), strict=True))


def record_of(job: Job, found: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The value with its interval, and the means of its parts."""
  bits = np.asarray(found['bits'], np.float64)
  value, spread = float(bits.mean()), intervals.Z * float(bits.std(ddof=1)) / math.sqrt(len(bits))
  parts = {k: float(v.mean(dtype=np.float64)) for k, v in found.items() if k not in ('bits', *SUMS)}
  return {'metric': job.metric, 'value': value, 'ci': [value - spread, value + spread], 'ci_level': 0.95,
          'unit': 'bits/dim', 'bound': ESTIMATORS[job.estimator], 'parts': parts}


def main(argv: Sequence[str] | None = None) -> int:
  """`diffusion-jax likelihood`: see --help."""
  p = command.parser('likelihood', 'Bits/dim of a data split, to WORKDIR/eval.jsonl in self-describing lines.')
  p.add_argument('--workdir', required=True, help='the run folder that train wrote')
  p.add_argument('--split', default='test', help="which split of the run's data (default: test)")
  p.add_argument('--estimator', help=f"one or more of {','.join(ESTIMATORS)} (default: all that apply)")
  p.add_argument('--num', type=int, help='how many examples, evenly drawn (default: all)')
  p.add_argument('--seed', type=int, default=0, help='the seed of all noise (default 0)')
  p.add_argument('--ema', default='', help="which average of the parameters (default: the config's first), 'raw' for "
                                           "none, or the file of one that posthoc_ema made")
  p.add_argument('--step', type=int, help='which checkpoint (default: the newest)')
  p.add_argument('--batch_size', type=int, help='examples compiled together (default: '
                                                     f'config.sample.batch_size, or {BATCH} if that is 0)')
  p.add_argument('--steps', type=int, help=f"levels: of the ODE's grid (default {ODE_STEPS}) and of the chain (all)")
  p.add_argument('--subset', type=int, default=0, help='discrete_vlb: random levels for each example; 0: all')
  p.add_argument('--times', type=int, default=TIMES, help=f'continuous_vlb: random times of each (default {TIMES})')
  p.add_argument('--probes', type=int, default=1, help='ode: random directions for the trace (default 1); 0: the exact '
                                                       f'trace, of at most {likelihood.EXACT_TRACE} elements')
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError(f'likelihood takes its config from the run folder: --config.{next(iter(overrides))} is for train')
  names = list(dict.fromkeys((flags.estimator or ','.join(ESTIMATORS)).split(',')))
  _check(flags, names)

  def choose_devices(config):
    size = config.sample.batch_size if flags.batch_size is None else flags.batch_size
    config.sample.batch_size = size or BATCH
    model_lib.check(config)
    backend.prepare(config.sample.batch_size)

  workdir = pathlib.Path(flags.workdir)
  trained = trained_lib.restore(workdir, flags.ema, flags.step, choose_devices)
  model, config = trained.model, trained.model.config
  if model.shape != model.image_shape:
    raise UserError('bits per dimension are of pixels, and this model sees latents: config.codec must be pixels')
  if model.given:
    raise UserError('bits per dimension are of whole images, and this model draws the rest of what it is given of one')
  names = _applicable(names, model, named=bool(flags.estimator))
  data = load(config, flags.split, flags.num, model)
  jobs = [_job(name, flags, trained, data) for name in names]
  known = [_found(job, workdir) for job in jobs]
  for record in filter(None, known):
    _show(record, 'found')
  jobs = [job for job, record in zip(jobs, known, strict=True) if not record]
  for job, compute in zip(jobs, prepare(jobs, trained, config.sample.batch_size), strict=True):
    began, folder = time.perf_counter(), workdir / 'likelihood' / job.evaluation
    found = measure(job, compute, data, config.sample.batch_size, folder)
    record = {**record_of(job, found), **job.common, **job.settings, 'evaluation': job.evaluation}
    terms = terms_of(job, found) if 'count' in found else {}
    examples = {k: v for k, v in found.items() if k not in SUMS}
    log.write(folder.with_suffix('.npz'), npz(example=data.index, label=data.labels, **examples, **terms))
    log.write_json(folder.with_suffix('.json'), {**record, **terms})
    log.append(workdir / 'eval.jsonl', {**record, 'time': log.now(), 'seconds': time.perf_counter() - began,
                                        **log.provenance()})
    _show(record, f'{time.perf_counter() - began:.1f} s')
  print(f'{len(data.index)} examples of {config.data.source}/{flags.split} -> {workdir / "eval.jsonl"}')
  return 0


def _check(flags: Any, names: Sequence[str]) -> None:
  """UserError for a flag that is wrong whatever the model is."""
  for name in names:
    if name not in ESTIMATORS:
      raise UserError(f'there is no estimator {name!r}{nearest(name, ESTIMATORS)}')
  for flag, low in (('num', 2), ('seed', 0), ('subset', 0), ('times', 1), ('probes', 0)):
    value = getattr(flags, flag)
    if value is not None and value < low:
      raise UserError(f'--{flag} must be at least {low}, got {value}')


def _applicable(names: list[str], model: Model, named: bool) -> list[str]:
  """The estimators that this model has; UserError or a printed line for others, as the user named them or not."""
  if model.diffusion.process.num_steps or 'discrete_vlb' not in names:
    return names
  why = (f"discrete_vlb needs the steps of a chain, and the process {model.config.process.fn.partition(':')[2]} is in "
         'continuous time: continuous_vlb is its bound')
  if named:
    raise UserError(why)
  print(f'left out: {why}')
  return [name for name in names if name != 'discrete_vlb']


def _job(name: str, flags: Any, trained: Trained, data: Data) -> Job:
  model, config = trained.model, trained.model.config
  settings = settings_of(name, model, flags)
  grid = ()
  if 'grid' in settings:
    with explain(name):
      grid = getattr(levels, settings['grid'])()(model.diffusion.process, settings['steps'], trained.params['process'])
  num = len(data.index)
  carried = '' if flags.num is None else scores.carried(num)
  common = {'estimator': name, 'run': pathlib.Path(flags.workdir).resolve().name, 'step': trained.step,
            'images': trained.images, 'ema': trained.ema, 'seed': flags.seed, 'batch_size': config.sample.batch_size,
            'num_samples': num, 'split': flags.split, 'conditional': bool(model.num_classes),
            'reference': f'{config.data.source}/{flags.split}', 'reference_hash': data.digest,
            'reference_samples': data.size}
  metric = f'bits_per_dim_{name}{carried}'
  described = json.dumps([metric, log.plain(settings), common, config.to_dict()], sort_keys=True)
  return Job(name, metric, settings, common, hashlib.sha256(described.encode()).hexdigest()[:12], grid)


def _found(job: Job, workdir: pathlib.Path) -> dict[str, Any] | None:
  """The record of this job if it was finished before."""
  files = [workdir / 'likelihood' / f'{job.evaluation}.{suffix}' for suffix in ('npz', 'json')]
  same = [r for r in log.read_lines(workdir / 'eval.jsonl')
          if (r.get('evaluation'), r.get('metric')) == (job.evaluation, job.metric)]
  return same[-1] if same and all(file.exists() for file in files) else None


def _show(record: Mapping[str, Any], note: str) -> None:
  low, high = record['ci']
  print(f"{record['metric']:>28}: {record['value']:.4f} [{low:.4f}, {high:.4f}] bits/dim, {record['bound']} ({note})")


if __name__ == '__main__':
  sys.exit(command.run(main))
