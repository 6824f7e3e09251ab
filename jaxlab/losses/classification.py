"""Cross-entropies of a classifier: smoothed, weighted by class, focal.

What depends on the class counts of an imbalanced training set is in `long_tail`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_not_negative, require_share
from jaxlab.losses._labels import require_labels


def label_smoothing_cross_entropy(
  logits: ArrayLike, labels: ArrayLike, smoothing: ArrayLike = 0.1
) -> jax.Array:
  """Cross-entropy to `1 - smoothing` of the label and `smoothing` spread over all classes.

    loss = -(1 - smoothing) log p[label] - smoothing mean_c log p[c],  p = softmax(logits)

  The mean is over all classes, the label's included.

  Args:
    logits: `[..., num_classes]`.
    labels: integers, `[...]`.
    smoothing: in [0, 1]; a scalar or one value per example, `[...]`.

  Returns:
    `[...]`, float32 or wider, in nats.

  Raises:
    ValueError: if the shapes do not fit, or labels or smoothing are (where concrete) out of range.

  References:
    Szegedy et al., Rethinking the Inception Architecture, CVPR 2016, section 7
    (https://arxiv.org/abs/1512.00567).

  Examples:
    >>> loss = label_smoothing_cross_entropy(jnp.log(jnp.array([[1.0, 3.0]])), jnp.array([1]))
    >>> round(float(loss[0]), 4)
    0.3426
  """
  require_labels(logits, labels)
  require_share(smoothing=smoothing)
  (logits,) = accumulated(logits)
  if jnp.shape(smoothing) not in ((), logits.shape[:-1]):
    raise ValueError(
      f'smoothing must be a scalar or {logits.shape[:-1]} like labels, got {jnp.shape(smoothing)}.'
    )
  smoothing = jnp.asarray(smoothing, logits.dtype)
  log_probs = jax.nn.log_softmax(logits)
  own = jnp.take_along_axis(log_probs, jnp.asarray(labels)[..., None], axis=-1)[..., 0]
  return -(1 - smoothing) * own - smoothing * jnp.mean(log_probs, axis=-1)


def weighted_cross_entropy(
  logits: ArrayLike, labels: ArrayLike, class_weights: ArrayLike
) -> jax.Array:
  """Mean cross-entropy in which an example weighs as much as its class.

    loss = sum_i w[y_i] CE_i / sum_i w[y_i]

  The divisor is the sum of the weights and not the number of examples, as in PyTorch's weighted
  cross-entropy: only ratios of weights matter. A batch whose weights are all 0 has loss 0.

  Args:
    logits: `[..., num_classes]`.
    labels: integers, `[...]`.
    class_weights: non-negative, `[num_classes]`; see `long_tail.class_balanced_weights`.

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: if the shapes do not fit, or (where concrete) labels are out of range or weights negative.

  Examples:
    >>> logits = jnp.array([[0.0, 0.0], [9.0, 0.0]])
    >>> round(float(weighted_cross_entropy(logits, jnp.array([0, 1]), jnp.array([1.0, 0.0]))), 4)
    0.6931
  """
  require_labels(logits, labels)
  (logits,), labels = accumulated(logits), jnp.asarray(labels)
  weights = _weights_of_examples(class_weights, labels, logits)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  total = jnp.sum(weights)
  return jnp.sum(weights * losses) / jnp.where(total > 0, total, 1)


def focal_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  gamma: ArrayLike = 1.0,
  class_weights: ArrayLike | None = None,
  weight_inside: bool = False,
) -> jax.Array:
  """Cross-entropy that fades for well classified examples (softmax form).

    loss = w[y] (1 - exp(-CE))^gamma CE

  Args:
    logits: `[..., num_classes]`.
    labels: integers, `[...]`.
    gamma: non-negative scalar; 0 is the cross-entropy, 1 the value of LDAM's experiments.
    class_weights: non-negative, `[num_classes]`; None: all 1.
    weight_inside: whether the weight enters the exponential too, `(1 - exp(-w CE))^gamma w CE`, as in the
      code of LDAM, so that a large weight also makes an example look harder.

  Returns:
    `[...]`, float32 or wider. The mean of it is what LDAM's code takes, with weights as well.

  Raises:
    ValueError: if the shapes do not fit, or (where concrete) labels are out of range, weights or `gamma`
      negative.

  References:
    Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, eq. 4
    (https://arxiv.org/abs/1708.02002); Cao et al., Learning Imbalanced Datasets with
    Label-Distribution-Aware Margin Loss, NeurIPS 2019 (https://arxiv.org/abs/1906.07413).
  """
  require_labels(logits, labels)
  require_not_negative(gamma=gamma)
  (logits,), labels = accumulated(logits), jnp.asarray(labels)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  weighted = losses
  if class_weights is not None:
    weighted = _weights_of_examples(class_weights, labels, logits) * losses
  inner = weighted if weight_inside else losses
  # A power below 1 has no gradient at 0, where the loss of a perfect example is flat.
  error = -jnp.expm1(-jnp.where(inner > 0, inner, 1))
  return jnp.where(inner > 0, error**gamma, 1) * weighted


def _weights_of_examples(
  class_weights: ArrayLike, labels: jax.Array, logits: jax.Array
) -> jax.Array:
  """Returns the weight of each example's class, `[...]`."""
  if jnp.shape(class_weights) != logits.shape[-1:]:
    raise ValueError(
      f'class_weights must be {logits.shape[-1:]} for logits {logits.shape}, '
      f'got {jnp.shape(class_weights)}.'
    )
  require_not_negative(class_weights=class_weights)
  return jnp.asarray(class_weights, logits.dtype)[labels]
