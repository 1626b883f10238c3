"""What a noise schedule is, and all that can be asked of it.

A `Process` is a schedule, t in [0, 1] -> logsnr, on a `Path`, logsnr -> (alpha, sigma). It is one thing in several
dresses: a Markov chain (`betas`, `alphas_cumprod`), marginals (`Process.level`) and an SDE (`sde`).
"""
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.core.paths import PATHS, Path, ve, vp
from diffusion_jax.core.types import Array, Level, Params, require

# Of the schedules in use, linear, cosine, VP-SDE and EDM end below this SNR and Stable Diffusion's (0.0047) above.
MAX_TERMINAL_SNR = 1e-3


@dataclass(frozen=True)
class Process:
  """A schedule on a path. Fixed schedules ignore `params`; a learned one makes them in `init` to be trained."""
  logsnr: Callable[[Array, Params], Array]  # t in [0, 1] -> logsnr, strictly decreasing
  time: Callable[[Array, Params], Array]    # the inverse of `logsnr`
  path: Path = vp
  num_steps: int = 0                        # T of a discrete chain; 0: continuous time
  init: Callable[[Array], Params] = lambda key: {}

  def level(self, t: Array, params: Params = None) -> Level:
    """The level at time t, of the shape of t."""
    return self.path.level(self.logsnr(t, params))


def on_path(process: Process, path: str) -> Process:
  """The same schedule walked along another path, 'vp', 've', 'flow' or 'subvp': a network trained on one serves all.

  Raises ValueError for an unknown path, and for 've' if the terminal SNR is zero: sigma would be infinite there.
  """
  found = [p for p in PATHS if p.name == path]
  require(bool(found), f"path must be one of {', '.join(p.name for p in PATHS)}, got {path!r}")
  require(found[0] is not ve or terminal_snr(process, process.init(jax.random.key(0))) > 0,
          'a process of zero terminal SNR cannot be walked along the ve path, where its sigma would be infinite')
  return replace(process, path=found[0])


def evaluate(process: Process, t: np.ndarray, params: Params = None) -> np.ndarray:
  """logsnr at times t in float64 on the host, whatever precision jax runs in."""
  with jax.enable_x64(True):
    return np.asarray(process.logsnr(jnp.asarray(t, jnp.float64), params))


def alphas_cumprod(process: Process, num_steps: int, params: Params = None) -> np.ndarray:
  """DDPM's alpha_bar, the signal's share of the variance, at num_steps equal times: [num_steps] float64, falling."""
  return np.exp(_log_alpha_bar(process, num_steps, params))


def betas(process: Process, num_steps: int, params: Params = None) -> np.ndarray:
  """The betas of the chain over num_steps equal times, 1 - alpha_bar_i / alpha_bar_{i-1}: [num_steps] float64."""
  return -np.expm1(np.diff(_log_alpha_bar(process, num_steps, params), prepend=0.0))


def _log_alpha_bar(process: Process, num_steps: int, params: Params) -> np.ndarray:
  check_steps(num_steps)
  return -np.logaddexp(0, -evaluate(process, np.linspace(0, 1, num_steps), params))


class Sde(NamedTuple):
  """dx = f(t) x dt + g(t) dw, from data to noise; both take (t, params) and return the shape of t."""
  f: Callable[[Array, Params], Array]
  g2: Callable[[Array, Params], Array]  # g squared


def sde(process: Process) -> Sde:
  """The SDE with the marginals of `process`: f = d log(alpha) / dt and g^2 = d sigma^2 / dt - 2 f sigma^2.

  (Kingma et al. 2021; Lu et al. 2022, section 2.1.) The latter equals -sigma^2 d logsnr / dt, which subtracts
  nothing. On the sub-VP path this is the SDE of Song et al. exactly. Times are the process's, whose [0, 1] may be a
  part of the paper's.
  """

  def slope(fn, t):
    t = jnp.asarray(t)
    return jax.jvp(fn, (t,), (jnp.ones_like(t),))

  def f(t, params=None):
    alpha, change = slope(lambda t: process.level(t, params).alpha, t)
    return change / alpha

  def g2(t, params=None):
    logsnr, change = slope(lambda t: process.logsnr(t, params), t)
    return -process.path.level(logsnr).sigma ** 2 * change

  return Sde(f, g2)


def terminal_snr(process: Process, params: Params = None) -> float:
  """alpha^2 / sigma^2 at t = 1."""
  return float(np.exp(evaluate(process, np.float64(1), params)))


def check_terminal(process: Process, params: Params = None) -> float:
  """The terminal SNR; warns in a sentence if it is above MAX_TERMINAL_SNR = 0.001 (Lin et al. 2024, section 3.1)."""
  snr = terminal_snr(process, params)
  if snr > MAX_TERMINAL_SNR:
    warnings.warn(f'the terminal SNR is {snr:.2g}, above {MAX_TERMINAL_SNR:g}: training never shows the pure noise '
                  'from which sampling starts; schedules.zero_terminal_snr amends it', stacklevel=2)
  return snr


def check_steps(num_steps: int) -> None:
  """Raises ValueError unless `num_steps` is a number of steps that a chain can have."""
  require(num_steps >= 2, f'num_steps must be at least 2, got {num_steps}')
