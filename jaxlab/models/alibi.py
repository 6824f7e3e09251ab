"""Attention with linear biases, ALiBi (Press et al., ICLR 2022, arXiv 2108.12409)."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def alibi_slopes(num_heads: int) -> np.ndarray:
  """Returns the slope of each head, `2^(-8 i / n)` for i = 1 to n heads, n a power of two.

  Of other numbers of heads the first c, the largest power of two below, have the slopes of c heads, and the
  rest every other one of 2 c heads: `2^(-4 / c (1, 3, 5, ...))`.

  Args:
    num_heads: at least 1.

  Returns:
    float64 `[num_heads]`.

  Raises:
    ValueError: for no head.

  References:
    Press et al., ICLR 2022 (https://arxiv.org/abs/2108.12409), section 3 and their code.

  >>> alibi_slopes(4).tolist()
  [0.25, 0.0625, 0.015625, 0.00390625]
  >>> alibi_slopes(3).tolist()
  [0.0625, 0.00390625, 0.25]
  """
  if num_heads < 1:
    raise ValueError(f'num_heads={num_heads}: expected at least 1.')
  whole = 2 ** (num_heads.bit_length() - 1)
  first = np.arange(1, whole + 1) * (8 / whole)
  rest = np.arange(1, 2 * (num_heads - whole), 2) * (4 / whole)
  return 2.0 ** -np.concatenate([first, rest])


def alibi_bias(slopes: Array, positions: Array, dtype: jnp.dtype = jnp.float32) -> Array:
  """Returns what is added to the scores of keys, `slope * position of the key`.

  Under a softmax this is the paper's `-slope * distance`: what differs, the position of the query, is the
  same for all keys.

  Args:
    slopes: `[heads]`.
    positions: of the keys, integers `[batch, keys]`, or `[1, keys]`.
    dtype: of the result.

  Returns:
    `[batch, heads, 1, keys]`.

  >>> alibi_bias(alibi_slopes(1), jnp.array([[0, 256]])).tolist()
  [[[[0.0, 1.0]]]]
  """
  slopes = jnp.asarray(slopes, dtype)
  return slopes[:, None, None] * positions.astype(dtype)[:, None, None, :]
