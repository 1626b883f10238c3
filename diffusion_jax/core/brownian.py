"""Noise that belongs to the levels and not to the steps: a Brownian motion, found again from the sample's key alone.

A step of the reverse process from SNR u to SNR v adds noise whose size, in the scale x alpha / sigma^2, is
sqrt(v - u): an increment of a Brownian motion W with the SNR as its time, dW in d(x alpha / sigma^2) = x0 du + dW. With
increments of one W, more steps refine the same sample, where `solver.independent` draws another one.
"""
import jax
import jax.numpy as jnp

from diffusion_jax.core.solver import Noise, independent
from diffusion_jax.core.types import Array, require

SPAN = 128.0  # the tree covers logsnr in [-SPAN, SPAN]; below, as at alpha = 0, W is 0 for any purpose in float32


def brownian(depth: int = 24) -> Noise:
  """Noise for `solve`: (W(v) - W(u)) / sqrt(|v - u|) for a step from SNR u to v, the same for any steps between.

  W is looked up by bisection, so a step costs 2 (depth + 2) normal draws of the sample's size, and no memory. Levels
  are rounded to multiples of 256 / 2^depth in logsnr; a step within one multiple gets independent noise.
  """
  require(1 <= depth <= 30, f'depth must lie in 1..30, got {depth}')

  def noise(key, i, cur, nxt, shape):
    root = jax.random.fold_in(key, jnp.uint32(0xFFFFFFFE))  # the steps fold in 0, 1, ..., the prior 0xFFFFFFFF
    (u, at_u), (v, at_v) = (_lookup(root, level.logsnr, shape, depth) for level in (cur, nxt))
    gap = jnp.abs(v - u)
    same = gap == 0
    gap = jnp.where(same, 1, gap)
    later, sooner = jnp.where(v > u, at_v, at_u), jnp.where(v > u, at_u, at_v)
    z = (later - jnp.exp(-gap / 2) * sooner) * jax.lax.rsqrt(-jnp.expm1(-gap)) * jnp.sign(v - u)
    return jnp.where(same, independent(key, i, cur, nxt, shape), z)

  return noise


def _lookup(root: Array, logsnr: Array, shape: tuple[int, ...], depth: int) -> tuple[Array, Array]:
  """The multiple below `logsnr`, and W / sqrt(SNR) there: [], [*shape].

  In l = logsnr, W / sqrt(SNR) is stationary: a standard normal everywhere, of correlation exp(-|l - m| / 2). Hence a
  tree without large or small numbers: given both ends of an interval of length h, the value in its middle has the mean
  (left + right) / (2 cosh(h / 4)) and the variance tanh(h / 4), whatever lies outside.
  """
  def normal(node):
    return jax.random.normal(jax.random.fold_in(root, node), shape)

  def halve(step, carry):
    node, start, left, right = carry  # nodes are numbered from the root, 1: the children of n are 2n and 2n + 1
    h = 2 * SPAN * jnp.exp2(-jnp.asarray(step, start.dtype))
    middle = (left + right) / (2 * jnp.cosh(h / 4)) + jnp.sqrt(jnp.tanh(h / 4)) * normal(node)
    upper = logsnr >= start + h / 2
    left, right = jnp.where(upper, middle, left), jnp.where(upper, right, middle)
    return 2 * node + upper.astype(node.dtype), jnp.where(upper, start + h / 2, start), left, right

  left = normal(jnp.uint32(0))
  right = jnp.exp(-SPAN) * left + normal(jnp.uint32(2 ** depth))  # of variance 1 + exp(-2 SPAN), 1 in any precision
  first = jnp.uint32(1), jnp.asarray(-SPAN, left.dtype), left, right
  _, start, left, _ = jax.lax.fori_loop(0, depth, halve, first)
  return start, left
