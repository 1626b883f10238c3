"""A denoiser known in closed form: data whose elements are independent draws of a mixture of two normals."""
import jax
import jax.numpy as jnp

from diffusion_jax.core.types import expand

WEIGHTS, MEANS, STDS = (0.3, 0.7), (-0.8, 0.5), (0.15, 0.3)


def denoise(x, level):
  """E[x0 | x] for x = alpha x0 + sigma eps, element by element."""
  w, m, s = (jnp.asarray(a, x.dtype).reshape((2,) + (1,) * x.ndim) for a in (WEIGHTS, MEANS, STDS))
  alpha, sigma = expand(level.alpha, x), expand(level.sigma, x)
  variance = (alpha * s) ** 2 + sigma ** 2
  residual = x - alpha * m
  r = jax.nn.softmax(jnp.log(w) - 0.5 * jnp.log(variance) - 0.5 * residual ** 2 / variance, axis=0)
  return jnp.sum(r * (m + alpha * s ** 2 / variance * residual), axis=0)


def moments():
  """The mean and the variance of the data."""
  mean = sum(w * m for w, m in zip(WEIGHTS, MEANS, strict=True))
  square = sum(w * (m ** 2 + s ** 2) for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True))
  return mean, square - mean ** 2


def transport(x, cur, nxt):
  """The probability-flow ODE from cur to nxt, exactly: x keeps its quantile (its own element's, for each is in 1-D).

  `nxt` None is data. By bisection: the quantile is kept to the precision of x's type.
  """
  nxt = (1, 0) if nxt is None else (nxt.alpha, nxt.sigma)
  cdf = lambda x, alpha, sigma: sum(
      w * jax.scipy.special.ndtr((x - alpha * m) / jnp.sqrt((alpha * s) ** 2 + sigma ** 2))
      for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True))
  quantile = cdf(x, cur.alpha, cur.sigma)

  def halve(_, ends):
    low, high = ends
    middle = (low + high) / 2
    below = cdf(middle, *nxt) < quantile
    return jnp.where(below, middle, low), jnp.where(below, high, middle)

  edge = jnp.full_like(x, 8 * (nxt[0] + nxt[1]))
  low, high = jax.lax.fori_loop(0, 60, halve, (-edge, edge))
  return (low + high) / 2


def consistency(x, level):
  """The function of consistency models (Song et al. 2023): the data in which the ODE through x ends."""
  return transport(x, level, None)
