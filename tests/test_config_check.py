"""What is wrong with a whole config, and every mistake of a command line: one sentence, status 2, nothing written."""
import json
import signal

import jax
import pytest
from conftest import ROOT, through_json

from diffusion_jax import model as model_lib
from diffusion_jax import settings, train
from diffusion_jax.core import ema
from diffusion_jax.runtime import command
from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime.config import Config, UserError, spec

DIGITS = str(ROOT / 'configs' / 'digits.py')


# The whole config


def test_the_default_config_passes_its_check_and_is_json(tmp_path):
  config = model_lib.default_config()
  model_lib.check(config)
  model_lib.check(through_json(config, tmp_path))


@pytest.mark.parametrize('low', settings.AT_LEAST)
def test_every_bound_is_kept(low):
  for key in settings.AT_LEAST[low]:
    config = model_lib.default_config()
    config_lib.override(config, {key: str(low)})
    model_lib.check(config)
    config_lib.override(config, {key: str(low - 1)})
    with pytest.raises(UserError, match=f'config.{key} must be at least {low}, got {low - 1}'):
      model_lib.check(config)


GROUPS = ('seed', 'data', 'label_dropout', 'learning_rate', 'clip_norm', 'train', 'mesh', 'eval')
SETTINGS = [key for key in config_lib.flatten(model_lib.default_config()) if key.split('.')[0] in GROUPS]


@pytest.mark.parametrize('key', SETTINGS)
def test_check_sees_missing_and_unknown_keys(key):
  group, _, last = key.rpartition('.')
  config = model_lib.default_config()
  node = config[group] if group else config
  with config.unlocked():
    node[f'{last}s_'] = node[last]
    with pytest.raises(UserError, match=f"config has no key '{key}s_'; did you mean"):
      model_lib.check(config)
    del node[f'{last}s_'], node[last]
  with pytest.raises(UserError, match=f"config lacks '{key}'"):
    model_lib.check(config)


def test_check_wants_specs_and_an_average():
  for key in ('process', 'sample.sampler', 'ema.main'):
    config = model_lib.default_config()
    *groups, last = key.split('.')
    node = config[groups[0]] if groups else config
    with config.unlocked():
      del node[last]['fn']
    with pytest.raises(UserError, match='must be made with spec'):
      model_lib.check(config)
  for averages, words in (({}, 'ema'), ({'raw': spec(ema.constant)}, "'raw' stands for no average")):
    config = model_lib.default_config()
    with config.unlocked():
      config.ema = Config(averages)
    with pytest.raises(UserError, match=words):
      model_lib.check(config)


# The whole command


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
  """refused(flags) -> the one sentence with which `train` refuses them; it leaves nothing behind."""
  jax.devices()  # before the command can choose how many
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'cache'))  # or `run` sets one for the whole process
  monkeypatch.setattr(config_lib, 'ALLOWED', [*config_lib.ALLOWED])
  handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

  def run(*flags, workdir=True):
    workdirs = [f'--workdir={tmp_path / "run"}'] if workdir else []
    assert command.run(train.main, [*workdirs, *flags]) == 2
    said = capsys.readouterr()
    assert said.err.startswith('error: ') and said.err.count('\n') == 1 and said.err.endswith('\n')
    assert not said.out and 'Traceback' not in said.err
    assert not (tmp_path / 'run').exists()
    return said.err
  yield run
  for number, handler in handlers.items():
    signal.signal(number, handler)


@pytest.mark.parametrize(('flags', 'words'), [
    (['--config.train.batch_sise=3'], "no key 'train.batch_sise'; did you mean 'train.batch_size'"),
    (['--config.train.batch_size=many'], "config.train.batch_size must be an int like 64, got 'many'"),
    (['--config.train.batch_size', '0'], 'config.train.batch_size must be at least 1, got 0'),
    (['--config.label_dropout=1.5'], 'config.label_dropout must lie in [0, 1], got 1.5'),
    (['--config.train.accumulate=3'], 'batch size 64, accumulate 3'),
    (['--config.seed'], '--config.seed needs a value'),
    (['--config.process=cosin'], "no 'cosin'; did you mean 'cosine'"),
    (['--config.process.fn=os:system'], "may not call functions of 'os'"),
    (['--config.process.s=-1'], 'schedules:cosine'),
    (['--config.data.source=digit'], "no data source 'digit'"),
    (['--config.data.source=npz:/nowhere'], '/nowhere'),
    (['--config.learning_rate.peak=-1'], 'learning_rate.peak must be at least 0, got -1.0'),
    (['--config.learning_rate.decay=linear'], "got 'linear'"),
    (['--config.clip_norm=-1'], 'clip_norm must be at least 0 (0 turns clipping off), got -1.0'),
    (['--config.mesh.data=64'], 'data=64, fsdp=1 does not fit on 8 devices'),
    (['--config.net.num_classes=7'], 'config.net.num_classes is 7, but the data has 10 classes'),
    (['--config.net.multipliers=(1,1,1,1,1)'], '5 levels need sizes divisible by 16, got (8, 8)'),
    (['--config.net.groups=5'], 'widths [16, 32], groups 5'),
    (['--config.net.dropout=1.0'], 'dropout must lie in [0, 1), got 1.0'),
    (['--work_dir=x'], "no flag '--work_dir=x'; did you mean '--workdir'"),
    (['more'], "no flag 'more'")])
def test_a_mistake_is_one_sentence_and_no_folder(refused, flags, words):
  assert words in refused(f'--config={DIGITS}', *flags)


def test_a_missing_flag_or_file_is_named(refused):
  assert 'give --workdir=FOLDER' in refused(f'--config={DIGITS}', workdir=False)
  assert '--config' in refused()
  assert f"no config file {DIGITS[:-4]!r}" in refused(f'--config={DIGITS[:-4]}')
  assert "no run 'uncnd'" in refused(f'--config={DIGITS}:uncnd')


@pytest.mark.parametrize('place', ['process', 'target', 'noise', 'net', 'optimizer', 'draw', 'weight'])
def test_a_strangers_config_is_refused(refused, tmp_path, place):
  strange = json.loads(config_lib.to_json(config_lib.load(DIGITS)))
  strange[place] = {'fn': 'os:system', 'command': 'true'}
  (tmp_path / 'config.json').write_text(json.dumps(strange))
  assert "may not call functions of 'os'" in refused(f'--config={tmp_path / "config.json"}')
