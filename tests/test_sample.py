"""Laws of sampling: an image depends on (seed, id) alone."""
import io
import json

import jax
import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

from diffusion_jax import generator as generator_lib
from diffusion_jax import model as model_lib
from diffusion_jax import sample
from diffusion_jax.core import schedules
from diffusion_jax.runtime import command, sharding
from diffusion_jax.runtime.config import Config


@pytest.fixture(scope='module')
def model():
  return model_lib.make(tiny_config(), (8, 8, 1), 10)


@pytest.fixture(scope='module')
def params(model):
  """Random everywhere: at initialisation the last layer is zero and every sample would look alike."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  leaves, tree = jax.tree.flatten(shapes)
  rng = np.random.default_rng(0)
  return jax.tree.unflatten(tree, [rng.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves])


def draw(model, params, ids, batch_size, devices=1, guidance=1.0, seed=0, sampler='ancestral', labels=None):
  mesh = sharding.make_mesh(devices, 1)
  config = Config({**model.config.sample, 'batch_size': batch_size, 'guidance': guidance,
                   'sampler': sample.parse_call(sampler, sample.samplers)})
  generator = sample.Generator(model, config, seed, mesh)
  labels = sample.labels_of(ids, 10) if labels is None else labels
  return np.concatenate([generator(jax.device_put(params, sharding.replicated(mesh)), ids[i:i + batch_size],
                                   labels[i:i + batch_size]) for i in range(0, len(ids), batch_size)])


@pytest.fixture(scope='module')
def sixteen(model, params):
  return draw(model, params, range(16), 16)


def test_samples_differ(sixteen):
  assert len(np.unique(sixteen.reshape(16, -1), axis=0)) == 16


@pytest.mark.parametrize(('ids', 'batch_size', 'devices'),
                         [([9], 1, 1), (list(range(16)), 7, 1), (list(range(16)), 16, 8)], ids=str)
def test_a_sample_is_the_same_in_any_batch(model, params, sixteen, ids, batch_size, devices):
  images = draw(model, params, ids, batch_size, devices)
  assert np.abs(images.astype(int) - sixteen[ids].astype(int)).max() <= 1  # rounding of another compiled program


def test_a_sample_is_the_same_to_the_byte_in_a_padded_batch(model, params, sixteen):
  np.testing.assert_array_equal(draw(model, params, [3, 11, 5], 16), sixteen[[3, 11, 5]])


def test_the_seed_and_the_label_matter(model, params, sixteen):
  assert np.any(draw(model, params, range(16), 16, seed=1) != sixteen)
  assert np.any(draw(model, params, range(16), 16, labels=[3] * 16) != sixteen)


def test_guidance_is_off_at_one_and_acts_above(model, params):
  """Towards the class, away from the model without one, or from a negative class; the last call shows it."""
  x, level = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), model.diffusion.process.level(1.0)
  labels = np.arange(4)
  cond, null, seven = (model.denoiser(params, model.cond(params, {'label': label}, *drop)) for label, *drop in (
      (labels,), (labels, np.ones(4, bool)), (np.full(4, 7),)))
  for ref in (null, seven):
    at = lambda scale, clip=False, ref=ref: np.asarray(
        generator_lib.guided(cond, ref, Config({**model.config.sample, 'guidance': scale, 'clip': clip}))(x, level))
    np.testing.assert_allclose(at(1.0), cond(x, level), rtol=1e-5)
    np.testing.assert_allclose(at(0.0), ref(x, level), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(at(3.0) - at(0.0), 3 * (at(1.0) - at(0.0)), rtol=1e-2, atol=1e-2)
    np.testing.assert_array_equal(at(3.0, clip=True), np.clip(at(3.0), -1, 1))


def test_guidance_doubles_the_network_calls(model):
  nfe = [sample.Generator(model, Config({**model.config.sample, 'guidance': scale}), 0, sharding.make_mesh(1, 1)).nfe
         for scale in (1.0, 0.0, 2.0)]
  assert nfe == [4, 8, 8]


@pytest.mark.parametrize(('sampler', 'calls'), [('ddim', 1), ('heun', 2)])
def test_guidance_within_an_interval_is_counted_where_it_acts(model, sampler, calls):
  settings = {**model.config.sample, 'guidance': 2.0, 'steps': 6,
              'sampler': sample.parse_call(sampler, sample.samplers)}
  make = lambda **more: sample.Generator(model, Config(settings | more), 0, sharding.make_mesh(1, 1))
  ratio = np.exp(-0.5 * np.asarray(make().grid.logsnr))
  every = 5 * calls + 1
  assert make().nfe == 2 * every
  assert make(guidance_high=1e9).nfe == 2 * every
  assert make(guidance_low=1e6).nfe == every
  # Above the second level's noise, only the first call is guided; at the last level, the last `calls` are.
  assert make(guidance_low=float(ratio[1]) * 1.01).nfe == every + 1
  assert make(guidance_high=float(ratio[-1]) * 1.01).nfe == every + calls


def test_settings_of_guidance_reach_the_denoiser():
  cond, ref, x = (lambda x, level: x / 2), (lambda x, level: x / 4 + 0.1), np.linspace(-1, 1, 16).reshape(1, 4, 4, 1)
  neutral = dict.fromkeys(('guidance_low', 'guidance_high', 'guidance_rescale', 'threshold'), 0.0)
  level = schedules.vp.level(np.float32(0.0))  # sigma / alpha is 1
  at = lambda **more: np.asarray(
      generator_lib.guided(cond, ref, Config({'guidance': 5.0, 'clip': False} | neutral | more))(x, level))
  plain = 5 * cond(x, None) - 4 * ref(x, None)
  np.testing.assert_allclose(at(), plain, atol=1e-6)
  np.testing.assert_allclose(at(guidance_low=0.5, guidance_high=2.0), plain, atol=1e-6)
  for outside in ({'guidance_high': 0.5}, {'guidance_low': 2.0}):
    np.testing.assert_allclose(at(**outside), cond(x, None), atol=1e-6)
  assert np.std(at(guidance_rescale=1.0)) == pytest.approx(np.std(cond(x, None)), rel=1e-5)
  np.testing.assert_allclose(at(clip=True), np.clip(plain, -1, 1), atol=1e-6)
  np.testing.assert_allclose(at(threshold=1.0), plain / np.abs(plain).max(), atol=1e-6)


def test_an_adaptive_sampler_says_what_it_took(model, params, sixteen):
  """One image per id in any batch, and the mean of the calls that each sample asked for."""
  mesh = sharding.make_mesh(1, 1)
  found = {}
  for size in (4, 3):
    config = Config({**model.config.sample, 'batch_size': size, 'guidance': 1.0,
                     'sampler': sample.parse_call('rk45(rtol=0.01, atol=0.01)', sample.samplers)})
    generator = sample.Generator(model, config, 0, mesh)
    assert generator.nfe == 0
    placed = jax.device_put(params, sharding.replicated(mesh))
    images = [generator(placed, ids, ids) for ids in ([0, 1, 2, 3][i:i + size] for i in range(0, 4, size))]
    found[size] = np.concatenate(images), generator.nfe
  assert np.abs(found[4][0].astype(int) - found[3][0].astype(int)).max() <= 1
  assert found[4][1] == found[3][1] > 6 + 2


def test_labels_cycle():
  assert sample.labels_of([0, 1, 10, 19], 10) == [0, 1, 0, 9]
  assert sample.labels_of([0, 1, 2], 10, [7]) == [7, 7, 7]
  assert sample.labels_of([5], 0) == [0]


def test_tiles_hold_the_images_in_order():
  images = np.random.default_rng(0).integers(0, 256, (5, 40, 30, 3), np.uint8)
  picture = sample.tile(images, 2)
  assert picture.shape == (3 * 41 - 1, 2 * 31 - 1, 3)
  for i, image in enumerate(images):
    row, column = divmod(i, 2)
    np.testing.assert_array_equal(picture[41 * row:41 * row + 40, 31 * column:31 * column + 30], image)


def test_png_is_lossless():
  for channels in (1, 3):
    image = np.random.default_rng(0).integers(0, 256, (6, 5, channels), np.uint8)
    read = np.asarray(Image.open(io.BytesIO(sample.png(image)))).reshape(image.shape)
    np.testing.assert_array_equal(read, image)


def test_the_command_writes_grid_files_and_trajectory(tiny_run, tmp_path, capsys):
  flags = [f'--workdir={tiny_run}', '--ids=3,10-12', '--trajectory', f'--out={tmp_path}/a']
  assert command.run(sample.main, flags) == 0
  assert '4 samples, 4 network calls each' in capsys.readouterr().out
  names = {p.name for p in (tmp_path / 'a').iterdir()}
  assert names == {'grid.png', 'strip.png', 'trajectory.gif', '000003.png', '000010.png', '000011.png', '000012.png'}
  assert Image.open(tmp_path / 'a' / 'trajectory.gif').n_frames == 4

  assert command.run(sample.main, [f'--workdir={tiny_run}', '--num=12', f'--out={tmp_path}/b.npz', '--labels=7']) == 0
  assert command.run(sample.main, [f'--workdir={tiny_run}', '--num=12', f'--out={tmp_path}/c.npz']) == 0
  with np.load(tmp_path / 'b.npz') as sevens, np.load(tmp_path / 'c.npz') as every:
    assert sevens['label'].tolist() == [7] * 12
    assert every['label'].tolist() == [*range(10), 0, 1]
    assert every['image'].shape == (12, 8, 8, 1)
    np.testing.assert_array_equal(every['image'][3, ..., 0], np.asarray(Image.open(tmp_path / 'a' / '000003.png')))


def test_the_raw_parameters_and_an_older_checkpoint_can_be_sampled(tiny_run, tmp_path):
  images = []
  for flags in ([], ['--ema=raw'], ['--step=24'], ['--sampler=heun', '--steps=3'], ['--guidance=2'],
                ['--guidance=2', '--negative=7']):
    assert command.run(sample.main, [f'--workdir={tiny_run}', '--num=4', f'--out={tmp_path}/x.npz', *flags]) == 0
    with np.load(tmp_path / 'x.npz') as file:
      images.append(file['image'])
  assert len({image.tobytes() for image in images}) == 6


@pytest.mark.parametrize(('flags', 'words'), [
    (['--sampler=ddmi'], "no 'ddmi'; did you mean 'ddim'?"),
    (['--sampler=ddim(eta=2)'], 'eta must lie in [0, 1], got 2'),
    (['--sampler=ddim(et=1)'], "no argument 'et'; did you mean 'eta'?"),
    (['--grid=uniform'], "config.sample.grid cannot be 'uniform'"),
    (['--steps=0'], 'config.sample.steps must be at least 1, got 0'),
    (['--steps=1001'], '1001 sampling steps do not fit in a chain of 1000'),
    (['--num=0'], '--num must be at least 1, got 0'),
    (['--ids=3-'], "--ids must be numbers like 3,5,10-12, got '3-'"),
    (['--labels=12'], "'12' is no class: there are 0 to 9"),
    (['--guidance=2', '--guidance_low=3', '--guidance_high=2'], 'must have 0 <= low < high, got 3.0 and 2.0'),
    (['--guidance=2', '--guidance_rescale=2'], 'phi must lie in [0, 1], got 2.0'),
    (['--threshold=99.5'], 'percentile must lie in (0, 1], got 99.5'),
    (['--guidance_low=-1'], 'config.sample.guidance_low must be at least 0, got -1.0'),
    (['--negative=12', '--guidance=2'], "--negative: '12' is no class: there are 0 to 9"),
    (['--negative=1,2', '--guidance=2'], "--negative must be one class, got '1,2'"),
    (['--negative=7'], 'a negative class needs guidance'),
    (['--ema=mian'], "no average 'mian' in this run; did you mean 'main'?"),
    (['--step=7'], 'no checkpoint at step 7: there is 24, 32'),
    (['--guidence=2'], "no flag '--guidence=2'; did you mean '--guidance'?"),
    (['--guidance=abc'], "invalid float value: 'abc'"),
    (['--config.seed=1'], '--config.seed is for train'),
])
def test_bad_flags_get_one_sentence(tiny_run, capsys, flags, words):
  assert command.run(sample.main, [f'--workdir={tiny_run}', *flags]) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ')
  assert error.count('\n') == 1
  assert words in error


def test_a_folder_that_is_no_run_is_named(tmp_path, capsys):
  assert command.run(sample.main, [f'--workdir={tmp_path}']) == 2
  assert 'is a run folder' in capsys.readouterr().err.replace(f"{str(tmp_path)!r} ", '')
  (tmp_path / 'config.json').write_text(json.dumps({'seed': 0}))
  assert command.run(sample.main, [f'--workdir={tmp_path}']) == 2
  assert "config lacks '" in capsys.readouterr().err
