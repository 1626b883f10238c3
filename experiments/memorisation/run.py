"""Does the memorisation audit tell a model that copies from one that does not? python -m experiments.memorisation.run.

Two models of configs/digits.py, trained alike: one on 100 digits, one on all 1297 of the training split. Each is asked
for 500 digits, which are audited in pixels and in the features of the digits classifier.
"""
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax import audit
from diffusion_jax.data import sources
from diffusion_jax.metrics import features
from diffusion_jax.runtime import command, log
from diffusion_jax.runtime.config import UserError
from diffusion_jax.sample import npz

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = pathlib.Path(__file__).parent / 'results'
SAMPLES, SEED = 500, 0


class Case(NamedTuple):
  """What a model is trained on; every other digit is held out."""
  about: str
  train: int  # how many of the training split's digits, from the first on


CASES = {'hundred': Case('trained on 100 digits', 100), 'all': Case('trained on 1297 digits', 1297)}


def measure(name: str, case: Case, workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Trains, or finds what was trained in `workdir`; samples, and audits."""
  digits = [sources.arrays(sources.load('digits', split)) for split in ('train', 'test')]
  images, labels = (np.concatenate(a) for a in zip(*digits, strict=True))
  data, drawn = workdir / 'digits.npz', workdir / 'samples.npz'
  if not data.exists():
    log.write(data, npz(image=images[:case.train], label=labels[:case.train]))
  _run('train', '--config=configs/digits.py', f'--workdir={workdir}', f'--config.data.source=npz:{data}',
       '--config.mesh.data=1')
  _run('sample', f'--workdir={workdir}', f'--num={SAMPLES}', f'--seed={SEED}', f'--out={drawn}')
  with np.load(drawn, allow_pickle=False) as found:
    generated = found['image']
  extractor = features.make('digits')
  seen = [{'digits': extractor.extract(x)['features']} for x in (generated, images[:case.train], images[case.train:])]
  records = audit.run(workdir / 'audit', generated, seen[0], (images[:case.train], seen[1]),
                      (images[case.train:], seen[2]), SEED)
  common = {'case': name, 'about': case.about, 'num_samples': SAMPLES, 'seed': SEED, 'features_hash': extractor.digest,
            'time': log.now(), **log.provenance()}
  return [{**record, **common} for record in records]


def _run(what: str, *arguments: str) -> None:
  """A command in a process of its own: how many devices a machine shows is settled once per process."""
  done = subprocess.run([sys.executable, '-m', f'diffusion_jax.{what}', *arguments], cwd=ROOT)
  if done.returncode:
    raise UserError(f'{what} ended with status {done.returncode}: see its message above')


def table(records: Sequence[dict[str, Any]]) -> str:
  """Markdown, a row for each model and space."""
  lines = ['| model | space | near copies (chance) | closer to train (chance 50 %) | median ratio | flagged |',
           '|---|---|---|---|---|---|']
  for name in CASES:
    mine = [r for r in records if r['case'] == name]
    value = {r['metric'].removesuffix(f'_{SAMPLES}'): r for r in mine}
    for space in ('pixels', 'digits') if mine else ():
      share, closer = value[f'memorised_share_{space}'], value[f'closer_to_train_share_{space}']
      lines.append(f'| {share["about"]} | {space} | {_percent(share)} ({100 * share["chance"]:.1f} %) | '
                   f'{_percent(closer)} | {value[f"memorisation_ratio_median_{space}"]["value"]:.2f} | '
                   f'{"yes" if space in value["memorisation_flagged"]["flagged_in"] else "no"} |')
  return '\n'.join(lines) + '\n'


def _percent(record: dict[str, Any]) -> str:
  low, high = (100 * edge for edge in record['ci'])
  return f'{100 * record["value"]:.1f} % ({low:.1f} to {high:.1f})'


def main(argv: Sequence[str] | None = None) -> int:
  """Measures both models, prints the table, keeps the records."""
  p = command.Parser(prog='python -m experiments.memorisation.run', allow_abbrev=False,
                     description='Does the memorisation audit tell a model that copies from one that does not?')
  p.add_argument('--workdir', help='keeps the models here, one folder each, and finds them again (default: nowhere)')
  p.add_argument('--out', help='the file of records (default results/DEVICE.jsonl)')
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError('the models are fixed: --config overrides nothing here')
  with tempfile.TemporaryDirectory() as scratch:
    workdir = pathlib.Path(flags.workdir or scratch).resolve()
    records = [r for name, case in CASES.items() for r in measure(name, case, workdir / name)]
  out = pathlib.Path(flags.out) if flags.out else RESULTS / f'{log.device().replace(" ", "-").lower()}.jsonl'
  for record in records:
    log.append(out, record)
  print(table(records))
  flagged = {r['case']: bool(r['value']) for r in records if r['metric'].startswith('memorisation_flagged')}
  print(f'flagged: {flagged}; expected: the model of 100 digits alone')
  return 0 if flagged == {'hundred': True, 'all': False} else 1


if __name__ == '__main__':
  sys.exit(command.run(main))
