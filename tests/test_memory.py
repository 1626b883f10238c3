"""What training keeps in memory, how little it can be, and that none of it changes what is computed."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config
from nets import shapes_of
from test_train import SGD, assert_same, run_steps

from diffusion_jax import model as model_lib
from diffusion_jax import step as step_lib
from diffusion_jax import train
from diffusion_jax.nets import unet
from diffusion_jax.runtime import memory, optim, sharding
from diffusion_jax.runtime.checkpoint import Checkpoints
from diffusion_jax.runtime.config import UserError
from diffusion_jax.runtime.state import checksums, fingerprint, named_leaves


def compiled_step(config, mesh):
  """(compiled, abstract state, abstract metrics, abstract batch) of a config's train step for 8 x 8 images."""
  model, optimizer = model_lib.make(config, (8, 8, 1), 10), model_lib.optimizer_of(config)
  state = model_lib.abstract_state(model, mesh)
  place = lambda shape, dtype, where: jax.ShapeDtypeStruct(shape, dtype, sharding=where)
  metrics = jax.tree.map(lambda a: place(a.shape, a.dtype, sharding.replicated(mesh)),
                         jax.eval_shape(step_lib.Metrics.empty))
  size = config.train.batch_size
  batch = (place((1, size, 8, 8, 1), jnp.uint8, sharding.batch(mesh, 1)),
           place((1, size), jnp.int32, sharding.batch(mesh, 1)))
  steps, _ = train.compile_step(model, optimizer, state, metrics, None, batch)
  return steps.compiled, state, metrics, batch


@pytest.fixture(scope='module')
def split():
  """The step of the small net on two devices by fsdp, every array spread."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'MIN_SHARDED_SIZE', 0)
    yield compiled_step(tiny_config(), sharding.make_mesh(1, 2))


# One copy of the state


def test_a_step_keeps_no_second_copy_of_the_state(split):
  """Every array that goes in with the state and comes out again lies in the same memory."""
  compiled, state, metrics, _ = split
  carried = jax.tree.leaves((state, metrics))
  head = compiled.as_text().splitlines()[0]
  aliased = re.search(r'input_output_alias={(.*?)}, \w+=', head).group(1)
  pairs = re.findall(r'{(\d+)}: \((\d+), {}, \w+-alias\)', aliased)
  assert {int(out) for out, _ in pairs} == set(range(len(carried)))  # the outputs begin with them
  assert len({argument for _, argument in pairs}) == len(carried)
  assert compiled.memory_analysis().alias_size_in_bytes == memory.device_bytes((state, metrics))


def test_what_went_into_a_step_is_gone():
  config, mesh = tiny_config(), sharding.make_mesh(2, 1)
  model = model_lib.make(config, (8, 8, 1), 10)
  optimizer = model_lib.optimizer_of(config)
  state = step_lib.initialise(model, optimizer, model_lib.abstract_state(model, mesh))
  metrics = jax.device_put(step_lib.Metrics.empty(), sharding.replicated(mesh))
  batches = train.Batches(config, train.open_source(config), mesh)
  batch = next(batches(0, 1))
  step, _ = train.compile_step(model, optimizer, state, metrics, batches.data, batch)
  before = jax.tree.leaves((state, metrics))
  step(state, metrics, batches.data, batch)
  assert all(leaf.is_deleted() for leaf in before)
  assert not any(leaf.is_deleted() for leaf in batches.data)


# The table


def test_the_table_adds_up_to_what_xla_says(split):
  compiled, state, _, batch = split
  rows = memory.memory_table(compiled, state, batch)
  parts, measured = dict(rows), compiled.memory_analysis()
  assert [name for name, _ in rows] == ['parameters', 'optimizer', 'averages', 'batch', 'rest', 'activations', 'total']
  assert parts['total'] == sum(size for name, size in rows if name != 'total')
  copies = measured.output_size_in_bytes - measured.alias_size_in_bytes
  assert parts['total'] == measured.argument_size_in_bytes + measured.temp_size_in_bytes + max(copies, 0)
  assert parts['activations'] == measured.temp_size_in_bytes > 0
  assert parts['batch'] == 16 // 2 * (8 * 8 + 4)
  assert 0 < parts['rest'] < 1000  # a key, a count, and the bins of the records
  # Adam keeps two arrays and an average one for every parameter; what is odd stays whole.
  shards = {name: int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for name, leaf in named_leaves(state.params)}
  assert parts['parameters'] == parts['averages'] == 4 * sum(shards.values())
  assert parts['optimizer'] == 2 * parts['parameters'] + 2 * 4  # and two counts
  sizes = {name: leaf.size for name, leaf in named_leaves(state.params)}
  assert all(shards[name] == sizes[name] / 2 for name in sizes if sizes[name] % 2 == 0)
  for name, size in rows:
    assert re.search(rf'^ +{name}: +{size / 2 ** 20:.3f} MiB +[\d.]+ %$', memory.format_table(rows), re.M)


def test_the_table_without_an_analysis(split):
  class Silent:
    def memory_analysis(self):
      return None
  _, state, _, batch = split
  names = [name for name, _ in memory.memory_table(Silent(), state, batch)]
  assert names == ['parameters', 'optimizer', 'averages', 'batch', 'total']


# Moments in bfloat16


def test_random_rounding_is_right_on_average():
  """Each number becomes one of its neighbours in bfloat16; the mean of many is the number itself."""
  x = jnp.asarray(np.concatenate([np.random.default_rng(0).normal(size=60) * 10.0 ** np.arange(-30, 30),
                                  [1 + 2 ** -9, -1 - 2 ** -8 / 3, 0.0]]), jnp.float32)
  many = np.asarray(jax.vmap(lambda key: optim.round_at_random(key, x))(jax.random.split(jax.random.key(1), 4096)))
  assert many.dtype == jnp.bfloat16
  many, exact = many.astype(np.float64), np.asarray(x, np.float64)
  gap = np.abs(exact) * 2.0 ** -7  # at least the distance of two neighbours
  assert np.all(np.abs(many - exact) <= gap)
  assert np.all(np.abs(many.mean(0) - exact) <= 5 * 0.5 * gap / np.sqrt(4096))  # five standard deviations


def test_random_rounding_keeps_what_bfloat16_has():
  x = jnp.asarray([0.0, -0.0, 1.0, -1.5, 2.0 ** -126, 3e38, jnp.inf, -jnp.inf], jnp.bfloat16).astype(jnp.float32)
  for seed in range(20):
    rounded = optim.round_at_random(jax.random.key(seed), x)
    np.testing.assert_array_equal(rounded.astype(jnp.float32), x)
  assert jnp.isnan(optim.round_at_random(jax.random.key(0), jnp.asarray([jnp.nan]))).all()


def test_a_slow_moment_moves_though_bfloat16_is_coarse():
  """Adam's second moment, after the gradient has halved, follows float32's; rounded to the nearest it is stuck."""
  params = {'w': jnp.zeros(512)}
  adam = optax.scale_by_adam(b2=0.999)

  def second_moment(optimizer, read):
    state = optimizer.init(params)
    def body(state, scale):
      return optimizer.update({'w': jnp.full(512, scale)}, state, params)[1], None
    state, _ = jax.lax.scan(body, state, jnp.repeat(jnp.asarray([1.0, 0.5]), 1000))
    return np.asarray(read(state).nu['w'], np.float64)

  def nearest():
    """What a plain cast would do."""
    cast = lambda tree, dtype: jax.tree.map(lambda a: a.astype(dtype) if a.ndim else a, tree)
    def update(grads, state, params=None):
      updates, new = adam.update(grads, cast(state, jnp.float32), params)
      return updates, cast(new, jnp.bfloat16)
    return optax.GradientTransformation(lambda p: cast(adam.init(p), jnp.bfloat16), update)

  exact = second_moment(adam, lambda state: state)[0]
  ours = second_moment(optim.narrow(adam), lambda state: state.inner)
  stuck = second_moment(nearest(), lambda state: state)
  assert abs(ours.mean() - exact) < 0.01 * exact
  assert np.abs(ours - exact).max() < 0.2 * exact
  assert abs(stuck.mean() - exact) > 0.1 * exact


def test_bfloat16_moments_take_half_the_memory_and_train_alike():
  config = lambda **changes: tiny_config(optimizer='adam', learning_rate__peak=1e-3, **changes)
  mesh = sharding.make_mesh(2, 1)
  (full, _), (half, _), (again, _) = (run_steps(config(train__moments=kind), mesh)
                                      for kind in ('float32', 'bfloat16', 'bfloat16'))
  kinds = {leaf.dtype for leaf in jax.tree.leaves(half.opt_state) if leaf.ndim}
  assert kinds == {jnp.dtype('bfloat16')}
  arrays = lambda state: sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
  assert 2 * arrays(half) == arrays(full)
  assert fingerprint(half) == fingerprint(again) != fingerprint(full)
  for name, leaf in named_leaves(full.params):
    other = dict(named_leaves(half.params))[name]
    assert other.dtype == leaf.dtype == jnp.float32
    # A step of Adam is at most about the learning rate, whatever the moments: four steps, and a tenth of them apart.
    assert np.abs(np.asarray(other) - np.asarray(leaf)).mean() < 0.1 * 4e-3


# Averages on the host


@pytest.fixture(scope='module')
def near_and_far():
  """Four steps with the averages on the devices, and on the host; two devices, all arrays spread."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'MIN_SHARDED_SIZE', 0)
    mesh = sharding.make_mesh(1, 2)
    yield [run_steps(tiny_config(train__ema_on_host=far), mesh)[0] for far in (False, True)]


def test_averages_on_the_host_are_those_on_the_device(near_and_far):
  near, far = near_and_far
  assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(far.emas)} == {sharding.HOST}
  assert sharding.HOST not in {leaf.sharding.memory_kind for leaf in jax.tree.leaves((near, far.params))}
  assert fingerprint(far) == fingerprint(near)  # of parameters and averages, to the bit
  assert checksums(far) == checksums(near)


def test_averages_on_the_host_come_back_where_they_are_asked_for(near_and_far, tmp_path):
  far = near_and_far[1]
  writer = Checkpoints(tmp_path, writer=True)
  writer.save(far, {})
  writer.close()
  for on_host in (True, False):
    config = tiny_config(train__ema_on_host=on_host)
    abstract = model_lib.abstract_state(model_lib.make(config, (8, 8, 1), 10), sharding.make_mesh(2, 1))
    state, _ = Checkpoints(tmp_path).restore(abstract)
    assert ({leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.emas)} == {sharding.HOST}) == on_host
    assert fingerprint(state) == fingerprint(far)
  moved = sharding.on_device(far)
  assert sharding.HOST not in {leaf.sharding.memory_kind for leaf in jax.tree.leaves(moved)}


def test_the_table_names_averages_on_the_host():
  compiled, state, _, batch = compiled_step(tiny_config(train__ema_on_host=True), sharding.make_mesh(1, 1))
  rows = dict(memory.memory_table(compiled, state, batch))
  assert 'averages' not in rows and rows['averages on the host'] == rows['parameters']


def test_devices_without_host_memory_are_named(monkeypatch):
  model = model_lib.make(tiny_config(train__ema_on_host=True), (8, 8, 1), 10)
  monkeypatch.setattr(sharding, 'HOST', 'memory_of_elsewhere')
  with pytest.raises(UserError, match=r'config.train.ema_on_host: .* cannot keep arrays in memory_of_elsewhere memory'):
    model_lib.abstract_state(model, sharding.make_mesh(1, 1))


# Less kept for the gradient


def test_rematerialising_keeps_little_and_changes_nothing():
  """What the backward pass keeps of the forward pass, apart from parameters: little more than products."""
  net, x = unet.UNet(channels=16, multipliers=(1,), blocks=1, attention=(), groups=4), jnp.zeros((4, 8, 8, 1))
  shapes = shapes_of(net, x.shape)

  def kept(kind):
    run = step_lib.REMAT[kind](lambda params, x, noise: net.apply({'params': params}, x, noise, {}, train=False))
    residuals = jax.eval_shape(lambda params: jax.vjp(run, params, x, jnp.zeros(4))[1], shapes)
    weights = {leaf.shape for leaf in jax.tree.leaves(shapes)}
    return sum(leaf.size for leaf in jax.tree.leaves(residuals) if leaf.shape not in weights)

  assert kept('products') < 0.5 * kept('none')
  one, two = (run_steps(tiny_config(train__remat=kind, **SGD), sharding.make_mesh(1, 1), 2)[0]
              for kind in ('none', 'products'))
  assert_same(two, one, 1e-6)
