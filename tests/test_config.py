"""Configs: plain data both ways, nothing a stranger's can run, and one sentence for every mistake."""
import importlib
import pkgutil

import jax
import optax
import pytest
from conftest import ROOT, through_json

import diffusion_jax.core
import diffusion_jax.nets
from diffusion_jax.core import diffusion, ema, levels, losses, samplers, schedules, targets
from diffusion_jax.nets import unet
from diffusion_jax.runtime import command
from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime.config import Config, UserError, build, spec

DIGITS = str(ROOT / 'configs' / 'digits.py')


# spec and build


@pytest.mark.parametrize('module', [schedules, targets, levels, losses, samplers, ema, unet, diffusion])
def test_every_public_function_makes_a_spec_that_json_keeps(module, tmp_path):
  names = getattr(module, '__all__', None) or [
      name for name, value in vars(module).items() if getattr(value, '__module__', '') == module.__name__]
  for name in names:
    made = spec(getattr(module, name))
    assert made.fn == f'{module.__name__}:{name}'
    assert through_json(made, tmp_path).to_dict() == made.to_dict()


def test_build_calls_what_the_spec_names(tmp_path):
  made = through_json(spec(schedules.linear, beta_end=0.01), tmp_path)
  a, b = build(made), schedules.linear(beta_end=0.01)
  t = jax.numpy.linspace(0, 1, 5)
  assert (a.logsnr(t, None) == b.logsnr(t, None)).all() and (a.logsnr(t, None) != build(spec(schedules.linear)).logsnr(
      t, None)).any()
  net = spec(unet.UNet, multipliers=(1, 2), num_classes=10)
  assert build(through_json(net, tmp_path)) == unet.UNet(multipliers=(1, 2), num_classes=10)


def test_every_default_is_written():
  assert spec(unet.UNet, channels=64).to_dict() == {
      'fn': 'diffusion_jax.nets.unet:UNet', 'channels': 64, 'multipliers': (1, 2, 2, 2), 'blocks': 2,
      'attention': (16,), 'dropout': 0.1, 'groups': 32, 'num_classes': 0, 'dtype': 'float32', 'variance': False,
      'image': 0, 'remat': 'none'}


@pytest.mark.parametrize('name', ['adam', 'adamw', 'sgd', 'lion'])
def test_optax_has_its_public_name(name):
  """optax keeps them in private modules, whose names are not promised."""
  made = spec(getattr(optax, name))
  assert made.fn == f'optax:{name}'
  assert isinstance(build(made, learning_rate=0.1), optax.GradientTransformation)


def inner(value: float = 1.0):
  return value


def outer(part, scale: float = 2.0):
  return scale * part


@pytest.fixture
def allowed(monkeypatch):
  """A copy of the list of allowed packages, gone after the test."""
  monkeypatch.setattr(config_lib, 'ALLOWED', [*config_lib.ALLOWED])
  return config_lib.ALLOWED


def test_specs_nest(allowed, tmp_path):
  config_lib.allow(__name__)
  made = through_json(spec(outer, part=spec(outer, part=spec(inner, value=3.0)), scale=5.0), tmp_path)
  assert build(made) == 30.0
  assert made.part.scale == 2.0


def test_every_command_takes_the_flag(allowed):
  command.parser('evaluate', '').parse(['--allow=mylab.nets', '--allow=other'])
  assert {'mylab.nets', 'other'} <= set(config_lib.ALLOWED)


def test_allow_is_by_package(allowed):
  made = spec(inner)
  with pytest.raises(UserError, match=f'allow its package with --allow={__name__}'):
    build(made)
  config_lib.allow(__name__[:-1])  # a name that only begins alike is another package
  with pytest.raises(UserError):
    build(made)
  config_lib.allow(__name__)
  assert build(made) == 1.0


@pytest.mark.parametrize('name', [
    'os:system', 'subprocess:run', 'builtins:eval', 'diffusion_jax:x', 'diffusion_jax.core_:x',
    'diffusion_jax.runtime.config:os', 'diffusion_jax.train:main', 'optaxx:adam', '', ':', 5])
def test_a_config_cannot_call_other_packages(name):
  with pytest.raises(UserError, match=r'may not call .* allow its package with --allow='):
    build({'fn': name})


@pytest.mark.parametrize('name', [
    'diffusion_jax.core.schedules:np', 'diffusion_jax.core.schedules:__loader__', 'diffusion_jax.core.types:Array',
    'diffusion_jax.nets.unet:Sequence', 'diffusion_jax.core.schedules:PATHS', 'diffusion_jax.core.schedules:',
    'diffusion_jax.core.schedules:cosine.__globals__', 'diffusion_jax.core.schedules:cosin', 'optax:__loader__'])
def test_a_config_cannot_call_what_a_module_imports_or_hides(name):
  with pytest.raises(UserError, match=f"has no function {name.partition(':')[2]!r}"):
    build({'fn': name})


def test_a_config_can_call_nothing_but_what_its_packages_define():
  found = 0
  names = ['optax'] + [f'{package.__name__}.{m.name}' for package in (diffusion_jax.core, diffusion_jax.nets)
                       for m in pkgutil.iter_modules(package.__path__)]
  for module in map(importlib.import_module, names):
    for name in vars(module):
      try:
        fn = config_lib._resolve(f'{module.__name__}:{name}')
      except UserError:
        continue
      found += 1
      assert fn.__module__.split('.')[0] in ('diffusion_jax', 'optax') and not name.startswith('_')
  assert found > 100


def test_importing_runs_code_so_a_stranger_cannot_name_the_module(tmp_path, monkeypatch):
  (tmp_path / 'evil_module.py').write_text('raise SystemExit("it ran")')
  monkeypatch.syspath_prepend(tmp_path)
  config = Config({'process': {'fn': 'evil_module:x'}})
  for attempt in (lambda: build(config.process), lambda: config_lib.override(config, {'process': 'cosine'})):
    with pytest.raises(UserError, match='evil_module'):
      attempt()


@pytest.mark.parametrize(('attempt', 'words'), [
    (lambda: spec(schedules.cosine, shift=1.0), "no argument 'shift'"),
    (lambda: spec(unet.UNet, chanels=3), "no argument 'chanels'; did you mean 'channels'"),
    (lambda: spec(unet.UNet, parent=3), "no argument 'parent'"),
    (lambda: spec(unet.UNet, channels=None), 'channels must be a number, string, bool, tuple or spec, got None'),
    (lambda: spec(schedules.linear, beta_end=jax), 'beta_end must be a number'),
    (lambda: spec(optax.nadam), 'stands for a call of a function or a class'),
    (lambda: build(spec(schedules.linear, num_steps=1)), 'schedules:linear: num_steps must be at least 2, got 1'),
    (lambda: build(spec(optax.adam)), 'optax:adam: .*learning_rate'),
    (lambda: build({'fn': 'optax.nothing:x'}), "'optax.nothing' cannot be imported"),
])
def test_bad_specs_are_named(attempt, words):
  with pytest.raises(UserError, match=words):
    attempt()


# Calls as text


@pytest.mark.parametrize(('text', 'arguments'), [
    ('ddim', {}), ('ddim()', {}), (' ddim(eta=0.5) ', {'eta': 0.5}), ('ddim( eta = 1e-1, )', {'eta': 0.1})])
def test_calls_are_read(text, arguments):
  expected = spec(samplers.ddim, **arguments).to_dict()
  for module in (samplers, samplers.__name__):
    assert config_lib.parse_call(text, module).to_dict() == expected


@pytest.mark.parametrize(('text', 'words'), [
    ('dimm', "no 'dimm'; did you mean 'ddim'"), ('', "no ''"), ('jnp', "no 'jnp'"), ('_any', "no '_any'"),
    ('ddim(0.5)', 'by name'), ('ddim(**{})', 'cannot be read|by name'), ('ddim(eta=0.5', 'cannot be read'),
    ('ddim(eta=)', 'cannot be read'), ('ddim(eta=x)', 'cannot be read'), ('ddim(eta=open("x"))', "has no 'open'"),
    ('ddim(eta={[]: 1})', 'cannot be read'), ('ddim(eta=1).x', 'cannot be read'),
    ('ddim(eta=1)(eta=2)', 'cannot be read'),
    ('ddim(eta=1) + 2', 'cannot be read'), ('ddim(eeta=1)', "no argument 'eeta'; did you mean 'eta'")])
def test_bad_calls_are_named(text, words):
  with pytest.raises(UserError, match=words):
    config_lib.parse_call(text, samplers)


def test_a_call_is_of_the_modules_own_functions():
  """nets.unet has no __all__, and imports much."""
  for name in ('jnp', 'jax', 'Any', 'Sequence', 'nn'):
    assert hasattr(unet, name)
    with pytest.raises(UserError, match=f'no {name!r}'):
      config_lib.parse_call(name, unet)


# Files


def test_a_file_with_runs():
  assert config_lib.load(DIGITS).net.num_classes == 10
  assert config_lib.load(f'{DIGITS}:uncond').net.num_classes == 0


def test_a_saved_config_is_the_config(tmp_path):
  config = config_lib.load(DIGITS)
  saved = through_json(config, tmp_path)
  assert saved.to_dict() == config.to_dict()
  assert config_lib.load(str(tmp_path / 'config.json')).to_dict() == config.to_dict()
  assert config_lib.differences(saved, config) == []


@pytest.mark.parametrize(('name', 'content', 'path', 'words'), [
    ('digits.py', '', 'digit.py', r'no config file .*digit.py.; did you mean .*digits.py'),
    ('digits.py', '', 'nowhere/digits.py', 'no config file'),
    ('a.py', 'def get_config(:', 'a.py', r'a.py. cannot be read: SyntaxError'),
    ('a.py', 'x = 1', 'a.py', 'cannot be read: AttributeError: .*get_config'),
    ('a.py', 'import nowhere_at_all', 'a.py', 'cannot be read: ModuleNotFoundError'),
    ('a.py', 'def get_config(): return 3', 'a.py', 'must return a ConfigDict, got int'),
    ('a.py', 'def get_config(): pass', 'a.py', 'must return a ConfigDict, got NoneType'),
    ('a.py', 'def get_config(): pass', 'a.py:run', 'cannot be read: TypeError'),
    ('a.py', 'from diffusion_jax.runtime.config import choose\ndef get_config(run): return choose({"one": 1}, run)',
     'a.py:onne', "no run 'onne' in this config file; did you mean 'one'"),
    ('a.json', '{"a": ', 'a.json', 'a.json is not a config'), ('a.json', '[1]', 'a.json', 'not a config.*list'),
    ('a.json', '{"__class__": 1}', 'a.json', 'not a config'), ('a.json', '{"a.b": 1}', 'a.json', 'not a config')])
def test_bad_files_are_named(tmp_path, name, content, path, words):
  (tmp_path / name).write_text(content)
  with pytest.raises(UserError, match=words):
    config_lib.load(str(tmp_path / path))


def test_a_folder_without_a_run_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  for folder in (tmp_path, tmp_path / 'nowhere', tmp_path / 'file'):
    with pytest.raises(UserError, match=r'is .* a run folder that train has made'):
      config_lib.from_json(folder / 'config.json')


# Overrides


def example():
  return Config({'n': 10, 'x': 0.5, 'flag': False, 'word': 'digits', 'sizes': (16, 8), 'none': (), 'names': ('a',),
                 'group': {'inside': 1, 'call': spec(samplers.ddim)}})


@pytest.mark.parametrize(('key', 'text', 'value'), [
    ('n', '2e5', 200_000), ('n', '-3', -3), ('n', '1_000', 1000), ('n', '0x10', 16), ('x', '3', 3.0),
    ('x', '1e-4', 1e-4),
    ('flag', 'true', True), ('flag', 'False', False), ('flag', '1', True), ('flag', '0', False), ('word', '3', '3'),
    ('word', '', ''), ('word', 'npz:a=b', 'npz:a=b'), ('sizes', '(1, 2, 3)', (1, 2, 3)), ('sizes', '[4]', (4,)),
    ('sizes', '5', (5,)), ('sizes', '6,7', (6, 7)), ('sizes', '()', ()), ('none', '3', (3,)),
    ('names', "('b', 'c')", ('b', 'c')),
    ('group.inside', '7', 7), ('group.call.eta', '1', 1.0)])
def test_overrides_have_the_type_that_is_there(key, text, value):
  config = example()
  config_lib.override(config, {key: text})
  found = config_lib.flatten(config)[key]
  assert found == value and type(found) is type(value)
  config_lib.override(config, {key: text})  # and it still is one that can be overridden
  assert {k for k, v in config_lib.flatten(config).items() if v != config_lib.flatten(example())[k]} <= {key}


def test_a_spec_is_overridden_by_name_or_by_call():
  config = example()
  config_lib.override(config, {'group.call': 'ancestral'})
  assert config.group.call.to_dict() == spec(samplers.ancestral).to_dict()
  config_lib.override(config, {'group.call': 'ddim(eta=0.25)'})
  assert config.group.call.to_dict() == spec(samplers.ddim, eta=0.25).to_dict()


@pytest.mark.parametrize(('key', 'text', 'words'), [
    ('n', '1.5', "config.n must be an int like 10, got '1.5'"), ('n', 'many', "an int like 10, got 'many'"),
    ('n', 'True', 'an int like 10'), ('n', '1e999', 'an int like 10'), ('n', '', 'an int like 10'),
    ('n', '2j', 'an int'), ('n', 'None', 'an int'), ('x', 'nan', "config.x must be a float like 0.5, got 'nan'"),
    ('x', '1e999', 'a float like'),
    ('x', "'3'", 'a float like'), ('x', 'False', 'a float like'), ('x', '(1,)', 'a float like'),
    ('x', '(' * 500, 'a float like'), ('flag', 'maybe', "a bool, true or false like False, got 'maybe'"),
    ('flag', '2', 'a bool'), ('sizes', '(1, 2.5)', r"a tuple like \(16, 8\), got"), ('sizes', 'x', 'a tuple like'),
    ('sizes', 'True', 'a tuple'), ('names', '3', 'a tuple like'), ('m', '3', "no key 'm'"),
    ('group.insid', '3', "no key 'group.insid'; did you mean 'group.inside'"),
    ('inside', '3', "no key 'inside'; did you mean 'group.inside'"), ('n.more', '3', "no key 'n.more'"),
    ('group', '3', 'config.group is a group of settings: there is group'),
    ('group.call', 'dimm', "no 'dimm'; did you mean 'ddim'"), ('group.call', 'ddim(x=1)', "no argument 'x'")])
def test_bad_overrides_are_named_and_change_nothing(key, text, words):
  config = example()
  with pytest.raises(UserError, match=words):
    config_lib.override(config, {key: text})
  assert config.to_dict() == example().to_dict()


def test_differences_name_both_values():
  a, b = example(), example()
  config_lib.override(b, {'n': '11', 'group.call': 'ancestral(variance=1)', 'sizes': '(16,)'})
  del b.group['inside']
  assert config_lib.differences(a, a) == config_lib.differences(b, b) == []
  found = config_lib.differences(a, b)
  assert 'n: 10 -> 11' in found and 'sizes: [16, 8] -> [16]' in found and 'group.inside: 1 -> absent' in found
  assert any(line.startswith('group.call.fn: ') for line in found)
  assert {line.partition(':')[0] for line in found} == {line.partition(':')[0] for line in config_lib.differences(b, a)}
