"""Layers against plain formulas, and gradients written by hand against JAX's."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from nets import SPACES, filled, jit, normal

from diffusion_jax.nets import codecs, layers, products


@pytest.mark.parametrize('dim', [4, 32, 33, 128])
def test_embedding_closed_form(dim):
  noise, half = np.array([0.0, 1.0, 17.25, 999.0]), dim // 2
  expected = np.zeros((4, dim))
  for k in range(half):
    frequency = 10_000 ** (-k / (half - 1))
    expected[:, k], expected[:, half + k] = np.sin(noise * frequency), np.cos(noise * frequency)
  np.testing.assert_allclose(layers.timestep_embedding(jnp.asarray(noise), dim), expected, atol=2e-4)


@pytest.mark.parametrize('space', SPACES)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_group_norm_is_the_two_pass_formula(space, dtype):
  x = jnp.asarray(3 + 2 * normal(2, *space, 6), dtype)
  net = layers.GroupNorm(3)
  params = {'scale': normal(6, seed=2), 'bias': normal(6, seed=3)}
  groups = np.asarray(x, np.float64).reshape(2, -1, 3, 2)
  mean = groups.mean((1, 3), keepdims=True)
  variance = ((groups - mean) ** 2).mean((1, 3), keepdims=True)
  expected = ((groups - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * params['scale'] + params['bias']
  out = jit(net.apply)({'params': params}, x)
  assert out.dtype == dtype
  np.testing.assert_allclose(np.asarray(out, np.float64), expected, **(
      {'atol': 1e-5} if dtype == 'float32' else {'rtol': 2 ** -8, 'atol': 1e-5}))  # the statistics are float32 in both


@pytest.mark.parametrize('space', SPACES)
@pytest.mark.parametrize('size', [1, 3])
@pytest.mark.parametrize('stride', [1, 2])
def test_conv_is_a_correlation(space, size, stride):
  """Of windows with the kernel. TensorFlow's SAME: at stride 2 an even axis is padded behind, an odd one around."""
  net, x, dims = layers.Conv(2, size, stride), normal(2, *space, 3), len(space)
  params = filled(jax.eval_shape(net.init, jax.random.key(0), x)['params'])
  pad = [(0, 0) if size == 1 else (0, 1) if stride == 2 and n % 2 == 0 else (1, 1) for n in space]
  padded = np.pad(x.astype(np.float64), [(0, 0), *pad, (0, 0)])
  windows = np.lib.stride_tricks.sliding_window_view(padded, (size,) * dims, tuple(range(1, dims + 1)))
  windows = windows[(slice(None), *(slice(None, None, stride),) * dims)]  # [B, *S', C, *kernel]
  expected = np.tensordot(windows, np.moveaxis(params['kernel'], -2, 0), dims + 1) + params['bias']
  np.testing.assert_allclose(jit(net.apply)({'params': params}, x), expected, atol=1e-5)


# Gradients


PRODUCTS = {'dot': (products.dot, products.dot_kernel_grad, (2, 5, 3), (3, 4))} | {
    f'conv, stride {stride}, size {size}, {space}': (
        functools.partial(products.conv, stride=stride),
        functools.partial(products.conv_kernel_grad, stride=stride, size=size),
        (2, *space, 3), (size,) * len(space) + (3, 4))
    for stride, size, space in itertools.product((1, 2), (1, 3), SPACES)}


@pytest.fixture(scope='module')
def gradients():
  """{product: (gradients by the handwritten rule, gradients by JAX)} of x, kernel and bias, all in one program."""
  def of(affine, x, kernel, bias):
    out, pull = jax.vjp(affine, x, kernel, bias)
    return pull(jnp.sin(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))
  arguments = {name: (normal(*x), normal(*kernel, seed=2), normal(4, seed=3))
               for name, (_, _, x, kernel) in PRODUCTS.items()}
  def both(arguments):
    return {name: (of(functools.partial(layers._low_precision, product, kernel_grad, jnp.dtype('float32')),
                      *arguments[name]),
                   of(lambda x, kernel, bias, product=product: product(x, kernel) + bias, *arguments[name]))
            for name, (product, kernel_grad, _, _) in PRODUCTS.items()}
  return jit(both)(arguments)


@pytest.mark.parametrize('name', PRODUCTS)
def test_handwritten_gradients_are_jaxs(gradients, name):
  for handwritten, jaxs in zip(*gradients[name], strict=True):
    assert handwritten.shape == jaxs.shape and np.abs(jaxs).max() > 0.1
    np.testing.assert_allclose(handwritten, jaxs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(('fast', 'space'), [
    (products.winograd, (8,)), (products.winograd, (6, 4)), (products.winograd, (4, 2, 6)),
    (products.one_product, (5,)), (products.one_product, (4, 3)), (products.one_product, (2, 1, 3))])
def test_convolutions_on_cpu_have_every_derivative(fast, space):
  """The algorithms that are faster on CPU equal XLA's own: backward, forward, in one argument, batched, and twice."""
  with jax.enable_x64(True):
    x, kernel = jnp.asarray(normal(2, *space, 3), float), jnp.asarray(normal(*(3,) * len(space), 3, 2, seed=2), float)
    derivatives = {
        'value': lambda f: f(x, kernel),
        'gradients': lambda f: jax.grad(f, (0, 1))(x, kernel),
        'directional': lambda f: jax.jvp(f, (x, kernel), (jnp.cos(x), jnp.cos(kernel)))[1],
        'in x alone': lambda f: jax.jvp(lambda x: f(x, kernel), (x,), (jnp.cos(x),))[1],
        'of each example': lambda f: jax.vmap(lambda x: jax.grad(f, 1)(x[None], kernel))(x),
        'twice': lambda f: jax.grad(lambda k: jnp.sum(jax.grad(f)(x, k) ** 2))(kernel),
    }
    total = lambda conv: lambda x, kernel: jnp.sum(jnp.sin(conv(x, kernel)))
    both = jit(lambda: {name: (of(total(jax.checkpoint(fast))), of(total(products.plain_conv)))
                        for name, of in derivatives.items()})()
  for name, (ours, xlas) in both.items():
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(xlas), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='an accelerator takes XLA\'s convolution')
@pytest.mark.parametrize(('space', 'width', 'fast'), [
    ((64,), 64, True), ((8, 12), 64, True), ((8, 9), 64, False), ((4, 4), 64, False), ((4, 4), 256, True),
    ((7,), 256, True), ((2, 4, 4), 256, False)])
def test_the_fast_convolution_is_as_exact_as_float32_allows(space, width, fast):
  x, kernel = normal(2, *space, width), normal(*(3,) * len(space), width, width + 1, seed=2) / (3 * width ** 0.5)
  assert ('product' in str(jax.make_jaxpr(functools.partial(products.conv, stride=1))(x, kernel))) == fast
  with jax.enable_x64(True):
    exact = jit(products.plain_conv)(x.astype(float), kernel.astype(float))
  np.testing.assert_allclose(jit(functools.partial(products.conv, stride=1))(x, kernel), exact, atol=1e-5)


# The codec


def test_pixels_round_trip_and_clip():
  codec, images = codecs.pixels(), jnp.arange(256, dtype=jnp.uint8).reshape(1, 16, 16, 1)
  x = codec.encode({}, codecs.floats(images), jax.random.key(0))
  decode = lambda x: codec.decode({}, x)
  assert x.dtype == jnp.float32 and (x.min(), x.max()) == (-1, 1)
  np.testing.assert_array_equal(decode(x), images)
  np.testing.assert_array_equal(decode(x + 0.49 / 127.5), images)  # to the nearest
  np.testing.assert_array_equal(decode(jnp.array([-1e9, -1.1, -1, 1, 1.1, 1e9, jnp.inf])),
                                [0, 0, 0, 255, 255, 255, 255])
  assert decode(x).dtype == jnp.uint8


@pytest.mark.parametrize(('mask', 'causal'), [(False, False), (True, False), (False, True), (True, True)])
def test_attention_is_its_formula_and_so_is_its_gradient(mask, causal):
  query, key, value = normal(2, 5, 3, 4), normal(2, 5, 3, 4, seed=1), normal(2, 5, 3, 4, seed=2)
  seen = np.ones((2, 3, 5, 5), bool)
  if mask:
    seen[1, :, :, 3:] = False
  if causal:
    seen &= np.tril(np.ones((5, 5), bool))

  def formula(query, key, value):
    scores = jnp.einsum('btnh,blnh->bntl', query, key) / 2  # sqrt(4)
    weights = jnp.where(seen, jnp.exp(scores), 0)
    return jnp.einsum('bntl,blnh->btnh', weights / weights.sum(-1, keepdims=True), value)

  ours = lambda *a: layers.attention(*a, seen[:, :1] if mask else None, causal)
  inputs = tuple(jnp.asarray(a, jnp.float32) for a in (query, key, value))
  np.testing.assert_allclose(jit(ours)(*inputs), formula(*inputs), atol=1e-6)
  gradients = (jax.grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), (0, 1, 2))(*inputs) for f in (ours, formula))
  for mine, plain in zip(*gradients, strict=True):
    np.testing.assert_allclose(mine, plain, atol=2e-6)


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='an accelerator has kernels of its own')
def test_attention_to_many_places_goes_by_rows_and_is_its_formula():
  inputs = [jnp.asarray(normal(2, 1024, 1, 4, seed=i) * size, jnp.float32) for i, size in enumerate((9, 9, 1))]

  def formula(query, key, value):
    weights = jax.nn.softmax(jnp.einsum('btnh,blnh->bntl', query, key) / 2)  # sqrt(4)
    return jnp.einsum('bntl,blnh->btnh', weights, value)

  value_and_gradients = lambda f: jit(lambda *a: (*jax.vjp(f, *a)[1](jnp.cos(a[0])), f(*a)))
  assert 'scan' in str(jax.make_jaxpr(layers.attention)(*inputs))
  for mine, plain in zip(*(value_and_gradients(f)(*inputs) for f in (layers.attention, formula)), strict=True):
    np.testing.assert_allclose(mine, plain, atol=1e-5 * np.abs(plain).max())
