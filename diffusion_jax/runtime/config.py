"""Configs: plain data that names functions.

A config file is Python with `get_config(run='')`; it returns an ml_collections ConfigDict in which `spec(fn, ...)`
stands for a call to be made later. What is stored is plain data, `{'fn': 'diffusion_jax.core.schedules:cosine', 's':
0.008}`: JSON in the run folder, which `build` turns into the object. A module is its own registry.
"""
import ast
import contextlib
import difflib
import functools
import importlib
import importlib.util
import inspect
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import ml_collections

# What a config.json, perhaps from a stranger, may call. `allow` adds the user's own packages.
ALLOWED = ['diffusion_jax.core', 'diffusion_jax.nets', 'optax']
# Settings younger than the first runs, at the value that names what was done while there was no choice: a config.json
# that lacks one is read as if it had it. What is added to the default config is added here, and an argument that is
# added to a function of a spec has a default that keeps what the function did.
ADDED = {'mesh.tensor': 1, 'mesh.context': 1, 'sharding': '', 'train.reduce': 'float32', 'train.remat': 'none',
         'train.moments': 'float32', 'train.ema_on_host': False, 'data.augment': 0.0, 'start': '', 'control': False,
         'learning_rate.steady_images': 0, 'sample.precision': '', 'sample.cache_every': 1, 'sample.cache_depth': 0,
         'lora': {'rank': 0, 'pattern': '', 'scale': 1.0}, 'codec': {'fn': 'diffusion_jax.nets.codecs:pixels'},
         'text': {'fn': 'diffusion_jax.nets.encoders:none'}, 'given': {'fn': 'diffusion_jax.core.givens:none'}}
Config = ml_collections.ConfigDict
GROUPS = (Mapping, Config)  # a ConfigDict is not a Mapping


class UserError(Exception):
  """Bad input: one sentence with what was wrong, both values and what to do. Commands print it and exit with 2."""
  status = 2


@contextlib.contextmanager
def explain(where: str) -> Iterator[None]:
  """Turns the ValueErrors, TypeErrors and OSErrors of what is called into UserErrors that begin with `where`."""
  try:
    yield
  except (ValueError, TypeError, OSError) as e:
    raise UserError(f'{where}: {e}') from e


def allow(package: str) -> None:
  """Lets configs call what is defined in `package` (for instance 'mylab.nets')."""
  ALLOWED.append(package)


def spec(fn: Callable, **arguments: Any) -> Config:
  """The call fn(**arguments) as plain data, with every default written out, to be made by `build`.

  Raises UserError for an argument that fn does not have (with the nearest one) or that is not plain data.
  """
  name = public_name(fn)
  parameters = {k: p for k, p in inspect.signature(fn).parameters.items()
                if not (k in ('parent', 'name') and hasattr(fn, 'apply'))}  # every Linen module has these two
  for key, value in arguments.items():
    if key not in parameters:
      raise UserError(f'{name} has no argument {key!r}{nearest(key, parameters)}')
    if not _is_plain(value):
      raise UserError(f'{name}: {key} must be a number, string, bool, tuple or spec, got {value!r}')
  # A default of None could not be overridden on the command line, since ConfigDict would not know its type.
  defaults = {k: p.default for k, p in parameters.items() if p.default is not None and _is_plain(p.default)}
  return Config({'fn': name, **defaults, **arguments})


def build(call: Mapping, **more: Any) -> Any:
  """Makes the call that a spec stands for, nested specs first; `more` are arguments known only now.

  Raises UserError if the function is not one that configs may call, does not exist, or refuses its arguments.
  """
  call = dict(call)
  fn = _resolve(call.pop('fn'))
  arguments = {k: build(v) if isinstance(v, GROUPS) and 'fn' in v else v for k, v in call.items()}
  with explain(public_name(fn)):
    return fn(**arguments, **more)


def parse_call(text: str, module: Any) -> Config:
  """'ddim' or 'ddim(eta=0.5)' as a spec of that function of `module`: an import path or the module itself."""
  module = _import(module) if isinstance(module, str) else module
  text = text.strip()
  name, _, arguments = text.partition('(')
  known = [n for n in getattr(module, '__all__', vars(module)) if _offered(module, n)]
  if name not in known:
    raise UserError(f'{module.__name__} has no {name!r}{nearest(name, known)}')
  try:
    call = ast.parse(text if arguments else f'{name}()', mode='eval').body
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
      raise ValueError('not one call')
    # A call within the call is of the same module: 'shifted(process=cosine_continuous(logsnr_min=-10.0))'.
    keywords = {k.arg: parse_call(ast.unparse(k.value), module) if isinstance(k.value, ast.Call)
                else ast.literal_eval(k.value) for k in call.keywords}
  except (SyntaxError, ValueError, TypeError) as e:
    raise UserError(f'{text!r} cannot be read: write {name} or {name}(argument=value, ...)') from e
  if call.args or None in keywords:
    raise UserError(f'{text!r}: give arguments by name, {name}(argument=value, ...)')
  return spec(getattr(module, name), **keywords)


def load(path: str) -> Config:
  """The config of 'FILE.py[:run]', or of a saved config.json."""
  file, _, run = path.partition(':')
  if not os.path.isfile(file):
    folder = pathlib.Path(file).parent
    names = [str(p) for p in folder.glob('*.py')] if folder.is_dir() else []
    raise UserError(f'there is no config file {file!r}{nearest(file, names)}')
  if file.endswith('.json'):
    return from_json(pathlib.Path(file))
  with executed(file, f'config file {path!r}') as module:
    config = module.get_config(run) if run else module.get_config()
  if not isinstance(config, Config):
    raise UserError(f'config file {path!r}: get_config must return a ConfigDict, got {type(config).__name__}')
  return config


@contextlib.contextmanager
def executed(file: str, what: str) -> Iterator[ModuleType]:
  """The module of a Python file of the user's, which may import from the working folder: configs.digits.

  Whatever it raises, in the block too, becomes a UserError that begins with `what`.
  """
  sys.path.insert(0, os.getcwd())
  try:
    module_spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    yield module
  except UserError:
    raise
  except Exception as e:
    raise UserError(f'{what} cannot be read: {type(e).__name__}: {e}') from e
  finally:
    sys.path.pop(0)


def choose(runs: Mapping[str, Any], run: str) -> Any:
  """runs[run], for a config file with several runs; UserError with the nearest name if there is none."""
  if run not in runs:
    raise UserError(f'there is no run {run!r} in this config file{nearest(run, runs)}')
  return runs[run]


def override(config: Config, assignments: Mapping[str, str]) -> None:
  """Applies {'a.b': 'text'} in place, reading each text by the type that the config has there.

  A text 'cosine' or 'cosine(s=0.01)' at the place of a spec calls another function of the same module instead.
  """
  for key, text in assignments.items():
    *folders, last = key.split('.')
    node = config
    for name in [*folders, last]:
      if not isinstance(node, Config) or name not in node:
        raise UserError(f'config has no key {key!r}{nearest(key, flatten(config))}')
      parent, node = node, node[name]
    with parent.unlocked(), parent.ignore_type():
      parent[last] = _parse(key, text, node)


def _parse(key: str, text: str, current: Any) -> Any:
  if isinstance(current, Config):
    if 'fn' not in current:
      raise UserError(f'config.{key} is a group of settings{nearest("", flatten(current, key))}')
    return parse_call(text, current.fn.partition(':')[0])
  kind = 'bool, true or false' if isinstance(current, bool) else type(current).__name__
  try:
    if isinstance(current, bool):
      return {'true': True, 'false': False, '1': True, '0': False}[text.lower()]
    if isinstance(current, str):
      return text
    value = ast.literal_eval(text)
    # JSON has no infinity, and 1e999 is one.
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if isinstance(current, int) and number and value == int(value):
      return int(value)  # 2e5 images are 200000
    if isinstance(current, float) and number:
      return float(value)
    if isinstance(current, tuple):
      value = value if isinstance(value, (tuple, list)) else (value,)
      same = {type(v) for v in current} or {int}
      if all(type(v) in same for v in value):
        return tuple(value)
  except (KeyError, ValueError, SyntaxError, TypeError, OverflowError):
    pass
  raise UserError(f'config.{key} must be {"an" if kind[0] in "aeiou" else "a"} {kind} like {current!r}, got {text!r}')


def flatten(config: Mapping, prefix: str = '') -> dict[str, Any]:
  """{'a.b': value} of a nested config."""
  flat = {}
  for key, value in config.items():
    name = f'{prefix}.{key}' if prefix else key
    flat |= flatten(value, name) if isinstance(value, GROUPS) and value else {name: value}
  return flat


def differences(a: Mapping, b: Mapping) -> list[str]:
  """'key: a's value -> b's value' for every key in which two configs differ."""
  a, b = (flatten(json.loads(to_json(c))) for c in (a, b))
  return [f'{k}: {a.get(k, "absent")} -> {b.get(k, "absent")}' for k in sorted({**a, **b})
          if (k in a) != (k in b) or a.get(k) != b.get(k)]


def to_json(config: Mapping) -> str:
  """The config as JSON."""
  return json.dumps(config.to_dict() if isinstance(config, Config) else config, indent=1) + '\n'


def from_json(path: pathlib.Path) -> Config:
  """The config in a JSON file, and what is younger than the file filled in; UserError if it cannot be read."""
  try:
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
      raise ValueError(f'it holds a {type(value).__name__}')
    return _completed(Config(_tuples(value)))
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(f'there is no {path}: is {str(path.parent)!r} a run folder that train has made?') from None
  except (ValueError, AttributeError, OSError) as e:  # AttributeError: a key such as __class__
    raise UserError(f'{path} is not a config: {e}') from e


def _completed(config: Config) -> Config:
  """The config with what it lacks because it is older than that: `ADDED`, and arguments of functions of its specs."""
  for key, value in ADDED.items() if isinstance(config.get('mesh'), Config) else ():
    *groups, last = key.split('.')
    node = functools.reduce(Config.get, groups, config)
    if isinstance(node, Config) and last not in node:
      node[last] = value
  return _with_defaults(config)


def _with_defaults(config: Config) -> Config:
  for value in config.values():
    if isinstance(value, Config):
      _with_defaults(value)
  with contextlib.suppress(UserError, ValueError, TypeError):  # `build` will say what is wrong with it
    for key, value in (spec(_resolve(config.fn)) if 'fn' in config else {}).items():
      if key not in config:
        config[key] = value
  return config


def public_name(fn: Callable) -> str:
  """'package.module:function' by the shortest path that is public (optax keeps adam in a private module)."""
  if not hasattr(fn, '__qualname__'):
    raise UserError(f'a spec stands for a call of a function or a class, got {fn!r}')
  module, name = fn.__module__, fn.__qualname__
  parts = module.split('.')
  for n in range(1, len(parts)):
    outer = sys.modules.get('.'.join(parts[:n]))
    if getattr(outer, name, None) is fn:
      return f'{outer.__name__}:{name}'
  return f'{module}:{name}'


def nearest(name: str, known: Any) -> str:
  """'; did you mean ...?' with the nearest known name, or the known names if none is near."""
  known = list(known)
  match = difflib.get_close_matches(name, known, 1, 0.5)
  tail = [k for k in known if name and k.rpartition('.')[2] == name.rpartition('.')[2]]
  if match or tail:
    return f'; did you mean {(tail or match)[0]!r}?'
  return f': there is {", ".join(map(str, known))}' if 0 < len(known) <= 20 else ''


def _resolve(name: str) -> Callable:
  """The function that a spec names, if configs may call it."""
  module_name, _, attribute = str(name).partition(':')
  module = _import(module_name)
  if not _offered(module, attribute):
    raise UserError(f'{module_name} has no function {attribute!r}'
                    f'{nearest(attribute, getattr(module, "__all__", []))}')
  return getattr(module, attribute)


def _import(name: str) -> Any:
  """The module of that name, if it is of a package that configs may call: importing runs code."""
  if not any(name == root or name.startswith(root + '.') for root in ALLOWED):
    raise UserError(f'a config may not call functions of {name!r}, only of {", ".join(ALLOWED)}: '
                    f'if you trust it, allow its package with --allow={name}')
  try:
    return importlib.import_module(name)
  except ImportError as e:
    raise UserError(f'{name!r} cannot be imported: {e}') from e


def _offered(module: Any, name: str) -> bool:
  """Whether a config may call this of a module: not what it only imported (os, say), but what its package defines."""
  fn = vars(module).get(name)  # not what a module makes up when asked: optax so serves names it has deprecated
  home = getattr(fn, '__module__', None) or ''
  return callable(fn) and not name.startswith('_') and home.split('.')[0] == module.__name__.split('.')[0]


def _is_plain(value: Any) -> bool:
  if isinstance(value, (tuple, list)):
    return all(map(_is_plain, value))
  return isinstance(value, (bool, int, float, str, dict, Config))


def _tuples(value: Any) -> Any:
  """JSON has no tuples; configs have no lists."""
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  return tuple(map(_tuples, value)) if isinstance(value, list) else value
