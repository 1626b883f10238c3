"""What XLA's partitioner makes of a mesh: which meshes are right, which are refused, and the faults that are why."""

import jax
import nets
import numpy as np
import pytest
from conftest import tiny_config
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax import model as model_lib
from diffusion_jax import train
from diffusion_jax.nets import dit, products
from diffusion_jax.runtime import sharding
from diffusion_jax.runtime.config import UserError

NET = dit.DiT(width=16, depth=2, heads=2, num_classes=10, scan=True)


def gradients(mesh):
  """The gradients of a loss with respect to parameters of which none is at its initialisation."""
  net, x, y, noise = NET, nets.normal(8, 8, 8, 2), nets.normal(8, 8, 8, 2, seed=2), np.arange(8) * 100.0
  cond = {'label': np.arange(8)}
  params = nets.filled(jax.eval_shape(net.init, jax.random.key(0), x, noise, cond)['params'])
  spread, where = sharding.over_context(mesh, 8), sharding.state(params, mesh)

  def loss(params, x, y, noise, cond):
    return ((net.apply({'params': params}, spread(x), noise, cond) - spread(y)) ** 2).mean()

  arguments = jax.device_put((x, y, noise, cond), sharding.batch(mesh))
  return nets.jit(jax.grad(loss), out_shardings=where)(jax.device_put(params, where), *arguments)


@pytest.fixture(scope='module')
def alone():
  return gradients(sharding.make_mesh(1, 1))


@pytest.mark.parametrize('mesh', [(2, 2, 2), (1, 2, 2, 2)], ids=str)
def test_gradients_of_a_transformer_are_those_of_one_device(alone, mesh, monkeypatch):
  monkeypatch.setattr(sharding, 'MIN_SHARDED_SIZE', 0)
  mesh = sharding.make_mesh(*mesh)
  found = gradients(mesh)
  assert mesh.shape['tensor'] == 1 or any('tensor' in leaf.sharding.spec for leaf in jax.tree.leaves(found))
  scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(alone))  # that of a key's bias is 0
  for (name, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(alone), strict=True):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-5 * max(np.abs(b).max(), 1e-2 * scale), name


def wrong_in_xla(reason):
  """A case that fails today; when it no longer does, what avoids it can go."""
  return pytest.mark.xfail(strict=True, raises=AssertionError, reason=f'XLA {reason}')


def agree(function, mesh, arrays, where, out):
  """Whether `function` of arrays that lie so is what it is on one device."""
  place = lambda spec: NamedSharding(mesh, P(*spec))
  found = jax.jit(function, out_shardings=place(out))(*map(jax.device_put, arrays, map(place, where)))
  np.testing.assert_allclose(np.asarray(found), np.asarray(function(*arrays)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('batch', [
    sharding.BATCH, pytest.param(('data', 'fsdp'), marks=wrong_in_xla('leaves the rows in another order'))], ids=str)
def test_a_product_split_three_ways(batch):
  """The order of the axes in `sharding.BATCH` is why meshes with data, fsdp and tensor are allowed."""
  arrays = [nets.normal(8, 8), nets.normal(8, 8, seed=2)]
  agree(lambda x, kernel: x @ kernel, sharding.make_mesh(2, 2, 2), arrays, [(batch, 'tensor'), ('tensor', 'fsdp')],
        (batch, 'tensor'))


@pytest.mark.parametrize('size', [1, pytest.param(3, marks=wrong_in_xla('adds up over devices with the same part'))])
def test_a_convolution_of_which_image_and_kernel_are_split(size):
  """Why `sharding.check_convolutions` refuses a mesh with context and tensor."""
  arrays = [nets.normal(2, 8, 8, 4), nets.normal(size, size, 4, 8)]
  agree(products.plain_conv, sharding.make_mesh(1, 1, 2, 2), arrays,
        [(None, 'context'), (None, None, None, 'tensor')], (None, 'context', None, 'tensor'))


@pytest.mark.parametrize('rows', [4, pytest.param(2, marks=wrong_in_xla('adds up over devices with the same part'))])
def test_the_gradient_of_a_convolution_with_its_rows_split(rows):
  """Why each device must keep two rows: by one, gradients of what goes in are twice too large on two of `data`."""
  arrays = [nets.normal(4, rows, 4, 4), nets.normal(3, 3, 4, 4), nets.normal(4, rows, 4, 4, seed=2)]
  split = (sharding.BATCH, 'context')
  agree(lambda x, kernel, g: jax.vjp(products.plain_conv, x, kernel)[1](g)[0], sharding.make_mesh(2, 1, 1, 2), arrays,
        [split, (), split], split)


@pytest.mark.parametrize(('mesh', 'shape', 'words'), [
    ((1, 1, 1, 3), (8, 8, 1), 'mesh.context must divide the first axis of an image: context 3, size 8'),
    ((1, 1, 2, 2), (8, 8, 1), 'mesh.tensor=2 and mesh.context=2 cannot both be above 1 for a net with convolutions'),
    ((1, 2, 1, 2), (8, 8, 1), 'mesh.fsdp=2 and mesh.context=2 cannot both be above 1 for a net with convolutions'),
    ((2, 1, 1, 4), (4, 8, 1), 'mesh.context=4 must leave at least two rows .* and one has 4 rows: take at most 2')])
def test_meshes_that_compute_something_else_are_refused(mesh, shape, words):
  config, mesh = tiny_config(), sharding.make_mesh(*mesh)
  made = model_lib.make(config, shape, 10)
  state = model_lib.abstract_state(made, mesh)
  images, labels = jax.ShapeDtypeStruct((1, 16, *shape), np.uint8), jax.ShapeDtypeStruct((1, 16), np.int32)
  with pytest.raises(UserError, match=words):
    steps = train.make_step(made, model_lib.optimizer_of(config), jax.tree.map(lambda a: a.sharding, state))
    jax.eval_shape(steps, jax.random.key(0), state, jax.eval_shape(train.Metrics.empty), None, (images, labels))


def test_convolutions_are_found_wherever_they_are():
  conv = lambda x, kernel: products.plain_conv(x, kernel).sum()
  scanned = lambda x, kernel: jax.lax.scan(lambda c, k: (c + jax.checkpoint(conv)(x, k), None), 0.0, kernel[None])[0]
  x, kernel = np.zeros((1, 6, 8, 1)), np.zeros((3, 3, 1, 1))
  rows = lambda function: set(sharding._rows(jax.make_jaxpr(function)(x, kernel).jaxpr))
  assert rows(jax.jit(jax.grad(scanned))) == {6}
  assert rows(lambda x, kernel: jax.lax.cond(x.sum() > 0, conv, lambda x, kernel: 0.0, x, kernel)) == {6}
  assert rows(lambda x, kernel: x * kernel[0, 0, 0]) == set()
