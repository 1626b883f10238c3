"""LoRA files <-> nets/lora.py: the `pytorch_lora_weights.safetensors` of diffusers and peft, and what came before.

A file may adapt several networks. `parts` says which there are and how their names are read: {'unet': (table, params)},
with a table of {their module: our path} such as unet_condition.table(net) and a tree of parameters or of shapes; CLIP's
encoders are 'text_encoder' and 'text_encoder_2'.
"""
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np
import safetensors.numpy

from diffusion_jax.convert import clip, files, names
from diffusion_jax.nets import lora
from diffusion_jax.runtime import log
from diffusion_jax.runtime.config import UserError

Tree = Mapping[str, Any]
Parts = Mapping[str, tuple[Mapping[str, str], Tree]]
NAME = 'pytorch_lora_weights.safetensors'
METADATA = 'lora_adapter_metadata'  # where diffusers writes peft's options into a file, as JSON
# Every form that is read; the first is what diffusers writes today, and what is written here. A part and a point begin
# the module's name, or nothing does and it is the U-Net's; kohya's scripts begin as in KOHYA, and write '_' for points.
FORMS = (
    r'(?P<module>.+)\.lora_(?P<half>A|B)\.weight',
    r'(?P<module>.+)\.lora(_linear_layer)?\.(?P<half>down|up)\.weight',  # diffusers before peft
    r'(?P<module>.+)_lora\.(?P<half>down|up)\.weight',                   # and its attention processors before that
    r'(?P<module>.+)\.lora_(?P<half>down|up)\.weight',                   # kohya's scripts
    r'(?P<module>.+)\.(?P<half>alpha)',
)
HALVES = {'A': 'down', 'B': 'up'}
KOHYA = {'lora_unet_': 'unet', 'lora_te_': 'text_encoder', 'lora_te1_': 'text_encoder', 'lora_te2_': 'text_encoder_2'}


def read(path: pathlib.Path, parts: Parts) -> dict[str, dict]:
  """{part: adapters} of a file, or of the folder that has it; UserError as in `from_theirs`."""
  path = pathlib.Path(path)
  path = path / NAME if path.is_dir() else path
  if path.suffix in files.PICKLES:
    raise UserError(f'{path} is a pickle, which runs code when it is opened, so it is not read: load it where you '
                    f'trust it and save it again as {NAME}')
  tensors, data = files.read_safetensors(path), path.read_bytes()
  header = json.loads(data[8:8 + int.from_bytes(data[:8], 'little')])
  return from_theirs(parts, tensors, header.get('__metadata__') or {}, str(path))


def write(path: pathlib.Path, parts: Parts, adapters: Mapping[str, Tree], dtype: Any = np.float32,
          linear: bool = False) -> None:
  """A file that diffusers' load_lora_weights reads, in a folder under its usual name or under the name given.

  Whole or not at all; arguments as in `to_theirs`.
  """
  path = pathlib.Path(path)
  path = path if path.suffix == '.safetensors' else path / NAME
  log.write(path, safetensors.numpy.save(to_theirs(parts, adapters, dtype, linear),
                                         metadata={'format': 'pt', **metadata(parts, adapters)}))


def from_theirs(parts: Parts, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None,
                where: str = 'the LoRA file') -> dict[str, dict]:
  """{part: adapters}, float32, of the tensors and the metadata of a file; ranks may differ between modules.

  A module has `alpha` where the file says one that is not its rank. Raises UserError that begins with `where` for names
  that no network of `parts` has (the first ten, with the nearest), for half of a pair, and for tensors of other shapes
  than a pair of the kernel's must have, or of numbers that float32 cannot hold.
  """
  found, unknown = {}, []
  flat = {part: {theirs.replace('.', '_'): theirs for theirs in table} for part, (table, _) in parts.items()}
  for key, tensor in tensors.items():
    part, module, half = _place(key, flat)
    if module is None:
      unknown.append(key)
    else:
      found.setdefault((part, module), {})[half] = key, np.asarray(tensor)
  adaptable = {part: _adaptable(*of) for part, of in parts.items()}
  unknown += [key for (part, module), halves in found.items() if module not in adaptable.get(part, {})
              for key, _ in halves.values()]
  if unknown or not found:
    known = [f'{_theirs(part, module)}.lora_A.weight' for part in parts for module in adaptable[part]]
    what = names._listed(sorted(unknown), known) if unknown else 'nothing'
    raise UserError(f'{where} holds {what}: it is no LoRA file, or one for other networks than {" and ".join(parts)}')
  if single := [next(iter(halves.values()))[0] for halves in found.values() if not {'down', 'up'} <= set(halves)]:
    raise UserError(f'{where} lacks the other half of {", ".join(single[:names.SHOWN])}{names._more(single)}: it is '
                    f'damaged, or a part of a file')
  _check(found, adaptable, where)
  options, result = _options(metadata or {}, where), {}
  for (part, module), halves in found.items():
    path, kernel = adaptable[part][module]
    down, up = (np.moveaxis(halves[half][1], (0, 1), (-1, -2)) for half in ('down', 'up'))
    rank = down.shape[-1]
    adapter = {'down': down.reshape(*kernel[:-1], rank), 'up': up.reshape(rank, kernel[-1])}
    alpha = halves['alpha'][1].item() if 'alpha' in halves else _alpha(options.get(part, (None, {})), module)
    if alpha not in (None, rank):
      adapter['alpha'] = alpha
    for name, array in adapter.items():
      result.setdefault(part, {})[(*path, name)] = np.array(array, np.float32, order='C')
  return {part: flax.traverse_util.unflatten_dict(flat) for part, flat in result.items()}


def to_theirs(parts: Parts, adapters: Mapping[str, Tree], dtype: Any = np.float32,
              linear: bool = False) -> dict[str, np.ndarray]:
  """Their tensors by name from {part: adapters}: what `from_theirs` undoes, bit for bit, with `metadata`.

  linear: as in unet_condition.to_theirs. Raises UserError for adapters of modules that their network has not.
  """
  tensors = {}
  for part, module, adapter in _named(parts, adapters):
    down, up = (np.moveaxis(np.asarray(adapter[half]), (-1, -2), (0, 1)) for half in ('down', 'up'))
    space = down.ndim - 2 or 2 * (not linear and module.endswith(('.proj_in', '.proj_out')))
    for name, tensor in (('A', down.reshape(*down.shape, *[1] * (space + 2 - down.ndim))),
                         ('B', up.reshape(*up.shape, *[1] * space))):
      tensors[f'{_theirs(part, module)}.lora_{name}.weight'] = np.ascontiguousarray(tensor, dtype)
  return tensors


def metadata(parts: Parts, adapters: Mapping[str, Tree]) -> dict[str, str]:
  """What a file must say beside its tensors: peft's options for the parts in which an alpha is not the rank."""
  options, found = {}, {}
  for part, module, adapter in _named(parts, adapters):
    rank = adapter['down'].shape[-1]
    found.setdefault(part, {})[module] = rank, float(adapter.get('alpha', rank))
  for part, of in found.items():
    if any(rank != alpha for rank, alpha in of.values()):
      rank, alpha = next(iter(of.values()))
      options |= {f'{part}.r': rank, f'{part}.lora_alpha': alpha, f'{part}.target_modules': sorted(of)}
      # Where text encoders lie differs between versions of transformers; elsewhere '^' is where the name begins.
      start = '' if part.startswith('text') else '^'
      options[f'{part}.rank_pattern'] = {start + module: r for module, (r, _) in of.items() if r != rank}
      options[f'{part}.alpha_pattern'] = {start + module: a for module, (_, a) in of.items() if a != alpha}
  return {METADATA: json.dumps(options, sort_keys=True)} if options else {}


def _place(key, flat):
  """(part, their module, 'down', 'up' or 'alpha') of a tensor's name; the module is None if it has no known form.

  flat: {part: {a module's name without points: its name}}.
  """
  match = next(filter(None, (re.fullmatch(form, key) for form in FORMS)), None)
  if match is None:
    return '', None, ''
  module, half = match['module'], HALVES.get(match['half'], match['half'])
  for start, part in KOHYA.items():
    if module.startswith(start):
      name = module.removeprefix(start).removeprefix(clip.PREFIX.replace('.', '_'))
      return part, flat.get(part, {}).get(name), half
  part, _, rest = module.partition('.')
  part, module = (part, rest) if part in KOHYA.values() else ('unet', module)
  module = module.removeprefix(clip.PREFIX).replace('.processor.', '.')
  return part, f'{module}.0' if module.endswith('.to_out') else module, half


def _adaptable(table, tree):
  """{their module: (our path, shape of its kernel)}."""
  flat = flax.traverse_util.flatten_dict(tree)
  return {theirs: (path, tuple(flat[(*path, 'kernel')].shape)) for theirs, ours in table.items()
          if (*(path := tuple(ours.split('/'))), 'kernel') in flat}


def _theirs(part, module):
  inner = clip.PREFIX if part.startswith('text_encoder') and not module.startswith('text_projection') else ''
  return f'{part}.{inner}{module}'


def _check(found, adaptable, where):
  """Raises UserError for tensors that are no pair for their kernel."""
  wrong, inexact = [], []
  for (part, module), halves in found.items():
    *space, inputs, outputs = adaptable[part][module][1]
    rank, ones = (halves['down'][1].shape or (0,))[0], (1,) * len(space)
    wanted = {'down': [(rank, inputs, *space)], 'up': [(outputs, rank, *ones)], 'alpha': [(), (1,)]}
    if not space:  # the pointwise convolutions of theirs that are matrices here
      wanted |= {'down': [(rank, inputs), (rank, inputs, 1, 1)], 'up': [(outputs, rank), (outputs, rank, 1, 1)]}
    wrong += [f'{key} has {list(tensor.shape)} and not {list(wanted[half][0])}'
              for half, (key, tensor) in halves.items() if tensor.shape not in wanted[half] or 0 in tensor.shape]
    inexact += [f'{key} ({tensor.dtype})' for half, (key, tensor) in halves.items()
                if half != 'alpha' and not names._fits(tensor.dtype)]
  if wrong:
    raise UserError(f'{where} has tensors of other shapes than the network: {"; ".join(wrong[:names.SHOWN])}'
                    f'{names._more(wrong)}')
  if inexact:
    raise UserError(f'{where}: float32 cannot hold {", ".join(inexact[:names.SHOWN])}{names._more(inexact)}: save the '
                    f'file as float32, float16 or bfloat16')


def _options(metadata, where):
  """{part: (alpha or None, {pattern: alpha})} from the options of peft in the metadata of a file."""
  try:
    result = {}
    for key, value in json.loads(metadata.get(METADATA, '{}')).items():
      part, point, name = key.partition('.')
      result.setdefault(part if point else 'unet', {})[name if point else key] = value
    rooted = [part for part, of in result.items() if of.get('use_rslora')]
    result = {part: (None if of.get('lora_alpha') is None else float(of['lora_alpha']),
                     {key: float(alpha) for key, alpha in (of.get('alpha_pattern') or {}).items()})
              for part, of in result.items()}
  except (ValueError, TypeError, AttributeError) as error:
    raise UserError(f'{where}: its {METADATA} cannot be read: {error}') from None
  if rooted:
    raise UserError(f'{where} scales the adapters of {rooted[0]} by alpha / sqrt(r) (use_rslora), which is not '
                    f'converted: save it again with alpha times sqrt(r) as its alpha')
  if odd := [key for _, patterns in result.values() for key in patterns if not re.fullmatch(r'\^?[\w.]+', key)]:
    raise UserError(f'{where}: alpha_pattern must hold names of modules, got {odd[0]!r}')
  return result


def _alpha(options, module):
  """The alpha of a module, or None. Patterns are ends of names, or after '^' whole ones."""
  default, patterns = options
  for pattern, alpha in patterns.items():
    name = pattern.removeprefix('^').removeprefix(clip.PREFIX)
    if module == name or (not pattern.startswith('^') and module.endswith(f'.{name}')):
      return alpha
  return default


def _named(parts, adapters):
  """(part, their module, adapter) of every adapter."""
  for part, tree in adapters.items():
    if part not in parts:
      raise UserError(f'adapters of {part}, and the networks are {" and ".join(parts)}')
    theirs = {path: module for module, (path, _) in _adaptable(*parts[part]).items()}
    for path, adapter in lora.modules(tree).items():
      if path not in theirs:
        raise UserError(f'the network called {part} in a LoRA file has no {"/".join(path)!r} that can be adapted')
      yield part, theirs[path], adapter
