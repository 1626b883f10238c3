"""An optimizer that spoils one step."""
import jax
import jax.numpy as jnp
import optax


def adam(learning_rate, at: int = 0) -> optax.GradientTransformation:
  """Adam, whose update number `at` (from 1; 0: none) is not finite."""
  inner = optax.adam(learning_rate)

  def update(grads, state, params=None):
    updates, after = inner.update(grads, state, params)
    bad = after[0].count == at
    return jax.tree.map(lambda u: jnp.where(bad, jnp.nan, u), updates), after
  return optax.GradientTransformation(inner.init, update)
