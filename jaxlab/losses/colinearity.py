"""A penalty on the alignment of two consecutive weight matrices, which makes activation outliers."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_positive

Kind = Literal['product', 'row_power', 'excess', 'cosine']
KINDS = Kind.__args__


def colinearity_loss(
  first: ArrayLike,
  second: ArrayLike,
  kind: Kind = 'product',
  *,
  power: float = 4,
  ratio: float = 2,
) -> jax.Array:
  """Colinearity Decay's regularizer of a pair of matrices.

  With the kernels `first` `[in, hidden]`, applied first, and `second` `[hidden, out]`, their product
  `P = first @ second` and the gain of each output channel `r_k = |P[:, k]|`:

  - `'product'`: `R = 1/2 |P|_F^2`, the sum of all squared alignments, weighted with the squared singular
    values. Its gradients `P second^T` and `first^T P` decay each factor in the directions that the other
    amplifies.
  - `'row_power'`: `R = 1/power sum_k r_k^power`, which concentrates on channels of large gain.
  - `'excess'`: `R = 1/2 sum_k max(0, r_k - ratio median(r))^2`, only channels of abnormal gain; the median
    is a constant.
  - `'cosine'`: `R = 1/2 hidden |P|_F^2 / (|first|_F^2 |second|_F^2)`, whatever the size of the weights;
    half of `evaluation.colinearity_index`.

  In column notation `y = B A x` it is `A = first^T`, `B = second^T`, `B A = P^T`. Gradients are
  finite where kernels or gains are 0, and 0 there.

  Args:
    first: `[..., in, hidden]`.
    second: `[..., hidden, out]`; the axes in front are heads, or blocks that are stacked.
    kind: above.
    power: of `'row_power'`, above 2.
    ratio: of `'excess'`, positive.

  Returns:
    `[...]`, float32 or wider.

  Raises:
    ValueError: if the shapes do not chain, or for an unknown kind or options out of range.

  References:
    Tong et al., Colinearity Decay: Training Quantization-Friendly ViTs with Outlier Decay
    (https://arxiv.org/abs/2605.01330). The formulas are this library's: they follow from its abstract and
    from the analysis of TWEO (https://arxiv.org/abs/2511.23225).

  Examples:
    >>> aligned = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    >>> float(colinearity_loss(aligned, aligned.T)), float(colinearity_loss(aligned, 1 - aligned.T))
    (2.0, 0.0)
  """
  if kind not in KINDS:
    raise ValueError(f'kind={kind!r}; choose {", ".join(map(repr, KINDS))}.')
  if not power > 2:
    raise ValueError(f'power must be above 2, got {power}.')
  require_positive(ratio=ratio)
  first, second = chained(first, second)
  if kind == 'cosine':
    # The value does not change, and squares of large or small kernels stay finite.
    first, second = _unit_maximum(first), _unit_maximum(second)
  product = jnp.matmul(first, second, precision=jax.lax.Precision.HIGHEST)
  axes = (-2, -1)
  if kind == 'product':
    return jnp.sum(jnp.square(product), axes) / 2
  if kind == 'cosine':
    size = jnp.sum(jnp.square(first), axes) * jnp.sum(jnp.square(second), axes)
    index = first.shape[-1] * jnp.sum(jnp.square(product), axes) / jnp.where(size > 0, size, 1)
    return jnp.where(size > 0, index, 0) / 2
  squares = jnp.sum(jnp.square(product), -2)
  if kind == 'row_power':
    return jnp.sum(squares ** (power / 2), -1) / power
  # A square root without an infinite slope at 0.
  gains = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
  usual = jax.lax.stop_gradient(jnp.median(gains, -1, keepdims=True))
  return jnp.sum(jnp.square(jnp.maximum(gains - ratio * usual, 0)), -1) / 2


def chained(first: ArrayLike, second: ArrayLike) -> list[jax.Array]:
  """Returns kernels `[..., in, hidden]` and `[..., hidden, out]` in at least float32.

  Raises:
    ValueError: if the shapes do not chain.
  """
  shapes = jnp.shape(first), jnp.shape(second)
  if min(map(len, shapes)) < 2 or shapes[0][-1] != shapes[1][-2]:
    raise ValueError(
      f'Kernels must chain, first [..., in, hidden] and second [..., hidden, out]; got {shapes[0]} and '
      f'{shapes[1]}.'
    )
  return accumulated(first, second)


def _unit_maximum(kernel: jax.Array) -> jax.Array:
  largest = jax.lax.stop_gradient(jnp.max(jnp.abs(kernel), (-2, -1), keepdims=True))
  return kernel / jnp.where(largest > 0, largest, 1)
