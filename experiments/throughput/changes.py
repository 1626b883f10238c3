"""The log of changes to fast paths: what was expected of each before, what it gave, and whether it stayed."""
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from diffusion_jax.runtime import log
from diffusion_jax.runtime.config import UserError

NAME = 'changes.jsonl'
# prediction: made before, with its source, or 'none recorded'; before, after: with their unit, or 'not measured';
# kept: yes, no, or what took its place; revision: of the change.
FIELDS = ('date', 'what', 'case', 'prediction', 'before', 'after', 'kept', 'revision')


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of a log; UserError for one that lacks a field, or has another."""
  found = log.read_lines(path)
  for number, line in enumerate(found, 1):
    if sorted(line) != sorted(FIELDS) or not all(isinstance(text, str) and text.strip() for text in line.values()):
      raise UserError(f'{path}: line {number} must have a text for each of {", ".join(FIELDS)} and nothing else, got '
                      f'{", ".join(f"{k}={v!r}" for k, v in line.items())}')
  return found


def render(lines: Iterable[Mapping[str, Any]]) -> str:
  """A table in Markdown, in the order of their dates."""
  rows = [f'| {" | ".join(line[field] for field in FIELDS)} |' for line in sorted(lines, key=lambda line: line['date'])]
  return '\n'.join([f'| {" | ".join(FIELDS)} |', f'|{"---|" * len(FIELDS)}', *rows]) + '\n'
