"""Laws of every loss weight, published formulas, and the variational bound."""
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import diffusion, levels, likelihood, losses, schedules, targets
from diffusion_jax.core.schedules import Process

TARGETS = {name: getattr(targets, name)() for name in targets.__all__}
WEIGHTS = {name: getattr(losses, name)() for name in losses.__all__}
every_weight = pytest.mark.parametrize('name', losses.__all__)
LOGSNR = np.array([-12.0, -3.0, 0.0, 1.0, 4.0, 12.0])
SNR = np.exp(LOGSNR)


def straight(low=-6.0, high=6.0):
  """logsnr linear in t: the simplest schedule."""
  return Process(lambda t, params=None: high + t * (low - high), lambda l, params=None: (l - high) / (low - high))


def to_nothing(num_steps=0):
  """alpha = 1 - t: a schedule that ends without any signal, logsnr = -inf."""
  return Process(lambda t, params=None: jnp.log(1 - t) * 2 - jnp.log(t + 0.01) * 2,
                 lambda l, params=None: (1 - 0.01 * jnp.exp(l / 2)) / (1 + jnp.exp(l / 2)), num_steps=num_steps)


def params_of(weight):
  return weight.init(jax.random.key(0))


def without_bound(weight):
  return replace(weight, bound=None)


@pytest.fixture(scope='module')
def losses_of_a_known_error():
  """{(process, weight, target): losses}, {(process, weight): weight * error^2} where x0 is wrong by 0.1 everywhere."""
  x0, eps = jax.random.normal(jax.random.key(1), (2, 8, 4, 4, 1))
  t = jnp.arange(8) / 7

  def run(process):
    def net_of(target):
      def net(c_x, noise):
        level = process.path.level(-2 * noise)
        c_in, c_skip, c_out = (c.reshape(-1, 1, 1, 1) for c in targets.on(target, process).coeffs(level))
        return (x0 + 0.1 - c_skip * (c_x / c_in)) / c_out
      return net

    level, found, expected = process.level(t), {}, {}
    for name, weight in WEIGHTS.items():
      expected[name] = weight(level, process) * 0.01
      for target_name, target in TARGETS.items():
        model = diffusion.Diffusion(process, target, diffusion.log_sigma(1.0))
        found[name, target_name] = diffusion.loss(net_of(target), x0, eps, level, model, without_bound(weight), None,
                                                  params_of(weight))
    return found, expected

  chain_of_8 = replace(schedules.cosine_continuous(-4, 4), num_steps=8)
  return [jax.jit(lambda p=p: run(p))() for p in (schedules.cosine_continuous(-4, 4), chain_of_8)]


@every_weight
def test_loss_does_not_depend_on_the_target(losses_of_a_known_error, name):
  """One weight, one loss: the error of x0 alone counts, in continuous time and in a chain."""
  for found, expected in losses_of_a_known_error:
    for target in TARGETS:
      np.testing.assert_allclose(found[name, target], expected[name], rtol=2e-3, err_msg=target)


def test_zero_predictor_of_eps_loses_one():
  """E|eps|^2 = 1 per element; the mean of n squares of a normal has standard error sqrt(2 / n)."""
  x0, eps = jax.random.normal(jax.random.key(0), (2, 512, 8, 8, 3))
  model = diffusion.Diffusion(schedules.linear(), targets.eps(), diffusion.timestep())
  level = levels.uniform()(jax.random.key(1), len(x0), model.process, None)
  value = diffusion.loss(lambda x, noise: jnp.zeros_like(x), x0, eps, level, model, losses.simple())
  assert abs(float(value.mean()) - 1) < 3 * np.sqrt(2 / x0.size)


def test_exact_denoiser_of_a_normal_reaches_the_closed_form():
  """For x0 ~ N(0, s^2), E|x0 - E[x0|x]|^2 = s^2 sigma^2 / (alpha^2 s^2 + sigma^2), times any weight."""
  s, process = 0.5, schedules.cosine_continuous(-6, 6)
  x0, eps = jax.random.normal(jax.random.key(0), (2, 2048, 8, 8, 1))
  level = process.level(jnp.linspace(0, 1, len(x0)))

  def net(x, noise):
    level = process.path.level(-2 * noise)
    a, b = (c[:, None, None, None] for c in (level.alpha, level.sigma))
    return a * s ** 2 / (a ** 2 * s ** 2 + b ** 2) * x

  model = diffusion.Diffusion(process, targets.x0(), diffusion.log_sigma(1.0))
  error = s ** 2 * level.sigma ** 2 / (level.alpha ** 2 * s ** 2 + level.sigma ** 2)

  @jax.jit
  def ratios():
    return {name: diffusion.loss(net, s * x0, eps, level, model, without_bound(weight), None, params_of(weight))
            / (weight(level, process) * error) for name, weight in WEIGHTS.items()}

  for name, ratio in ratios().items():  # means of x0.size squares of a normal
    assert abs(float(ratio.mean()) - 1) < 4 * np.sqrt(2 / x0.size), name


PUBLISHED = {
    # In the words of each paper, in float64 numpy, turned to the x0 error by |eps error|^2 = SNR |x0 error|^2.
    'simple': (losses.simple(), lambda snr: snr * 1),
    'truncated SNR': (losses.snr(minimum=1), lambda snr: np.maximum(snr, 1)),
    'SNR + 1': (losses.snr(plus=1), lambda snr: snr + 1),
    'min-SNR-5, on eps': (losses.min_snr(), lambda snr: snr * np.minimum(5 / snr, 1)),
    'min-SNR-5, on v': (losses.min_snr(5), lambda snr: (snr + 1) * np.minimum(snr, 5) / (snr + 1)),
    'soft min-SNR of sigma': (losses.soft_min_snr(4), lambda snr: 1 / (1 / snr + 1 / 4)),
    'P2, on eps': (losses.p2(1, 0.5), lambda snr: snr / (1 + snr) ** 0.5),
    'sigmoid, on eps': (losses.sigmoid(2), lambda snr: snr / (1 + np.exp(np.log(snr) - 2))),
    'EDM, of sigma': (losses.edm(0.5), lambda snr: (1 / snr + 0.25) * snr / 0.25),
    'an error of the velocity, sigma times that on a flow': (losses.velocity(), lambda snr: (1 + snr ** 0.5) ** 2),
    'hybrid without its bound': (losses.hybrid(), lambda snr: snr * 1),
    'learned uncertainty, the base': (losses.learned_uncertainty(), lambda snr: snr + 4),
}


@pytest.mark.parametrize(('weight', 'formula'), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_formulas(weight, formula):
  np.testing.assert_allclose(weight(schedules.vp.level(jnp.asarray(LOGSNR))), formula(SNR), rtol=1e-5)


@pytest.mark.parametrize(('weight', 'target'), [(losses.simple(), 'eps'), (losses.snr(plus=1), 'v'),
                                                (losses.edm(0.5), 'edm'), (losses.velocity(), 'velocity')])
def test_some_weights_count_the_networks_error_alike(weight, target):
  level = schedules.vp.level(jnp.asarray(LOGSNR[1:-1]))
  np.testing.assert_allclose(weight(level) * TARGETS[target].coeffs(level)[2] ** 2, 1, rtol=1e-5)


@every_weight
def test_weights_are_finite_at_both_ends(name):
  """Also where no signal is left; and so is the loss of every target that is defined there."""
  weight, x = WEIGHTS[name], jnp.ones((9, 2, 2, 1))
  for process in (to_nothing(), to_nothing(9), straight(-60, 30), schedules.linear(), schedules.rectified_flow()):
    level = process.level(jnp.arange(9) / 8)
    value = weight(level, process)
    assert np.isfinite(value).all() and (value >= 0).all() and value.shape == (9,)
    for target in ('x0', 'v', 'velocity', 'edm'):
      model = diffusion.Diffusion(process, TARGETS[target], lambda *_: jnp.zeros(9))
      loss = diffusion.loss(lambda x, noise: 0 * x, x, x, level, model, without_bound(weight), None, params_of(weight))
      assert np.isfinite(loss).all(), target
  assert float(weight(process.level(jnp.asarray(0.5)), process)) > 0


def test_vlb_is_the_kl_of_every_reverse_step():
  """Ho et al. 2020, eqs. 6 to 8, from the betas: the KL of two normals of the posterior's variance, T times."""
  with jax.enable_x64(True):
    process = schedules.linear(50)
    value = np.asarray(losses.vlb()(process.level(jnp.arange(50) / 49), process))
  beta = schedules.betas(process, 50)
  bar = np.cumprod(1 - beta)
  before = np.r_[1, bar[:-1]]
  posterior = (1 - before) / (1 - bar) * beta
  kl = (np.sqrt(before) * beta / (1 - bar)) ** 2 / (2 * np.where(posterior, posterior, 1))
  np.testing.assert_allclose(value[1:], 50 * kl[1:], rtol=1e-9)
  snr = bar / (1 - bar)
  np.testing.assert_allclose(value[0], 50 * snr[0] / 2, rtol=1e-9)
  np.testing.assert_allclose(value[1:].sum() / 50, (snr[0] - snr[-1]) / 2, rtol=1e-9)  # it telescopes


def test_vlb_of_a_chain_tends_to_that_of_continuous_time():
  process = schedules.cosine_continuous(-6, 6)
  with jax.enable_x64(True):
    t = jnp.linspace(0.1, 0.9, 9)
    level = process.level(t)
    limit = losses.vlb()(level, process)
    h = 1e-6
    snr = lambda t: jnp.exp(process.logsnr(t, None))
    np.testing.assert_allclose(limit, (snr(t - h) - snr(t + h)) / (4 * h), rtol=1e-6)
    off = [np.abs(losses.vlb()(level, replace(process, num_steps=n)) / limit - 1).max() for n in (101, 1001)]
  assert off[1] < 0.02
  assert off[0] / off[1] == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize('process', [schedules.cosine_continuous(), schedules.rectified_flow(), straight()])
def test_the_bounds_agree_in_continuous_time(process):
  """-1/2 dSNR/dt is g^2 / 2 of the score and the eps weight 1/2 over logsnr (Kingma et al. 2021, section 4)."""
  level = process.level(jnp.linspace(0.01, 0.99, 7))
  for weight in (losses.likelihood(), losses.over_logsnr(losses.simple())):
    np.testing.assert_allclose(weight(level, process), losses.vlb()(level, process), rtol=1e-5)


INVARIANT = {'vlb': losses.vlb(), 'likelihood': losses.likelihood()}
INVARIANT |= {f'over_logsnr({name})': losses.over_logsnr(name) for name, weight in WEIGHTS.items()
              if name != 'over_logsnr' and not weight.ends}


@pytest.mark.parametrize('weight', INVARIANT.values(), ids=INVARIANT.keys())
def test_invariant_weights_depend_on_the_schedules_ends_alone(weight):
  """The mean over t of weight * error for an error that depends on the level, under two schedules."""
  def mean(process):
    level = process.level((jnp.arange(4000) + 0.5) / 4000)
    return float(jnp.mean(weight(level, process) / (1 + jnp.exp(level.logsnr))))

  assert mean(schedules.cosine_continuous(-5, 5)) == pytest.approx(mean(straight(-5, 5)), rel=1e-3)


def test_vlb_teaches_a_learned_schedule_where_the_chain_is_coarse():
  """Its gradient is that of the bound: zero on average in continuous time, and in a chain the finite difference."""
  def process(num_steps):
    logsnr = lambda t, p: 5 - 10 * (t + p * t * (1 - t))
    def time(l, p):  # the root of 5 - 10 (t + p t (1 - t)) = l in [0, 1]
      u = (5 - l) / 10
      return 2 * u / (1 + p + jnp.sqrt((1 + p) ** 2 - 4 * p * u))
    return Process(logsnr, time, num_steps=num_steps)

  def mean(p, num_steps, count):
    chosen = process(num_steps)
    steps = jnp.arange(1, count) if num_steps else jnp.arange(count) + 0.5
    level = chosen.level(steps / (num_steps - 1 if num_steps else count), p)
    return jnp.mean(losses.vlb()(level, chosen, p) / (1 + jnp.exp(level.logsnr)))  # of a normal's exact denoiser

  with jax.enable_x64(True):
    gradient = jax.jit(jax.grad(mean), static_argnums=(1, 2))
    assert abs(gradient(0.2, 0, 2000)) < 1e-5 * mean(0.2, 0, 2000)
    coarse = gradient(0.2, 5, 5)
    assert abs(coarse) > 1e-2
    np.testing.assert_allclose(coarse, (mean(0.2 + 1e-5, 5, 5) - mean(0.2 - 1e-5, 5, 5)) / 2e-5, rtol=1e-5)


def test_a_learned_schedule_pays_for_its_ends():
  """With the exact denoiser of a normal the three terms are the continuous bound of `likelihood`, up to its decoder,
  and their gradient leads the ends towards where that bound is low."""
  process = schedules.learned(-2.0, 4.0, hidden=4)
  params = process.init(jax.random.key(0))
  x0 = jnp.round(0.3 * jax.random.normal(jax.random.key(1), (512, 8, 1)) * 127.5 + 127.5) / 127.5 - 1
  x0, eps = jnp.clip(x0, -1, 1), jax.random.normal(jax.random.key(2), x0.shape)
  model = diffusion.Diffusion(process, targets.x0(), diffusion.log_sigma(1.0))
  t = (jnp.arange(512) + 0.5) / 512

  def mean(params):
    def net(x, noise):
      a, b = (c[:, None, None] for c in process.path.scales(-2 * noise))
      return a * 0.09 / (a ** 2 * 0.09 + b ** 2) * x
    return diffusion.loss(net, x0, eps, process.level(t, params), model, losses.vlb(), params).mean()

  value, slope = jax.jit(jax.value_and_grad(mean))(params)
  denoise = lambda x, level: jnp.reshape(level.alpha * 0.09 / (level.alpha ** 2 * 0.09 + level.sigma ** 2),
                                         (-1, 1, 1)) * x
  bound = jax.jit(lambda x0: likelihood.continuous_vlb(denoise, process, x0, jax.random.key(3), params).bits.mean())(x0)
  assert float(value) == pytest.approx(float(bound) * math.log(2), rel=0.02)
  # 6 nats of logsnr are too few for data of 256 values: more signal at t = 0 pays, and so does more noise at t = 1.
  assert slope['logsnr_max'] < 0 and slope['span'] < 0


def test_learned_uncertainty_learns_the_log_of_the_loss():
  """The least of L exp(-u) + u is 1 + log L, at u = log L: u comes near it at every level."""
  weight = losses.learned_uncertainty()
  level = schedules.vp.level(jnp.linspace(-8, 8, 33))
  loss = jnp.exp(0.3 * level.logsnr)

  def total(own):
    u = weight.uncertainty(level, own)
    return jnp.mean(loss * jnp.exp(-u) + u)

  own = params_of(weight)
  assert np.array_equal(weight.uncertainty(level, own), np.zeros(33))  # at first the loss is the base's
  step = lambda i, own: jax.tree.map(lambda a, g: a - 1.0 * g, own, jax.grad(total)(own))
  own = jax.jit(lambda own: jax.lax.fori_loop(0, 4000, step, own))(own)
  np.testing.assert_allclose(weight.uncertainty(level, own), np.log(loss), atol=0.1)
  assert np.isfinite(weight.uncertainty(schedules.vp.level(jnp.asarray([-jnp.inf])), own)).all()


def test_hybrid_adds_the_bound_and_teaches_it_to_the_variance_alone():
  """L_simple + scale T KL / log 2 for every step but the first (Nichol & Dhariwal 2021), from two normals' KL."""
  process, scale = schedules.linear(10), 0.01
  model = diffusion.Diffusion(process, targets.eps(), diffusion.timestep())
  x0, eps, F, output = 0.5 * jax.random.normal(jax.random.key(0), (4, 9, 2, 2, 1))
  level = process.level(jnp.arange(1, 10) / 9)

  def loss(F, output, weight):
    net = lambda x, noise: jnp.concatenate([F, output], -1)
    return diffusion.loss(net, x0, eps, level, model, weight)

  def with_gradients(weight):
    value, back = jax.vjp(lambda F, output: loss(F, output, weight), F, output)
    return value, back(jnp.ones(9))

  simple, of_simple = jax.jit(lambda: with_gradients(losses.simple()))()
  both, of_both = jax.jit(lambda: with_gradients(losses.hybrid(scale=scale)))()
  beta = schedules.betas(process, 10).reshape(-1, 1, 1, 1)
  bar = np.cumprod(1 - beta, axis=0)
  before, bar, beta = bar[:-1], bar[1:], beta[1:]
  posterior = (1 - before) / (1 - bar) * beta
  share = (np.asarray(output) + 1) / 2
  variance = beta ** share * posterior ** (1 - share)
  mean_error = np.sqrt(before) * beta / (1 - bar) * np.sqrt((1 - bar) / bar) * (F - eps)
  kl = np.log(variance / posterior) / 2 + (posterior + mean_error ** 2) / (2 * variance) - 0.5
  np.testing.assert_allclose(both - simple, scale * 10 * kl.mean((1, 2, 3)) / math.log(2), rtol=1e-3, atol=1e-5)

  np.testing.assert_array_equal(of_simple[0], of_both[0])
  assert not np.any(of_simple[1]) and np.all(of_both[1] != 0)


@pytest.mark.parametrize(('call', 'words'), [
    (lambda: losses.min_snr(0), 'gamma must be above 0, got 0'),
    (lambda: losses.p2(k=0), 'k must be above 0, got 0'),
    (lambda: losses.edm(-1), 'sigma_data must be above 0, got -1'),
    (lambda: losses.over_logsnr('snrr'), "weight must be one of edm, .*, got 'snrr'"),
    (lambda: losses.snr(minimum=-1), 'at least 0, got -1 and 0'),
    (lambda: losses.hybrid(variance='both'), "must be 'range' or 'diagonal', got 'both'"),
    (lambda: losses.learned_uncertainty(channels=0), 'channels must be at least 1, got 0'),
    (lambda: losses.vlb()(schedules.vp.level(jnp.zeros(1))), 'vlb needs a process'),
    (lambda: one_loss(schedules.linear(), 1), 'the network has none: it must return twice the channels'),
    (lambda: one_loss(straight(), 2), 'this schedule is in continuous time'),
])
def test_bad_input_is_refused(call, words):
  with pytest.raises(ValueError, match=words):
    call()


def one_loss(process, times):
  x = jnp.ones((1, 2, 1))
  model = diffusion.Diffusion(process, targets.x0(), diffusion.log_sigma())
  net = lambda x, noise: jnp.concatenate([x] * times, -1)
  return diffusion.loss(net, x, x, process.level(jnp.full(1, 0.5)), model, losses.hybrid())
