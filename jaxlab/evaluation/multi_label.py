"""Metrics of images that show several classes: average precision, precision and recall, shared classes."""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_finite, require_share
from jaxlab.losses._labels import require_multi_labels
from jaxlab.tracing import is_concrete

# What targets may hold; what is no 1 is negative, or not judged.
PROTOCOLS = {'coco': (0, 1), 'voc07': (-1, 0, 1), 'wider': (0, 1, 99)}


def average_precision(
  scores: ArrayLike, labels: ArrayLike, where: ArrayLike | None = None
) -> jax.Array:
  """Average precision of each class: the mean, over its positives, of the precision at their scores.

    AP = sum_n (R_n - R_{n-1}) P_n

  over the distinct scores from large to small; equal ones are one threshold. No interpolation, as in
  scikit-learn's `average_precision_score`.

  Args:
    scores: `[examples, num_classes]`, larger where the class is more likely to be there.
    labels: 0 or 1 for each class, `[examples, num_classes]`.
    where: which entries count, bool `[examples, num_classes]`; None: all. The others are as if they were not
      there: neither positives nor ranks.

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
  if where is not None and jnp.shape(where) != shape:
    raise ValueError(f'where must be {shape} like the scores, got {jnp.shape(where)}.')
  require_multi_labels(labels=labels)
  require_finite(scores=scores)
  (scores,) = accumulated(scores)
  finite = jnp.where(jnp.all(jnp.isfinite(scores), 0), 1, jnp.nan)
  labels = jnp.asarray(labels).astype(scores.dtype)
  if where is not None:
    # Behind all others, and never a positive.
    scores, labels = jnp.where(where, scores, -jnp.inf), jnp.where(where, labels, 0)

  def of_class(scores: jax.Array, labels: jax.Array) -> jax.Array:
    order = jnp.argsort(-scores)
    falling, hits = -scores[order], labels[order]
    # Of equal scores all count where the last one stands.
    last = jnp.searchsorted(falling, falling, side='right') - 1
    precision = (jnp.cumsum(hits) / jnp.arange(1, len(hits) + 1))[last]
    return jnp.sum(hits * precision) / jnp.sum(hits)

  return finite * jax.vmap(of_class, 1)(scores, labels)


def mean_average_precision(
  scores: ArrayLike, labels: ArrayLike, where: ArrayLike | None = None
) -> jax.Array:
  """Mean of `average_precision` over the classes that have positives, a scalar in [0, 1].

  NaN if no class has any, or if the average precision of one that has is NaN.

  Args:
    scores: `[examples, num_classes]`.
    labels: 0 or 1 for each class, `[examples, num_classes]`.
    where: which entries count, see `average_precision`.

  Raises:
    ValueError: as `average_precision`.
  """
  each = average_precision(scores, labels, where)
  positive = jnp.asarray(labels) > 0
  present = jnp.any(positive if where is None else positive & where, axis=0)
  return _mean_of(each, present)


class MultiLabelMetrics(NamedTuple):
  """What a protocol says of a classifier of several labels; all in [0, 1].

  Attributes:
    average_precision: of each class, `[num_classes]`.
    mean_average_precision: over classes with positives.
    overall_precision: OP, over all entries.
    overall_recall: OR.
    overall_f1: OF1, their harmonic mean.
    class_precision: CP, a mean over classes.
    class_recall: CR, a mean over classes with positives.
    class_f1: CF1, the harmonic mean of both means.
  """

  average_precision: jax.Array
  mean_average_precision: jax.Array
  overall_precision: jax.Array
  overall_recall: jax.Array
  overall_f1: jax.Array
  class_precision: jax.Array
  class_recall: jax.Array
  class_f1: jax.Array


def multi_label_metrics(
  scores: ArrayLike,
  targets: ArrayLike,
  protocol: Literal['coco', 'voc07', 'wider'] = 'coco',
  *,
  threshold: float = 0.5,
  top: int | None = None,
) -> MultiLabelMetrics:
  """Returns average precisions, and precision, recall and F1 over all entries and by class.

    OP = sum_c TP_c / sum_c max(P_c, 1),  OR = sum_c TP_c / sum_c N_c
    CP = mean_c TP_c / max(P_c, 1),  CR = mean_c TP_c / N_c

  with the predicted entries P_c (scores of at least `threshold`), the positives N_c, and those that are both.
  A class without positives has no average precision and no recall: it is left out of both means, with a
  warning where the targets are concrete. F1 is 0 where precision and recall are.

  Args:
    scores: probabilities, `[examples, num_classes]`.
    targets: `[examples, num_classes]`, 1 for a class that is there. Protocol 'coco': else 0. 'voc07': -1,
      or 0 where only difficult objects show it: such entries are dropped everywhere. 'wider': 0, or 99 where
      it is not specified: dropped from average precisions, and negative in the other metrics.
    protocol: of these.
    threshold: from which score on a class is predicted.
    top: predict at most so many classes of an image, those of its largest scores among all classes; average
      precisions are of all scores. None: no limit; the usual variant is 3.

  Raises:
    ValueError: if shapes do not fit, for another protocol, `top` out of range, and (where concrete) for other
      targets than the protocol's and scores that are no probabilities.

  References:
    Zhu & Wu, Residual Attention: A Simple but Effective Method for Multi-Label Recognition, ICCV 2021
    (https://arxiv.org/abs/2108.02456), the evaluation of its code.

  Examples:
    >>> scores = jnp.array([[0.9, 0.8], [0.7, 0.2]])
    >>> found = multi_label_metrics(scores, jnp.array([[1, 0], [1, 1]]))
    >>> [round(float(value), 3) for value in (found.overall_precision, found.overall_recall)]
    [0.667, 0.667]
    >>> float(multi_label_metrics(scores, jnp.array([[1, 0], [1, 1]]), top=1).overall_recall)
    0.6666666865348816
  """
  if protocol not in PROTOCOLS:
    raise ValueError(f'protocol is {protocol!r}, expected one of {", ".join(PROTOCOLS)}.')
  known = PROTOCOLS[protocol]
  if is_concrete(targets):
    values = np.asarray(targets)
    if wrong := np.argwhere(~np.isin(values, known)).tolist():
      held = values[tuple(wrong[0])]
      raise ValueError(f'targets of protocol {protocol} are of {known}; at {wrong[0]} is {held}.')
  require_share(scores=scores)
  targets = jnp.asarray(targets)
  positive, told = targets == 1, targets != {'coco': 2, 'voc07': 0, 'wider': 99}[protocol]
  precisions = average_precision(scores, positive, told)
  counted = told if protocol == 'voc07' else jnp.ones_like(told)
  (scores,) = accumulated(scores)
  if top is not None:
    if not 1 <= top <= scores.shape[1]:
      raise ValueError(f'top is {top}, expected 1 to {scores.shape[1]}, the classes.')
    best = jax.lax.top_k(scores, top)[1]
    chosen = jnp.sum(jax.nn.one_hot(best, scores.shape[1], dtype=scores.dtype), 1)
    scores = scores * chosen
  predicted = (scores >= threshold) & counted
  hits, found, there = (
    jnp.sum(entries, 0, dtype=scores.dtype)
    for entries in (predicted & positive, predicted, positive & counted)
  )
  present = there > 0
  if is_concrete(present) and not np.all(present):
    missing = np.flatnonzero(~np.asarray(present)).tolist()
    text = f'classes {missing} have no positives: left out of mean average precision and recall.'
    warnings.warn(text, stacklevel=2)
  found = jnp.maximum(found, 1)
  overall = jnp.sum(hits) / jnp.sum(found), jnp.sum(hits) / jnp.sum(there)
  by_class = jnp.mean(hits / found), _mean_of(hits / there, present)
  mean = _mean_of(precisions, present)
  return MultiLabelMetrics(precisions, mean, *overall, _f1(*overall), *by_class, _f1(*by_class))


def _mean_of(values: jax.Array, present: jax.Array) -> jax.Array:
  """Returns the mean of the values that are there, NaN if there is none."""
  return jnp.sum(jnp.where(present, values, 0)) / jnp.sum(present)


def _f1(precision: jax.Array, recall: jax.Array) -> jax.Array:
  both = precision + recall
  return jnp.where(both == 0, 0, 2 * precision * recall / jnp.where(both == 0, 1, both))


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
