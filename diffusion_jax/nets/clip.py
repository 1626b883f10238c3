"""The text encoder of CLIP (Radford et al. 2021), on which Stable Diffusion is conditioned."""
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.nets.text import Layer

Array = jax.Array
LEGACY_END = 2  # configs of old say that texts end with token 2; their texts end with the highest number there is
ACTIVATIONS = {
    'quick_gelu': lambda x: x * nn.sigmoid(1.702 * x),     # OpenAI's models
    'gelu': lambda x: nn.gelu(x, approximate=False),       # OpenCLIP's
}


class CLIPOutput(NamedTuple):
  """text [B, L, width]: the chosen layer's output, normalised; pooled [B, width]: of the last layer, normalised, at
  the end of the text; projected [B, projection]: that, projected, or None; states: [B, L, width] before the first
  layer and after each, not normalised. Under jit, what is not used is not computed.
  """
  text: Array
  pooled: Array
  projected: Array | None
  states: tuple[Array, ...]


class CLIPText(nn.Module):
  """ids [B, L], L <= length, -> CLIPOutput. A token sees itself and those before it.

  skip: how many of the last layers `text` leaves out ('clip skip'); activation: 'quick_gelu' or 'gelu'; end: the
  token whose first place is the end of the text, or 2 for the place of the highest token; projection: width of
  `projected`, 0 for none. The defaults are those of ViT-L/14 in Stable Diffusion 1.
  """
  vocabulary: int = 49_408
  width: int = 768
  depth: int = 12
  heads: int = 12
  mlp: int = 3072
  length: int = 77
  activation: str = 'quick_gelu'
  end: int = LEGACY_END
  projection: int = 0
  epsilon: float = 1e-5
  dtype: str = 'float32'

  def __post_init__(self):
    checks = [
        (self.heads >= 1 and self.width % self.heads == 0,
         f'heads must divide width: width {self.width}, heads {self.heads}'),
        (self.activation in ACTIVATIONS,
         f'activation must be one of {", ".join(ACTIVATIONS)}, got {self.activation!r}'),
    ]
    for ok, message in checks:
      if not ok:
        raise ValueError(message)
    super().__post_init__()

  @nn.compact
  def __call__(self, ids: Array, skip: int = 0) -> CLIPOutput:
    if ids.shape[1] > self.length:
      raise ValueError(f'CLIP has {self.length} places for tokens, got {ids.shape[1]}: cut the text')
    if not 0 <= skip < self.depth:
      raise ValueError(f'skip must lie in 0 .. {self.depth - 1}, got {skip}')
    h = nn.Embed(self.vocabulary, self.width, name='tokens')(ids)
    h += nn.Embed(self.length, self.width, name='positions')(jnp.arange(ids.shape[1]))
    states = [h]
    for i in range(self.depth):
      layer = Layer(self.width, self.heads, self.mlp, ACTIVATIONS[self.activation], self.epsilon, self.dtype,
                    name=f'block_{i}')
      states.append(layer(states[-1], causal=True))
    norm = nn.LayerNorm(self.epsilon, use_fast_variance=False, name='norm')
    end = jnp.argmax(ids if self.end == LEGACY_END else ids == self.end, axis=1)
    pooled = norm(jnp.take_along_axis(states[-1], end[:, None, None], axis=1)[:, 0])
    projected = nn.Dense(self.projection, use_bias=False, name='projection')(pooled) if self.projection else None
    return CLIPOutput(norm(states[-1 - skip]), pooled, projected, tuple(states))
