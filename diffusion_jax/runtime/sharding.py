"""Devices, the mesh, and where each array lies on it."""
import contextlib
import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = ('data', 'fsdp')  # the batch is spread over both axes
# XLA ends a process whose CPU devices wait 40 s for each other: a suspended laptop or a large network would do.
COLLECTIVE_TIMEOUT = 'xla_cpu_collective_call_terminate_timeout_seconds'
MIN_SHARDED_SIZE = 2 ** 16  # smaller parameters are cheaper to keep whole than to gather


def use_cpu_cores(batch_size: int) -> None:
  """Makes one virtual CPU device per core, so far as each gets at least 4 of the batch; call before using a device.

  XLA's convolutions hardly use more than one core for small images: a batch spread over two devices is twice as fast.
  An explicit choice (XLA_FLAGS or JAX_NUM_CPU_DEVICES) is left alone. Other backends are not affected.
  """
  flags = os.environ.get('XLA_FLAGS', '')
  if COLLECTIVE_TIMEOUT not in flags:
    os.environ['XLA_FLAGS'] = f'{flags} --{COLLECTIVE_TIMEOUT}=3600'.strip()
  if 'host_platform_device_count' in flags or 'JAX_NUM_CPU_DEVICES' in os.environ:
    return
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  count = max(n for n in range(1, cores + 1) if batch_size % n == 0 and (n == 1 or batch_size // n >= 4))
  with contextlib.suppress(RuntimeError):  # the backend is up already: it keeps the devices it has
    jax.config.update('jax_num_cpu_devices', count)


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
  """A mesh with axes 'data' and 'fsdp'; -1 takes all devices that the other axis leaves.

  Raises ValueError if the devices do not suffice or do not divide.
  """
  count = jax.device_count()
  sizes = {'data': data, 'fsdp': fsdp}
  for name, size in sizes.items():
    if size < 1 and size != -1:
      raise ValueError(f'mesh.{name} must be at least 1, or -1 for the rest, got {size}')
  if data == fsdp == -1:
    raise ValueError('mesh.data and mesh.fsdp cannot both be -1: give one of them')
  fixed = max(data, 1) * max(fsdp, 1)
  if fixed > count or (-1 in (data, fsdp) and count % fixed):
    raise ValueError(f'a mesh of data={data}, fsdp={fsdp} does not fit on {count} devices')
  shape = tuple(size if size > 0 else count // fixed for size in sizes.values())
  devices = jax.devices()[:shape[0] * shape[1]]
  return jax.make_mesh(shape, ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_divides(mesh: Mesh, batch_size: int, name: str) -> None:
  """Raises ValueError unless the mesh's devices divide `batch_size`, saying which sizes near it would do."""
  n = mesh.size
  if batch_size % n:
    below = batch_size // n * n
    raise ValueError(f'{name} {batch_size} must be a multiple of the {n} devices of the mesh: '
                     f'take {f"{below} or " if below else ""}{below + n}, or another mesh')


def batch(mesh: Mesh, axis: int = 0) -> NamedSharding:
  """The sharding of an array whose `axis` is the batch."""
  return NamedSharding(mesh, P(*(None,) * axis, BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, P())


def state(abstract, mesh: Mesh):
  """The shardings of a tree of ShapeDtypeStructs: the longest axis that 'fsdp' divides is spread over it."""
  fsdp = mesh.shape['fsdp']

  def place(leaf):
    axes = [i for i in np.argsort(leaf.shape)[::-1] if leaf.shape[i] % fsdp == 0]
    if fsdp == 1 or leaf.size < MIN_SHARDED_SIZE or not axes:
      return replicated(mesh)
    return NamedSharding(mesh, P(*('fsdp' if i == axes[0] else None for i in range(leaf.ndim))))

  return jax.tree.map(place, abstract)


def put_batch(array: np.ndarray, mesh: Mesh, axis: int = 0) -> jax.Array:
  """This process's rows of a batch as part of one global array over the mesh."""
  sharding = batch(mesh, axis)
  if jax.process_count() == 1:
    return jax.device_put(array, sharding)
  shape = list(array.shape)
  shape[axis] *= jax.process_count()
  return jax.make_array_from_process_local_data(sharding, array, tuple(shape))
