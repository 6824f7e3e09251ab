"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

import jax
import jax.numpy as jnp

Array = jax.Array


def rotary_embedding(x: Array, positions: Array, theta: float = 10000.0) -> Array:
  """Rotates channel pairs of queries or keys by angles in proportion to their position.

  Channels `i` and `i + d/2` of the head's `d` are a pair (the halves layout of Hugging Face's Llama; the
  paper pairs neighbors):

    y_i       = x_i cos(a) - x_{i + d/2} sin(a)
    y_{i+d/2} = x_{i + d/2} cos(a) + x_i sin(a),    a = position theta^(-2 i / d)

  Products of a rotated query and key depend on the difference of their positions alone.

  Args:
    x: `[batch, time, heads, head width]`.
    positions: integers `[batch, time]`, or `[1, time]`.
    theta: base of the wavelengths.

  Returns:
    The shape and dtype of `x`; angles and products are taken in at least float32.

  Raises:
    ValueError: if the head's width is odd.

  >>> x = jnp.ones((1, 1, 1, 2))
  >>> rotary_embedding(x, jnp.array([[0]])).ravel().tolist()
  [1.0, 1.0]
  """
  if x.shape[-1] % 2:
    raise ValueError(f'rotary_embedding pairs channels: the head width {x.shape[-1]} is odd.')
  half = x.shape[-1] // 2
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  frequencies = 1 / theta ** (jnp.arange(half, dtype=dtype) / half)
  angles = positions.astype(dtype)[:, :, None, None] * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = x[..., :half].astype(dtype), x[..., half:].astype(dtype)
  y = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return y.astype(x.dtype)
