"""Metrics of images that show several classes: average precision, classes shared with what is retrieved."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_finite
from jaxlab.tracing import is_concrete


def average_precision(scores: ArrayLike, labels: ArrayLike) -> jax.Array:
  """Average precision of each class: the mean, over its positives, of the precision at their scores.

    AP = sum_n (R_n - R_{n-1}) P_n

  over the distinct scores from large to small; equal ones are one threshold. No interpolation, as in
  scikit-learn's `average_precision_score`.

  Args:
    scores: `[examples, num_classes]`, larger where the class is more likely to be there.
    labels: 0 or 1 for each class, `[examples, num_classes]`.

  Returns:
    `[num_classes]`, float32 or wider, in [0, 1]; NaN for a class without positives, or with a score that is
    not finite under `jit`.

  Raises:
    ValueError: if shapes differ or are empty, or (where concrete) labels are others than 0 and 1 or scores
      are not finite.

  Examples:
    >>> scores = jnp.array([[0.9], [0.8], [0.7], [0.6]])
    >>> round(float(average_precision(scores, jnp.array([[1], [0], [1], [0]]))[0]), 4)
    0.8333
  """
  shape = jnp.shape(scores)
  if len(shape) != 2 or 0 in shape or jnp.shape(labels) != shape:
    raise ValueError(
      f'Expected scores and labels [examples, num_classes], not empty; got {shape} and {jnp.shape(labels)}.'
    )
  require_multi_labels(labels=labels)
  require_finite(scores=scores)
  (scores,) = accumulated(scores)
  labels = jnp.asarray(labels).astype(scores.dtype)

  def of_class(scores: jax.Array, labels: jax.Array) -> jax.Array:
    order = jnp.argsort(-scores)
    falling, hits = -scores[order], labels[order]
    # Of equal scores all count where the last one stands.
    last = jnp.searchsorted(falling, falling, side='right') - 1
    precision = (jnp.cumsum(hits) / jnp.arange(1, len(hits) + 1))[last]
    finite = jnp.where(jnp.all(jnp.isfinite(scores)), 1, jnp.nan)
    return finite * jnp.sum(hits * precision) / jnp.sum(hits)

  return jax.vmap(of_class, 1)(scores, labels)


def mean_average_precision(scores: ArrayLike, labels: ArrayLike) -> jax.Array:
  """Mean of `average_precision` over the classes that have positives, a scalar in [0, 1].

  NaN if no class has any, or if the average precision of one that has is NaN.

  Args:
    scores: `[examples, num_classes]`.
    labels: 0 or 1 for each class, `[examples, num_classes]`.

  Raises:
    ValueError: as `average_precision`.
  """
  each = average_precision(scores, labels)
  present = jnp.any(jnp.asarray(labels) > 0, axis=0)
  return jnp.sum(jnp.where(present, each, 0)) / jnp.sum(present)


def shared_label_precision(
  retrieved: ArrayLike, labels: ArrayLike, bank_labels: ArrayLike
) -> jax.Array:
  """Share of retrieved examples that have a class in common with their query, a mean over queries.

  Args:
    retrieved: 1 for the examples that a query has retrieved, else 0, `[queries, bank]`; at least one a query.
    labels: 0 or 1 for each class of the queries, `[queries, num_classes]`.
    bank_labels: likewise of the examples, `[bank, num_classes]`.

  Returns:
    A scalar in [0, 1], float32 or wider.

  Raises:
    ValueError: if shapes do not fit.

  References:
    Zhu et al. 2023, Multi-Label Self-Supervised Learning with Scene Images
    (https://arxiv.org/abs/2308.03286), where it says how good pseudo-labels are.

  Examples:
    >>> bank = jnp.array([[1, 0, 0], [0, 1, 1], [0, 0, 1]])
    >>> float(shared_label_precision(jnp.array([[1, 1, 0]]), jnp.array([[0, 1, 0]]), bank))
    0.5
  """
  shapes = jnp.shape(retrieved), jnp.shape(labels), jnp.shape(bank_labels)
  if any(len(shape) != 2 for shape in shapes) or (
    shapes[0] != (shapes[1][0], shapes[2][0]) or shapes[1][1] != shapes[2][1]
  ):
    raise ValueError(
      'Expected retrieved [queries, bank], labels [queries, num_classes], bank_labels [bank, num_classes]; '
      f'got {shapes[0]}, {shapes[1]}, {shapes[2]}.'
    )
  (retrieved,) = accumulated(retrieved)
  labels, bank_labels = (jnp.asarray(x).astype(retrieved.dtype) for x in (labels, bank_labels))
  shared = labels @ bank_labels.T > 0
  return jnp.mean(jnp.sum(retrieved * shared, -1) / jnp.sum(retrieved, -1))


def require_multi_labels(**labels: ArrayLike) -> None:
  """Raises ValueError if a named array, where it is concrete, holds other values than 0 and 1."""
  for name, values in labels.items():
    if is_concrete(values):
      values = np.asarray(values)
      if wrong := np.argwhere((values != 0) & (values != 1)).tolist():
        raise ValueError(f'{name} must be 0 or 1 for each class; at {wrong[0]} it is not.')
