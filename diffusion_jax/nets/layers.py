"""Layers that the networks share: channels last, one to three spatial axes, float32 parameters.

With dtype=bfloat16 the products are computed in bfloat16, but every parameter's gradient is accumulated and left in
float32: what is summed over devices is float32 too (a plain cast of the kernel would make XLA reduce in bfloat16).
`gradients_leave_in` makes that a choice.
"""
import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from diffusion_jax.nets import products

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
    return affine(products.dot, products.dot_kernel_grad, x, kernel, bias, self.dtype)


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
      return affine(products.dot, products.dot_kernel_grad, x, kernel.reshape(kernel.shape[-2:]), bias, self.dtype)
    return affine(functools.partial(products.conv, stride=self.stride),
                  functools.partial(products.conv_kernel_grad, stride=self.stride, size=self.size), x, kernel, bias,
                  self.dtype)


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
    per_group = lambda a: a.reshape(len(x), self.num_groups, channels // self.num_groups).mean(-1, keepdims=True)
    per_channel = lambda a: jnp.broadcast_to(a, (*a.shape[:2], channels // self.num_groups)).reshape(len(x), channels)
    mean, square = per_group(y.mean(space)), per_group((y * y).mean(space))
    std = per_channel(jnp.sqrt(jnp.maximum(square - mean * mean, 0) + self.epsilon))
    # Both end in a division, since XLA keeps the results of one: what costs less it computes anew for every element.
    slope, offset = scale / std, (bias * std - per_channel(mean) * scale) / std
    expand = lambda a: a.reshape(len(x), *[1] * len(space), channels)
    return (y * expand(slope) + expand(offset)).astype(x.dtype)


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
    total = products.dot(x, values.reshape(values.shape[-2:]), jnp.int32)
  else:
    x, range_of = rounded(x, range(1, x.ndim))
    # XLA convolves no integers on GPUs.
    convolve = products.patches_product if jax.default_backend() == 'gpu' else products.plain_conv
    total = convolve(x, values, stride, jnp.int32)
  return (total.astype(jnp.float32) * (range_of * scale) + bias).astype(dtype)
