"""The pictures of several runs side by side: samples to flip through, and denoising behind one slider.

With the standard library alone. Pictures are embedded, so that their number and their size decide how heavy a page is:
each run gets an equal share, and of a picture that needs more, as many of its upper rows are shown as fit. The same
ids are in the same places, so that what is left are the same samples of every run.
"""
import struct
import zlib
from collections.abc import Sequence
from html import escape as text
from pathlib import Path
from typing import NamedTuple

from diffusion_jax import records, svg
from diffusion_jax.records import Run

SAMPLES, DENOISING = 1_750_000, 750_000  # bytes of pictures on a page
LEAST = 32  # pixels that an image in a grid is enlarged to
SIGNATURE = b'\x89PNG\r\n\x1a\n'


def found(run: Run, file: str) -> list[Path]:
  """The files of this name in the folders of samples, the default folder first."""
  return sorted(run.folder.glob(f'samples/*/{file}'), key=lambda path: (path.parent.name != 'final', path))


def previews(run: Run) -> list[Path]:
  """The grids that were made while the run trained, oldest first."""
  return sorted((p for p in run.folder.glob('samples/*.png') if p.stem.isdecimal()), key=lambda p: int(p.stem))


def cell(run: Run) -> tuple[int, int, int] | None:
  """Of an image of the run's data in a grid: height and width with the line beside it, and how thick the line is.

  None where no record says it.
  """
  shape = records.read_json(run.folder / 'data.json').get('shape')
  if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(n, int) and 0 < n < 9999 for n in shape):
    return None
  scale = max(1, LEAST // max(shape[:2]))
  return (shape[0] + 1) * scale, (shape[1] + 1) * scale, scale


def size(data: bytes) -> tuple[int, int] | None:
  """Width and height of a PNG, None of what is none."""
  return struct.unpack('>II', data[16:24]) if data[:8] == SIGNATURE and len(data) > 32 else None


def top(data: bytes, height: int) -> bytes | None:
  """The upper rows of a PNG as a PNG; None if it is broken or its rows are interlaced.

  Rows are stored from the top, and no row needs one below it: the rest is cut off and nothing is decoded.
  """
  depth, kind, _, _, interlaced = data[24:29]
  channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(kind)
  width, full = size(data)
  if interlaced or channels is None or not 0 < height <= full:
    return None
  row, packed, others, at = (width * channels * depth + 7) // 8 + 1, b'', b'', 33
  while at + 12 <= len(data):
    length, name = struct.unpack('>I4s', data[at:at + 8])
    body = data[at + 8:at + 8 + length]
    packed += body * (name == b'IDAT')
    others += chunk(name, body) * (name == b'PLTE')
    at += 12 + length
  try:
    pixels = zlib.decompressobj().decompress(packed, height * row)
  except zlib.error:
    return None
  if len(pixels) != height * row:
    return None
  header = struct.pack('>II', width, height) + data[24:29]
  return SIGNATURE + chunk(b'IHDR', header) + others + chunk(b'IDAT', zlib.compress(pixels, 9)) + chunk(b'IEND', b'')


def chunk(name: bytes, body: bytes) -> bytes:
  """A part of a PNG file."""
  return struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body))


def fitting(pictures: Sequence[tuple[Run, Path]], share: int, at_once: int = 1) -> tuple[list, int]:
  """([(run, path, bytes)], how many rows of images each shows, 0 for all): the same for all, so that they compare.

  `at_once` rows of images belong together. Pictures that do not fit in any way are left out, the last ones first.
  """
  loaded = [(run, path, path.read_bytes()) for run, path in pictures]
  each = share / max(len(loaded), 1)
  if all(len(data) <= each for _, _, data in loaded) or sum(len(data) for _, _, data in loaded) <= share:
    return loaded, 0
  plans = []  # how many rows fit of each that can be cut
  for run, _, data in loaded:
    if cell(run) and size(data):
      rows = -(-size(data)[1] // cell(run)[0])
      plans.append(max(at_once, int(rows * min(1, each / len(data)) * .95) // at_once * at_once))
  rows, kept, spent = min(plans, default=0), [], 0
  for run, path, data in loaded:
    if cell(run) and size(data):
      data = top(data, min(rows * cell(run)[0], size(data)[1])) or data
    if spent + len(data) <= share:
      kept.append((run, path, data))
      spent += len(data)
  return kept, rows


def left_out(pictures: Sequence[tuple[Run, Path]], kept: Sequence[tuple]) -> str:
  """Whose pictures are not shown."""
  there = {run.index for run, *_ in kept}
  names = [run.label for run, _ in pictures if run.index not in there]
  return f'<p class="note">Too large for this page: the pictures of {text(", ".join(names))}.</p>' * bool(names)


def label(run: Run) -> str:
  """The attribute by which the controls of the page name a picture."""
  return f'data-name="{text(run.label)}"'


def abreast(runs: Sequence[Run]) -> list[Run]:
  """The runs by seed and then by name: neighbours differ in what is compared."""
  places = {run.index: i for members in records.groups_of(runs).values() for i, run in enumerate(members)}
  return sorted(runs, key=lambda run: places[run.index])


def samples(runs: Sequence[Run]) -> str:
  """A picture of each run, of the same ids: all of them without a script, two at a time with the page's.

  Pictures made while training stand for runs only where no run has been sampled since: their noise is another.
  """
  sampled = [run for run in abreast(runs) if found(run, 'grid.png')]
  pictures = ([(run, found(run, 'grid.png')[0]) for run in sampled]
              or [(run, previews(run)[-1]) for run in abreast(runs) if previews(run)])
  kept, rows = fitting(pictures, SAMPLES)
  figures = ''
  for run, path, data in kept:
    when = f'samples/{path.parent.name}' if sampled else f'{int(path.stem):,} images'
    picture = svg.picture(path, f'{run.label}: {when}', f'Grid of samples of {run.label}: {when}', 480, data)
    figures += f'<div class="one" {label(run)}>{picture}</div>'
  said = ('The same places hold the same ids: the same noise, where samples were drawn with one --seed'
          f'{f"; rows shown of each grid: {rows}" * bool(rows)}.')
  said += f' Of {len(sampled)} of {len(runs)} runs: of the others none was drawn after training.' * (
      0 < len(sampled) < len(runs))
  return (f'<p class="note">{said}</p><div class="flip" role="group" aria-label="Samples">{figures}</div>' * bool(kept)
          + left_out(pictures, kept))


class Layout(NamedTuple):
  """Of a strip: how many levels and rows of images, and the share of its width and height from one to the next."""
  levels: int
  step: float
  rows: int
  row: float


def layout(run: Run, data: bytes) -> Layout | None:
  """Where the images of a strip are; None where that is not known."""
  if not cell(run) or not size(data):
    return None
  (high, wide, line), (width, height) = cell(run), size(data)
  levels, rest = divmod(width + line, wide)  # the last one has no line
  return Layout(levels, wide / width, (height + line) // high, high / height) if levels > 1 and not rest else None


def denoising(runs: Sequence[Run], share: float = DENOISING) -> str:
  """The levels from noise to data of each run, all moved by one slider; whole strips to scroll without a script.

  Rows of a strip are in pairs, one for each image: the state, and below it what the network takes it for.
  """
  pictures = [(run, path) for run in abreast(runs) for path in found(run, 'strip.png')[:1]]
  kept, _ = fitting(pictures, share, 2)
  figures = ''
  for run, path, data in kept:
    picture = svg.picture(path, run.label, f'Samples of {run.label} on their way from noise to data', 960, data)
    at = layout(run, data)
    told = f' data-levels="{at.levels}" data-step="{100 * at.step:.4f}" data-rows="{at.rows}"' if at else ''
    told += f' data-row="{100 * at.row:.4f}"' if at else ''
    figures += f'<div class="strip"{told} tabindex="0">{picture}</div>'
  said = '<p class="note">Of each image the state, and below it what the network takes it for.</p>'
  return (f'{said}<div class="strips" role="group" aria-label="Denoising">{figures}</div>' * bool(kept)
          + left_out(pictures, kept))
