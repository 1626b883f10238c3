"""A trained model out of a run folder."""
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax.errors import ScopeParamNotFoundError

from diffusion_jax import model as model_lib
from diffusion_jax.model import Model
from diffusion_jax.nets import quantise
from diffusion_jax.runtime import backend, sharding, snapshots
from diffusion_jax.runtime.checkpoint import Checkpoints
from diffusion_jax.runtime.config import Config, UserError, explain, from_json, nearest

WEIGHTS = 'weights.safetensors'  # of a run folder that was converted, in the place of checkpoints


class Trained(NamedTuple):
  """A model and one set of its parameters, all that it runs with, out of a run folder, on every device of `mesh`."""
  model: Model
  mesh: jax.sharding.Mesh
  params: Any
  step: int
  images: int
  ema: str
  class_names: tuple[str, ...]
  adapters: Any = None  # those of a run that trains adapters; `params` has them merged


def restore(workdir: pathlib.Path, ema_name: str, step: int | None,
            choose_devices: Callable[[Config], None]) -> Trained:
  """The parameters of a run, of the newest whole checkpoint or of `step`: the average `ema_name`, or 'raw'.

  `ema_name` may also be the file of an average, as posthoc_ema makes: NAME.safetensors. `choose_devices(config)` runs
  before anything touches a device. Raises UserError if the folder is not a run's.
  """
  config = from_json(workdir / 'config.json')
  model_lib.check(config)
  names, file = [*config.ema, 'raw'], pathlib.Path(ema_name) if ema_name.endswith('.safetensors') else None
  if ema_name and not file and ema_name not in names:
    raise UserError(f'there is no average {ema_name!r} in this run{nearest(ema_name, names)}')
  if file and step is not None:
    raise UserError(f'--step chooses a checkpoint, and {ema_name!r} is an average of its own time: give one of the two')
  choose_devices(config)
  config.train.ema_on_host = False  # this is no training
  about = json.loads((workdir / 'data.json').read_text())
  backend.keep_memory(about['shape'])
  class_names = tuple(about['class_names'])
  model = model_lib.make(config, about['shape'], about['num_classes'], class_names, workdir)
  mesh = sharding.make_mesh()
  abstract = model_lib.abstract_state(model, mesh)
  if not ema_name and step is None and (workdir / WEIGHTS).exists():
    file = workdir / WEIGHTS
  if file:
    about = snapshots.Snapshot(file).about
    images, name = int(about.get('images', 0)), f'{file.stem} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}'
    if file.name == WEIGHTS:
      whole = snapshots.load(file, {**dict(abstract.frozen), **abstract.params})
    else:
      frozen = _checkpoint(workdir, abstract, None)[0].frozen if abstract.frozen else ()
      whole = {**dict(frozen), **snapshots.load(file, abstract.params)}
    return Trained(model, mesh, model.whole(whole), images // config.train.batch_size, images, name, class_names,
                   whole.get('lora'))
  state, meta = _checkpoint(workdir, abstract, step)
  name = ema_name or next(iter(config.ema))
  chosen = state.params if name == 'raw' else state.emas[name]
  params = model.whole(chosen, state.frozen)
  return Trained(model, mesh, params, meta['step'], meta['images'], name, class_names, chosen.get('lora'))


def reduced(trained: Trained, precision: str) -> Trained:
  """The model with a net that computes in `precision`, its kernels held in that: 'bfloat16' or 'int8'; '': as it is.

  What there is beside the net, a text encoder and a codec, stays as it is. UserError for a net that cannot.
  """
  if not precision:
    return trained
  model, where = trained.model, f'config.sample.precision is {precision!r}'
  with explain(where):
    net, params = quantise.reduced(model.net, trained.params['net'], precision)
  made = trained._replace(model=model._replace(net=net), params={**trained.params, 'net': params})
  try:
    jax.eval_shape(lambda params: model_lib.denoised(made.model, params), made.params)
  except ScopeParamNotFoundError:
    raise UserError(f"{where}, and {type(net).__name__} has layers of its own, which know no such kernels: take "
                    f"'bfloat16', or leave it empty") from None
  return made


def _checkpoint(workdir, abstract, step):
  checkpoints = Checkpoints(workdir)
  found = checkpoints.restore(abstract, step)
  checkpoints.close()
  if found is None:
    raise UserError(f'there is no checkpoint in {str(workdir)!r} yet: let train reach its first')
  return found
