"""Weight files of every format, hostile ones too, and how they are found, checked and downloaded."""
import hashlib
import http.client
import http.server
import io
import os
import pathlib
import pickle
import re
import struct
import threading

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusion_jax.metrics import torch_files, weights


def read(folder, data, suffix='.pth'):
  path = folder / f'file{suffix}'
  path.write_bytes(data)
  return weights.read(path)


def assert_same(found, expected):
  assert list(found) == list(expected)
  for name, array in expected.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array, strict=True)


def test_pickles_are_refused_with_the_way_out(tmp_path):
  data = pickle.dumps({'a': np.zeros(3)})
  for suffix in ('.pkl', '.pth', '.pt'):
    with pytest.raises(ValueError, match=r'runs? code.*\.pth .*\.safetensors'):
      read(tmp_path, data, suffix)
  with pytest.raises(ValueError, match=r"\.safetensors, not from '\.h5'"):
    read(tmp_path, data, '.h5')
  with pytest.raises(OSError, match='absent'):
    weights.read(tmp_path / 'absent.pth')


# Protobuf messages as TensorFlow writes them.

def varint(value):
  value, out = value % 2 ** 64, b''
  while value > 127:
    value, out = value >> 7, out + bytes([value & 127 | 128])
  return out + bytes([value])


def field(place, value):
  if isinstance(value, int):
    return varint(place << 3) + varint(value)
  return varint(place << 3 | 2) + varint(len(value)) + value


def constant(name, kind, shape, *values, op=b'Const'):
  dims = b''.join(field(2, field(1, n)) for n in shape)
  proto = field(1, kind) + field(2, dims) + b''.join(values)
  attributes = field(5, field(1, b'dtype') + field(2, field(6, kind)))
  attributes += field(5, field(1, b'value') + field(2, field(8, proto)))
  return field(1, field(1, name.encode()) + field(2, op) + attributes)


KERNEL = np.random.default_rng(0).normal(size=(3, 1, 2, 4)).astype('<f4')
NODES = [
    constant('conv/kernel', 1, KERNEL.shape, field(4, KERNEL.tobytes())),
    constant('packed', 1, (3,), field(5, np.asarray([1, 2, 3], '<f4').tobytes())),
    constant('one by one', 1, (2,), *(varint(5 << 3 | 5) + struct.pack('<f', x) for x in (0.5, -4.0))),
    constant('for all', 1, (2, 3), field(5, struct.pack('<f', 7))),
    constant('scalar', 2, (), field(6, struct.pack('<d', 0.1))),
    constant('shape', 3, (2,), field(7, varint(-1) + varint(2048))),
    constant('long', 9, (2,), field(10, 2 ** 40), field(10, -3)),
    constant('picture', 7, (), field(8, b'jpeg')),
    constant('not a constant', 1, (), op=b'Placeholder'),
    field(4, field(1, 21))]  # the version of the graph
NODE_VALUES = {
    'conv/kernel': KERNEL, 'packed': np.asarray([1, 2, 3], np.float32), 'one by one': np.asarray([0.5, -4], np.float32),
    'for all': np.full((2, 3), 7, np.float32), 'scalar': np.asarray(0.1), 'shape': np.asarray([-1, 2048], np.int32),
    'long': np.asarray([2 ** 40, -3])}


def test_the_constants_of_a_frozen_graph_are_read(tmp_path):
  assert_same(read(tmp_path, b''.join(NODES), '.pb'), NODE_VALUES)


@pytest.mark.parametrize(('data', 'message'), [
    (b'', 'no constants'), (NODES[-1] + NODES[-2], 'no constants'), (b''.join(NODES)[:-1], 'is cut'),
    (NODES[0][:-9], 'is cut'), (b'\xff' * 20, 'no end'), (b'\x0b', 'wire type 3'), (b'\0\0', 'field 0'),
    (constant('a', 1, (3,), field(4, bytes(8))), 'needs 3 values and has 2'),
    (constant('a', 1, (3,), field(4, bytes(7))), 'multiple'), (constant('a', 1, (3,)), 'needs 3 values and has 0'),
    (constant('a', 1, (2 ** 40,), field(5, bytes(4))), 'dimensions'),
    (constant('a', 1, (-1,), field(5, bytes(4))), 'dimensions'),
    (constant('a', 1, (2 ** 20,), field(5, bytes(4))), 'needs 1048576 values'),
    (constant('a', 1, (2 ** 31,) * 20, field(5, bytes(4))), 'needs'),
    (constant('a', 1, (1,) * 50, field(5, bytes(4))), '50 dimensions'),
])
def test_graphs_that_claim_too_much_are_refused(tmp_path, data, message):
  with pytest.raises(ValueError, match=message):
    read(tmp_path, data, '.pb')


def test_a_small_graph_of_large_constants_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(torch_files, 'MAX_BYTES', 2 ** 20)
  data = b''.join(constant(str(i), 2, (2 ** 15,), field(6, bytes(8))) for i in range(5))
  with pytest.raises(ValueError, match=r"'4' is number 5 .* 1310720 bytes"):
    read(tmp_path, data, '.pb')


ARRAYS = {'a': np.asarray([[0.5, 0.75]], np.float16), 'b': np.asarray(-7), 'c': np.zeros((0, 3)), 'd': KERNEL}


def test_safetensors_make_the_round_trip(tmp_path):
  data = safetensors.numpy.save(ARRAYS)
  assert_same(dict(sorted(read(tmp_path, data, '.safetensors').items())), ARRAYS)
  for bad in (b'', data[:-1], b'\xff' * 50, data[:8]):
    with pytest.raises(ValueError, match='no safetensors'):
      read(tmp_path, bad, '.safetensors')


VALID = {'.pb': b''.join(NODES), '.safetensors': safetensors.numpy.save(ARRAYS)}
gently = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@gently
@given(data=st.binary(max_size=200), suffix=st.sampled_from([*VALID]))
def test_random_bytes_give_a_value_error(tmp_path, data, suffix):
  with pytest.raises(ValueError, match='file'):
    read(tmp_path, data, suffix)


@gently
@given(suffix=st.sampled_from([*VALID]), changes=st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_file_gives_arrays_or_a_value_error(tmp_path, suffix, changes):
  data = bytearray(VALID[suffix])
  for place, byte in changes:
    data[int(place * len(data))] = byte
  try:
    found = read(tmp_path, bytes(data), suffix)
  except ValueError as error:
    assert 'file' in str(error)
  else:
    assert all(type(name) is str and isinstance(array, np.ndarray) for name, array in found.items())


def test_the_file_is_checked_by_size_and_hash(tmp_path):
  path = tmp_path / 'file.pth'
  path.write_bytes(b'abc')
  digest = 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'  # FIPS 180-2, appendix B.1
  assert weights.sha256(path) == digest
  weights.check(path, digest, 3)
  with pytest.raises(ValueError, match=r'file\.pth should have 4 bytes and has 3'):
    weights.check(path, digest, 4)
  with pytest.raises(ValueError, match=f'should have SHA-256 {"0" * 64} and has {digest}'):
    weights.check(path, '0' * 64, 3)


@pytest.fixture
def small_file(tmp_path, monkeypatch):
  """A cache in tmp_path/cache, and a small file in place of the pinned one: (its content, what is known of it)."""
  monkeypatch.setenv('DIFFUSION_JAX_CACHE', str(tmp_path / 'cache'))
  content = b'weights' * 1000
  known = weights.FID_INCEPTION._replace(digest=hashlib.sha256(content).hexdigest(), size=len(content))
  monkeypatch.setattr(weights, 'FID_INCEPTION', known)
  return content, known


def test_the_pinned_file(monkeypatch):
  """The names carry the first eight digits of the hash, as PyTorch's hub requires."""
  known = weights.FID_INCEPTION
  assert known.size == 95_628_359 and re.fullmatch('[0-9a-f]{64}', known.digest)
  assert all(name.endswith(f'-{known.digest[:8]}.pth') for name in (*known.names, known.url))
  assert known.url.startswith('https://github.com/mseitzer/pytorch-fid/releases/')
  assert known.url.endswith(f'/{known.names[0]}')
  monkeypatch.delenv('DIFFUSION_JAX_CACHE', raising=False)
  monkeypatch.setenv('HOME', '/somewhere')
  assert weights.cache() == pathlib.Path('/somewhere/.cache/diffusion_jax')


def test_the_weights_are_found_or_it_is_said_where_to_get_them(tmp_path, small_file):
  content, known = small_file
  with pytest.raises(FileNotFoundError) as error:
    weights.find()
  for part in (str(tmp_path / 'cache'), known.url, 'digits', 'cifar', 'pixels'):
    assert part in str(error.value)
  with pytest.raises(FileNotFoundError, match=r'mine\.pth'):
    weights.find(str(tmp_path / 'mine.pth'))
  (tmp_path / 'cache').mkdir()
  for name in reversed(known.names):
    (tmp_path / 'cache' / name).write_bytes(content)
    assert weights.find() == tmp_path / 'cache' / name
  (tmp_path / 'mine.pth').write_bytes(b'another')
  assert weights.find(str(tmp_path / 'mine.pth')) == tmp_path / 'mine.pth'
  (tmp_path / 'cache' / known.names[0]).write_bytes(content[:-1] + b'x')
  with pytest.raises(ValueError, match='should have SHA-256'):
    weights.find()


@pytest.fixture
def server(small_file):
  """The address of a server of files: whole, changed, long, cut (fewer bytes than announced), absent."""
  content, _ = small_file
  bodies = {'/whole': content, '/changed': content[:-1] + b'x', '/long': content + b'x', '/cut': content[:-1]}

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      body = bodies.get(self.path, b'')
      self.send_response(200 if body else 404)
      self.send_header('Content-Length', str(len(content) if self.path == '/cut' else len(body)))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *args):
      pass

  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as running:
    thread = threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f'http://127.0.0.1:{running.server_port}'
    running.shutdown()
    thread.join()


def test_a_download_is_whole_and_then_found(tmp_path, small_file, server):
  content, known = small_file
  place = weights.cache() / known.names[0]
  assert weights.download(f'{server}/whole', place, known.digest, known.size) == place == weights.find()
  assert place.read_bytes() == content and os.listdir(weights.cache()) == [place.name]
  copy = tmp_path / 'copy.pth'
  weights.download(place.as_uri(), copy, known.digest, known.size)
  assert copy.read_bytes() == content


@pytest.mark.parametrize(('name', 'error', 'message'), [
    ('changed', ValueError, 'should give SHA-256'), ('long', ValueError, '7000 bytes and gave more than 7000'),
    ('cut', (ValueError, OSError), '7000 bytes and gave 6999|IncompleteRead'), ('absent', OSError, '404')])
def test_a_failed_download_leaves_nothing_behind(tmp_path, small_file, server, name, error, message):
  _, known = small_file
  folder = tmp_path / 'there'
  with pytest.raises(error, match=message):
    weights.download(f'{server}/{name}', folder / 'a.pth', known.digest, known.size)
  assert not os.listdir(folder)
  (folder / 'a.pth').write_bytes(b'what was there')
  with pytest.raises(error):
    weights.download(f'{server}/{name}', folder / 'a.pth', known.digest, known.size)
  assert os.listdir(folder) == ['a.pth'] and (folder / 'a.pth').read_bytes() == b'what was there'


@pytest.mark.parametrize('error', [KeyboardInterrupt, ConnectionResetError, http.client.IncompleteRead(b'')])
def test_an_interrupted_download_leaves_nothing_behind(tmp_path, small_file, monkeypatch, error):
  content, known = small_file
  seen = []

  class Response(io.BytesIO):
    def read(self, size=-1):
      if self.tell():
        seen.extend(os.listdir(tmp_path / 'there'))
        raise error
      return super().read(size // 2)

  monkeypatch.setattr('urllib.request.urlopen', lambda url, timeout: Response(content))
  kind = OSError if isinstance(error, http.client.HTTPException) else error
  with pytest.raises(kind):
    weights.download('https://example.org/a', tmp_path / 'there' / 'a.pth', known.digest, known.size)
  assert len(seen) == 1 and seen != ['a.pth']  # it was written under another name
  assert not os.listdir(tmp_path / 'there')


def test_a_download_without_end_is_given_up(tmp_path, small_file, monkeypatch):
  _, known = small_file
  asked = []

  class Response(io.BytesIO):
    def read(self, size=-1):
      asked.append(size)
      assert sum(asked) <= known.size + 1
      return bytes(size)

  monkeypatch.setattr('urllib.request.urlopen', lambda url, timeout: Response())
  with pytest.raises(ValueError, match='gave more than 7000'):
    weights.download('https://example.org/a', tmp_path / 'there' / 'a.pth', known.digest, known.size)
  assert not os.listdir(tmp_path / 'there')


@pytest.mark.parametrize('url', ['ftp://127.0.0.1/a', 'data:,abc', 'a.pth'])
def test_other_addresses_are_refused(tmp_path, url):
  with pytest.raises(ValueError, match='https, http or file'):
    weights.download(url, tmp_path / 'a.pth', '0' * 64, 3)
