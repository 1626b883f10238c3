"""What a run may be conditioned on, from config to picture: captions, latents, adapters, what is given of an image."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config
from nets import Small, filled, jit
from PIL import Image
from pipelines import write_tokenizer

from diffusion_jax import model as model_lib
from diffusion_jax import sample, train, trained
from diffusion_jax.convert import autoencoder, clip, files
from diffusion_jax.core import givens
from diffusion_jax.nets import codecs, encoders, unet
from diffusion_jax.nets.autoencoder import AutoencoderKL
from diffusion_jax.nets.clip import CLIPText
from diffusion_jax.runtime import command
from diffusion_jax.runtime.config import Config, UserError, spec
from diffusion_jax.runtime.state import TrainState
from diffusion_jax.step import Metrics, make_step

SHORT = {'train__images': 32, 'train__batch_size': 16, 'train__sample_every': 32, 'train__checkpoint_every': 32,
         'sample__steps': 2}
VAE = AutoencoderKL(channels=(4, 4), blocks=1, latent=2, outputs=1, groups=2)


def config(**parts):
  """The tiny config, of 32 images, with specs in the place of parts."""
  made = tiny_config(**SHORT)
  with made.unlocked():
    for name, part in parts.items():
      made[name] = part
  return made


def text_config(**parts):
  return config(net=spec(Small, text=True), **{
      'text': spec(encoders.byte_encoder, width=8, depth=1, heads=1, mlp=1, length=8), **parts})


def restored(workdir, ema='raw'):
  return trained.restore(workdir, ema, None, lambda config: None)


def leaves(tree):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def changed(a, b):
  """Whether any array of two trees differs."""
  return any(np.any(x != y) for x, y in zip(leaves(a), leaves(b), strict=True))


@pytest.fixture(scope='module')
def text_run(tmp_path_factory):
  """Digits by their captions, '0' to '9', with an encoder of bytes that is trained too."""
  workdir = tmp_path_factory.mktemp('text') / 'run'
  assert train.train(text_config(), workdir) == 0
  return workdir


def test_captions_train_their_encoder_and_prompts_are_drawn(text_run, tmp_path):
  found = restored(text_run)
  start = jax.jit(lambda: found.model.init(model_lib.key(found.model.config.seed, 'init')))()
  assert changed(found.params['text'], start['text']) and changed(found.params['net'], start['net'])
  flags = [f'--workdir={text_run}', '--num=8', '--batch_size=8', '--guidance=2', '--prompt=seven', '--prompt=0',
           '--negative=3', f'--out={tmp_path / "drawn"}']
  assert command.run(sample.main, flags) == 0
  assert Image.open(tmp_path / 'drawn' / '000007.png').size == (8, 8)


def test_a_caption_is_read_in_its_labels_place(text_run):
  model = restored(text_run).model
  assert model.num_classes == 10 and model.captions == tuple('0123456789')
  np.testing.assert_array_equal(model.labels([7, 0]), model.labels(['7', '0']))
  np.testing.assert_array_equal(model.labels(['', 'a'])[:, 0], [0, ord('a') + 1])


def test_a_dropped_text_is_no_text(text_run):
  found = restored(text_run)
  cond = lambda texts, drop=None: found.model.cond(found.params, found.model.about(found.model.labels(texts)), drop)
  dropped, none = cond(['3', '4'], np.array([True, False])), cond(['', '4'])
  for name in ('text', 'text_mask'):
    np.testing.assert_array_equal(dropped[name], none[name])


def test_clip_is_read_from_its_folder_and_never_trained(tmp_path):
  count = write_tokenizer(tmp_path / 'tokenizer')
  net = CLIPText(vocabulary=count, width=8, depth=1, heads=1, mlp=8, end=count - 1)
  params = filled(clip.shapes(net))
  files.write(tmp_path / 'clip', clip.config(net), clip.to_theirs(net, params), 'model')
  text = spec(encoders.clip, vocabulary=count, width=8, depth=1, heads=1, mlp=8, end=count - 1,
              weights=str(tmp_path / 'clip'), tokenizer=str(tmp_path / 'tokenizer'))
  assert train.train(text_config(text=text), tmp_path / 'run') == 0
  (tmp_path / 'tokenizer').rename(tmp_path / 'elsewhere')  # the run has a copy
  model_lib._read_tokenizer.cache_clear()
  found = restored(tmp_path / 'run')
  assert not changed(found.params['text'], params)
  assert found.model.labels(['the cat']).shape == (1, 77)
  with pytest.raises(UserError, match='is not trained, and has no parameters'):
    text.update({'weights': '', 'tokenizer': str(tmp_path / 'elsewhere')})
    train.train(text_config(text=text), tmp_path / 'other')
  assert not (tmp_path / 'other').exists()


def test_latents_are_what_the_net_sees_and_images_what_is_drawn(tmp_path):
  files.write(tmp_path / 'vae', autoencoder.config(VAE), autoencoder.to_theirs(VAE, filled(autoencoder.shapes(VAE))),
              'diffusion_pytorch_model')
  codec = spec(codecs.kl, weights=str(tmp_path / 'vae'), channels=(4, 4), blocks=1, latent=2, outputs=1, groups=2)
  assert train.train(config(codec=codec), tmp_path / 'run') == 0
  found = restored(tmp_path / 'run')
  assert found.model.shape == (4, 4, 2) and found.model.image_shape == (8, 8, 1)
  assert not changed(found.params['codec'], filled(autoencoder.shapes(VAE)))
  assert command.run(sample.main, [f'--workdir={tmp_path / "run"}', '--num=8', '--batch_size=8', '--trajectory']) == 0
  assert Image.open(tmp_path / 'run' / 'samples' / 'final' / '000003.png').size == (8, 8)
  codec.channels = (4, 8)
  with pytest.raises(UserError, match=r'lacks|other shapes'):
    train.train(config(codec=codec), tmp_path / 'other')


def test_adapters_are_trained_beside_a_run_that_stays_as_it_was(text_run, tmp_path):
  changes = text_config(start=str(text_run))
  changes.lora.update({'rank': 1, 'pattern': 'query|conv_in'})
  assert train.train(changes, tmp_path / 'adapters') == 0
  base, found = restored(text_run, 'main'), restored(tmp_path / 'adapters')  # it starts from the average
  assert set(found.adapters) == {'query', 'conv_in'}
  before, after = ({jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in
                    jax.tree_util.tree_leaves_with_path(one.params['net'])} for one in (base, found))
  differ = {name for name in before if np.any(before[name] != after[name])}
  assert differ and all('query' in name or 'conv_in' in name for name in differ)
  parameters = json.loads((tmp_path / 'adapters' / 'run.json').read_text())['parameters']
  assert parameters == sum(leaf.size for leaf in leaves(found.adapters))  # the encoder of text is not trained either
  assert not changed(found.params['text'], base.params['text'])


def test_a_run_starts_from_another(tiny_run, tmp_path):
  changes = config(start=str(tiny_run))
  changes.learning_rate.peak = 0.0
  assert train.train(changes, tmp_path / 'run') == 0
  begun = restored(tmp_path / 'run').params['net']
  assert not changed(begun, restored(tiny_run, 'main').params['net'])
  with pytest.raises(UserError, match='is another network than the one that it is to start from'):
    train.train(text_config(start=str(tiny_run)), tmp_path / 'other')
  assert not (tmp_path / 'other').exists()


def test_an_image_is_drawn_from_what_is_given_of_it(tmp_path, capsys):
  given = spec(givens.low_resolution, factor=2)
  assert train.train(config(net=spec(Small, image=1), given=given), tmp_path / 'run') == 0
  Image.fromarray(np.full((4, 4), 200, np.uint8)).save(tmp_path / 'small.png')
  flags = [f'--workdir={tmp_path / "run"}', '--num=8', '--batch_size=8', f'--out={tmp_path / "drawn.png"}']
  assert command.run(sample.main, [*flags, f'--image={tmp_path / "small.png"}']) == 0
  for more, message in [
      ([], '--image is needed'), ([f'--image={tmp_path / "none.png"}'], 'cannot be read as a picture'),
      ([f'--image={tmp_path / "small.png"}', '--mask=x.png'], '--mask is for a model')]:
    assert command.run(sample.main, flags + more) == 2
    err = capsys.readouterr().err
    assert message in err and err.count('\n') == 1
  with pytest.raises(UserError, match=r'config.net.image is 0, and config.given gives the net 2 channels'):
    model_lib.make(config(given=spec(givens.masked)), (8, 8, 1), 10)


def test_the_net_is_told_how_its_images_were_augmented():
  net = spec(unet.DDPMpp, channels=8, multipliers=(1,), blocks=1, attention=(), groups=4, dropout=0.0, augment=9)
  made = config(net=net)
  made.data.augment = 0.5
  model, optimizer = model_lib.make(made, (8, 8, 1), 10), optax.sgd(1.0)
  shapes = jax.eval_shape(lambda key: model_lib.initial_state(model, optimizer, key), jax.random.key(0))
  start = jax.tree.map(jnp.copy, filled(shapes.params))
  state = TrainState(jnp.zeros((), jnp.int32), start, optimizer.init(start), {})
  made.ema = Config()
  batch = np.random.default_rng(0).integers(0, 256, (1, 16, 8, 8, 1), np.uint8), np.zeros((1, 16), np.int32)
  step = jit(make_step(model, optimizer), static_argnums=3)
  after, _ = step(jax.random.key(1), state, Metrics.empty(), None, batch)
  moved = np.abs(after.params['net']['embed_augment'] - start['net']['embed_augment'])
  assert (moved.max(1) > 0).all()  # each of the nine labels was something for some image
  with pytest.raises(UserError, match=r'config.net.augment is 0, and config.data.augment gives the net 9 channels'):
    made.net.augment = 0
    model_lib.make(made, (8, 8, 1), 10)
