"""Records: files that are never half-written, lines that are only appended, and the line that shows progress."""
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np

PACKAGES = ('diffusion_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def write(path: pathlib.Path, data: str | bytes) -> None:
  """Writes a file whole or not at all."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, name = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
  try:
    with os.fdopen(handle, 'wb') as f:
      f.write(data.encode() if isinstance(data, str) else data)
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(name, 0o666 & ~umask)  # mkstemp is private to its owner; a record need not be
    os.replace(name, path)
  except BaseException:
    pathlib.Path(name).unlink(missing_ok=True)
    raise


def write_json(path: pathlib.Path, value: Any) -> None:
  """Writes a JSON file whole or not at all; numbers that are not finite become null."""
  write(path, json.dumps(plain(value), indent=1) + '\n')


def append(path: pathlib.Path, *records: Mapping[str, Any]) -> None:
  """Appends a JSON line for each record at once; a last line that a killed writer left unfinished stays by itself."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'ab+') as f:
    if f.tell():
      f.seek(-1, os.SEEK_END)
      if f.read(1) != b'\n':
        f.write(b'\n')
    f.write(''.join(json.dumps(plain(record)) + '\n' for record in records).encode())


def read_lines(path: pathlib.Path) -> list[dict]:
  """The records of a JSON-lines file, without unfinished ones; [] if there is no file."""
  records = []
  if path.exists():
    for line in path.read_text('utf-8', 'replace').splitlines():
      try:
        records.append(json.loads(line))
      except ValueError:
        continue
  return [r for r in records if isinstance(r, dict)]


def plain(value: Any) -> Any:
  """Arrays, tuples and numpy scalars as what JSON knows; numbers that are not finite as None."""
  if isinstance(value, Mapping):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(v) for v in value]
  if hasattr(value, 'tolist'):
    return plain(np.asarray(value).tolist())
  return None if isinstance(value, float) and not np.isfinite(value) else value


def now() -> str:
  """The time, in UTC to the second, as ISO 8601."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def provenance() -> dict[str, Any]:
  """How a number was made: device, versions, git revision."""
  return {'device': device(), 'versions': versions(), 'git_revision': git_revision()}


def device() -> str:
  """'cpu x2', 'NVIDIA H200 x1'."""
  devices = jax.devices()
  return f'{devices[0].device_kind} x{len(devices)}'


def versions() -> dict[str, str]:
  """The versions of Python and of the packages that a result depends on."""
  found = {'python': sys.version.split()[0]}
  for name in PACKAGES:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return found


def git_revision() -> str:
  """The revision of the checkout this code lies in, with '+' if files are changed; '' outside a checkout."""
  folder = pathlib.Path(__file__).parent
  git = lambda *words: subprocess.run(['git', '-C', str(folder), *words], capture_output=True, text=True, check=True,
                                      timeout=10).stdout.strip()
  try:
    return git('rev-parse', '--short=12', 'HEAD') + ('+' if git('status', '--porcelain', '-uno') else '')
  except (OSError, subprocess.SubprocessError):
    return ''


class Run:
  """The records of a run folder: metrics.jsonl, beside it TensorBoard's event files."""

  def __init__(self, workdir: pathlib.Path):
    import tensorboardX  # a second to import, and only training writes event files
    self.path = workdir / 'metrics.jsonl'
    self.events = tensorboardX.SummaryWriter(str(workdir))

  def metrics(self, record: Mapping[str, Any]) -> None:
    """Writes one record; its scalars go to TensorBoard under their names."""
    append(self.path, record)
    for key, value in record.items():
      if isinstance(value, (int, float)) and key not in ('step', 'images'):
        self.events.add_scalar(key, value, record['step'])

  def image(self, name: str, image: np.ndarray, step: int) -> None:
    """Shows an image uint8 [H, W, C] in TensorBoard."""
    self.events.add_image(name, image, step, dataformats='HWC')

  def close(self) -> None:
    """Flushes and closes the event file."""
    self.events.close()
