"""Where a sampler ends: in data, or at a last level a little above it, as some libraries' chains do."""
import jax
import jax.numpy as jnp

from diffusion_jax.core.paths import PATHS
from diffusion_jax.core.solver import Sampler
from diffusion_jax.core.types import require

__all__ = ['ending']


def ending(sampler: Sampler, logsnr: float, path: str = 'vp') -> Sampler:
  """`sampler` with its last step, from the grid's last level, to the level at `logsnr` and not to data.

  The result is alpha x0 + sigma eps there, with the scales of `path`; a chain's own first level is meant, whose sigma
  is small (DDIM's code; Stable Diffusion 1). Raises ValueError for a sampler that calls the denoiser twice a step.
  """
  found = [p for p in PATHS if p.name == path]
  require(bool(found), f"path must be one of {', '.join(p.name for p in PATHS)}, got {path!r}")
  require(sampler.calls == 1, 'only a sampler of one call a step can end above the data')

  def finish(denoise, x, memory, last, z):
    level = found[0].level(jnp.asarray(logsnr, jnp.result_type(x, jnp.float32)))
    end = jax.tree.map(lambda a, b: jnp.asarray(a, jnp.result_type(b)), level, last)
    return sampler.step(denoise, x, memory, last, end, z)[0]

  return sampler._replace(init=lambda x, num_levels: sampler.init(x, num_levels + 1), finish=finish)
