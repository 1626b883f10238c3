"""Laws of the likelihood command: closed forms, what the core gives example by example, and its records."""
import json
import math
import shutil

import jax
import jax.numpy as jnp
import nets
import numpy as np
import pytest
from conftest import tiny_config

from diffusion_jax import likelihood as command_lib
from diffusion_jax import model as model_lib
from diffusion_jax.core import guidance, levels, likelihood, losses, schedules, targets
from diffusion_jax.data import sources
from diffusion_jax.runtime import command, log
from diffusion_jax.runtime.checkpoint import Checkpoints
from diffusion_jax.runtime.config import spec, to_json
from diffusion_jax.trained import restore

RECORD = {'metric', 'value', 'ci', 'ci_level', 'unit', 'bound', 'evaluation', 'run', 'step', 'images', 'ema', 'seed',
          'batch_size', 'nfe', 'num_samples', 'split', 'reference', 'reference_hash', 'reference_samples', 'time',
          'seconds', 'device', 'versions', 'git_revision'}

SOURCE = 'synthetic:6x4x1:24'


def run(workdir, *flags):
  """The records that the command adds, by estimator."""
  before = len(log.read_lines(workdir / 'eval.jsonl'))
  assert command.run(command_lib.main, [f'--workdir={workdir}', *flags]) == 0
  return {r['estimator']: r for r in log.read_lines(workdir / 'eval.jsonl')[before:]}


def arrays(workdir, record):
  with np.load(workdir / 'likelihood' / f"{record['evaluation']}.npz", allow_pickle=False) as file:
    return dict(file)


@pytest.fixture
def own_run(tiny_run, tmp_path):
  """A copy of the tiny run, to be changed."""
  return shutil.copytree(tiny_run, tmp_path / 'run', ignore=shutil.ignore_patterns('eval*', 'likelihood', 'samples'))


def nought_run(workdir, process):
  """A run, before its first step, whose net gives zero as its x0 estimate, of grayscale images that are not square."""
  config = tiny_config(data__source=SOURCE, sample__clip='false', sample__batch_size=16)
  config.process, config.target, config.weight = process, spec(targets.x0), spec(losses.vlb)
  config.net = spec(nets.Small)
  model = model_lib.make(config, (6, 4, 1), 0)
  log.write(workdir / 'config.json', to_json(config))
  log.write_json(workdir / 'data.json', {'shape': (6, 4, 1), 'num_classes': 0, 'class_names': []})
  checkpoints = Checkpoints(workdir, writer=True)
  state = nets.jit(lambda key: model_lib.initial_state(model, model_lib.optimizer_of(config), key))(jax.random.key(0))
  checkpoints.save(state, {'step': 0, 'images': 0})
  checkpoints.close()
  return workdir


def squares():
  return np.mean((images(SOURCE) / 127.5 - 1) ** 2, axis=(1, 2, 3))


def images(source):
  return sources.arrays(sources.load(source, 'test'))[0]


def test_a_chain_that_estimates_zero_has_closed_forms(tmp_path):
  """Each step costs half the SNR gained times x0^2, and the sum telescopes; the decoder's mean is zero."""
  workdir = nought_run(tmp_path / 'run', spec(schedules.linear, num_steps=20, beta_end=0.5, beta_start=0.2))
  record = run(workdir, '--estimator=discrete_vlb')['discrete_vlb']
  found, mean = arrays(workdir, record), squares()
  snr = np.exp(schedules.evaluate(schedules.linear(20, 0.2, 0.5), np.linspace(1, 0, 20)))
  x0 = images(SOURCE) / 127.5 - 1
  small = (snr[-1] - snr[-2]) / snr[-1] / (1 + snr[-1])
  decoder = np.asarray([decoder_bits(x, small) for x in x0])
  prior = 0.5 * (snr[0] / (1 + snr[0]) * (mean - 1) + np.log1p(snr[0])) / math.log(2)
  expected = prior + 0.5 * (snr[-1] - snr[0]) * mean / math.log(2) + decoder
  np.testing.assert_array_equal(found['example'], np.arange(24))
  np.testing.assert_allclose(found['bits'], expected, rtol=1e-4)
  assert record['value'] == pytest.approx(expected.mean(), rel=1e-4)
  np.testing.assert_allclose(found['level_bits'][:-1], 0.5 * np.diff(snr) * mean.mean() / math.log(2), rtol=1e-3)
  np.testing.assert_allclose(found['level_mse'], mean.mean(), rtol=1e-4)
  error = 0.5 * np.diff(snr) * mean.std(ddof=1) / math.sqrt(24) / math.log(2)
  np.testing.assert_allclose(found['level_bits_error'][:-1], error, rtol=1e-2)
  np.testing.assert_allclose(found['rmse'], 127.5 * np.sqrt(mean.mean()), rtol=1e-4)
  np.testing.assert_allclose(found['rate'][-1] + decoder.mean(), expected.mean(), rtol=1e-4)
  written = json.loads((workdir / 'likelihood' / f"{record['evaluation']}.json").read_text())
  np.testing.assert_allclose(written['rate'], found['rate'])


def decoder_bits(x0, variance):
  """-log2 P(x0) per element under a normal of mean zero, by its own sums."""
  normal = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)))
  low = np.where(x0 < -0.999, -np.inf, (x0 - 1 / 255) / math.sqrt(variance))
  high = np.where(x0 > 0.999, np.inf, (x0 + 1 / 255) / math.sqrt(variance))
  flip = low > 0
  mass = normal(np.where(flip, -low, high)) - normal(np.where(flip, -high, low))
  return -np.log2(mass).mean()


def test_a_learned_schedule_in_continuous_time_has_closed_forms(tmp_path, capsys):
  """With zero for an estimate the ODE only scales x, and the diffusion term is half the SNR gained times x0^2."""
  workdir = nought_run(tmp_path / 'run', spec(schedules.learned, logsnr_min=-4.0, logsnr_max=2.0, hidden=4))
  records = run(workdir, '--steps=80', '--probes=0', '--times=40', '--seed=3')
  assert set(records) == {'continuous_vlb', 'ode'}
  assert 'left out: discrete_vlb' in capsys.readouterr().out
  low, high = math.exp(-4), math.exp(2)

  found, mean = arrays(workdir, records['continuous_vlb']), squares()
  np.testing.assert_allclose(found['diffusion'], 0.5 * (high - low) * mean / math.log(2), rtol=0.1)
  assert found['diffusion'].mean() == pytest.approx(0.5 * (high - low) * mean.mean() / math.log(2), rel=0.02)
  prior = 0.5 * (low / (1 + low) * (mean - 1) + math.log1p(low)) / math.log(2)
  np.testing.assert_allclose(found['prior'], prior, rtol=1e-4)
  np.testing.assert_allclose(found['bits'], found['prior'] + found['reconstruction'] + found['diffusion'], rtol=1e-5)
  assert records['continuous_vlb']['parts'].keys() == {'prior', 'reconstruction', 'diffusion'}

  # The density at u is that of a normal of sigma / alpha at the last level over sigma at the first.
  variance = 1 / high / (1 / (1 + low))
  byte = images(SOURCE).astype(np.float64)
  square = np.mean(((byte + 0.5) / 128 - 1) ** 2, axis=(1, 2, 3)) + 1 / (12 * 128 ** 2)
  expected = 0.5 * (square / variance + math.log(2 * math.pi * variance)) / math.log(2) + 7
  found = arrays(workdir, records['ode'])
  np.testing.assert_allclose(found['bits'], expected, atol=0.03)  # of the uniform noise, and of Heun's method
  assert records['ode']['value'] == pytest.approx(expected.mean(), abs=0.01)
  assert command.run(command_lib.main, [f'--workdir={workdir}', '--estimator=discrete_vlb']) == 2
  assert 'continuous time' in capsys.readouterr().err


def test_values_are_the_cores_on_the_same_keys(own_run):
  """Of a trained net with labels: an example's value is a function of the seed, its index and its label."""
  records = run(own_run, '--num=10', '--steps=8', '--times=3', '--seed=5')
  assert [r['metric'] for r in records.values()] == [f'bits_per_dim_{name}_10' for name in command_lib.ESTIMATORS]
  trained = restore(own_run, '', None, lambda config: None)
  model, process = trained.model, trained.model.diffusion.process
  labels = sources.arrays(sources.load('digits', 'test'))[1]
  chosen = arrays(own_run, records['ode'])['example']
  assert len(set(chosen)) == 10 and chosen.max() > 100  # spread over the split
  x0, labels = jnp.asarray(images('digits')[chosen] / 127.5 - 1, jnp.float32), jnp.asarray(labels[chosen])
  keys = jax.vmap(lambda i: jax.random.fold_in(model_lib.key(5, 'likelihood'), i))(chosen)
  clipped = lambda labels: guidance.clip(model.denoiser(trained.params, {'label': labels}))  # as the run's samples are

  got = {name: arrays(own_run, record) for name, record in records.items()}
  chain, grid = (of(process, 8) for of in (levels.timesteps(), levels.uniform_logsnr()))
  expected = nets.jit(lambda: likelihood.discrete_vlb(clipped(labels), chain, x0, keys))()
  np.testing.assert_allclose(got['discrete_vlb']['bits'], expected.bits, rtol=1e-4)
  np.testing.assert_allclose(got['discrete_vlb']['level_bits'], expected.steps.mean(1), rtol=1e-3)
  np.testing.assert_allclose(got['discrete_vlb']['decoder'], expected.steps[-1], rtol=1e-4)
  one = nets.jit(lambda i: likelihood.continuous_vlb(clipped(labels[i][None]), process, x0[i][None], keys[i], times=3))
  for i in (0, 9):
    np.testing.assert_allclose(got['continuous_vlb']['bits'][i], one(i).bits[0], rtol=1e-4)
  expected = nets.jit(lambda: likelihood.ode_bits(clipped(labels), grid, x0, keys))()
  np.testing.assert_allclose(got['ode']['bits'], expected, rtol=1e-4)
  for name, record in records.items():
    bits = np.float64(got[name]['bits'])
    assert set(record) >= RECORD
    assert record['value'] == pytest.approx(bits.mean(), rel=1e-12)
    low, high = record['ci']
    assert (low + high) / 2 == pytest.approx(record['value'])
    assert high - low == pytest.approx(2 * 1.959964 * bits.std(ddof=1) / math.sqrt(10), rel=1e-6)
    assert (record['num_samples'], record['reference_samples'], record['reference']) == (10, 500, 'digits/test')
    assert record['bound'] == ('estimate' if name == 'ode' else 'upper bound')


def test_a_killed_job_continues_and_a_finished_one_is_found(own_run, capsys):
  flags = '--estimator=discrete_vlb', '--num=20', '--subset=4'
  first = run(own_run, *flags)['discrete_vlb']
  folder = own_run / 'likelihood' / first['evaluation']
  files = sorted(folder.glob('*.npz'))
  assert [p.name for p in files] == ['000000-000007.npz', '000008-000015.npz', '000016-000019.npz']
  kept, whole = [p.read_bytes() for p in files], arrays(own_run, first)
  assert np.isnan(whole['level_bits'][whole['level_count'] == 0]).all() and 'rate' not in whole
  assert whole['level_count'].sum() == 20 * 4 and whole['level_count'][-1] == 20

  stamps = [p.stat().st_mtime_ns for p in files]
  assert run(own_run, *flags) == {}  # no line is added
  assert f"{first['value']:.4f}" in capsys.readouterr().out
  assert [p.stat().st_mtime_ns for p in files] == stamps

  (own_run / 'eval.jsonl').unlink()
  files[0].unlink()
  files[2].write_bytes(kept[2][:50])
  again = run(own_run, *flags)['discrete_vlb']
  assert again['value'] == first['value'] and again['ci'] == first['ci']
  assert files[1].stat().st_mtime_ns == stamps[1]
  for path, data in zip(files, kept, strict=True):
    assert path.read_bytes() == data

  other = run(own_run, *flags, '--batch_size=16')['discrete_vlb']
  np.testing.assert_allclose(arrays(own_run, other)['bits'], whole['bits'], rtol=1e-4)
  assert run(own_run, *flags, '--seed=1')['discrete_vlb']['value'] != first['value']


@pytest.mark.parametrize(('flags', 'words'), [
    (['--estimator=odd'], "there is no estimator 'odd'; did you mean 'ode'?"),
    (['--split=val'], "digits has no split 'val'"),
    (['--num=501'], 'has 500 examples, and 501 are needed'),
    (['--num=1'], '--num must be at least 2, got 1'),
    (['--times=0'], '--times must be at least 1, got 0'),
    (['--num=8', '--batch_size=12'], 'batch_size 12 must be a multiple of the 8 devices'),
    (['--estimator=discrete_vlb', '--subset=1'], 'subset must be 0 or lie in 2..1000, got 1'),
    (['--estimator=discrete_vlb', '--steps=1001'], '1001 sampling steps do not fit in a chain of 1000'),
    (['--estimator=ode', '--steps=1'], 'the ODE needs a grid of at least 2 levels, got 1'),
    (['--config.seed=1'], 'takes its config from the run folder'),
    (['--ema=man'], "did you mean 'main'"),
])
def test_bad_input_is_one_sentence(tiny_run, flags, words, capsys):
  assert command.run(command_lib.main, [f'--workdir={tiny_run}', *flags]) == 2
  error = capsys.readouterr().err
  assert words in error and error.count('\n') == 1
  assert not (tiny_run / 'likelihood').exists()
