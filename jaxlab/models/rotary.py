"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

import dataclasses
import math

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
  """How Llama 3.1 turns channel pairs more slowly, for contexts beyond those of its pretraining.

  A pair that turns by `f` a position makes `r = length f / (2 pi)` turns over `length` positions, and gets

    s f + (1 - s) f / factor,    s = (r - low) / (high - low), limited to [0, 1]

  so that pairs of `high` turns and more are left alone, and those of at most `low` turns are slowed down by
  `factor`. Source: `rope_type='llama3'` of transformers (`rope_parameters`), Llama's own code
  (`apply_scaling`).

  Attributes:
    factor: at least 1, by which slow pairs are slowed down.
    low: turns of the slow pairs, `low_freq_factor`.
    high: turns of the fast pairs, `high_freq_factor`, more than `low`.
    length: positions of the pretraining, `original_max_position_embeddings`.

  Raises:
    ValueError: at construction, for other numbers.
  """

  factor: float = 8.0
  low: float = 1.0
  high: float = 4.0
  length: int = 8192

  def __post_init__(self):
    if not 1 <= self.factor < math.inf:
      raise ValueError(f'RotaryScaling: factor={self.factor}: expected a number of at least 1.')
    if not 0 < self.low < self.high < math.inf:
      raise ValueError(f'RotaryScaling: expected 0 < low < high, got {self.low} and {self.high}.')
    if self.length < 1:
      raise ValueError(f'RotaryScaling: length={self.length}: expected at least 1 position.')

  def __call__(self, frequencies: Array) -> Array:
    """Returns the angles a position of channel pairs, given those without scaling."""
    turns = self.length * frequencies / (2 * math.pi)
    kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / self.factor


def rotary_embedding(
  x: Array, positions: Array, theta: float = 10000.0, scaling: RotaryScaling | None = None
) -> Array:
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
    scaling: of the angles; None: none.

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
  if scaling is not None:
    frequencies = scaling(frequencies)
  angles = positions.astype(dtype)[:, :, None, None] * frequencies
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  first, second = x[..., :half].astype(dtype), x[..., half:].astype(dtype)
  y = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return y.astype(x.dtype)
