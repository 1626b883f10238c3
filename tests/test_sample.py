"""Laws of sampling: an image depends on (seed, id) alone."""
import io
import json

import jax
import numpy as np
import pytest
from conftest import tiny_config
from PIL import Image

from diffusion_jax import model as model_lib
from diffusion_jax import sample
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
  """At scale s the x0 estimate is linear in s, so the first of a one-step grid shows it."""
  process = model.diffusion.process
  x, level = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), process.level(1.0)
  with model.config.unlocked():
    model.config.sample.clip = False
  labels = np.arange(4)
  estimate = {s: np.asarray(model.sampling_denoiser(params, labels, s)(x, level)) for s in (0.0, 1.0, 3.0)}
  with model.config.unlocked():
    model.config.sample.clip = True
  null = model.denoiser(params, {'label': labels, 'drop': np.ones(4, bool)})(x, level)
  np.testing.assert_allclose(estimate[0.0], null, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(estimate[3.0] - estimate[0.0], 3 * (estimate[1.0] - estimate[0.0]), rtol=1e-2, atol=1e-2)


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
  for flags in ([], ['--ema=raw'], ['--step=24'], ['--sampler=heun', '--steps=3'], ['--guidance=2']):
    assert command.run(sample.main, [f'--workdir={tiny_run}', '--num=4', f'--out={tmp_path}/x.npz', *flags]) == 0
    with np.load(tmp_path / 'x.npz') as file:
      images.append(file['image'])
  assert len({image.tobytes() for image in images}) == 5


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
