"""Chips, and the devices of machines that need not be there: what programs are compiled for ahead of time."""
import contextlib
import difflib
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from diffusion_jax.runtime.config import UserError


class Chip(NamedTuple):
  """Public figures of one chip. Rates are peaks: no program is faster."""
  peak: float       # TFLOP/s of dense products in bfloat16
  float32: float    # share of it for float32 products at XLA's default precision: bfloat16 passes, TF32 on GPUs
  hbm: float        # GiB
  usable: float     # share of it that one program can have: a runtime, or an allocator's default, keeps the rest
  bandwidth: float  # GB/s of HBM
  links: float      # GB/s that a chip sends to others of its slice (of its node), over all links
  network: float    # GB/s that a chip sends to other slices (nodes); 0: not published per chip
  shapes: str       # slices that can be had
  source: str


_FLAT = '2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16'
_CUBES = '2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8, 8x8x16, 8x16x16'
_DOCS = 'Cloud TPU documentation'
_NVIDIA = 'NVIDIA data sheet; one 400 Gb/s port per GPU between nodes, as in DGX systems'
CHIPS = {
    'v2': Chip(46, 1, 16, .98, 700, 248, 0, '4x4, 8x8, 16x16', 'Jouppi et al. 2020, CACM 63(7)'),
    'v3': Chip(123, 1, 32, .98, 900, 328, 0, '4x4, 8x8, 16x16, 32x32', 'Jouppi et al. 2020, CACM 63(7)'),
    'v4': Chip(275, 1, 32, .98, 1200, 300, 0, _CUBES, 'Jouppi et al. 2023, ISCA'),
    'v5e': Chip(197, 1, 16, .98, 819, 200, 3.1, _FLAT, f'{_DOCS}, TPU v5e'),
    'v5p': Chip(459, 1, 95, .98, 2765, 600, 6.2, f'{_CUBES}, 16x16x16, 16x16x24', f'{_DOCS}, TPU v5p'),
    'v6e': Chip(918, 1, 32, .98, 1638, 400, 12.5, _FLAT, f'{_DOCS}, TPU v6e'),
    'tpu7x': Chip(2307, 1, 192, .98, 7380, 600, 12.5, _CUBES, f'{_DOCS}, TPU7x'),
    'a100': Chip(312, .5, 80, .75, 2039, 300, 25, '1 to 8, 16, 24, ...', _NVIDIA.replace('400', '200')),
    'h100': Chip(989, .5, 80, .75, 3350, 450, 50, '1 to 8, 16, 24, ...', _NVIDIA),
    'h200': Chip(989, .5, 141, .75, 4800, 450, 50, '1 to 8, 16, 24, ...', _NVIDIA),
}
GPUS = {'a100': (8, 0, 108, 166_912), 'h100': (9, 0, 132, 232_448), 'h200': (9, 0, 132, 232_448)}
NODE = 8  # GPUs that share fast links
EXAMPLES = 'v5e:4x4, v5p:2x2x4, h100:8 or cpu:16'
# What libtpu would otherwise ask a server for that only cloud machines have, and complain.
QUIET = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-16', 'TPU_WORKER_HOSTNAMES': 'localhost',
         'TPU_WORKER_ID': '0'}


class Topology(NamedTuple):
  """Devices to compile for. A chip can be two devices: each then has half of everything."""
  name: str
  platform: str           # tpu, cuda or cpu
  chip: Chip | None       # None of virtual devices: they have no speed and no memory of their own
  chips: int
  devices: Sequence[Any]
  slices: int = 1

  @property
  def share(self) -> float:
    """What a device has of its chip."""
    return self.chips / len(self.devices)


def describe(text: str, slices: int = 1) -> Topology:
  """The devices of 'v5e:16x16', 'h100:8' or 'cpu:256', `slices` times; UserError for what does not exist.

  Neither TPU nor GPU is needed: libtpu or the CUDA plugin describes them. Virtual CPU devices must be asked for before
  any device is used.
  """
  name, _, shape = text.partition(':')
  if name not in CHIPS and name != 'cpu':
    near = difflib.get_close_matches(name, CHIPS, 1, 0.5)
    raise UserError(f'there is no topology {text!r}{f"; did you mean {near[0]}?" if near else ""}: write {EXAMPLES}; '
                    f'chips are {", ".join(CHIPS)} and cpu')
  chip, tpu = CHIPS.get(name), name in CHIPS and name not in GPUS
  sides = len(chip.shapes.partition(',')[0].split('x')) if tpu else 1
  if not re.fullmatch(r'[1-9]\d{0,5}' + r'x[1-9]\d{0,5}' * (sides - 1), shape, re.ASCII):
    wanted = f'the {sides} sides of a slice: {chip.shapes}' if tpu else 'a number of devices, such as 8'
    raise UserError(f'the topology {text!r} cannot be read: after {name}: comes {wanted}')
  if slices < 1 or (slices > 1 and not tpu):
    raise UserError(f'--slices must be at least 1, and 1 for anything but TPUs, got {slices}')
  count = math.prod(map(int, shape.split('x')))
  if tpu:
    return Topology(text, 'tpu', chip, count * slices, _tpus(text, name, chip, slices), slices)
  devices = _gpus(text, name, count) if chip else _virtual(count)
  return Topology(text, 'cuda' if chip else 'cpu', chip, count, devices)


def _tpus(text, name, chip, slices):
  for key, value in QUIET.items():
    os.environ.setdefault(key, value)
  more = {'num_slices': slices} if slices > 1 else {}
  if name == 'v4':
    more['chip_config_name'] = 'megacore'  # both cores of a chip are one device, as on the machines themselves
  if set(text.partition(':')[2].split('x')) == {'1'}:
    more['chips_per_host_bounds'] = (1, 1, 1)
  try:
    return topologies.get_topology_desc(text, 'tpu', **more).devices
  except RuntimeError as e:
    raise UserError(explained(e) or f'libtpu knows no {text}: slices of {name} are {chip.shapes}') from e


def explained(error: Exception) -> str:
  """The sentence for an error of libtpu that the user can do something about; '' for others."""
  text = str(error)
  if 'TPU support not installed' in text:
    return ("there is no libtpu here, which compiles for TPUs: pip install -e '.[tpu]' (no TPU is needed), or "
            'plan for virtual devices with --topology=cpu:16')
  if 'lockfile' in text:
    return ('another process on this machine uses libtpu: wait until it has ended, or set '
            'ALLOW_MULTIPLE_LIBTPU_LOAD=1 if this machine has no TPU')
  return ''


def _gpus(text, name, count):
  if count > NODE and count % NODE:
    raise UserError(f'{text} is more than a node of {NODE} GPUs: take a multiple of {NODE}')
  nodes = max(count // NODE, 1)
  try:
    return topologies.get_topology_desc(name, 'cuda', target_config=_target(name),
                                        topology=f'1x{nodes}x{count // nodes}').devices
  except (RuntimeError, NotImplementedError) as e:
    raise UserError(f"there is no CUDA plugin here that compiles for {text}: pip install -e '.[cuda]' (no GPU "
                    f'is needed), or plan for virtual devices with --topology=cpu:{count}') from e


def _target(name):
  """XLA's description of a GPU, as text: the limits of its compute capability, and its memory."""
  major, minor, cores, shared = GPUS[name]
  chip = CHIPS[name]
  return f'''gpu_device_info {{
    threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
    shared_memory_per_core: {shared + 1024} shared_memory_per_block_optin: {shared} threads_per_core_limit: 2048
    core_count: {cores} fpus_per_core: {64 if major == 8 else 128} registers_per_core_limit: 65536
    registers_per_block_limit: 65536 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    memory_bandwidth: {chip.bandwidth * 10 ** 9} l2_cache_size: {(40 if major == 8 else 50) * 2 ** 20}
    clock_rate_ghz: 1.755 device_memory_size: {chip.hbm * 2 ** 30}
    cuda_compute_capability {{ major: {major} minor: {minor} }} }}
  platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} device_description_str: "{name.upper()}"'''


def _virtual(count):
  flags = os.environ.get('XLA_FLAGS', '')  # a number of devices given there would contradict this one
  os.environ['XLA_FLAGS'] = re.sub(r'--xla_force_host_platform_device_count=\S*', '', flags).strip()
  with contextlib.suppress(RuntimeError):  # the backend is up already: it keeps the devices it has
    jax.config.update('jax_num_cpu_devices', count)
  devices = jax.devices('cpu')
  if len(devices) < count:
    raise UserError(f'there are {len(devices)} virtual devices in this process already, and {count} are wanted: ask '
                    f'in a process of its own')
  return devices[:count]


@contextlib.contextmanager
def as_if_on(platform: str) -> Iterator[None]:
  """Traces what another platform would trace: networks ask `jax.default_backend` which form is the quickest there."""
  own = jax.default_backend
  jax.default_backend = lambda: {'cuda': 'gpu'}.get(platform, platform)
  try:
    yield
  finally:
    jax.default_backend = own
