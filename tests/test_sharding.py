"""Where arrays lie: rules for parameters, and that none of it changes what is computed."""
import functools
import math
import re
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import through_json, tiny_config
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec as P
from test_train import assert_same, run_steps

from diffusion_jax import model as model_lib
from diffusion_jax import train
from diffusion_jax.nets import blocks, layers
from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime import sharding
from diffusion_jax.runtime.checkpoint import Checkpoints
from diffusion_jax.runtime.config import UserError
from diffusion_jax.step import Metrics, compile_step, initialise

# Rules


def spec_of(path, shape, mesh, rules=''):
  tree = functools.reduce(lambda inner, key: {key: inner}, reversed(path.split('/')),
                          jax.ShapeDtypeStruct(shape, jnp.float32))
  return jax.tree.leaves(sharding.state(tree, mesh, rules))[0].spec


@pytest.mark.parametrize(('path', 'shape', 'expected'), [
    ('params/net/conv_in/kernel', (3, 3, 128, 256), (None, None, 'fsdp', 'tensor')),
    ('params/net/block/conv_1/kernel', (3, 3, 256, 128), (None, None, 'tensor', 'fsdp')),  # the second of a pair
    ('params/net/attention/query/kernel', (512, 512), ('fsdp', 'tensor')),
    ('params/net/attention/out/kernel', (512, 512), ('tensor', 'fsdp')),
    ('opt_state/0/mu/net/attention/out/kernel', (512, 512), ('tensor', 'fsdp')),
    ('emas/main/net/attention/out/kernel', (512, 512), ('tensor', 'fsdp')),
    ('params/net/blocks/attention/query/kernel', (12, 512, 512), (None, 'fsdp', 'tensor')),  # as nn.scan stacks them
    ('params/net/small/kernel', (4, 8), (None, 'tensor')),          # too small to be gathered, not to be split
    ('params/net/conv_out/kernel', (3, 3, 512, 3), (None, None, None, None)),  # 3 do not divide, and it is small
    ('params/net/conv_out/kernel', (3, 3, 8192, 3), (None, None, 'fsdp', None)),
    ('params/net/norm/scale', (512,), ()),
    ('opt_state/v_row/net/attention/query/kernel', (512,), ()),     # less than the parameter's shape: adafactor
])
def test_rules_for_parameters(path, shape, expected):
  mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
  found = spec_of(path, shape, mesh)
  assert tuple(found) + (None,) * (len(shape) - len(found)) == expected + (None,) * (len(shape) - len(expected))
  assert spec_of(path, shape, sharding.make_mesh()) == P()


def test_own_rules_come_first():
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  of = functools.partial(spec_of, 'params/net/query/kernel', (512, 512), mesh)
  assert of() == P('fsdp', 'tensor')
  assert of('query/kernel=tensor,-') == P('tensor', None)
  assert of('query=-') == P()
  assert of(' query/kernel = fsdp+tensor, - ; .*=-') == P(('fsdp', 'tensor'), None)
  assert of('kernel=fsdp,-; query=-') == P('fsdp', None)  # the first that is found
  with pytest.raises(ValueError, match=r"no parameter follows the rule for 'keys'.*params/net/query/kernel"):
    of('keys=fsdp')


@pytest.mark.parametrize('rules', ['query', 'query=data', 'query=fsdp,fsdp', '(=fsdp', 'a=fsdp;b=tensors'])
def test_rules_that_cannot_be_read_are_named(rules):
  config = tiny_config(sharding=rules)
  with pytest.raises(UserError, match=r"config.sharding: rule '"):
    model_lib.check(config)


@pytest.mark.parametrize('optimizer', ['adam', 'adafactor', 'sgd(momentum=0.9)', 'lion'])
def test_moments_and_averages_lie_as_their_parameters(optimizer, monkeypatch):
  monkeypatch.setattr(sharding, 'MIN_SHARDED_SIZE', 0)
  config = tiny_config(unet=True, optimizer=optimizer, net__channels=16)
  state = model_lib.abstract_state(model_lib.make(config, (8, 8, 1), 10), sharding.make_mesh(2, 2, 2))
  where = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
  assert any('tensor' in leaf.sharding.spec and 'fsdp' in leaf.sharding.spec for leaf in where.values())
  followed = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path({'emas': state.emas, 'opt_state': state.opt_state}):
    owner = next((where[name] for name in where if jax.tree_util.keystr(path).endswith(name)), None)
    if owner is not None and owner.shape == leaf.shape:
      assert leaf.sharding == owner.sharding, jax.tree_util.keystr(path)
      followed += 1
  assert followed >= len(where) * (1 if optimizer == 'adafactor' else 2)


# Nothing changes what is computed


# Gradient descent, since where a gradient is 0 Adam makes whole steps of rounding; fast enough that parameters move.
SGD = {'optimizer': 'sgd', 'learning_rate__peak': 0.3, 'learning_rate__warmup_images': 0, 'net__dropout': 0.1}


class Blocks(nn.Module):
  """What a U-Net is made of, once."""

  @nn.compact
  def __call__(self, x, noise, cond, train=False):
    emb = layers.Dense(8, name='embed')(layers.timestep_embedding(noise, 8))
    h = layers.Conv(8, name='conv_in')(x)
    h = blocks.ResBlock(8, 0.1, 4, 'float32', name='block')(h, emb, train)
    h = blocks.SelfAttention(4, 'float32', name='attention')(h)
    return layers.Conv(x.shape[-1], name='conv_out')(h)


def config_of(net):
  """A config of the small net, or of one of this file's."""
  config = tiny_config(**SGD)
  if net:
    config.net = config_lib.spec(net)
    config.learning_rate.peak = 0.1  # its norms make more of a rounding
  return config


@pytest.fixture(scope='module')
def alone():
  """Four steps on one device, of the small net and of blocks with attention."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(config_lib, 'ALLOWED', [*config_lib.ALLOWED, __name__])
    yield {net: run_steps(config_of(net), sharding.make_mesh(1, 1)) for net in (None, Blocks)}


@pytest.mark.parametrize(('net', 'mesh'), [
    (None, (2,)), (None, (8,)), (None, (1, 4)), (None, (1, 1, 2)), (None, (1, 1, 1, 4)), (None, (1, 2, 2)),
    (Blocks, (2, 2, 2)), (Blocks, (1, 2, 2)), (Blocks, (2, 1, 1, 2))], ids=str)
def test_every_mesh_computes_the_same(alone, net, mesh, monkeypatch):
  monkeypatch.setattr(sharding, 'MIN_SHARDED_SIZE', 0)
  mesh = sharding.make_mesh(*mesh)
  state, values = run_steps(config_of(net), mesh)
  kernel = state.params['net']['conv_in']['kernel']  # [3, 3, 1, 8]
  split = 'tensor' if mesh.shape['tensor'] > 1 else 'fsdp' if mesh.shape['fsdp'] > 1 else None
  assert kernel.sharding.shard_shape(kernel.shape)[-1] == 8 // (mesh.shape[split] if split else 1)
  assert_same(state, alone[net][0])
  assert_same(values, alone[net][1], 1e-4)


class Run:
  """A run whose state moves from mesh to mesh through checkpoints."""

  def __init__(self, folder):
    self.config = tiny_config(**SGD)
    self.source = train.open_source(self.config)
    self.model = model_lib.make(self.config, self.source.shape, self.source.num_classes)
    self.optimizer, self.folder = model_lib.optimizer_of(self.config), folder

  def steps(self, mesh, start, stop):
    """Takes the steps start .. stop on `mesh`, from the checkpoint at start to one at stop; returns the state."""
    abstract = model_lib.abstract_state(self.model, mesh)
    checkpoints = Checkpoints(self.folder, writer=True)
    state = checkpoints.restore(abstract)[0] if start else initialise(self.model, self.optimizer, abstract)
    assert int(state.step) == start
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, state, abstract))
    batches = train.Batches(self.config, self.source, mesh)
    metrics, step = jax.device_put(Metrics.empty(), sharding.replicated(mesh)), None
    for batch in batches(start, stop):
      if step is None:
        step, _ = compile_step(self.model, self.optimizer, state, metrics, batches.data, batch)
      state, metrics = step(state, metrics, batches.data, batch)
    checkpoints.save(state, {})
    checkpoints.close()
    return state


def test_a_run_moves_over_meshes_and_ends_the_same(tmp_path, monkeypatch):
  """1 -> 2 x 2 -> fsdp 4 -> 1: the same batches, the same noise, and the same end up to rounding."""
  monkeypatch.setattr(sharding, 'MIN_SHARDED_SIZE', 0)
  one = sharding.make_mesh(1, 1)
  whole = Run(tmp_path / 'whole').steps(one, 0, 8)
  moving = Run(tmp_path / 'moving')
  for i, mesh in enumerate((one, sharding.make_mesh(2, 2), sharding.make_mesh(1, 4), one)):
    state = moving.steps(mesh, 2 * i, 2 * i + 2)
  assert_same(state, whole)
  start = Run(tmp_path / 'none').steps(one, 0, 0)
  assert np.abs(np.asarray(whole.params['net']['conv_in']['kernel'])
                - np.asarray(start.params['net']['conv_in']['kernel'])).max() > 1e-2  # it went somewhere


@pytest.mark.parametrize(('kinds', 'words'), [
    (['device'], "'fake' cannot keep arrays in pinned_host memory"),
    ([], "for the host of a device of kind 'fake' that is not here: plan with train.ema_on_host=false")])  # plan's
def test_devices_without_a_host_are_named(kinds, words):
  """JAX drops the memory kind from a sharding over devices that are only compiled for: a plan would not be true."""
  memories = [types.SimpleNamespace(kind=kind) for kind in kinds]
  device = types.SimpleNamespace(id=0, device_kind='fake', addressable_memories=lambda: memories)
  with pytest.raises(ValueError, match=words):
    sharding.on_host(types.SimpleNamespace(device_set={0: device}.values()))


# What devices add up


class Products(nn.Module):
  """Two of the products that the networks are made of."""
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x, noise, cond, train=False):
    h = nn.swish(layers.Conv(8, dtype=self.dtype, name='conv')(x))
    h = nn.swish(layers.Dense(6, dtype=self.dtype, name='dense')(h))
    return layers.Conv(x.shape[-1], size=1, dtype=self.dtype, name='out')(h).astype(x.dtype)


def reduced_types(config, folder):
  """The types of what two devices sum over each other in a train step, with the shape: {('f32', '3,3,8,8'), ...}.

  Read from the program right after XLA has split it over the devices: the CPU's later passes turn every bfloat16 sum
  into float32, so that the finished program would say nothing of the choice.
  """
  mesh = sharding.make_mesh(2, 1)
  model, optimizer = model_lib.make(config, (8, 8, 1), 10), model_lib.optimizer_of(config)
  state = model_lib.abstract_state(model, mesh)
  place = lambda shape, dtype, where: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  metrics = jax.tree.map(lambda a: place(a.shape, a.dtype, sharding.replicated(mesh)), jax.eval_shape(Metrics.empty))
  size = config.train.batch_size
  batch = (place((1, size, 8, 8, 1), jnp.uint8, sharding.batch(mesh, 1)),
           place((1, size), jnp.int32, sharding.batch(mesh, 1)))
  steps = train.make_step(model, optimizer, jax.tree.map(lambda a: a.sharding, state))
  lowered = jax.jit(steps).lower(jax.random.key(0), state, metrics, None, batch)
  # What comes out of the compilation cache writes no dump, and whether there is a cache is asked once.
  enabled = jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()
  try:
    lowered.compile(compiler_options={
        'xla_backend_optimization_level': 0, 'xla_dump_to': str(folder), 'xla_dump_hlo_pass_re': 'spmd-partitioning',
        'xla_dump_hlo_as_text': True})
  finally:
    jax.config.update('jax_enable_compilation_cache', enabled)
    compilation_cache.reset_cache()
  program, = folder.glob('*after_spmd-partitioning*.txt')
  return state, {found for line in program.read_text().splitlines() if re.search(r' all-reduce(-start)?\(', line)
                 for found in re.findall(r'(\w+)\[([\d,]*)\]', line.partition(' all-reduce')[0].partition(' = ')[2])}


@pytest.mark.parametrize('reduce', ['float32', 'bfloat16'])
def test_gradients_of_a_bfloat16_net_are_summed_in_the_type_of_the_config(tmp_path, reduce, monkeypatch):
  monkeypatch.setattr(config_lib, 'ALLOWED', [*config_lib.ALLOWED, __name__])
  config = tiny_config(train__reduce=reduce)
  config.net = config_lib.spec(Products, dtype='bfloat16')
  model_lib.check(config)
  state, found = reduced_types(config, tmp_path)
  kinds = {}
  for kind, shape in found:
    kinds.setdefault(math.prod(map(int, filter(None, shape.split(',')))), set()).add(kind)
  for name in ('conv', 'dense'):
    kernel = state.params['net'][name]['kernel']
    assert kernel.dtype == jnp.float32
    assert kinds[kernel.size] == {'f32' if reduce == 'float32' else 'bf16'}
  if reduce == 'float32':
    assert set().union(*kinds.values()) == {'f32'}


def test_bfloat16_sums_change_gradients_by_their_rounding():
  net, x = layers.Dense(16, dtype='bfloat16'), jax.random.normal(jax.random.key(0), (32, 16))
  params = net.init(jax.random.key(1), x)['params']

  def gradient(dtype):
    with layers.gradients_leave_in(dtype):
      return jax.grad(lambda p: (net.apply({'params': p}, x).astype(jnp.float32) ** 2).sum())(params)['kernel']

  full, half = gradient('float32'), gradient('bfloat16')
  assert full.dtype == half.dtype == jnp.float32
  np.testing.assert_array_equal(half, full.astype(jnp.bfloat16).astype(jnp.float32))
  assert np.any(np.asarray(half) != np.asarray(full))


@pytest.mark.parametrize(('changes', 'words'), [
    ({'train__reduce': 'bfloat16'}, 'gradients of a net with dtype float32 are float32: set config.net.dtype=bfloat16'),
    ({'train__reduce': 'float16'}, "config.train.reduce must be float32 or bfloat16, got 'float16'"),
    ({'train__moments': 'int8'}, "config.train.moments must be float32 or bfloat16, got 'int8'"),
    ({'train__remat': 'all'}, "config.train.remat must be none or products, got 'all'")])
def test_choices_that_do_not_exist_are_named(changes, words):
  with pytest.raises(UserError, match=words):
    model_lib.check(tiny_config(unet=True, **changes))


# Runs that are older than a setting


def test_an_old_config_is_completed_with_what_was_done(tmp_path):
  """What it lacks is named by `ADDED` or by the function's own defaults, and nothing else is made up."""
  config = tiny_config(unet=True)
  old = config.copy_and_resolve_references()
  with old.unlocked():
    for group, key in (('mesh', 'tensor'), ('mesh', 'context'), ('train', 'reduce'), ('train', 'ema_on_host')):
      del old[group][key]
    del old.sharding, old.net['variance'], old.sample.sampler['eta']
  assert through_json(old, tmp_path).to_dict() == config.to_dict()
  with old.unlocked():
    del old.train['keep']
  with pytest.raises(UserError, match=r"config lacks 'train\.keep'"):
    model_lib.check(through_json(old, tmp_path))
