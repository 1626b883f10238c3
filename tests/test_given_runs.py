"""Runs whose models are given something of an image, from config to picture and score; and a ControlNet's."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from nets import Small, filled, jit, normal
from PIL import Image

from diffusion_jax import bridge, drawn, evaluate, likelihood, sample, start, train, trained
from diffusion_jax import model as model_lib
from diffusion_jax.core import givens
from diffusion_jax.data import sources
from diffusion_jax.metrics import scores
from diffusion_jax.runtime import command, log, sharding
from diffusion_jax.runtime.config import UserError, spec, to_json
from diffusion_jax.step import Metrics, initialise, make_step

SHORT = {'train__images': 64, 'train__batch_size': 16, 'train__sample_every': 64, 'train__checkpoint_every': 64,
         'sample__steps': 2, 'learning_rate__peak': 0.1, 'learning_rate__warmup_images': 1}


def config(unet=False, net=None, **parts):
  """The tiny config, of 64 images, with specs and values in the place of parts."""
  made = tiny_config(unet, **SHORT)
  with made.unlocked():
    made.update({'net': net or made.net, **parts})
  return made


def write_run(folder, made, params=None, shape=(8, 8, 1)):
  """The folder of a run that was never trained, of a network that is not at its initialisation."""
  model = model_lib.make(made, shape, 10)
  folder.mkdir()
  bridge.save(folder, params or filled(jax.eval_shape(model.init, jax.random.key(0))))
  log.write_json(folder / 'data.json', {'shape': shape, 'num_classes': 10, 'class_names': list('0123456789')})
  log.write(folder / 'config.json', to_json(made))
  return folder


def draw(workdir, out, *flags):
  """The images of `diffusion-jax sample`."""
  words = [f'--workdir={workdir}', '--num=8', '--batch_size=8', f'--out={out / "drawn.npz"}', *flags]
  assert command.run(sample.main, words) == 0
  return np.load(out / 'drawn.npz')['image'].astype(int)


def picture(folder, name, array):
  Image.fromarray(np.asarray(array, np.uint8)).save(folder / f'{name}.png')
  return folder / f'{name}.png'


@pytest.fixture(scope='module')
def filling(tmp_path_factory):
  """A run of inpainting, of digits and their classes."""
  made = config(net=spec(Small, image=2, num_classes=10), given=spec(givens.masked))
  return write_run(tmp_path_factory.mktemp('filling') / 'run', made)


def test_known_pixels_are_what_is_seen(filling, tmp_path, capsys):
  """Those of the picture alone, where the mask is white."""
  known, digit = np.zeros((8, 8)), np.full((8, 8), 30)
  known[:, :4] = 255
  mask = f'--mask={picture(tmp_path, "mask", known)}'
  def filled_in(row, column, value):
    changed = digit.copy()
    changed[row, column] = value
    return draw(filling, tmp_path, f'--image={picture(tmp_path, "image", changed)}', mask)
  plain, seen, unseen = filled_in(2, 2, 30), filled_in(2, 2, 250), filled_in(2, 6, 250)
  assert (plain != seen).any()
  np.testing.assert_array_equal(plain, unseen)
  image, other = (f'--image={picture(tmp_path, f"digit{n}", np.full((n, n), 30))}' for n in (8, 9))
  larger = f'--mask={picture(tmp_path, "mask9", np.zeros((9, 9)))}'
  for more, words in [([image], '--mask is needed'), ([mask], '--image is needed'),
                      ([image, larger], 'a mask must have the sizes of its image'),
                      ([other, larger], 'it makes (9, 9) of the picture, and the model draws (8, 8)')]:
    assert command.run(sample.main, [f'--workdir={filling}', '--num=8', '--batch_size=8', *more]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count('\n') == 1


def test_a_colouring_model_sees_the_luma_alone(tmp_path):
  made = config(net=spec(Small, image=1), given=spec(givens.grey))
  write_run(tmp_path / 'run', made, shape=(8, 8, 3))
  drawn_of = lambda colour: draw(tmp_path / 'run', tmp_path, '--image=' + str(
      picture(tmp_path, 'image', np.broadcast_to(colour, (8, 8, 3)))))
  plain = drawn_of((100, 100, 100))
  np.testing.assert_allclose(drawn_of((111, 101, 66)), plain, atol=1)  # 0.299 111 + 0.587 101 + 0.114 66 = 100
  assert abs(drawn_of((190, 190, 190)) - plain).max() > 1


# Scores


def test_samples_are_asked_to_be_the_rest_of_the_held_out_images(filling):
  found = trained.restore(filling, '', None, lambda config: None)
  source = sources.load('digits', 'test')
  asked = drawn.Asked(found.model, source)
  labels, given = asked([3, len(source) + 3, 5])
  assert list(labels) == [source[i][1] for i in (3, 3, 5)]
  known, seen = given[..., :1], given[..., 1:]
  for i, one, where in zip((3, 3, 5), seen, known, strict=True):
    np.testing.assert_allclose(one, np.where(where, source[i][0] / 127.5 - 1, 0), atol=1e-6)
  assert (known[0] != known[1]).any()  # two samples of an image have masks of their own
  np.testing.assert_array_equal(asked([5])[1], given[2:])  # whatever else is drawn


def test_what_is_given_is_scored_against_what_it_was_given_of(filling, capsys):
  flags = [f'--workdir={filling}', f'--ema={filling}/weights.safetensors', '--num=24']
  assert command.run(evaluate.main, flags) == 0
  records = {record['metric']: record for record in log.read_lines(filling / 'eval.jsonl')}
  assert {'psnr_24', 'fd_digits_24', 'accuracy_digits_24', 'latency_seconds'} <= set(records)
  assert {record['given'] for record in records.values()} == {'masked of digits/test'}
  images = np.concatenate([np.load(path)['image'] for path in sorted((filling / 'eval').glob('*/0*.npz'))])
  source = sources.load('digits', 'test')
  errors = [np.mean((image / 1.0 - source[i][0]) ** 2) for i, image in enumerate(images)]
  values = [10 * np.log10(255 ** 2 / error) for error in errors]
  assert records['psnr_24']['value'] == pytest.approx(np.mean(values), rel=1e-9)
  high = np.mean(values) + 2.0686576 * np.std(values, ddof=1) / np.sqrt(24)  # Student's t, 23 degrees
  assert records['psnr_24']['ci'][1] == pytest.approx(high, rel=1e-6)
  known = len(log.read_lines(filling / 'eval.jsonl'))
  assert command.run(evaluate.main, flags) == 0 and len(log.read_lines(filling / 'eval.jsonl')) == known
  assert command.run(likelihood.main, [f'--workdir={filling}']) == 2
  assert 'bits per dimension are of whole images' in capsys.readouterr().err


def test_psnr_is_the_closed_form():
  truth = np.random.default_rng(0).integers(60, 190, (5, 4, 4, 3)).astype(np.uint8)
  found = scores.psnr([(truth[:2] + np.uint8(50), truth[:2]), (truth[2:] - np.uint8(50), truth[2:])])
  assert (found.metric, found.value) == ('psnr_5', pytest.approx(20 * np.log10(255 / 50)))
  assert found.ci == pytest.approx((found.value, found.value))
  rounding = 20 * np.log10(255) + 10 * np.log10(12)
  assert scores.psnr([(truth, truth)]).value == pytest.approx(rounding)  # and not infinity


# What is trained beside a network


def steered(start='', **parts):
  return config(unet=True, control=True, start=str(start), given=spec(givens.edges), **parts)


def test_before_the_first_step_a_steered_model_is_its_base_bit_for_bit(tmp_path):
  """Its ControlNet alone is trained, from a copy of the encoder."""
  plain = model_lib.make(config(unet=True), (8, 8, 1), 10)
  below = filled(jax.eval_shape(plain.init, jax.random.key(0)))
  made = steered(write_run(tmp_path / 'base', plain.config, below))
  model, optimizer = model_lib.make(made, (8, 8, 1), 10), model_lib.optimizer_of(made)
  abstract = model_lib.abstract_state(model, sharding.make_mesh(1, 1))
  state = start.place(initialise(model, optimizer, abstract), start.load(model, abstract))
  x, labels, image = normal(4, 8, 8, 1), np.arange(4), np.tanh(normal(4, 8, 8, 1, seed=2))

  def denoiser(model):
    level = model.diffusion.process.level(jnp.linspace(0.1, 0.9, 4), {})
    return jit(lambda params, about: model.denoiser(params, model.cond(params, about))(x, level))
  seen, expected = denoiser(model), denoiser(plain)(below, {'label': labels})
  for control in (state.params, state.emas['main']):
    whole = model.whole(control, state.frozen)
    np.testing.assert_array_equal(seen(whole, {'label': labels, 'image': image}), expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(control['control']['encoder']):
      np.testing.assert_array_equal(leaf, functools.reduce(lambda tree, key: tree[key.key], path, below['net']))
  moved = {**whole, 'control': filled(whole['control'])}
  assert np.any(seen(moved, {'label': labels, 'image': image}) != seen(moved, {'label': labels, 'image': -image}))

  batch = np.zeros((1, 16, 8, 8, 1), np.uint8), np.zeros((1, 16), np.int32)
  step = make_step(model, optimizer)
  after, _ = jax.eval_shape(lambda *a: step(*a[:3], None, a[3]), jax.random.key(1), state, Metrics.empty(), batch)
  assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
  assert set(state.params) == {'control', 'process'} and set(state.frozen) == {'net'}


@pytest.mark.parametrize(('parts', 'words'), [
    ({'given': spec(givens.none)}, 'config.control needs to know what of an image steers'),
    ({}, 'a ControlNet is trained beside a network that has been'),
    ({'net': spec(Small)}, 'config.control: a ControlNet is a copy of the encoder of UNet'),
    ({'start': 'tiny'}, 'config.net is another network than the one that it is to start from')])
def test_what_cannot_be_steered_is_told(tiny_run, parts, words, tmp_path):
  made = steered(tiny_run if 'start' in parts else '')
  with made.unlocked():
    for name, part in parts.items():
      made[name] = part if name != 'start' else made.start
  with pytest.raises(UserError, match=words):
    train.train(made, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_one_thing_is_trained_beside_a_network():
  made = steered()
  made.lora.rank = 2
  with pytest.raises(UserError, match='choose one'):
    model_lib.check(made)
