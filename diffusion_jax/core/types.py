"""The words that every part of the core shares.

Shapes: B batch, *S one to three spatial axes, C channels (last), N levels of a sampling grid.
"""
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Params = Any


class Level(NamedTuple):
  """A point on the noise path, where x = alpha x0 + sigma eps. Fields are [B] in training, [] or [N] on a grid."""
  logsnr: Array  # log(alpha^2 / sigma^2), falling as noise grows
  alpha: Array   # >= 0
  sigma: Array   # > 0


Cond = Mapping[str, Array]                  # label [B] int32, drop [B] bool, ...
Denoise = Callable[[Array, Level], Array]   # x [B, *S, C], level [] or [B] -> x0 [B, *S, C]
Net = Callable[[Array, Array], Array]       # c_in x [B, *S, C], noise [B] -> F [B, *S, C]


@dataclass(frozen=True)
class Denoiser:
  """A Denoise that also gives what the network says of the reverse step's variance; `both` returns (x0, variance)."""
  both: Callable[[Array, Level], tuple[Array, Array | None]]

  def __call__(self, x: Array, level: Level) -> Array:
    return self.both(x, level)[0]


def with_variance(denoise: Denoise) -> Callable[[Array, Level], tuple[Array, Array | None]]:
  """(x, level) -> (x0, variance output [B, *S, C]), the latter None where the network has none."""
  return denoise.both if isinstance(denoise, Denoiser) else lambda x, level: (denoise(x, level), None)


def then(denoise: Denoise, change: Callable[[Array, Array, Level], Array]) -> Denoiser:
  """`denoise` with its estimate replaced by change(x0, x, level); its variance passes through."""
  inner = with_variance(denoise)

  def both(x, level):
    x0, variance = inner(x, level)
    return change(x0, x, level), variance

  return Denoiser(both)


def expand(a: Array, x: Array) -> Array:
  """Shapes a per-example [B] (or scalar []) so that it multiplies x [B, ...]."""
  return jnp.reshape(a, jnp.shape(a) + (1,) * (x.ndim - 1)) if jnp.ndim(a) else jnp.asarray(a)


def require(ok: bool, message: str) -> None:
  """Raises ValueError(message) unless `ok`: the guard at the top of every factory."""
  if not ok:
    raise ValueError(message)
