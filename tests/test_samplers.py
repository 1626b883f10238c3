"""Laws of every sampler on a denoiser known in closed form. Those of one sampler alone are in test_single_step.py."""
import functools
import itertools

import exact
import jax
import jax.numpy as jnp
import numpy as np
import orders
import pytest

from diffusion_jax.core import levels, samplers, schedules
from diffusion_jax.core.types import Denoiser, Level

CONTINUOUS = schedules.cosine_continuous(-5, 5)
every_sampler = pytest.mark.parametrize('name', samplers.__all__)
SHAPE = (4, 4, 3)
# Each program runs once: optimising it would take longer than all the rest.
quick = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
# The network of every law: exact, with a variance halfway between a learned range's ends.
DENOISE = Denoiser(lambda x, level: (exact.denoise(x, level), jnp.zeros_like(x)))


def keys(n, seed=0):
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))


def start(grid):
  return jax.tree.map(lambda a: a[0], grid)


def along_paths(process, num_levels):
  """The same levels along each of the P paths: fields [P, N]."""
  grids = [levels.uniform_logsnr()(schedules.on_path(process, p.name), num_levels, None) for p in schedules.PATHS]
  return jax.tree.map(lambda *a: jnp.stack(a), *grids)


def solve_along_paths(sampler, grids, x, denoise=DENOISE):
  """x0 [P, B, *S, C] from sigma x at the first level of each path; sample i of each has the same noise."""

  @quick
  @jax.vmap
  def run(grid):
    return samplers.solve(sampler, denoise, start(grid).sigma * x, grid, keys(len(x)))

  return run(grids)


def test_every_sampler_has_its_law():
  """A new sampler is entered in tests/orders.py: its order, or that it draws noise, or that it chooses its steps."""
  assert set(samplers.__all__) == set(orders.ORDER) | orders.STOCHASTIC | orders.ADAPTIVE
  assert len(samplers.__all__) == len(orders.ORDER) + len(orders.STOCHASTIC) + len(orders.ADAPTIVE)


@functools.cache
def ode():
  """(x [4, *S, C] for sigma = 1, the ODE's end at the last level, mapped to x0 by the last call), in float64."""
  grids = along_paths(CONTINUOUS, 2)
  first, last = (Level(*(a[0, i] for a in grids)) for i in (0, 1))
  x = jax.random.normal(jax.random.key(0), (4, *SHAPE), jnp.float64)
  return x, quick(lambda x: exact.denoise(exact.transport(first.sigma * x, first, last), last))(x)


@pytest.mark.parametrize('name', orders.ORDER)
def test_order_of_convergence(name):
  """Halving the step divides the error against the ODE's closed form by 2^order, and all paths give one sample."""
  sampler, counts, errors = getattr(samplers, name)(), (40, 80), []
  step = quick(jax.vmap(functools.partial(sampler.step, DENOISE)))  # compiled once for both; `solve` has its own laws
  with jax.enable_x64(True):
    unit, truth = ode()
    for n in counts:
      grids = jax.tree.map(np.asarray, along_paths(CONTINUOUS, n + 1))
      at = [jax.tree.map(lambda a, i=i: a[:, i], grids) for i in range(n + 1)]
      x = jax.vmap(lambda sigma: sigma * unit)(at[0].sigma)
      memory, z = jax.vmap(lambda x, n=n: sampler.init(x, n + 1))(x), jnp.zeros_like(x)
      for cur, nxt in itertools.pairwise(at):
        x, memory = step(x, memory, cur, nxt, z)
      ends = np.asarray(jax.vmap(lambda x, m, last, z: sampler.finish(DENOISE, x, m, last, z))(x, memory, at[-1], z))
      np.testing.assert_allclose(ends, np.broadcast_to(ends[0], ends.shape), rtol=1e-8, atol=1e-8)
      errors.append(np.sqrt(np.mean((ends[0] - truth) ** 2)))
  slope = np.log(errors[0] / errors[1]) / np.log(counts[1] / counts[0])
  assert slope == pytest.approx(orders.ORDER[name], abs=0.25), errors


STOCHASTIC = {name: getattr(samplers, name)() for name in sorted(orders.STOCHASTIC)} | {
    'ancestral fixed large': samplers.ancestral(variance=1.0), 'ddim 0.5': samplers.ddim(0.5),
    'euler churn': samplers.euler(churn=10.0), 'heun churn': samplers.heun(churn=60.0),
    'flow_euler stochastic': samplers.flow_euler(stochastic=True)}


@pytest.mark.parametrize('name', STOCHASTIC)
def test_samples_have_the_moments_of_the_data(name):
  """The mean to four standard errors, the variance to 3%."""
  # x0 noised afresh at each level asks for a consistency function, here the ODE's exact one, in place of E[x0 | x].
  afresh = name in ('lcm', 'flow_euler stochastic')
  denoise, num_steps = (exact.consistency, 8) if afresh else (DENOISE, 300)
  grid = levels.uniform_logsnr()(schedules.cosine_continuous(-12, 12), num_steps, None)

  @quick
  def run(keys):
    x = samplers.prior(keys, SHAPE, start(grid))
    return samplers.solve(STOCHASTIC[name], denoise, x, grid, keys)

  x0 = np.asarray(run(keys(256)), np.float64)
  mean, variance = exact.moments()
  assert abs(x0.mean() - mean) < 4 * np.sqrt(variance / x0.size)
  assert x0.var() == pytest.approx(variance, rel=0.03)


@every_sampler
def test_a_run_is_finite_from_pure_noise(name):
  """From alpha = 0; on ve, where that would be sigma = inf, from nearly nothing."""
  rest = along_paths(schedules.cosine_continuous(-6, 8), 9)
  nothing, little = Level(*jnp.float32([-jnp.inf, 0, 1])), schedules.ve.level(jnp.float32(-12))
  firsts = [little if path.name == 've' else nothing for path in schedules.PATHS]
  first = jax.tree.map(lambda *a: jnp.stack(a)[:, None], *firsts)
  grids = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, rest)
  x = jax.random.normal(jax.random.key(0), (2, *SHAPE))
  assert np.all(np.isfinite(solve_along_paths(getattr(samplers, name)(), grids, x)))


@functools.cache
def runs(name):
  """(calls of the denoiser, x0, (x, x0 estimate) at each of 8 levels) of five samples; x0 of sample 0 among others."""
  sampler, grid, count = getattr(samplers, name)(), levels.timesteps()(schedules.linear(), 8, None), []

  def counting(x, level):
    jax.debug.callback(lambda: count.append(1))
    return DENOISE.both(x, level)

  @quick
  def run(keys):
    x = samplers.prior(keys, SHAPE, start(grid))
    return samplers.solve(sampler, Denoiser(counting), x, grid, keys, trajectory=True)

  first = jax.block_until_ready(run(keys(5)))
  jax.effects_barrier()
  calls = len(count)
  return calls, *first, run(jnp.concatenate([keys(1), keys(4, seed=1)]))[0]


@pytest.mark.parametrize('name', [name for name in samplers.__all__ if name not in orders.ADAPTIVE])
def test_calls_are_counted(name):
  """The trajectory's estimates take one more at each level."""
  assert runs(name)[0] == getattr(samplers, name)().nfe(8) + 8


@every_sampler
def test_a_sample_depends_on_its_own_key_alone(name):
  _, x0, _, among_others = runs(name)
  np.testing.assert_array_equal(x0[0], among_others[0])
  assert np.all(np.abs(x0[1:] - among_others[1:]).max((1, 2, 3)) > 0.01)


@every_sampler
def test_trajectory_begins_with_the_noise_and_ends_in_the_sample(name):
  _, x0, (xs, estimates), _ = runs(name)
  assert xs.shape == estimates.shape == (8, 5, *SHAPE)
  first = start(levels.timesteps()(schedules.linear(), 8, None))
  np.testing.assert_allclose(xs[0], samplers.prior(keys(5), SHAPE, first), rtol=1e-6)
  np.testing.assert_allclose(estimates[-1], x0, atol=1e-6)


@pytest.mark.parametrize('name', ['ancestral', 'heun'])
def test_neither_the_batch_nor_the_trajectory_changes_a_sample(name):
  grid = levels.timesteps()(schedules.linear(), 8, None)
  x = samplers.prior(keys(2), SHAPE, start(grid))
  alone = quick(lambda x: samplers.solve(getattr(samplers, name)(), DENOISE, x, grid, keys(2)))(x)
  np.testing.assert_allclose(alone, runs(name)[1][:2], atol=3e-6)


def test_noise_bits_do_not_depend_on_batch_or_devices():
  """A sampler whose x is the noise of each step, summed in whole numbers: equal to the bit."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  grid = levels.timesteps()(schedules.linear(), 4, None)
  bits = lambda z: jax.lax.bitcast_convert_type(z, jnp.int32)
  spy = samplers.Sampler(lambda denoise, x, memory, cur, nxt, z: (x + bits(z).astype(x.dtype) % 2 ** 20, memory))

  @jax.jit
  def noise(keys):
    x = samplers.prior(keys, SHAPE, start(grid))
    return samplers.solve(spy, lambda x, level: x, x, grid, keys), bits(x)

  for one, all64, over in zip(noise(keys(1)), noise(keys(64)), noise(jax.device_put(keys(64), sharding)), strict=True):
    np.testing.assert_array_equal(one, all64[:1])
    np.testing.assert_array_equal(all64, over)
