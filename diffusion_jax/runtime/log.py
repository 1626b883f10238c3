"""Records: files that are never half-written, lines that are only appended, in a folder or in a bucket."""
import datetime
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np

from diffusion_jax.runtime import paths

PACKAGES = ('diffusion_jax', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')


def write(path: pathlib.Path, data: str | bytes) -> None:
  """Writes a file, or an object in a bucket, whole or not at all."""
  if paths.is_remote(path):
    paths.write(path, data.encode() if isinstance(data, str) else data)
    return
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
  """Appends a JSON line for each record at once; a last line that a killed writer left unfinished stays by itself.

  Objects in a bucket cannot be appended to: there the whole is read and written again, which one writer alone may do.
  """
  lines = ''.join(json.dumps(plain(record)) + '\n' for record in records).encode()
  if paths.is_remote(path):
    paths.write(path, (path.read_bytes() if path.exists() else b'') + lines)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'ab+') as f:
    if f.tell():
      f.seek(-1, os.SEEK_END)
      if f.read(1) != b'\n':
        f.write(b'\n')
    f.write(lines)


def read_lines(path: pathlib.Path) -> list[dict]:
  """The records of a JSON-lines file, without unfinished ones; [] if there is no file."""
  records = []
  if path.exists():
    for line in path.read_bytes().decode('utf-8', 'replace').splitlines():
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
  """The records of a run folder: metrics.jsonl, beside it TensorBoard's event files.

  In a folder each record is written at once. In a bucket, where every write is of a whole file, records wait up to
  FLUSH_SECONDS, and event files are written here and copied there; `flush` does both now, and must be called before
  a checkpoint is written that says that these steps are done.
  """
  FLUSH_SECONDS = 30.0

  def __init__(self, workdir: pathlib.Path):
    import tensorboardX  # a second to import, and only training writes event files
    self.workdir, self.path = workdir, workdir / 'metrics.jsonl'
    self.copied = tempfile.TemporaryDirectory() if paths.is_remote(workdir) else None
    self.waiting, self.since = [], time.monotonic()
    self.events = tensorboardX.SummaryWriter(self.copied.name if self.copied else str(workdir))

  def metrics(self, record: Mapping[str, Any]) -> None:
    """Writes one record; its scalars go to TensorBoard under their names."""
    self.waiting.append(record)
    if not self.copied or time.monotonic() - self.since > self.FLUSH_SECONDS:
      self._write()
    for key, value in record.items():
      if isinstance(value, (int, float)) and key not in ('step', 'images'):
        self.events.add_scalar(key, value, record['step'])

  def image(self, name: str, image: np.ndarray, step: int) -> None:
    """Shows an image uint8 [H, W, C] in TensorBoard."""
    self.events.add_image(name, image, step, dataformats='HWC')

  def flush(self) -> None:
    """Returns when all that was recorded is in the run folder."""
    self._write()
    if self.copied:
      self.events.flush()
      self._copy_events()

  def close(self) -> None:
    """Flushes and closes the event file; once is enough, and twice harms nothing."""
    self._write()
    try:
      self.events.close()
    except OSError:  # the disk is full, say: what matters is in metrics.jsonl
      writer = self.events.file_writer.event_writer
      writer._closed = True  # or it tries again at exit, and prints tracebacks
      if writer._worker.is_alive():
        writer._worker.stop()
    if self.copied:
      self._copy_events()
      self.copied.cleanup()
      self.copied = None

  def _write(self):
    records, self.waiting, self.since = self.waiting, [], time.monotonic()
    if records:
      append(self.path, *records)

  def _copy_events(self):
    for file in pathlib.Path(self.copied.name).iterdir():
      write(self.workdir / file.name, file.read_bytes())
