"""Weighted nearest-neighbor classification in a bank of features."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.evaluation._arguments import require_features
from jaxlab.evaluation.classification import predicted_classes
from jaxlab.losses import normalize
from jaxlab.losses._labels import require_classes


class Neighbors(NamedTuple):
  """What the neighbors of queries say.

  Attributes:
    scores: `[queries, num_classes]`, float32 or wider; not normalized.
    predictions: `[queries]` int32, the class with the largest score; -1 if a score is NaN.
  """

  scores: jax.Array
  predictions: jax.Array


def weighted_knn(
  bank: ArrayLike,
  bank_labels: ArrayLike,
  queries: ArrayLike,
  *,
  num_classes: int,
  k: int = 20,
  temperature: float = 0.07,
  normalized: bool = False,
  chunk_size: int = 1024,
) -> Neighbors:
  """Classifies queries by a vote of their k nearest neighbors in cosine similarity s.

    score[c] = sum over the k largest s_j of exp(s_j / temperature) * [label_j == c]

  Args:
    bank: features of known class, `[bank, dim]`.
    bank_labels: integers, `[bank]`.
    queries: `[queries, dim]`.
    num_classes: number of classes.
    k: number of neighbors; 10, 20, 100, 200 in DINO, 200 in the monitor of MoCo.
    temperature: 0.07 in DINO, 0.1 in the monitor of MoCo.
    normalized: the features have unit length already.
    chunk_size: queries whose similarities to the bank are in memory at once.

  Returns:
    Scores and predictions; similarities are computed in at least float32, at full precision.

  Raises:
    ValueError: if `k` exceeds the bank, labels (where concrete) are out of range, features not finite, shapes
      do not fit, or `temperature` is not positive or so small that `k exp(1 / temperature)` overflows.

  References:
    Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018
    (https://arxiv.org/abs/1805.01978), section 3.4.

  Examples:
    >>> bank, labels = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), jnp.array([0, 1, 1])
    >>> weighted_knn(bank, labels, jnp.array([[0.0, 2.0]]), num_classes=2, k=2).predictions.tolist()
    [1]
  """
  require_features('bank', bank, jnp.size(bank_labels))
  require_features('queries', queries)
  require_classes(bank_labels, num_classes, name='bank_labels')
  if jnp.shape(bank)[1] != jnp.shape(queries)[1]:
    raise ValueError(
      f'bank and queries must have one dimension, got {jnp.shape(bank)} and {jnp.shape(queries)}.'
    )
  if not 1 <= k <= jnp.shape(bank)[0]:
    raise ValueError(f'k must be in [1, {jnp.shape(bank)[0]}], the size of the bank, got {k}.')
  if chunk_size < 1:
    raise ValueError(f'chunk_size must be positive, got {chunk_size}.')
  dtype = jnp.promote_types(jnp.result_type(bank, queries), jnp.float32)
  largest = math.log(float(jnp.finfo(dtype).max))
  if not temperature > 0 or 1 / temperature + math.log(k) > largest:
    raise ValueError(
      f'temperature must be positive and at least {1 / (largest - math.log(k)):.3g} (below, '
      f'k exp(1 / temperature) overflows {dtype}), got {temperature}.'
    )
  return _weighted_knn(
    bank, bank_labels, queries, temperature, num_classes, k, normalized, chunk_size, dtype
  )


@functools.partial(
  jax.jit, static_argnames=('num_classes', 'k', 'normalized', 'chunk_size', 'dtype')
)
def _weighted_knn(
  bank, bank_labels, queries, temperature, num_classes, k, normalized, chunk_size, dtype
) -> Neighbors:
  bank, queries = bank.astype(dtype), queries.astype(dtype)
  # A NaN may be sorted to either end, by its sign: nothing is said of any query then.
  whole = jnp.all(jnp.isfinite(bank))
  if not normalized:
    bank, queries = normalize(bank), normalize(queries)

  def vote(query):
    # Neighbors are told apart by small differences: no bfloat16 passes on accelerators.
    similarity = jnp.matmul(bank, query, precision=jax.lax.Precision.HIGHEST)
    nearest, positions = jax.lax.top_k(similarity, k)
    weights = jnp.exp(nearest / temperature)
    return jax.ops.segment_sum(weights, bank_labels[positions], num_classes)

  scores = jax.lax.map(vote, queries, batch_size=min(chunk_size, queries.shape[0]))
  scores = jnp.where(whole, scores, jnp.nan)
  return Neighbors(scores, predicted_classes(scores))
