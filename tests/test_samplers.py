"""Laws of every sampler on a denoiser known in closed form."""
import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import guidance, levels, samplers, schedules

ORDER = {'ddim': 1, 'heun': 2, 'dpmpp_2m': 2}  # the deterministic ones
SAMPLERS = {name: getattr(samplers, name)() for name in samplers.__all__}
every_sampler = pytest.mark.parametrize('sampler', SAMPLERS.values(), ids=SAMPLERS.keys())
every_path = pytest.mark.parametrize('path', [p.name for p in schedules.PATHS])
SHAPE = (8, 8, 3)


def keys(n, seed=0):
  return jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.arange(n))


def start(grid):
  return jax.tree.map(lambda a: a[0], grid)


def sample(sampler, process, num_steps, n=16, denoise=exact.denoise):
  """n samples by id, compiled whole."""
  grid = levels.uniform_logsnr()(process, num_steps, None)

  @jax.jit
  def run():
    k = keys(n)
    return samplers.solve(sampler, denoise, samplers.prior(k, SHAPE, start(grid)), grid, k)

  return run()


def test_every_deterministic_sampler_has_a_measured_order():
  assert set(ORDER) | {'ancestral'} == set(samplers.__all__)


@every_path
@pytest.mark.parametrize('name', ORDER)
def test_order_of_convergence(name, path):
  """Halving the step divides the error at the last level by 2^order."""
  with jax.enable_x64(True):
    process = schedules.on_path(schedules.cosine_continuous(-5, 5), path)
    x = jax.random.normal(jax.random.key(0), (4, *SHAPE), jnp.float64)

    def end(sampler, n):
      grid = levels.uniform_logsnr()(process, n + 1, None)
      # The last call maps the end of the trajectory to x0: the same function for every n.
      return jax.jit(lambda x: samplers.solve(sampler, exact.denoise, start(grid).sigma * x, grid, keys(4)))(x)

    truth = end(samplers.heun(), 2000)
    steps = np.array([40, 80, 160])
    errors = [float(jnp.sqrt(jnp.mean((end(SAMPLERS[name], n) - truth) ** 2))) for n in steps]
  slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
  assert slope == pytest.approx(ORDER[name], abs=0.25), errors


def test_ddim_is_the_same_along_every_path():
  """From x at the same sigma / alpha, DDIM is one function of logsnr (Song et al. 2021, eq. 14)."""
  with jax.enable_x64(True):
    x, ends = jax.random.normal(jax.random.key(1), (4, *SHAPE), jnp.float64), []
    for path in schedules.PATHS:
      grid = levels.uniform_logsnr()(schedules.on_path(schedules.linear(), path.name), 20, None)
      ends.append(samplers.solve(samplers.ddim(), exact.denoise, start(grid).sigma * x, grid, keys(4)))
  np.testing.assert_allclose(ends[1], ends[0], rtol=1e-9)
  np.testing.assert_allclose(ends[2], ends[0], rtol=1e-9)


def test_ddim_with_eta_one_is_ancestral():
  for path in schedules.PATHS:
    process = schedules.on_path(schedules.linear(), path.name)
    np.testing.assert_allclose(sample(samplers.ddim(eta=1.0), process, 25),
                               sample(samplers.ancestral(), process, 25), atol=2e-5)


def test_ancestral_step_is_ddpms_posterior():
  """Ho et al. 2020, eq. 6 and 7, between neighbouring steps of the chain."""
  beta = schedules.betas(schedules.linear(), 1000)
  alpha_bar = np.cumprod(1 - beta)
  grid = levels.timesteps()(schedules.linear(), 1000, None)
  x, x0, z = np.random.default_rng(0).normal(size=(3, 2, 4, 4, 1))
  for t in (1, 10, 500, 999):
    cur, nxt = (jax.tree.map(lambda a, i=i: a[i], grid) for i in (999 - t, 1000 - t))
    mean = (np.sqrt(alpha_bar[t - 1]) * beta[t] * x0
            + np.sqrt(1 - beta[t]) * (1 - alpha_bar[t - 1]) * x) / (1 - alpha_bar[t])
    small = (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]) * beta[t]
    for variance, expected in ((0.0, small), (1.0, beta[t]), (0.5, np.sqrt(small * beta[t]))):
      got, _ = samplers.ancestral(variance).step(lambda x, level: x0, x, (), cur, nxt, z)
      np.testing.assert_allclose(got, mean + np.sqrt(expected) * z, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize('sampler', [samplers.ancestral(), samplers.ddim(0.5), samplers.ddim()], ids=['1', '0.5', '0'])
def test_samples_have_the_moments_of_the_data(sampler):
  x0 = np.asarray(sample(sampler, schedules.cosine_continuous(-12, 12), 500, n=64))
  mean, variance = exact.moments()
  se = np.sqrt(variance / x0.size)
  assert abs(x0.mean() - mean) < 4 * se
  assert x0.var() == pytest.approx(variance, rel=0.03)


@every_path
@every_sampler
def test_one_step_is_finite_from_pure_noise(sampler, path):
  if path == 've':
    first = schedules.ve.level(jnp.float32(-12))  # alpha = 0 would be sigma = inf on this path
  else:
    first = schedules.Level(jnp.float32(-jnp.inf), jnp.float32(0), jnp.float32(1))
  rest = levels.uniform_logsnr()(schedules.on_path(schedules.cosine_continuous(-6, 8), path), 9, None)
  grid = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, rest)
  x0 = samplers.solve(sampler, exact.denoise, samplers.prior(keys(4), SHAPE, first), grid, keys(4))
  assert np.all(np.isfinite(x0))


@every_sampler
def test_a_sample_depends_on_its_own_key_alone(sampler):
  process = schedules.linear()
  alone, few, many = (sample(sampler, process, 6, n) for n in (1, 7, 64))
  np.testing.assert_allclose(few[:1], alone, atol=1e-6)
  np.testing.assert_allclose(many[:7], few, atol=1e-6)


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


@every_sampler
def test_trajectory_ends_in_the_sample(sampler):
  process = schedules.linear()
  grid = levels.timesteps()(process, 5, None)
  x = samplers.prior(keys(3), SHAPE, start(grid))
  x0, (xs, estimates) = samplers.solve(sampler, exact.denoise, x, grid, keys(3), trajectory=True)
  assert xs.shape == estimates.shape == (5, 3, *SHAPE)
  np.testing.assert_array_equal(xs[0], x)
  np.testing.assert_array_equal(estimates[-1], x0)
  np.testing.assert_allclose(x0, samplers.solve(sampler, exact.denoise, x, grid, keys(3)), atol=1e-6)


@every_sampler
def test_calls_are_counted(sampler):
  count = []

  def denoise(x, level):
    jax.debug.callback(lambda: count.append(1))
    return exact.denoise(x, level)

  jax.block_until_ready(sample(sampler, schedules.linear(), 5, n=1, denoise=denoise))
  jax.effects_barrier()
  assert len(count) == sampler.nfe(5)


def test_guidance_identities():
  cond, ref = (lambda x, level, c=c: exact.denoise(x + c, level) for c in (0.3, -0.2))
  x = jax.random.normal(jax.random.key(0), (2, *SHAPE))
  level = schedules.linear().level(0.5)
  assert guidance.cfg(cond, ref, 1.0) is cond
  np.testing.assert_allclose(guidance.cfg(cond, ref, 0.0)(x, level), ref(x, level), atol=1e-6)
  np.testing.assert_allclose(guidance.cfg(cond, cond, 7.5)(x, level), cond(x, level), atol=1e-6)
  clipped = guidance.clip(lambda x, level: 3 * x)(x, level)
  assert clipped.min() == -1
  assert clipped.max() == 1


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: samplers.ddim(eta=1.5), r'eta must lie in \[0, 1\], got 1.5'),
    (lambda: samplers.ancestral(variance=-1), r'variance must lie in \[0, 1\], got -1'),
    (lambda: guidance.cfg(None, None, float('nan')), 'must be finite, got nan'),
    (lambda: guidance.clip(None, 1, -1), 'low must be below high, got 1 and -1'),
])
def test_bad_arguments_are_named(make, words):
  with pytest.raises(ValueError, match=words):
    make()
