"""Text for networks that are conditioned on it: bytes as tokens, and a small encoder that is trained with the model."""
import unicodedata
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.nets.layers import Dense, attention

Array = jax.Array


def tokenise(prompts: Sequence[str], length: int) -> np.ndarray:
  """The UTF-8 bytes of each prompt plus one, then zeros as padding: int32 [B, length].

  Texts that look the same are the same (Unicode's form NFC). One that is too long ends after the last character
  that fits whole. Raises ValueError for a text that UTF-8 cannot hold (half of a surrogate pair).
  """
  ids = np.zeros((len(prompts), length), np.int32)
  for row, prompt in zip(ids, prompts, strict=True):
    try:
      data = unicodedata.normalize('NFC', prompt).encode()
    except UnicodeEncodeError as error:
      raise ValueError(f'prompt {prompt!r} is no valid text: {error.reason}') from None
    if len(data) > length:
      data = data[:length].decode(errors='ignore').encode()
    row[:len(data)] = np.frombuffer(data, np.uint8).astype(np.int32) + 1
  return ids


class ByteEncoder(nn.Module):
  """ids [B, L] of `tokenise`, L <= length -> (text [B, L, width], mask [B, L], true where there is text).

  A transformer whose every byte attends to all bytes of its prompt, normalised before each layer (Vaswani et al.
  2017; Xiong et al. 2020). Padding changes nothing. mlp: hidden width of a block, relative to width.
  """
  width: int = 256
  depth: int = 4
  heads: int = 4
  mlp: int = 4
  length: int = 128
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, ids: Array) -> tuple[Array, Array]:
    _check_length(ids, self.length)
    mask = ids > 0
    embed = lambda count, name: nn.Embed(count, self.width, embedding_init=nn.initializers.normal(0.02), name=name)
    h = embed(257, 'bytes')(ids) + embed(self.length, 'positions')(jnp.arange(ids.shape[1]))
    for i in range(self.depth):
      layer = Layer(self.width, self.heads, self.mlp * self.width, nn.gelu, dtype=self.dtype, name=f'block_{i}')
      h = layer(h, mask=mask[:, None, None, :])
    return nn.LayerNorm(1e-5, use_fast_variance=False, name='norm')(h), mask


class Layer(nn.Module):
  """A transformer's layer: h [B, L, width] -> the same, each half normalised before and added to its input.

  mask: which keys (last axis) a query may see, bool that broadcasts to [B, heads, L, L]; causal: only those before
  it and itself. The sum that runs through the layers is float32.
  """
  width: int
  heads: int
  mlp: int
  activation: Callable[[Array], Array]
  epsilon: float = 1e-5
  dtype: str = 'float32'

  @nn.compact
  def __call__(self, h: Array, mask: Array | None = None, causal: bool = False) -> Array:
    dense = lambda features, name: Dense(features, dtype=self.dtype, name=name)
    norm = lambda name: nn.LayerNorm(self.epsilon, use_fast_variance=False, name=name)
    y = norm('norm_0')(h)
    query, key, value = (dense(self.width, name)(y).reshape(*y.shape[:2], self.heads, -1)
                         for name in ('query', 'key', 'value'))
    y = attention(query, key, value, mask, causal).reshape(h.shape)
    h = h + dense(self.width, 'out')(y)
    return h + dense(self.width, 'mlp_out')(self.activation(dense(self.mlp, 'mlp_in')(norm('norm_1')(h))))


def _check_length(ids: Array, length: int) -> None:
  """Raises ValueError if there are more tokens than places."""
  if ids.shape[1] > length:
    raise ValueError(f'the text encoder has {length} places, got {ids.shape[1]} tokens: cut the text or raise length')
