"""What XLA is told before its backend starts: the virtual devices of a CPU, and flags for each kind of device.

XLA ends a process at a flag that it does not know: every flag here is known to all versions that the project allows,
which tests/test_backend.py asks of the one that is installed. What the user has set keeps its value.
"""
import contextlib
import ctypes
import glob
import importlib.util
import math
import os
from collections.abc import Sequence

import jax

from diffusion_jax.runtime import distributed

# {variable: {flag: value}} by where a program runs, with the reason, and whether it was measured.
FLAGS = {
    # XLA ends a process whose CPU devices wait 40 s for each other: a suspended laptop or a large network would do.
    'cpu': {'XLA_FLAGS': {'xla_cpu_collective_call_terminate_timeout_seconds': '3600'}},
    # Gradients are summed while others are still computed. NVIDIA's images have it set; off by default in jaxlib 0.10
    # and 0.12. One GPU has nothing to overlap, and a schedule that keeps more alive. Not measured here.
    'gpus': {'XLA_FLAGS': {'xla_gpu_enable_latency_hiding_scheduler': 'true'}},
    # Parameters are gathered, and gradients summed, beside products. MaxText trains with these. Not measured here.
    'tpu': {'LIBTPU_INIT_ARGS': {
        'xla_tpu_enable_async_collective_fusion': 'true',
        'xla_tpu_enable_async_collective_fusion_fuse_all_gather': 'true',
        'xla_tpu_enable_async_collective_fusion_multiple_steps': 'true',
        'xla_tpu_overlap_compute_collective_tc': 'true',
        'xla_enable_async_all_gather': 'true',
    }},
}
# Of glibc's malloc.h: never give memory back, map no block by itself, one heap for all threads.
MALLOC = {'M_TRIM_THRESHOLD': (-1, -1), 'M_MMAP_MAX': (-4, 0), 'M_ARENA_MAX': (-8, 1)}
KEPT_FROM = 32 * 32  # places of an image; with 8x8 two threads lose more by sharing a heap than they gain
# {kind of device: (its names in JAX_PLATFORMS, the modules of which one must be installed)}
PLUGINS = {'tpu': ({'tpu'}, ('libtpu',)), 'gpu': ({'gpu', 'cuda'}, ('jax_cuda12_plugin', 'jax_cuda13_plugin'))}


def prepare(batch_size: int) -> None:
  """Sets FLAGS for the devices there are, and one virtual CPU device per core; call before using a device.

  Of virtual devices, so many that each gets at least 4 of the batch: XLA's convolutions hardly use more than one core
  for small images, and a batch spread over two devices is twice as fast. An explicit choice (XLA_FLAGS or
  JAX_NUM_CPU_DEVICES) is left alone. Other backends are not affected.
  """
  set_flags('cpu')  # every process has a CPU backend too
  if may_use('tpu'):
    set_flags('tpu')
  if may_use('gpu') and (num_gpus() > 1 or distributed.count() > 1):
    set_flags('gpus')
  if 'host_platform_device_count' in os.environ['XLA_FLAGS'] or 'JAX_NUM_CPU_DEVICES' in os.environ:
    return
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  count = max(n for n in range(1, cores + 1) if batch_size % n == 0 and (n == 1 or batch_size // n >= 4))
  with contextlib.suppress(RuntimeError):  # the backend is up already: it keeps the devices it has
    jax.config.update('jax_num_cpu_devices', count)


def keep_memory(shape: Sequence[int]) -> None:
  """Makes a process that works on images of `shape` (*S, C) keep what it frees, if they have KEPT_FROM places or more.

  XLA's CPU backend allocates what is between the operations of a program at each call, and frees it after it. Blocks as
  large are mapped by the kernel, page by page, as they are touched: a tenth of the time of a pass. Call it before a
  device is used. Variables MALLOC_* are an explicit choice, and left alone; so are other C libraries than glibc, and
  processes that may use an accelerator.
  """
  if math.prod(shape[:-1]) < KEPT_FROM or may_use('tpu') or may_use('gpu'):
    return
  if any(name.startswith('MALLOC_') for name in os.environ):
    return
  with contextlib.suppress(OSError, AttributeError):
    mallopt = ctypes.CDLL(None).mallopt
    for option, value in MALLOC.values():
      mallopt(option, value)


def set_flags(place: str) -> None:
  """Adds FLAGS[place] to the environment, but for those that stand there."""
  for variable, flags in FLAGS[place].items():
    text = os.environ.get(variable, '')
    there = {word.lstrip('-').partition('=')[0] for word in text.split()}
    new = [f'--{name}={value}' for name, value in flags.items() if name not in there]
    os.environ[variable] = ' '.join([*([text] if text else []), *new])


def may_use(kind: str) -> bool:
  """Whether JAX may come to run on a 'tpu' or a 'gpu', which it is not asked since that would start it.

  It may if a plugin for it is installed and JAX_PLATFORMS does not leave it out.
  """
  names, plugins = PLUGINS[kind]
  chosen = {name for name in (jax.config.jax_platforms or '').split(',') if name}
  return (not chosen or bool(chosen & names)) and any(importlib.util.find_spec(plugin) for plugin in plugins)


def num_gpus() -> int:
  """How many GPUs this process sees, from the names of their devices and CUDA_VISIBLE_DEVICES."""
  chosen = os.environ.get('CUDA_VISIBLE_DEVICES')
  return len(glob.glob('/dev/nvidia[0-9]*')) if chosen is None else len(list(filter(None, chosen.split(','))))
