"""Traces of other implementations' samplers (tests/fixtures/samplers.*): loading them, and their exact denoiser.

Everything is turned to channels last and float64; see tests/fixtures/README.md for what a trace is.
"""
import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.types import Level

FOLDER = pathlib.Path(__file__).parent / 'fixtures'

# Which test replays the traces of a family, the first part of their names.
FAMILIES = {
    'test_traces': ('ddpm', 'ddim', 'euler', 'euler_ancestral', 'heun', 'edm_euler', 'flow_euler', 'lcm'),
    'test_multistep': ('dpm', 'dpm++', 'sde-dpm++', 'edm_dpm++', 'edm_sde-dpm++', 'unipc', 'pndm'),
}


@functools.cache
def index():
  """{name: settings} of every trace."""
  return json.loads((FOLDER / 'samplers.json').read_text())['traces']


def names(test):
  """The traces that `test` replays."""
  return [name for name in index() if name.split('/')[0] in FAMILIES[test]]


def last(a):
  """[..., C, H, W] -> [..., H, W, C] in float64."""
  return np.moveaxis(np.asarray(a, np.float64), -3, -1)


@functools.cache
def common():
  """x_init [2, 4, 4, 3], noise [64, 2, 4, 4, 3], the mixture's w [2], m [2, 4, 4, 3], s [2], and beta tables."""
  stored = np.load(FOLDER / 'samplers_common.npz')
  return {k: last(stored[k]) if k in ('x_init', 'noise', 'm') else stored[k] for k in stored.files}


@functools.cache
def _stored():
  return np.load(FOLDER / 'samplers.npz')


def trace(name):
  """{'xs' [calls + 1, 2, 4, 4, 3], 'a', 'b', 'timesteps' [calls], 'sigmas'}; 'outs' if it has learned variances."""
  fields = {k.rsplit('/', 1)[1]: _stored()[k] for k in _stored().files if k.rsplit('/', 1)[0] == name}
  images = ('xs', 'outs', 'x_final_f64')
  return {k: last(v) if k in images else np.asarray(v, np.float64) for k, v in fields.items()}


def edm_runs():
  """{name: options} of the runs of EDM's sampler."""
  stored = json.loads((FOLDER / 'edm.json').read_text())
  return {name: fields['kwargs'] for name, fields in stored.items() if name.startswith('edm/')}


def edm(name):
  """The arrays of tests/fixtures/edm.npz under `name`: {'x_final' [2, 4, 4, 3], 'net_x', 'net_sigma', 'net_D'}."""
  stored = np.load(FOLDER / 'edm.npz')
  fields = {k.rsplit('/', 1)[1]: stored[k] for k in stored.files if k.rsplit('/', 1)[0] == name}
  return {k: last(v) if v.ndim > 3 else np.asarray(v, np.float64) for k, v in fields.items()}


def level(a, b):
  """The level of scales (alpha, sigma), as float64 arrays of any shape; alpha or sigma may be 0."""
  with np.errstate(divide='ignore'):
    return Level(jnp.asarray(2 * (np.log(a) - np.log(b))), jnp.asarray(a), jnp.asarray(b))


def denoiser(mean_scale=1.0):
  """E[x0 | x] for element-wise x0 ~ sum_k w_k N(mean_scale * m, s_k^2): the network of every trace."""
  c = common()
  w, s = (jnp.asarray(c[k]).reshape(2, 1, 1, 1) for k in ('w', 's'))
  m = jnp.asarray(c['m']) * mean_scale  # [2, 4, 4, 3]: one mean per component and element

  def denoise(x, level):
    a, b = level.alpha, level.sigma
    variance = (a * s) ** 2 + b ** 2
    residual = x[:, None] - a * m  # [B, 2, 4, 4, 3]
    logits = jnp.log(w) - 0.5 * jnp.log(variance) - 0.5 * residual ** 2 / variance
    r = jnp.exp(logits - logits.max(1, keepdims=True))
    r = r / r.sum(1, keepdims=True)
    return jnp.sum(r * (m + a * s ** 2 / variance * residual), axis=1)

  return denoise


def relative_error(got, wanted):
  """max |got - wanted| / max |wanted|."""
  return float(np.max(np.abs(np.asarray(got) - wanted)) / np.max(np.abs(wanted)))
