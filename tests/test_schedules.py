"""The published values of every schedule, other implementations' tables, and bad input; their laws: test_process.py."""
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.core import likelihood, schedules
from diffusion_jax.runtime.config import build, parse_call, spec

T = np.linspace(0, 1, 1000)
PEERS = np.load(pathlib.Path(__file__).parent / 'fixtures' / 'samplers_common.npz')


def alpha_bar(process, t, params=None):
  return 1 / (1 + np.exp(-schedules.evaluate(process, t, params)))


def test_linear_equals_ddpm():
  process = schedules.linear()
  np.testing.assert_allclose(schedules.betas(process, 1000), np.linspace(1e-4, 0.02, 1000), rtol=1e-9)
  assert schedules.alphas_cumprod(process, 1000)[-1] == pytest.approx(4.035830e-5, rel=1e-6)
  logsnr = schedules.evaluate(process, np.array([0.0, 1.0]))
  np.testing.assert_allclose(logsnr, [9.2102, -10.1177], atol=5e-5)


def test_linear_prior_loss_is_the_papers():
  bits = likelihood.prior_bits(schedules.linear().level(1.0), 0.27)
  assert float(bits) == pytest.approx(7.9e-6, rel=0.01)


def test_cosine_equals_nichol_and_dhariwal():
  betas = schedules.betas(schedules.cosine(), 1000)
  np.testing.assert_allclose(betas[[0, 500, 999]], [4.128422e-05, 3.155691e-03, 0.999], rtol=2e-7)
  assert np.sum(betas > 0.998999) == 1  # the clip touches one step only


def test_ddpms_other_schedules():
  """Those of its ablation: constant, quadratic, jsd and two warm-ups, with their published ends."""
  betas = lambda process: schedules.betas(process, 1000)
  np.testing.assert_allclose(betas(schedules.constant()), 0.02, rtol=1e-9)
  np.testing.assert_allclose(np.diff(np.sqrt(betas(schedules.quadratic()))), (0.02 ** 0.5 - 0.01) / 999, rtol=1e-6)
  np.testing.assert_allclose(schedules.alphas_cumprod(schedules.jsd(), 1000), 1 - np.arange(1, 1001) / 1000, atol=1e-12)
  np.testing.assert_allclose(betas(schedules.jsd())[[0, 1, 998, 999]], [1e-3, 1 / 999, 0.5, 1], rtol=1e-9)
  for process, n in ((schedules.warmup10(), 100), (schedules.warmup50(), 500), (schedules.warmup(fraction=0.25), 250)):
    np.testing.assert_allclose(betas(process), np.r_[np.linspace(1e-4, 0.02, n), np.full(1000 - n, 0.02)], rtol=1e-9)


@pytest.mark.parametrize(('peer', 'process'), [
    ('linear', schedules.linear()), ('scaled_linear', schedules.scaled_linear()),
    ('squaredcos_cap_v2', schedules.cosine()), ('sigmoid', schedules.sigmoid_betas()),
    ('linear_zero_snr', schedules.zero_terminal_snr('linear'))])
def test_chains_equal_diffusers(peer, process):
  """Its tables are float32; a zero-SNR chain is a difference of them, so that its small values are less sure."""
  atol = {'linear_zero_snr': 5e-7, 'squaredcos_cap_v2': 1e-13}.get(peer, 0)
  np.testing.assert_allclose(schedules.betas(process, 1000), PEERS[f'betas/{peer}'], rtol=1e-5, atol=atol)
  np.testing.assert_allclose(schedules.alphas_cumprod(process, 1000), PEERS[f'alphas_cumprod/{peer}'], rtol=1e-5,
                             atol=atol)


def test_zero_snr_may_stop_short_of_zero():
  """alpha_bar of the last step is the least asked for, where sigma / alpha is then finite; the others are the same."""
  process, zero = (schedules.zero_terminal_snr('scaled_linear', least) for least in (2.0 ** -24, 0.0))
  alpha_bar = schedules.alphas_cumprod(process, 1000)
  np.testing.assert_allclose(alpha_bar[:-1], schedules.alphas_cumprod(zero, 1000)[:-1], rtol=1e-12)
  assert alpha_bar[-1] == pytest.approx(2.0 ** -24, rel=1e-9)
  assert float(schedules.on_path(process, 've').level(1.0).sigma) == pytest.approx(2.0 ** 12, rel=1e-4)
  with pytest.raises(ValueError, match=r'least must lie in \[0, .*, got 0.5'):
    schedules.zero_terminal_snr('linear', 0.5)
  with pytest.raises(ValueError, match='least is for chains, and this process is continuous'):
    schedules.zero_terminal_snr('cosine_continuous', 0.1)


def test_cosine_continuous_is_a_cosine():
  process = schedules.cosine_continuous(-30, 30)
  t = np.linspace(0.05, 0.95, 19)
  np.testing.assert_allclose(process.level(t).alpha, np.cos(t * np.pi / 2), atol=1e-5)


def test_inverse_cosine_inverts_the_cosine():
  process, inverse = (fn(-60.0, 60.0) for fn in (schedules.cosine_continuous, schedules.inverse_cosine))
  np.testing.assert_allclose(alpha_bar(inverse, alpha_bar(process, T[1:-1])), T[1:-1], atol=1e-9)
  np.testing.assert_allclose(alpha_bar(inverse, T[1:-1]), np.arccos(2 * T[1:-1] - 1) / np.pi, atol=1e-9)


@pytest.mark.parametrize(('start', 'end', 'tau'), [(-3, 3, 1.0), (0, 3, 0.3), (-3, 3, 0.05), (-1, 3, 4.0)])
def test_sigmoid_is_chens(start, end, tau):
  logistic = lambda z: 1 / (1 + np.exp(-z / tau))
  expected = (logistic(end) - logistic(start + T * (end - start))) / (logistic(end) - logistic(start))
  process = schedules.sigmoid(start, end, tau, -100.0, 100.0)
  np.testing.assert_allclose(alpha_bar(process, T), expected, atol=1e-12)


def test_laplace_has_the_papers_quantiles():
  t = T[1:-1]
  for mean, scale in ((0.0, 0.5), (-1.5, 2.0)):
    process = schedules.laplace(mean, scale, -100.0, 100.0)
    expected = mean - scale * np.sign(0.5 - t) * np.log(1 - 2 * np.abs(t - 0.5))
    np.testing.assert_allclose(schedules.evaluate(process, t), expected, rtol=1e-9)


def test_rectified_flow_is_a_straight_line():
  process = schedules.rectified_flow()
  np.testing.assert_allclose(process.level(T).sigma, T, atol=2e-4)


def test_sigmas_of_the_ve_schedules():
  """EDM's for 18 steps (Karras et al. 2022, eq. 5), and a geometric row (Song et al. 2021)."""
  sigma = np.exp(-schedules.evaluate(schedules.karras(), np.linspace(1, 0, 18)) / 2)
  np.testing.assert_allclose(sigma[[0, 1, 2, 16, 17]], [80.0, 57.58599, 40.78557, 0.00752802, 0.002], rtol=1e-6)
  sigma = np.exp(-schedules.evaluate(schedules.geometric(), np.linspace(0, 1, 11)) / 2)
  np.testing.assert_allclose(sigma, np.geomspace(0.01, 50, 11), rtol=1e-9)


def test_shift_of_resolution_and_of_time_agree_on_straight_lines():
  """Simple diffusion's logsnr + 2 log(base / size) is SD3's t' = s t / (1 + (s - 1) t) with s = size / base."""
  line = schedules.rectified_flow(1e-9)
  t = T[1:-1]
  for shift in (0.5, 3.0, 8.0):
    expected = schedules.evaluate(line, shift * t / (1 + (shift - 1) * t))
    np.testing.assert_allclose(schedules.evaluate(schedules.shifted(line, shift), t), expected, atol=2e-5)
    np.testing.assert_allclose(schedules.evaluate(schedules.time_shifted(line, shift), t), expected, atol=1e-9)
  ends = np.array([0.0, 1.0])
  kept = schedules.evaluate(schedules.time_shifted(line, 3.0), ends)
  np.testing.assert_array_equal(kept, schedules.evaluate(line, ends))


def test_shifted_moves_logsnr_alone():
  process = schedules.shifted('cosine', 256 / 64)
  np.testing.assert_allclose(schedules.evaluate(process, T), schedules.evaluate(schedules.cosine(), T) - 2 * np.log(4),
                             rtol=1e-12)
  assert process.num_steps == 1000


@pytest.mark.parametrize(('seed', 'num_steps'), enumerate([2, 2, 7, 7, 301, 301]))
def test_random_tables(seed, num_steps):
  rng = np.random.default_rng(seed)
  given = rng.uniform(1e-5, 0.5 ** rng.integers(1, 8), num_steps)
  given[-1] = 1.0 if seed % 2 else given[-1]
  process = schedules.table(tuple(given.tolist()))
  np.testing.assert_allclose(schedules.betas(process, len(given)), given, rtol=1e-7, atol=1e-12)
  np.testing.assert_allclose(schedules.alphas_cumprod(process, len(given)), np.cumprod(1 - given), rtol=1e-9)
  t = rng.uniform(0, 1, 50)
  with jax.enable_x64(True):
    again = process.time(process.logsnr(jnp.asarray(t), None), None)
  np.testing.assert_allclose(again, t, atol=1.1e-3 / (len(given) - 1))  # times this near to a step become the step


def test_random_learned_schedules_fall_between_their_ends():
  process = schedules.learned(hidden=17)
  time = jax.jit(process.time)
  for seed in range(8):
    keys = jax.random.split(jax.random.key(seed), 5)
    params = {k: v + 5 * jax.random.normal(key, v.shape)
              for key, (k, v) in zip(keys, sorted(process.init(keys[0]).items()), strict=True)}
    logsnr = schedules.evaluate(process, T, params)
    assert np.all(np.diff(logsnr) < 0)
    np.testing.assert_allclose(logsnr[[0, -1]], params['logsnr_max'] - np.array([0, jax.nn.softplus(params['span'])]),
                               rtol=1e-6, atol=1e-6)
    with jax.enable_x64(True):
      np.testing.assert_allclose(time(jnp.asarray(logsnr), params), T, atol=1e-7)


def test_learned_schedule_starts_where_told_and_has_gradients():
  process = schedules.learned(-7.0, 11.0, hidden=8)
  params = process.init(jax.random.key(1))
  np.testing.assert_allclose(schedules.evaluate(process, np.array([0.0, 1.0]), params), [11, -7], atol=1e-5)
  with jax.enable_x64(True):
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
    for fn, at in ((jax.jit(process.logsnr), 0.3), (jax.jit(process.time), 4.0)):
      slopes = jax.grad(fn, 1)(at, params)
      for name in params:
        assert np.all(np.abs(slopes[name]) > 1e-12), name
        up, down = (fn(at, {**params, name: params[name] + h}) for h in (1e-5, -1e-5))
        np.testing.assert_allclose(np.sum(slopes[name]), (up - down) / 2e-5, rtol=1e-5, atol=1e-9)


def test_wrappers_carry_a_learned_schedules_parameters():
  process = schedules.shifted(schedules.zero_terminal_snr(schedules.learned(hidden=8)), 2.0)
  params = process.init(jax.random.key(0))
  slopes = jax.grad(lambda p: process.logsnr(0.4, p))(params)
  assert all(np.all(np.isfinite(v)) and np.any(v != 0) for v in slopes.values())


def test_wrappers_in_a_config():
  nested = build(spec(schedules.shifted, process=spec(schedules.cosine, s=0.01), shift=2.0))
  np.testing.assert_array_equal(schedules.evaluate(nested, T),
                                schedules.evaluate(schedules.shifted(schedules.cosine(s=0.01), 2.0), T))
  typed = build(parse_call("zero_terminal_snr(process='scaled_linear')", schedules))
  assert schedules.terminal_snr(typed) == 0
  own = build(spec(schedules.table, betas=(0.1, 0.2, 0.3)))
  np.testing.assert_allclose(schedules.betas(own, 3), [0.1, 0.2, 0.3])


@pytest.mark.parametrize(('make', 'words'), [
    (lambda: schedules.linear(num_steps=1), 'num_steps must be at least 2, got 1'),
    (lambda: schedules.jsd(0), 'num_steps must be at least 2, got 0'),
    (lambda: schedules.betas(schedules.linear(), 1), 'num_steps must be at least 2, got 1'),
    (lambda: schedules.linear(beta_start=0.1, beta_end=0.01), '0.1 and 0.01'),
    (lambda: schedules.constant(beta=1.0), '1.0 and 1.0'),
    (lambda: schedules.warmup(fraction=0.0), r'fraction must lie in \(0, 1\], got 0.0'),
    (lambda: schedules.cosine(max_beta=1.0), r'max_beta must lie in \(0, 1\), got 1.0'),
    (lambda: schedules.cosine_continuous(5, -5), '5 and -5'),
    (lambda: schedules.inverse_cosine(5, -5), '5 and -5'),
    (lambda: schedules.sigmoid(start=3.0), 'start must be below end, got 3.0 and 3.0'),
    (lambda: schedules.sigmoid(tau=0.0), 'tau must be above 0, got 0.0'),
    (lambda: schedules.laplace(scale=-1.0), 'scale must be above 0, got -1.0'),
    (lambda: schedules.karras(sigma_min=80.0), '0 < sigma_min < sigma_max must hold, got 80.0 and 80.0'),
    (lambda: schedules.geometric(sigma_min=0.0), 'got 0.0 and 50.0'),
    (lambda: schedules.vp_sde(beta_min=0.0), 'got 0.0 and 20.0'),
    (lambda: schedules.subvp_sde(t_min=0.0), r't_min must lie in \(0, 1\), got 0.0'),
    (lambda: schedules.rectified_flow(margin=0.5), 'got 0.5'),
    (lambda: schedules.shifted(shift=0.0), 'shift must be above 0, got 0.0'),
    (lambda: schedules.time_shifted(shift=-1.0), 'shift must be above 0, got -1.0'),
    (lambda: schedules.shifted('cosin'), "cosine_continuous, .* got 'cosin'"),
    (lambda: schedules.learned(logsnr_min=14.0), '14.0 and 13.3'),
    (lambda: schedules.learned().logsnr(0.5), 'the learned schedule needs its params'),
    (lambda: schedules.table((0.1,)), 'betas must hold at least 2 numbers, got 1'),
    (lambda: schedules.table((0.1, 0.2, 1.2, 0.3)), r'betas must lie in \(0, 1\), but betas\[2\] is 1.2'),
    (lambda: schedules.table((0.1, float('nan'))), r'betas\[1\] is nan'),
    (lambda: schedules.table((1.0, 0.5)), r'betas\[0\] is 1.0'),
    (lambda: schedules.table((0.1, '0.2')), r"betas\[1\] is '0.2'"),
    (lambda: schedules.on_path(schedules.linear(), 'vpp'), "vp, ve, flow, subvp, got 'vpp'"),
])
def test_bad_arguments_are_named(make, words):
  with pytest.raises(ValueError, match=words):
    make()
