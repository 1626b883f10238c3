"""COMMAND: makes the average of any length after training, from snapshots of the few that were tracked.

Training keeps RUN/snapshots/NAME-IMAGES.safetensors of every average that is a `power_function`; two of them, of std
0.05 and 0.1, and a few dozen snapshots are enough for any std between about 0.015 and 0.25 (Karras et al. 2024,
section 3).
"""
import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from diffusion_jax.core import ema
from diffusion_jax.runtime import command, snapshots
from diffusion_jax.runtime.config import Config, UserError, public_name
from diffusion_jax.runtime.state import named_leaves


@dataclasses.dataclass(frozen=True)
class Tracked:
  """A snapshot of a tracked average, still on disk."""
  path: pathlib.Path
  std: float
  images: int


def save_snapshot(workdir: pathlib.Path, config: Config, emas: dict[str, Any], images: int) -> None:
  """Writes the averages of `emas` {name: params} that are power functions by `config.ema`; nothing without any.

  Every process must call it; the first one writes.
  """
  for name, average in emas.items():
    if config.ema[name].fn == public_name(ema.power_function):
      arrays = {key: snapshots.on_host(leaf) for key, leaf in named_leaves(average)}
      if jax.process_index() == 0:
        snapshots.write(workdir / 'snapshots' / f'{name}-{images}.safetensors', arrays,
                        {'std': config.ema[name].std, 'images': images})


def load_snapshots(workdir: pathlib.Path) -> list[Tracked]:
  """The snapshots of a run, oldest first; UserError if one is damaged."""
  found = []
  for path in (pathlib.Path(workdir) / 'snapshots').glob('*.safetensors'):
    about = snapshots.Snapshot(path).about
    try:
      found.append(Tracked(path, float(about['std']), int(about['images'])))
    except (KeyError, ValueError) as e:
      raise UserError(f'{str(path)!r} is not a snapshot that training wrote: it lacks its std and images') from e
  return sorted(found, key=lambda s: (s.images, s.std, s.path))


def reconstruct(tracked: Sequence[Tracked], images: int, std: float) -> tuple[Iterator[tuple[str, np.ndarray]], float]:
  """((name, array) one after another of the average of width std at `images`, error of its weights).

  Snapshots after `images` are left out. Raises ValueError for fewer than 2 snapshots or a std outside (0, 0.2887), and
  UserError for snapshots of different models.
  """
  past = [s for s in tracked if s.images <= images]
  shares, error = ema.reconstruction([s.images for s in past], [s.std for s in past], images, std)
  files = [snapshots.Snapshot(s.path) for s in past]
  for file in files[1:]:
    if file.shapes != files[0].shapes:
      raise UserError(f'{str(file.path)!r} holds other arrays than {str(files[0].path)!r}: '
                      f'remove those of another run')

  def mixed():
    for name in files[0].shapes:
      first = files[0][name]
      total = np.zeros(first.shape)  # in float64: large shares of both signs cancel
      for share, file in zip(shares, files, strict=True):
        total += share * file[name]
      yield name, total.astype(first.dtype)

  return mixed(), error


def main(argv: Sequence[str] | None = None) -> int:
  """`diffusion-jax posthoc_ema`: see --help."""
  p = command.parser('posthoc_ema', 'Makes an average of any length from the snapshots that training kept.')
  p.add_argument('--workdir', required=True, help='the run folder that train wrote')
  p.add_argument('--std', required=True, type=float, help='relative width of the average, such as 0.05')
  p.add_argument('--images', type=int, help='after how many images; default: those of the last snapshot')
  p.add_argument('--out', help='default: WORKDIR/posthoc/STD-IMAGES.safetensors')
  flags, overrides = p.parse(argv)
  if overrides:
    raise UserError(f'posthoc_ema takes its config from the run folder: --config.{next(iter(overrides))} is for train')
  workdir = pathlib.Path(flags.workdir)
  if not workdir.is_dir():
    raise UserError(f'there is no run folder {flags.workdir!r}')
  tracked = load_snapshots(workdir)
  times = sorted({s.images for s in tracked})
  images = flags.images if flags.images is not None else times[-1] if times else 0
  if times and images not in times:
    raise UserError(f'there is no snapshot at {images} images: the nearest of {len(times)} is at '
                    f'{min(times, key=lambda t: abs(t - images))}')
  try:
    arrays, error = reconstruct(tracked, images, flags.std)
  except ValueError as e:
    raise UserError(f'{e}' if len(tracked) > 1 else f'{e}: train with averages such as spec(ema.power_function, '
                    f"std=0.05), which leave theirs in {str(workdir / 'snapshots')!r}") from e
  out = pathlib.Path(flags.out or workdir / 'posthoc' / f'{flags.std:g}-{images}.safetensors')
  snapshots.write(out, dict(arrays), {'std': flags.std, 'images': images})
  used = sum(s.images <= images for s in tracked)
  print(f'std {flags.std:g} at {images:,} images from {used} snapshots, weights right to {100 * error:.2g} % -> {out}')
  return 0


if __name__ == '__main__':
  sys.exit(command.run(main))
