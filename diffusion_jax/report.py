"""Run folders -> one self-contained HTML page: `diffusion-jax report RUN [RUN ...] [--out PAGE.html]`.

Reads only the records that the other commands leave in a run folder, with the standard library alone, so that a page
can be made where no jax is installed. The page loads nothing and runs no script: it works from file:// and in a mail.
A record can hold anything, so every string of one passes through `text` on its way to the page.
"""
import argparse
import json
import os
import shlex
import string
import sys
from collections.abc import Callable, Sequence
from html import escape as text
from pathlib import Path
from typing import NamedTuple

from diffusion_jax import svg
from diffusion_jax.svg import NOTHING, confidence, duration, interval, number, numbers, quantity, said, shown

TEMPLATE = Path(__file__).with_name('report_page.html')
# What makes one evaluation: records that agree in all of these share a row.
SETTINGS = ('step', 'ema', 'sampler', 'grid', 'nfe', 'guidance', 'seed', 'num_samples')
# The known metrics in the order of their columns, with a word on each; others follow them.
METRICS = {
  'fd_digits': 'lower is better', 'fd_digits_floor': 'real held-out digits', 'accuracy_digits': 'higher is better',
  'samples_per_second': '', 'latency_seconds': '', 'compile_seconds': '', 'peak_memory_bytes': '',
}


# Records

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


def read_json(path: Path) -> dict:
  """The object in a JSON file, {} where there is none yet: a page can be made at any moment of a run."""
  try:
    value = json.loads(path.read_text('utf-8', 'replace'))
  except (OSError, ValueError):
    return {}
  return value if isinstance(value, dict) else {}


def read_lines(path: Path) -> list[dict]:
  """The objects in a .jsonl file, without the lines that a killed process left half written."""
  records = []
  for line in path.read_text('utf-8', 'replace').split('\n') if path.is_file() else ():
    try:
      records.append(json.loads(line))
    except ValueError:
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
  except ValueError as e:
    raise Unusable(f'{path} is not JSON: {e}.') from e
  if not isinstance(config, dict):
    raise Unusable(f'{path} is not a JSON object.')
  # A resumed run logs some steps again: the last line of a step wins.
  steps = {line['step']: line for line in read_lines(folder / 'metrics.jsonl') if number(line.get('step')) is not None}
  return Run(
    folder, label, colour, config, read_json(folder / 'run.json'), read_json(folder / 'schedule.json'),
    [steps[step] for step in sorted(steps)], read_lines(folder / 'eval.jsonl'), read_json(folder / 'done.json'))


def read_runs(folders: Sequence[Path]) -> list[Run]:
  """The runs, labelled by the names of their folders where those differ and by their paths where they do not."""
  names = [folder.resolve().name for folder in folders]
  labels = names if len(set(names)) == len(names) else list(map(str, folders))
  return [read_run(folder, label, i) for i, (folder, label) in enumerate(zip(folders, labels, strict=True))]


def evaluations(run: Run) -> list[dict[str, dict]]:
  """Metric -> record for each evaluation, by step and then by time: the last is the newest of the last step."""
  rows = {}
  for record in run.evals:
    key = json.dumps([record.get(setting) for setting in SETTINGS])
    rows[key] = rows.pop(key, {}) | {str(record.get('metric')): record}
  return sorted(rows.values(), key=lambda row: number(next(iter(row.values())).get('step')) or 0)


# Parts of the page: some are about one run, and `each` repeats them; the others overlay or list all runs

def each(runs: Sequence[Run], part: Callable[[Run], str]) -> str:
  """The part of every run, under its name where there are several."""
  return ''.join((f'<h3>{name(run)}</h3>' if len(runs) > 1 else '') + part(run) for run in runs)


def name(run: Run) -> str:
  """The run's label beside the colour of its curves."""
  return svg.swatch(run.colour) + text(run.label)


def note(run: Run, sentence: str, command: str, *flags: str) -> str:
  """What is missing and the command that makes it."""
  line = ' '.join(['diffusion-jax', command, f'--workdir={shlex.quote(str(run.folder))}', *flags])
  return f'<p class="note">{sentence}: <code>{text(line)}</code></p>'


def progress(run: Run) -> str:
  """How much the run has trained, '' where it has not."""
  record = run.done or (run.metrics[-1] if run.metrics else {})
  words = f'{shown(record.get("images"))} images in {duration(record.get("seconds"))}{"" if run.done else " so far"}'
  return words if number(record.get('images')) is not None else ''


def column(metric: str) -> int:
  """The place of a metric among the columns."""
  return list(METRICS).index(metric) if metric in METRICS else len(METRICS)


def summary(run: Run) -> str:
  """What the run reached, in one sentence about its last evaluation that has a score."""
  trained = f'trained on {progress(run)}' if progress(run) else 'not trained yet'
  is_score = lambda metric: not metric.endswith(('_floor', '_seconds', '_per_second', '_bytes'))
  rows = [row for row in evaluations(run) if any(map(is_score, row))]
  if not rows:
    return f'{trained.capitalize()}; not evaluated yet.'
  metric = min(filter(is_score, rows[-1]), key=column)
  score, floor, speed = (rows[-1].get(key, {}) for key in (metric, f'{metric}_floor', 'samples_per_second'))
  beside = [f'{confidence(score)} interval {" to ".join(interval(score))}'] if interval(score) else []
  beside += said(floor, 'value', f'real held-out {text(metric.partition("_")[2]) or "data"} score ')
  words = said(score, 'num_samples', 'from ', ' samples') + said(score, 'nfe', '', ' network calls each')
  words += said(speed, 'value', '', f' samples per second{"".join(said(speed, "device", " on "))}')
  if run.done.get('images') != score.get('images'):
    words += said(score, 'images', 'after ', ' images')
  reached = f'<strong>{text(metric)} {quantity(metric, score.get("value"))}</strong>'
  return f'{reached}{" (" * bool(beside)}{"; ".join(beside)}{")" * bool(beside)} {", ".join(words)}; {trained}.'


def found(run: Run, file: str) -> list[Path]:
  """The files of this name in the folders of samples, the default folder first."""
  return sorted(run.folder.glob(f'samples/*/{file}'), key=lambda path: (path.parent.name != 'final', path))


def samples(run: Run) -> str:
  """The newest samples large, and how training came to them small."""
  during = sorted((p for p in run.folder.glob('samples/*.png') if p.stem.isdecimal()), key=lambda p: int(p.stem))
  large = found(run, 'grid.png') or [during.pop() for _ in during[-1:]]
  if not large:
    return note(run, 'No samples yet', 'sample')
  if len(during) > 8:
    during = [during[round(i * (len(during) - 1) / 7)] for i in range(8)]
  def show(path, width):
    when = f'{int(path.stem):,} images' if path.stem.isdecimal() else f'samples/{path.parent.name}'
    return svg.picture(path, when, f'Grid of samples of {run.label}: {when}', width)
  film = ''.join(show(path, 120) for path in during)
  return f'<div class="pictures">{"".join(show(path, 480) for path in large)}<div class="film">{film}</div></div>'


def denoising(run: Run) -> str:
  """The way from noise to samples, as a strip and as a film."""
  alt = f'Samples of {run.label} on their way from noise to data'
  ways = [svg.picture(path, 'from noise to data', alt, 960) for path in found(run, 'strip.png')]
  ways += [svg.picture(path, 'the same as a film', f'{alt}, as a film', 320) for path in found(run, 'trajectory.gif')]
  return f'<div class="pictures">{"".join(ways)}</div>' if ways else note(
    run, 'No trajectory yet', 'sample', '--trajectory')


def evaluation(runs: Sequence[Run]) -> str:
  """A row for every evaluation of every run, and the records behind them."""
  rows = [(run, row) for run in runs for row in evaluations(run)]
  missing = ''.join(note(run, 'Not evaluated yet', 'evaluate') for run in runs if not run.evals)
  if not rows:
    return missing
  metrics = sorted(dict.fromkeys(metric for _, row in rows for metric in row), key=column)
  head = ''.join(f'<th scope="col">{text(metric).replace("_", "_<wbr>")}<small>{METRICS.get(metric, "")}</small></th>'
                 for metric in ('sampler', *metrics))
  body, records = '', {}
  for run, row in rows:
    first = next(iter(row.values()))
    how = ', '.join(said(first, 'sampler') + said(first, 'nfe', '', ' calls')) or 'unnamed'
    rest = ' · '.join(
      said(first, 'images', 'at ', ' images') + said(first, 'num_samples', '', ' samples') + said(first, 'ema', 'EMA ')
      + said(first, 'grid', 'grid ') + said(first, 'guidance', 'guidance ') + said(first, 'seed', 'seed '))
    label = f'{name(run)}<br>' * (len(runs) > 1)
    cells = ''.join(cell(row.get(metric)) for metric in metrics)
    body += f'<tr><th scope="row">{label}{how}<small>{rest}</small></th>{cells}</tr>'
    records[f'{len(records) + 1}. {run.label}'] = row
  return ('<div class="scroll" tabindex="0" role="region" aria-label="Evaluations">'
          f'<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
          '<details class="records"><summary>All records, with hashes and versions</summary>'
          f'{svg.listing(records)}</details>{missing}')


def cell(record: dict | None) -> str:
  """A value over its interval."""
  if not record:
    return f'<td>{NOTHING}</td>'
  ends = f' <small>[{", ".join(interval(record))}]</small>' if interval(record) else ''
  return f'<td>{quantity(str(record.get("metric")), record.get("value"))}{ends}</td>'


def training(runs: Sequence[Run]) -> str:
  """The loss as training went on, and where on the noise path it is now."""
  losses, bins = [], []
  for run in runs:
    points = [(number(line.get('images')), number(line.get('loss'))) for line in run.metrics]
    points, band = svg.thinned([point for point in points if point[0] is not None])
    losses.append(svg.Series(run.label, points, run.colour, band=band))
    bins.append(svg.Series(run.label, loss_by_logsnr(run), run.colour))
  missing = (note(run, 'Not trained yet', 'train', '--config=CONFIG.py') for run in runs if not run.metrics)
  return (f'<div class="pair">{svg.chart("Loss", "images seen", losses, log=True)}'
          f'{svg.chart("Loss by logsnr", "logsnr, from noise to data", bins, log=True)}</div>{"".join(missing)}')


def loss_by_logsnr(run: Run) -> list:
  """The outline of the newest histogram of losses; an empty bin is a gap."""
  for line in reversed(run.metrics):
    edges, values = numbers(line.get('logsnr_bins')), numbers(line.get('loss_by_logsnr'))
    if len(edges) == len(values) + 1 and any(value is not None for value in values):
      return [(edge, value) for i, value in enumerate(values) for edge in edges[i:i + 2]]
  return []


def schedule(runs: Sequence[Run]) -> str:
  """alpha and sigma, and logsnr, against t."""
  scales, logsnrs = [], []
  for run in runs:
    alpha, sigma, logsnr = (list(zip(numbers(run.schedule.get('t')), numbers(run.schedule.get(key)), strict=False))
                            for key in ('alpha', 'sigma', 'logsnr'))
    if len(runs) == 1:
      scales += [svg.Series('alpha', alpha, 0), svg.Series('sigma', sigma, 1)]
    else:  # a colour is a run, so that sigma is told by its dashes
      scales.append(svg.Series(f'{run.label}, alpha', alpha, run.colour))
      scales.append(svg.Series(f'{run.label}, sigma', sigma, run.colour, dashed=True))
    logsnrs.append(svg.Series(run.label, logsnr, run.colour))
  log = any(y is not None and y > 10 for s in scales for _, y in s.points)  # a ve path needs decades
  missing = (note(run, 'No schedule yet', 'train', '--config=CONFIG.py') for run in runs if not run.schedule)
  return (f'<div class="pair">{svg.chart("alpha and sigma", "t, from data to noise", scales, log)}'
          f'{svg.chart("logsnr", "t, from data to noise", logsnrs)}</div>{"".join(missing)}')


def provenance(run: Run) -> str:
  """Where the run was made, by which command and code, and what came of it."""
  versions, command = run.made.get('versions'), run.made.get('command')
  facts = {
    'trained on': progress(run),
    'speed': ''.join(said(run.done, 'images_per_second', '', ' images per second')),
    'started': text(str(run.made.get('started', ''))),
    'device': ''.join(said(run.made, 'device')),
    'parameters': ''.join(said(run.made, 'parameters')),
    'versions': text(', '.join(f'{k} {v}' for k, v in versions.items())) if isinstance(versions, dict) else '',
    'revision': ''.join(said(run.made, 'git_revision', '<code>', '</code>')),
    'command': f'<code>{text(shlex.join(map(str, command)))}</code>' if isinstance(command, list) else '',
    'fingerprint': ''.join(said(run.done, 'fingerprint', '<code>', '</code>')),
    'folder': f'<code>{text(str(run.folder))}</code>',
  }
  return f'<dl class="facts">{"".join(f"<dt>{key}</dt><dd>{fact}</dd>" for key, fact in facts.items() if fact)}</dl>'


# The page

def page(runs: Sequence[Run]) -> str:
  """The whole page."""
  sections = {
    'Samples': each(runs, samples),
    'Evaluation': evaluation(runs),
    'Training': training(runs),
    'Denoising': each(runs, denoising),
    'Schedule': schedule(runs),
    'Config': each(runs, lambda run: svg.listing(run.config)),
    'Provenance': each(runs, provenance),
  }
  label = lambda run: f'{name(run)}: ' * (len(runs) > 1)
  return string.Template(TEMPLATE.read_text('utf-8')).substitute(
    title=text(runs[0].label if len(runs) == 1 else f'{len(runs)} runs compared'),
    summary=''.join(f'<p class="lede">{label(run)}{summary(run)}</p>' for run in runs),
    links=''.join(f'<a href="#{title.lower()}">{title}</a>' for title in sections),
    body=''.join(f'<section id="{title.lower()}"><h2>{title}</h2>{body}</section>' for title, body in sections.items()),
    folders=', '.join(f'<code>{text(str(run.folder))}</code>' for run in runs))


def write(path: Path, content: str) -> None:
  """Writes a file so that a reader sees the old one or the new one, never half of it."""
  if not path.parent.is_dir() or path.is_dir():
    raise Unusable(f'{path} cannot be written: its folder is missing, or it is a folder itself.')
  temporary = path.with_name(f'.{path.name}.{os.getpid()}')
  try:
    temporary.write_text(content, 'utf-8', 'xmlcharrefreplace')
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> int:
  """The command."""
  parser = argparse.ArgumentParser('diffusion-jax report', description='Makes one HTML page from run folders.')
  parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='folder of a run')
  parser.add_argument('--out', type=Path, metavar='PAGE.html', help='default: RUN/report.html; report.html for several')
  args = parser.parse_args(argv)
  out = args.out or (args.runs[0] / 'report.html' if len(args.runs) == 1 else Path('report.html'))
  try:
    write(out, page(read_runs(args.runs)))
  except (Unusable, OSError) as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  print(out)
  return 0


if __name__ == '__main__':
  sys.exit(main())
