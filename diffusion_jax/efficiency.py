"""What a sample costs: time, latency, memory, FLOPs, and money if the price of a device is known."""
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.drawn import Asked
from diffusion_jax.generator import Generator
from diffusion_jax.model import Model
from diffusion_jax.runtime import sharding
from diffusion_jax.runtime.config import Config
from diffusion_jax.trained import Trained

LATENCY_ROUNDS = 3


def fixed(generator: Generator, trained: Trained, config: Config, seed: int, asked: Asked) -> list[dict[str, Any]]:
  """The records that depend on the sampling settings alone: latency of one image, compilation, memory, FLOPs."""
  rounds = _latencies(trained, config, seed, asked)
  memory = generator.compile(trained.params).memory_analysis()
  records = [
      {'metric': 'latency_seconds', 'value': statistics.median(rounds), 'ci': [min(rounds), max(rounds)],
       'ci_level': None, 'unit': 's', 'batch_size': 1},
      {'metric': 'compile_seconds', 'value': generator.compile_seconds, 'ci': None, 'unit': 's'}]
  if memory:
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    records.append({'metric': 'peak_memory_bytes', 'value': peak, 'ci': None, 'unit': 'B',
                    'memory_of': "one device: the compiled sampler's arguments, outputs and temporaries"})
  if flops := image_flops(generator, trained):
    records.append({'metric': 'flops_per_image', 'value': flops, 'ci': None, 'unit': 'FLOP',
                    'flops_of': "XLA's count for one network call, times the calls"})
  return records


def throughput(generator: Generator, seconds: float, made: int, price_per_hour: float) -> list[dict[str, Any]]:
  """The records of `made` samples that took `seconds`, compilation apart; price_per_hour is of one device, 0: none."""
  records = [{'metric': 'samples_per_second', 'value': made / seconds, 'ci': None, 'unit': '1/s'}]
  if price_per_hour:
    cost = 1000 * seconds / made * generator.mesh.size * price_per_hour / 3600
    records.append({'metric': 'cost_per_1000_images', 'value': cost, 'ci': None, 'unit': '$',
                    'price_per_hour': price_per_hour})
  return records


def image_flops(generator: Generator, trained: Trained) -> float:
  """FLOPs of all network calls for one image; 0 where XLA does not say."""
  count = lambda depth: network_flops(trained.model, trained.params, generator.batch_size, depth)
  rest = generator.nfe - generator.whole
  return count(0) * generator.whole + (count(generator.depth) * rest if rest else 0)


def network_flops(model: Model, params: Any, batch_size: int, depth: int = 0) -> float:
  """FLOPs of the network for one image, by XLA's count before optimisation; 0 where XLA does not say.

  depth: of a call that is given the deep features and computes so many skip connections.
  """
  def call(params, x, about, deep):
    level = model.diffusion.process.level(jnp.full(batch_size, 0.5), params['process'])
    cut = lambda net: lambda x, noise: net(x, noise, depth=depth, deep=deep)[0]
    return model.denoiser(params, model.cond(params, about), cut if depth else None)(x, level)

  def deep_of(params, x, about):
    cond = model.cond(params, about)
    return model.net.apply({'params': params['net']}, x, jnp.zeros(batch_size), cond, depth=depth)[1]

  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
  arguments = shapes, jax.ShapeDtypeStruct((batch_size, *model.shape), jnp.float32), model.about_shapes(batch_size)
  deep = jax.eval_shape(deep_of, *arguments) if depth else None
  cost = jax.jit(call).lower(*arguments, deep).cost_analysis()
  return max((cost or {}).get('flops', 0.0), 0.0) / batch_size


def _latencies(trained, config, seed, asked):
  """Seconds of a few samples drawn one at a time on one device."""
  single = Generator(trained.model, Config({**config, 'batch_size': 1}), seed,
                     sharding.make_mesh(1, 1, devices=jax.local_devices()[:1]))
  params = jax.device_put(trained.params, jax.local_devices()[0])
  single.compile(params)
  rounds = []
  for i in range(LATENCY_ROUNDS):
    what, began = asked([i]), time.perf_counter()
    single(params, [i], *what)
    rounds.append(time.perf_counter() - began)
  return rounds
