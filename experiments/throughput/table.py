"""The README's tables and the plots, from the records: python -m experiments.throughput.table."""
import io
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib

from diffusion_jax.runtime import command, log
from diffusion_jax.runtime.config import UserError
from experiments.throughput import changes, goals
from experiments.throughput.cases import CASES, file_name

FOLDER = pathlib.Path(__file__).parent
BEGIN, END = '<!-- table: begin (python -m experiments.throughput.table) -->', '<!-- table: end -->'
CHANGES = '<!-- changes: begin (python -m experiments.throughput.table) -->', '<!-- changes: end -->'
COLOURS = {'faster': 'C0', 'slower': 'C3', 'no difference': 'C7'}  # others: grey, without a verdict


def result(r: dict[str, Any]) -> str:
  """'1.46x (1.41 to 1.52)', or the share of an overhead, or 'alone'."""
  if r['ratio'] is None:
    return 'alone'
  low, high = r['interval']
  if r['share_percent'] is None:
    return f'{r["ratio"]:.2f}x ({low:.2f} to {high:.2f})'
  return f'{r["share_percent"]:.1f} % ({100 * (1 - high):.1f} to {100 * (1 - low):.1f})'


def limits_line(limit: dict[str, Any]) -> str:
  """'This machine: float32 products 198 GFLOP/s (torch), copies 11.3 GB/s (jax)'."""
  shown = [f'{name} products {rate / 1e9:,.0f} GFLOP/s ({limit["by"][name]})' if name != 'copy' else
           f'copies {rate / 1e9:,.1f} GB/s ({limit["by"][name]})' for name, rate in limit['rates'].items()]
  return f'Limits, measured: {", ".join(shown)}'


def newest(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """The last record of each case on each device, in the order of CASES."""
  last = {(r['device'], r['case']): r for r in sorted(records, key=lambda r: r['time']) if r['case'] in CASES}
  return [last[key] for key in sorted(last, key=lambda key: (key[0], list(CASES).index(key[1])))]


def render(records: Iterable[dict[str, Any]]) -> str:
  """The newest records in Markdown, a table for each device."""
  lines, chosen = [], newest(records)
  for device in dict.fromkeys(r['device'] for r in chosen):
    own = [r for r in chosen if r['device'] == device]
    limit = max((r for r in own if r.get('limits')), key=lambda r: r['time'], default={}).get('limits')
    lines += [''] * bool(lines) + [device, ''] + ([limits_line(limit), ''] if limit else []) + [
        '| case | baseline ms | ours ms | result (95 % interval) | verdict | goal | CPU ms, baseline / ours | '
        '% of the product peak, baseline / ours | compile s | peak MiB, baseline / ours |', f'|{"---|" * 10}']
    lines += [row(r) for r in own]
    if papers := [f'- {r["about"]}: {words}.' for r in own if (words := goals.published(r))]:
      lines += ['', 'Beside what papers give:', '', *papers]
  return '\n'.join(lines) + '\n'


def row(r: dict[str, Any]) -> str:
  """A record as a row; its baseline is the quickest of several."""
  *others, ours = r['sides']
  pair = [r['sides'].get(r.get('baseline') or next(iter(others), None)), r['sides'][ours]]
  # Records from before shares and several baselines lack their keys.
  cell = lambda s, key, scale=1.0, digits=0: '-' if s is None or s.get(key) is None else f'{s[key] * scale:.{digits}f}'
  both = lambda key, scale=1.0: ' / '.join(cell(s, key, scale) for s in pair)
  compiled = max(s['compile_seconds'] for s in pair if s)
  cells = [r['about'], cell(pair[0], 'median_ms', 1, 1), cell(pair[1], 'median_ms', 1, 1), result(r), r['verdict'],
           goals.goal(r), both('cpu_ms'), both('peak_share', 100), f'{compiled:.1f}', both('peak_bytes', 2 ** -20)]
  return f'| {" | ".join(cells)} |'


def insert(text: str, table: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
  """`text` with `table` between its two markers; UserError if they are not there."""
  before, begin, rest = text.partition(marks[0])
  _, end, after = rest.partition(marks[1])
  if not begin or not end:
    raise UserError(f'the README lacks the lines {marks[0]!r} and {marks[1]!r}, between which the table goes')
  return f'{before}{begin}\n{table}{end}{after}'


def draw(records: Sequence[dict[str, Any]]) -> bytes:
  """A PNG of one device's ratios with their intervals, and a mark where a goal is."""
  matplotlib.use('Agg')
  from matplotlib import pyplot
  figure, axes = pyplot.subplots(figsize=(8, 1.3 + 0.3 * len(records)), layout='constrained')
  for y, r in enumerate(records):
    low, high = r['interval']
    colour = COLOURS.get(r['verdict'], '0.7')
    axes.plot([low, high], [y, y], color=colour, linewidth=2)
    axes.plot(r['ratio'], y, 'o', color=colour, markersize=5)
    wanted = goals.GOALS.get(r['case'])
    if wanted and wanted.kind == 'ratio':
      axes.plot(wanted.value, y, '|', color='k', markersize=14)
  axes.axvline(1, color='k', linewidth=0.8, linestyle=':')
  for name, colour in [*COLOURS.items(), ('no verdict', '0.7')]:
    axes.plot([], [], 'o-', color=colour, label=name)
  axes.plot([], [], 'k|', markersize=10, label='goal')
  axes.set(xscale='log', ylim=(len(records) - 0.5, -0.5), title=records[0]['device'],
           xlabel="PyTorch's time over ours (right of 1: ours is faster), 95 % interval")
  axes.set_yticks(range(len(records)), [r['case'] for r in records], fontsize=8)
  axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter('%g'))
  axes.xaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter('%g'))
  axes.tick_params(axis='x', which='both', labelsize=8)
  axes.grid(axis='x', which='both', alpha=0.2)
  axes.legend(fontsize=8)
  data = io.BytesIO()
  figure.savefig(data, format='png', dpi=130)
  pyplot.close(figure)
  return data.getvalue()


def pictures(records: Iterable[dict[str, Any]]) -> dict[str, bytes]:
  """{name of the file in results/: PNG} for each device that has ratios."""
  found, chosen = {}, [r for r in newest(records) if r['ratio'] is not None and r['share_percent'] is None]
  for device in dict.fromkeys(r['device'] for r in chosen):
    found[pathlib.Path(file_name(device)).stem + '.png'] = draw([r for r in chosen if r['device'] == device])
  return found


def main(argv: Sequence[str] | None = None) -> int:
  """Puts the newest records of results/, and the changes, in README.md, and draws them; quick ones do not count."""
  p = command.Parser(prog='python -m experiments.throughput.table', description=main.__doc__, allow_abbrev=False)
  p.parse(argv)
  results = FOLDER / 'results'
  records = [r for path in sorted(results.glob('*.jsonl')) if path != results / changes.NAME
             for r in log.read_lines(path) if not r['quick']]
  drawn, readme = pictures(records), FOLDER / 'README.md'
  for name, data in drawn.items():
    log.write(results / name, data)
  shown = ''.join(f'\n![ratios and goals](results/{name})\n' for name in drawn)
  text = insert(readme.read_text(), render(records) + shown)
  log.write(readme, insert(text, changes.render(changes.read(results / changes.NAME)), CHANGES))
  return 0


if __name__ == '__main__':
  sys.exit(command.run(main))
