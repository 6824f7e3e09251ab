"""Rounding and clipping with the gradients that quantization-aware training uses, and their precision."""

import jax
import jax.numpy as jnp

Array = jax.Array


def widen(x: Array) -> Array:
  """Returns `x` as an array in at least float32; Python numbers are float32.

  Errors and steps differ by less than bfloat16 resolves.
  """
  return jnp.asarray(x, jnp.result_type(x, jnp.float32))


@jax.custom_jvp
def round_straight_through(x: Array) -> Array:
  """Returns `round(x)`, half to even, with the gradient of the identity (straight-through).

  Bengio, Leonard & Courville, *Estimating or Propagating Gradients Through Stochastic Neurons*, 2013.

  >>> import jax
  >>> jax.value_and_grad(round_straight_through)(2.5)
  (Array(2., dtype=float32, weak_type=True), Array(1., dtype=float32, weak_type=True))
  """
  return jnp.round(x)


@round_straight_through.defjvp
def _round_straight_through_jvp(primals, tangents):
  return jnp.round(primals[0]), tangents[0]


def clip_inclusive(x: Array, low: Array, high: Array) -> Array:
  """Returns `min(max(x, low), high)` with gradient 1 where `low <= x <= high`, else 0.

  The gradient is 1 *at* both bounds, as in the PyTorch versions that the papers used: at two bits half of
  all weights sit on the first or last code. (`jnp.clip` splits the gradient there, `lax.clamp` and recent
  PyTorch drop it.) The bounds get no gradient.
  """
  inside = (x >= low) & (x <= high)
  return jnp.where(inside, x, jax.lax.stop_gradient(jnp.clip(x, low, high)))
