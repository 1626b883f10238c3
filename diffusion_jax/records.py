"""The records in run folders: reading them, and which of their values may stand side by side.

With the standard library alone, so that `report` and `compare` work where no jax is installed. A record can hold
anything: a missing, half-written or foreign one is passed over, never trusted.

Two values may share a column only where their records agree in the terms of their metric (see `terms`). A key that
neither record has is agreed upon; a key that only one of them has is a difference, since nothing says that they agree.
"""
import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion_jax import seeds
from diffusion_jax.svg import number, setting

# What samples were made by, and how many: records that agree in all of these share a row, whatever they were scored by.
SETTINGS = ('step', 'ema', 'params_hash', 'sampler', 'estimator', 'grid', 'steps', 'nfe', 'guidance', 'guidance_low',
            'guidance_high', 'guidance_rescale', 'threshold', 'clip', 'precision', 'cache_every', 'cache_depth', 'seed',
            'seeds', 'num_samples', 'split')
# What must agree for two values to be comparable.
QUALITY = ('features', 'features_hash', 'reference_hash', 'reference_samples', 'num_samples', 'quantisation',
           'given_hash')
COST = ('device', 'batch_size')
MEMORISATION = ('reference_hash', 'num_samples', 'training_images', 'held_out_images')
LIKELIHOOD = ('reference_hash', 'split', 'num_samples', 'conditional', 'estimator', 'grid', 'steps', 'subset', 'clip',
              'times', 'decoder', 'method', 'trace', 'probes', 'probe', 'dequantiser')
# The known metrics in the order of their columns, with a word on each. One stands for those that continue its name:
# 'fd' for fd_mine. The first that an evaluation has is its headline.
LOWER, HIGHER = 'lower is better', 'higher is better'
METRICS = {
  'fid': LOWER, 'fd_dinov2': LOWER, 'fd_cifar': LOWER, 'fd_digits': LOWER, 'fd': LOWER, 'fid_infinity': LOWER,
  'sfid': LOWER, 'sfd': LOWER, 'kid': LOWER, 'cmmd': LOWER, 'inception_score': HIGHER, 'is': HIGHER, 'accuracy': HIGHER,
  'psnr': HIGHER, 'precision': HIGHER, 'recall': HIGHER, 'density': HIGHER, 'coverage': HIGHER, 'bits_per_dim': LOWER,
  'memorised': 'near copies', 'closer_to_train': 'half if nothing is memorised', 'memorisation': '', 'audit': '',
  'samples_per_second': '', 'latency_seconds': '', 'cost_per_1000_images': '', 'flops_per_image': '',
  'compile_seconds': '', 'peak_memory_bytes': '',
}
NAME = re.compile(r'(?P<base>.+?)(?:_(?P<n>\d+[kM]?))?(?P<floor>_floor)?(?:_(?P<over>mean|min))?', re.DOTALL)


# Reading

class Unusable(Exception):
  """What the user gave cannot be used; the message is a sentence for them."""


class Run(NamedTuple):
  """The records of one run folder; those that do not exist yet are empty."""
  folder: Path
  label: str
  colour: int
  config: dict
  made: dict      # run.json
  schedule: dict
  metrics: list   # one dict a logged step, by step
  evals: list     # one dict a measured value, oldest first
  done: dict
  point: dict      # point.json, of a sweep
  index: int = 0   # its place among the runs that were given
  group: str = ''  # the name that it shares with the same run of other seeds

  @property
  def seed(self) -> int | None:
    """The seed that it was trained with, None where no record says it."""
    return next((seed for seed in (self.point.get('seed'), self.config.get('seed'))
                 if isinstance(seed, int) and not isinstance(seed, bool)), None)


def read_json(path: Path) -> dict:
  """The object in a JSON file, {} where there is none yet: a page can be made at any moment of a run."""
  try:
    value = json.loads(path.read_text('utf-8', 'replace'))
  except (OSError, ValueError, RecursionError):
    return {}
  return value if isinstance(value, dict) else {}


def read_lines(path: Path) -> list[dict]:
  """The objects in a .jsonl file, without the lines that a killed process left half written."""
  records = []
  for line in path.read_text('utf-8', 'replace').split('\n') if path.is_file() else ():
    try:
      records.append(json.loads(line))
    except (ValueError, RecursionError):
      continue
  return [record for record in records if isinstance(record, dict)]


def read_run(folder: Path, label: str, colour: int = 0) -> Run:
  """All records of a run folder. Raises Unusable where there is no run."""
  path = folder / 'config.json'
  if not path.is_file():
    reason = 'has no config.json, so it is not the folder of a run' if folder.is_dir() else 'is not a folder'
    raise Unusable(f'{folder} {reason}.')
  try:
    config = json.loads(path.read_text('utf-8'))
  except (ValueError, RecursionError) as e:
    raise Unusable(f'{path} is not JSON: {e}.') from e
  if not isinstance(config, dict):
    raise Unusable(f'{path} is not a JSON object.')
  # A resumed run logs some steps again: the last line of a step wins.
  steps = {line['step']: line for line in read_lines(folder / 'metrics.jsonl') if number(line.get('step')) is not None}
  return Run(
    folder, label, colour, config, read_json(folder / 'run.json'), read_json(folder / 'schedule.json'),
    [steps[step] for step in sorted(steps)], read_lines(folder / 'eval.jsonl'), read_json(folder / 'done.json'),
    read_json(folder / 'point.json'))


def read_runs(folders: Sequence[Path]) -> list[Run]:
  """The runs, labelled by their points in a sweep or the names of their folders where those differ, else by paths."""
  runs = [read_run(folder, folder.resolve().name) for folder in folders]
  points = [f'{seeds.point(run)}-s{run.seed}' * bool(seeds.point(run)) or run.label for run in runs]
  options = points, [run.label for run in runs], list(map(str, folders))
  labels = next((labels for labels in options if len(set(labels)) == len(labels)), options[-1])
  runs = [run._replace(label=label, index=i) for i, (run, label) in enumerate(zip(runs, labels, strict=True))]
  names = seeds.groups(runs)
  colours = {name: i for i, name in enumerate(dict.fromkeys(names))}
  return [run._replace(group=name, colour=colours[name]) for run, name in zip(runs, names, strict=True)]


def groups_of(runs: Iterable[Run]) -> dict[str, list[Run]]:
  """The runs by their groups' names, in the order in which they were given."""
  groups = {}
  for run in runs:
    groups.setdefault(run.group or run.label, []).append(run)
  return groups


def anchor(run: Run, record: dict) -> str:
  """Where on a page a record of a run is listed."""
  return f'record-{run.index}-{next(i for i, one in enumerate(run.evals) if one is record)}'


# What a metric is called

class Name(NamedTuple):
  """The parts of a metric's name: fd_digits_500_floor_mean is ('fd_digits', '500', True, 'mean')."""
  base: str
  n: str      # how many samples, '' for the 50,000 that need no saying
  floor: bool
  over: str   # 'mean' or 'min' over seeds, or ''


@functools.lru_cache(1000)
def named(metric: str) -> Name:
  """The parts of a metric's name."""
  base, n, floor, over = NAME.fullmatch(metric).groups() if metric else ('', '', '', '')
  return Name(base, n or '', bool(floor), over or '')


@functools.lru_cache(1000)
def family(metric: str) -> str:
  """The longest known metric that this one's name continues, '' for an unknown one."""
  base = named(metric).base
  return max((known for known in METRICS if f'{base}_'.startswith(f'{known}_')), key=len, default='')


def order(metric: str) -> tuple:
  """Sorts metrics: by the order of METRICS, unknown ones last, then by name; a floor, a mean, a minimum follow."""
  name, known = named(metric), family(metric)
  rank = list(METRICS).index(known) if known else len(METRICS)
  return rank, name.base, name.n, name.floor, ('', 'mean', 'min').index(name.over)


def better(metric: str) -> str:
  """'lower is better', 'higher is better', or '' where that is not known or not asked, as of a floor."""
  word = METRICS.get(family(metric), '')
  return word if word in (LOWER, HIGHER) and not named(metric).floor else ''


def kind(metric: str) -> str:
  """'cost', 'likelihood', 'memorisation' or 'quality'."""
  base, known = named(metric).base, family(metric)
  if base.endswith(('_per_second', '_seconds', '_bytes', '_per_image', '_per_1000_images')):
    return 'cost'
  if known in ('memorised', 'closer_to_train', 'memorisation', 'audit'):
    return 'memorisation'
  return 'likelihood' if known == 'bits_per_dim' else 'quality'


# What may be compared

class Column(NamedTuple):
  """A metric and what its values must share to be comparable; records of equal columns are alike."""
  metric: str
  terms: tuple[tuple[str, str], ...]  # (key, value as JSON)


@functools.lru_cache(1000)
def terms(metric: str) -> tuple[str, ...]:
  """The keys in which the records of two values of a metric must agree."""
  if named(metric).base == 'flops_per_image':  # counted, not measured
    return ()
  if named(metric).base == 'psnr':  # no network looks at the images
    return 'num_samples', 'given_hash'
  if kind(metric) == 'memorisation':
    return MEMORISATION if named(metric).base.endswith('_pixels') else ('features', 'features_hash', *MEMORISATION)
  return {'cost': COST, 'likelihood': LIKELIHOOD}.get(kind(metric), QUALITY)


def exactly(value) -> str:
  """A value as JSON, the same for equal values: 1 and 1.0 are."""
  if value is None or isinstance(value, str | int | float):
    return _scalar(value)
  return json.dumps(value, sort_keys=True)


@functools.lru_cache(10_000, typed=True)  # a page asks for the same few settings of every record, many times
def _scalar(value):
  return json.dumps(int(value) if number(value) is not None and value == int(value) else value)


def column(record: dict) -> Column:
  """The column of a record."""
  metric = str(record.get('metric'))
  return Column(metric, tuple((key, exactly(record.get(key))) for key in terms(metric)))


def columns(records: Iterable[dict]) -> dict[Column, list[dict]]:
  """The records by column, those of one metric side by side."""
  groups = {}
  for record in records:
    groups.setdefault(column(record), []).append(record)
  return dict(sorted(groups.items(), key=lambda item: order(item[0].metric)))


def differences(a: dict, b: dict) -> list[str]:
  """The terms in which the records of one metric differ."""
  return [key for (key, one), (_, other) in zip(column(a).terms, column(b).terms, strict=True) if one != other]


PHRASES = {  # term: what comes before its value, and what to do where it differs
  'features': ('in the features', 'evaluate both with one extractor'),
  'features_hash': ('in the features', 'evaluate both with the same weights of the extractor'),
  'reference_hash': ('against', 'evaluate both against one reference'),
  'reference_samples': ('against', 'evaluate both against one reference'),
  'num_samples': ('from', 'evaluate both with one number of samples'),
  'quantisation': ('quantised by', 'evaluate both with one quantisation'),
  'given_hash': ('given', 'compare models that are given the same of the same images'),
  'device': ('on', 'measure both on one device'),
  'batch_size': ('in batches of', 'measure both at one batch size'),
}


def term(record: dict, key: str) -> str:
  """A term of a record in words: 'against cifar10/train (1f3a09bc77)'."""
  plain = lambda key, none: none if record.get(key) is None else setting(record[key])
  before = PHRASES.get(key, (f'with {key}',))[0]
  name = {'features_hash': 'features', 'reference_hash': 'reference', 'given_hash': 'given'}.get(key)
  if name and record.get(name):  # a digest says little by itself
    return f'{before} {plain(name, "")} ({plain(key, "unrecorded")[:10]})'
  after = {'num_samples': ' samples', 'reference_samples': ' real images'}.get(key, '')
  return f'{before} {plain(key, "something unrecorded")}{after * (record.get(key) is not None)}'


def unlike(a: dict, b: dict, names: tuple[str, str] = ('one', 'the other')) -> str | None:
  """Why two records of one metric are not comparable, in one sentence that says both values; None where they are."""
  differ = differences(a, b)
  if not differ:
    return None
  key, metric = differ[0], a.get('metric')
  one, other = term(a, key), term(b, key)
  if one == other:  # digests that begin alike
    one, other = (f'{words} with {key} {record.get(key)}' for words, record in ((one, a), (other, b)))
  advice = PHRASES.get(key, ('', f'evaluate both with one {key}'))[1]
  return f'{metric} of {names[0]} is {one}, of {names[1]} {other}: {advice}'


# Evaluations

Row = dict[Column, dict]  # the records of one evaluation


def evaluations(run: Run) -> list[Row]:
  """The records of each evaluation, by step and then by time: the last is the newest of the last step."""
  rows = {}
  for record in run.evals:
    key = tuple(exactly(record.get(key)) for key in SETTINGS)
    row, place = rows.pop(key, {}), column(record)
    row.pop(place, None)  # so that the newest stands last
    rows[key] = row | {place: record}
  return sorted(rows.values(), key=lambda row: number(first(row).get('step')) or 0)


def first(row: Row) -> dict:
  """A record of an evaluation: all of them have its settings."""
  return next(iter(row.values()))


def value_of(row: Row, *metrics: str) -> dict:
  """The newest record of the first of these metrics that an evaluation has, {} where it has none."""
  for metric in metrics:
    for found in reversed(row.values()):
      if found.get('metric') == metric:
        return found
  return {}


def is_score(metric: str) -> bool:
  """Whether a metric says how good a model is: not what real data score, and not what the samples cost."""
  return kind(metric) in ('quality', 'likelihood') and not named(metric).floor


def headline(run: Run) -> tuple[str, Row]:
  """The metric and the evaluation that speak for a run: of the last step that has scores, the first known metric, of
  the most samples, averaged over seeds and over training where there is such a value; else the newest. ('', {})
  where there is none."""
  rows = [row for row in evaluations(run) if any(is_score(key.metric) for key in row)]
  last = [row for row in rows if first(row).get('step') == first(rows[-1]).get('step')]
  found = [(key.metric, row) for row in reversed(last) for key in row if is_score(key.metric)]
  def place(item):
    name, record = named(item[0]), first(item[1])
    samples = 0 - (number(record.get('num_samples')) or 0)
    return order(name.base)[:2], samples, ('mean', '', 'min').index(name.over), record.get('ema') == 'raw'
  return min(found, key=place, default=('', {}))
