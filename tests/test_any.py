"""Laws for any schedule, shape and grid that hypothesis finds, where the others name theirs."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_jax.core import diffusion, levels, samplers, schedules, targets
from diffusion_jax.core.types import expand

# Each shape is compiled anew: that is what limits the examples.
some = settings(max_examples=20, deadline=None, derandomize=True)
few = settings(max_examples=6, deadline=None, derandomize=True)
tables = st.lists(st.floats(1e-5, 0.9), min_size=2, max_size=40).map(tuple)
shapes = st.tuples(st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3)).map(
    lambda parts: (parts[0], *parts[1], parts[2]))
logsnrs = st.floats(-12, 12)


@some
@given(tables)
def test_any_table_of_betas_comes_back_and_falls(beta):
  process = schedules.table(betas=beta)
  np.testing.assert_allclose(schedules.betas(process, len(beta)), beta, rtol=1e-6, atol=1e-12)
  logsnr = schedules.evaluate(process, np.linspace(0, 1, 3 * len(beta)))
  assert np.all(np.diff(logsnr) < 0)


@some
@given(tables, st.floats(0, 1), st.sampled_from([p.name for p in schedules.PATHS]))
def test_any_level_is_consistent_on_every_path(beta, t, path):
  with jax.enable_x64(True):
    process = schedules.on_path(schedules.table(betas=beta), path)
    level = process.level(jnp.float64(t))
    assert float(2 * jnp.log(level.alpha / level.sigma)) == pytest.approx(float(level.logsnr), rel=1e-9, abs=1e-9)
    assert float(process.time(level.logsnr, None)) == pytest.approx(t, abs=2e-3 / (len(beta) - 1))  # steps are rounded


@few
@given(shapes, logsnrs, st.sampled_from(targets.__all__), st.sampled_from([p.name for p in schedules.PATHS]))
def test_any_target_gives_back_its_data(shape, logsnr, name, path):
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x0, eps = (jnp.asarray(rng.standard_normal(shape)) for _ in range(2))
    level = next(p for p in schedules.PATHS if p.name == path).level(jnp.full(shape[0], logsnr))
    target = getattr(targets, name)()
    x = diffusion.add_noise(x0, eps, level)
    _, skip, out = (expand(c, x) for c in target.coeffs(level))
    got = skip * x + out * target.of(x0, eps, level)
    scale = 1 + float(jnp.max(jnp.abs(skip)) + jnp.max(jnp.abs(out)))  # what rounding is multiplied by
    np.testing.assert_allclose(got, x0, atol=1e-12 * scale * (1 + float(jnp.max(jnp.abs(x)))))


@some
@given(st.integers(2, 40), st.integers(1, 40), st.sampled_from(['timesteps', 'leading', 'trailing', 'quadratic']))
def test_any_number_of_steps_has_its_grid_or_one_sentence(chain, steps, name):
  process, grid = schedules.linear(num_steps=chain, beta_start=0.01, beta_end=0.3), getattr(levels, name)()
  if steps > chain:
    with pytest.raises(ValueError, match=f'{steps} sampling steps do not fit in a chain of {chain}'):
      grid(process, steps, None)
    return
  logsnr = np.asarray(grid(process, steps, None).logsnr)
  assert logsnr.shape == (steps,) and np.all(np.diff(logsnr) > 0)


@few
@given(shapes, st.integers(1, 5), st.sampled_from(['ancestral', 'heun', 'dpmpp_2m', 'unipc']))
def test_any_shape_can_be_sampled(shape, num_levels, name):
  """With the denoiser of data that is one point, every sampler ends there."""
  process = schedules.cosine_continuous()
  grid = levels.uniform_logsnr()(process, num_levels, None)
  keys = jax.random.split(jax.random.key(0), shape[0])
  x = samplers.prior(keys, shape[1:], jax.tree.map(lambda a: a[0], grid))
  x0 = samplers.solve(getattr(samplers, name)(), lambda x, level: jnp.full_like(x, 0.25), x, grid, keys)
  assert x0.shape == shape
  np.testing.assert_allclose(x0, 0.25, atol=1e-6)
