"""Layers that the networks share: channels last, one to three spatial axes, float32 parameters.

With dtype=bfloat16 the products are computed in bfloat16, but every parameter's gradient is accumulated and left in
float32: what is summed over devices is float32 too (a plain cast of the kernel would make XLA reduce in bfloat16).
`gradients_leave_in` makes that a choice.
"""
import contextlib
import contextvars
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Array = jax.Array
PRODUCT = 'product'  # the name of what Dense and Conv return, for policies of jax.checkpoint
VALUES, SCALE = 'kernel_int8', 'kernel_scale'  # the parameters in the place of 'kernel' that `quantise.int8` makes
_LEAVES_IN: contextvars.ContextVar[str] = contextvars.ContextVar('_LEAVES_IN', default='float32')
_PLACED: contextvars.ContextVar[Callable] = contextvars.ContextVar('_PLACED', default=lambda x: x)


@contextlib.contextmanager
def gradients_leave_in(dtype: str) -> Iterator[None]:
  """Within it, kernels' gradients leave their products in `dtype`: 'float32', or 'bfloat16' to send half the bytes.

  What devices sum over each other is of that type. It concerns bfloat16 layers only, and is read while they are traced.
  """
  token = _LEAVES_IN.set(dtype)
  try:
    yield
  finally:
    _LEAVES_IN.reset(token)


@contextlib.contextmanager
def placed(place: Callable[[Array], Array]) -> Iterator[None]:
  """Within it, `place` is applied to all that Dense and Conv return [B, ...], to say over which devices it lies.

  Left to itself, XLA may spread activations as kernels are spread, and gather the batch for it. Read while layers are
  traced.
  """
  token = _PLACED.set(place)
  try:
    yield
  finally:
    _PLACED.reset(token)


def uniform_init(scale: float = 1.0) -> Callable:
  """DDPM's initialiser: uniform with variance scale / fan_avg; 0 gives zeros."""
  return nn.initializers.variance_scaling(scale, 'fan_avg', 'uniform') if scale else nn.initializers.zeros


def timestep_embedding(noise: Array, dim: int, max_period: float = 10_000.0) -> Array:
  """Sines, then cosines, of noise [B] at dim // 2 geometric frequencies, as DDPM orders them: [B, dim]."""
  half = dim // 2
  frequencies = jnp.exp(-math.log(max_period) / (half - 1) * jnp.arange(half))
  angles = noise.astype(jnp.float32)[:, None] * frequencies
  return jnp.pad(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1), ((0, 0), (0, dim % 2)))


class Dense(nn.Module):
  """x [..., C] -> [..., features]."""
  features: int
  init_scale: float = 1.0
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = kernel_of(self, uniform_init(self.init_scale), (x.shape[-1], self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    if isinstance(kernel, Integers):
      return in_integers(x, kernel, bias, self.dtype)
    return affine(_dot, _dot_kernel_grad, x, kernel, bias, self.dtype)


class Conv(nn.Module):
  """A convolution with kernel `size` along every spatial axis: x [B, *S, C] -> [B, *S // stride, features].

  Padding keeps the size at stride 1. At stride 2 it follows TensorFlow's SAME, as DDPM did: the odd row goes last.
  """
  features: int
  size: int = 3
  stride: int = 1
  init_scale: float = 1.0
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Array) -> Array:
    dims = x.ndim - 2
    kernel = kernel_of(self, uniform_init(self.init_scale), (self.size,) * dims + (x.shape[-1], self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    if isinstance(kernel, Integers):
      return in_integers(x, kernel, bias, self.dtype, self.stride)
    if self.size == 1 and self.stride == 1:
      return affine(_dot, _dot_kernel_grad, x, kernel.reshape(kernel.shape[-2:]), bias, self.dtype)
    return affine(functools.partial(_conv, stride=self.stride),
                  functools.partial(_conv_kernel_grad, stride=self.stride, size=self.size), x, kernel, bias, self.dtype)


@jax.named_scope('attention')
def attention(query: Array, key: Array, value: Array, mask: Array | None = None, causal: bool = False) -> Array:
  """softmax(query key^T / sqrt(H)) value of each head: query [B, T, N, H], key and value [B, L, N, H] -> as query.

  mask: which keys a query may see, bool that broadcasts to [B, N, T, L]; causal: only those up to its own place.
  """
  if jax.default_backend() != 'cpu' or query.dtype != jnp.float32:
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)
  # The same with the heads in front: XLA's CPU backend takes up to twice as long for products of them from behind.
  query, key, value = (a.swapaxes(1, 2) for a in (query, key, value))
  if mask is None and not causal and query.shape[2] % 64 == 0 and query.shape[2] * key.shape[2] >= 2 ** 20:
    return _attend_by_rows(query, key, value).swapaxes(1, 2)
  scores = query @ key.swapaxes(2, 3) * query.shape[-1] ** -0.5
  if causal:
    before = jnp.tril(jnp.ones(scores.shape[2:], bool))
    mask = before if mask is None else mask & before
  if mask is not None:
    scores = jnp.where(mask, scores, -0.7 * jnp.finfo(scores.dtype).max)
  return (jax.nn.softmax(scores) @ value).swapaxes(1, 2)


def _attend_by_rows(query, key, value, rows=64):
  """Attention [B, N, T, H] of `rows` queries at a time, whose scores stay in a core's cache."""

  def attend(query):
    weights = query @ key.swapaxes(2, 3)
    weights = jnp.exp(weights - weights.max(-1, keepdims=True))
    return weights @ value / weights.sum(-1, keepdims=True)

  b, n, t, h = query.shape
  parts = (query * h ** -0.5).reshape(b, n, t // rows, rows, h)
  return jnp.moveaxis(lax.map(attend, jnp.moveaxis(parts, 2, 0)), 0, 2).reshape(query.shape)


class GroupNorm(nn.Module):
  """Group normalisation over the spatial axes and the channels of each group, computed in float32."""
  num_groups: int = 32
  epsilon: float = 1e-6

  @nn.compact
  def __call__(self, x: Array) -> Array:
    channels = x.shape[-1]
    if channels % self.num_groups:
      raise ValueError(f'num_groups must divide the channels: {channels} channels, {self.num_groups} groups')
    scale = self.param('scale', nn.initializers.ones, (channels,))
    bias = self.param('bias', nn.initializers.zeros, (channels,))
    # One pass for both moments, then one multiply and add per element.
    y = x.astype(jnp.float32)
    space = tuple(range(1, x.ndim - 1))
    grouped = lambda a: a.reshape(-1, self.num_groups, channels // self.num_groups).mean(-1, keepdims=True)
    mean, square = grouped(y.mean(space)), grouped((y * y).mean(space))
    rstd = lax.rsqrt(jnp.maximum(square - mean * mean, 0) + self.epsilon)
    per_channel = lambda a: jnp.broadcast_to(a, (len(x), self.num_groups, channels // self.num_groups))
    expand = lambda a: a.reshape((len(x),) + (1,) * len(space) + (channels,))
    slope = expand(per_channel(rstd)) * scale
    return (y * slope + (bias - expand(per_channel(mean)) * slope)).astype(x.dtype)


def affine(product: Callable, kernel_grad: Callable, x: Array, kernel: Array, bias: Array, dtype: str) -> Array:
  """product(x, kernel) + bias in `dtype`, with float32 gradients of kernel and bias."""
  if dtype == 'float32':
    y = product(x, kernel) + bias
  else:
    kernel_grad = functools.partial(kernel_grad, dtype=jnp.dtype(_LEAVES_IN.get()))
    y = _low_precision(product, kernel_grad, jnp.dtype(dtype), x.astype(dtype), kernel, bias)
  return checkpoint_name(_PLACED.get()(y), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _low_precision(product, kernel_grad, dtype, x, kernel, bias):
  return product(x, kernel.astype(dtype)) + bias.astype(dtype)


def _forward(product, kernel_grad, dtype, x, kernel, bias):
  return _low_precision(product, kernel_grad, dtype, x, kernel, bias), (x, kernel)


def _backward(product, kernel_grad, dtype, saved, g):
  x, kernel = saved
  dx, = jax.linear_transpose(lambda x: product(x, kernel.astype(dtype)), x)(g)
  return dx, kernel_grad(x, g).astype(kernel.dtype), g.astype(jnp.float32).sum(range(g.ndim - 1))


_low_precision.defvjp(_forward, _backward)


# Eight bits


class Integers(NamedTuple):
  """A kernel [*K, inputs, outputs] as int8 values, those of each output to be multiplied by its scale [outputs]."""
  values: Array
  scale: Array


def kernel_of(layer: nn.Module, init: Callable, shape: tuple[int, ...]) -> Array | Integers:
  """A layer's parameter 'kernel', or what `quantise.int8` has put in its place."""
  if layer.has_variable('params', VALUES):
    return Integers(layer.get_variable('params', VALUES), layer.get_variable('params', SCALE))
  return layer.param('kernel', init, shape)


def rounded(x: Array, axes: Sequence[int]) -> tuple[Array, Array]:
  """x as int8 times a float32 scale, which along `axes` is one: the largest |x| becomes 127, and 0 is exact.

  What is not finite makes the scale so: it is not hidden.
  """
  x = x.astype(jnp.float32)
  largest = jnp.max(jnp.abs(x), axis=tuple(axes), keepdims=True)
  largest = jnp.where(largest == 0, 127, largest)
  return jnp.round(x * (127 / largest)).astype(jnp.int8), largest / 127


def in_integers(x: Array, kernel: Integers, bias: Array, dtype: str, stride: int = 1) -> Array:
  """x times the kernel, plus bias, in `dtype`: int8 by int8, summed as int32, scaled in float32.

  A matrix takes x [.., C], each row with a scale of its own, a convolution x [B, *S, C], each example: no example
  depends on the others.
  """
  values, scale = kernel
  if math.prod(values.shape[:-2]) == stride == 1:
    x, range_of = rounded(x, [-1])
    total = _dot(x, values.reshape(values.shape[-2:]), jnp.int32)
  else:
    x, range_of = rounded(x, range(1, x.ndim))
    # XLA convolves no integers on GPUs.
    total = (_patches_dot if jax.default_backend() == 'gpu' else _plain_conv)(x, values, stride, jnp.int32)
  return (total.astype(jnp.float32) * (range_of * scale) + bias).astype(dtype)


def _patches_dot(x, kernel, stride, dtype):
  """_plain_conv as one product of a matrix."""
  return _dot(_seen(x, kernel.shape[:-2], stride), kernel.reshape(-1, kernel.shape[-1]), dtype)


def _seen(x, window, stride):
  """What a convolution sees of x at each place, side by side: [B, *S, C] -> [B, *S // stride, prod(window) C]."""
  x = jnp.pad(x, [(0, 0), *(_padding(n, k, stride) for n, k in zip(x.shape[1:-1], window, strict=True)), (0, 0)])
  last = [n - k + 1 for n, k in zip(x.shape[1:-1], window, strict=True)]
  parts = [x[(slice(None), *(slice(i, i + n, stride) for i, n in zip(offsets, last, strict=True)))]
           for offsets in itertools.product(*map(range, window))]
  return jnp.concatenate(parts, -1)


def _dot(x, kernel, dtype=None):
  return jnp.matmul(x, kernel, preferred_element_type=dtype)


def _dot_kernel_grad(x, g, dtype=None):
  return lax.dot_general(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), (((0,), (0,)), ((), ())),
                         preferred_element_type=dtype or jnp.promote_types(x.dtype, jnp.float32))


def _padding(size, kernel, stride):
  """SAME padding (low, high) of one axis."""
  total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
  return total // 2, total - total // 2


def _conv(x, kernel, stride):
  space = x.shape[1:-1]
  # Small layers have more to mix than to multiply; on three axes the program would be too long to compile.
  if (jax.default_backend() == 'cpu' and x.dtype == jnp.float32 and stride == 1 and set(kernel.shape[:-2]) == {3}
      and min(kernel.shape[-2:]) >= 64 and len(space) < 3):
    if math.prod(space) < 64:
      return _one_product(x, kernel)
    if not any(n % 2 for n in space):
      return jax.checkpoint(_winograd)(x, kernel)  # its mixed copies of x are made again for the gradient, not kept
  return _plain_conv(x, kernel, stride)


def _plain_conv(x, kernel, stride=1, dtype=None):
  dims = x.ndim - 2
  space = ''.join('DHW'[3 - dims:])
  padding = [_padding(n, k, stride) for n, k in zip(x.shape[1:-1], kernel.shape, strict=False)]
  return lax.conv_general_dilated(x, kernel, (stride,) * dims, padding,
                                  dimension_numbers=(f'N{space}C', f'{space}IO', f'N{space}C'),
                                  preferred_element_type=dtype)


# x @ kernel, whose kernel gradient is x^T g in this order. JAX's own is (g^T x)^T, for which XLA's CPU backend writes a
# transposed copy of g, computing all of g again in an order that is several times slower than the product itself.
_product = Primitive('product')
_product.def_impl(jax.jit(_dot))
_product.def_abstract_eval(lambda x, kernel: x.update(shape=(*x.shape[:-1], kernel.shape[-1])))
mlir.register_lowering(_product, mlir.lower_fun(_dot, multiple_results=False))
ad.defbilinear(_product, lambda g, x, kernel: _product.bind(g, kernel.T), lambda g, x, kernel: _dot_kernel_grad(x, g))
batching.primitive_batchers[_product] = lambda arguments, axes: (jax.vmap(_dot, axes)(*arguments), 0)


def _one_product(x, kernel):
  """_plain_conv(x, kernel). At a few places its copies cost little, and on a CPU products are up to twice as fast."""
  return _product.bind(_seen(x, kernel.shape[:-2], 1), kernel.reshape(-1, kernel.shape[-1]))


def _winograd(x, kernel):
  """_plain_conv(x, kernel) for kernels of size 3 and even axes, by minimal filtering F(2, 3): Lavin & Gray 2015, 4.1.

  Along each axis, two outputs take four products in place of six. On a CPU this is one and a half times as fast as
  XLA's convolution, and twice to three times in the gradient of the kernel, for which XLA's backend has no good code.
  """
  axes = range(1, x.ndim - 1)
  inputs, matrices = [jnp.pad(x, [(0, 0), *[(1, 1)] * len(axes), (0, 0)])], [kernel]
  for axis in axes:
    inputs = [part for a in inputs for part in _mix_inputs(a, axis)]
    matrices = [part for a in matrices for part in _mix_kernel(a)]
  outputs = [_product.bind(a, matrix) for a, matrix in zip(inputs, matrices, strict=True)]
  for axis in reversed(axes):
    outputs = [_mix_outputs(*outputs[i:i + 4], axis) for i in range(0, len(outputs), 4)]
  return outputs[0]


def _mix_inputs(x, axis):
  """What is multiplied along an axis, for windows of 4 that overlap by 2: x [.., 2 n + 2, ..] -> 4 of [.., n, ..]."""
  n = x.shape[axis] // 2 - 1
  pairs = x.reshape(*x.shape[:axis], n + 1, 2, *x.shape[axis + 1:])  # not strided: its transpose is fast too
  (a, c), (b, d) = ([lax.slice_in_dim(half, i, i + n, 1, axis) for i in (0, 1)] for half in (
      lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1)))
  return a - c, b + c, c - b, b - d


def _mix_kernel(kernel):
  """[3, ..] -> 4 of [..]."""
  a, b, c = kernel
  return a, (a + b + c) / 2, (a - b + c) / 2, c


def _mix_outputs(a, b, c, d, axis):
  """4 products [.., n, ..] -> [.., 2 n, ..]."""
  pairs = jnp.stack([a + b + c, b - c - d], axis + 1)
  return pairs.reshape(*a.shape[:axis], 2 * a.shape[axis], *a.shape[axis + 1:])


def _conv_kernel_grad(x, g, stride, size, dtype=jnp.float32):
  """The gradient of _conv's kernel: a convolution of x with g in which batch and channels change places."""
  dims = x.ndim - 2
  space = ''.join('DHW'[3 - dims:])
  # The window must slide `size` times: the high padding is whatever makes it so.
  padding = []
  for n, m in zip(x.shape[1:-1], g.shape[1:-1], strict=True):
    low, _ = _padding(n, size, stride)
    padding.append((low, (m - 1) * stride + size - n - low))
  return lax.conv_general_dilated(x, g, (1,) * dims, padding, rhs_dilation=(stride,) * dims,
                                  dimension_numbers=(f'C{space}N', f'I{space}O', f'{space}NC'),
                                  preferred_element_type=dtype)
