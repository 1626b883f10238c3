"""Laws of training draws: each agrees with its density, and `importance` leaves the objective what it is."""
import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import draws, levels, schedules

DRAWS = {name: getattr(levels, name)() for name in levels.DRAWS}
CHAIN = schedules.linear(200)
PROCESSES = {'chain': CHAIN, 'cosine': schedules.cosine_continuous(), 'flow': schedules.rectified_flow()}
NOT_OF_TIME = {'lognormal'}  # beyond the process's ends, and between a chain's steps
every_draw = pytest.mark.parametrize('name', DRAWS)
every_process = pytest.mark.parametrize('process', PROCESSES.values(), ids=PROCESSES.keys())
# Each program runs once or twice: optimising it would take longer than all the rest.
quick = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
uneven = lambda t: 0.1 + t ** 2  # losses of very different size along time


def taught(draw, process):
  """The state after a full history at every step (or bin) of time; () of a draw that keeps none."""
  cells = process.num_steps or 128
  place = jnp.tile(jnp.arange(cells), 10)
  t = place / (cells - 1) if process.num_steps else (place + 0.5) / cells
  return draw.update(draw.init(process), process.level(t), uneven((place + 0.5) / cells), process)


def places(process):
  """logsnr rising [n], and the logsnr [n] that each stands for: a chain's own steps, or a fine grid."""
  noise, data = schedules.evaluate(process, np.array([1.0, 0.0]))
  if not process.num_steps:
    logsnr = np.linspace(noise - 20, data + 20, 40_001)
    return logsnr, np.full(len(logsnr), logsnr[1] - logsnr[0])
  logsnr = schedules.evaluate(process, np.linspace(1, 0, process.num_steps))
  near = np.pad(logsnr, 1, mode='edge')
  return logsnr, (near[2:] - near[:-2]) / np.r_[1, np.full(len(logsnr) - 2, 2), 1]


@every_process
@every_draw
def test_draws_agree_with_their_density(name, process):
  """The density integrates to 1, and Kolmogorov and Smirnov cannot tell the draws from it at the 0.1 % level."""
  draw, count = DRAWS[name], 8192
  if name in NOT_OF_TIME and process.num_steps:
    process = PROCESSES['cosine']
  logsnr, width = places(process)

  @quick
  def everything(key):
    state = taught(draw, process)
    return draw.sample(key, count, process, None, state), draw.density(jnp.asarray(logsnr), process, None, state)

  (level, correction), density = jax.tree.map(np.asarray, everything(jax.random.key(7)))
  share = np.cumsum(density.astype(np.float64) * width)
  assert share[-1] == pytest.approx(1, abs=2e-3)
  assert level.logsnr.shape == level.alpha.shape == level.sigma.shape == correction.shape == (count,)
  # A chain's steps are atoms: share is compared at each of them, with a margin for their rounding.
  found = np.searchsorted(np.sort(level.logsnr), logsnr + 1e-4 * bool(process.num_steps), side='right') / count
  assert np.max(np.abs(found - share)) < 1.95 / np.sqrt(count) + 1e-3
  if name in NOT_OF_TIME:
    return
  noise, data = schedules.evaluate(process, np.array([1.0, 0.0]))
  assert level.logsnr.min() >= noise - 1e-4 and level.logsnr.max() <= data + 1e-4
  assert np.all(density[(logsnr < noise - 1) | (logsnr > data + 1)] == 0)
  if process.num_steps:
    assert np.abs(level.logsnr[:, None] - logsnr).min(1).max() < 1e-4  # at the chain's own steps


@every_draw
def test_a_draw_is_called_without_a_state(name):
  """draw(key, batch, process, params) is what is drawn before any loss is known: a function of the key."""
  draw, key = DRAWS[name], jax.random.key(1)
  call = quick(lambda key: (draw(key, 64, CHAIN), draw.sample(key, 64, CHAIN, None, draw.init(CHAIN))[0]))
  level, sampled = call(key)
  np.testing.assert_allclose(level.logsnr, sampled.logsnr, atol=1e-5)
  assert not np.array_equal(level.logsnr, call(jax.random.key(2))[0].logsnr)
  np.testing.assert_allclose(level.alpha ** 2 + level.sigma ** 2, 1, rtol=1e-5)


@every_draw
def test_draws_end_in_zero_terminal_snr(name):
  """Where alpha is 0 at t = 1, nothing drawn and no density is NaN."""
  process = schedules.Process(lambda t, params=None: 2 * (jnp.log1p(-t) - jnp.log(t + 1e-4)),
                              lambda l, params=None: (1 - 1e-4 * jnp.exp(l / 2)) / (1 + jnp.exp(l / 2)), schedules.flow)
  draw = DRAWS[name]
  state = draw.init(process)
  level, correction = quick(lambda key: draw.sample(key, 1024, process, None, state))(jax.random.key(0))
  assert np.all(np.isfinite(level.alpha)) and np.all(np.isfinite(level.sigma)) and np.all(np.isfinite(correction))
  density = quick(lambda l: draw.density(l, process, None, state))(jnp.asarray([-jnp.inf, -8.0, 0.0, 8.0]))
  assert np.all(np.isfinite(density)) and density[2] > 0


@pytest.mark.parametrize('name', ['low_discrepancy', 'stratified'])
def test_even_draws_have_less_variance(name):
  """The variance of a batch's mean of t, against independent times' 1 / (12 B)."""
  process, keys = PROCESSES['cosine'], jax.random.split(jax.random.key(5), 256)
  draw = lambda key: process.time(DRAWS[name](key, 64, process, None).logsnr, None)
  t = np.asarray(quick(jax.vmap(draw))(keys))
  assert t.mean(1).var() < 0.02 / (12 * 64)
  edges = np.clip(np.sort(t, axis=1) * 64 - np.arange(64), -0.01, 1.01)
  assert np.all((edges > -0.005) & (edges < 1.005))  # one time in each of 64 equal parts


@pytest.mark.parametrize('process', [CHAIN, PROCESSES['flow']], ids=['chain', 'flow'])
def test_importance_is_unbiased_and_calmer(process):
  """The corrected loss has the uniform mean, and the variance that eq. 18 is there to lower."""
  draw = levels.importance()
  sample = quick(lambda key: draw.sample(key, 1 << 16, process, None, taught(draw, process)))
  level, correction = sample(jax.random.key(11))
  t = np.asarray(process.time(level.logsnr, None), np.float64)
  cells = process.num_steps
  exact = np.arange(cells) / (cells - 1) if cells else (np.arange(4096) + 0.5) / 4096
  corrected = uneven(t) * np.asarray(correction)
  error = corrected.std() / np.sqrt(len(t))
  assert abs(corrected.mean() - uneven(exact).mean()) < 4 * error + 1e-3
  assert corrected.var() < 0.02 * uneven(exact).var()


def test_importance_follows_the_square_root_of_the_second_moment():
  """p proportional to sqrt(E[L^2]) over a full history, and uniform, with correction 1, before."""
  draw, process = levels.importance(history=2, mix=1e-6), schedules.linear(4)
  every = process.level(jnp.linspace(0, 1, 4))
  update = quick(lambda state, losses: draw.update(state, every, losses, process))
  sample = quick(lambda state: draw.sample(jax.random.key(0), 4096, process, None, state))
  state = draw.init(process)
  for losses in ([1.0, 3.0, 0.0, 2.0], [7.0, 3.0, 2.0, 2.0]):
    np.testing.assert_allclose(sample(state)[1], 1, rtol=1e-6)
    state = update(state, jnp.asarray(losses))
  size = np.sqrt([25.0, 9.0, 2.0, 4.0])
  level, correction = sample(state)
  step = np.round(3 * np.asarray(process.time(level.logsnr, None))).astype(int)
  np.testing.assert_allclose(correction, (size.sum() / 4 / size)[step], rtol=1e-4)
  np.testing.assert_allclose(np.bincount(step) / 4096, size / size.sum(), atol=0.03)


def test_importance_survives_losses_of_zero():
  state = {'losses': jnp.zeros((4, 2)), 'count': jnp.full(4, 2)}
  np.testing.assert_array_equal(quick(lambda state: draws.probabilities(state, 0.1))(state), 0.25)


def test_a_history_keeps_the_last_losses_of_each_step():
  """Against a deque for each bin, with batches that hold many losses of one bin."""
  rng, bins, history = np.random.default_rng(0), 5, 3
  kept = [collections.deque(maxlen=history) for _ in range(bins)]
  state = {'losses': jnp.zeros((bins, history)), 'count': jnp.zeros(bins, jnp.int32)}
  remember = quick(draws.remember)
  for _ in range(40):
    places = rng.choice(bins, 16, p=[0.6, 0.2, 0.1, 0.09, 0.01])
    losses = rng.random(16).astype(np.float32)
    state = remember(state, jnp.asarray(places), jnp.asarray(losses))
    for place, loss in zip(places, losses, strict=True):
      kept[place].append(loss)
    for row, count, wanted in zip(state['losses'], state['count'], kept, strict=True):
      full = len(wanted) == history
      assert sorted(np.asarray(row)[:history if full else len(wanted)].tolist()) == sorted(map(float, wanted))
      assert (count >= history) == full and count < 2 * history + 16


def test_draws_keep_the_gradient_of_a_learned_schedule():
  """A trainable schedule learns from where its levels fall."""
  process = schedules.Process(lambda t, params: params * (1 - 2 * t), lambda l, params: (1 - l / params) / 2)
  for draw in (DRAWS[name] for name in DRAWS if name not in NOT_OF_TIME):
    spread = lambda p, draw=draw: draw(jax.random.key(0), 64, process, p).logsnr.var()
    assert quick(jax.grad(spread))(8.0) > 1


@pytest.mark.parametrize(('make', 'message'), [
    (lambda: levels.lognormal(std=0), 'std must be above 0, got 0'),
    (lambda: levels.logit_normal(std=-1.0), 'std must be above 0, got -1.0'),
    (lambda: levels.importance(history=0), 'history must be at least 1 loss, got 0'),
    (lambda: levels.importance(mix=0), r'mix must lie in \(0, 1\], got 0'),
    (lambda: levels.importance(bins=0), 'bins must be at least 1, got 0')])
def test_bad_input_is_named(make, message):
  with pytest.raises(ValueError, match=message):
    make()
