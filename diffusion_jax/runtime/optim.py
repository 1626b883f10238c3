"""The optimizer: warm-up, clipping, then any of optax's."""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.runtime.config import build

Schedule = Callable[[int], float]


def learning_rate(peak: float, warmup_images: float, total_images: float, batch_size: int, decay: str,
                  steady_images: float = 0) -> Schedule:
  """step -> rate: linear from 0 over the warm-up, then 'constant', or 'cosine' to 0 at the end, or 'inverse_sqrt'.

  The last is peak / sqrt(images / steady_images) once that many images have been seen (Karras et al. 2024). Raises
  ValueError if a number is negative or the decay unknown.
  """
  for name, value in (('peak', peak), ('warmup_images', warmup_images), ('steady_images', steady_images)):
    if value < 0:
      raise ValueError(f'learning_rate.{name} must be at least 0, got {value}')
  warmup = round(warmup_images / batch_size)
  total = max(round(total_images / batch_size), warmup + 1)
  after = {'constant': optax.constant_schedule(peak), 'cosine': optax.cosine_decay_schedule(peak, total - warmup),
           'inverse_sqrt': lambda step: peak * jnp.minimum(steady_images / batch_size / (step + warmup + 1), 1) ** 0.5}
  if decay not in after:
    raise ValueError(f"learning_rate.decay must be 'constant', 'cosine' or 'inverse_sqrt', got {decay!r}")
  if decay == 'inverse_sqrt' and not steady_images:
    raise ValueError('learning_rate.steady_images must be above 0 for the decay inverse_sqrt, got 0: it says after how '
                     'many images the rate begins to fall')
  # The first step of the warm-up already moves: a rate of 0 would waste a batch.
  return optax.join_schedules([lambda step: peak * (step + 1) / max(warmup, 1), after[decay]], [warmup])


def make(optimizer: Mapping, rate: Schedule, clip_norm: float,
         moments: str = 'float32') -> optax.GradientTransformation:
  """Clips gradients to the global norm `clip_norm` (0: never), then applies the optax optimizer that a spec names.

  moments: the type in which its arrays are kept between steps, 'float32' or 'bfloat16' (see `narrow`).
  """
  if clip_norm < 0:
    raise ValueError(f'clip_norm must be at least 0 (0 turns clipping off), got {clip_norm}')
  inner = build(optimizer, learning_rate=rate)
  if moments != 'float32':
    inner = narrow(inner)
  return optax.chain(optax.clip_by_global_norm(clip_norm), inner) if clip_norm else inner


class Narrow(NamedTuple):
  """The state of `narrow`: how many updates there were, and the inner optimizer's with its arrays in bfloat16."""
  count: jax.Array
  inner: Any


def narrow(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """`inner`, computing in float32 and keeping its float32 arrays in bfloat16: half the bytes.

  They are rounded at random, so that each is right on average. To the nearest would not do: bfloat16 has 8 bits, and a
  second moment that moves by a thousandth a step would stay where it is for ever.
  """
  def widened(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a, tree)

  def narrowed(tree, count):
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), max(len(leaves), 1))
    return structure.unflatten([round_at_random(key, a) if a.dtype == jnp.float32 and a.ndim else a
                                for key, a in zip(keys, leaves, strict=False)])

  def init(params):
    count = jnp.zeros((), jnp.int32)
    return Narrow(count, narrowed(inner.init(params), count))

  def update(grads, state, params=None):
    updates, new = inner.update(grads, widened(state.inner), params)
    return updates, Narrow(state.count + 1, narrowed(new, state.count + 1))

  return optax.GradientTransformation(init, update)


def round_at_random(key: jax.Array, x: jax.Array) -> jax.Array:
  """x float32 -> one of its two neighbours in bfloat16, the nearer the likelier: x on average."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  raised = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)  # what is cut off carries, or not
  rounded = jax.lax.bitcast_convert_type((raised >> 16).astype(jnp.uint16), jnp.bfloat16)
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
