"""The README's table, from the records: python -m experiments.throughput.table."""
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from diffusion_jax.runtime import command, log
from diffusion_jax.runtime.config import UserError
from experiments.throughput.cases import CASES

FOLDER = pathlib.Path(__file__).parent
BEGIN, END = '<!-- table: begin (python -m experiments.throughput.table) -->', '<!-- table: end -->'


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
        '| case | baseline ms | ours ms | result (95 % interval) | verdict | CPU ms, baseline / ours | '
        '% of the product peak, baseline / ours | compile s | peak MiB, baseline / ours |', f'|{"---|" * 9}']
    lines += [row(r) for r in own]
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
           both('cpu_ms'), both('peak_share', 100), f'{compiled:.1f}', both('peak_bytes', 2 ** -20)]
  return f'| {" | ".join(cells)} |'


def insert(text: str, table: str) -> str:
  """`text` with `table` between its two markers; UserError if they are not there."""
  before, begin, rest = text.partition(BEGIN)
  _, end, after = rest.partition(END)
  if not begin or not end:
    raise UserError(f'the README lacks the lines {BEGIN!r} and {END!r}, between which the table goes')
  return f'{before}{BEGIN}\n{table}{END}{after}'


def main(argv: Sequence[str] | None = None) -> int:
  """Puts the newest records of results/ in README.md; quick ones do not count."""
  p = command.Parser(prog='python -m experiments.throughput.table', description=main.__doc__, allow_abbrev=False)
  p.parse(argv)
  records = [r for path in sorted((FOLDER / 'results').glob('*.jsonl')) for r in log.read_lines(path)]
  readme = FOLDER / 'README.md'
  log.write(readme, insert(readme.read_text(), render(r for r in records if not r['quick'])))
  return 0


if __name__ == '__main__':
  sys.exit(command.run(main))
