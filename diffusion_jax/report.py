"""Run folders -> one self-contained HTML page: `diffusion-jax report RUN [RUN ...] [--out PAGE.html]`.

Reads only the records that the other commands leave in a run folder, with the standard library alone, so that a page
can be made where no jax is installed. The page loads nothing and runs no script: it works from file:// and in a mail.
A record can hold anything, so every string of one passes through `text` on its way to the page.
"""
import argparse
import os
import shlex
import string
import sys
from collections.abc import Callable, Sequence
from html import escape as text
from pathlib import Path

from diffusion_jax import quality, records, svg, tradeoff
from diffusion_jax.quality import name
from diffusion_jax.records import Run, Unusable, read_runs
from diffusion_jax.svg import duration, number, numbers, said, shown

TEMPLATE = Path(__file__).with_name('report_page.html')
MOST_CLASSES = 20  # whose counts are drawn


# Parts of the page: some are about one run, and `each` repeats them; the others overlay or list all runs

def each(runs: Sequence[Run], part: Callable[[Run], str]) -> str:
  """The part of every run that has it, under its name where there are several."""
  parts = ((run, part(run)) for run in runs)
  return ''.join((f'<h3>{name(run)}</h3>' if len(runs) > 1 else '') + body for run, body in parts if body)


def note(run: Run, sentence: str, command: str, *flags: str) -> str:
  """What is missing and the command that makes it."""
  line = ' '.join(['diffusion-jax', command, f'--workdir={shlex.quote(str(run.folder))}', *flags])
  return f'<p class="note">{sentence}: <code>{text(line)}</code></p>'


def progress(run: Run) -> str:
  """How much the run has trained, '' where it has not."""
  record = run.done or (run.metrics[-1] if run.metrics else {})
  words = f'{shown(record.get("images"))} images in {duration(record.get("seconds"))}{"" if run.done else " so far"}'
  return words if number(record.get('images')) is not None else ''


def summary(run: Run) -> str:
  """What the run reached, in one sentence."""
  trained, reached = f'trained on {progress(run)}' if progress(run) else 'not trained yet', quality.headline(run)
  return f'{reached}; {trained}.' if reached else f'{trained.capitalize()}; not evaluated yet.'


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
  """All values of all runs."""
  return quality.table(runs) + ''.join(note(run, 'Not evaluated yet', 'evaluate') for run in runs if not run.evals)


def memorisation(run: Run) -> str:
  """What the audit found, over samples beside the training images that are nearest to them; '' without an audit."""
  verdicts = ''
  for row in records.evaluations(run):
    found = {key.metric: record for key, record in row.items() if records.kind(key.metric) == 'memorisation'}
    main, rest = quality.how(records.first(row))
    facts = {text(metric): quality.value(record) + verdict(record) for metric, record in found.items()}
    verdicts += f'<p class="note">{", ".join([main, *rest])}</p>{svg.facts(facts)}' * bool(found)
  alt = f'Samples of {run.label} beside the training images that are nearest to them'
  pictures = ''.join(svg.picture(path, f'eval/{path.parent.name}', alt, 960)
                     for path in sorted(run.folder.glob('eval/*/audit.png')))
  return verdicts + f'<div class="pictures">{pictures}</div>' * bool(pictures)


def verdict(record: dict) -> str:
  """What an audit says of a value, in words."""
  flagged = [words for flag, words in ((True, 'flagged as memorised'), (False, 'not flagged'))
             if record.get('flagged') is flag]
  words = flagged + said(record, 'verdict') + said(record, 'chance', 'expected of fresh images: ')
  return f'<small>{"; ".join(words)}</small>' * bool(words)


def data(run: Run) -> str:
  """The data card; '' where there is none."""
  card = records.read_json(run.folder / 'data_card.json')
  part = lambda key: card[key] if isinstance(card.get(key), dict) else {}
  classes = {key: count for key, count in part('classes').items() if number(count) is not None and count >= 0}
  duplicates, held_out = part('duplicates'), part('held_out')
  lists = {key: card[key] if isinstance(card.get(key), list) else [] for key in ('shape', 'mean', 'std')}
  counts = ''
  if classes:
    counts = f'{len(classes):,}, of {shown(min(classes.values()))} to {shown(max(classes.values()))} images'
    counts += bars(classes) * (len(classes) <= MOST_CLASSES)
  facts = {
    'source': ''.join(said(card, 'source')), 'split': ''.join(said(card, 'split')),
    'images': ''.join(said(card, 'num_examples')), 'shape': text(' x '.join(map(str, lists['shape']))),
    'licence': ''.join(said(card, 'licence') + said(card, 'licence_source', '<small>', '</small>')),
    'homepage': ''.join(said(card, 'homepage')), 'citation': ''.join(said(card, 'citation')),
    'hash': ''.join(said(card, 'hash', '<code>', '</code>')), 'bad records': ''.join(said(card, 'bad_records')),
    'not scanned': ''.join(said(card, 'not_scanned')),
    'duplicates': ', '.join(said(duplicates, 'count') + said(duplicates, 'groups', 'in ', ' groups')
                            + said(duplicates, 'contradictory', '', ' groups with unlike labels')),
    'also held out': ''.join(said(held_out, 'overlap') + said(held_out, 'split', ' in ') + said(held_out, 'why', ': ')),
    'unlabelled': ''.join(said(card, 'unlabelled')), 'classes': counts}
  facts |= {key: ', '.join(map(shown, lists[key])) for key in ('mean', 'std')}
  return svg.facts(facts) if card else ''


def bars(counts: dict[str, float]) -> str:
  """Numbers of images as bars."""
  most = max(counts.values()) or 1
  rows = ''.join(f'<li><b>{text(key)}</b><span style="width:{60 * count / most:.1f}%"></span>{shown(count)}</li>'
                 for key, count in counts.items())
  return f'<ul class="bars">{rows}</ul>'


def training(runs: Sequence[Run]) -> str:
  """The loss as training went on, and where on the noise path it is now."""
  losses, bins = [], []
  for run in runs:
    points = [(number(line.get('images')), number(line.get('loss'))) for line in run.metrics]
    points, band = svg.thinned([point for point in points if point[0] is not None])
    losses.append(svg.Series(run.label, points, run.colour, band=band))
    bins.append(svg.Series(run.label, loss_by_logsnr(run), run.colour))
  missing = (note(run, 'Not trained yet', 'train', '--config=CONFIG.py') for run in runs if not run.metrics)
  return svg.pair(svg.chart('Loss', 'images seen', losses, log=True),
                  svg.chart('Loss by logsnr', 'logsnr, from noise to data', bins, log=True)) + ''.join(missing)


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
  return svg.pair(svg.chart('alpha and sigma', 't, from data to noise', scales, log),
                  svg.chart('logsnr', 't, from data to noise', logsnrs)) + ''.join(missing)


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
  return svg.facts(facts)


# The page

def page(runs: Sequence[Run]) -> str:
  """The whole page."""
  sections = {
    'Samples': each(runs, samples),
    'Evaluation': evaluation(runs),
    'Quality against cost': tradeoff.against_cost(runs),
    'Likelihood': quality.likelihood(runs),
    'Memorisation': each(runs, memorisation),
    'Training': training(runs),
    'Denoising': each(runs, denoising),
    'Schedule': schedule(runs),
    'Data': each(runs, data),
    'Config': each(runs, lambda run: svg.listing(run.config)),
    'Provenance': each(runs, provenance),
  }
  parts = {title.lower().replace(' ', '-'): (title, body) for title, body in sections.items() if body}
  label = lambda run: f'{name(run)}: ' * (len(runs) > 1)
  return string.Template(TEMPLATE.read_text('utf-8')).substitute(
    title=text(runs[0].label if len(runs) == 1 else f'{len(runs)} runs compared'),
    summary=''.join(f'<p class="lede">{label(run)}{summary(run)}</p>' for run in runs),
    links=''.join(f'<a href="#{key}">{title}</a>' for key, (title, _) in parts.items()),
    body=''.join(f'<section id="{key}"><h2>{title}</h2>{body}</section>' for key, (title, body) in parts.items()),
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
