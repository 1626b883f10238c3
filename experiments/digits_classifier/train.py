"""Trains the classifier whose features score digits, and writes its weights into the package.

  python -m experiments.digits_classifier.train [--out FILE]

It sees the training split only, each image shifted by up to one pixel and blurred with noise, and is scored on the 500
held-out digits. The weights in the package say in their metadata what they reached.
"""
import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax.data import sources
from diffusion_jax.metrics import classifiers
from diffusion_jax.runtime import command, log
from diffusion_jax.runtime.state import named_leaves

STEPS, BATCH, SEED = 3000, 128, 0


def main(argv=None) -> int:
  """Trains, prints the accuracy on the held-out digits, writes the weights."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument('--out', default=pathlib.Path(classifiers.__file__).with_name('digits.safetensors'))
  flags = p.parse_args(argv)
  images, labels = sources.arrays(sources.load('digits', 'train'))
  net, optimizer = classifiers.DigitsClassifier(), optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))
  variables = net.init(jax.random.key(SEED), jnp.zeros((1, 8, 8, 1)))
  state = optimizer.init(variables)

  @jax.jit
  def step(variables, state, x, y, key):
    x = x.astype(jnp.float32) / 255 + 0.1 * jax.random.normal(key, x.shape)

    def loss(variables):
      return optax.softmax_cross_entropy_with_integer_labels(net.apply(variables, x)[1], y).mean()

    updates, state = optimizer.update(jax.grad(loss)(variables), state)
    return optax.apply_updates(variables, updates), state

  rng = np.random.default_rng(SEED)
  for i in range(STEPS):
    chosen = rng.integers(0, len(images), BATCH)
    padded = np.pad(images[chosen], ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifts = rng.integers(0, 3, (BATCH, 2))
    x = np.stack([image[a:a + 8, b:b + 8] for image, (a, b) in zip(padded, shifts, strict=True)])
    variables, state = step(variables, state, x, labels[chosen], jax.random.key(i))

  images, labels = sources.arrays(sources.load('digits', 'test'))
  accuracy = float((np.asarray(net.apply(variables, images / 255.0)[1]).argmax(-1) == labels).mean())
  arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(variables['params'])}
  metadata = {'test_accuracy': f'{accuracy:.4f}', 'made_by': 'experiments.digits_classifier.train', 'seed': str(SEED)}
  log.write(flags.out, classifiers.pack(arrays, metadata))
  print(f'{100 * accuracy:.1f} % of the {len(labels)} held-out digits are right -> {flags.out}')
  return 0


if __name__ == '__main__':
  sys.exit(command.run(main))
