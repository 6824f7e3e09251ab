"""Baseline losses of classification, by the names that settings give them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax

from experiments.harness.supervised import Loss, cross_entropy
from jaxlab import losses
from jaxlab.losses import long_tail


def balanced_softmax(counts: np.ndarray) -> Loss:
  """Cross-entropy of `softmax(logits + log counts)`."""
  return lambda logits, labels, seen: long_tail.balanced_softmax_loss(logits, labels, counts)


def logit_adjusted(counts: np.ndarray, *, tau: float = 1.0) -> Loss:
  """Cross-entropy of `softmax(logits + tau log counts)`."""
  return lambda logits, labels, seen: long_tail.logit_adjusted_loss(logits, labels, counts, tau)


def label_smoothing(*, smoothing: float) -> Loss:
  """Cross-entropy to labels that are smoothed alike for all classes."""
  return lambda logits, labels, seen: losses.label_smoothing_cross_entropy(
    logits, labels, smoothing
  )


def label_aware_smoothing(counts: np.ndarray, **options: Any) -> Loss:
  """Cross-entropy to labels that are smoothed by class, see `losses.label_aware_smoothing`."""
  smoothing = long_tail.label_aware_smoothing(counts, **options)
  return lambda logits, labels, seen: long_tail.label_aware_smoothing_loss(
    logits, labels, smoothing
  )


def focal(*, gamma: float = 1.0) -> Loss:
  """Focal loss."""
  return lambda logits, labels, seen: losses.focal_loss(logits, labels, gamma)


def sigmoid_focal(*, gamma: float = 2.0, alpha: float | None = None) -> Loss:
  """Focal loss of each class against the rest."""
  return lambda logits, labels, seen: losses.sigmoid_focal_loss(logits, labels, gamma, alpha)


def class_balanced(
  counts: np.ndarray, steps_per_epoch: int, *, beta: float = 0.9999, start: int = 0
) -> Loss:
  """Cross-entropy with the weights of the effective number, from epoch `start` on."""

  def loss(logits, labels, seen):
    weights = long_tail.deferred_class_weights(counts, seen.step // steps_per_epoch, start, beta)
    return losses.weighted_cross_entropy(logits, labels, weights)

  return loss


def ldam(
  counts: np.ndarray, steps_per_epoch: int, *, beta: float = 0.0, start: int = 0, **options: Any
) -> Loss:
  """LDAM with deferred weights (DRW); `max_margin` and `scale` are those of `losses.ldam_loss`."""

  def loss(logits, labels, seen):
    weights = long_tail.deferred_class_weights(counts, seen.step // steps_per_epoch, start, beta)
    return long_tail.ldam_loss(logits, labels, counts, weights, **options)

  return loss


def distillation(*, temperature: float, alpha: float) -> Loss:
  """`alpha` KL to the teacher at a temperature + `(1 - alpha)` cross-entropy."""

  def loss(logits, labels, seen):
    own = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    soft = losses.distillation_loss(logits, seen.teacher, temperature)
    return alpha * soft + (1 - alpha) * own

  return loss


# What each needs: of the class counts and the steps of an epoch.
BASELINES: dict[str, tuple[Callable[..., Loss], int]] = {
  'cross_entropy': (lambda: cross_entropy, 0),
  'label_smoothing': (label_smoothing, 0),
  'focal': (focal, 0),
  'sigmoid_focal': (sigmoid_focal, 0),
  'balanced_softmax': (balanced_softmax, 1),
  'logit_adjusted': (logit_adjusted, 1),
  'label_aware_smoothing': (label_aware_smoothing, 1),
  'class_balanced': (class_balanced, 2),
  'ldam': (ldam, 2),
}


def baseline(
  name: str, options: Mapping[str, Any], counts: np.ndarray, steps_per_epoch: int
) -> Loss:
  """Returns a loss of `BASELINES`.

  Raises:
    ValueError: for another name, or options that it does not have.
  """
  if name not in BASELINES:
    raise ValueError(f'loss={name!r}: expected one of {", ".join(BASELINES)}.')
  make, known = BASELINES[name]
  try:
    return make(*(counts, steps_per_epoch)[:known], **options)
  except TypeError as error:
    raise ValueError(f'loss={name!r}: {error}') from None
