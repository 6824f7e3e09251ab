"""GELU, exact and approximations, with derivatives that store their input alone."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@jax.custom_jvp
def gelu(x: Array) -> Array:
  """Returns the exact GELU `x / 2 * (1 + erf(x / sqrt(2)))` (Hendrycks & Gimpel 2016, arXiv 1606.08415).

  erf is faster on a CPU than erfc.
  """
  return 0.5 * x * (1 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


@gelu.defjvp
def _gelu_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  # Written from -x, it is no common subexpression of the forward pass: to compute erf again takes less time
  # than to store and read it.
  share = 0.5 * (1 - jax.lax.erf(x * -np.sqrt(0.5).astype(x.dtype)))
  density = np.sqrt(0.5 / np.pi).astype(x.dtype) * jnp.exp(-0.5 * x * x)
  return gelu(x), dx * (share + x * density)


@jax.custom_jvp
def gelu_tanh(x: Array) -> Array:
  """Returns GPT-2's GELU, `x / 2 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`."""
  return 0.5 * x * (1 + jnp.tanh(_argument(x, 1)))


@gelu_tanh.defjvp
def _gelu_tanh_jvp(primals, tangents):
  (x,), (dx,) = primals, tangents
  tanh = -jnp.tanh(_argument(x, -1))  # from -x, as in the derivative of `gelu`
  slope = np.sqrt(2 / np.pi).astype(x.dtype) * (1 + 3 * 0.044715 * (x * x))
  return gelu_tanh(x), dx * (0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * slope)


def quick_gelu(x: Array) -> Array:
  """Returns CLIP's GELU, `x / (1 + exp(-1.702 x))`."""
  return x * jax.nn.sigmoid(1.702 * x)


def _argument(x: Array, sign: int) -> Array:
  return (sign * np.sqrt(2 / np.pi)).astype(x.dtype) * (x + 0.044715 * (x * x * x))


GELUS = {'gelu': gelu, 'gelu_tanh': gelu_tanh, 'quick_gelu': quick_gelu}
