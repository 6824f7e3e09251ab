"""Yardsticks for the worst classes: harmonic, geometric and lowest recall, recalls of groups of classes.

On a balanced test set the mean recall is the accuracy and hides classes near zero; the harmonic mean and
the lowest recall do not (Du & Wu, No One Left Behind: Improving the Worst Categories in Long-Tailed
Learning, CVPR 2023, https://arxiv.org/abs/2303.03630).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlab.evaluation.classification import confusion_matrix, per_class_recall
from jaxlab.losses._arguments import accumulated
from jaxlab.tracing import is_concrete

ZERO_REPLACEMENT = 1e-3  # as in Du & Wu 2023: a recall of 0.1 %


def harmonic_mean(recalls: ArrayLike, zero_replacement: float = ZERO_REPLACEMENT) -> jax.Array:
  """Harmonic mean of the recalls, `C / sum_c 1 / r_c`, where recalls of zero count as a small number.

  Args:
    recalls: `[..., num_classes]` in [0, 1].
    zero_replacement: what stands for a recall of exactly 0.

  Returns:
    `[...]` in [0, 1], float32 or wider.

  Raises:
    ValueError: no classes, a replacement <= 0 or, where they are concrete, a recall that is NaN (a class
      without test examples, which is named) or outside [0, 1].

  >>> round(float(harmonic_mean(np.array([0.5, 0.25]))), 4)
  0.3333
  """
  recalls = _replace_zeros(recalls, zero_replacement)
  return 1 / jnp.mean(1 / recalls, axis=-1)


def geometric_mean(recalls: ArrayLike, zero_replacement: float = ZERO_REPLACEMENT) -> jax.Array:
  """Geometric mean of the recalls, `exp(mean_c log r_c)`; arguments and errors of `harmonic_mean`."""
  return jnp.exp(jnp.mean(jnp.log(_replace_zeros(recalls, zero_replacement)), axis=-1))


def lowest_recall(recalls: ArrayLike) -> jax.Array:
  """Returns `min_c r_c` of recalls `[..., num_classes]`, with no replacement of zeros; `[...]`.

  Raises:
    ValueError: as in `harmonic_mean`.
  """
  return jnp.min(_check(recalls), axis=-1)


def group_recalls(recalls: ArrayLike, groups: Mapping[str, ArrayLike]) -> dict[str, jax.Array]:
  """Mean recall of each group of classes.

  Args:
    recalls: `[..., num_classes]`.
    groups: bool `[num_classes]` by name, e.g. of `jaxlab.data.shot_groups`.

  Returns:
    `[...]` by name; NaN for a group without classes.

  Raises:
    ValueError: as in `harmonic_mean`, or a group of another length.
  """
  recalls = _check(recalls)
  for name, members in groups.items():
    if jnp.shape(members) != recalls.shape[-1:]:
      raise ValueError(
        f'group {name!r} has shape {jnp.shape(members)}, expected bool [{recalls.shape[-1]}], one for '
        'each class.'
      )
  return {
    name: jnp.mean(recalls, axis=-1, where=jnp.asarray(members, bool))
    for name, members in groups.items()
  }


def recall_metrics(
  predictions: ArrayLike,
  labels: ArrayLike,
  num_classes: int,
  groups: Mapping[str, ArrayLike] | None = None,
  zero_replacement: float = ZERO_REPLACEMENT,
) -> dict[str, float]:
  """All the yardsticks of a set of predictions; host code.

  Args:
    predictions: integers `[examples]`.
    labels: integers `[examples]`.
    num_classes: number of classes; each needs a test example.
    groups: bool `[num_classes]` by name, e.g. of `jaxlab.data.shot_groups` or `index_groups`.
    zero_replacement: see `harmonic_mean`.

  Returns:
    Numbers in [0, 1]: `accuracy`, `mean` (of the recalls), `harmonic`, `geometric`, `lowest`, and the mean
    recall of each group by its name (`many`, `medium`, `few`), NaN for a group without classes.

  Raises:
    ValueError: a class without test examples (named), classes out of range, lengths that differ.

  >>> metrics = recall_metrics(np.array([0, 0, 1, 0]), np.array([0, 0, 1, 1]), num_classes=2)
  >>> {name: round(value, 3) for name, value in metrics.items()}
  {'accuracy': 0.75, 'mean': 0.75, 'harmonic': 0.667, 'geometric': 0.707, 'lowest': 0.5}
  """
  if jnp.ndim(labels) != 1 or jnp.shape(predictions) != jnp.shape(labels):
    raise ValueError(
      f'predictions have shape {jnp.shape(predictions)}, labels {jnp.shape(labels)}; expected '
      '[examples] for both.'
    )
  confusion = confusion_matrix(predictions, labels, num_classes)
  return confusion_metrics(confusion, groups, zero_replacement)


def confusion_metrics(
  confusion: ArrayLike,
  groups: Mapping[str, ArrayLike] | None = None,
  zero_replacement: float = ZERO_REPLACEMENT,
) -> dict[str, float]:
  """`recall_metrics` of a confusion matrix `[num_classes, num_classes]`, rows are labels (as in `Tally`)."""
  # Floats of the default width: the recalls are then as exact as the means of them.
  confusion = jnp.asarray(confusion, float)
  recalls = per_class_recall(confusion)
  metrics = {
    'accuracy': jnp.trace(confusion) / jnp.sum(confusion),
    'mean': jnp.mean(_check(recalls)),
    'harmonic': harmonic_mean(recalls, zero_replacement),
    'geometric': geometric_mean(recalls, zero_replacement),
    'lowest': lowest_recall(recalls),
    **group_recalls(recalls, groups or {}),
  }
  return {name: float(value) for name, value in metrics.items()}


def macro_f1(confusion: ArrayLike) -> jax.Array:
  """Mean of the classes' F1, `2 P R / (P + R)`, 0 where both are 0 or a class is never predicted.

  Args:
    confusion: `[..., num_classes, num_classes]`, rows are labels; each needs a test example.

  Returns:
    `[...]` in [0, 1], float32 or wider.

  Raises:
    ValueError: as in `harmonic_mean`, or for another shape.

  >>> round(float(macro_f1(np.array([[2, 0], [1, 1]]))), 4)
  0.7333
  """
  shape = jnp.shape(confusion)
  if len(shape) < 2 or shape[-1] != shape[-2]:
    raise ValueError(f'confusion has shape {shape}, expected [..., num_classes, num_classes].')
  confusion = jnp.asarray(confusion, float)
  return _f1(confusion, _check(per_class_recall(confusion)))


def imbalanced_metrics(
  predictions: ArrayLike, labels: ArrayLike, num_classes: int
) -> dict[str, float]:
  """Yardsticks where classes are unequal in training or test data; host code.

  Classes without test examples are left out, with a warning: also as labels of others.

  Args:
    predictions: integers `[examples]`.
    labels: integers `[examples]`, the true ones.
    num_classes: number of classes.

  Returns:
    Numbers in [0, 1]: `accuracy`, `macro_recall` (the mean of the recalls), `macro_f1`, `harmonic` (mean of
    the recalls, 0 if one of them is), `lowest`.

  Raises:
    ValueError: classes out of range, lengths that differ, no examples.

  >>> metrics = imbalanced_metrics(np.zeros(10, int), np.array([0] * 9 + [1]), num_classes=2)
  >>> {name: round(value, 3) for name, value in metrics.items()}
  {'accuracy': 0.9, 'macro_recall': 0.5, 'macro_f1': 0.474, 'harmonic': 0.0, 'lowest': 0.0}
  """
  if jnp.ndim(labels) != 1 or jnp.shape(predictions) != jnp.shape(labels) or not len(labels):
    raise ValueError(
      f'predictions have shape {jnp.shape(predictions)}, labels {jnp.shape(labels)}; expected '
      '[examples] for both.'
    )
  confusion = np.asarray(confusion_matrix(predictions, labels, num_classes), np.float64)
  there = confusion.sum(1) > 0
  if not there.all():
    missing = ', '.join(map(str, np.flatnonzero(~there)))
    warnings.warn(f'classes without test examples are left out: {missing}.', stacklevel=2)
  recalls = np.diag(confusion)[there] / confusion.sum(1)[there]
  # A prediction of a missing class is wrong, and its column no class: recalls count it, precision need not.
  found = {
    'accuracy': np.trace(confusion) / confusion.sum(),
    'macro_recall': recalls.mean(),
    'macro_f1': _f1(jnp.asarray(confusion[there][:, there], float), jnp.asarray(recalls, float)),
    'harmonic': 0.0 if np.any(recalls == 0) else 1 / np.mean(1 / recalls),
    'lowest': recalls.min(),
  }
  return {name: float(value) for name, value in found.items()}


def _f1(confusion: jax.Array, recall: jax.Array) -> jax.Array:
  """Returns the mean F1 of the classes of a confusion matrix, whose recalls are given."""
  predicted = jnp.sum(confusion, axis=-2)
  right = jnp.diagonal(confusion, axis1=-2, axis2=-1)
  precision = jnp.where(predicted > 0, right / jnp.maximum(predicted, 1), 0)
  both = precision + recall
  return jnp.mean(jnp.where(both > 0, 2 * precision * recall / jnp.where(both > 0, both, 1), 0), -1)


def _replace_zeros(recalls: ArrayLike, zero_replacement: float) -> jax.Array:
  if is_concrete(zero_replacement) and not np.asarray(zero_replacement) > 0:
    raise ValueError(f'zero_replacement is {zero_replacement}, expected a number > 0.')
  recalls = _check(recalls)
  return jnp.where(recalls == 0, zero_replacement, recalls)


def _check(recalls: ArrayLike) -> jax.Array:
  if not jnp.ndim(recalls) or not jnp.shape(recalls)[-1]:
    raise ValueError(f'recalls have shape {jnp.shape(recalls)}, expected [..., num_classes].')
  if is_concrete(recalls):
    values = np.asarray(recalls)
    missing = np.argwhere(np.isnan(values))
    if missing.size:
      raise ValueError(
        f'class {missing[0][-1]} has no test examples, so its recall is not defined ({len(missing)} such '
        'classes); leave these classes out, or test on data that has all.'
      )
    if values.min() < 0 or values.max() > 1:
      raise ValueError(
        f'recalls run from {values.min()} to {values.max()}, expected shares in [0, 1], not percent.'
      )
  return accumulated(recalls)[0]
