"""The magnitude-preserving U-Net: published sizes, and the laws that it is made for."""
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from nets import filled, jit, normal, shapes_of

from diffusion_jax.nets import edm2

SMALL = functools.partial(edm2.UNet, channels=32, multipliers=(1, 2), blocks=1, attention=(8,), head_channels=16,
                          num_classes=3)


def magnitude(x, axes=None):
  return np.sqrt(np.mean(np.square(np.asarray(x, np.float64)), axis=axes))


@pytest.fixture(scope='module')
def trained():
  """(net, x, params that are not those of the initialisation) of a small net on one axis."""
  net, x = SMALL(), normal(4, 16, 2)
  return net, x, jit(net.project)(filled(shapes_of(net, x.shape)))


@pytest.fixture(scope='module')
def apply(trained):
  net, x, usual = trained
  compiled = jit(lambda params, noise, cond: net.apply({'params': params}, x, noise, cond))
  def run(noise=0.3, label=0, drop=False, params=usual):
    cond = {'label': jnp.broadcast_to(jnp.asarray(label), 4), 'drop': jnp.broadcast_to(drop, 4)}
    return np.asarray(compiled(params, jnp.full(4, noise), cond))
  return run


# Published sizes


def test_parameter_counts_are_the_papers():
  """Table 2 of the paper, in millions, for the latents of ImageNet at 512x512: [64, 64, 4].

  A count is a quadratic function of the width, so that those of three sizes give the others.
  """
  def count(width):
    shapes = shapes_of(edm2.UNet(channels=width, num_classes=1000), (1, 64, 64, 4))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  small = [edm2.CHANNELS[size] for size in ('xs', 's', 'm')]
  counts = np.polynomial.Polynomial.fit(small, [count(width) for width in small], 2)
  assert {size: round(counts(width) / 1e6, 1) for size, width in edm2.CHANNELS.items()} == {
      'xs': 124.7, 's': 280.2, 'm': 497.8, 'l': 777.5, 'xl': 1119.3, 'xxl': 1523.2}


# Operations


def test_operations_keep_the_magnitude():
  """Of a million draws: the standard error is below 0.002."""
  a, b = normal(1000, 600), normal(1000, 400, seed=2)
  assert magnitude(edm2.mp_silu(a)) == pytest.approx(1, abs=5e-3)
  for t in (0.0, 0.3, 0.5, 1.0):
    assert magnitude(edm2.mp_sum(a[:, :400], b, t)) == pytest.approx(1, abs=5e-3)
    assert magnitude(edm2.mp_cat(a, b, t)) == pytest.approx(1, abs=5e-3)
  for noise in (-1.55, -0.3, 0.0, 0.4, 1.1):
    assert magnitude(edm2.mp_fourier(jnp.full(1, noise), 192)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize('t', [0.3, 0.5])
def test_each_part_of_a_concatenation_weighs_as_told(t):
  """Whatever the widths: what a layer of random weights gets from the two is as (1 - t) to t."""
  a, b = normal(1000, 90), normal(1000, 10, seed=2)
  both = np.asarray(edm2.mp_cat(a, b, t), np.float64)
  energy = lambda part: np.sum(part ** 2) / len(part)
  assert math.sqrt(energy(both[:, 90:]) / energy(both[:, :90])) == pytest.approx(t / (1 - t), rel=0.02)


def test_normalise_closed_form():
  x = normal(2, 5, 4)
  np.testing.assert_allclose(edm2.normalise(x), x / magnitude(x, -1)[..., None], rtol=1e-5)
  np.testing.assert_allclose(magnitude(edm2.normalise_kernel(normal(3, 3, 4, 6)), (0, 1, 2)), np.ones(6), rtol=1e-6)
  assert magnitude(edm2.normalise(1e-9 * x)) == pytest.approx(1e-5 * magnitude(x), rel=1e-4)
  gradient = jax.grad(lambda x: jnp.sum(edm2.normalise(x)))(jnp.zeros((2, 3)))
  assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize('space', [(), (6,), (4, 6), (4, 4, 2)])
def test_convolutions_are_correlations_with_normalised_weights(space):
  size = 3 if space else 0
  net, x = edm2.MPConv(5, size), normal(3, *space, 4)
  kernel = 7 * normal(*(size,) * len(space), 4, 5, seed=2)
  out = jit(lambda kernel: net.apply({'params': {'kernel': kernel}}, x))(kernel)
  axes = tuple(range(kernel.ndim - 1))
  weights = kernel.astype(np.float64) / np.sqrt(np.sum(kernel.astype(np.float64) ** 2, axis=axes))
  if space:
    dims = len(space)
    padded = np.pad(x.astype(np.float64), [(0, 0), *[(1, 1)] * dims, (0, 0)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3,) * dims, tuple(range(1, dims + 1)))
    expected = np.tensordot(windows, np.moveaxis(weights, -2, 0), dims + 1)
  else:
    expected = x @ weights
  np.testing.assert_allclose(out, expected, atol=1e-5)


# The laws


def energies(net, x, draws):
  """{block: (energies of its input, of its output)} of a net at its initialisation, one entry a draw of weights."""
  shapes, noise, cond = shapes_of(net, x.shape), jnp.array([-0.8, 0.5]), {'label': jnp.array([1, 7])}
  @jit
  def run(params):
    params = jax.tree.map(lambda a: a * (a.ndim > 0), edm2.normalise_weights(params))  # the gains begin at 0
    seen = {}
    def see(call, args, kwargs, context):
      out = call(*args, **kwargs)
      if isinstance(context.module, edm2.Block) and context.method_name == '__call__':
        seen[context.module.name] = jnp.mean(args[0] ** 2), jnp.mean(out ** 2)
      return out
    with nn.intercept_methods(see):
      net.apply({'params': params}, x, noise, cond)
    return seen
  seen = [run(filled(shapes, seed)) for seed in range(draws)]
  return {name: np.array([draw[name] for draw in seen], np.float64).T for name in seen[0]}


def assert_kept(energy):
  """The mean over draws, which is how the paper defines magnitude: one draw of narrow layers strays by a tenth."""
  assert {name: m for name, e in energy.items() if not 0.9 < (m := math.sqrt(np.mean(e))) < 1.1} == {}


def test_magnitudes_through_all_blocks_at_initialisation():
  """Within 1 +- 0.1: the paper's premise. Attention is in the middle alone; the next test has it everywhere."""
  net = edm2.UNet(channels=64, multipliers=(1, 2), blocks=1, attention=(), num_classes=10)
  seen = energies(net, normal(2, 32, 32, 4), 6)
  assert len(seen) == 3 + 2 + 5
  assert_kept({name: after for name, (_, after) in seen.items()})


def test_magnitudes_where_every_block_ends_in_attention():
  """At the paper's sizes of it, 16 and 8: each block keeps the magnitude of what it is given, within 0.1.

  Attention averages values, which for random weights leaves less of them, by design. The encoder normalises its main
  path again in each block and stays within 0.1 of 1. The decoder does not, there or in the paper: what each block
  costs adds up until the skips, half of what each sees, make up for it. So no law holds it closer to 1 than this.
  """
  net = edm2.UNet(channels=32, multipliers=(1, 2), blocks=1, head_channels=32, num_classes=10)
  seen = energies(net, normal(2, 16, 16, 4), 16)
  assert len(seen) == 3 + 2 + 5
  assert_kept({name: after / before for name, (before, after) in seen.items()})
  assert_kept({name: after for name, (_, after) in seen.items() if name.startswith('down')})


def test_attention_costs_no_more_than_its_share():
  """Whatever it sees: values of magnitude 1 average to at most 1, and to 0 at least."""
  block = edm2.Block(32, False, heads=2)
  x, emb = normal(2, 64, 32), normal(2, 8)
  shapes = jax.eval_shape(lambda key: block.init(key, x, emb, False), jax.random.key(0))['params']
  with_it, without = (jit(lambda p, net=net: net.apply({'params': p}, x, emb, False)) for net in (
      block, edm2.Block(32, False)))
  params = filled(shapes)
  ratio = magnitude(with_it(params)) / magnitude(without({k: v for k, v in params.items() if 'attention' not in k}))
  assert 0.7 / math.hypot(0.7, 0.3) - 0.05 < ratio < 1.05


@pytest.fixture(scope='module')
def stepped(trained):
  """(params, gradients, params after a step of Adam with a rate of 0.1, not yet projected)."""
  net, x, params = trained
  target, optimizer = normal(4, 16, 2, seed=5), optax.adam(0.1, b2=0.99)
  def loss(params):
    out = net.apply({'params': params}, x, jnp.linspace(-1, 1, 4), {'label': jnp.arange(4) % 3})
    return jnp.mean((out - target) ** 2)
  def step(params):
    grads = jax.grad(loss)(params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return grads, optax.apply_updates(params, updates)
  return params, *jit(step)(params)


def kernels(params):
  return {jax.tree_util.keystr(path): np.asarray(leaf, np.float64)
          for path, leaf in jax.tree_util.tree_leaves_with_path(params) if leaf.ndim}


def norms(kernel):
  return magnitude(kernel, tuple(range(kernel.ndim - 1)))


def test_weights_keep_their_norm_through_a_step(trained, stepped):
  """From the initialisation on, if the projection follows the update; without it they drift."""
  net, x, _ = trained
  start = edm2.MPConv(5, 3).init(jax.random.key(0), x)['params']
  _, _, after = stepped
  projected = jit(net.project)(after)
  assert len(kernels(projected)) > 20
  for params in (start, projected):
    for name, kernel in kernels(params).items():
      np.testing.assert_allclose(norms(kernel), 1, rtol=1e-5, err_msg=name)
  assert all(np.abs(norms(kernel) - 1).max() > 1e-3 for kernel in kernels(after).values())
  assert jax.tree.map(jnp.ndim, projected) == jax.tree.map(jnp.ndim, after)
  assert projected['out_gain'] == after['out_gain']  # gains are free


def test_the_projection_changes_no_output(stepped, apply):
  _, _, after = stepped
  np.testing.assert_allclose(apply(params=edm2.normalise_weights(after)), apply(params=after), atol=1e-4)


def test_gradients_have_no_part_along_the_weights(stepped):
  params, grads, _ = stepped
  for (name, kernel), gradient in zip(kernels(params).items(), kernels(grads).values(), strict=True):
    axes = tuple(range(kernel.ndim - 1))
    along, size = np.sum(kernel * gradient, axis=axes), np.sqrt(np.sum(kernel ** 2, axes) * np.sum(gradient ** 2, axes))
    assert np.all(np.abs(along) <= 1e-4 * size + 1e-9), name


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: edm2.UNet(dropout=1.0), r'dropout must lie in \[0, 1\), got 1.0'),
    (lambda: edm2.UNet(dtype='float16'), "'float32' or 'bfloat16', got 'float16'"),
    (lambda: edm2.UNet(remat='all'), "remat must be 'none' or 'blocks', got 'all'"),
    (lambda: edm2.UNet(blocks=0), r'got 192, 0 and \(1, 2, 3, 4\)'),
    (lambda: edm2.UNet(num_classes=-1), 'num_classes must be at least 0, got -1'),
    (lambda: edm2.UNet(head_channels=0), 'head_channels must be at least 1, got 0'),
    (lambda: edm2.UNet(image=-1), 'image must be at least 0, got -1'),
    (lambda: shapes_of(SMALL(head_channels=48), (1, 16, 16, 3)), 'width 64, head_channels 48'),
    (lambda: shapes_of(SMALL(), (1, 16, 15, 3)), r'2 levels need sizes divisible by 2, got \(16, 15\)'),
])
def test_bad_arguments_are_named_with_both_values(make, words):
  with pytest.raises(ValueError, match=words):
    make()
