"""Accuracy, recall and confusion of classifiers, for a batch and accumulated over batches.

The accumulator is a pytree of integer counts, so that the result depends neither on the order of the
batches nor on how they are spread over devices:

  state = tally_init(num_classes)
  for batch in batches:
    state = tally_update(state, logits(batch), batch['label'], batch['mask'])
  metrics = tally_compute(state)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_no_nan
from jaxlab.losses._labels import require_classes, wide


def predicted_classes(logits: ArrayLike) -> jax.Array:
  """The class of the largest logit (or probability), of equal ones the first; no class where one is NaN.

  Args:
    logits: `[..., num_classes]`.

  Returns:
    int32 `[...]`. Under `jit`, where it cannot raise, -1 for a row with NaN.

  Raises:
    ValueError: if concrete logits hold NaN; it names the first row.
  """
  require_no_nan(logits=logits)
  if isinstance(logits, np.ndarray):
    # Compared as they are: float64 values that differ may be one in float32.
    return jnp.asarray(np.argmax(logits, axis=-1), jnp.int32)
  logits = jnp.asarray(logits)
  classes = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return jnp.where(jnp.any(jnp.isnan(logits), axis=-1), -1, classes)


def label_rank(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
  """Rank of the correct class among the logits: 0 is the largest.

  Of equal logits the class with the lower index comes first, as in `argmax` and `jax.lax.top_k`.

  Args:
    logits: `[..., num_classes]`.
    labels: integers of shape `[...]`, in range.

  Returns:
    int32 of shape `[...]`, in [0, num_classes); `num_classes` where a logit is NaN or the label out of range.
  """
  logits, labels = jnp.asarray(logits), wide(labels)
  if logits.shape[:-1] != labels.shape:
    raise ValueError(
      f'Expected logits [..., classes], labels [...]; got {logits.shape}, {labels.shape}.'
    )
  num_classes = logits.shape[-1]
  known = _in_range(labels, num_classes) & ~jnp.any(jnp.isnan(logits), axis=-1)
  labels = jnp.clip(labels, 0, num_classes - 1)
  own = jnp.take_along_axis(logits, labels[..., None], axis=-1)
  earlier = jnp.arange(logits.shape[-1]) < labels[..., None]
  rank = jnp.sum((logits > own) | ((logits == own) & earlier), axis=-1, dtype=jnp.int32)
  return jnp.where(known, rank, num_classes)


def top_k_accuracy(
  logits: ArrayLike, labels: ArrayLike, k: int = 1, mask: ArrayLike | None = None
) -> jax.Array:
  """Share of the examples whose correct class is among the k largest logits.

  Args:
    logits: `[batch, num_classes]`.
    labels: integers, `[batch]`.
    k: between 1 and `num_classes`.
    mask: `[batch]`, false for examples that do not count (padding).

  Returns:
    A float32 scalar in [0, 1]; NaN if no example counts, or one without a rank (see `label_rank`).

  Raises:
    ValueError: if `k` or (where they are concrete) the labels are out of range, logits are NaN, or shapes do
      not fit.

  Examples:
    >>> logits = jnp.array([[0.1, 0.9, 0.5], [0.8, 0.1, 0.3]])
    >>> (
    ...   float(top_k_accuracy(logits, jnp.array([2, 0]))),
    ...   float(top_k_accuracy(logits, jnp.array([2, 0]), k=2)),
    ... )
    (0.5, 1.0)
  """
  num_classes = jnp.shape(logits)[-1]
  _require_k(k, num_classes)
  require_classes(labels, num_classes, mask)
  ranks = label_rank(logits, labels)
  require_no_nan(mask, logits=logits)
  correct = jnp.where(ranks < num_classes, (ranks < k).astype(jnp.float32), jnp.nan)
  return jnp.mean(correct, where=None if mask is None else jnp.asarray(mask, bool))


def confusion_matrix(
  predictions: ArrayLike, labels: ArrayLike, num_classes: int, mask: ArrayLike | None = None
) -> jax.Array:
  """Counts of (label, prediction) pairs.

  Args:
    predictions: integers, `[batch]`.
    labels: integers, `[batch]`.
    num_classes: number of classes.
    mask: `[batch]`, false for examples that do not count.

  Returns:
    `[num_classes, num_classes]` int32; rows are labels, columns are predictions. Under `jit`, where they
    cannot raise, pairs with a class out of range are left out.

  Raises:
    ValueError: if concrete labels or predictions are out of range.
  """
  require_classes(labels, num_classes, mask)
  require_classes(predictions, num_classes, mask, 'predictions')
  predictions, labels = jnp.asarray(predictions), jnp.asarray(labels)
  counts = _in_range(labels, num_classes) & _in_range(predictions, num_classes)
  if mask is not None:
    counts &= jnp.asarray(mask, bool)
  # A negative index would count from the end: send what does not count past it instead.
  rows = jnp.where(counts, labels, num_classes)
  zeros = jnp.zeros((num_classes, num_classes), jnp.int32)
  return zeros.at[rows, predictions].add(1, mode='drop')


def per_class_recall(confusion: ArrayLike) -> jax.Array:
  """Share of each class's examples that are predicted as it: diagonal / row sums.

  Args:
    confusion: `[num_classes, num_classes]`, rows are labels.

  Returns:
    `[num_classes]`, float32 or wider; NaN for a class without examples (`jnp.nanmean` gives the balanced
    accuracy).
  """
  confusion = jnp.asarray(confusion)
  (correct,) = accumulated(jnp.diagonal(confusion))
  return correct / jnp.sum(confusion, axis=1)


class Tally(NamedTuple):
  """Counts over examples. Tallies of disjoint examples add: `jax.tree.map(jnp.add, a, b)`.

  Attributes:
    confusion: `[num_classes, num_classes]` int32, rows are labels, columns are argmax predictions.
    ranks: `[num_classes]` int32, how often the correct class had rank r.
    count: int32 scalar, number of examples.
    undefined: int32 scalar, how many of them have NaN logits or a label out of range.
  """

  confusion: jax.Array
  ranks: jax.Array
  count: jax.Array
  undefined: jax.Array


def tally_init(num_classes: int) -> Tally:
  """Returns the tally of no examples."""
  if num_classes < 1:
    raise ValueError(f'num_classes must be positive, got {num_classes}.')
  return Tally(
    jnp.zeros((num_classes, num_classes), jnp.int32),
    jnp.zeros((num_classes,), jnp.int32),
    jnp.zeros((), jnp.int32),
    jnp.zeros((), jnp.int32),
  )


def tally_update(
  tally: Tally, logits: ArrayLike, labels: ArrayLike, mask: ArrayLike | None = None
) -> Tally:
  """Counts a batch.

  Args:
    tally: the counts so far.
    logits: `[batch, num_classes]`.
    labels: integers, `[batch]`.
    mask: `[batch]`, false for examples that do not count (padding).

  Returns:
    The new counts. An example with NaN logits or a label out of range raises where it is concrete; under
    `jit` all metrics of the tally are NaN from then on.

  Raises:
    ValueError: if labels are out of range, logits are NaN, or shapes do not fit.
  """
  num_classes = tally.ranks.size
  logits, labels = jnp.asarray(logits), jnp.asarray(labels)
  if logits.shape != (*labels.shape, num_classes) or labels.ndim != 1:
    raise ValueError(
      f'Expected logits [batch, {num_classes}] and labels [batch], got {logits.shape}, {labels.shape}.'
    )
  require_classes(labels, num_classes, mask)
  counts = jnp.ones(labels.shape, bool) if mask is None else jnp.asarray(mask, bool)
  require_no_nan(mask, logits=logits)
  ranks = jnp.where(counts, label_rank(logits, labels), num_classes)
  known = ranks < num_classes
  predictions = jnp.argmax(logits, axis=-1)
  return Tally(
    tally.confusion + confusion_matrix(predictions, labels, num_classes, known),
    tally.ranks.at[ranks].add(1, mode='drop'),
    tally.count + jnp.sum(counts, dtype=jnp.int32),
    tally.undefined + jnp.sum(counts & ~known, dtype=jnp.int32),
  )


def tally_compute(tally: Tally, top_k: Sequence[int] = (1, 5)) -> dict[str, jax.Array]:
  """Turns counts into metrics.

  Args:
    tally: the counts.
    top_k: which accuracies; those with `k >= num_classes` are left out.

  Returns:
    `top_<k>_accuracy` scalars, `per_class_recall` `[num_classes]`, and `mean_per_class_recall`, its mean
    over the classes that occur. NaN where nothing was counted, or an undefined example.
  """
  defined = jnp.where(tally.undefined > 0, jnp.nan, 1.0).astype(jnp.float32)
  cumulative = jnp.cumsum(tally.ranks).astype(jnp.float32) * defined
  metrics = {}
  for k in top_k:
    _require_k(k, None)
    if k < cumulative.size:
      metrics[f'top_{k}_accuracy'] = cumulative[k - 1] / tally.count
  recall = per_class_recall(tally.confusion) * defined
  return metrics | {'per_class_recall': recall, 'mean_per_class_recall': jnp.nanmean(recall)}


def _require_k(k: int, num_classes: int | None) -> None:
  if k < 1 or (num_classes is not None and k > num_classes):
    raise ValueError(f'k must be in [1, {num_classes or "num_classes"}], got {k}.')


def _in_range(classes: jax.Array, num_classes: int) -> jax.Array:
  return (classes >= 0) & (classes < num_classes)
