"""The magnitude-preserving U-Net of EDM2 (Karras et al. 2024, config G), for one, two or three spatial axes.

"Magnitude" is the root mean square. Each operation is scaled so that, for inputs of magnitude 1 that are independent of
each other, its output has magnitude 1 too; every weight vector is kept at magnitude 1 and divided by the root of its
length where it is used. So nothing grows in training, and the learning rate alone sets the relative size of an update.
The uncertainty of the loss, which the paper trains beside the network, is `core.losses.learned_uncertainty`.
"""
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.nets import blocks, layers, products
from diffusion_jax.nets.resample import down, up

Array = jax.Array
# Table 2 of the paper: width of the first level of each size; all have the multipliers, blocks and heads below.
CHANNELS = {'xs': 128, 's': 192, 'm': 256, 'l': 320, 'xl': 384, 'xxl': 448}


def normalise(x: Array, axes: Sequence[int] | int = -1, smallest: float = 1e-4) -> Array:
  """x divided by its magnitude over `axes` (eq. 30), or by `smallest` where that is less; computed in float32."""
  y = x.astype(jnp.float32)
  square = jnp.mean(y * y, axis=axes, keepdims=True)
  return (y * jax.lax.rsqrt(jnp.maximum(square, smallest ** 2))).astype(x.dtype)


def normalise_kernel(kernel: Array) -> Array:
  """A kernel [.., inputs, outputs] with the weights of every output at magnitude 1."""
  return normalise(kernel, tuple(range(kernel.ndim - 1)))


def normalise_weights(params: Any) -> Any:
  """Every kernel of a tree of parameters at magnitude 1: forced weight normalisation (eq. 66), due after every update.

  It changes no output, since the layers normalise what they use; it keeps the stored weights, and with them the
  relative size of the next update, from drifting.
  """
  def project(path, leaf):
    return normalise_kernel(leaf) if path[-1].key == 'kernel' else leaf
  return jax.tree_util.tree_map_with_path(project, params)


def mp_silu(x: Array) -> Array:
  """SiLU over its magnitude for a standard normal input (eq. 81)."""
  return nn.silu(x) / 0.596


def mp_sum(a: Array, b: Array, t: float = 0.5) -> Array:
  """(1 - t) a + t b over its magnitude for independent a and b of magnitude 1 (eq. 88)."""
  return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a: Array, b: Array, t: float = 0.5) -> Array:
  """a and b side by side, of magnitude 1 in all, where they weigh (1 - t) to t whatever their widths (eq. 103)."""
  total = math.sqrt((a.shape[-1] + b.shape[-1]) / ((1 - t) ** 2 + t ** 2))
  return jnp.concatenate([a * (total * (1 - t) / math.sqrt(a.shape[-1])), b * (total * t / math.sqrt(b.shape[-1]))], -1)


def mp_fourier(noise: Array, dim: int) -> Array:
  """Cosines of noise [B] at frequencies like draws from N(0, 1), with phases like uniform ones (eq. 75): [B, dim]."""
  phases = (0.6180339887 * jnp.arange(dim)) % 1
  angles = 2 * jnp.pi * (noise.astype(jnp.float32)[:, None] * blocks.fourier_frequencies(dim) + phases)
  return math.sqrt(2) * jnp.cos(angles)


class MPConv(nn.Module):
  """x [B, *S, C] -> [B, *S, features], without a bias (eq. 47); size 0: a dense layer, x [.., C] -> [.., features]."""
  features: int
  size: int = 0
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (self.size,) * (x.ndim - 2) * (self.size > 0) + (x.shape[-1], self.features)
    kernel = layers.kernel_of(self, lambda key, shape: normalise_kernel(jax.random.normal(key, shape)), shape)
    if isinstance(kernel, layers.Integers):  # made of normalised weights
      kernel = kernel._replace(scale=kernel.scale / math.sqrt(math.prod(shape[:-1])))
      return layers.in_integers(x, kernel, jnp.zeros(self.features), self.dtype)
    # Normalised again, although it is: so gradients have no part along the weights.
    weights = normalise_kernel(kernel) / math.sqrt(math.prod(shape[:-1]))
    bias = jnp.zeros(self.features)
    if self.size < 2:
      return layers.affine(products.dot, products.dot_kernel_grad, x, weights.reshape(shape[-2:]), bias, self.dtype)
    return layers.affine(functools.partial(products.conv, stride=1),
                         functools.partial(products.conv_kernel_grad, stride=1, size=self.size), x, weights, bias,
                         self.dtype)


class Block(nn.Module):
  """[B, *S, C] -> [B, *S', features]: a residual branch modulated by the embedding, then attention if there are heads.

  In the encoder the main path is normalised pixel by pixel. Attention alone does not keep the magnitude: it averages,
  to nothing at worst, which with its share of 0.3 costs a block up to 8 %. resample: '', 'down' or 'up'.
  """
  features: int
  encoder: bool
  heads: int = 0
  resample: str = ''
  dropout: float = 0.0
  balance: float = 0.3  # the share of each branch that joins the main path
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, x: Array, emb: Array, train: bool) -> Array:
    conv = functools.partial(MPConv, self.features, dtype=self.dtype)
    x = {'': lambda a: a, 'down': down, 'up': up}[self.resample](x)
    shortcut = conv(1, name='shortcut') if x.shape[-1] != self.features else lambda a: a
    if self.encoder:
      x = normalise(shortcut(x))
    h = conv(3, name='conv_0')(mp_silu(x))
    gain = self.param('embed_gain', nn.initializers.zeros, ())
    scale = (1 + gain * MPConv(self.features, name='embed')(emb)).astype(h.dtype)
    h = mp_silu(h * scale.reshape((len(x),) + (1,) * (x.ndim - 2) + (self.features,)))
    h = nn.Dropout(self.dropout, deterministic=not train)(h)
    x = mp_sum(x if self.encoder else shortcut(x), conv(3, name='conv_1')(h), self.balance)
    if not self.heads:
      return x
    h = MPConv(3 * self.features, dtype=self.dtype, name='attention_in')(x)
    h = normalise(h.reshape(len(x), math.prod(x.shape[1:-1]), 3, self.heads, -1))
    h = layers.attention(*(h[:, :, i] for i in range(3))).reshape(x.shape)
    return mp_sum(x, MPConv(self.features, dtype=self.dtype, name='attention_out')(h), self.balance)


class UNet(nn.Module):
  """x [B, *S, C], noise [B], cond -> F [B, *S, C], all of it float32. Zero at initialisation.

  x must have magnitude 1 and `noise` be of that order, as under `targets.edm` with `diffusion.log_sigma(0.25)`. The
  weights stay normalised if training applies `normalise_weights`, which is `project` of the module, to each update.

  channels: width of the first level, see CHANNELS; multipliers: widths of the levels relative to it, each at half the
  size of the one before; blocks: per level; attention: the sizes (of the longest axis) whose blocks end in attention;
  head_channels: width of a head; dropout in [0, 1); num_classes: 0, or the number of labels in cond['label'] [B], of
  which those with cond['drop'] [B] true count as none; dtype: of the main path, 'float32' or 'bfloat16'; image and
  remat as in `unet.UNet`, and so are cond['control'] and a call with depth.
  """
  channels: int = 192
  multipliers: Sequence[int] = (1, 2, 3, 4)
  blocks: int = 3
  attention: Sequence[int] = (16, 8)
  head_channels: int = 64
  dropout: float = 0.0
  num_classes: int = 0
  dtype: str = 'float32'
  image: int = 0
  remat: str = 'none'

  project = staticmethod(normalise_weights)  # what training does to the parameters after every update

  def __post_init__(self):
    checks = [
        (self.channels >= 4 and self.blocks >= 1 and len(self.multipliers) >= 1 and min(self.multipliers) >= 1,
         f'channels, blocks and multipliers must be at least 4, 1 and one level of at least 1, '
         f'got {self.channels}, {self.blocks} and {tuple(self.multipliers)}'),
        (self.head_channels >= 1, f'head_channels must be at least 1, got {self.head_channels}'),
        (0 <= self.dropout < 1, f'dropout must lie in [0, 1), got {self.dropout}'),
        (self.num_classes >= 0, f'num_classes must be at least 0, got {self.num_classes}'),
        (self.dtype in ('float32', 'bfloat16'), f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}"),
        (self.image >= 0, f'image must be at least 0, got {self.image}'),
        (self.remat in ('none', 'blocks'), f"remat must be 'none' or 'blocks', got {self.remat!r}"),
    ]
    for ok, message in checks:
      if not ok:
        raise ValueError(message)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, noise: Array, cond: Mapping[str, Array], train: bool = False, depth: int = 0,
               deep: Array | None = None):
    factor = 2 ** (len(self.multipliers) - 1)
    if any(n % factor for n in x.shape[1:-1]):
      raise ValueError(f'{len(self.multipliers)} levels need sizes divisible by {factor}, got {x.shape[1:-1]}')
    blocks.check_depth(depth, self.num_skips)
    widths = [self.channels * m for m in self.multipliers]
    emb = MPConv(max(widths), name='embed_noise')(mp_fourier(noise, widths[0]))
    if self.num_classes:
      label = blocks.one_hot_labels(cond, self.num_classes) * math.sqrt(self.num_classes)
      emb = mp_sum(emb, MPConv(max(widths), name='embed_label')(label))
    emb = mp_silu(emb)
    make = nn.remat(Block, static_argnums=3) if self.remat == 'blocks' else Block  # argument 3 is `train`

    def block(h, width, name, encoder, attends=False, resample=''):
      if attends and width % self.head_channels:
        raise ValueError(f'head_channels must divide the widths with attention: width {width}, head_channels '
                         f'{self.head_channels}')
      return make(width, encoder, width // self.head_channels * attends, resample, self.dropout, dtype=self.dtype,
                  name=name)(h, emb, train)

    def encode(h):
      """Every skip, the outermost first, each made when it is asked for."""
      yield h
      for level, width in enumerate(widths):
        if level:
          h = block(h, h.shape[-1], f'down_{level - 1}_downsample', True, resample='down')
          yield h
        for i in range(self.blocks):
          h = block(h, width, f'down_{level}_block_{i}', True, max(h.shape[1:-1]) in self.attention)
          yield h

    # A channel of ones stands in for the biases that there are none of.
    h = jnp.concatenate([blocks.with_image(x, cond, self.image), jnp.ones_like(x[..., :1])], axis=-1)
    h = MPConv(widths[0], 3, self.dtype, name='conv_in')(h)
    skips = list(itertools.islice(encode(h), None if deep is None else depth))
    h = deep
    if deep is None:
      h = block(skips[-1], widths[-1], 'middle_block_0', False, True)
      h = block(h, widths[-1], 'middle_block_1', False)
    skips, h = blocks.add_control(skips, h, cond, outer=deep is not None)

    joins = [(level, i) for level in reversed(range(len(widths))) for i in range(self.blocks + 1)]
    for level, i in joins[-len(skips):]:
      if len(skips) == depth:
        deep = h
      h = block(mp_cat(h, skips.pop()), widths[level], f'up_{level}_block_{i}', False,
                max(h.shape[1:-1]) in self.attention)
      if level and i == self.blocks:
        h = block(h, widths[level], f'up_{level}_upsample', False, resample='up')

    gain = self.param('out_gain', nn.initializers.zeros, ())
    F = (MPConv(x.shape[-1], 3, self.dtype, name='conv_out')(h) * gain).astype(x.dtype)
    return (F, deep) if depth else F

  @property
  def num_skips(self) -> int:
    """As of `unet.UNet`."""
    return len(self.multipliers) * (self.blocks + 1)
