"""The optimizer: warm-up, clipping, then any of optax's."""
from collections.abc import Callable, Mapping

import optax

from diffusion_jax.runtime.config import build

Schedule = Callable[[int], float]


def learning_rate(peak: float, warmup_images: float, total_images: float, batch_size: int, decay: str) -> Schedule:
  """step -> rate: linear from 0 over the warm-up, then 'constant', or 'cosine' to 0 at the end.

  Raises ValueError if a number is negative or the decay unknown.
  """
  for name, value in (('peak', peak), ('warmup_images', warmup_images)):
    if value < 0:
      raise ValueError(f'learning_rate.{name} must be at least 0, got {value}')
  warmup = round(warmup_images / batch_size)
  total = max(round(total_images / batch_size), warmup + 1)
  if decay not in ('constant', 'cosine'):
    raise ValueError(f"learning_rate.decay must be 'constant' or 'cosine', got {decay!r}")
  after = optax.constant_schedule(peak) if decay == 'constant' else optax.cosine_decay_schedule(peak, total - warmup)
  # The first step of the warm-up already moves: a rate of 0 would waste a batch.
  return optax.join_schedules([lambda step: peak * (step + 1) / max(warmup, 1), after], [warmup])


def make(optimizer: Mapping, rate: Schedule, clip_norm: float) -> optax.GradientTransformation:
  """Clips gradients to the global norm `clip_norm` (0: never), then applies the optax optimizer that a spec names."""
  if clip_norm < 0:
    raise ValueError(f'clip_norm must be at least 0 (0 turns clipping off), got {clip_norm}')
  inner = build(optimizer, learning_rate=rate)
  return optax.chain(optax.clip_by_global_norm(clip_norm), inner) if clip_norm else inner
