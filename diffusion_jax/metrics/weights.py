"""Other people's weight files: found, downloaded, checked, and read as arrays, with none of their code run."""
import contextlib
import hashlib
import http.client
import math
import os
import pathlib
import urllib.parse
import urllib.request
import uuid
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from diffusion_jax.metrics import torch_files

__all__ = ['FID_INCEPTION', 'cache', 'check', 'download', 'fetch', 'find', 'keep', 'read', 'sha256']
MAX_SPLAT = 2 ** 16     # elements of a TensorFlow constant that is stored as one number
# TensorFlow's DataType: NumPy's type, the field of TensorProto with its values, the wire type of one such value.
TENSORFLOW = {1: ('<f4', 5, 5), 2: ('<f8', 6, 1), 3: ('<i4', 7, 0), 9: ('<i8', 10, 0)}


class Known(NamedTuple):
  """A public file: the names under which it is found, what it must hold, and where it is."""
  names: tuple[str, ...]
  digest: str                     # SHA-256
  size: int                       # bytes
  url: str


FID_INCEPTION = Known(
    ('pt_inception-2015-12-05-6726825d.pth', 'weights-inception-2015-12-05-6726825d.pth'),
    '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2', 95_628_359,
    'https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth')


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """The arrays of a weight file by name, without running anything in it.

  Formats: .pth, .pt and .bin (a state_dict from torch.save, either the zip format or the one before PyTorch 1.6),
  .pb (the numeric constants of a frozen TensorFlow graph), .safetensors. At most 2 GiB and 10,000 tensors.

  Raises OSError if the file cannot be read, and ValueError for a file that is damaged, that claims more than it
  holds, or that asks for code to be run.
  """
  path = pathlib.Path(path)
  if path.suffix == '.pkl':
    raise ValueError(f'{path}: a pickle runs code when it is opened, so it is not read: {torch_files.OTHER_WAY}')
  readers = {'.pth': torch_files.read, '.pt': torch_files.read, '.bin': torch_files.read, '.pb': _read_graph,
             '.safetensors': _read_safetensors}
  if path.suffix not in readers:
    raise ValueError(f"{path}: weights are read from {', '.join(readers)}, not from {path.suffix or 'no suffix'!r}")
  if (size := path.stat().st_size) > torch_files.MAX_BYTES:
    raise ValueError(f'{path}: weight files of at most {torch_files.MAX_BYTES} bytes are read, this one has {size}')
  data = path.read_bytes()
  try:
    with warnings.catch_warnings(action='ignore'):  # pickletools warns of odd texts
      return readers[path.suffix](data)
  except ValueError as error:
    raise ValueError(f'{path}: {str(error)[:600]}') from None  # names in the file may be long


def sha256(path: str | os.PathLike) -> str:
  """The SHA-256 of a file, in hexadecimal."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def check(path: str | os.PathLike, digest: str, size: int) -> None:
  """Raises ValueError unless the file has this SHA-256 and this size in bytes."""
  if (found := os.stat(path).st_size) != size:
    raise ValueError(f'{path} should have {size} bytes and has {found}: delete it and get it again')
  if (found := sha256(path)) != digest:
    raise ValueError(f'{path} should have SHA-256 {digest} and has {found}: delete it and get it again')


def cache() -> pathlib.Path:
  """The folder for downloaded files: $DIFFUSION_JAX_CACHE, else ~/.cache/diffusion_jax. It may not exist yet."""
  return pathlib.Path(os.environ.get('DIFFUSION_JAX_CACHE') or '~/.cache/diffusion_jax').expanduser()


def find(name: str = '') -> pathlib.Path:
  """The weight file of the FID Inception: `name` if it is not empty, else the one in the cache, which is checked.

  Raises FileNotFoundError that says what to do if there is none, and ValueError if the cached one is damaged.
  """
  if name:
    if not (path := pathlib.Path(name).expanduser()).is_file():
      raise FileNotFoundError(f'there is no weight file {path}')
    return path
  for path in (cache() / known for known in FID_INCEPTION.names):
    if path.is_file():
      check(path, FID_INCEPTION.digest, FID_INCEPTION.size)
      return path
  raise FileNotFoundError(
      f'the weights of the FID Inception are not in {cache()}: download {FID_INCEPTION.url} into that folder, '
      f'name a file that you have (inception:FILE), or use features that need none: digits, cifar or pixels')


def fetch(name: str = '') -> pathlib.Path:
  """As `find`, but what is not in the cache is downloaded into it, with a line that says so.

  Raises FileNotFoundError that says what to do if it cannot be had.
  """
  try:
    return find(name)
  except FileNotFoundError as missing:
    if name:
      raise
    known = FID_INCEPTION
    print(f'fetching {known.url} ({known.size / 2 ** 20:.0f} MiB) into {cache()}')
    try:
      return download(known.url, cache() / known.names[0], known.digest, known.size)
    except (OSError, ValueError) as error:
      raise FileNotFoundError(f'{missing} ({error})') from error


def keep(path: pathlib.Path, data: bytes) -> None:
  """Keeps a file in the cache, whole or not at all; a cache that cannot be written is done without."""
  partial = path.with_name(f'.{uuid.uuid4().hex}.partial')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(data)
    os.replace(partial, path)
  except OSError as error:
    warnings.warn(f'{path} cannot be kept, so it will be made again ({error})', stacklevel=2)
  finally:
    with contextlib.suppress(OSError):
      partial.unlink(missing_ok=True)


def download(url: str, path: str | os.PathLike, digest: str, size: int) -> pathlib.Path:
  """Fetches a file of known SHA-256 and size over https, http or from a file:// address; `path` is made whole.

  Raises OSError if the transfer fails and ValueError if the content is another one; neither leaves anything behind.
  """
  if (scheme := urllib.parse.urlsplit(url).scheme) not in ('https', 'http', 'file'):
    raise ValueError(f'downloads are over https, http or file, not {scheme!r}: {url}')
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f'.{uuid.uuid4().hex}.partial')
  try:
    with open(partial, 'xb') as file, urllib.request.urlopen(url, timeout=60) as response:
      received, digester = 0, hashlib.sha256()
      while chunk := response.read(min(2 ** 20, size + 1 - received)):  # one byte too many shows that it is another
        received += len(chunk)
        digester.update(chunk)
        file.write(chunk)
    if received != size:
      amount = f'more than {size}' if received > size else received
      raise ValueError(f'{url} should give {size} bytes and gave {amount}: try again, or get the file another way')
    if digester.hexdigest() != digest:
      raise ValueError(f'{url} should give SHA-256 {digest} and gave {digester.hexdigest()}: it is not this file')
    os.replace(partial, path)
  except http.client.HTTPException as error:
    raise OSError(f'{url} could not be read: {error!r}') from error
  finally:
    partial.unlink(missing_ok=True)  # also when interrupted by the keyboard; gone already if all is well
  return path


def _read_safetensors(data: bytes) -> dict[str, np.ndarray]:
  try:
    return safetensors.numpy.load(data)
  except (safetensors.SafetensorError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f'no safetensors file that NumPy can hold ({error!r})') from None


def _read_graph(data: bytes) -> dict[str, np.ndarray]:
  """The numeric Const nodes of a GraphDef (field numbers: tensorflow/core/framework/*.proto)."""
  arrays, total = {}, 0
  for field, wire, node in _fields(memoryview(data)):
    if field != 1 or wire != 2 or _message(node, 2) != b'Const':
      continue
    name = bytes(_message(node, 1)).decode()
    for number, wire, entry in _fields(node):
      if number != 5 or wire != 2 or _message(entry, 1) != b'value':
        continue
      tensor = _message(_message(entry, 2), 8)
      if _message(tensor, 1, 0) not in TENSORFLOW:  # texts and other things that are no weights
        continue
      dtype, shape, values = _tensor(name, tensor)
      total += math.prod(shape) * dtype.itemsize
      if total > torch_files.MAX_BYTES or len(arrays) >= torch_files.MAX_TENSORS:
        raise ValueError(f'at most {torch_files.MAX_TENSORS} constants of {torch_files.MAX_BYTES} bytes are read, '
                         f'constant {name!r} is number {len(arrays) + 1} and makes it {total} bytes')
      arrays[name] = np.full(shape, values[0], dtype) if values.size == 1 else values.reshape(shape).copy()
  if not arrays:
    raise ValueError('it has no constants: this is no frozen TensorFlow graph')
  return arrays


def _tensor(name: str, tensor: memoryview) -> tuple[np.dtype, tuple[int, ...], np.ndarray]:
  """Type, shape and values of a TensorProto: as many values as the shape needs, or one for all its elements."""
  kind, number, width = TENSORFLOW[_message(tensor, 1, 0)]
  dtype, content = np.dtype(kind), _message(tensor, 4)
  shape = tuple(_message(dim, 1, 0) for field, wire, dim in _fields(_message(tensor, 2)) if (field, wire) == (2, 2))
  if len(shape) > 32 or max(shape, default=0) > torch_files.MAX_BYTES:
    raise ValueError(f'constant {name!r} has {len(shape)} dimensions of up to {max(shape)}: the file is damaged')
  count = math.prod(shape)
  if len(content):
    values = np.frombuffer(content, dtype)
  elif width:
    parts = [value for field, wire, value in _fields(tensor) if field == number and wire in (2, width)]
    values = np.frombuffer(b''.join(parts), dtype)
  else:
    parts = []
    for field, wire, value in _fields(tensor):
      if (field, wire) == (number, 0):
        parts.append(value)
      elif (field, wire) == (number, 2):
        at = 0
        while at < len(value):
          found, at = _varint(value, at)
          parts.append(found)
    values = np.asarray(parts, np.uint64).astype(dtype)  # two's complement: the low bits are the number
  if values.size != count and (values.size != 1 or count > MAX_SPLAT):
    raise ValueError(f'constant {name!r} of shape {shape} needs {count} values and has {values.size}')
  return dtype, shape, values


def _varint(data: memoryview, at: int) -> tuple[int, int]:
  """The number at this position, and the position after it."""
  value = 0
  for i, byte in enumerate(data[at:at + 10]):
    value |= (byte & 127) << (7 * i)
    if byte < 128:
      return value & (2 ** 64 - 1), at + i + 1
  raise ValueError('a number in the protobuf message has no end: the file is cut or no protobuf')


def _fields(data: memoryview) -> Iterator[tuple[int, int, Any]]:
  """The fields of a protobuf message: (number, wire type, value), the value an integer or bytes."""
  at = 0
  while at < len(data):
    key, at = _varint(data, at)
    number, wire = divmod(key, 8)
    if wire == 0:
      size, value, at = 0, *_varint(data, at)
    elif wire == 2:
      size, at = _varint(data, at)
    else:
      size = {1: 8, 5: 4}.get(wire, len(data))  # the others do not exist in files of today
    if number == 0 or at + size > len(data):
      raise ValueError(f'field {number} of wire type {wire} with {size} bytes does not fit in the {len(data) - at} '
                       'that are left: the file is cut or no protobuf')
    yield number, wire, value if wire == 0 else data[at:at + size]
    at += size


def _message(data: memoryview, number: int, default: Any = b'') -> Any:
  """The last field of this number and of the kind of `default`."""
  for field, wire, value in _fields(data):
    if field == number and (wire == 0) == isinstance(default, int):
      default = value
  return default
