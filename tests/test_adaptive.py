"""Laws of the samplers that choose their own steps, against the ODE's closed form."""
import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import adaptive, guidance, samplers, schedules
from diffusion_jax.core.types import Level, expand

MAKERS = {name: getattr(adaptive, name) for name in adaptive.__all__} | {
    'dpm_adaptive of order 2': lambda **settings: adaptive.dpm_adaptive(order=2, **settings)}
every_sampler = pytest.mark.parametrize('make', MAKERS.values(), ids=MAKERS.keys())
SHAPE = (2, 4, 3)


def denoise(x, level):
  """The exact denoiser, for levels [] and [B]."""
  return jax.vmap(exact.denoise)(x, jax.tree.map(lambda a: jnp.broadcast_to(a, x.shape[:1]), level))


def grid_of(logsnr, path=schedules.vp):
  return path.level(jnp.asarray(logsnr, jnp.result_type(float)))


def noise(n=4):
  return jax.random.normal(jax.random.key(0), (n, *SHAPE), jnp.result_type(float))


def solve(sampler, grid, x, denoise=denoise):
  """(x0, calls [B]) from sigma x at the first level."""
  keys = jax.random.split(jax.random.key(0), len(x))
  return jax.jit(lambda x: samplers.solve(adaptive.counted(sampler), denoise, grid.sigma[0] * x, grid, keys))(x)


def truth(grid, x):
  first, last = (jax.tree.map(lambda a, i=i: a[i], grid) for i in (0, -1))
  return exact.denoise(exact.transport(first.sigma * x, first, last), last)


def worst(a, b):
  return float(jnp.abs(a - b).max())


@every_sampler
def test_the_error_follows_the_tolerance(make):
  with jax.enable_x64(True):
    grid, x = grid_of([-10, 10]), noise()
    found = [solve(make(rtol=t, atol=t), grid, x) for t in (1e-3, 1e-5)]
    errors = [worst(x0, truth(grid, x)) for x0, _ in found]
  assert errors[0] < 0.1
  assert errors[1] < 1e-3  # the flow enlarges what each step adds
  assert errors[1] < errors[0] / 10
  assert np.all(found[1][1] > found[0][1])  # it has its price


@every_sampler
def test_all_paths_give_one_sample(make):
  with jax.enable_x64(True):
    ends = [solve(make(), grid_of([-8, 0, 9], path), noise()) for path in schedules.PATHS]
  for x0, calls in ends[1:]:
    np.testing.assert_allclose(x0, ends[0][0], rtol=1e-7, atol=1e-7)
    np.testing.assert_array_equal(calls, ends[0][1])


@every_sampler
def test_it_is_right_from_pure_noise_in_float32(make):
  nothing = Level(*jnp.float32([[-jnp.inf], [0], [1]]))
  grid = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), nothing, grid_of([12.0]))
  x0, calls = solve(make(rtol=1e-4, atol=1e-4), grid, noise())
  assert x0.dtype == jnp.float32
  assert worst(x0, truth(grid, noise())) < 5e-3
  assert np.all(calls < 400)


@every_sampler
def test_a_sample_does_not_see_the_batch(make):
  """Not even the hard samples in it: each has its own steps."""
  x = noise(8).at[1:].multiply(jnp.linspace(0, 4, 7)[:, None, None, None])
  together, calls = solve(make(), grid_of([-8, 8]), x)
  alone, own = solve(make(), grid_of([-8, 8]), x[:1])
  np.testing.assert_allclose(together[:1], alone, atol=1e-5)
  assert calls[0] == own[0]
  assert len(set(calls.tolist())) > 1


@every_sampler
def test_the_calls_are_those_that_it_makes(make):
  count = []

  def counting(x, level):
    jax.debug.callback(lambda: count.append(1))
    return denoise(x, level)

  _, calls = jax.block_until_ready(solve(make(), grid_of([-6, 0, 6]), noise(1), counting))
  jax.effects_barrier()
  assert calls.tolist() == [len(count)]


@every_sampler
def test_the_size_of_a_step_is_remembered_between_levels(make):
  with jax.enable_x64(True):
    few, many = grid_of([-8, 8]), grid_of(np.linspace(-8, 8, 9))
    (_, one), (x0, calls) = (solve(make(rtol=1e-6, atol=1e-6), grid, noise()) for grid in (few, many))
    assert worst(x0, truth(many, noise())) < 1e-4
  assert np.all(calls < 1.5 * one + 9 * 7)  # a start at each level, and one step that its end cuts short


@every_sampler
def test_an_impossible_tolerance_ends(make):
  """float32 cannot meet it: the rest is one step, and the sample is finite and hardly worse."""
  x0, calls = solve(make(rtol=0, atol=1e-12, max_steps=40), grid_of(np.linspace(-6, 6, 5)), noise())
  assert np.all(np.isfinite(x0))
  assert worst(x0, truth(grid_of([-6.0, 6.0]), noise())) < 0.2
  assert np.all(calls <= 4 * (40 * 6 + 1) + 1)  # no attempt costs more than rk45's six


ORDERS = {'rk45': 5, 'dpm_adaptive': 3, 'dpm_adaptive of order 2': 2}


@pytest.mark.parametrize('name', MAKERS)
def test_steps_of_one_size_have_the_order_that_is_claimed(name):
  """With one attempt between the levels of a grid, the sampler is an ordinary one of its order."""
  with jax.enable_x64(True):
    errors = []
    for n in (12, 24):
      logsnr = np.linspace(-3, 3, n + 1)
      if name == 'rk45':  # equal steps of its own coordinate, the angle
        logsnr = 2 * np.log(np.tan(np.linspace(*np.arctan(np.exp(logsnr[[0, -1]] / 2)), n + 1)))
      grid = grid_of(logsnr)
      errors.append(worst(solve(MAKERS[name](max_steps=1), grid, noise())[0], truth(grid, noise())))
  assert np.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[name], abs=0.35), errors


def test_the_pair_of_dormand_and_prince_meets_the_conditions_of_its_orders():
  """Rows sum to their nodes; sum b c^k = 1 / (k + 1) up to order 4 and 5; sum b A c = 1 / 6 (Butcher)."""
  nodes = np.array([0, *adaptive.NODES])
  A = np.array([[0] * 7, *adaptive.STAGES])
  np.testing.assert_allclose(A.sum(1), nodes, atol=1e-14)
  for weights, order in ((A[-1], 5), (np.array(adaptive.FOURTH), 4)):
    for k in range(order):
      assert weights @ nodes ** k == pytest.approx(1 / (k + 1), abs=1e-14)
    assert weights @ A @ nodes == pytest.approx(1 / 6, abs=1e-14)
    assert weights @ A @ A @ nodes == pytest.approx(1 / 24, abs=1e-14)
  assert abs(np.array(adaptive.FOURTH) @ nodes ** 4 - 1 / 5) > 1e-4  # or the pair could not see its error


@every_sampler
def test_guidance_works_at_levels_of_each_sample(make):
  ref = lambda x, level: denoise(x, level) - 0.2 * expand(level.alpha, x)
  guided = guidance.interval(denoise, lambda d: guidance.cfg(d, ref, 2.0), 0.3, 3.0)
  x0, _ = solve(make(), grid_of([-6, 6]), noise(), guided)
  plain, _ = solve(make(), grid_of([-6, 6]), noise())
  assert np.all(np.isfinite(x0))
  assert worst(x0, plain) > 0.05


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: adaptive.rk45(rtol=-1), 'rtol must be finite and at least 0, got -1'),
    (lambda: adaptive.rk45(atol=0), 'atol must be finite and above 0, got 0'),
    (lambda: adaptive.dpm_adaptive(atol=float('nan')), 'atol must be finite and above 0, got nan'),
    (lambda: adaptive.dpm_adaptive(max_steps=0), 'max_steps must be at least 1, got 0'),
    (lambda: adaptive.dpm_adaptive(order=4), 'the order of dpm_adaptive must be 2 or 3, got 4'),
    (lambda: adaptive.counted(samplers.heun()), 'makes 2 calls in each step'),
])
def test_bad_arguments_are_named(make, words):
  with pytest.raises(ValueError, match=words):
    make()
