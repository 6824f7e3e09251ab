"""Colinearity of two consecutive weight matrices, the mechanism behind activation outliers.

Kernels are Flax's, `[in, out]`: `first` `[in, hidden]` is applied first, `second` `[hidden, out]` to what it
returns. In the papers' column notation `y = B A x` they are `A = first^T` and `B = second^T`, and
`B A = (first @ second)^T`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses.colinearity import chained, colinearity_loss
from jaxlab.tracing import is_concrete

HIGHEST = jax.lax.Precision.HIGHEST
GELU = functools.partial(jax.nn.gelu, approximate=False)


class ChannelColinearity(NamedTuple):
  """One output channel of `second^T phi(first^T x)` by the singular values of `first`, descending.

  With `A = first^T = sum_i s_i u_i v_i^T` and `w = second[:, channel]`, arrays `[min(in, hidden)]`:

  Attributes:
    singular_values: `s_i`.
    terms: `s_i (w . u_i) (v_i . x)`; their sum is the output without phi.
    alignments: `|w . u_i|`.
    cosines: `|w . u_i| / |w|`, 0 for `w = 0`.
    projections: `|v_i . x|`.
    linear: the sum of the terms, a scalar.
    top_share: the share of the largest term in the sum of all, in absolute values; 0 where all are 0.
    top_term: `w . phi(s_k u_k (v_k . x))` for the largest term k: what it makes of itself once phi is back.
  """

  singular_values: jax.Array
  terms: jax.Array
  alignments: jax.Array
  cosines: jax.Array
  projections: jax.Array
  linear: jax.Array
  top_share: jax.Array
  top_term: jax.Array


def channel_colinearity(
  first: ArrayLike,
  second: ArrayLike,
  x: ArrayLike,
  channel: ArrayLike,
  *,
  activation: Callable[[jax.Array], jax.Array] = GELU,
) -> ChannelColinearity:
  """Takes an outlier apart: which singular directions of an MLP's first matrix make it.

  A term that is large needs all three: a large singular value, a row of the second matrix aligned with its
  left direction, and an input aligned with its right one. Biases are left out. A candidate whose `linear` is
  large but whose `top_term` is small is suppressed by the activation.

  Args:
    first: kernel `[in, hidden]`.
    second: kernel `[hidden, out]`.
    x: one token, `[in]`, as it enters the MLP (behind the LayerNorm).
    channel: index of the output, from 0; may be traced, and gives NaN then where there is no such channel.
    activation: phi, for `top_term`; by default the exact GELU.

  Raises:
    ValueError: if the shapes do not chain, or the channel does not exist.

  References:
    Liang et al., TWEO: Transformers Without Extreme Outliers Enables FP8 Training and Quantization for
    Dummies, CVPR 2026 (https://arxiv.org/abs/2511.23225).
  """
  first, second = chained(first, second)
  if first.ndim != 2 or jnp.shape(x) != first.shape[:1]:
    raise ValueError(
      f'Expected kernels [in, hidden], [hidden, out] and x [in], got {first.shape}, {second.shape} and '
      f'{jnp.shape(x)}.'
    )
  outputs, index = second.shape[1], jnp.asarray(channel)
  if is_concrete(index) and not 0 <= int(index) < outputs:
    raise ValueError(f'channel={channel}: expected one of {outputs}, from 0 to {outputs - 1}.')
  # A negative one would count from the end.
  row = jnp.take(second, jnp.where(index < 0, outputs, index), axis=1, mode='fill')
  right, values, left = jnp.linalg.svd(first, full_matrices=False)  # of A^T: v, s, u^T
  aligned = jnp.matmul(left, row, precision=HIGHEST)
  projected = jnp.matmul(jnp.asarray(x).astype(first.dtype), right, precision=HIGHEST)
  terms = values * aligned * projected
  sizes, length = jnp.abs(terms), jnp.linalg.norm(row)
  top, total = jnp.argmax(sizes), jnp.sum(sizes)
  hidden = activation(values[top] * projected[top] * left[top])
  return ChannelColinearity(
    singular_values=values,
    terms=terms,
    alignments=jnp.abs(aligned),
    cosines=jnp.abs(aligned) / jnp.where(length > 0, length, 1),
    projections=jnp.abs(projected),
    linear=jnp.sum(terms),
    top_share=sizes[top] / jnp.where(total > 0, total, 1),
    top_term=jnp.matmul(row, hidden, precision=HIGHEST),
  )


def channel_gains(first: ArrayLike, second: ArrayLike) -> jax.Array:
  """Gain of every output channel, `r_k = |column k of first @ second|`.

  Args:
    first: kernel `[..., in, hidden]`.
    second: kernel `[..., hidden, out]`.

  Returns:
    `[..., out]`, float32 or wider. Channels far above the median are those of outliers. Gradients are 0 where
    a gain is.

  Raises:
    ValueError: if the shapes do not chain.

  References:
    Tong et al., Colinearity Decay: Training Quantization-Friendly ViTs with Outlier Decay
    (https://arxiv.org/abs/2605.01330); the measure is this library's.
  """
  first, second = chained(first, second)
  squares = jnp.sum(jnp.square(jnp.matmul(first, second, precision=HIGHEST)), -2)
  # A square root without an infinite slope at 0.
  return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def colinearity_index(first: ArrayLike, second: ArrayLike) -> jax.Array:
  """Alignment of two matrices, whatever their sizes.

    C = hidden |first @ second|_F^2 / (|first|_F^2 |second|_F^2)

  About 1 for independent random matrices, up to `hidden` for perfectly aligned ones, 0 where one is zero.

  Args:
    first: kernel `[..., in, hidden]`.
    second: kernel `[..., hidden, out]`.

  Returns:
    `[...]`, float32 or wider.

  Raises:
    ValueError: if the shapes do not chain.

  References:
    As `channel_gains`.

  Examples:
    >>> aligned = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    >>> float(colinearity_index(aligned, aligned.T))
    2.0
  """
  return 2 * colinearity_loss(first, second, 'cosine')
