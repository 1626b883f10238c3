"""How many samples fit in the memory of a device, by XLA's own analysis of the compiled sampler."""
import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax

from diffusion_jax.runtime import distributed, memory
from diffusion_jax.runtime.config import UserError
from diffusion_jax.runtime.sharding import lanes_of

USABLE = 0.85  # of a device's memory: the allocator leaves gaps, and networks that score samples want some
FIRST = 64     # samples of a device in the program that is compiled first, and used if no more are wanted
# Samples of a device beyond which a batch is not worth its size: evaluate keeps a file of each. On a CPU an image of
# the small net takes 5 % less time with 32 of them than with 8 (experiments/throughput); elsewhere it is not measured.
MOST = {'cpu': 64}
MOST_ELSEWHERE = 1024


class TooLarge(UserError):
  """A batch does not fit in the memory of a device."""


def fitted(generator: Any, params: Any, wanted: int, held: int = 0) -> Any:
  """A Generator without a batch size, compiled for the largest batch that fits; one that has a size as it is.

  A batch is of at most `wanted` samples, made a multiple of the devices, and of at most MOST for each of them; where
  memory is the limit, of a power of two for each. held: bytes of a device that other arrays take.

  One program is compiled, and a second if the first is not of all that are wanted. That of more samples is taken to
  need more memory in proportion, which is never too little; of fewer, this may be, and then yet fewer are tried.
  Raises UserError if one sample for each device does not fit.
  """
  if generator.batch_size:
    return generator
  lanes, device = lanes_of(generator.mesh), generator.mesh.local_devices[0]
  most = min(-(-wanted // lanes), MOST.get(device.platform, MOST_ELSEWHERE)) * lanes
  space = distributed.agree(_space(generator, params) - held)
  size, grows = min(most, FIRST * lanes), True
  while True:
    tried, needs = _tried(generator, params, size)
    if needs <= space:
      break
    if size == lanes:
      raise TooLarge('one sample on each device is more than its memory holds beside the parameters: take a smaller '
                     'model, or devices with more memory')
    share = 0.25 if math.isinf(needs) else min(0.5, space / needs)
    size, grows = max(_rounded(size * share, lanes), lanes), False
  larger = min(most, _rounded(size * space / needs, lanes)) if needs else size
  if grows and larger > size:
    other, needs = _tried(generator, params, larger)
    tried = other if needs <= space else tried
  return tried


@contextlib.contextmanager
def explained(generator: Any, params: Any, compiled: jax.stages.Compiled | None = None) -> Iterator[None]:
  """Turns XLA's refusal of memory for a Generator's batch, before or after it is `compiled`, into a TooLarge."""
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    size, lanes = generator.batch_size, lanes_of(generator.mesh)
    share = 0.5
    if compiled:
      share = min(share, _space(generator, params) / max(_needs(compiled, params), 1))
    smaller = max(_rounded(size * share, lanes), lanes)
    where = 'a device' if lanes == 1 else f'{lanes} devices'
    raise TooLarge(f'a batch of {size} does not fit in the memory of {where}: ' + (
        f'take --batch_size={smaller}, or --batch_size=0 for the largest that fits' if smaller < size else
        'take a smaller model, or devices with more memory')) from e


def _tried(generator: Any, params: Any, size: int) -> tuple[Any, float]:
  """The generator compiled for batches of `size`, and the bytes of a device that it takes beside the parameters."""
  tried = generator.resized(size)
  try:
    return tried, _needs(tried.compile(params), params)
  except TooLarge:
    return tried, math.inf


def _needs(compiled: jax.stages.Compiled, params: Any) -> int:
  measured = compiled.memory_analysis()
  if measured is None:  # a backend that does not say
    return 0
  return (measured.argument_size_in_bytes + measured.output_size_in_bytes + measured.temp_size_in_bytes
          - memory.device_bytes(params))


def _space(generator: Any, params: Any) -> float:
  """The bytes of a device that a sampler may take beside the parameters."""
  devices = generator.mesh.local_devices
  return USABLE * memory.limit(devices[0], len(devices)) - memory.device_bytes(params)


def _rounded(size: float, lanes: int) -> int:
  """The largest power of two times `lanes` that is at most `size`; 0 if there is none."""
  return 2 ** int(math.log2(size / lanes)) * lanes if size >= lanes else 0
