"""How good embeddings are at finding images of the same class: Recall@K, mAP, R-precision, MAP@R.

Similarity is the cosine. Items of equal similarity keep their order by index.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlab.evaluation._arguments import require_features


class RetrievalScores(NamedTuple):
  """Means over queries, in [0, 1].

  Attributes:
    recall: share of queries with an item of their class among the first k, by k.
    mean_average_precision: of queries that have such items at all, the mean precision at each of them.
    r_precision: of these, the share of their class among the first R, where R is how many there are.
    map_at_r: of these, `1/R sum_{i <= R} precision(i) relevant(i)` (Musgrave et al. 2020).
  """

  recall: dict[int, float]
  mean_average_precision: float
  r_precision: float
  map_at_r: float


def retrieval_scores(
  embeddings: ArrayLike,
  labels: ArrayLike,
  ks: Sequence[int] = (1, 2, 4, 8),
  *,
  gallery: tuple[ArrayLike, ArrayLike] | None = None,
  chunk_size: int = 256,
) -> RetrievalScores:
  """Judges embeddings by what each finds among all others, or in a gallery.

  Args:
    embeddings: of the queries, `[queries, dim]`, of any length but 0.
    labels: integers `[queries]`.
    ks: of Recall@K, at least 1.
    gallery: embeddings `[items, dim]` and labels `[items]` that are searched; None: every query searches all
      other queries.
    chunk_size: queries at a time; static. Memory is that of `chunk_size x items` similarities.

  Returns:
    The scores. A query without any item of its class counts as a failure in `recall` and nowhere else.

  Raises:
    ValueError: if shapes do not fit, embeddings are not finite or zero, a k is below 1 or exceeds the items,
      or no query has an item of its class.

  References:
    Wei et al., Fine-Grained Image Analysis with Deep Learning: A Survey, TPAMI 2022
    (https://arxiv.org/abs/2111.06119), section on retrieval.

  Examples:
    >>> embeddings = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.5, 0.5]])
    >>> scores = retrieval_scores(embeddings, np.array([0, 0, 1, 1]), ks=(1, 2))
    >>> scores.recall, scores.r_precision
    ({1: 0.75, 2: 0.75}, 0.75)
  """
  queries, names = _checked('embeddings', embeddings, labels)
  items, item_names = (queries, names) if gallery is None else _checked('gallery', *gallery)
  if items.shape[1] != queries.shape[1]:
    raise ValueError(f'embeddings have {queries.shape[1]} channels, the gallery {items.shape[1]}.')
  found = len(items) - (gallery is None)
  if not ks or min(ks) < 1 or max(ks) > found:
    raise ValueError(
      f'ks={tuple(ks)}: expected numbers from 1 to {found}, the items that are searched.'
    )
  if chunk_size < 1:
    raise ValueError(f'chunk_size={chunk_size}: expected at least 1.')
  counts = np.bincount(item_names, minlength=max(names.max(), item_names.max()) + 1)[names]
  counts = counts - (gallery is None)
  if not counts.any():
    raise ValueError('no query has an item of its own class: nothing can be found.')
  padded = -(-len(queries) // chunk_size) * chunk_size
  own = np.arange(len(queries)) if gallery is None else np.full(len(queries), len(items))
  chunks = [
    np.pad(array, [(0, padded - len(array)), *[(0, 0)] * (array.ndim - 1)]).reshape(
      -1, chunk_size, *array.shape[1:]
    )
    for array in (queries, names, own, counts)
  ]
  values = jax.device_get(_search(jnp.asarray(items), jnp.asarray(item_names), chunks, tuple(ks)))
  hits, average, r_precision, map_at_r = (
    value.reshape(padded, *value.shape[2:])[: len(queries)] for value in values
  )
  some = counts > 0
  means = (
    float(np.mean(value[some], dtype=np.float64)) for value in (average, r_precision, map_at_r)
  )
  recall = {k: float(np.mean(hits[:, i], dtype=np.float64)) for i, k in enumerate(ks)}
  return RetrievalScores(recall, *means)


@functools.partial(jax.jit, static_argnames='ks')
def _search(items, item_names, chunks, ks: tuple[int, ...]):
  def judge(chunk):
    queries, names, own, counts = chunk
    similarity = jnp.matmul(queries, items.T, precision='highest')
    itself = jnp.arange(len(items)) == own[:, None]
    similarity = jnp.where(itself, -jnp.inf, similarity)
    order = jnp.argsort(-similarity, axis=1, stable=True)
    relevant = (item_names[order] == names[:, None]) & ~jnp.take_along_axis(itself, order, 1)
    rank = jnp.arange(1, len(items) + 1)
    precision = jnp.cumsum(relevant, 1) / rank
    within = rank <= counts[:, None]
    total = jnp.maximum(counts, 1)
    hits = jnp.stack([jnp.any(relevant[:, :k], 1) for k in ks], 1)
    return (
      hits,
      jnp.sum(jnp.where(relevant, precision, 0), 1) / total,
      jnp.sum(relevant & within, 1) / total,
      jnp.sum(jnp.where(relevant & within, precision, 0), 1) / total,
    )

  return jax.lax.map(judge, tuple(map(jnp.asarray, chunks)))


def _checked(name: str, embeddings: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  """Returns unit embeddings float32 and labels, int64."""
  embeddings, labels = np.asarray(embeddings, np.float64), np.asarray(labels)
  require_features(name, embeddings)
  if labels.shape != embeddings.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(
      f'{name}: labels must be integers [{len(embeddings)}], got {labels.dtype} {labels.shape}.'
    )
  if labels.min() < 0:
    raise ValueError(f'{name}: labels must not be negative, got {labels.min()}.')
  norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
  if not norms.all():
    raise ValueError(f'{name}: the embedding at {int(np.flatnonzero(norms == 0)[0])} is zero.')
  return (embeddings / norms).astype(np.float32), labels.astype(np.int64)
