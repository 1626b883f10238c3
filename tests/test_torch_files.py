"""Files of PyTorch, made by hand, and hostile ones: whatever a file holds, nothing in it runs."""
import contextlib
import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusion_jax.metrics import torch_files, weights

MAGIC = b'\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.'
FORMATS = ('zip', 'legacy')
both_formats = pytest.mark.parametrize('layout', FORMATS)
STORAGES = {'0': ('Float', np.arange(12, dtype='<f4')), '1': ('Half', np.arange(4, dtype='<f2') / 4),
            '2': ('Long', np.asarray([-7], '<i8')), '3': ('Float', np.zeros(0, '<f4'))}


# The opcodes of a pickle as they are in a file of torch.save.

def text(value):
  return b'X' + struct.pack('<I', len(value.encode())) + value.encode()


def number(value):
  if value is None or isinstance(value, bool):
    return {None: b'N', True: b'\x88', False: b'\x89'}[value]
  data = value.to_bytes(12, 'little', signed=True)
  return b'\x8a' + bytes([len(data)]) + data


a_tuple = lambda *items: b'(' + b''.join(items) + b't'
named = lambda module, name: f'c{module}\n{name}\n'.encode()


def a_storage(key, kind, size, *more):
  return a_tuple(text('storage'), named('torch', f'{kind}Storage'), text(key), text('cpu'), number(size), *more) + b'Q'


ORDERED = named('collections', 'OrderedDict') + b')R'


def tensor(key, offset=0, shape=(), strides=(), kind=None, size=None, storages=STORAGES):
  kind, size = kind or storages[key][0], storages[key][1].size if size is None else size
  arguments = [a_storage(key, kind, size), number(offset), a_tuple(*map(number, shape)),
               a_tuple(*map(number, strides)), number(False), ORDERED]
  return named('torch._utils', '_rebuild_tensor_v2') + a_tuple(*arguments) + b'R'


def old_tensor(key, offset, shape, strides):
  arguments = [a_storage(key, STORAGES[key][0], STORAGES[key][1].size, number(None)), number(offset),
               a_tuple(*map(number, shape)), a_tuple(*map(number, strides))]
  return named('torch._utils', '_rebuild_tensor') + a_tuple(*arguments) + b'R'


def parameter(inside):
  return named('torch._utils', '_rebuild_parameter') + a_tuple(inside, number(True), ORDERED) + b'R'


def a_dict(entries):
  return b'}(' + b''.join(text(key) + value for key, value in entries.items()) + b'u'


def state_dict(entries):
  """With _metadata, as Module.state_dict() gives it."""
  return b'\x80\x02' + ORDERED + b'q\x00' + a_dict(entries)[1:] + a_dict({'_metadata': ORDERED}) + b'b.'


def archive(data, storages=STORAGES, order=b'little', more=None, compression=zipfile.ZIP_STORED, root='model/'):
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, 'w', compression) as file:
    for name, content in {'data.pkl': data, 'byteorder': order, **(more or {})}.items():
      file.writestr(root + name, content)
    for key, (_, values) in storages.items():
      file.writestr(f'{root}data/{key}', values.tobytes())
  return buffer.getvalue()


def stream(data, storages=STORAGES, little=True):
  """The format before PyTorch 1.6."""
  system = b'\x80\x02' + a_dict({'protocol_version': number(1001), 'little_endian': number(little)}) + b'.'
  keys = b'\x80\x02](' + b''.join(map(text, storages)) + b'e.'
  raw = b''.join(struct.pack('<q', values.size) + values.tobytes() for _, values in storages.values())
  return MAGIC + b'\x80\x02M\xe9\x03.' + system + data + keys + raw


WRITERS = {'zip': archive, 'legacy': stream}
ENTRIES = {
    'whole': tensor('0', 0, (3, 4), (4, 1)), 'turned': tensor('0', 1, (4, 2), (1, 4)),
    'half': tensor('1', 2, (2,), (1,)), 'parameter': parameter(tensor('0', 4, (2, 2), (4, 2))),
    'scalar': tensor('2'), 'empty': tensor('3', 0, (0, 3), (3, 1)), 'old': old_tensor('1', 0, (2, 2), (2, 1))}
EXPECTED = {
    'whole': np.arange(12, dtype=np.float32).reshape(3, 4),
    'turned': np.asarray([[1, 5], [2, 6], [3, 7], [4, 8]], np.float32), 'half': np.asarray([0.5, 0.75], np.float16),
    'parameter': np.asarray([[4, 6], [8, 10]], np.float32), 'scalar': np.asarray(-7),
    'empty': np.zeros((0, 3), np.float32), 'old': np.asarray([[0, 0.25], [0.5, 0.75]], np.float16)}


def read(folder, data):
  (folder / 'file.pth').write_bytes(data)
  return weights.read(folder / 'file.pth')


def refused(message):  # the path must not match in its place
  return pytest.raises(ValueError, match=rf'file\.pth: .*({message})')


def assert_same(found, expected):
  assert list(found) == list(expected)
  for name, array in expected.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array, strict=True)


@both_formats
def test_a_state_dict_of_every_kind_of_tensor_is_read(tmp_path, layout):
  found = read(tmp_path, WRITERS[layout](state_dict(ENTRIES)))
  assert_same(found, EXPECTED)
  assert all(array.flags.c_contiguous and array.flags.owndata for array in found.values())  # no views


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('protocol', [2, 4])
def test_what_pytorch_wrote_is_read(tmp_path, zipped, protocol):
  torch = pytest.importorskip('torch', reason='PyTorch writes the files of this test')
  net = torch.nn.BatchNorm2d(4).state_dict()
  x = torch.arange(24.).reshape(2, 3, 4)
  net |= {'turned': x.permute(2, 0, 1)[1:], 'sliced': x[1, ::2], 'parameter': torch.nn.Parameter(x.half()),
          'bool': x > 3, 'scalar': torch.tensor(3), 'empty': torch.empty(0, 3), 'bfloat16': x.bfloat16(), 'u': x.byte()}
  torch.save(net, path := tmp_path / 'net.pth', _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
  found = weights.read(path)
  assert list(found) == list(net)
  for name, value in net.items():
    assert str(value.dtype) == f'torch.{found[name].dtype}' and tuple(value.shape) == found[name].shape
    np.testing.assert_array_equal(found[name].astype(np.float64), value.detach().double().numpy())


class Call:
  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


@both_formats
@pytest.mark.parametrize('how', ['os', 'eval', 'build', 'protocol 4'])
def test_code_inside_is_refused_and_never_run(tmp_path, layout, how):
  canary = tmp_path / 'canary'
  call = {'eval': Call(eval, f'__import__("os").mkdir({str(canary)!r})')}.get(how, Call(os.mkdir, str(canary)))
  data = pickle.dumps({'a': call}, protocol=4 if how == 'protocol 4' else 2)
  pickle.loads(data)  # the code would run
  canary.rmdir()
  if how == 'build':  # as the state of a state_dict that is in order
    data = state_dict(ENTRIES)[:-1] + data[2:-1] + b'b.'
  with refused(r"asks for '.*(mkdir|eval)'"):
    read(tmp_path, WRITERS[layout](data))
  assert not canary.exists()


BAD_PICKLES = {
    'unknown global': (named('torch', 'load') + b')R', 'torch load'),
    'a global of an allowed module': (named('collections', 'Counter') + b')R', 'Counter'),
    'attribute of an allowed name': (named('collections', 'OrderedDict.fromkeys') + b')R', 'fromkeys'),
    'eval': (named('builtins', 'eval') + a_tuple(text('1')) + b'R', 'builtins eval'),
    'instance': (b'(ios\nsystem\n', 'INST'), 'object': (b'(' + ORDERED + b'o', 'OBJ'),
    'new object': (ORDERED + b')\x81', 'NEWOBJ'), 'extension': (b'\x82\x01', 'EXT1'),
    'persistent text': (b'Pos.system\n', 'PERSID'),
    'call of a text': (text('collections OrderedDict') + b')R', 'Global'),
    'storage without a type': (a_tuple(text('storage'), text('FloatStorage'), text('0'), text('cpu'),
                                       number(12)) + b'Q', 'form'),
    'storage of a function': (a_tuple(text('storage'), named('collections', 'OrderedDict'), text('0'), text('cpu'),
                                      number(12)) + b'Q', 'none that can be read'),
    'part of a storage': (a_storage('0', 'Float', 12, a_tuple(text('1'), number(0), number(4))), 'form'),
    'dictionary with a list as key': (b'}(]Nu', 'neither texts'), 'items of a list': (b'](NNu', 'dict'),
    'dictionary with a tuple as key': (b'})Ns', 'neither texts'), 'state of a list': (b'])b', 'dict'),
    'memo': (b'h\x07', 'damaged'), 'odd items': (b'}(' + text('a') + b'u', 'shorter'),
    'number': (number(3), 'no tensor'), 'nested': (a_dict({'x': tensor('0')}), 'no tensor'),
}


@both_formats
@pytest.mark.parametrize('case', BAD_PICKLES)
def test_a_pickle_of_anything_else_is_refused(tmp_path, layout, case):
  code, message = BAD_PICKLES[case]
  with refused(message):
    read(tmp_path, WRITERS[layout](state_dict(ENTRIES | {'bad': code})))


@both_formats
@pytest.mark.parametrize(('code', 'message'), [
    (b'.', 'damaged'), (b'R.', 'damaged'), (b'\x86.', 'damaged'), (b'e.', 'damaged'), (b'Q.', 'damaged'),
    (b'}', 'exhausted|holds list'), (b'\xfe.', 'unknown'), (b'}.', 'save a state_dict'), (b'].', 'save a state_dict'),
    (tensor('0') + b'.', 'save a state_dict'), (b'\x8b\xff\xff\xff\x7f', 'long4'), (b'}' * 1_000_001, 'operations')])
def test_a_pickle_that_is_no_dictionary_is_refused(tmp_path, layout, code, message):
  with refused(message):
    read(tmp_path, WRITERS[layout](b'\x80\x02' + code))


@contextlib.contextmanager
def little_memory():
  tracemalloc.start()
  try:
    yield
    assert tracemalloc.get_traced_memory()[1] < 2 ** 20
  finally:
    tracemalloc.stop()


BAD_VIEWS = {
    'longer than the storage': {'shape': (13,), 'strides': (1,)},
    'past its end': {'offset': 1, 'shape': (3, 4), 'strides': (4, 1)},
    'offset past its end': {'offset': 12},
    'negative offset': {'offset': -1, 'shape': (2,), 'strides': (1,)},
    'negative stride': {'offset': 11, 'shape': (12,), 'strides': (-1,)},
    'negative shape': {'shape': (-1,), 'strides': (1,)},
    'enormous shape': {'shape': (2 ** 40,), 'strides': (1,)},
    'enormous product': {'shape': (2 ** 30,) * 4, 'strides': (0,) * 4},
    'overflowing product': {'shape': (2 ** 16,) * 4, 'strides': (0,) * 4},
    'one element many times': {'shape': (2 ** 30,), 'strides': (0,)},
    'overlaps': {'shape': (6, 6), 'strides': (1, 1)},
    'enormous stride': {'shape': (2,), 'strides': (2 ** 62,)},
    'enormous empty shape': {'shape': (0, 2 ** 62), 'strides': (1, 1)},
    'fewer strides than dimensions': {'shape': (3, 4), 'strides': (1,)},
    'many dimensions': {'shape': (1,) * 99, 'strides': (1,) * 99},
    'shape of no integers': {'shape': (True,), 'strides': (1,)},
    'larger storage than there is': {'size': 13, 'shape': (13,), 'strides': (1,)},
    'negative storage': {'size': -1},
    'enormous storage': {'size': 2 ** 40, 'shape': (2 ** 40,), 'strides': (1,)},
    'larger elements': {'kind': 'Double'}, 'smaller elements': {'size': 3}, 'unknown type': {'kind': 'ComplexFloat'},
}


@both_formats
@pytest.mark.parametrize('case', BAD_VIEWS)
def test_a_view_outside_its_storage_is_refused_before_memory_is_taken(tmp_path, layout, case):
  data = WRITERS[layout](state_dict({'bad': tensor('0', **BAD_VIEWS[case])}), {'0': STORAGES['0']})
  with little_memory(), refused('[Ss]torage|a shape and strides'):
    read(tmp_path, data)


@both_formats
def test_two_claims_about_one_storage_are_refused(tmp_path, layout):
  entries = {'a': tensor('0', 0, (2,), (1,)), 'b': tensor('0', 0, (2,), (1,), kind='Half')}
  with refused('two types or sizes'):
    read(tmp_path, WRITERS[layout](state_dict(entries)))


@both_formats
def test_limits(tmp_path, layout, monkeypatch):
  """Many views of one storage need more memory than the file has; there may be only so many tensors."""
  values = {'0': ('Float', np.zeros(1000, '<f4'))}
  entries = {str(i): tensor('0', 0, (1000,), (1,), storages=values) for i in range(8)}
  data = WRITERS[layout](state_dict(entries), values)
  assert len(data) < 10_000 and len(read(tmp_path, data)) == 8
  monkeypatch.setattr(torch_files, 'MAX_TENSORS', 7)
  with refused(r'at most 7 tensors .* 8|more than 700'):
    read(tmp_path, data)
  monkeypatch.setattr(torch_files, 'MAX_TENSORS', 10_000)
  monkeypatch.setattr(torch_files, 'MAX_BYTES', 31_999)
  with refused('32000 bytes, at most 31999'):
    read(tmp_path, data)
  monkeypatch.setattr(torch_files, 'MAX_BYTES', 999)
  with refused(rf'at most 999 bytes .* {len(data)}'):
    read(tmp_path, data)


@both_formats
def test_every_cut_of_a_file_is_refused(tmp_path, layout):
  data = WRITERS[layout](state_dict(ENTRIES))
  for size in [*range(0, len(data), 17), len(data) - 1]:
    with refused(''):
      read(tmp_path, data[:size])


def test_big_endian_numbers_are_refused(tmp_path):
  for data in (archive(state_dict(ENTRIES), order=b'big'), stream(state_dict(ENTRIES), little=False)):
    with refused('little-endian'):
      read(tmp_path, data)


def test_archives_that_pytorch_does_not_write(tmp_path):
  data, bomb = state_dict(ENTRIES), {'data/9': bytes(10 ** 7)}
  packed = archive(data, more=bomb, compression=zipfile.ZIP_DEFLATED)
  liar = bytearray(archive(data))
  entry = liar.rindex(b'model/data/0') - 46  # its entry in the central directory
  liar[entry + 20:entry + 28] = struct.pack('<II', 2 ** 31, 2 ** 31)
  for bad, message in [
      (packed, 'compressed'), (bytes(liar), 'claims'),
      (archive(data, more={'code/a.py': b''}), r'TorchScript.*state_dict'),
      (archive(data, more={'constants.pkl': b''}), 'TorchScript'), (archive(data, {}), "no entry 'model/data/0'"),
      (archive(data, more={'x/data.pkl': b''}), 'one data.pkl'), (archive(b''), 'pickle'),
      (archive(data).replace(b'model/data/0', b'model/data/9'), "no entry 'model/data/0'")]:
    with little_memory(), refused(message):
      read(tmp_path, bad)


def test_a_changed_number_in_an_archive_is_seen(tmp_path):
  data = archive(state_dict(ENTRIES))
  at = data.index(STORAGES['0'][1].tobytes())
  with refused('damaged'):
    read(tmp_path, data[:at] + b'\xff' + data[at + 1:])


gently = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@gently
@given(data=st.binary(max_size=200), start=st.sampled_from([b'', b'PK\3\4', MAGIC, MAGIC + b'\x80\x02M\xe9\x03.']))
def test_random_bytes_give_a_value_error(tmp_path, data, start):
  with refused(''):
    read(tmp_path, start + data)


@both_formats
@gently
@given(changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_file_gives_arrays_or_a_value_error(tmp_path, layout, changes):
  data = bytearray(WRITERS[layout](state_dict(ENTRIES)))
  for place, byte in changes:
    data[int(place * len(data))] = byte
  with contextlib.suppress(ValueError):
    for name, array in read(tmp_path, bytes(data)).items():
      assert type(name) is str and isinstance(array, np.ndarray)
