"""What tests of networks share: parameters without initialisation, programs compiled quickly, and a net that is."""
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# What is run here is run once: its compilation takes longer than slow code.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
SPACES = [(7,), (6,), (5, 4), (3, 4, 5)]


def shapes_of(net, x_shape):
  """The shapes of the net's parameters, without computing any."""
  cond = {'label': jax.ShapeDtypeStruct(x_shape[:1], jnp.int32)}
  x, noise = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x_shape, x_shape[:1]))
  return jax.eval_shape(net.init, jax.random.key(0), x, noise, cond)['params']


def filled(shapes, seed=0):
  """Parameters of a net that is not at its initialisation: nothing is zero, and signals keep their size."""
  rng = np.random.default_rng(seed)
  def fill(path, leaf):
    noise = rng.standard_normal(leaf.shape) / math.sqrt(max(math.prod(leaf.shape[:-1]), 1))
    return jnp.asarray(1 + 0.1 * noise if path[-1].key == 'scale' else noise, jnp.float32)
  return jax.tree_util.tree_map_with_path(fill, shapes)


def normal(*shape, seed=1):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Small(nn.Module):
  """Two convolutions, the level and the label: for laws of training and sampling that hold whatever the net is.

  `outputs` times the channels of x; zero at the start, as the U-Net is. text: whether it sees the mean of cond['text'];
  image: the channels of cond['image'].
  """
  outputs: int = 1
  text: bool = False
  image: int = 0
  num_classes: int = 0
  dropout: float = 0.0

  @nn.compact
  def __call__(self, x, noise, cond, train=False):
    emb = nn.Dense(8)(jnp.stack([jnp.sin(noise / 100), jnp.cos(noise / 100)], -1))
    if self.num_classes:
      label = jnp.where(cond['drop'], self.num_classes, cond['label']) if 'drop' in cond else cond['label']
      emb += nn.Embed(self.num_classes + 1, 8)(label)
    if self.text:
      emb += nn.Dense(8, name='query')(cond['text'].mean(1))
    h = jnp.concatenate([x, cond['image']], -1) if self.image else x
    h = nn.swish(nn.Conv(8, (3, 3), name='conv_in')(h) + emb[:, None, None])
    h = nn.Dropout(self.dropout, deterministic=not train)(h)
    return nn.Conv(self.outputs * x.shape[-1], (3, 3), name='conv_out', kernel_init=nn.initializers.zeros)(h)


class Cut(nn.Module):
  """A net of two convolutions, of which the first gives the deep feature; `num_skips` and `blocks` as a U-Net has."""
  num_classes: int = 10
  blocks: int = 1
  num_skips: int = 4

  @nn.compact
  def __call__(self, x, noise, cond, train=False, depth=0, deep=None):
    label = jnp.where(cond['drop'], self.num_classes, cond['label']) if 'drop' in cond else cond['label']
    outer = nn.Conv(x.shape[-1], (3, 3), name='outer')
    if deep is None:
      emb = nn.Embed(self.num_classes + 1, 4, name='label')(label)
      deep = nn.tanh(nn.Conv(4, (3, 3), name='deep')(x) + emb[:, None, None] + noise[:, None, None, None] / 1000)
    F = outer(jnp.concatenate([x, deep], -1))
    return (F, deep) if depth else F
