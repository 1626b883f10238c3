"""Where parameters are spread over devices, activations stay with their examples."""
import pytest

from diffusion_jax import ahead
from diffusion_jax.core import samplers
from diffusion_jax.model import default_config
from diffusion_jax.nets import dit
from diffusion_jax.runtime import sharding
from diffusion_jax.runtime.config import spec


def sent(part, batch_size, **mesh):
  """Bytes that a device sends in the train step, or in the sampler, of a small transformer on eight devices."""
  config = default_config()
  config.data.update({'source': 'synthetic:8x8x3:64', 'size': 8})
  config.net = spec(dit.DiT, width=32, depth=2, heads=2, patch=2, num_classes=0, scan=True, dtype='bfloat16')
  config.train.batch_size = batch_size
  config.sample.sampler = spec(samplers.ddim)
  config.sample.update({'steps': 3, 'batch_size': batch_size})
  config.mesh.update(mesh)
  model, on = ahead.model_on(config)
  traced, rows, *_ = (ahead.step_on if part == 'step' else ahead.sampler_on)(model, on, 'cpu')
  return sum(c.sent for c in ahead.compile_program(traced, rows, on.size).collectives)


@pytest.mark.parametrize('part', ['step', 'sampler'])
def test_what_fsdp_sends_hardly_grows_with_the_batch(part, monkeypatch):
  """Parameters are gathered and their gradients summed; of activations, only a few narrow ones are sent."""
  monkeypatch.setattr(sharding, 'MIN_SHARDED_SIZE', 2 ** 10)
  small, large = (sent(part, size, data=2, fsdp=4) for size in (16, 32))
  assert 0 < large < 1.2 * small
