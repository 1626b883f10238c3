"""Devices, the mesh, and where each array lies on it."""
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ('data', 'fsdp', 'tensor', 'context')
# The batch is spread over both axes. By (data, fsdp), XLA's partitioner (jaxlib 0.10 and 0.12) gets x @ w wrong if x's
# features and w's are split over tensor and w's others over fsdp: it turns x to (fsdp, data) and nothing back.
BATCH = ('fsdp', 'data')
MIN_SHARDED_SIZE = 2 ** 16  # smaller parameters are cheaper to keep whole than to gather

# What the tensor axis splits: the first pattern found in a leaf's path speaks for its last axes. The second of two
# products takes its input split, so that the devices add up once for both (Shoeybi et al. 2019, section 3); all others
# split their output features, which for a query, key or value are its heads.
RULES = (
    (re.compile(r'/(out|conv_1|mlp_out|ff_out)/kernel$'), ('tensor', None)),
    (re.compile(r'/(kernel|embedding)$'), (None, 'tensor')),
)
HOST = 'pinned_host'  # memory of the host from which a device can copy by itself


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, context: int = 1,
              devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with the axes AXES over `devices` (None: all there are); one size may be -1, for what the others leave.

  The batch is spread over data and fsdp, parameters over fsdp and tensor, the first spatial axis over context. Devices
  of several slices, with a slower network between them, are joined by the data axis. Raises ValueError if the devices
  do not suffice or do not divide.
  """
  available = list(jax.devices() if devices is None else devices)
  sizes, count = dict(zip(AXES, (data, fsdp, tensor, context), strict=True)), len(available)
  for name, size in sizes.items():
    if size < 1 and size != -1:
      raise ValueError(f'mesh.{name} must be at least 1, or -1 for the rest, got {size}')
  rest = [name for name, size in sizes.items() if size == -1]
  if len(rest) > 1:
    raise ValueError(f'mesh.{rest[0]} and mesh.{rest[1]} cannot both be -1: give one of them')
  fixed = math.prod(max(size, 1) for size in sizes.values())
  if fixed > count or (rest and count % fixed):
    named = ', '.join(f'{name}={size}' for name, size in sizes.items() if name in BATCH or size != 1)
    raise ValueError(f'a mesh of {named} does not fit on {count} devices: ' +
                     (f'it takes {fixed}' if fixed > count else f'{count} is not a multiple of {fixed}'))
  shape = tuple(size if size > 0 else count // fixed for size in sizes.values())
  chosen = available[:math.prod(shape)]
  without = {d.process_index for d in available} - {d.process_index for d in chosen}
  if without:
    raise ValueError(f'a mesh of {len(chosen)} of the {count} devices leaves process {min(without)} without any: set '
                     f'mesh.data=-1 to take all devices, or start fewer processes')
  return Mesh(_ordered(chosen, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _ordered(devices: list[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
  """The devices in `shape`: neighbours on the last axes are near each other, and only the first crosses slices."""
  slices = [getattr(d, 'slice_index', None) or 0 for d in devices]
  sizes = {slices.count(one) for one in set(slices)}
  num = len(set(slices))
  if num > 1 and len(sizes) == 1 and shape[0] % num == 0:
    return mesh_utils.create_hybrid_device_mesh((shape[0] // num, *shape[1:]), (num, 1, 1, 1), devices,
                                                allow_split_physical_axes=True)
  if num > 1 and devices[0].platform == 'tpu':  # elsewhere a slice is a host, and the other axes may well cross hosts
    raise ValueError(f'the devices are of {num} slices, across which only the data axis can go: mesh.data must be a '
                     f'multiple of {num} and take as many devices of each, got mesh.data={shape[0]}')
  return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def lanes_of(mesh: Mesh) -> int:
  """Among how many devices a batch is divided."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def check_divides(mesh: Mesh, batch_size: int, name: str) -> None:
  """Raises ValueError unless a batch of `batch_size` can be spread over `mesh`, saying which sizes near it could."""
  n = lanes_of(mesh)
  if batch_size % n:
    below = batch_size // n * n
    raise ValueError(f'{name} {batch_size} must be a multiple of the {n} devices that share a batch (mesh.data x '
                     f'mesh.fsdp): take {f"{below} or " if below else ""}{below + n}, or another mesh')


def batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """The sharding of an array whose `axis` is the batch."""
  return NamedSharding(mesh, P(*(None,) * axis, BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, P())


def over_context(mesh: Mesh, size: int) -> Callable:
  """x [B, S, ...] -> x, within a jitted function, with the first spatial axis spread over 'context' if that is above 1.

  Convolutions exchange their borders then, and attention gathers keys and values. Raises ValueError if `size`, of that
  axis, does not divide. Not every convolution is right then: see `check_convolutions`.
  """
  n = mesh.shape['context']
  if n == 1:
    return lambda x: x
  if size % n:
    raise ValueError(f'mesh.context must divide the first axis of an image: context {n}, size {size}')
  return lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(BATCH, 'context')))


def over_batch(mesh: Mesh) -> Callable:
  """x [B, ...] -> x, within a jitted function, spread by its examples where parameters are spread too.

  Without it XLA spreads what a spread kernel gives over its channels, gathers the batch, and needs many times the
  memory. What does not divide is left to XLA, and so are all other axes.
  """
  if mesh.shape['fsdp'] == mesh.shape['tensor'] == 1:
    return lambda x: x
  place = lambda x: NamedSharding(mesh, P(BATCH, *[P.UNCONSTRAINED] * (x.ndim - 1)))
  return lambda x: x if len(x) % lanes_of(mesh) else jax.lax.with_sharding_constraint(x, place(x))


def check_convolutions(mesh: Mesh, program: Callable, *arguments: Any) -> None:
  """Raises ValueError if a program, traced for `arguments`, has convolutions that XLA gets wrong on `mesh`.

  Where an image is split over context and its kernel over another axis, or where a device keeps one row of it, XLA
  (jaxlib 0.10 and 0.12) adds parts up over all devices, those that hold the same part among them.
  """
  n, split = mesh.shape['context'], [name for name in ('fsdp', 'tensor') if mesh.shape[name] > 1]
  if n == 1 or math.prod(mesh.shape.values()) == n:  # every device has a part of its own
    return
  rows = min(_rows(jax.make_jaxpr(program)(*arguments).jaxpr), default=None)
  if rows and split:
    raise ValueError(f'mesh.{split[0]}={mesh.shape[split[0]]} and mesh.context={n} cannot both be above 1 for a net '
                     f'with convolutions, since XLA gets those wrong whose image and kernel are both split: set one of '
                     f'them to 1')
  if rows and (rows % n or rows < 2 * n):
    raise ValueError(f'mesh.context={n} must leave at least two rows of every convolution to a device, since XLA gets '
                     f'fewer wrong, and one has {rows} rows: take at most {max(rows // 2, 1)}')


def _rows(jaxpr: Any) -> Iterator[int]:
  """The length of the first spatial axis of what each convolution of a program sees."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'conv_general_dilated':
      yield equation.invars[0].aval.shape[equation.params['dimension_numbers'].lhs_spec[2]]
    for inner in jax.tree.leaves(equation.params, is_leaf=lambda value: hasattr(value, 'eqns')):
      if hasattr(inner, 'eqns'):
        yield from _rows(inner)


def parse_rules(text: str) -> list[tuple[re.Pattern, tuple]]:
  """'REGEX=AXES; ...' -> [(pattern, axes)]: AXES speaks for a leaf's last axes, such as '-,fsdp' or 'fsdp+tensor,-'.

  Raises ValueError, with what is wrong, for a rule that cannot be read.
  """
  rules = []
  for rule in filter(None, map(str.strip, text.split(';'))):
    pattern, equals, axes = rule.rpartition('=')
    names = [tuple(filter(None, axis.strip().strip('-').split('+'))) for axis in axes.split(',')]
    used = [name for axis in names for name in axis]
    if not equals or len(set(used)) < len(used) or not set(used) <= {'fsdp', 'tensor'}:
      raise ValueError(f"rule {rule!r} must be REGEX=AXES, with one of fsdp, tensor, fsdp+tensor and - for each of the "
                       f"array's last axes and no name twice, such as 'attention.*/kernel=fsdp,tensor'")
    try:
      rules.append((re.compile(pattern.strip()), tuple(axis or None for axis in names)))
    except re.error as e:
      raise ValueError(f'rule {rule!r}: {pattern.strip()!r} is not a regular expression ({e})') from e
  return rules


def state(abstract: Any, mesh: Mesh, rules: str = '') -> Any:
  """The shardings of a tree of ShapeDtypeStructs, by their paths ('params/net/conv_in/kernel').

  The first of `rules` (see `parse_rules`) whose pattern is found in a path decides. Without one, RULES splits an axis
  over 'tensor', and of the other axes the longest that 'fsdp' divides is spread over it, if the array is large. What
  does not divide stays whole. Moments and averages end in the path of their parameter, and so lie as it does. Raises
  ValueError for a rule that cannot be read, or that no array of the tree follows.
  """
  own = parse_rules(rules)
  names = jax.tree_util.tree_map_with_path(
      lambda path, _: jax.tree_util.keystr(path, simple=True, separator='/'), abstract)
  for pattern, _ in own:
    if not any(pattern.search(name) for name in jax.tree.leaves(names)):
      raise ValueError(f'no parameter follows the rule for {pattern.pattern!r}: paths are such as '
                       f'{max(jax.tree.leaves(names), key=len)!r}')
  return jax.tree.map(lambda leaf, name: NamedSharding(mesh, P(*_axes(leaf, name, mesh, own))), abstract, names)


def _axes(leaf: Any, name: str, mesh: Mesh, own: Sequence[tuple]) -> list:
  """The mesh axes for each axis of one array."""
  axes: list = [None] * leaf.ndim
  fits = lambda tail: len(tail) <= leaf.ndim  # some optimizers keep less than a parameter's shape under its name
  decided = next((tail for pattern, tail in own if pattern.search(name) and fits(tail)), None)
  tail = decided or next((tail for pattern, tail in RULES if pattern.search(name) and fits(tail)), ())
  for i, chosen in zip(range(leaf.ndim - len(tail), leaf.ndim), tail, strict=True):
    chosen = (chosen,) if isinstance(chosen, str) else chosen or ()
    size = math.prod(mesh.shape[one] for one in chosen)
    if size > 1 and leaf.shape[i] % size == 0:
      axes[i] = chosen[0] if len(chosen) == 1 else chosen
  fsdp = mesh.shape['fsdp']
  if decided is None and fsdp > 1 and leaf.size >= MIN_SHARDED_SIZE:
    for i in np.argsort(leaf.shape)[::-1]:
      if axes[i] is None and leaf.shape[i] % fsdp == 0:
        axes[i] = 'fsdp'
        break
  return axes if any(axes) else []


def rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Which rows of a batch this process holds, in order: those that it has to load.

  Processes that split a parameter or an image between them hold the same rows.
  """
  held = batch(mesh).addressable_devices_indices_map((batch_size,)).values()
  spans = sorted({(index.start or 0, batch_size if index.stop is None else index.stop) for index, in held})
  return np.concatenate([np.arange(*span) for span in spans])


def put_batch(array: np.ndarray, mesh: Mesh, axis: int = 0) -> jax.Array:
  """This process's `rows` of a batch as part of one global array over the mesh."""
  where = batch(mesh, axis)
  if jax.process_count() == 1:
    return jax.device_put(array, where)
  parts = lanes_of(mesh)
  size = array.shape[axis] * parts // len(rows(mesh, parts))
  held = rows(mesh, size)

  def part(index):
    first = int(np.searchsorted(held, index[axis].start or 0))
    span = slice(first, first + size // parts)
    return array[(slice(None),) * axis + (span,)]

  shape = (*array.shape[:axis], size, *array.shape[axis + 1:])
  return jax.make_array_from_callback(shape, where, part)


def on_host(shardings: Any) -> Any:
  """Shardings whose arrays lie in the host's memory, each part beside the device that works with it.

  Raises ValueError if the devices cannot copy from there.
  """
  def move(where):
    device = min(where.device_set, key=lambda d: d.id)
    kinds = {memory.kind for memory in device.addressable_memories()}
    if not kinds:
      raise ValueError(f'JAX cannot compile for the host of a device of kind {device.device_kind!r} that is not here: '
                       f'plan with train.ema_on_host=false, and take the averages off the total')
    if HOST not in kinds:
      raise ValueError(f'devices of kind {device.device_kind!r} cannot keep arrays in {HOST} memory: set '
                       f'train.ema_on_host=false')
    return where.with_memory_kind(HOST)
  return jax.tree.map(move, shardings)


def on_device(tree: Any) -> Any:
  """The arrays of a tree, or their shardings, in the devices' own memory, wherever they were kept."""
  def move(leaf):
    where = getattr(leaf, 'sharding', leaf)
    if getattr(where, 'memory_kind', None) != HOST:
      return leaf
    moved = where.with_memory_kind('device')
    return moved if leaf is where else jax.device_put(leaf, moved)
  return jax.tree.map(move, tree)
