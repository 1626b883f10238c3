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
  """'1.46x (1.41 to 1.52)', or the share of an overhead."""
  low, high = r['interval']
  if r['share_percent'] is None:
    return f'{r["ratio"]:.2f}x ({low:.2f} to {high:.2f})'
  return f'{r["share_percent"]:.1f} % ({100 * (1 - high):.1f} to {100 * (1 - low):.1f})'


def newest(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
  """The last record of each case on each device, in the order of CASES."""
  last = {(r['device'], r['case']): r for r in sorted(records, key=lambda r: r['time']) if r['case'] in CASES}
  return [last[key] for key in sorted(last, key=lambda key: (key[0], list(CASES).index(key[1])))]


def render(records: Iterable[dict[str, Any]]) -> str:
  """The newest records in Markdown, a table for each device."""
  lines, device = [], None
  for r in newest(records):
    if r['device'] != device:
      device = r['device']
      lines += [''] * bool(lines) + [
          device, '', '| case | baseline ms | ours ms | result (95 % interval) | verdict | CPU ms, baseline / ours | '
                      'compile s | peak MiB, baseline / ours |', '|---|---|---|---|---|---|---|---|']
    a, b = r['sides'].values()
    cpu = ' / '.join(f'{s["cpu_ms"]:.0f}' if s['cpu_ms'] is not None else '-' for s in (a, b))
    peak = ' / '.join(f'{s["peak_bytes"] / 2 ** 20:.0f}' for s in (a, b))
    cells = [r['about'], f'{a["median_ms"]:.1f}', f'{b["median_ms"]:.1f}', result(r), r['verdict'], cpu,
             f'{max(a["compile_seconds"], b["compile_seconds"]):.1f}', peak]
    lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines) + '\n'


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
