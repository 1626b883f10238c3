"""Encoders of text, as a model takes them: a config's `text` is a spec of one of these."""
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.nets.clip import CLIPText
from diffusion_jax.nets.text import ByteEncoder, tokenise

Array = jax.Array


class Encoder(NamedTuple):
  """net: tokens [B, length] -> what `read` turns into cond's text and text_mask; trained: together with the model, or
  frozen, with parameters from the folder `weights`; tokenise(prompts) -> int32 [B, length], or None where that takes
  the files of the folder `tokenizer`.
  """
  net: nn.Module
  length: int
  read: Callable[[Any], dict[str, Array]]
  trained: bool
  tokenise: Callable[[Sequence[str]], np.ndarray] | None = None
  weights: str = ''
  tokenizer: str = ''

  def init(self, key: Array) -> dict[str, Any]:
    """The parameters."""
    return self.net.init(key, jnp.zeros((1, self.length), jnp.int32))['params']

  def __call__(self, params: Mapping[str, Any], tokens: Array) -> dict[str, Array]:
    """{'text': [B, length, D]}, with 'text_mask' [B, length] if some of it is padding that must not be seen."""
    return self.read(self.net.apply({'params': params}, tokens))


def none() -> None:
  """The model knows no text."""


def byte_encoder(width: int = 256, depth: int = 4, heads: int = 4, mlp: int = 4, length: int = 128,
                 dtype: str = 'float32') -> Encoder:
  """A small transformer over bytes, trained with the model: it needs no files. Arguments as in `text.ByteEncoder`."""
  net = ByteEncoder(width, depth, heads, mlp, length, dtype)
  return Encoder(net, length, lambda found: {'text': found[0], 'text_mask': found[1]}, trained=True,
                 tokenise=lambda prompts: tokenise(prompts, length))


def clip(weights: str = '', tokenizer: str = '', vocabulary: int = 49_408, width: int = 768, depth: int = 12,
         heads: int = 12, mlp: int = 3072, length: int = 77, activation: str = 'quick_gelu', end: int = 2,
         projection: int = 0, epsilon: float = 1e-5, dtype: str = 'float32') -> Encoder:
  """CLIP's text encoder, frozen; padding is seen, as in Stable Diffusion 1 and 2.

  weights: a folder of transformers' CLIPTextModel; tokenizer: one with vocab.json and merges.txt; the rest as in
  `clip.CLIPText`.
  """
  net = CLIPText(vocabulary, width, depth, heads, mlp, length, activation, end, projection, epsilon, dtype)
  return Encoder(net, length, lambda found: {'text': found.text}, trained=False, weights=weights, tokenizer=tokenizer)
