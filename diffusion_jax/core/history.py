"""What multistep samplers share: remembered estimates, and the weights on them.

Each replaces a function along the noise path by a polynomial through remembered values. That polynomial is a sum of
weights on (remembered - current), over a coordinate u that is 0 at the current level and 1 at the next.
"""
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.solver import transfer
from diffusion_jax.core.types import Array, Level

_U, _DU = ((a + b) / 2 for a, b in zip(np.polynomial.legendre.leggauss(16), (1, 0), strict=True))  # on [0, 1]


class History(NamedTuple):
  """Values [K, B, *S, C], newest first, and the coordinate of each [K]: not finite where there is none.

  A level with alpha = 0 has no finite coordinate, so that its value counts as none.
  """
  values: Array
  place: Array

  @classmethod
  def empty(cls, x: Array, size: int):
    return cls(jnp.zeros((size, *x.shape), x.dtype), jnp.full(size, -jnp.inf, x.dtype))

  def push(self, value: Array, place: Array):
    """The history with a value in front and the oldest dropped."""
    return History(*(jnp.append(jnp.asarray(new, old.dtype)[None], old, axis=0)[:len(old)]
                     for new, old in zip((value, place), self, strict=True)))


def nodes_of(place: Array, order: Array | int, now: Array | int, step: Array | int) -> tuple[Array, Array]:
  """(u of each remembered value, whether a method of this order may use it), both [K], for a step from `now`."""
  known = jnp.isfinite(place) & (jnp.arange(len(place)) < order - 1)
  past = jnp.where(known, place, now - finite(step)) - now  # derivatives are finite too
  return jnp.where(known, past / finite(step), -1), known


def combine(weights: Array, differences: Array) -> Array:
  """sum_k weights[k] differences[k]; 0 for an empty history."""
  return jnp.tensordot(weights.astype(differences.dtype), differences, 1)


def kernel(rate: Array | float) -> tuple[Array, Array]:
  """Points u in [0, 1] and weights with sum 1, for means over u under exp(rate (1 - u)).

  Gauss-Legendre with 16 points: a polynomial's mean is right to rounding for |rate| < 20, and loses no digits at small
  rates.
  """
  u, du = (jnp.asarray(a, jnp.result_type(float)) for a in (_U, _DU))  # numpy's own type would not follow jax's
  weights = jnp.exp(rate * (1 - u) - jnp.maximum(rate, 0)) * du
  return u, weights / jnp.sum(weights)


def moment(rate: Array | float, power: int) -> Array:
  """The mean of u^power over [0, 1] under exp(rate (1 - u))."""
  u, weights = kernel(rate)
  return jnp.sum(weights * u ** power)


def adams(nodes: Array, known: Array, rate: Array | float = 0.0) -> Array:
  """Weights [K] of value(node) - value(0) in the mean of the polynomial through 0 and the known nodes.

  The mean is that over u in [0, 1] under exp(rate (1 - u)); at rate 0 the weights are Adams-Bashforth's.
  """
  # An unknown node needs a value that no other has.
  nodes = [jnp.where(k, node, 2.0 + i) for i, (node, k) in enumerate(zip(nodes, known, strict=True))]
  (u, mass), weights = kernel(rate), []
  for j, node in enumerate(nodes):
    basis = u / node
    for i, other in enumerate(nodes):
      if i != j:
        basis = basis * jnp.where(known[i], (u - other) / (node - other), 1)
    weights.append(jnp.where(known[j], jnp.sum(mass * basis), 0))
  return jnp.stack(weights) if weights else jnp.zeros(0)


def eps_of(x: Array, x0: Array, level: Level) -> Array:
  """The noise in x, if the data is x0."""
  return (x - level.alpha * x0) / level.sigma


def finite(h: Array | int) -> Array:
  """h, but 1 where it is infinite: next to alpha = 0 there is no history, and a step's length goes unused."""
  return jnp.where(jnp.isfinite(h), h, 1)


def with_noise(x: Array, x0: Array, change: Array, cur: Level, nxt: Level) -> Array:
  """DDIM's step with eps + change for eps; from alpha = 0, where sigma / alpha has no finite step, without change."""
  h = (nxt.logsnr - cur.logsnr) / 2
  return transfer(x, x0, cur, nxt) - jnp.where(jnp.isfinite(h), nxt.sigma * jnp.expm1(finite(h)), 0) * change


def like(level: Level, other: Level) -> Level:
  """A level in another's types, to be remembered."""
  return Level(*(jnp.asarray(a, b.dtype) for a, b in zip(level, other, strict=True)))
