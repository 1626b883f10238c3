"""Files of torch.save as arrays, without PyTorch and with none of their code run.

Such a file is an archive around a pickle, and a pickle is a program. Here its opcodes are listed by pickletools,
which executes nothing, and the few that describe a dictionary of tensors are interpreted; any other is refused.
"""
import io
import math
import pickletools
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

__all__ = ['MAX_BYTES', 'MAX_TENSORS', 'OTHER_WAY', 'read']
MAX_BYTES = 2 ** 31     # of all arrays in a file
MAX_TENSORS = 10_000
OTHER_WAY = 'use a .pth that holds a state_dict, or a .safetensors'
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
    'FloatStorage': '<f4', 'DoubleStorage': '<f8', 'HalfStorage': '<f2', 'BFloat16Storage': ml_dtypes.bfloat16,
    'LongStorage': '<i8', 'IntStorage': '<i4', 'ShortStorage': '<i2', 'CharStorage': 'i1', 'ByteStorage': 'u1',
    'BoolStorage': '?'}
ALLOWED = {'collections OrderedDict', 'torch._utils _rebuild_tensor', 'torch._utils _rebuild_tensor_v2',
           'torch._utils _rebuild_parameter', *(f'torch {name}' for name in STORAGES)}
CONSTANTS = {'NONE', 'NEWTRUE', 'NEWFALSE', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE',
             'SHORT_BINUNICODE', 'BINSTRING', 'SHORT_BINSTRING'}


class Storage(NamedTuple):
  """Numbers in a file, of which tensors are views."""
  key: str
  dtype: np.dtype
  size: int


class Tensor(NamedTuple):
  """A view of a storage: counts of elements, not of bytes."""
  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]


class Global(str):
  """The name of something in Python, 'module name'. It is compared, never looked up."""


def read(data: bytes) -> dict[str, np.ndarray]:
  """The arrays by name in what torch.save wrote for a state_dict: the zip format or the one before PyTorch 1.6.

  Raises ValueError for anything else: damaged, claiming more than it holds, of big-endian numbers, with code.
  """
  if data[:4] == b'PK\3\4':
    return _read_zip(data)
  file = io.BytesIO(data)
  if LEGACY_MAGIC.to_bytes(10, 'little') not in data[:32] or _load(file) != LEGACY_MAGIC:
    raise ValueError(f'this is no file of torch.save (a bare pickle is not read, since it runs code): {OTHER_WAY}')
  if (protocol := _load(file)) != 1001:
    raise ValueError(f'the protocol of the format before PyTorch 1.6 is 1001, this file has {_shown(protocol)}')
  system = _load(file)
  if not isinstance(system, dict) or system.get('little_endian') is not True:
    raise ValueError('the numbers are not marked as little-endian: save the file again on a little-endian machine')
  tensors, storages = _state_dict(_load(file))
  keys, found = _load(file), {}
  if not isinstance(keys, list) or any(type(key) is not str for key in keys) or sorted(keys) != sorted(storages):
    raise ValueError('the list of storages is not that of the storages which the tensors use')
  for storage in (storages[key] for key in keys):
    nbytes = storage.size * storage.dtype.itemsize
    start = file.tell() + 8
    size = int.from_bytes(file.read(8), 'little', signed=True)
    if size != storage.size or start + nbytes > len(data):
      raise ValueError(f'storage {storage.key!r} should have {storage.size} elements, and its header says {size} with '
                       f'{max(0, len(data) - start)} bytes left in the file: it is damaged')
    found[storage.key] = memoryview(data)[start:start + nbytes]
    file.seek(start + nbytes)
  return _arrays(tensors, found)


def _read_zip(data: bytes) -> dict[str, np.ndarray]:
  try:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
      infos = {info.filename: info for info in archive.infolist()}
      roots = [name.removesuffix('data.pkl') for name in infos if name.split('/')[-1] == 'data.pkl']
      if len(roots) != 1:
        raise ValueError(f'a file of torch.save has one data.pkl, this archive {len(roots)}: {OTHER_WAY}')
      if any(name == f'{roots[0]}constants.pkl' or name.startswith(f'{roots[0]}code/') for name in infos):
        raise ValueError(f'a TorchScript archive holds code: save its state_dict() with torch.save, or {OTHER_WAY}')
      # PyTorch never compresses; then the entries of an honest archive are no larger than it.
      if any(i.compress_type != zipfile.ZIP_STORED or i.compress_size != i.file_size for i in infos.values()):
        raise ValueError('torch.save does not compress, and this archive has compressed entries: it is not read')
      if (total := sum(info.file_size for info in infos.values())) > len(data):
        raise ValueError(f'the archive claims {total} bytes and has {len(data)}: it is damaged')
      if f'{roots[0]}byteorder' in infos and archive.read(f'{roots[0]}byteorder') != b'little':
        raise ValueError('the numbers are not little-endian: save the file again on a little-endian machine')
      tensors, storages = _state_dict(_load(io.BytesIO(archive.read(f'{roots[0]}data.pkl'))))
      found = {}
      for key, storage in storages.items():
        if (name := f'{roots[0]}data/{key}') not in infos:
          raise ValueError(f'the archive has no entry {name!r}: it is damaged')
        expected, got = storage.size * storage.dtype.itemsize, infos[name].file_size
        if expected != got:
          raise ValueError(f'storage {key!r} should have {expected} bytes and has {got}: the file is damaged')
        found[key] = archive.read(name)
      return _arrays(tensors, found)
  except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, OverflowError) as error:
    raise ValueError(f'the archive cannot be read ({error}): it is damaged, get it again') from None


def _load(file: io.BytesIO) -> Any:
  """The object that the pickle at the file's position describes, of dictionaries, lists, tuples, constants, Tensors.

  The keys of dictionaries are texts and integers; nothing else is hashed, compared or shown, so nested references
  cannot make this slow.
  """
  stack, marks, memo, count = [], [], {}, 0

  def above_mark():
    nonlocal stack
    items, stack = stack, marks.pop()
    return items

  def pop(kind):
    if not isinstance(value := stack.pop(), kind):
      raise ValueError(f'a {kind.__name__} should be where the pickle has {_shown(value)}')
    return value

  try:
    for opcode, argument, _ in pickletools.genops(file):
      name, count = opcode.name, count + 1
      if count > 100 * MAX_TENSORS:
        raise ValueError(f'the pickle has more than {100 * MAX_TENSORS} operations, no list of tensors needs as many')
      if name in CONSTANTS:
        stack.append({'NEWTRUE': True, 'NEWFALSE': False}.get(name, argument))
      elif name in ('BINPUT', 'LONG_BINPUT', 'MEMOIZE'):
        memo[len(memo) if name == 'MEMOIZE' else argument] = stack[-1]
      elif name in ('BINGET', 'LONG_BINGET'):
        stack.append(memo[argument])
      elif name == 'MARK':
        marks.append(stack)
        stack = []
      elif name in ('EMPTY_DICT', 'EMPTY_LIST', 'EMPTY_TUPLE'):
        stack.append({'EMPTY_DICT': dict, 'EMPTY_LIST': list, 'EMPTY_TUPLE': tuple}[name]())
      elif name == 'TUPLE':
        items = above_mark()
        stack.append(tuple(items))
      elif name in ('TUPLE1', 'TUPLE2', 'TUPLE3'):
        stack.append(tuple([stack.pop() for _ in range(int(name[-1]))][::-1]))
      elif name in ('APPEND', 'APPENDS'):
        items = above_mark() if name == 'APPENDS' else [stack.pop()]
        target = pop(list)
        target.extend(items)
        stack.append(target)
      elif name in ('SETITEM', 'SETITEMS'):
        items = above_mark() if name == 'SETITEMS' else [stack.pop(), stack.pop()][::-1]
        target = pop(dict)
        if any(type(key) not in (str, int) for key in items[::2]):
          raise ValueError('a dictionary has keys that are neither texts nor integers')
        target.update(zip(items[::2], items[1::2], strict=True))
        stack.append(target)
      elif name in ('GLOBAL', 'STACK_GLOBAL'):
        if name == 'STACK_GLOBAL':
          argument = ' '.join([pop(str), pop(str)][::-1])
        if argument not in ALLOWED:
          raise ValueError(f'it asks for {argument[:100]!r}, which no list of tensors needs, and might run it: '
                           f'do not open this file, {OTHER_WAY} from a source that you trust')
        stack.append(Global(argument))
      elif name == 'BINPERSID':
        stack.append(_storage(pop(tuple)))
      elif name == 'REDUCE':
        arguments = pop(tuple)
        stack.append(_rebuilt(pop(Global), arguments))
      elif name == 'BUILD':  # the _metadata of a state_dict, which is not needed
        stack.pop()
        stack.append(pop(dict))
      elif name == 'STOP':
        return stack.pop()
      elif name not in ('PROTO', 'FRAME'):
        raise ValueError(f'its pickle has the operation {name}, which no list of tensors needs: {OTHER_WAY}')
  except (IndexError, KeyError) as error:  # an empty stack, an unknown note
    raise ValueError(f'its pickle is damaged ({error!r})') from None


def _shown(value: Any) -> str:
  return str(value) if type(value) in (int, bool) else type(value).__name__


def _storage(reference: tuple) -> Storage:
  kinds = [type(value) for value in reference[:5]]
  # A sixth element that is not None would make the storage a part of another one.
  if kinds != [str, Global, str, str, int] or reference[0] != 'storage' or any(x is not None for x in reference[5:]):
    raise ValueError('a reference to a storage is not of the form that torch.save writes')
  kind, size = reference[1].removeprefix('torch '), reference[4]
  if kind not in STORAGES or not 0 <= size <= MAX_BYTES:
    raise ValueError(f'storage {reference[2]!r} of kind {kind!r} and {size} elements is none that can be read')
  return Storage(reference[2], np.dtype(STORAGES[kind]), size)


def _rebuilt(function: Global, arguments: tuple) -> Any:
  """What the call of one of the ALLOWED would give: a dictionary or a Tensor. Nothing is called."""
  name = function.split()[1]
  if name == 'OrderedDict' and not arguments:
    return {}
  if name == '_rebuild_parameter' and arguments and isinstance(arguments[0], Tensor):
    return arguments[0]
  if name not in ('_rebuild_tensor', '_rebuild_tensor_v2') or (
      [type(argument) for argument in arguments[:4]] != [Storage, int, tuple, tuple]):
    raise ValueError(f'{function!r} is used in a way in which torch.save does not use it')
  storage, offset, shape, strides = arguments[:4]
  if len(shape) != len(strides) or len(shape) > 32 or any(type(n) is not int for n in (*shape, *strides)):
    raise ValueError('a tensor has a shape and strides that do not belong together')
  if min((offset, *shape, *strides)) < 0 or max((offset, *shape, *strides)) > MAX_BYTES:
    raise ValueError(f'a tensor of storage {storage.key!r} has an offset, shape or stride outside [0, {MAX_BYTES}]')
  last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
  if math.prod(shape) and (last >= storage.size or math.prod(shape) > storage.size):
    raise ValueError(f'a tensor of shape {shape} and strides {strides} from element {offset} needs {last + 1} elements '
                     f'or repeats some, its storage has {storage.size}')
  return Tensor(storage, offset, shape, strides)


def _state_dict(value: Any) -> tuple[dict[str, Tensor], dict[str, Storage]]:
  """The tensors by name and the storages by key."""
  if not isinstance(value, dict) or not value:
    raise ValueError(f'a dictionary of tensors is read, this file holds {_shown(value)}: save a state_dict() alone')
  if len(value) > MAX_TENSORS:
    raise ValueError(f'at most {MAX_TENSORS} tensors are read, this file holds {len(value)}')
  storages = {}
  for name, tensor in value.items():
    if type(name) is not str or not isinstance(tensor, Tensor):
      raise ValueError(f'entry {name!r} is of type {_shown(tensor)}, no tensor by name: save a state_dict() alone')
    if storages.setdefault(tensor.storage.key, tensor.storage) != tensor.storage:
      raise ValueError(f'storage {tensor.storage.key!r} has two types or sizes: the file is damaged')
  total = sum(math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in value.values())
  if total > MAX_BYTES:
    raise ValueError(f'its tensors would take {total} bytes, at most {MAX_BYTES} are read')
  return value, storages


def _arrays(tensors: dict[str, Tensor], storages: dict[str, Any]) -> dict[str, np.ndarray]:
  """Every tensor as an array of its own, in C order."""
  arrays = {}
  for name, (storage, offset, shape, strides) in tensors.items():
    itemsize, array = storage.dtype.itemsize, np.zeros(shape, storage.dtype)
    if array.size:
      steps = [itemsize * stride for stride in strides]  # ndarray checks once more that the view lies in the buffer
      array[...] = np.ndarray(shape, storage.dtype, storages[storage.key], itemsize * offset, steps)
    arrays[name] = array
  return arrays
