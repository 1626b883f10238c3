"""U-Nets for one, two or three spatial axes: DDPM, DDPM++, NCSN++ and ADM.

All are `net(x, noise, cond, train) -> F` with the same levels of residual blocks; the families differ in their blocks,
in how they change the size, and in the embedding of the noise.
"""
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.nets import blocks
from diffusion_jax.nets.blocks import ResBlock, SelfAttention, upsample
from diffusion_jax.nets.layers import Conv, Dense, GroupNorm, timestep_embedding, uniform_init

Array = jax.Array
REMAT = ('none', 'blocks')


class UNet(nn.Module):
  """DDPM's (Ho et al. 2020, appendix B): x [B, *S, C], noise [B], cond -> F [B, *S, C]. Zero at initialisation.

  channels: width of the first level; multipliers: widths of the levels relative to it, each at half the size of the
  one before; blocks: residual blocks per level; attention: the sizes (of the longest axis) at which self-attention
  follows each block; dropout in [0, 1); groups: of the normalisations, must divide every width; num_classes: 0, or the
  number of labels in cond['label'] [B], of which those with cond['drop'] [B] true are replaced by the null class;
  dtype: of the products, 'float32' or 'bfloat16' (parameters, their gradients and norms stay float32); variance:
  whether as many channels of a variance output follow those of F, [B, *S, 2 C]; image: 0, or the channels of
  cond['image'] [B, *S, image], which the first convolution sees too; remat: 'none', or 'blocks' to keep only what goes
  into each block and compute the rest again for the gradient.
  cond['control'] may hold residuals to be added to the skips and the middle: see `blocks.add_control`.

  A call with hint [B, *S, channels] is one of the encoder and the middle alone: the hint is added to what the first
  convolution gives, and the skips, in their order, and the middle are returned. No other layers are made.

  A call with depth in 1 .. num_skips returns (F, deep): deep is what the decoder has before it joins the outermost
  `depth` skips, and all that the inner part of the network gives. With `deep` given, only the outer part is computed.
  """
  channels: int = 128
  multipliers: Sequence[int] = (1, 2, 2, 2)
  blocks: int = 2
  attention: Sequence[int] = (16,)
  dropout: float = 0.1
  groups: int = 32
  num_classes: int = 0
  dtype: str = 'float32'
  variance: bool = False
  image: int = 0
  remat: str = 'none'

  def __post_init__(self):
    checks = [
        (self.channels >= 4 and self.blocks >= 1 and len(self.multipliers) >= 1,
         f'channels, blocks and multipliers must be at least 4, 1 and one level, '
         f'got {self.channels}, {self.blocks} and {tuple(self.multipliers)}'),
        (all(m >= 1 and self.channels * m % max(self.groups, 1) == 0 for m in self.multipliers) and self.groups >= 1,
         f'groups must divide the width of every level: widths '
         f'{[self.channels * m for m in self.multipliers]}, groups {self.groups}'),
        (0 <= self.dropout < 1, f'dropout must lie in [0, 1), got {self.dropout}'),
        (self.num_classes >= 0, f'num_classes must be at least 0, got {self.num_classes}'),
        (self.dtype in ('float32', 'bfloat16'), f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}"),
        (self.image >= 0, f'image must be at least 0, got {self.image}'),
        (self.remat in REMAT, f"remat must be 'none' or 'blocks', got {self.remat!r}"),
    ]
    for ok, message in checks:
      if not ok:
        raise ValueError(message)
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, noise: Array, cond: Mapping[str, Array], train: bool = False,
               hint: Array | None = None, depth: int = 0, deep: Array | None = None):
    factor = 2 ** (len(self.multipliers) - 1)
    if any(n % factor for n in x.shape[1:-1]):
      raise ValueError(f'{len(self.multipliers)} levels need sizes divisible by {factor}, got {x.shape[1:-1]}')
    blocks.check_depth(depth, self.num_skips)
    emb = nn.swish(self.embed(noise, cond))
    make_block = nn.remat(ResBlock, static_argnums=3) if self.remat == 'blocks' else ResBlock  # argument 3 is `train`

    def block(h, width, name, **changes):
      options = {**self.block_options(), **changes}
      return make_block(width, self.dropout, self.groups, self.dtype, **options, name=name)(h, emb, train)

    def encode(h, inputs):
      """Every skip, the outermost first, each made when it is asked for."""
      yield h
      for level, multiplier in enumerate(self.multipliers):
        for i in range(self.blocks):
          h = block(h, multiplier * self.channels, f'down_{level}_block_{i}')
          if self.attends(h, level):
            h = self.attend(h, cond, level, f'down_{level}_attention_{i}')
          yield h
        if level < len(self.multipliers) - 1:
          h, inputs = self.halve(h, inputs, block, level)
          yield h

    inputs = self.shown(x, cond)
    h = Conv(self.channels, dtype=self.dtype, name='conv_in')(inputs)
    h = h if hint is None else h + hint.astype(h.dtype)
    skips = list(itertools.islice(encode(h, inputs), None if deep is None else depth))
    h = deep
    if deep is None:
      h = block(skips[-1], skips[-1].shape[-1], 'middle_block_0')
      h = self.attend(h, cond, len(self.multipliers) - 1, 'middle_attention')
      h = block(h, h.shape[-1], 'middle_block_1')
    if hint is not None:
      return [*skips, h]
    skips, h = blocks.add_control(skips, h, cond, outer=deep is not None)

    joins = [(level, i) for level in reversed(range(len(self.multipliers))) for i in range(self.blocks + 1)]
    for level, i in joins[-len(skips):]:
      if len(skips) == depth:
        deep = h
      h = block(jnp.concatenate([h, skips.pop()], axis=-1), self.multipliers[level] * self.channels,
                f'up_{level}_block_{i}')
      if self.attends(h, level, i):
        h = self.attend(h, cond, level, f'up_{level}_attention_{i}')
      if level and i == self.blocks:
        h = self.double(h, block, level)

    h = nn.swish(GroupNorm(self.groups, self.block_options().get('epsilon', 1e-6), name='norm_out')(h))
    F = Conv(x.shape[-1] * (1 + self.variance), init_scale=0.0, dtype=self.dtype, name='conv_out')(h).astype(x.dtype)
    return (F, deep) if depth else F

  @property
  def num_skips(self) -> int:
    """How many skip connections join the encoder to the decoder."""
    return len(self.multipliers) * (self.blocks + 1)

  # What the families do each in their own way.

  @nn.nowrap
  def shown(self, x: Array, cond: Mapping[str, Array]) -> Array:
    """What the first convolution sees."""
    return blocks.with_image(x, cond, self.image)

  @nn.nowrap
  def block_options(self) -> dict[str, Any]:
    """Arguments of every ResBlock."""
    return {}

  @nn.nowrap
  def attention_options(self, channels: int) -> dict[str, Any]:
    """Arguments of a SelfAttention on so many channels."""
    return {}

  @nn.nowrap
  def attends(self, h: Array, level: int, i: int | None = None) -> bool:
    """Whether attention follows a block whose output is h; i: its number on the way up, None on the way down."""
    return max(h.shape[1:-1]) in self.attention

  @nn.nowrap
  def attend(self, h: Array, cond: Mapping[str, Array], level: int, name: str) -> Array:
    """h after attention."""
    make = nn.remat(SelfAttention) if self.remat == 'blocks' else SelfAttention
    return make(self.groups, self.dtype, **self.attention_options(h.shape[-1]), name=name)(h)

  @nn.nowrap
  def embed(self, noise: Array, cond: Mapping[str, Array]) -> Array:
    """noise [B] and cond -> [B, 4 channels], before the last swish."""
    emb = timestep_embedding(noise, self.channels)
    emb = Dense(4 * self.channels, name='embed_in')(emb)
    emb = Dense(4 * self.channels, name='embed_out')(nn.swish(emb))
    if self.num_classes:
      label = cond['label']
      label = jnp.where(cond['drop'], self.num_classes, label) if 'drop' in cond else label
      emb += nn.Embed(self.num_classes + 1, 4 * self.channels, name='embed_label')(label)
    return emb

  @nn.nowrap
  def halve(self, h: Array, inputs: Array, block: Any, level: int) -> tuple[Array, Array]:
    """(h at half the size, what the next call gets as `inputs`, at first the network's)."""
    return Conv(h.shape[-1], stride=2, dtype=self.dtype, name=f'down_{level}_downsample')(h), inputs

  @nn.nowrap
  def double(self, h: Array, block: Any, level: int) -> Array:
    """h at twice the size."""
    return Conv(h.shape[-1], dtype=self.dtype, name=f'up_{level}_upsample')(upsample(h))


class DDPMpp(UNet):
  """DDPM++ (Song et al. 2021, appendix C) in the form and at the size of Karras et al. 2022, table 7, for CIFAR-10.

  Unlike DDPM, residual blocks change the size, every sum is scaled by 1/sqrt(2), and attention follows only the last
  block of a level on the way up. Labels (the null class is a row of zeros) and augment, the number of channels of
  cond['augment'] [B, augment] (zeros where an image is as it was), enter before the embedding's first layer; without
  that key it is taken to be zeros.
  """
  multipliers: Sequence[int] = (2, 2, 2)
  blocks: int = 4
  dropout: float = 0.13
  augment: int = 0

  @nn.nowrap
  def block_options(self):
    return {'skip_scale': 0.5 ** 0.5, 'project': True}

  @nn.nowrap
  def attention_options(self, channels):
    return {'skip_scale': 0.5 ** 0.5, 'init_scale': 0.2}

  @nn.nowrap
  def attends(self, h, level, i=None):
    return super().attends(h, level) and i in (None, self.blocks)

  @nn.nowrap
  def features(self, noise: Array) -> Array:
    """noise [B] -> the first embedding."""
    return timestep_embedding(noise, self.channels)

  @nn.nowrap
  def embed(self, noise, cond):
    emb = self.features(noise)
    if self.num_classes:
      labels = blocks.one_hot_labels(cond, self.num_classes) * self.num_classes ** 0.5
      emb += Dense(emb.shape[-1], name='embed_label')(labels)
    emb += _augmentation(self, cond, emb.shape[-1])
    emb = Dense(4 * self.channels, name='embed_in')(emb)
    return Dense(4 * self.channels, name='embed_out')(nn.swish(emb))

  @nn.nowrap
  def halve(self, h, inputs, block, level):
    return block(h, h.shape[-1], f'down_{level}_downsample', resample='down'), inputs

  @nn.nowrap
  def double(self, h, block, level):
    return block(h, h.shape[-1], f'up_{level}_upsample', resample='up')


class NCSNpp(DDPMpp):
  """NCSN++ (Song et al. 2021, appendix C) in the form of Karras et al. 2022, table 7.

  DDPM++ with an anti-aliasing filter, Fourier features of the noise at `fourier_scale`, and a residual path from the
  input: filtered, halved and convolved, it joins every level of the encoder.
  """
  taps: Sequence[int] = (1, 3, 3, 1)
  fourier_scale: float = 16.0

  @nn.nowrap
  def block_options(self):
    return {**super().block_options(), 'taps': tuple(self.taps)}

  @nn.nowrap
  def features(self, noise):
    return blocks.fourier_embedding(noise, 2 * self.channels, self.fourier_scale)

  @nn.nowrap
  def halve(self, h, inputs, block, level):
    h, _ = super().halve(h, inputs, block, level)
    inputs = blocks.FilteredConv(h.shape[-1], tuple(self.taps), self.dtype, name=f'down_{level}_input')(inputs)
    h = (h + inputs) * jnp.asarray(0.5 ** 0.5, h.dtype)
    return h, h


class ADM(UNet):
  """ADM (Dhariwal & Nichol 2021, section 3) at its size for ImageNet 64x64.

  The embedding scales and shifts the second norm of each block, residual blocks change the size, and attention has
  heads of head_channels. The null class is a row of zeros. augment is as in `DDPMpp`.
  """
  channels: int = 192
  multipliers: Sequence[int] = (1, 2, 3, 4)
  blocks: int = 3
  attention: Sequence[int] = (32, 16, 8)
  augment: int = 0
  head_channels: int = 64

  @nn.nowrap
  def block_options(self):
    # The public implementation's layers begin uniform with variance 1 / (3 fan_in).
    return {'scale_shift': True, 'epsilon': 1e-5, 'init_scale': 1 / 3}

  @nn.nowrap
  def attention_options(self, channels):
    return {'head_channels': self.head_channels, 'epsilon': 1e-5, 'init_scale': 1 / 3}

  @nn.nowrap
  def embed(self, noise, cond):
    emb = blocks.cosines_and_sines(noise, self.channels)
    emb += _augmentation(self, cond, self.channels)
    emb = Dense(4 * self.channels, init_scale=1 / 3, name='embed_in')(emb)
    emb = Dense(4 * self.channels, init_scale=1 / 3, name='embed_out')(nn.swish(emb))
    if self.num_classes:
      rows = self.param('embed_label', nn.initializers.normal(1.0), (self.num_classes, 4 * self.channels))
      emb += blocks.one_hot_labels(cond, self.num_classes) @ rows
    return emb

  halve, double = DDPMpp.halve, DDPMpp.double


def _augmentation(net: UNet, cond: Mapping[str, Array], width: int) -> Array | float:
  """cond['augment'] [B, net.augment] as part of an embedding [B, width]: zero for images as they were."""
  if not net.augment:
    return 0.0
  rows = net.param('embed_augment', uniform_init(), (net.augment, width))
  augment = cond.get('augment')
  if augment is None:
    return 0.0
  if augment.shape[-1] != net.augment:
    raise ValueError(f"cond['augment'] must have {net.augment} channels, as the network's augment says, "
                     f'got {augment.shape[-1]}')
  return augment @ rows
