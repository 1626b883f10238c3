"""Laws of the plumbing: records, checksums, learning rates, clipping, meshes."""
import itertools
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax.runtime import log, optim, sharding, state
from diffusion_jax.runtime.config import spec

# Records


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / 'deep' / 'file'
  for data in ('first é', b'\x00second'):
    log.write(path, data)
    assert path.read_bytes() == (data if isinstance(data, bytes) else data.encode())

  def fail(*_):
    raise OSError('no space left')
  monkeypatch.setattr(os, 'replace', fail)
  with pytest.raises(OSError, match='no space left'):
    log.write(path, 'third')
  with pytest.raises(OSError, match='no space left'):
    log.write(tmp_path / 'new', 'third')
  with pytest.raises(TypeError):
    log.write(path, 3)
  assert [p.name for p in path.parent.iterdir()] == ['file'] and path.read_bytes() == b'\x00second'
  assert [p.name for p in tmp_path.iterdir()] == ['deep']


def test_a_record_may_be_read_by_whom_the_umask_lets(tmp_path):
  log.write(tmp_path / 'a', '')
  (tmp_path / 'b').touch()
  assert (tmp_path / 'a').stat().st_mode == (tmp_path / 'b').stat().st_mode


def test_appended_lines_come_back(tmp_path):
  path = tmp_path / 'deep' / 'metrics.jsonl'
  records = [{'step': i, 'text': 'line\nbreak'} for i in range(3)]
  assert log.read_lines(path) == []
  for record in records:
    log.append(path, record)
  assert log.read_lines(path) == records and path.read_bytes().count(b'\n') == 3


@pytest.mark.parametrize('broken', [
    b'{"step": 9, "lo', b'{', b'3\n', b'[1]', b'"word"', b'{"step": 9}trailing', b'\n\n', b'\xff\xfe', b'\0\0'])
def test_a_broken_line_is_dropped_alone(tmp_path, broken):
  path = tmp_path / 'metrics.jsonl'
  log.append(path, {'step': 0})
  with open(path, 'ab') as f:
    f.write(broken)
  assert log.read_lines(path) == [{'step': 0}]
  log.append(path, {'step': 1})
  assert log.read_lines(path) == [{'step': 0}, {'step': 1}]


def test_plain_is_json(tmp_path):
  value = {
      'float': np.float32(0.5), 'int': np.int64(3), 'bool': np.True_,
      'array': np.array([[1.0, np.nan], [np.inf, -np.inf]]), 'device': jnp.arange(3),
      'bf16': jnp.asarray(1.5, jnp.bfloat16), 'tuple': (1, (2.0, math.nan)), 'nan': math.nan,
      'inf': -math.inf, 'none': None, 'word': 'a', 'flag': True, 3: {'deep': [math.inf]}}
  expected = {
      'float': 0.5, 'int': 3, 'bool': True, 'array': [[1.0, None], [None, None]], 'device': [0, 1, 2], 'bf16': 1.5,
      'tuple': [1, [2.0, None]], 'nan': None, 'inf': None, 'none': None, 'word': 'a', 'flag': True,
      '3': {'deep': [None]}}
  assert log.plain(value) == expected
  log.write_json(tmp_path / 'a.json', value)
  log.append(tmp_path / 'a.jsonl', value)
  text = (tmp_path / 'a.json').read_text()
  assert 'NaN' not in text and 'Infinity' not in text
  assert json.loads(text) == expected == log.read_lines(tmp_path / 'a.jsonl')[0]


# Checksums and fingerprints


@pytest.mark.parametrize('dtype', ['float32', 'int32', 'bfloat16', 'uint8', 'bool'])
def test_every_flipped_bit_changes_the_checksums(dtype):
  rng = np.random.default_rng(0)
  size, bits = 37, 1 if dtype == 'bool' else 8 * jnp.dtype(dtype).itemsize
  whole = rng.integers(0, 2, size).astype(bool) if dtype == 'bool' else np.frombuffer(
      rng.bytes(size * bits // 8), jnp.dtype(dtype))
  sums = lambda array: state.checksums({'a': array})['a']
  original = sums(whole)
  assert original == sums(whole.copy())
  # Every bit of a few places, and every place by one bit.
  for place, bit in {*itertools.product(rng.choice(size, 4, False), range(bits)),
                     *zip(range(size), rng.integers(0, bits, size), strict=True)}:
    words = whole.copy().view('uint8' if dtype == 'bool' else f'uint{bits}')
    words[place] ^= 1 << int(bit)
    assert sums(words.view(whole.dtype)) != original, (place, bit)


def test_checksums_see_order_and_shape_of_nothing_else():
  a = np.arange(12, dtype=np.float32)
  sums = lambda array: state.checksums({'a': array})['a']
  assert sums(a) == sums(a.reshape(3, 4)) != sums(a[::-1].copy())
  assert state.checksums({'x': {'y': a}}).keys() == {'x/y'}


@pytest.mark.parametrize('spread', [P(), P('fsdp'), P('data', 'fsdp')])
def test_checksums_do_not_depend_on_the_sharding(spread):
  array = np.random.default_rng(0).normal(size=(8, 24)).astype(np.float32)
  copy = jax.device_put(array, NamedSharding(sharding.make_mesh(2, 4), spread))
  assert state.checksums({'a': copy}) == state.checksums({'a': array})


def train_state(params, emas=None):
  return state.TrainState(jnp.zeros((), jnp.int32), params, (), emas or {})


def test_fingerprint_depends_on_names_types_shapes_and_values():
  a, b = np.arange(4, dtype=np.float32), np.ones(2, np.float32)
  variants = [
      train_state({'a': a, 'b': b}), train_state({'a': a, 'c': b}), train_state({'a': a, 'b': np.nextafter(b, 2)}),
      train_state({'a': a}),
      train_state({'a': a.astype(np.int32), 'b': b}), train_state({'a': a.view(np.int32), 'b': b}),
      train_state({'a': a.reshape(2, 2), 'b': b}), train_state({'a': b, 'b': a}), train_state({'a': {'b': a, 'c': b}}),
      train_state({'a': a, 'b': b}, {'main': {'a': a}}), train_state({'a': a, 'b': b}, {'other': {'a': a}})]
  assert len({state.fingerprint(variant) for variant in variants}) == len(variants)


def test_fingerprint_does_not_depend_on_order_sharding_or_step():
  a, b = np.arange(8, dtype=np.float32), np.ones(2, np.float32)
  mesh = sharding.make_mesh(1, 8)
  one = train_state({'a': a, 'b': b}, {'x': {'a': a}, 'y': {'a': b}})
  two = train_state({'b': jnp.asarray(b), 'a': jax.device_put(a, NamedSharding(mesh, P('fsdp')))},
                    {'y': {'a': b}, 'x': {'a': a}}).replace(step=jnp.ones((), jnp.int32), opt_state=(b,))
  assert state.fingerprint(one) == state.fingerprint(two)


def test_num_parameters():
  tree = {'a': np.zeros((3, 4)), 'b': [jax.ShapeDtypeStruct((5,), jnp.float32), np.zeros(())]}
  assert state.num_parameters(tree) == 12 + 5 + 1


# The optimizer


def test_learning_rate_closed_forms():
  """Ten steps of warm-up of a hundred, 16 images each."""
  options = {'peak': 0.5, 'warmup_images': 160, 'total_images': 1600, 'batch_size': 16}
  constant, cosine = (optim.learning_rate(**options, decay=decay) for decay in ('constant', 'cosine'))
  falling = optim.learning_rate(**options, decay='inverse_sqrt', steady_images=25 * 16)
  for step in range(10):
    assert constant(step) == cosine(step) == falling(step) == pytest.approx(0.5 * (step + 1) / 10, rel=1e-6)
  for step in (10, 11, 55, 99, 100, 200):
    assert constant(step) == pytest.approx(0.5, rel=1e-6)
    expected = 0.5 * (1 + math.cos(math.pi * min((step - 10) / 90, 1))) / 2
    assert cosine(step) == pytest.approx(expected, rel=1e-5, abs=1e-7)
  assert cosine(100) == pytest.approx(0, abs=1e-7)
  for images, expected in ((16 * 16, 0.5), (25 * 16, 0.5), (100 * 16, 0.25), (225 * 16, 0.5 / 3)):
    assert falling(images // 16 - 1) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize('decay', ['constant', 'cosine'])
def test_learning_rate_at_the_edges(decay):
  bare = optim.learning_rate(0.5, 0, 160, 16, decay)
  assert bare(0) == pytest.approx(0.5, rel=1e-6)  # without warm-up the first step is at the peak
  short = optim.learning_rate(0.5, 1600, 160, 16, decay)  # a warm-up longer than the training
  assert [float(short(i)) for i in (0, 9, 99)] == pytest.approx([0.005, 0.05, 0.5], rel=1e-6)
  assert all(math.isfinite(short(i)) for i in (100, 101, 1000))


@pytest.mark.parametrize(('changes', 'words'), [
    ({'peak': -1.0}, 'learning_rate.peak must be at least 0, got -1.0'),
    ({'warmup_images': -5}, 'learning_rate.warmup_images must be at least 0, got -5'),
    ({'decay': 'linear'}, "'cosine' or 'inverse_sqrt', got 'linear'"),
    ({'decay': 'inverse_sqrt'}, 'learning_rate.steady_images must be above 0')])
def test_bad_learning_rates_are_named(changes, words):
  good = {'peak': 1.0, 'warmup_images': 0, 'total_images': 10, 'batch_size': 1, 'decay': 'cosine'}
  with pytest.raises(ValueError, match=words):
    optim.learning_rate(**{**good, **changes})


def test_gradients_are_clipped_to_the_norm():
  params = {'a': jnp.zeros(3), 'b': jnp.zeros((2, 2))}
  large = {'a': jnp.array([30.0, 0, 40]), 'b': jnp.full((2, 2), 60.0)}  # norm 130
  def step(grads, clip_norm):
    optimizer = optim.make(spec(optax.sgd), lambda step: 0.1, clip_norm)
    return optimizer.update(grads, optimizer.init(params), params)[0]
  for clip_norm, norm in ((13.0, 13.0), (1.0, 1.0), (200.0, 130.0), (0.0, 130.0)):
    for key, update in step(large, clip_norm).items():
      np.testing.assert_allclose(update, -0.1 * large[key] * norm / 130, rtol=1e-6)
  with pytest.raises(ValueError, match='got -1'):
    optim.make(spec(optax.sgd), lambda step: 0.1, -1)


def test_the_optimizer_follows_the_rate():
  optimizer = optim.make(spec(optax.sgd), lambda step: jnp.where(step == 0, 1.0, 0.25), 0.0)
  grads, memory, updates = jnp.ones(1), optimizer.init(jnp.zeros(1)), []
  for _ in range(2):
    update, memory = optimizer.update(grads, memory)
    updates.append(float(update[0]))
  assert updates == [-1.0, -0.25]


# Meshes


@pytest.mark.parametrize(('sizes', 'shape'), [
    ({}, (8, 1)), ({'data': -1, 'fsdp': 2}, (4, 2)), ({'data': 2, 'fsdp': -1}, (2, 4)),
    ({'data': 1, 'fsdp': 1}, (1, 1)), ({'data': 3, 'fsdp': 1}, (3, 1)), ({'data': 2, 'fsdp': 4}, (2, 4)),
    ({'data': 1, 'fsdp': -1}, (1, 8))])
def test_mesh_shapes(sizes, shape):
  mesh = sharding.make_mesh(**sizes)
  assert mesh.axis_names == sharding.AXES and mesh.devices.shape == (*shape, 1, 1)
  assert mesh.devices.ravel().tolist() == jax.devices()[:math.prod(shape)]


@pytest.mark.parametrize(('sizes', 'words'), [
    ({'data': 0}, 'mesh.data must be at least 1, or -1 for the rest, got 0'),
    ({'fsdp': -2}, 'mesh.fsdp must be at least 1, or -1 for the rest, got -2'),
    ({'data': -1, 'fsdp': -1}, 'cannot both be -1'), ({'data': 16}, 'data=16, fsdp=1 does not fit on 8 devices'),
    ({'data': -1, 'fsdp': 3}, 'data=-1, fsdp=3 does not fit on 8 devices'),
    ({'data': 4, 'fsdp': 4}, 'data=4, fsdp=4 does not fit on 8 devices')])
def test_bad_meshes_are_named(sizes, words):
  with pytest.raises(ValueError, match=words):
    sharding.make_mesh(**sizes)


def test_a_batch_that_does_not_divide_is_told_what_would():
  mesh = sharding.make_mesh(4, 2)
  sharding.check_divides(mesh, 16, 'train.batch_size')
  with pytest.raises(ValueError, match=r'train.batch_size 21 must be a multiple of the 8 devices .* take 16 or 24,'):
    sharding.check_divides(mesh, 21, 'train.batch_size')
  with pytest.raises(ValueError, match=r'size 5 must be .* take 8, or another mesh'):
    sharding.check_divides(mesh, 5, 'size')


def test_a_batch_is_spread_over_both_axes():
  mesh, array = sharding.make_mesh(4, 2), np.arange(48).reshape(3, 16)
  placed = sharding.put_batch(array, mesh, axis=1)
  np.testing.assert_array_equal(placed, array)
  assert {shard.data.shape for shard in placed.addressable_shards} == {(3, 2)}
  assert len({shard.index[1].start for shard in placed.addressable_shards}) == 8


@pytest.mark.parametrize(('shape', 'expected'), [
    ((3, 3, 128, 256), (None, None, None, 'fsdp')), ((3, 3, 256, 128), (None, None, 'fsdp', None)),
    ((1024, 1023), ('fsdp', None)), ((1026, 1024), (None, 'fsdp')),  # the longest that four devices divide
    ((1023, 1025), ()), ((2 ** 16,), ('fsdp',)), ((2 ** 16 - 4,), ()), ((4,), ()), ((), ())])
def test_large_arrays_are_spread_over_fsdp_by_their_longest_axis(shape, expected):
  leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
  mesh = sharding.make_mesh(2, 4)
  assert sharding.state({'a': leaf}, mesh)['a'].is_equivalent_to(NamedSharding(mesh, P(*expected)), len(shape))
  whole = sharding.make_mesh(8, 1)
  assert sharding.state({'a': leaf}, whole)['a'].is_fully_replicated
