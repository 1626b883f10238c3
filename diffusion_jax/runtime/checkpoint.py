"""Checkpoints: Orbax, written asynchronously, with a checksum for every array.

A flipped bit in a data file restores silently, so the sums of `state.checksums` are saved beside the arrays and
verified on load. A checkpoint that cannot be trusted is set aside under another name and the one before it is used.
"""
import logging
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from diffusion_jax.runtime.config import UserError
from diffusion_jax.runtime.state import TrainState, checksums, named_leaves

logging.getLogger('absl').setLevel(logging.ERROR)  # orbax reports every file it touches


class Checkpoints:
  """The checkpoints of a run, numbered by step. `writer` also removes what a killed writer left unfinished."""

  def __init__(self, workdir: pathlib.Path, keep: int = 2, writer: bool = False):
    self.folder = pathlib.Path(workdir).absolute() / 'checkpoints'
    self.writer = writer
    if not writer and not self.folder.is_dir():
      raise UserError(f'there are no checkpoints in {str(workdir)!r}: train first, or give the --workdir of a run')
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
    """Starts writing `state`, which may be donated as soon as this returns; `meta` is plain data kept beside it."""
    step = int(state.step)
    if step in self.manager.all_steps():
      return
    shapes = {name: f'{leaf.dtype}{list(leaf.shape)}' for name, leaf in named_leaves(state)}
    self.manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        meta=ocp.args.JsonSave({**meta, 'checksums': checksums(state), 'shapes': shapes})))

  def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict] | None:
    """(state, meta) of `step`, or of the newest checkpoint that is whole; None if there is none.

    `abstract` is a tree of ShapeDtypeStructs with shardings. Raises UserError if `step` is damaged or does not
    exist, or if the arrays are not those of `abstract`.
    """
    if step is not None and step not in self.steps():
      raise UserError(f'there is no checkpoint at step {step}: there is {", ".join(map(str, self.steps())) or "none"}')
    for candidate in [step] if step is not None else reversed(self.steps()):
      try:
        return self._restore(abstract, candidate)
      except UserError:
        raise
      except Exception as e:  # whatever a damaged file makes orbax raise
        reason = f'checkpoint {candidate} is damaged ({_first_line(e)})'
        if step is not None:
          raise UserError(f'{reason}: take another --step') from e
        self._set_aside(candidate, reason)
    return None

  def _restore(self, abstract, step):
    meta = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
    wanted = {name: f'{leaf.dtype}{list(leaf.shape)}' for name, leaf in named_leaves(abstract)}
    different = sorted(set(wanted.items()) ^ set(meta['shapes'].items()))
    if different:
      raise UserError(f'checkpoint {step} holds other arrays than the config asks for, first {different[0][0]}: '
                      f'{meta["shapes"].get(different[0][0], "absent")} there, {wanted.get(different[0][0], "absent")} '
                      f'asked for; use the config that it was trained with')
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # orbax remarks on restoring onto another mesh, which is meant
      state = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))['state']
    wrong = [name for name, sums in checksums(state).items() if sums != meta['checksums'][name]]
    if wrong:
      raise ValueError(f'the checksums of {len(wrong)} arrays do not match, first {wrong[0]}')
    return state, meta

  def _set_aside(self, step: int, reason: str) -> None:
    if not self.writer:
      warnings.warn(f'{reason}: using the one before it', stacklevel=3)
      return
    aside = self.folder.parent / 'damaged' / str(step)
    aside.parent.mkdir(exist_ok=True)
    while aside.exists():
      aside = aside.with_name(aside.name + '_')
    (self.folder / str(step)).rename(aside)
    self.manager.reload()
    warnings.warn(f'{reason}: set aside as {aside}, using the one before it', stacklevel=3)

  def wait(self) -> None:
    """Returns when what was saved is on disk."""
    self.manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then releases the manager's threads."""
    self.manager.close()


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:200]


def abstract_with(shapes, shardings):
  """ShapeDtypeStructs that carry their shardings, as `restore` takes them."""
  return jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), shapes, shardings)
