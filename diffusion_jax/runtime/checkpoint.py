"""Checkpoints: Orbax, written asynchronously, with a checksum for every array.

A flipped bit in a data file restores silently, so the sums of `state.checksums` are saved beside the arrays and
verified on load. A checkpoint that cannot be trusted is set aside under another name and the one before it is used.
Of several processes each calls the same methods in the same order; they agree on which checkpoint is whole.
"""
import contextlib
import errno
import functools
import logging
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from diffusion_jax.runtime import paths
from diffusion_jax.runtime.config import UserError
from diffusion_jax.runtime.state import TrainState, checksums, named_leaves

logging.getLogger('absl').setLevel(logging.CRITICAL)  # orbax reports every file it touches, and what it raises anyway
FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]  # in the words of whoever met it


class NoSpace(UserError):
  """The disk is full. Not to be started again by a launcher: it would end the same way until somebody makes space."""
  status = 1


class Broken(UserError):
  """The parameters are no longer numbers."""
  status = 1


class Checkpoints:
  """The checkpoints of a run, numbered by step. `writer` also removes what a killed writer left unfinished.

  `workdir` is a local path, or what paths.folder gives for a bucket.
  """

  def __init__(self, workdir: pathlib.Path, keep: int = 2, writer: bool = False):
    where = workdir if paths.is_remote(workdir) else os.path.abspath(workdir)
    self.folder = epath.Path(where) / 'checkpoints'
    self.writer, self.closed = writer, False
    if not writer and not self.folder.is_dir():
      raise UserError(f'there are no checkpoints in {str(workdir)!r}: train first, or give the --workdir of a run')
    if writer:
      _expect_late_failures()
    policies = ocp.checkpoint_managers.preservation_policy
    self.manager = ocp.CheckpointManager(
        self.folder, item_names=('state', 'meta'),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=policies.LatestN(keep), cleanup_tmp_directories=writer, create=writer,
            read_only=not writer))

  def steps(self) -> list[int]:
    """The steps that have a complete checkpoint, oldest first."""
    return sorted(self.manager.all_steps())

  def save(self, state: TrainState, meta: Mapping[str, Any]) -> None:
    """Starts writing `state`, which may be donated as soon as this returns; `meta` is plain data kept beside it.

    Raises NoSpace if the disk is full, perhaps only at the next save or `close`: what was there before is untouched.
    Raises Broken, and writes nothing, if a parameter is not finite.
    """
    step = int(state.step)
    if step in self.manager.all_steps():
      return
    finite = {name: _finite(leaf) for name, leaf in named_leaves(state.params)}
    if broken := [name for name, good in finite.items() if not good]:
      raise Broken(f'after step {step} {len(broken)} of the parameters are not finite, first {broken[0]}: that is not '
                   f'saved, and the checkpoints before are untouched; try a lower config.learning_rate.peak')
    shapes = {name: f'{leaf.dtype}{list(leaf.shape)}' for name, leaf in named_leaves(state)}
    with self._space():
      self.manager.save(step, args=ocp.args.Composite(
          state=ocp.args.StandardSave(state),
          meta=ocp.args.JsonSave({**meta, 'checksums': checksums(state), 'shapes': shapes})))

  @contextlib.contextmanager
  def _space(self) -> Iterator[None]:
    try:
      yield
    except Exception as e:
      if not any(words in str(link) for link in _chain(e) for words in FULL):
        raise
      if jax.process_index() == 0:
        self._remove_unfinished()
      raise NoSpace(f'there is no space left for a checkpoint in {os.fspath(self.folder)!r}; what was unfinished is '
                    f'removed: make space, and the same command continues from step {max(self.steps(), default=0)}'
                    ) from e

  def _remove_unfinished(self) -> None:
    """Again and again: arrays that were on their way when another met the full disk make their folder anew."""
    quiet = 0
    for _ in range(100):
      left = [*self.folder.glob(f'*{ocp.path.step.TMP_DIR_SUFFIX}*')]
      for path in left:
        with contextlib.suppress(OSError):
          path.rmtree()
      quiet = 0 if left else quiet + 1
      if quiet == 5:
        return
      time.sleep(0.1)

  def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict] | None:
    """(state, meta) of `step`, or of the newest checkpoint that is whole; None if there is none.

    `abstract` is a tree of ShapeDtypeStructs with shardings. Raises UserError if `step` is damaged or does not
    exist, or if the arrays are not those of `abstract`, or if another process does not see the files.
    """
    self.wait()  # what is being written counts as a step already
    if step is not None and step not in self.steps():
      raise UserError(f'there is no checkpoint at step {step}: there is {", ".join(map(str, self.steps())) or "none"}')
    left = self.steps() if step is None else [step]
    while (candidate := _of_first(max(left, default=-1))) >= 0:
      self._check_seen(candidate)
      try:
        return self._restore(abstract, candidate)
      except UserError:
        raise
      except Exception as e:  # whatever a damaged file makes orbax raise
        reason = f'checkpoint {candidate} is damaged ({_first_line(e)})'
        if step is not None:
          raise UserError(f'{reason}: take another --step') from e
        self._set_aside(candidate, reason)
      left = [other for other in left if other < candidate]
    return None

  def _restore(self, abstract, step):
    # Past the manager, whose restore lets processes wait for one that has met a damaged file.
    folder, args = self.folder / str(step), ocp.args
    with _together():
      meta = ocp.JsonCheckpointHandler().restore(folder / 'meta', args=args.JsonRestore())
      shapes, sums = meta['shapes'], meta['checksums']
    wanted = {name: f'{leaf.dtype}{list(leaf.shape)}' for name, leaf in named_leaves(abstract)}
    different = sorted(set(wanted.items()) ^ set(shapes.items()))
    if different:
      raise UserError(f'checkpoint {step} holds other arrays than the config asks for, first {different[0][0]}: '
                      f'{shapes.get(different[0][0], "absent")} there, {wanted.get(different[0][0], "absent")} '
                      f'asked for; use the config that it was trained with')
    with _together(), warnings.catch_warnings():
      warnings.simplefilter('ignore')  # orbax remarks on restoring onto another mesh, which is meant
      state = ocp.StandardCheckpointHandler().restore(folder / 'state', args=args.StandardRestore(abstract))
    with _together():
      wrong = [name for name, found in checksums(state).items() if found != sums[name]]
      if wrong:
        raise ValueError(f'the checksums of {len(wrong)} arrays do not match, first {wrong[0]}')
    return state, meta

  def _check_seen(self, step):
    """One process of several may look at a disk of its own, or not yet see what another has written."""
    if jax.process_count() > 1:
      seen = multihost_utils.process_allgather(np.array((self.folder / str(step)).exists())).ravel()
      if not seen.all():
        raise UserError(f'process {int(np.argmin(seen))} does not see checkpoint {step} in {os.fspath(self.folder)!r}: '
                        f'give a --workdir on a file system that all hosts share')

  def _set_aside(self, step: int, reason: str) -> None:
    if not self.writer:
      warnings.warn(f'{reason}: using the one before it', stacklevel=3)
      return
    aside = self.folder.parent / 'damaged' / str(step)
    if jax.process_index() == 0:
      aside.parent.mkdir(parents=True, exist_ok=True)
      while aside.exists():
        aside = aside.with_name(aside.name + '_')
      paths.move(self.folder / str(step), aside)
      warnings.warn(f'{reason}: set aside as {os.fspath(aside)}, using the one before it', stacklevel=3)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f'checkpoint {step} is set aside')
    self.manager.reload()

  def wait(self) -> None:
    """Returns when what was saved is on disk; raises NoSpace."""
    with self._space():
      self.manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then releases the manager's threads; raises NoSpace."""
    if not self.closed:
      self.closed = True
      with self._space():
        self.manager.close()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    if error is None or jax.process_count() == 1:  # else a peer may be dead, and would be waited for
      self.close()


@functools.cache
def _expect_late_failures() -> None:
  """Of many arrays that meet a full disk one is raised; the others find nobody waiting, and would print tracebacks."""
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  before = sys.unraisablehook
  sys.unraisablehook = lambda late: None if str(late.exc_value) == 'Event loop is closed' else before(late)


@contextlib.contextmanager
def _together() -> Iterator[None]:
  """What raises in one process raises in all, so that none waits for it."""
  failed = None
  try:
    yield
  except Exception as e:
    failed = e
  if jax.process_count() > 1:
    well = multihost_utils.process_allgather(np.array(failed is None)).ravel()
    if not well.all():
      failed = failed or ValueError(f'process {int(np.argmin(well))} cannot read it')
  if failed is not None:
    raise failed


def _of_first(number: int) -> int:
  """The number that the first process gives."""
  return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


@jax.jit
def _finite(x: jax.Array) -> jax.Array:
  return jnp.all(jnp.isfinite(x))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:200]


def abstract_with(shapes, shardings):
  """ShapeDtypeStructs that carry their shardings, as `restore` takes them."""
  return jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), shapes, shardings)
