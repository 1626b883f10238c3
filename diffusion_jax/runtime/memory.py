"""What lies in the memory of a device while it trains, part by part."""
import math
import os
from typing import Any

import jax

from diffusion_jax.runtime.sharding import HOST
from diffusion_jax.runtime.state import TrainState


def device_bytes(tree: Any) -> int:
  """The bytes that one device holds of a tree of arrays, or of ShapeDtypeStructs, with shardings."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def limit(device: jax.Device, sharing: int) -> float:
  """The bytes that a device has: its own, or on CPU its part of the machine's, which `sharing` devices divide."""
  stats = device.memory_stats() if device.platform != 'cpu' else None
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit']
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / sharing if device.platform == 'cpu' else math.inf


def memory_table(compiled: jax.stages.Compiled, state: TrainState, batch: Any) -> list[tuple[str, int]]:
  """[(part, bytes on one device)] of a compiled train step; the rows before 'total' add up to it.

  The parts of the state (arrays, or ShapeDtypeStructs with shardings) and of the batch (what is streamed and what is
  resident) by their shardings; 'activations' are what XLA needs for a while beside its arguments, and 'rest' is what
  its arguments take beyond the parts named: records, keys, padding. Averages kept on the host are named and not
  counted. The last two are left out where the backend says nothing of them.
  """
  averages = device_bytes(state.emas)
  on_host = any(leaf.sharding.memory_kind == HOST for leaf in jax.tree.leaves(state.emas))
  rows = [('parameters', device_bytes(state.params)), ('optimizer', device_bytes(state.opt_state))]
  rows += [('frozen', device_bytes(state.frozen))] if state.frozen else []
  rows += [] if on_host else [('averages', averages)]
  rows += [('batch', device_bytes(batch))]
  measured = compiled.memory_analysis()
  if measured is not None:
    copies = max(0, measured.output_size_in_bytes - measured.alias_size_in_bytes)  # of outputs that are no argument
    rows += [('rest', measured.argument_size_in_bytes + copies - sum(size for _, size in rows)),
             ('activations', measured.temp_size_in_bytes)]
  rows += [('total', sum(size for _, size in rows))]
  return rows + ([('averages on the host', averages)] if on_host else [])


def format_table(rows: list[tuple[str, int]]) -> str:
  """A line for each row: its name, MiB, and share of the total."""
  total = dict(rows)['total']
  return '\n'.join(f'{name:>20}: {size / 2 ** 20:12,.3f} MiB {100 * size / max(total, 1):6.1f} %'
                   for name, size in rows)
