"""Pipelines of diffusers as run folders, and back: nothing is lost, the images are the same, and what cannot be
converted is refused in one sentence and leaves nothing behind.

What compares with diffusers needs the extra `parity`; without it these tests are skipped.
"""
import functools
import json
import shutil

import jax
import numpy as np
import pipelines
import pytest
from conftest import tiny_config
from nets import filled
from PIL import Image

from diffusion_jax import bridge, cli, model, train
from diffusion_jax import trained as trained_lib
from diffusion_jax.convert import __main__ as convert
from diffusion_jax.convert import controlnet, files, unet_condition
from diffusion_jax.core import givens, levels, samplers, schedules
from diffusion_jax.generator import Generator
from diffusion_jax.nets.controlnet import ControlNet
from diffusion_jax.nets.text_unet import TextUNet
from diffusion_jax.runtime import command
from diffusion_jax.runtime import config as config_lib
from diffusion_jax.runtime.config import spec

WHY = '{} missing: install the parity extra'
STEPS = 4


def run(*words):
  """The status of `diffusion-jax convert ...`."""
  return command.run(convert.main, [str(word) for word in words])


def draw(workdir, *more, num=8):
  """The images of `diffusion-jax sample`, float in [0, 1], channels last."""
  from diffusion_jax import sample
  out = workdir / 'drawn'
  flags = [f'--workdir={workdir}', f'--num={num}', f'--steps={STEPS}', '--batch_size=8', f'--out={out}', *more]
  assert command.run(sample.main, flags) == 0
  return np.stack([np.asarray(Image.open(out / f'{i:06d}.png'), np.float32) / 255 for i in range(num)])


KEYS = jax.vmap(lambda i: jax.random.fold_in(model.key(0, 'sample'), i))(np.arange(8))  # of the samples of seed 0


def start_of(workdir):
  """Where the samples of a run begin, channels first."""
  config = config_lib.from_json(workdir / 'config.json')
  found = trained_lib.restore(workdir, '', None, lambda config: None).model
  level = config_lib.build(config.sample.grid)(found.diffusion.process, STEPS, None)
  return np.moveaxis(np.asarray(samplers.prior(KEYS, found.shape, jax.tree.map(lambda a: a[0], level))), -1, 1).copy()


@pytest.fixture(scope='module')
def text_folder(tmp_path_factory):
  return pipelines.text_to_image(tmp_path_factory.mktemp('theirs') / 'text')


@pytest.fixture(scope='module')
def text_run(text_folder, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('ours') / 'text'
  assert run('from-diffusers', text_folder, '--workdir', workdir) == 0
  return workdir


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A tiny DDPM of digits, trained for a few steps and sampled by its own chain."""
  config = tiny_config(unet=True, net__num_classes=0, train__images=64, train__batch_size=16, train__sample_every=64,
                       train__checkpoint_every=64, label_dropout=0)
  with config.unlocked():
    config.process, config.sample.sampler = spec(schedules.linear), spec(samplers.ancestral)
    config.sample.grid = spec(levels.trailing)
  config.sample.steps = STEPS
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  assert train.train(config, workdir) == 0
  return workdir


# There and back


def test_a_text_pipeline_comes_back_to_the_bit(text_folder, text_run, tmp_path):
  assert run('to-diffusers', text_run, tmp_path / 'back') == 0
  before, after = pipelines.tensors(text_folder), pipelines.tensors(tmp_path / 'back')
  assert before.keys() == after.keys() and len(before) > 100
  for name, tensor in before.items():
    assert tensor.dtype == after[name].dtype
    np.testing.assert_array_equal(tensor, after[name])
  for part in ('unet', 'vae', 'text_encoder'):
    assert files.read_config(tmp_path / 'back' / part) == files.read_config(text_folder / part)
  scheduler = files.read_config(tmp_path / 'back' / 'scheduler', 'scheduler_config.json')
  assert scheduler.items() >= pipelines.LATENT.items()
  for file in ('vocab.json', 'merges.txt'):
    assert (tmp_path / 'back' / 'tokenizer' / file).read_bytes() == (text_folder / 'tokenizer' / file).read_bytes()
  index = json.loads((tmp_path / 'back' / 'model_index.json').read_text())
  assert index == json.loads((text_folder / 'model_index.json').read_text())


@pytest.mark.parametrize('part', ['unet', 'vae', 'text_encoder'])
def test_a_single_network_comes_back_to_the_bit(text_folder, part, tmp_path):
  assert run('from-diffusers', text_folder / part, '--workdir', tmp_path / 'ours') == 0
  assert run('to-diffusers', tmp_path / 'ours', tmp_path / 'back') == 0
  before, after = files.read_weights(text_folder / part), files.read_weights(tmp_path / 'back')
  assert before.keys() == after.keys()
  assert all(np.array_equal(before[name], after[name]) for name in before)
  assert files.read_config(tmp_path / 'back') == files.read_config(text_folder / part)


def test_a_controlnet_comes_back_to_the_bit(tmp_path):
  net = ControlNet(TextUNet(channels=4, multipliers=(1, 2), blocks=1, groups=2, depth=(1, 0), heads=2, text=6),
                   widths=(4, 6))
  tensors = controlnet.to_theirs(net, filled(controlnet.shapes(net)))
  files.write(tmp_path / 'theirs', controlnet.config(net), tensors, 'diffusion_pytorch_model')
  assert run('from-diffusers', tmp_path / 'theirs', '--workdir', tmp_path / 'ours') == 0
  assert run('to-diffusers', tmp_path / 'ours', tmp_path / 'back') == 0
  after = files.read_weights(tmp_path / 'back')
  assert tensors.keys() == after.keys() and all(np.array_equal(tensors[name], after[name]) for name in tensors)


def test_half_precision_is_what_it_says(text_run, tmp_path):
  assert run('to-diffusers', text_run, tmp_path / 'half', '--dtype=float16') == 0
  assert {tensor.dtype for tensor in pipelines.tensors(tmp_path / 'half').values()} == {np.dtype(np.float16)}


# The images


@pytest.fixture(scope='module')
def loaded(text_run):
  """draw(prompt, params=None, **changes of the Generator) -> images, and the model with its parameters."""
  def choose(config):
    config.sample.update({'steps': STEPS, 'batch_size': 8, 'guidance': 3.0})
  found = trained_lib.restore(text_run, '', None, choose)
  make = functools.cache(lambda **more: Generator(found.model, found.model.config.sample, 0, found.mesh, **more))
  return lambda prompt, params=found.params, **more: make(**more)(params, range(8), [prompt] * 8), found


def test_prompts_and_what_they_lead_away_from_change_the_image(loaded):
  at, _ = loaded
  cat = at('the cat')
  assert cat.shape == (8, 16, 16, 3)
  assert not np.array_equal(cat, at('photo')) and not np.array_equal(cat, at('the cat', negative='hat'))


def test_text_to_image_is_that_of_diffusers(text_folder, text_run):
  """Tokens, CLIP, the U-Net with guidance and a negative prompt, the chain, the autoencoder, PNG: within 2 of 255."""
  torch = pytest.importorskip('torch', reason=WHY.format('torch'))
  diffusers = pytest.importorskip('diffusers', reason=WHY.format('diffusers'))
  pytest.importorskip('transformers', reason=WHY.format('transformers'))
  ours = draw(text_run, '--prompt=The cat, a photo', '--negative=hat', '--guidance=3')
  pipe = diffusers.DiffusionPipeline.from_pretrained(text_folder, local_files_only=True)
  assert type(pipe).__name__ == 'StableDiffusionPipeline'
  pipe.set_progress_bar_config(disable=True)
  theirs = pipe(['The cat, a photo'] * 8, negative_prompt=['hat'] * 8, guidance_scale=3.0, num_inference_steps=STEPS,
                latents=torch.tensor(start_of(text_run)), output_type='np').images
  assert theirs.std() > 0.05
  np.testing.assert_allclose(ours, theirs, atol=2 / 255)


def test_a_model_trained_here_draws_the_same_images_there(trained, tmp_path, monkeypatch):
  torch = pytest.importorskip('torch', reason=WHY.format('torch'))
  diffusers = pytest.importorskip('diffusers', reason=WHY.format('diffusers'))
  from diffusers.pipelines.ddpm import pipeline_ddpm
  from diffusers.schedulers import scheduling_ddpm
  ours = draw(trained)
  assert run('to-diffusers', trained, tmp_path / 'pipeline') == 0
  pipe = diffusers.DDPMPipeline.from_pretrained(tmp_path / 'pipeline', local_files_only=True)
  pipe.set_progress_bar_config(disable=True)
  steps = (jax.vmap(lambda key, i=i: jax.random.normal(jax.random.fold_in(key, i), (1, 8, 8)))(KEYS)
           for i in range(STEPS))  # of one channel: first or last, it is the same
  draws = iter([start_of(trained), *steps])
  noise = lambda shape, *_, **__: torch.tensor(np.array(next(draws))).reshape(shape)
  monkeypatch.setattr(pipeline_ddpm, 'randn_tensor', noise)
  monkeypatch.setattr(scheduling_ddpm, 'randn_tensor', noise)
  theirs = pipe(batch_size=8, num_inference_steps=STEPS, output_type='np').images
  np.testing.assert_allclose(ours, theirs[..., 0], atol=2 / 255)


def test_a_controlnet_trained_here_steers_there_too(text_run, loaded, tmp_path):
  """Its train step goes through with images beside latents, its folders are read, and images are within 2 of 255."""
  _, base = loaded
  config = base.model.config.copy_and_resolve_references()
  with config.unlocked():
    config.update({'control': True, 'given': spec(givens.grey)})
  config.sample.guidance = 1.0
  steered = model.make(config, base.model.image_shape, 0, folder=text_run)
  optimizer = model.optimizer_of(config)
  state = jax.eval_shape(lambda key: model.initial_state(steered, optimizer, key), jax.random.key(0))
  batch = [jax.ShapeDtypeStruct((1, 128, *rest), kind) for *rest, kind in ((16, 16, 3, 'uint8'), (77, 'int32'))]
  step = train.make_step(steered, optimizer)
  after, _ = jax.eval_shape(lambda *a: step(*a[:3], None, a[3]), jax.random.key(0), state, train.Metrics.empty(), batch)
  assert set(state.frozen) == {'net', 'text', 'codec'} and set(state.params) == {'process', 'control'}
  assert jax.tree.map(lambda a: a.shape, after) == jax.tree.map(lambda a: a.shape, state)

  control = jax.tree.map(np.asarray, filled(state.params['control'], seed=9))
  control['hint_in'] = jax.tree.map(lambda a: 4 * a, control['hint_in'])  # or it would hardly be seen
  params = {**base.params, 'control': control}
  found = base._replace(model=steered, params=params)
  assert bridge.to_pipeline(found, text_run, tmp_path / 'there') == 'StableDiffusionControlNetPipeline'
  back = controlnet.from_theirs(steered.control, files.read_weights(tmp_path / 'there' / 'controlnet'))
  jax.tree.map(np.testing.assert_array_equal, back, params['control'])
  assert controlnet.net(files.read_config(tmp_path / 'there' / 'controlnet')) == steered.control

  torch = pytest.importorskip('torch', reason=WHY.format('torch'))
  diffusers = pytest.importorskip('diffusers', reason=WHY.format('diffusers'))
  pytest.importorskip('transformers', reason=WHY.format('transformers'))
  grey = np.random.default_rng(0).random((8, 16, 16, 1), np.float32)
  draw = Generator(steered, config.sample, 0, base.mesh)
  ours = [draw(params, range(8), ['the cat'] * 8, 2 * image - 1) / 255 for image in (grey, 1 - grey)]
  assert abs(ours[0] - ours[1]).max() > 0.1
  pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / 'there', local_files_only=True)
  pipe.set_progress_bar_config(disable=True)
  theirs = pipe(['the cat'] * 8, torch.tensor(np.moveaxis(grey, -1, 1)), guidance_scale=1.0, num_inference_steps=STEPS,
                latents=torch.tensor(start_of(text_run)), output_type='np').images
  np.testing.assert_allclose(ours[0], theirs, atol=2 / 255)


# What is refused


def broken(folder, what):
  """A copy of a pipeline's folder with something wrong."""
  weights = folder / 'unet' / 'diffusion_pytorch_model.safetensors'
  tensors = {name: np.array(a) for name, a in files.read_safetensors(weights).items()}
  config = files.read_config(folder / 'unet')
  if what == 'missing':
    del tensors['conv_in.weight']
  elif what == 'extra':
    tensors['conv_inn.weight'] = np.zeros(1, np.float32)
  elif what == 'shape':
    tensors['conv_in.weight'] = tensors['conv_in.weight'][:1]
  elif what == 'class':
    config['_class_name'] = 'UNet3DConditionModel'
  files.write(folder / 'unet', config, tensors, 'diffusion_pytorch_model')
  if what == 'truncated':
    weights.write_bytes(weights.read_bytes()[:1000])
  elif what == 'pickle':
    weights.rename(weights.with_suffix('.bin'))
  elif what == 'scheduler':
    path = folder / 'scheduler' / 'scheduler_config.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), '_class_name': 'KarrasVeScheduler'}))
  elif what == 'part':
    path = folder / 'model_index.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'transformer': ['diffusers', 'FluxTransformer2D']}))
  return folder


@pytest.mark.parametrize(('what', 'message'), [
    ('missing', 'lacks conv_in.weight'), ('extra', 'conv_inn.weight (nearest: conv_in.weight)'),
    ('shape', 'conv_in.weight has [1, 4, 3, 3] and not [8, 4, 3, 3]'), ('truncated', 'is damaged'),
    ('pickle', 'a pickle, which runs code when it is opened'), ('class', "of class 'UNet3DConditionModel'"),
    ('scheduler', "of class 'KarrasVeScheduler'"), ('part', 'with transformer, which cannot be converted')])
def test_bad_input_is_one_sentence_and_leaves_nothing(text_folder, what, message, tmp_path, capsys):
  folder = broken(shutil.copytree(text_folder, tmp_path / 'theirs'), what)
  assert run('from-diffusers', folder, '--workdir', tmp_path / 'ours') == 2
  err = capsys.readouterr().err
  assert message in err and err.count('\n') == 1
  assert [path.name for path in tmp_path.iterdir()] == ['theirs']


def test_words_that_make_no_command_are_one_sentence(text_folder, text_run, tmp_path, capsys):
  for words, message in [
      (['from-diffusers', tmp_path / 'nothing', '--workdir', tmp_path / 'w'], "there is no '"),
      (['from-diffusers', text_folder], 'the folder to be made comes last'),
      (['to-diffusers', text_run, '--workdir', tmp_path / 'w'], 'the folder to be made comes last'),
      (['from-diffusers', text_folder, '--workdir', text_folder], 'exists and is not empty'),
      (['backwards', text_folder, tmp_path / 'w'], 'invalid choice'),
      (['to-diffusers', text_folder, tmp_path / 'w'], 'is it a run folder'.replace('is it', 'is') and 'run folder')]:
    assert run(*words) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1
  assert not list(tmp_path.iterdir())


def test_a_network_that_diffusers_does_not_have_is_refused(tiny_run, tmp_path, capsys):
  assert run('to-diffusers', tiny_run, tmp_path / 'there') == 2
  assert 'UNet2DModel' in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing(text_run, tmp_path, monkeypatch):
  def fail(*_):
    raise OSError(28, 'No space left on device', 'there')
  monkeypatch.setattr(bridge.log, 'write_json', fail)
  assert run('to-diffusers', text_run, tmp_path / 'back') == 1
  assert not list(tmp_path.iterdir())


def test_prompts_need_a_model_of_text(trained, capsys):
  from diffusion_jax import sample
  assert command.run(sample.main, [f'--workdir={trained}', '--prompt=a cat', '--num=8', '--batch_size=8']) == 2
  assert 'a prompt needs a model of text' in capsys.readouterr().err
  flags = [f'--workdir={trained}', '--prompt=a cat', '--labels=3', '--num=8', '--batch_size=8']
  assert command.run(sample.main, flags) == 2
  assert 'both say what is drawn' in capsys.readouterr().err


# LoRA


def test_a_lora_file_changes_samples_and_comes_back(text_folder, text_run, loaded, tmp_path):
  from diffusion_jax.convert import lora as lora_files
  from diffusion_jax.nets import lora
  net = unet_condition.net(files.read_config(text_folder / 'unet'))
  table, shapes = unet_condition.table(net), unet_condition.shapes(net)
  adapters = jax.tree.map(np.asarray, filled(lora.init(jax.random.key(0), shapes, 2)))
  lora_files.write(tmp_path / 'lora', {'unet': (table, shapes)}, {'unet': adapters})
  file = tmp_path / 'lora' / lora_files.NAME
  at, found = loaded
  plain, with_it = at('the cat'), lambda scale: at('the cat', bridge.adapted(found, [f'{file}={scale}']).params)
  np.testing.assert_array_equal(with_it(0), plain)
  assert not np.array_equal(with_it(1), plain)
  for text, message in [(f'{file}=much', 'must be FILE or FILE=SCALE'), (f'{file}.none=1', 'there is no')]:
    with pytest.raises(config_lib.UserError, match=message):
      bridge.adapted(found, [text])
  assert run('from-diffusers', file, '--workdir', tmp_path / 'ours', '--base', text_run) == 0
  assert run('to-diffusers', tmp_path / 'ours', tmp_path / 'back') == 0
  before, after = files.read_safetensors(file), files.read_safetensors(tmp_path / 'back' / lora_files.NAME)
  assert before.keys() == after.keys() and all(np.array_equal(before[k], after[k]) for k in before)


def test_convert_is_a_command(capsys):
  assert 'convert' in cli.COMMANDS
