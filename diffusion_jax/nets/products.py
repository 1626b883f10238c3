"""Products of a layer's input with its kernel, matrices and convolutions, in the forms that a CPU is quick with.

Convolutions are of x [B, *S, C] with kernels [*K, C, features], on one to three axes. Padding keeps the size at
stride 1; at stride 2 it follows TensorFlow's SAME, as DDPM did: the odd row goes last.
"""
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Array = jax.Array


def dot(x: Array, kernel: Array, dtype: jnp.dtype | None = None) -> Array:
  """x [.., C] times kernel [C, features], summed in `dtype` (None: that of x)."""
  return jnp.matmul(x, kernel, preferred_element_type=dtype)


def dot_kernel_grad(x: Array, g: Array, dtype: jnp.dtype | None = None) -> Array:
  """The gradient of `dot`'s kernel, for that of its result, summed in `dtype` (None: at least float32)."""
  return lax.dot_general(x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), (((0,), (0,)), ((), ())),
                         preferred_element_type=dtype or jnp.promote_types(x.dtype, jnp.float32))


def conv(x: Array, kernel: Array, stride: int) -> Array:
  """The convolution, in the form that is the quickest where it runs."""
  space = x.shape[1:-1]
  # Small layers have more to mix than to multiply; on three axes the program would be too long to compile.
  if (jax.default_backend() == 'cpu' and x.dtype == jnp.float32 and stride == 1 and set(kernel.shape[:-2]) == {3}
      and len(space) < 3):
    width, places = min(kernel.shape[-2:]), math.prod(space)
    if width >= 256 and places < 64:
      return one_product(x, kernel)
    if width >= 64 and places >= 64 and not any(n % 2 for n in space):
      return jax.checkpoint(winograd)(x, kernel)  # its mixed copies of x are made again for the gradient, not kept
  return plain_conv(x, kernel, stride)


def plain_conv(x: Array, kernel: Array, stride: int = 1, dtype: jnp.dtype | None = None) -> Array:
  """The convolution as XLA has it, summed in `dtype` (None: that of x)."""
  dims = x.ndim - 2
  space = ''.join('DHW'[3 - dims:])
  padding = [_padding(n, k, stride) for n, k in zip(x.shape[1:-1], kernel.shape, strict=False)]
  return lax.conv_general_dilated(x, kernel, (stride,) * dims, padding,
                                  dimension_numbers=(f'N{space}C', f'{space}IO', f'N{space}C'),
                                  preferred_element_type=dtype)


def conv_kernel_grad(x: Array, g: Array, stride: int, size: int, dtype: jnp.dtype = jnp.float32) -> Array:
  """The gradient of `conv`'s kernel, of `size` along each axis: x convolved with g, batch and channels swapped."""
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


def _padding(size, kernel, stride):
  """SAME padding (low, high) of one axis."""
  total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
  return total // 2, total - total // 2


def patches_product(x: Array, kernel: Array, stride: int, dtype: jnp.dtype) -> Array:
  """`plain_conv` as one product of a matrix, for types that XLA does not convolve."""
  return dot(_patches(x, kernel.shape[:-2], stride), kernel.reshape(-1, kernel.shape[-1]), dtype)


def _patches(x, window, stride):
  """What a convolution sees of x at each place, side by side: [B, *S, C] -> [B, *S // stride, prod(window) C]."""
  x = jnp.pad(x, [(0, 0), *(_padding(n, k, stride) for n, k in zip(x.shape[1:-1], window, strict=True)), (0, 0)])
  last = [n - k + 1 for n, k in zip(x.shape[1:-1], window, strict=True)]
  parts = [x[(slice(None), *(slice(i, i + n, stride) for i, n in zip(offsets, last, strict=True)))]
           for offsets in itertools.product(*map(range, window))]
  return jnp.concatenate(parts, -1)


# x @ kernel, whose kernel gradient is x^T g in this order. JAX's own is (g^T x)^T, for which XLA's CPU backend writes a
# transposed copy of g, computing all of g again in an order that is several times slower than the product itself.
_product = Primitive('product')
_product.def_impl(jax.jit(dot))
_product.def_abstract_eval(lambda x, kernel: x.update(shape=(*x.shape[:-1], kernel.shape[-1])))
mlir.register_lowering(_product, mlir.lower_fun(dot, multiple_results=False))
ad.defbilinear(_product, lambda g, x, kernel: _product.bind(g, kernel.T), lambda g, x, kernel: dot_kernel_grad(x, g))
batching.primitive_batchers[_product] = lambda arguments, axes: (jax.vmap(dot, axes)(*arguments), 0)


def one_product(x: Array, kernel: Array) -> Array:
  """plain_conv(x, kernel). At a few places its copies cost little beside wide kernels, and a CPU multiplies sooner."""
  return _product.bind(_patches(x, kernel.shape[:-2], 1), kernel.reshape(-1, kernel.shape[-1]))


def winograd(x: Array, kernel: Array) -> Array:
  """plain_conv(x, kernel) for kernels of size 3 and even axes, by minimal filtering F(2, 3): Lavin & Gray 2015, 4.1.

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
