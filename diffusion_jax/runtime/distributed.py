"""One command as several processes: how they find each other, agree, and end together.

Arrays travel in the collectives of compiled programs: these fail at once when a peer's connection closes, and hang when
it merely stands still. Words travel by JAX's coordination service, which runs in process 0: a process that has been
silent for the heartbeat timeout is dead to it, and then it ends all others. What hangs although every process beats is
left to the `Watchdog`. So no process outlives a peer for long, and each says why it ends, with status 70.

A command that is the only process is never touched by any of this.
"""
import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed as service  # the public module does not give the client

from diffusion_jax.runtime.config import UserError

FAILED = 70  # EX_SOFTWARE: this process or a peer broke; the same command continues from the last checkpoint
HEARTBEAT_SECONDS, WATCHDOG_SECONDS = 60, 900  # unless DIFFUSION_JAX_HEARTBEAT or DIFFUSION_JAX_WATCHDOG say otherwise
PATIENCE_MS = 7 * 24 * 3600 * 1000  # how long one waits for another that lives: that is the heartbeat's to judge
FAREWELL_MS = 5000  # for which a process with an error waits whether the others have it as well

_count, _place = 1, 'its start'
_numbers = itertools.count()
_on_abort: Any = None  # must not be collected


def parameters(environ: Mapping[str, str], coordinator: str = '', num_processes: int = 0,
               process_id: int = -1) -> dict[str, Any] | None:
  """The arguments of jax.distributed.initialize, {} where JAX finds them by itself; None for a process that is alone.

  What is not given is read from DIFFUSION_JAX_COORDINATOR (HOST:PORT, or auto), _NUM_PROCESSES and _PROCESS_ID; without
  them, a SLURM step of several tasks and a TPU of several hosts are recognised. UserError if something is missing.
  """
  given = {'coordinator': coordinator or environ.get('DIFFUSION_JAX_COORDINATOR', ''),
           'num_processes': num_processes or environ.get('DIFFUSION_JAX_NUM_PROCESSES', ''),
           'process_id': process_id if process_id >= 0 else environ.get('DIFFUSION_JAX_PROCESS_ID', '')}
  if given['coordinator'] == 'auto':
    return {}
  if not any(value != '' for value in given.values()):
    tpu = environ.get('TPU_PROCESS_ADDRESSES') or environ.get('TPU_WORKER_HOSTNAMES', '')
    several = int(environ.get('SLURM_STEP_NUM_TASKS') or 1) > 1 or int(environ.get('MEGASCALE_NUM_SLICES') or 1) > 1
    return {} if several or (',' in tpu and environ.get('JAX_PLATFORMS') != 'cpu') else None
  try:
    count, number = int(given['num_processes'] or 1), int(given['process_id'] if given['process_id'] != '' else 0)
  except ValueError:
    raise UserError(f'the number of processes and that of this one must be numbers, got {given["num_processes"]!r} and '
                    f'{given["process_id"]!r}') from None
  if count == 1:
    return None
  if not given['coordinator'] or given['process_id'] == '':
    missing = 'coordinator (HOST:PORT of process 0)' if not given['coordinator'] else 'process_id (0, 1, ...)'
    raise UserError(f'one of {count} processes also needs its {missing}: give --coordinator, --num_processes and '
                    f'--process_id, or DIFFUSION_JAX_COORDINATOR and so on')
  if not re.fullmatch(r'.+:\d+', given['coordinator']) or not 0 <= number < count:
    raise UserError(f'process {number} of {count} at {given["coordinator"]!r} cannot be: the coordinator is HOST:PORT, '
                    f'and processes count from 0 to {count - 1}')
  return {'coordinator_address': given['coordinator'], 'num_processes': count, 'process_id': number,
          'local_device_ids': local_devices(environ), 'cluster_detection_method': 'deactivate'}


def local_devices(environ: Mapping[str, str]) -> list[int] | None:
  """Which GPUs are this process's, if SLURM runs several on a node that all see the same ones; None for all."""
  tasks = int((re.match(r'\d+', environ.get('SLURM_STEP_TASKS_PER_NODE', '')) or ['1'])[0])
  seen = len(environ['CUDA_VISIBLE_DEVICES'].split(',')) if environ.get('CUDA_VISIBLE_DEVICES') else 0
  if tasks == 1 or seen < tasks:
    return None
  number = int(environ.get('SLURM_LOCALID') or 0)
  return list(range(seen * number // tasks, seen * (number + 1) // tasks))


def initialise(coordinator: str = '', num_processes: int = 0, process_id: int = -1) -> int:
  """Joins the processes of this command and returns how many there are; call before anything uses a device.

  Nothing happens if this process is alone. UserError for a wrong or incomplete description (see `parameters`).
  """
  global _count
  chosen = parameters(os.environ, coordinator, num_processes, process_id)
  if chosen is None or _count > 1:
    return _count
  _exit_on_abort()
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  jax.config.update('jax_enable_preemption_service', False)  # it would swallow SIGTERM; see Consensus
  beat = seconds('DIFFUSION_JAX_HEARTBEAT', HEARTBEAT_SECONDS)
  try:
    jax.distributed.initialize(**chosen, heartbeat_timeout_seconds=beat, shutdown_timeout_seconds=2 * beat)
  except ValueError as e:
    raise UserError(f'the other processes cannot be found: {e}') from e
  _count = service.global_state.num_processes
  return _count


def seconds(variable: str, default: int) -> int:
  """A whole number of seconds from the environment; UserError if it is none."""
  text = os.environ.get(variable) or str(default)
  if not text.isdecimal():
    raise UserError(f'{variable} must be a whole number of seconds, got {text!r}')
  return int(text)


def count() -> int:
  """How many processes there are; asks no device."""
  return _count


def is_writer() -> bool:
  """Whether this is the process that writes records."""
  return _count == 1 or jax.process_index() == 0


def agree(value: Any) -> Any:
  """The `value` of process 0 (plain data), on every process. All must call this, in the same order."""
  if _count == 1:
    return value
  key = f'diffusion_jax/{next(_numbers)}'
  if is_writer():
    _client().key_value_set(key, json.dumps(value))
    return value
  return json.loads(_client().blocking_key_value_get(key, PATIENCE_MS))


def first(act: Callable[[], Any]) -> Any:
  """What act() gives (plain data) where it is called, on process 0 alone; a UserError there is raised on all."""
  if _count == 1:
    return act()
  if not is_writer():
    said = agree(None)
    if 'error' in said:
      error = UserError(said['error'])
      error.status = said['status']
      raise error
    return said['result']
  try:
    result = act()
  except UserError as e:
    agree({'error': str(e), 'status': e.status})
    raise
  agree({'result': result})
  return result


def wait() -> None:
  """Returns when every process has come here, however long that takes."""
  if _count > 1:
    _client().wait_at_barrier(f'diffusion_jax/{next(_numbers)}', PATIENCE_MS)


def everywhere(tree: Any, sharding: jax.sharding.Sharding) -> Any:
  """Arrays that every process has alike as global ones with the `sharding`; nobody compares them."""
  if _count == 1:
    return jax.device_put(tree, sharding)

  def put(a):
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(put(jax.random.key_data(a)), impl=jax.random.key_impl(a))
    return jax.make_array_from_callback(np.shape(a), sharding, np.asarray(a).__getitem__)
  return jax.tree.map(put, tree)


class Consensus:
  """When to stop: any process may wish it, and all do so after the same step, the first that none has begun yet.

  Nothing is sent until somebody wishes it, so a step costs nothing. JAX has a service like this, which knows SIGTERM
  alone, takes its handler away for good, and counts the calls of everybody who asks, Orbax among them.
  """
  KEY = 'diffusion_jax/stop'

  def __init__(self, step: int, client: Any = None, number: int = 0):
    """After `step`, with the client of JAX's coordination service as process `number`; without one it is alone."""
    self.step, self.client, self.number, self.lock = step, client, number, threading.Lock()
    self.last, self.reason, self.told = None, '', False
    self.thread = threading.Thread(target=self._listen, daemon=True) if client else None
    if self.thread:
      self.thread.start()

  @classmethod
  def of_processes(cls, step: int) -> 'Consensus':
    """Of the processes of this command."""
    return cls(step, _client(), jax.process_index()) if _count > 1 else cls(step)

  def reached(self, step: int, wish: str | None) -> bool:
    """Whether to stop after `step`, which has been begun; `wish` is why this process would like to, if it would."""
    if not self.thread:
      self.reason = wish or ''
      return bool(wish)
    if wish and not self.told:
      self.told = True
      self._say(wish)
    with self.lock:
      self.step = step
      return self.last is not None and step > self.last

  def close(self) -> None:
    """Ends the listening; every process calls it when it takes no more steps."""
    if self.thread:
      self._say('')
      self.thread.join()

  def _say(self, text):
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
      self.client.key_value_set(self.KEY, text)

  def _listen(self):
    while True:
      try:
        self.reason = self.client.blocking_key_value_get(self.KEY, 60_000)
        break
      except jax.errors.JaxRuntimeError:  # nobody has said anything for a minute
        time.sleep(0.1)
    if not self.reason:
      return
    with self.lock:  # no further step is begun until it is known which is the last that any process has
      self.client.key_value_set(f'{self.KEY}/at/{self.number}', str(self.step))
      self.client.wait_at_barrier(f'{self.KEY}/heard', PATIENCE_MS)
      self.last = max(int(text) for _, text in self.client.key_value_dir_get(f'{self.KEY}/at/'))


class Watchdog:
  """Ends the process with status 70 if it is in one place for `limit` seconds; 0: never.

  It counts its own seconds, so that a machine that was suspended has lost none, and begins at the first place.
  """

  def __init__(self, limit: int):
    self.limit, self.passed, self.stop = limit, None, threading.Event()
    self.thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self) -> 'Watchdog':
    if self.limit:
      self.thread.start()
    return self

  def __exit__(self, *_):
    self.stop.set()
    if self.limit:
      self.thread.join()

  @classmethod
  def of_environment(cls) -> 'Watchdog':
    """With the limit of DIFFUSION_JAX_WATCHDOG; without it, one process has none and several have 900 s."""
    return cls(seconds('DIFFUSION_JAX_WATCHDOG', WATCHDOG_SECONDS if _count > 1 else 0))

  def at(self, place: str) -> None:
    """Says where the process is: the seconds count from now."""
    global _place
    _place, self.passed = place, 0

  def _watch(self):
    while not self.stop.wait(1.0):
      if self.passed is not None:
        self.passed += 1
        if self.passed > self.limit:
          end(FAILED, f'nothing has moved for {self.limit} s')


def end(status: int, why: str) -> NoReturn:
  """Says why in one sentence, and ends this process now, without waiting for a peer that may not live."""
  whose = f'process {service.global_state.process_id} of {_count}' if _count > 1 else 'the process'
  more = '; the same command continues from the last checkpoint' if status == FAILED else ''
  os.write(2, f'error: {whose} ends at {_place} with status {status}: {why}{more}\n'.encode())
  os._exit(status)


def leave(status: int) -> int:
  """The exit status of a command that ends early; one of several processes ends here, and has said why.

  All may have met the same error. If they have, they end together, each with this status.
  """
  if _count == 1:
    return status
  signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher that ends the rest of the job would change the status
  sys.stdout.flush()
  sys.stderr.flush()
  with contextlib.suppress(Exception):
    _client().wait_at_barrier('diffusion_jax/farewell', FAREWELL_MS)
    if is_writer():
      time.sleep(0.5)  # the service ends with it
  os._exit(status)


def _client():
  return service.global_state.client


def _exit_on_abort():
  """JAX aborts a process whose peers are lost, and so does XLA where it gives up: with status 70 here, and a reason."""
  global _on_abort
  if sys.platform != 'linux':
    return
  _on_abort = ctypes.CFUNCTYPE(None, ctypes.c_int)(
      lambda number: end(FAILED, 'its runtime gave up, most likely because a peer died or stands still (see above)'))
  libc = ctypes.CDLL(None)
  libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
  libc.signal(signal.SIGABRT, ctypes.cast(_on_abort, ctypes.c_void_p))
