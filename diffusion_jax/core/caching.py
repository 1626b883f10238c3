"""Feature caching (DeepCache, Ma et al. 2023): from one call of a sampler to the next, what the deep part of a network
gives changes little, so that most calls can do with an older one's and compute the outer part alone.
"""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from diffusion_jax.core.paths import vp
from diffusion_jax.core.solver import Sampler, solve
from diffusion_jax.core.types import Array, Denoiser, Net, require


class Cache:
  """What networks remember between a sampler's calls: the deep feature of each, and how often it was called.

  Of each network's calls, in the order in which the sampler makes them, the first is whole, and every `every`-th after
  it; the others take the deep feature of the last whole one. The two networks of guidance have each their own. With
  `every` 1 all stays as it is. One Cache is for one trace: `net` of every network, `sampler`, and `solve` with them.
  """

  def __init__(self, every: int, depth: int = 1):
    require(every >= 1, f'every must be at least 1, got {every}')
    self.every, self.depth = every, depth
    self._nets = []
    self._memory = None  # while a step is traced: (deep, calls) of each network,
    self._place = None   # and where: arrays from within a loop or a branch could not leave it

  def net(self, net: Callable) -> Net:
    """`net`, its calls cached within the steps of `sampler` and whole elsewhere.

    net(x, noise, depth=depth, deep=None) -> (F, deep) is a whole call; with a deep feature given, it computes only what
    lies outside of it.
    """
    if self.every == 1:
      return net
    number = len(self._nets)
    self._nets.append(net)

    def call(x, noise):
      whole = lambda: net(x, noise, depth=self.depth, deep=None)
      if self._memory is None:
        return whole()[0]
      require(self._place == _here(), 'features cannot be cached with a sampler that calls the network in a loop or a '
                                      'branch of its own: take another')
      deep, calls = self._memory[number]
      F, deep = jax.lax.cond(calls % self.every == 0, whole, lambda: net(x, noise, depth=self.depth, deep=deep))
      self._memory[number] = deep, calls + 1
      return F

    return call

  def cond(self, pred: Array, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
    """jax.lax.cond for branches that may call the networks."""
    if self._memory is None:
      return jax.lax.cond(pred, yes, no)

    def remembering(branch):
      return lambda memory: self._within(memory, branch)

    found, self._memory = jax.lax.cond(pred, remembering(yes), remembering(no), self._memory)
    return found

  def sampler(self, sampler: Sampler) -> Sampler:
    """The sampler, with what the networks remember as a part of its memory; see `check` for which it can be."""
    if self.every == 1:
      return sampler

    def nothing(net, x):
      deep = jax.eval_shape(lambda: net(x, jnp.zeros(x.shape[:1], x.dtype), depth=self.depth, deep=None)[1])
      return jnp.zeros(deep.shape, deep.dtype), jnp.zeros((), jnp.int32)

    def init(x, num_levels):
      return sampler.init(x, num_levels), [nothing(net, x) for net in self._nets]

    def step(denoise, x, memory, cur, nxt, z):
      (x, own), remembered = self._within(memory[1], lambda: sampler.step(denoise, x, memory[0], cur, nxt, z))
      return x, (own, remembered)

    def finish(denoise, x, memory, last, z):
      return self._within(memory[1], lambda: sampler.finish(denoise, x, memory[0], last, z))[0]

    return sampler._replace(step=step, init=init, finish=finish)

  def _within(self, memory: list, run: Callable[[], Any]) -> tuple[Any, list]:
    """run() where the networks remember `memory`, and what they remember then."""
    before = self._memory, self._place
    self._memory, self._place = list(memory), _here()
    try:
      return run(), self._memory
    finally:
      self._memory, self._place = before


def _here() -> Any:
  """What jax is tracing."""
  return get_opaque_trace_state(convention='flax')


def check(sampler: Sampler) -> None:
  """ValueError for a sampler that cannot be cached: it chooses its own steps, or calls the network in its own loop."""
  require(sampler.calls > 0, 'features cannot be cached with a sampler that chooses its own steps: take another')
  cache = Cache(2)
  net = cache.net(lambda x, noise, depth, deep: (x, x))
  denoise = Denoiser(lambda x, level: (net(x, level.logsnr), x))
  x, keys = jnp.zeros((1, 1, 1, 1)), jax.random.split(jax.random.key(0), 1)
  jax.eval_shape(lambda: solve(cache.sampler(sampler), denoise, x, vp.level(jnp.linspace(-1.0, 1.0, 3)), keys))
