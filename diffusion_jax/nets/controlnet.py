"""ControlNet (Zhang et al. 2023, section 3): a copy of a U-Net's encoder that steers the U-Net by an image."""
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from diffusion_jax.nets.layers import Conv
from diffusion_jax.nets.text_unet import halved
from diffusion_jax.nets.unet import UNet

Array = jax.Array


class ControlNet(nn.Module):
  """x [B, *S, C], noise [B], cond -> what the U-Net takes as cond['control'], zeros at initialisation.

  The encoder and the middle of `net`, with weights of their own, see x and, added after the first convolution, the
  hint: cond['hint'] [B, *S', hint] in [0, 1], where S' is 2 S for each of `widths` after the first. Each skip and the
  middle pass a pointwise convolution that begins at zero, and are multiplied by cond['hint_scale'], [B] or one number,
  if it is there. net: a U-Net of nets/unet.py or nets/text_unet.py; widths: of the convolutions that bring the hint to
  the size of x (one width: it has that size).
  """
  net: UNet
  hint: int = 3
  widths: Sequence[int] = (16, 32, 96, 256)

  def __post_init__(self):
    if not isinstance(self.net, UNet):
      raise ValueError(f'a ControlNet is a copy of the encoder of UNet, DDPMpp, NCSNpp, ADM or TextUNet, not of '
                       f'{type(self.net).__name__}: set net to one of them')
    if self.hint < 1 or not self.widths or min(self.widths) < 1:
      raise ValueError(f'hint must be at least 1 and widths at least one number of at least 1, got {self.hint} and '
                       f'{tuple(self.widths)}')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, noise: Array, cond: Mapping[str, Array], train: bool = False) -> list[Array]:
    hint, factor = cond.get('hint'), 2 ** (len(self.widths) - 1)
    wanted = (len(x), *(factor * n for n in x.shape[1:-1]), self.hint)
    if hint is None or hint.shape != wanted:
      raise ValueError(f"cond['hint'] must be {list(wanted)} for an input of {list(x.shape)} and {len(self.widths)} "
                       f'widths, got {"none" if hint is None else list(hint.shape)}')
    hint = Hint(self.net.channels, tuple(self.widths), self.net.dtype, name='hint_in')(hint.astype(x.dtype))
    # A clone: where the U-Net itself is another's part too, its weights would be shared.
    encoder = self.net.clone(parent=self, name='encoder')
    places = encoder(x, noise, cond, train, hint)
    scale = jnp.reshape(cond.get('hint_scale', 1.0), (-1,) + (1,) * (x.ndim - 1))
    names = [*(f'skip_{i}' for i in range(len(places) - 1)), 'middle']
    zero = lambda h, name: Conv(h.shape[-1], size=1, init_scale=0.0, dtype=self.net.dtype, name=name)(h)
    return [zero(h, name) * scale.astype(h.dtype) for h, name in zip(places, names, strict=True)]


class Hint(nn.Module):
  """A hint [B, *S', c] -> [B, *S, features], zero at initialisation: convolutions, of which some halve the size."""
  features: int
  widths: Sequence[int]
  dtype: str

  @nn.compact
  def __call__(self, hint: Array) -> Array:
    conv = lambda width, name, **options: Conv(width, dtype=self.dtype, name=name, **options)
    h = nn.swish(conv(self.widths[0], 'in')(hint))
    for i, (width, wider) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
      h = nn.swish(conv(width, f'conv_{2 * i}')(h))
      h = nn.swish(halved(h, wider, self.dtype, f'conv_{2 * i + 1}'))
    return conv(self.features, 'out', init_scale=0.0)(h)


class WithControl(nn.Module):
  """`net` and a `ControlNet` of it as one network, x, noise, cond -> F: at initialisation that of `net`, bit for bit.

  Its parameters are {'net': ..., 'control': ...}: those of `net`, which the paper does not train any further, and
  those of the ControlNet, which begin best as `copied` makes them. hint, widths, cond['hint'] and cond['hint_scale']
  are as in `ControlNet`.
  """
  net: UNet
  hint: int = 3
  widths: Sequence[int] = (16, 32, 96, 256)

  @nn.compact
  def __call__(self, x: Array, noise: Array, cond: Mapping[str, Array], train: bool = False) -> Array:
    control = ControlNet(self.net.clone(parent=None), self.hint, self.widths, name='control')(x, noise, cond, train)
    return self.net(x, noise, {**cond, 'control': control}, train)


def beside(net: nn.Module, hint: int, factor: int) -> ControlNet:
  """The ControlNet of `net` for hints of so many channels that are `factor` times the size of x: 1, 2, 4 or 8.

  Raises ValueError for another factor, and as ControlNet does.
  """
  if 2 ** (widths := max(factor, 1).bit_length()) != 2 * factor or widths > len(ControlNet.widths):
    raise ValueError(f'a hint must be 1, 2, 4 or 8 times the size of what the network sees, got {factor} times')
  return ControlNet(net, hint, ControlNet.widths[:widths])


def copied(control: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
  """Parameters of a ControlNet in which those of the encoder are copies of the U-Net's `base`.

  Raises ValueError if it is not the ControlNet of such a U-Net.
  """
  wanted, theirs = flax.traverse_util.flatten_dict(control['encoder']), flax.traverse_util.flatten_dict(base)
  for path, leaf in wanted.items():
    if path not in theirs or theirs[path].shape != leaf.shape:
      raise ValueError(f'{"/".join(path)} is {list(leaf.shape)} in the ControlNet and '
                       f'{list(theirs[path].shape) if path in theirs else "missing"} in the U-Net: make the ControlNet '
                       f'with the net that the parameters are of')
  return {**control, 'encoder': flax.traverse_util.unflatten_dict({path: jnp.array(theirs[path]) for path in wanted})}
