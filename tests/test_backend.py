"""What XLA is told before it starts."""
import os
import platform
import subprocess
import sys
import types

import jax
import pytest

from diffusion_jax.runtime import backend


@pytest.mark.parametrize('cores', [1, 2, 3, 8, 12])
def test_cpu_devices_divide_the_batch_and_have_work(cores, monkeypatch):
  chosen = []
  monkeypatch.setattr(jax.config, 'update', lambda name, value: chosen.append((name, value)))
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(cores)), raising=False)
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  monkeypatch.delenv('JAX_NUM_CPU_DEVICES', raising=False)
  for batch_size in range(1, 130):
    backend.prepare(batch_size)
    (name, count), = chosen
    chosen.clear()
    assert name == 'jax_num_cpu_devices'
    allowed = lambda n, size=batch_size: size % n == 0 and size // n >= 4
    assert 1 <= count <= cores and (count == 1 or allowed(count))
    assert not any(allowed(n) for n in range(count + 1, cores + 1))  # and no more of them would do
  for name, value in (('XLA_FLAGS', '--xla_force_host_platform_device_count=4'), ('JAX_NUM_CPU_DEVICES', '4')):
    with monkeypatch.context() as patch:
      patch.setenv(name, value)
      backend.prepare(64)
  assert not chosen  # who chose already has the last word


def test_cpu_devices_may_wait_for_each_other(monkeypatch):
  """A suspended run must not be ended when it goes on; a user's own limit stands."""
  monkeypatch.setattr(jax.config, 'update', lambda name, value: None)
  for before, after in (('', '--xla_cpu_collective_call_terminate_timeout_seconds=3600'),
                        ('--xla_a=1', '--xla_a=1 --xla_cpu_collective_call_terminate_timeout_seconds=3600'),
                        ('--xla_cpu_collective_call_terminate_timeout_seconds=9',) * 2):
    monkeypatch.setenv('XLA_FLAGS', before)
    backend.prepare(64)
    backend.prepare(64)
    assert os.environ['XLA_FLAGS'] == after


def test_cpu_devices_stay_once_they_are_in_use():
  count = jax.device_count()
  backend.prepare(64)
  assert jax.device_count() == count == 8


@pytest.fixture
def environment(monkeypatch):
  """As on a machine without flags; JAX's own choice of devices is left alone."""
  for name in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'CUDA_VISIBLE_DEVICES'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(jax.config, 'update', lambda name, value: None)
  return monkeypatch


def flags(variable):
  return dict(word.removeprefix('--').split('=') for word in os.environ.get(variable, '').split())


@pytest.mark.parametrize(('plugins', 'platforms', 'gpus', 'places'), [
    ((), '', 0, ['cpu']), ((), 'cpu', 8, ['cpu']),
    (('libtpu',), '', 0, ['cpu', 'tpu']), (('libtpu',), 'tpu,cpu', 0, ['cpu', 'tpu']), (('libtpu',), 'cpu', 0, ['cpu']),
    (('jax_cuda12_plugin',), '', 1, ['cpu']), (('jax_cuda12_plugin',), '', 2, ['cpu', 'gpus']),
    (('jax_cuda13_plugin',), 'cuda', 2, ['cpu', 'gpus']), (('jax_cuda13_plugin',), 'cpu', 2, ['cpu'])])
def test_each_backend_gets_its_flags_and_no_other(plugins, platforms, gpus, places, environment):
  """One GPU has no collectives to overlap, and JAX_PLATFORMS=cpu uses none of them."""
  environment.setattr(backend.importlib.util, 'find_spec', lambda name: name in plugins or None)
  config = types.SimpleNamespace(jax_platforms=platforms, update=lambda name, value: None)
  environment.setattr(backend, 'jax', types.SimpleNamespace(config=config))
  environment.setenv('CUDA_VISIBLE_DEVICES', ','.join(map(str, range(gpus))))
  backend.prepare(64)
  for variable in ('XLA_FLAGS', 'LIBTPU_INIT_ARGS'):
    expected = {}
    for place in places:
      expected |= backend.FLAGS[place].get(variable, {})
    assert flags(variable) == expected


def test_processes_of_one_gpu_each_have_collectives_too(environment):
  environment.setattr(backend, 'may_use', lambda kind: kind == 'gpu')
  environment.setenv('CUDA_VISIBLE_DEVICES', '3')
  environment.setattr(backend.distributed, 'count', lambda: 2)
  backend.prepare(64)
  assert backend.FLAGS['gpus']['XLA_FLAGS'].items() <= flags('XLA_FLAGS').items()


@pytest.mark.parametrize('place', backend.FLAGS)
def test_what_the_user_has_set_stands(place, environment):
  (variable, wanted), = backend.FLAGS[place].items()
  first = next(iter(wanted))
  environment.setenv(variable, f'--xla_other=1 --{first}=own')
  for _ in range(2):
    backend.set_flags(place)
  assert flags(variable) == wanted | {'xla_other': '1', first: 'own'}
  assert len(os.environ[variable].split()) == len(wanted) + 1


@pytest.mark.parametrize(('more', 'passes'), [('', True), ('--xla_gpu_enable_nonsense=true', False)])
def test_this_version_of_xla_knows_every_flag(more, passes):
  """It ends a process at one that it does not know; flags of GPUs are read by its CPU backend as well."""
  told = [f'--{name}={value}' for place in backend.FLAGS.values() for name, value in place.get('XLA_FLAGS', {}).items()]
  done = subprocess.run([sys.executable, '-c', 'import jax; jax.jit(lambda x: x + 1)(1.0)'], capture_output=True,
                        env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ' '.join([*told, more])})
  assert (done.returncode == 0) == passes, done.stderr[-500:]


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc is told to keep memory')
@pytest.mark.parametrize(('shape', 'chosen', 'kept'), [
    ((32, 32, 3), {}, True), ((1024, 2), {}, True), ((8, 8, 1), {}, False),
    ((32, 32, 3), {'MALLOC_ARENA_MAX': '4'}, False)])
def test_a_process_keeps_the_memory_that_it_frees(shape, chosen, kept):
  """Calls of a program touch no page anew where images are large, and all those of their result otherwise.

  The median, since the heap grows for the first few calls.
  """
  code = f"""
import resource
from diffusion_jax.runtime import backend
backend.prepare(8)
backend.keep_memory({shape})
import jax, jax.numpy as jnp
work, x, faults = jax.jit(jnp.sin), jnp.ones(2 ** 24), []
for _ in range(31):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  work(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sorted(faults)[15], x.nbytes // resource.getpagesize())
"""
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'} | {'JAX_PLATFORMS': 'cpu'} | chosen
  done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True)
  faults, pages = map(int, done.stdout.split())
  assert faults < pages / 10 if kept else faults > pages / 2
