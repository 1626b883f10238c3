"""Run folders -> one self-contained HTML page: `diffusion-jax report RUN [RUN ...] [--out PAGE.html]`.

Reads only the records that the other commands leave in a run folder, with the standard library alone, so that a page
can be made where no jax is installed. The page loads nothing: it works from file:// and in a mail. Its one script
sorts, flips and slides what can be read without it, and the page's policy allows no other, by its hash. A record can
hold anything, so every string of one passes through `text` on its way to the page.
"""
import argparse
import base64
import hashlib
import math
import os
import re
import shlex
import string
import sys
from collections.abc import Callable, Sequence
from html import escape as text
from pathlib import Path

from diffusion_jax import comparison, curves, gallery, quality, records, svg, tradeoff
from diffusion_jax.quality import name
from diffusion_jax.records import Run, Unusable, read_runs
from diffusion_jax.svg import duration, number, said, shown

TEMPLATE = Path(__file__).with_name('report_page.html')
MOST_CLASSES = 20  # whose counts are drawn
MOST_LINES = 4     # on runs above the page
MOST_NOTES = 4     # on what runs miss
AUDITS = 300_000   # bytes of pictures of audits of several runs


# Parts of the page: some are about one run, and `each` repeats them; the others overlay or list all runs

def each(runs: Sequence[Run], part: Callable[[Run], str]) -> str:
  """The part of every run that has it, under its name where there are several."""
  bodies = {}
  for run in runs:
    bodies.setdefault(part(run), []).append(name(run))  # what is the same of several is said once
  parts = [(', '.join(names), body) for body, names in bodies.items() if body]
  if len(parts) > MOST_LINES:
    return ''.join(f'<details class="records"><summary>{names}</summary>{body}</details>' for names, body in parts)
  return ''.join(f'<h3>{names}</h3>' * (len(runs) > 1) + body for names, body in parts)


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


def notes(runs: Sequence[Run], sentence: str, command: str, *flags: str) -> str:
  """The notes of runs that miss the same; of many the first and how many more."""
  first = ''.join(note(run, sentence, command, *flags) for run in runs[:MOST_NOTES])
  return first + f'<p class="note">The same of {len(runs) - MOST_NOTES} more runs.</p>' * (len(runs) > MOST_NOTES)


def samples(runs: Sequence[Run]) -> str:
  """Of one run the newest samples large, and how training came to them small; of several those of each."""
  bare = [run for run in runs if not gallery.found(run, 'grid.png') and not gallery.previews(run)]
  if len(runs) > 1:
    return gallery.samples([run for run in runs if run not in bare]) + notes(bare, 'No samples yet', 'sample')
  run, = runs
  during = gallery.previews(run)
  large = gallery.found(run, 'grid.png') or [during.pop() for _ in during[-1:]]
  if len(during) > 8:
    during = [during[round(i * (len(during) - 1) / 7)] for i in range(8)]
  def show(path, width):
    when = f'{int(path.stem):,} images' if path.stem.isdecimal() else f'samples/{path.parent.name}'
    return svg.picture(path, when, f'Grid of samples of {run.label}: {when}', width)
  film = ''.join(show(path, 120) for path in during)
  pictures = f'<div class="pictures">{"".join(show(path, 480) for path in large)}<div class="film">{film}</div></div>'
  return notes(bare, 'No samples yet', 'sample') or pictures


def denoising(runs: Sequence[Run]) -> str:
  """The way from noise to samples behind a slider; of one run also as a film."""
  alone, bare = len(runs) == 1, [run for run in runs if not gallery.found(run, 'strip.png')]
  films = [svg.picture(path, 'the same as a film', f'Samples of {run.label} on their way, as a film', 320)
           for run in runs * alone for path in gallery.found(run, 'trajectory.gif')]
  return (gallery.denoising(runs, math.inf if alone else gallery.DENOISING)
          + f'<div class="pictures">{"".join(films)}</div>' * bool(films)
          + notes(bare, 'No trajectory yet', 'sample', '--trajectory'))


def evaluation(runs: Sequence[Run]) -> str:
  """All values of all runs."""
  return quality.table(runs) + notes([run for run in runs if not run.evals], 'Not evaluated yet', 'evaluate')


def memorisation(run: Run, most: float = math.inf) -> str:
  """What the audit found, over samples beside the training images that are nearest to them; '' without an audit.

  A picture of more than `most` bytes is named and not shown.
  """
  verdicts = ''
  for row in records.evaluations(run):
    found = {key.metric: record for key, record in row.items() if records.kind(key.metric) == 'memorisation'}
    main, rest = quality.how(records.first(row))
    facts = {text(metric): quality.value(record) + verdict(record) for metric, record in found.items()}
    verdicts += f'<p class="note">{", ".join([main, *rest])}</p>{svg.facts(facts)}' * bool(found)
  alt = f'Samples of {run.label} beside the training images that are nearest to them'
  paths = sorted(run.folder.glob('eval/*/audit.png'))
  large = [path for path in paths if path.stat().st_size > most]
  pictures = ''.join(svg.picture(path, f'eval/{path.parent.name}', alt, 960) for path in paths if path not in large)
  named = ''.join(f'<p class="note">Too large for this page: <code>{text(str(path))}</code></p>' for path in large)
  return verdicts + f'<div class="pictures">{pictures}</div>' * bool(pictures) + named


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
  """The loss as training went on, where on the noise path it is now, and where training was spent."""
  return curves.training(runs) + notes([run for run in runs if not run.metrics], 'Not trained yet', 'train',
                                       '--config=CONFIG.py')


def schedule(runs: Sequence[Run]) -> str:
  """alpha and sigma, and logsnr, against t."""
  return curves.schedule(runs) + notes([run for run in runs if not run.schedule], 'No schedule yet', 'train',
                                       '--config=CONFIG.py')


def configs(runs: Sequence[Run]) -> str:
  """What the configs differ in, and the config of each name in full."""
  firsts = [members[0] for members in records.groups_of(runs).values()]
  if len(firsts) == 1:
    return svg.listing(firsts[0].config)
  return comparison.differences(runs) + each(firsts, lambda run: svg.listing(run.config))


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
  compared = comparison.choose(runs) if len(runs) > 1 else None
  verdict = comparison.judged(compared)
  sections = {
    'Verdict': comparison.over_names(compared, verdict),
    'Samples': samples(runs),
    'Evaluation': evaluation(runs),
    'Quality while training': comparison.while_training(runs, compared or comparison.choose(runs)),
    'Quality against cost': tradeoff.against_cost(runs),
    'Likelihood': quality.likelihood(runs),
    'Memorisation': each(runs, lambda run: memorisation(run, AUDITS / (len(runs) - 1) if len(runs) > 1 else math.inf)),
    'Training': training(runs),
    'Denoising': denoising(runs),
    'Schedule': schedule(runs),
    'Data': each(runs, data),
    'Config': configs(runs),
    'Provenance': each(runs, provenance),
  }
  parts = {title.lower().replace(' ', '-'): (title, body) for title, body in sections.items() if body}
  label = lambda run: f'{name(run)}: ' * (len(runs) > 1)
  lines = ''.join(f'<p class="lede">{label(run)}{summary(run)}</p>' for run in runs)
  if len(runs) > MOST_LINES:
    lines = f'<details><summary>Each of the {len(runs)} runs in a sentence</summary>{lines}</details>'
  template = TEMPLATE.read_text('utf-8')
  script = re.search('<script>(.*)</script>', template, re.DOTALL)[1].replace('$$', '$')
  return string.Template(template).substitute(
    title=text(runs[0].label if len(runs) == 1 else f'{len(runs)} runs compared'),
    summary=comparison.headline(compared, verdict) + lines,
    script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
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
