"""Products of fewer bits: exact where they can be, within their bound elsewhere, and chosen for sampling alone."""
import functools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, tiny_config
from flax.traverse_util import flatten_dict
from nets import filled, jit, normal

from diffusion_jax import evaluate, sample, train
from diffusion_jax import model as model_lib
from diffusion_jax.nets import edm2, layers, products, quantise
from diffusion_jax.nets.dit import DiT, MMDiT
from diffusion_jax.nets.text_unet import TextUNet
from diffusion_jax.nets.unet import ADM, DDPMpp, NCSNpp, UNet
from diffusion_jax.runtime import command, log
from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime.config import UserError
from diffusion_jax.trained import Trained, reduced

TINY = {'channels': 8, 'multipliers': (1, 2), 'blocks': 1, 'attention': (4,), 'num_classes': 3}
NETS = {
    'DDPM': UNet(**TINY, groups=4, dropout=0.0), 'DDPM++': DDPMpp(**TINY, groups=4), 'NCSN++': NCSNpp(**TINY, groups=4),
    'ADM': ADM(**TINY, groups=4, head_channels=4), 'EDM2': edm2.UNet(**TINY, head_channels=4),
    'text': TextUNet(channels=8, multipliers=(1, 2), blocks=1, groups=4, depth=(1, 0), heads=2, text=6),
    'DiT': DiT(width=16, depth=2, heads=2, num_classes=3),
    'DiT, scanned': DiT(width=16, depth=2, heads=2, num_classes=3, scan=True),
    'MMDiT': MMDiT(width=16, depth=2, heads=2)}
LAYERS = {'matrix': (functools.partial(layers.Dense, 5), (3, 7, 6)),
          'conv, 1 axis': (functools.partial(layers.Conv, 5), (3, 9, 6)),
          'conv, 2 axes': (functools.partial(layers.Conv, 5), (3, 6, 5, 6)),
          'conv, stride 2': (functools.partial(layers.Conv, 5, stride=2), (3, 6, 5, 6)),
          'conv of size 1': (functools.partial(layers.Conv, 5, 1), (3, 6, 5, 6)),
          'magnitude-preserving': (functools.partial(edm2.MPConv, 5, 3), (3, 6, 4, 6))}
every_layer = pytest.mark.parametrize('name', LAYERS)
every_net = pytest.mark.parametrize('name', NETS)


def given(batch=2):
  cond = {'label': jnp.arange(batch) % 3, 'text': jnp.asarray(normal(batch, 5, 6, seed=3))}
  return jnp.asarray(normal(batch, 8, 8, 3)), jnp.linspace(10.0, 900.0, batch), cond


@functools.cache
def shapes(name):
  return jax.eval_shape(NETS[name].init, jax.random.key(0), *given())['params']


def in_int8(params):
  return quantise.int8({'middle': params})['middle']


@every_layer
def test_integers_that_fit_are_multiplied_exactly(name):
  """Where every range is 127, nothing is rounded."""
  make, shape = LAYERS[name]
  net, rng = make(), np.random.default_rng(0)
  x = rng.integers(-126, 127, shape).astype(np.float32)
  x[..., 0] = 127  # of each row, and so of each example
  params = jax.tree.map(lambda leaf: rng.integers(-126, 127, leaf.shape).astype(np.float32),
                        jax.eval_shape(net.init, jax.random.key(0), x)['params'])
  params['kernel'][..., 0, :] = -127
  if isinstance(net, edm2.MPConv):
    params = edm2.normalise_weights(params)
  with jax.enable_x64(True):
    exact = jit(net.apply)({'params': jax.tree.map(lambda a: jnp.asarray(a, float), params)}, x.astype(float))
  held = in_int8(params)
  assert held[layers.VALUES].dtype == jnp.int8 and np.abs(held[layers.VALUES]).max() == 127
  np.testing.assert_allclose(jit(net.apply)({'params': held}, x), exact, rtol=2e-6, atol=2e-6 * np.abs(exact).max())


@every_layer
def test_the_error_is_within_the_bound_of_rounding(name):
  """Of x and of w at most half a unit each: |error| <= sum |x| s / 2 + |w| r / 2 + r s / 4, with units r and s."""
  make, shape = LAYERS[name]
  net, x = make(), jnp.asarray(normal(*shape))
  params = filled(jax.eval_shape(net.init, jax.random.key(0), x)['params'])
  if isinstance(net, edm2.MPConv):
    params = edm2.normalise_weights(params)
  held = in_int8(params)
  plain = lambda kernel, x: jit(net.apply)({'params': {**params, 'kernel': kernel}}, x)
  error = np.abs(jit(net.apply)({'params': held}, x) - plain(params['kernel'], x))
  rows = name in ('matrix', 'conv of size 1')
  r = jnp.broadcast_to(jnp.abs(x).max(-1 if rows else range(1, x.ndim), keepdims=True) / 127, x.shape)
  s = jnp.broadcast_to(held[layers.SCALE], params['kernel'].shape)
  # Every product as a layer that only adds: without bias, and for a kernel that is not normalised.
  if isinstance(net, edm2.MPConv):
    product = lambda x, w: products.plain_conv(x, w) / math.sqrt(math.prod(w.shape[:-1]))
  else:
    product = lambda x, w: net.apply({'params': {'kernel': w, 'bias': jnp.zeros(5)}}, x)
  bound = product(jnp.abs(x), s / 2) + product(r / 2, jnp.abs(params['kernel'])) + product(r / 2, s / 2)
  assert (error <= bound * 1.001 + 1e-5).all()
  assert error.max() > bound.max() / 100  # and there is one


@every_net
def test_every_network_multiplies_integers_between_its_ends(name):
  """As many integer products as kernels that are held so; and those are three quarters of all, or more."""
  net, before = NETS[name], shapes(name)
  held = jax.eval_shape(lambda params: quantise.reduced(net, params, 'int8')[1], before)
  flat = flatten_dict(held, sep='/')
  kernels = {path: leaf for path, leaf in flat.items() if path.endswith(layers.VALUES)}
  assert all(leaf.dtype == jnp.int8 for leaf in kernels.values())
  kept = {path.removesuffix('/kernel') for path in flat if path.endswith('/kernel')}
  ends = {'patches/embed', 'head/out'} if 'DiT' in name else {'conv_in', 'conv_out'}
  assert ends <= kept and all(path in ends or 'embed' in path or path == 'down_0_input/conv' for path in kept)
  program = str(jax.make_jaxpr(lambda params: net.apply({'params': params}, *given()))(held))
  products = program.count('preferred_element_type=int32')
  assert products == len(kernels)


def test_parameters_take_a_quarter():
  """Of the CIFAR-10 network, by its shapes."""
  config = config_lib.load(str(ROOT / 'configs' / 'ddpm_cifar10.py'))
  net = config_lib.build(config.net)
  params = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1), {})['params']
  size = lambda tree: sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  made = {p: jax.eval_shape(lambda params, p=p: quantise.reduced(net, params, p)[1], params)
          for p in ('int8', 'bfloat16')}
  assert size(params) == 4 * 35_746_307
  assert 0.25 < size(made['int8']) / size(params) < 0.26
  assert 0.5 < size(made['bfloat16']) / size(params) < 0.51


@pytest.fixture(scope='module')
def outputs():
  """{precision: the DDPM U-Net's output}, and under 'other' that of int8 beside another example."""
  net, (x, noise, cond) = UNet(channels=8, multipliers=(1,), blocks=1, attention=(), groups=4, dropout=0.0), given()
  params = filled(jax.eval_shape(net.init, jax.random.key(0), x, noise, cond)['params'])
  found = {'': jit(net.apply)({'params': params}, x, noise, cond)}
  for precision in ('bfloat16', 'int8'):
    made, held = quantise.reduced(net, params, precision)
    call = jit(made.apply)
    found[precision] = call({'params': held}, x, noise, cond)
  found['other'] = call({'params': held}, x.at[1].multiply(100), noise.at[1].set(3.0), cond)
  return jax.device_get(found)


def relative(a, exact):
  return np.linalg.norm(a - exact) / np.linalg.norm(exact)


def test_bfloat16_is_within_a_hundredth(outputs):
  assert outputs['bfloat16'].dtype == np.float32
  assert 1e-4 < relative(outputs['bfloat16'], outputs['']) < 1e-2


def test_eight_bits_lose_a_few_per_cent(outputs):
  assert 1e-3 < relative(outputs['int8'], outputs['']) < 5e-2


def test_an_example_does_not_depend_on_its_batch(outputs):
  np.testing.assert_array_equal(outputs['other'][0], outputs['int8'][0])
  assert np.any(outputs['other'][1] != outputs['int8'][1])


@pytest.mark.parametrize('space', [(7,), (6, 5), (3, 4, 5)])
def test_where_integers_are_not_convolved_a_matrix_gives_the_same(space):
  """As on GPUs."""
  rng = np.random.default_rng(0)
  x, kernel = (jnp.asarray(rng.integers(-127, 128, shape), jnp.int8) for shape in (
      (2, *space, 4), (*(3,) * len(space), 4, 5)))
  forms = products.patches_product, products.plain_conv
  both = jit(lambda x, kernel: [[of(x, kernel, stride, jnp.int32) for of in forms] for stride in (1, 2)])
  for found, expected in both(x, kernel):
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)


def test_what_is_not_finite_is_not_hidden():
  x = np.ones((4, 4), np.float32)
  x[0, 1], x[1, 2], x[3] = np.nan, np.inf, 0
  out = np.asarray(jit(lambda kernel, x: layers.Dense(2).apply(
      {'params': in_int8({'kernel': kernel, 'bias': jnp.zeros(2)})}, x))(np.ones((4, 2), np.float32) * [1, 0], x))
  assert np.isnan(out[:2]).all()
  np.testing.assert_allclose(out[2:], [[4, 0], [0, 0]], rtol=1e-6)


# The commands


class Three(nn.Module):
  """Three convolutions of this library, or of flax: the level adds to the first."""
  flax: bool = False
  num_classes: int = 0
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x, noise, cond, train=False):
    conv = (lambda width, name: nn.Conv(width, (3, 3), name=name)) if self.flax else (
        lambda width, name: layers.Conv(width, dtype=self.dtype, name=name))
    h = nn.swish(conv(16, 'conv_in')(x) + noise[:, None, None, None] / 1000)
    return conv(x.shape[-1], 'conv_out')(nn.swish(conv(16, 'conv')(h))).astype(x.dtype)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A finished run of `Three`."""
  if __name__ not in config_lib.ALLOWED:
    config_lib.allow(__name__)
  config = tiny_config()
  config.net = config_lib.spec(Three)
  workdir = tmp_path_factory.mktemp('runs') / 'three'
  assert train.train(config, workdir) == 0
  return workdir


def test_samples_are_drawn_in_the_precision_asked_for(run, tmp_path):
  """Other images, by 20 dB nearer than those of other ids."""
  images = {}
  for flags in ([], ['--precision=bfloat16'], ['--precision=int8']):
    assert command.run(sample.main, [f'--workdir={run}', '--num=8', f'--out={tmp_path}/a.npz', *flags]) == 0
    with np.load(tmp_path / 'a.npz') as file:
      images[' '.join(flags)] = file['image'].astype(float)
  apart = np.mean((images[''][:4] - images[''][4:]) ** 2)
  assert all(0 < np.mean((images[f'--precision={p}'] - images['']) ** 2) < apart / 100 for p in ('bfloat16', 'int8'))


def test_an_evaluation_says_its_precision_and_keeps_its_parameters_hash(run):
  for flags in ([], ['--precision=int8']):
    assert command.run(evaluate.main, [f'--workdir={run}', '--ema=main', '--features=pixels', *flags]) == 0
  records = log.read_lines(run / 'eval.jsonl')
  assert {r.get('precision') for r in records} == {None, 'int8'} and len({r['params_hash'] for r in records}) == 1
  assert len({r['evaluation'] for r in records}) == 2
  assert len({r['value'] for r in records if r['metric'] == 'fd_pixels_24'}) == 2


def test_a_run_from_before_there_was_a_choice_is_read(run, tmp_path):
  config = json.loads((run / 'config.json').read_text())
  assert config['sample'].pop('precision') == ''
  (tmp_path / 'config.json').write_text(json.dumps(config))
  assert config_lib.from_json(tmp_path / 'config.json').sample.precision == ''


def test_an_unknown_precision_is_named(run, capsys):
  assert command.run(sample.main, [f'--workdir={run}', '--precision=int4']) == 2
  assert "config.sample.precision must be empty or bfloat16 or int8, got 'int4'" in capsys.readouterr().err


@pytest.mark.parametrize(('changes', 'precision', 'words'), [
    (None, 'bfloat16', 'the products of Small have no dtype to choose'), (None, 'int8', 'Small have no dtype'),
    ({'flax': True}, 'int8', 'Three has layers of its own')])
def test_a_net_that_cannot_is_named(changes, precision, words):
  config = tiny_config()
  if changes is not None:
    config_lib.allow(__name__)
    config.net = config_lib.spec(Three, **changes)
  model = model_lib.make(config, (8, 8, 1), 10)
  params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), jax.eval_shape(model.init, jax.random.key(0)))
  trained = Trained(model, None, params, 0, 0, 'main', ())
  assert reduced(trained, '') is trained
  with pytest.raises(UserError, match=words):
    reduced(trained, precision)
