"""Layers that the networks share: channels last, one to three spatial axes, float32 parameters.

With dtype=bfloat16 the products are computed in bfloat16, but every parameter's gradient is accumulated and left in
float32: what is summed over devices is float32 too (a plain cast of the kernel would make XLA reduce in bfloat16).
"""
import functools
import itertools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

Array = jax.Array


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
    kernel = self.param('kernel', uniform_init(self.init_scale), (x.shape[-1], self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
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
    kernel = self.param('kernel', uniform_init(self.init_scale), (self.size,) * dims + (x.shape[-1], self.features))
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    if self.size == 1 and self.stride == 1:
      return affine(_dot, _dot_kernel_grad, x, kernel.reshape(kernel.shape[-2:]), bias, self.dtype)
    return affine(functools.partial(_conv, stride=self.stride),
                  functools.partial(_conv_kernel_grad, stride=self.stride, size=self.size), x, kernel, bias, self.dtype)


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
    return product(x, kernel) + bias
  return _low_precision(product, kernel_grad, jnp.dtype(dtype), x.astype(dtype), kernel, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _low_precision(product, kernel_grad, dtype, x, kernel, bias):
  return product(x, kernel.astype(dtype)) + bias.astype(dtype)


def _forward(product, kernel_grad, dtype, x, kernel, bias):
  return _low_precision(product, kernel_grad, dtype, x, kernel, bias), (x, kernel)


def _backward(product, kernel_grad, dtype, saved, g):
  x, kernel = saved
  dx, = jax.linear_transpose(lambda x: product(x, kernel.astype(dtype)), x)(g)
  return dx, kernel_grad(x, g), g.astype(jnp.float32).sum(range(g.ndim - 1))


_low_precision.defvjp(_forward, _backward)


def _dot(x, kernel):
  return x @ kernel


def _dot_kernel_grad(x, g):
  return lax.dot_general(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), (((0,), (0,)), ((), ())),
                         preferred_element_type=jnp.float32)


def _padding(size, kernel, stride):
  """SAME padding (low, high) of one axis."""
  total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
  return total // 2, total - total // 2


def _conv(x, kernel, stride):
  # Where there is little to multiply at each position, XLA's own gradient is the faster one.
  if (stride == 1 and jax.default_backend() == 'cpu' and math.prod(x.shape[1:-1]) >= 256
      and min(kernel.shape[-2:]) >= 32):
    return _conv_on_cpu(x, kernel)
  return _plain_conv(x, kernel, stride)


def _plain_conv(x, kernel, stride=1):
  dims = x.ndim - 2
  space = ''.join('DHW'[3 - dims:])
  padding = [_padding(n, k, stride) for n, k in zip(x.shape[1:-1], kernel.shape, strict=False)]
  return lax.conv_general_dilated(x, kernel, (stride,) * dims, padding,
                                  dimension_numbers=(f'N{space}C', f'{space}IO', f'N{space}C'))


@jax.custom_jvp
def _conv_on_cpu(x, kernel):
  """A convolution of stride 1 whose kernel gradient is one matrix product for each of the kernel's positions.

  XLA's CPU backend computes that gradient as a convolution with a kernel as large as the image, two to three times
  slower. The rule below is one of forward mode: it is the transpose of its sum of products that does the work.
  """
  return _plain_conv(x, kernel)


@functools.partial(_conv_on_cpu.defjvp, symbolic_zeros=True)
def _conv_on_cpu_jvp(primals, tangents):
  (x, kernel), (dx, dkernel) = primals, tangents
  y = _conv_on_cpu(x, kernel)
  dy = jnp.zeros_like(y)
  if not isinstance(dx, SymbolicZero):
    dy += _plain_conv(dx, kernel)
  if not isinstance(dkernel, SymbolicZero):
    dy += _sum_over_positions(x, dkernel)
  return y, dy


def _sum_over_positions(x, kernel):
  """_plain_conv(x, kernel) as a sum over the kernel's positions: x moved there, times the matrix there."""
  space, size = x.shape[1:-1], kernel.shape[:-2]
  x = jnp.pad(x, [(0, 0), *(_padding(n, k, 1) for n, k in zip(space, size, strict=True)), (0, 0)])
  matrices = lax.split(kernel.reshape(-1, *kernel.shape[-2:]), (1,) * math.prod(size))
  starts = itertools.product(*map(range, size))
  moved = (x[(slice(None), *(slice(i, i + n) for i, n in zip(at, space, strict=True)))] for at in starts)
  return sum(a @ matrix[0] for a, matrix in zip(moved, matrices, strict=True))


def _conv_kernel_grad(x, g, stride, size):
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
                                  preferred_element_type=jnp.float32)
