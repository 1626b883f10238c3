"""Laws of the classifiers that come with the package, and of how the one for CIFAR-10 is made."""
import functools
import hashlib
import importlib.resources
import itertools
import re

import jax
import numpy as np
import pytest

from diffusion_jax.data import sources
from diffusion_jax.metrics import classifiers, frechet
from diffusion_jax.runtime import command
from experiments.cifar_classifier import train

WIDTHS = {'digits': (64, 10), 'cifar': (128, 10)}
every = pytest.mark.parametrize('name', sorted(classifiers.SHAPES))


def weights(name):
  return importlib.resources.files('diffusion_jax.metrics').joinpath(f'{name}.safetensors').read_bytes()


def noise(name, n, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (n, *classifiers.SHAPES[name]), np.uint8)


def test_digits_reach_what_the_weights_claim():
  images, labels = sources.arrays(sources.load('digits', 'test'))
  accuracy = (classifiers.classify('digits', images)['logits'].argmax(-1) == labels).mean()
  assert accuracy == pytest.approx(float(classifiers.about('digits')['test_accuracy']), abs=0.004)
  assert accuracy > 0.97


@every
def test_the_weights_are_small_and_say_what_they_are(name):
  assert len(weights(name)) < 2e6
  assert classifiers.digest(name) == hashlib.sha256(weights(name)).hexdigest()
  about = classifiers.about(name)
  assert about['made_by'] == f'experiments.{name}_classifier.train'
  assert int(about['seed']) >= 0
  assert 0.6 < float(about['test_accuracy']) < 1
  if name == 'cifar':
    assert about['data'] == 'cifar10-jpeg'
    assert int(about['epochs']) > 0
    assert len(about['train_digest']) == len(about['test_digest']) == 64


@every
def test_what_a_classifier_gives_does_not_depend_on_the_batch(name):
  images = noise(name, 11)
  whole = classifiers.classify(name, images, batch_size=16)
  for key, width in zip(('features', 'logits'), WIDTHS[name], strict=True):
    assert (whole[key].shape, whole[key].dtype) == ((11, width), np.float32)
    assert np.ptp(whole[key], axis=0).max() > 0.1
    parts = classifiers.classify(name, images[::-1], batch_size=4)[key][::-1]
    np.testing.assert_allclose(parts, whole[key], rtol=1e-5, atol=1e-5)
    assert classifiers.classify(name, images[:0], batch_size=4)[key].shape == (0, width)
  assert whole['features'].min() >= 0


@every
def test_images_that_do_not_fit_are_refused_in_one_sentence(name):
  for images in (noise(name, 2)[:, 1:], noise(name, 1)[0], noise(name, 2)[..., None]):
    with pytest.raises(ValueError, match=rf'{name} classifier takes images of shape .*features to .pixels') as e:
      classifiers.classify(name, images)
    assert str(images.shape[1:]) in str(e.value)
  with pytest.raises(ValueError, match='uint8, got float32'):
    classifiers.classify(name, noise(name, 2).astype(np.float32))
  with pytest.raises(ValueError, match=r'no classifier .imagenet., only digits, cifar'):
    classifiers.classify('imagenet', noise(name, 2))


def test_the_distance_of_cifar_features_grows_with_what_is_done_to_the_images():
  clean, _ = sources.arrays(sources.load('synthetic:32x32x3:320', 'train'))
  other, _ = sources.arrays(sources.load('synthetic:32x32x3:320', 'test'))
  static = noise('cifar', len(other))
  moments = lambda x: frechet.moments(classifiers.classify('cifar', x, batch_size=64)['features'])
  real = moments(clean)
  blended = [np.round((1 - a) * other + a * static).astype(np.uint8) for a in (0, 0.1, 0.2, 0.4, 0.8)]
  distances = [frechet.frechet_distance(real, moments(x)) for x in blended]
  assert all(b > 1.2 * a for a, b in itertools.pairwise(distances)), distances


def test_weight_files_are_the_same_bytes_for_the_same_content():
  arrays = {f'layer{i}/kernel': np.full((2, i), i, np.float32) for i in range(1, 5)}
  metadata = {f'key{i}': 'é' * i for i in range(8)}
  data = {classifiers.pack(arrays, dict(items)) for items in (metadata.items(), reversed(metadata.items()))}
  assert len(data) == 1
  variables, found = classifiers.parse(data.pop())
  assert found == metadata
  assert {f'{layer}/{k}': v.tolist() for layer, p in variables['params'].items() for k, v in p.items()} == {
      name: a.tolist() for name, a in arrays.items()}


def test_folding_the_norms_away_changes_nothing():
  """conv(x) * slope + shift is a convolution too."""
  net = classifiers.CifarClassifier(functools.partial(train.ConvNorm, train=False))
  x = np.random.default_rng(0).uniform(size=(3, 32, 32, 3)).astype(np.float32)
  shapes = jax.eval_shape(net.init, jax.random.key(0), x)
  rng = np.random.default_rng(1)
  variables = jax.tree.map(lambda s: rng.uniform(0.5, 1.5, s.shape).astype(np.float32), shapes)
  for layer in variables['params'].values():  # kernels of both signs, none of which blows the activations up
    for k in [p for p in (layer, layer.get('conv')) if p and 'kernel' in p]:
      k['kernel'] = (k['kernel'] - 1) * 3 / np.sqrt(np.prod(k['kernel'].shape[:-1]))
  folded, _ = classifiers.parse(classifiers.pack(train.fold(variables), {}))
  plain = jax.jit(classifiers.CifarClassifier().apply)(folded, x)
  for ours, expected in zip(plain, jax.jit(net.apply)(variables, x), strict=True):
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_augmented_images_are_mirrored_and_shifted_ones():
  images = noise('cifar', 2)
  s = train.SHIFT
  padded = np.pad(images, ((0, 0), (s, s), (s, s), (0, 0)))
  crops = {padded[1, a:a + 32, b:b + 32][:, ::flip].tobytes(): (a, b, flip)
           for a in range(2 * s + 1) for b in range(2 * s + 1) for flip in (1, -1)}
  found = train.augmented(padded, np.ones(2000, int), np.random.default_rng(0))
  assert {crops[image.tobytes()] for image in found} == set(crops.values())


@pytest.fixture(scope='module')
def coloured(tmp_path_factory):
  """Images whose class is their colour, which a classifier learns in a few steps."""
  folder = tmp_path_factory.mktemp('coloured')
  for split, n in (('train', 96), ('test', 40)):
    images, labels = sources.arrays(sources.load(f'synthetic:32x32x3:{n}', split))
    np.savez(folder / f'{split}.npz', image=images, label=labels)
  return folder


def test_training_learns_and_twice_gives_the_same_bytes(coloured, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(train, 'BATCH', 16)
  monkeypatch.setattr(train, 'MEMORY', 0.8)  # of a few steps there is not more to remember
  made = []
  for name in ('a', 'b'):
    arguments = [f'--data=npz:{coloured}', f'--out={tmp_path / name}', '--epochs=4', '--data_name=coloured']
    assert command.run(train.main, arguments) == 0
    made.append((tmp_path / name).read_bytes())
  assert made[0] == made[1]
  variables, about = classifiers.parse(made[0])
  assert about['data'] == 'coloured'
  assert about['train_digest'] == sources.digest(*sources.arrays(sources.load(f'npz:{coloured}', 'train')))
  images, labels = sources.arrays(sources.load(f'npz:{coloured}', 'test'))
  _, logits = jax.jit(classifiers.CifarClassifier().apply)(variables, images / np.float32(255))
  accuracy = (np.asarray(logits).argmax(-1) == labels).mean()
  assert accuracy == pytest.approx(float(about['test_accuracy']), abs=1e-3)
  assert accuracy > 0.5  # of four classes
  last = capsys.readouterr().out.splitlines()[-1]
  assert last.startswith(f'{100 * accuracy:.2f} % of the 40 test images')


@pytest.mark.parametrize(('arguments', 'sentence'), [
    (['--data=npz:nowhere'], 'no file nowhere'), (['--data=digits'], 'must hold images .*give CIFAR-10'),
    (['--data=synthetic:32x32x3:8'], 'at least one epoch and 64 images, got 12 and 8'),
    (['--data=synthetic:32x32x3', '--epochs=0'], 'at least one epoch')])
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, capsys):
  assert command.run(train.main, [*arguments, f'--out={tmp_path / "w"}']) == 2
  message = capsys.readouterr().err
  assert re.search(sentence, message) and message.count('\n') == 1
  assert not (tmp_path / 'w').exists()
