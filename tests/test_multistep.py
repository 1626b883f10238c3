"""Multistep samplers against other implementations' traces, step by step, and against closed forms."""
import fractions
import functools

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import traces

from diffusion_jax.core import history, multistep, samplers, schedules, solver

NAMES = traces.names('test_multistep')


@pytest.fixture
def in_float64():
  with jax.enable_x64(True):
    yield


float64 = pytest.mark.usefixtures('in_float64')


def traced(x, level):
  return traces.denoiser()(x, level)


@functools.cache
def stepper(make, *args, net=traced, **options):
  """(the sampler, its step, compiled once for every grid)."""
  sampler = make(*args, **options)
  return sampler, jax.jit(lambda x, memory, cur, nxt, z: sampler.step(net, x, memory, cur, nxt, z))


def at(grid, i):
  return jax.tree.map(lambda a: a[i], grid)


def march(sampler, step, x, grid, noise=None, forced=None):
  """x at each level after the first; with `forced` [N, ...] each step starts from there instead."""
  n, path = len(grid.logsnr), []
  memory, z = sampler.init(x, n), jnp.zeros_like(x)
  for i in range(n - 1):
    x = x if forced is None else jnp.asarray(forced[i])
    x, memory = step(x, memory, at(grid, i), at(grid, i + 1), z if noise is None else noise[i])
    path.append(x)
  return path


def recipe(name):
  """(our sampler for a trace, its last level where it ends above sigma = 0, the calls inside our steps)."""
  settings, ac = traces.index()[name], traces.common()['alphas_cumprod/linear']
  config = settings['config']
  if name.startswith('pndm'):
    if config.get('skip_prk_steps'):  # the last step goes to timestep 0 from `steps_offset`
      ac = traces.common()['alphas_cumprod/scaled_linear']
      made = stepper(multistep.plms, of='v' if config.get('prediction_type') == 'v_prediction' else 'eps')
      inside = [1]
    else:
      made, inside = stepper(multistep.pndm, halved=True), [1, 3, 5, 7, 9, 11]
    return made, (np.sqrt(ac[0]), np.sqrt(1 - ac[0])), inside
  to_data = config.get('final_sigmas_type', 'zero') == 'zero'
  sigma = traces.trace(name)['sigmas'][-1]
  last = None if to_data else (1 / np.hypot(1, sigma), sigma / np.hypot(1, sigma))
  lowered = config.get('lower_order_final', True)
  if name.startswith('unipc'):
    final = (2 if to_data else 1) if lowered else 3
    made = stepper(multistep.unipc, config['solver_order'], config.get('solver_type', 'bh2'), final_order=final)
  else:
    make = {'dpmsolver++': multistep.dpmpp, 'dpmsolver': multistep.dpm_solver, 'sde-dpmsolver++': multistep.dpmpp_sde}
    final = (2 if to_data else 1) if lowered and settings['num_inference_steps'] < 15 else 3
    made = stepper(make[config.get('algorithm_type', 'dpmsolver++')], config['solver_order'],
                   config.get('solver_type', 'midpoint'), final)
  return made, last, []


@float64
@pytest.mark.parametrize('name', NAMES)
def test_trace(name):
  """Each step from the recorded state and history, and a run of our own, both to 1e-5."""
  recorded, (made, last, inside) = traces.trace(name), recipe(name)
  calls = [i for i in range(len(recorded['a'])) if i not in inside]
  a, b = recorded['a'][calls], recorded['b'][calls]
  xs = np.concatenate([recorded['xs'][calls], recorded['xs'][-1:]])
  if last is not None:
    a, b = np.append(a, last[0]), np.append(b, last[1])
  grid, (sampler, _) = traces.level(a, b), made
  assert len(recorded['a']) == sampler.nfe(len(a)) - (last is not None)
  for forced in (xs, None):
    path = march(*made, jnp.asarray(xs[0]), grid, traces.common()['noise'], forced)
    if last is None:
      path.append(traced(path[-1] if forced is None else jnp.asarray(xs[-2]), at(grid, -1)))
    errors = [traces.relative_error(got, wanted) for got, wanted in zip(path, xs[1:], strict=True)]
    assert max(errors) < 1e-5, errors


@float64
def test_bh1_reaches_data():
  """diffusers' UniPC with B(h) = h gives NaN where the last sigma is 0: its last step multiplies h = inf by 0.

  Here the last call's x0 is that step, in which B(h) has no part. bh1 and bh2 then agree as their order says.
  """
  recorded = traces.trace('unipc/order3/bh2')
  grid, ends = traces.level(recorded['a'], recorded['b']), []
  for variant in ('bh1', 'bh2'):
    x = march(*stepper(multistep.unipc, 3, variant), jnp.asarray(recorded['xs'][0]), grid)[-1]
    ends.append(traced(x, at(grid, -1)))
  assert np.all(np.isfinite(ends[0]))
  np.testing.assert_allclose(ends[0], ends[1], atol=0.05)


def grid_of(num_steps, path='vp', low=-5.0, high=5.0, power=1.0):
  process = schedules.on_path(schedules.cosine_continuous(low, high), path)
  return process.path.level(jnp.asarray(low + (high - low) * np.linspace(0, 1, num_steps + 1) ** power))


# (sampler, order, its grid's power): a power of 3 starts so finely that the first steps' lower order does not show.
ORDERS = [
    (multistep.dpmpp, (1,), 1, 1), (multistep.dpmpp, (2, 'heun'), 2, 1), (multistep.dpmpp, (3, 'exact'), 3, 1),
    (multistep.dpm_solver, (1,), 1, 1), (multistep.dpm_solver, (3,), 2, 1), (multistep.dpm_solver, (3, 'exact'), 3, 1),
    (multistep.dpmpp_3m, (), 2, 1), (multistep.deis, (2,), 2, 1),
    (multistep.unipc, (1, 'bh1'), 2, 1), (multistep.unipc, (1, 'bh2'), 2, 1), (multistep.unipc, (2, 'bh1'), 3, 1),
    (multistep.unipc, (3,), 4, 1), (multistep.unipc, (3, 'bh2', False), 3, 1),
    (multistep.lms, (2,), 2, 1), (multistep.lms, (3,), 3, 1), (multistep.lms, (4,), 4, 3),
    # eps = alpha v + sigma x needs v and x of one level: a mean of v over levels is of first order only.
    (multistep.plms, ('v',), 1, 1), (multistep.pndm, ('v',), 1, 1),
]


@float64
@pytest.mark.parametrize(('make', 'args', 'order', 'power'), ORDERS)
def test_order_of_convergence(make, args, order, power):
  """Halving the step divides the error by 2^order; of the defaults, see tests/orders.py. A corrector adds one order."""
  made, steps, errors = stepper(make, *args, net=exact.denoise), (80, 160), []
  for n in steps:
    grid = grid_of(n, power=power)
    first, last = at(grid, 0), at(grid, -1)
    x = first.sigma * jax.random.normal(jax.random.key(0), (4, 2, 2, 3))
    errors.append(float(jnp.sqrt(jnp.mean((march(*made, x, grid)[-1] - exact.transport(x, first, last)) ** 2))))
  assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3), errors


def of_level(of, coordinate, power):
  """A denoiser whose x0 or eps is a power of a coordinate of the level, and the exact step of the ODE under it."""

  def place(level):
    return level.logsnr / 2 if coordinate == 'lam' else level.sigma / level.alpha

  def denoise(x, level):
    value = place(level) ** power * jnp.ones_like(x)
    return value if of == 'x0' else (x - level.sigma * value) / level.alpha

  def exact_step(x, cur, nxt):
    u, du = np.polynomial.legendre.leggauss(40)
    lam = (nxt.logsnr + cur.logsnr) / 4 + u * (nxt.logsnr - cur.logsnr) / 4
    value = lam ** power if coordinate == 'lam' else np.exp(-lam) ** power
    du = du * (nxt.logsnr - cur.logsnr) / 4
    if of == 'x0':
      return nxt.sigma / cur.sigma * x + nxt.sigma * np.sum(du * np.exp(lam) * value)
    return nxt.alpha / cur.alpha * x - nxt.alpha * np.sum(du * np.exp(-lam) * value)

  return denoise, exact_step


@float64
@pytest.mark.parametrize(('sampler', 'of', 'coordinate', 'degree'), [
    (multistep.dpmpp(1), 'x0', 'lam', 0), (multistep.dpmpp(2, 'heun'), 'x0', 'lam', 1),
    (multistep.dpmpp(3, 'exact'), 'x0', 'lam', 2), (multistep.unipc(3, corrector=False), 'x0', 'lam', 2),
    (multistep.dpmpp(3), 'x0', 'lam', 1),  # as published: half of the second difference's integral
    (multistep.dpm_solver(2, 'heun'), 'eps', 'lam', 1), (multistep.dpm_solver(3), 'eps', 'lam', 1),
    (multistep.deis(2), 'eps', 'lam', 1), (multistep.deis(3), 'eps', 'lam', 2),
    (multistep.lms(1), 'eps', 'rho', 0), (multistep.lms(2), 'eps', 'rho', 1), (multistep.lms(3), 'eps', 'rho', 2),
    (multistep.lms(4), 'eps', 'rho', 3)])
def test_polynomials_are_integrated_exactly(sampler, of, coordinate, degree):
  """With its history full a step is exact up to a degree, on steps of different lengths, and not beyond it."""
  for power in range(degree + 2):
    denoise, exact_step = of_level(of, coordinate, power)
    grid, x = grid_of(6, 'flow', -2, 3, power=1.3), jnp.ones((1, 1, 1))
    memory = sampler.init(x, 7)
    for i in range(6):
      wanted = exact_step(x, at(grid, i), at(grid, i + 1))
      got, memory = sampler.step(denoise, x, memory, at(grid, i), at(grid, i + 1), x)
      x = wanted
    assert (abs(float((got - wanted).squeeze())) < 1e-13) == (power <= degree), (power, got, wanted)


@float64
@pytest.mark.parametrize(('one', 'other'), [
    (multistep.dpmpp(1), samplers.ddim()), (multistep.dpm_solver(1), samplers.ddim()),
    (multistep.deis(1), samplers.ddim()), (multistep.lms(1), samplers.ddim()),
    (multistep.unipc(1, corrector=False), samplers.ddim()), (multistep.dpmpp_2m(), multistep.dpmpp(2)),
    (multistep.dpmpp_sde(1), samplers.ancestral()), (multistep.dpmpp_sde(3, eta=0.0), multistep.dpmpp_3m()),
    (multistep.unipc(2, corrector=False), multistep.dpmpp(2)),
    (multistep.unipc(3, uncorrected=9), multistep.unipc(3, corrector=False)),
    (multistep.dpm_solver(2, 'heun'), multistep.deis(2)), (multistep.dpm_solver(3, 'exact'), multistep.deis(3)),
    (multistep.dpmpp(3, final_order=2), multistep.dpmpp(3)), (multistep.unipc(2, final_order=1), multistep.unipc(2))])
def test_members_that_are_one_method(one, other):
  """On every path, and to the last step but one where the orders of the last differ."""
  for path in schedules.PATHS:
    grid = grid_of(7, path.name, power=1.2)
    x = at(grid, 0).sigma * traces.common()['x_init']
    z = traces.common()['noise']
    ends = [march(s, functools.partial(s.step, traced), x, grid, z) for s in (one, other)]
    np.testing.assert_allclose(ends[0][:-1], ends[1][:-1], rtol=1e-10, atol=1e-10)


@float64
def test_final_order():
  """Its last step is of order 1, that is DDIM's, from where the steps before it led."""
  grid, x = grid_of(6), traces.common()['x_init']
  for sampler in (multistep.dpmpp(3, final_order=1), multistep.deis(final_order=1)):
    *_, before, end = march(sampler, functools.partial(sampler.step, traced), x, grid)
    last = solver.transfer(before, traced(before, at(grid, -2)), at(grid, -2), at(grid, -1))
    np.testing.assert_allclose(end, last, rtol=1e-12)


@float64
def test_adams_bashforth():
  """At equal steps the weights are the classical ones: (55, -59, 37, -9) / 24, and the lower orders' at the start."""
  nodes = -jnp.arange(1.0, 4.0)
  for known, wanted in enumerate(('0 0 0', '-1/2 0 0', '-16/12 5/12 0', '-59/24 37/24 -9/24')):
    got = history.adams(nodes, jnp.arange(3) < known)
    np.testing.assert_allclose(got, [float(fractions.Fraction(w)) for w in wanted.split()], atol=1e-14)


# Those that differ from their defaults: test_samplers.py starts every default from pure noise.
KINDS = [multistep.dpmpp_sde(3, 'heun'), multistep.unipc(1, 'bh1'), multistep.pndm('v', halved=True)]


@pytest.mark.parametrize('sampler', KINDS)
def test_finite_from_pure_noise(sampler):
  """From alpha = 0, in float32, for five steps; its derivatives too, along x and the levels after the first."""
  x, logsnr = jax.random.normal(jax.random.key(0), (1, 2, 1, 1)), jnp.linspace(-6.0, 8.0, 5)
  first = schedules.Level(*(jnp.asarray([a]) for a in (-jnp.inf, 0.0, 1.0)))

  def path(x, logsnr):
    grid = jax.tree.map(lambda *a: jnp.concatenate(a), first, schedules.flow.level(logsnr))
    return march(sampler, functools.partial(sampler.step, exact.denoise), x, grid)

  values, slopes = jax.jvp(path, (x, logsnr), (jnp.ones_like(x), jnp.ones_like(logsnr)))
  assert np.all(np.isfinite(values))
  assert np.all(np.isfinite(slopes))


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: multistep.dpmpp(4), 'order must be 1, 2 or 3, got 4'),
    (lambda: multistep.dpmpp(2, 'middle'), "kind must be one of midpoint, heun, exact, got 'middle'"),
    (lambda: multistep.dpmpp(3, final_order=0), 'final_order must be 1, 2 or 3, got 0'),
    (lambda: multistep.dpmpp_sde(eta=2), r'eta must lie in \[0, 1\], got 2'),
    (lambda: multistep.deis(0), 'order must be 1, 2 or 3, got 0'),
    (lambda: multistep.unipc(4), 'order must be 1, 2 or 3, got 4'),
    (lambda: multistep.unipc(2, 'bh3'), "variant must be one of bh1, bh2, got 'bh3'"),
    (lambda: multistep.unipc(uncorrected=-1), 'uncorrected must be at least 0, got -1'),
    (lambda: multistep.lms(5), 'order must be 1, 2, 3 or 4, got 5'),
    (lambda: multistep.plms('x0'), "of must be one of eps, v, got 'x0'")])
def test_bad_arguments_are_named(make, words):
  with pytest.raises(ValueError, match=words):
    make()
