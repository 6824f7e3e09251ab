"""Penalties on the singular values of single matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated


def top_singular_loss(kernel: ArrayLike, power: float = 2, count: int = 3) -> jax.Array:
  """Sum of powers of a matrix's largest singular values, `sum_{i <= count} s_i^power`.

  Decays the few directions that a matrix amplifies most, whatever reads them: the spectrum of one matrix,
  where `colinearity_loss` takes the alignment of two. Its gradient is `power sum_i s_i^(power-1) u_i v_i^T`,
  by a singular value decomposition.

  Args:
    kernel: `[..., in, out]`; the axes in front are heads, or blocks that are stacked.
    power: at least 1.
    count: how many of the largest; all, if there are fewer.

  Returns:
    `[...]`, float32 or wider.

  Raises:
    ValueError: for what is no matrix, or options out of range.

  References:
    S2D, selective spectral decay (https://arxiv.org/abs/2602.14432), which regularizes these components in
    fine-tuning; power, count and a weight of 5e-4 are those of a reimplementation, not the authors'.

  Examples:
    >>> float(top_singular_loss(jnp.diag(jnp.array([1.0, 3.0, 2.0])), count=2))
    13.0
  """
  if not power >= 1:
    raise ValueError(f'power must be at least 1, got {power}.')
  if not (isinstance(count, int) and count >= 1):
    raise ValueError(f'count must be a positive whole number, got {count}.')
  if jnp.ndim(kernel) < 2:
    raise ValueError(f'kernel must be [..., in, out], got {jnp.shape(kernel)}.')
  (kernel,) = accumulated(kernel)
  values = jnp.linalg.svd(kernel, full_matrices=False, compute_uv=False)[..., :count]
  return jnp.sum(values**power, -1)


def orthogonality_loss(matrices: ArrayLike) -> jax.Array:
  """Returns how far square matrices are from orthogonal ones, `|I - A A^T|_F` each, `[...]`.

  The regularizer of PointNet's feature transform (Qi et al. 2017, section 3.3; squared there). Where a matrix
  is orthogonal the gradient is 0.

  Args:
    matrices: `[..., size, size]`.

  Raises:
    ValueError: unless the matrices are square.

  >>> orthogonality_loss(jnp.array([[2.0, 0.0], [0.0, 1.0]]))
  Array(3., dtype=float32)
  """
  (matrices,) = accumulated(matrices)
  if matrices.ndim < 2 or matrices.shape[-1] != matrices.shape[-2]:
    raise ValueError(f'matrices must be [..., size, size], got shape {matrices.shape}.')
  product = matrices @ jnp.swapaxes(matrices, -1, -2)
  square = jnp.sum(jnp.square(jnp.eye(matrices.shape[-1]) - product), (-1, -2))
  positive = square > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
