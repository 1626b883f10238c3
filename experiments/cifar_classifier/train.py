"""Trains the classifier whose features score CIFAR-10, and writes its weights into the package.

  python -m experiments.cifar_classifier.train --data=npz:PATH --data_name=NAME [--out FILE] [--epochs N]

It sees the training split only, each image mirrored at random and shifted by up to two pixels, and is scored on the
test split. The same command on the same machine writes the same bytes. The weights say in their metadata what they
were made from and what they reached.
"""
import argparse
import functools
import pathlib
import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax.data import sources
from diffusion_jax.metrics import classifiers
from diffusion_jax.nets import layers
from diffusion_jax.runtime import command, log
from diffusion_jax.runtime.config import UserError

BATCH, SHIFT, SMOOTHING = 64, 2, 0.1
EPSILON, MEMORY = 1e-5, 0.99  # of the batch norms
PEAK_RATE, MOMENTUM, DECAY, WARMUP = 0.1, 0.9, 5e-4, 0.2  # the rate rises for the first fifth, then falls to 0


class ConvNorm(nn.Module):
  """A convolution with a batch norm; `fold` makes one convolution of both."""
  features: int
  size: tuple[int, int]
  train: bool

  @nn.compact
  def __call__(self, x):
    x = layers.Conv(self.features, size=self.size[0], name='conv')(x)
    return nn.BatchNorm(use_running_average=not self.train, momentum=MEMORY, epsilon=EPSILON,
                        name='norm')(x)


def fold(variables):
  """The variables of the net with ConvNorm as those of the plain CifarClassifier: {'layer/parameter': array}."""
  arrays = {}
  for layer, params in variables['params'].items():
    if 'norm' in params:
      moments = variables['batch_stats'][layer]['norm']
      slope = params['norm']['scale'] / np.sqrt(moments['var'] + EPSILON)
      params = {'kernel': params['conv']['kernel'] * slope,
                'bias': (params['conv']['bias'] - moments['mean']) * slope + params['norm']['bias']}
    arrays |= {f'{layer}/{name}': np.asarray(array, np.float32) for name, array in params.items()}
  return arrays


def train(images, labels, epochs, seed, report=print):
  """The folded weights after `epochs` of SGD on images uint8 [N, 32, 32, 3] and labels [N]; N at least one batch."""
  net = classifiers.CifarClassifier(functools.partial(ConvNorm, train=True))
  variables = net.init(jax.random.key(seed), jnp.zeros((1, *classifiers.SHAPES['cifar'])))
  steps = len(images) // BATCH * epochs
  rate = optax.join_schedules([optax.linear_schedule(0, PEAK_RATE, round(WARMUP * steps)),
                               optax.linear_schedule(PEAK_RATE, 0, steps - round(WARMUP * steps))],
                              [round(WARMUP * steps)])
  kernels_only = functools.partial(jax.tree.map, lambda p: p.ndim > 1)
  optimizer = optax.chain(optax.add_decayed_weights(DECAY, kernels_only), optax.sgd(rate, MOMENTUM, nesterov=True))
  state = optimizer.init(variables['params'])

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(variables, state, x, y):
    targets = optax.smooth_labels(jax.nn.one_hot(y, 10), SMOOTHING)

    def loss(params):
      (_, logits), updated = net.apply(variables | {'params': params}, x.astype(jnp.float32) / 255,
                                       mutable=['batch_stats'])
      return optax.softmax_cross_entropy(logits, targets).mean(), (updated, (logits.argmax(-1) == y).mean())

    (value, (updated, right)), gradient = jax.value_and_grad(loss, has_aux=True)(variables['params'])
    updates, state = optimizer.update(gradient, state, variables['params'])
    return {'params': optax.apply_updates(variables['params'], updates), **updated}, state, jnp.stack([value, right])

  rng, start = np.random.default_rng(seed), time.monotonic()
  padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode='reflect')
  for epoch in range(epochs):
    order, seen = rng.permutation(len(images)), []
    for i in range(0, len(images) - BATCH + 1, BATCH):
      chosen = order[i:i + BATCH]
      variables, state, found = step(variables, state, augmented(padded, chosen, rng), labels[chosen])
      seen.append(found)
    loss, right = np.mean(seen, axis=0)
    report(f'epoch {epoch + 1}/{epochs}: loss {loss:.3f}, {100 * right:.1f} % of the shifted training images right, '
           f'{time.monotonic() - start:.0f} s', flush=True)
  return fold(jax.device_get(variables))


def augmented(padded, chosen, rng):
  """Images padded[chosen], each cut out at a random place and mirrored or not."""
  n, size = len(chosen), padded.shape[1] - 2 * SHIFT
  rows, columns = rng.integers(0, 2 * SHIFT + 1, (2, n, 1)) + np.arange(size)
  columns = np.where(rng.integers(0, 2, (n, 1)), columns[:, ::-1], columns)
  return padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]


def main(argv=None) -> int:
  """Trains, prints the accuracy on the test split, writes the weights."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--data', required=True, help='a data source with the splits train and test, such as npz:PATH')
  p.add_argument('--data_name', help='what the metadata call the data set; the source itself if it is not given')
  p.add_argument('--out', default=pathlib.Path(classifiers.__file__).with_name('cifar.safetensors'))
  p.add_argument('--epochs', type=int, default=12)
  p.add_argument('--seed', type=int, default=0)
  flags = p.parse_args(argv)
  try:
    splits = {split: sources.arrays(sources.load(flags.data, split)) for split in ('train', 'test')}
  except (ValueError, OSError) as e:
    raise UserError(str(e)) from e
  for split, (images, labels) in splits.items():
    if images.shape[1:] != classifiers.SHAPES['cifar'] or labels.max() > 9:
      raise UserError(f'the {split} split must hold images {classifiers.SHAPES["cifar"]} of at most 10 classes, got '
                      f'{images.shape[1:]} and {labels.max() + 1}: give CIFAR-10')
  if flags.epochs < 1 or len(splits['train'][0]) < BATCH:
    raise UserError(f'training needs at least one epoch and {BATCH} images, got {flags.epochs} and '
                    f'{len(splits["train"][0])}: raise --epochs or give more data')
  arrays = train(*splits['train'], flags.epochs, flags.seed)

  images, labels = splits['test']
  variables, _ = classifiers.parse(classifiers.pack(arrays, {}))
  apply = jax.jit(classifiers.CifarClassifier().apply)
  chosen = np.concatenate([np.asarray(apply(variables, images[i:i + 500] / np.float32(255))[1]).argmax(-1)
                           for i in range(0, len(images), 500)])
  accuracy = float((chosen == labels).mean())
  versions = ', '.join(f'{name} {version}' for name, version in log.versions().items())
  metadata = {'test_accuracy': f'{accuracy:.4f}', 'data': flags.data_name or flags.data, 'epochs': str(flags.epochs),
              'made_by': 'experiments.cifar_classifier.train', 'seed': str(flags.seed), 'device': log.device(),
              'versions': versions, **{f'{split}_digest': sources.digest(*splits[split]) for split in splits}}
  log.write(flags.out, classifiers.pack(arrays, metadata))
  for k in np.unique(labels):
    print(f'class {k}: {100 * (chosen == labels)[labels == k].mean():.1f} % of {(labels == k).sum()} right')
  print(f'{100 * accuracy:.2f} % of the {len(labels)} test images are right -> {flags.out}')
  return 0


if __name__ == '__main__':
  sys.exit(command.run(main))
