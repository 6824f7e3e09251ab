"""Cross-entropies of a classifier: plain, smoothed, weighted by class, focal, of several labels.

What depends on the class counts of an imbalanced training set is in `long_tail`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_not_negative, require_share
from jaxlab.losses._labels import at_labels, one_or_nan, require_labels, require_multi_labels, wide


def cross_entropy(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
  """Cross-entropy to integer labels, `-log softmax(logits)[label]`.

  That of optax, but for labels out of range: there `optax.softmax_cross_entropy_with_integer_labels` takes
  -1 for the last class.

  Args:
    logits: `[..., num_classes]`; -inf masks a class.
    labels: integers, `[...]`.

  Returns:
    `[...]`, float32 or wider, in nats.

  Raises:
    ValueError: if the shapes do not fit, or labels are (where concrete) out of range; NaN where they are not.

  Examples:
    >>> jnp.exp(-cross_entropy(jnp.log(jnp.array([[1.0, 3.0]])), jnp.array([1]))).tolist()
    [0.75]
  """
  require_labels(logits, labels)
  (logits,), labels = accumulated(logits), wide(labels)
  num_classes = logits.shape[-1]
  inside = jnp.clip(labels, 0, num_classes - 1)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, inside)
  return losses * one_or_nan(labels, num_classes, losses.dtype)


def label_smoothing_cross_entropy(
  logits: ArrayLike, labels: ArrayLike, smoothing: ArrayLike = 0.1
) -> jax.Array:
  """Cross-entropy to `1 - smoothing` of the label and `smoothing` spread over all classes.

    loss = -(1 - smoothing) log p[label] - smoothing mean_c log p[c],  p = softmax(logits)

  The mean is over all classes that are not masked, the label's included.

  Args:
    logits: `[..., num_classes]`; -inf masks a class.
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
  own = at_labels(log_probs, labels)
  available = logits != -jnp.inf
  total = jnp.sum(jnp.where(available, log_probs, 0), axis=-1)
  return -(1 - smoothing) * own - smoothing * (total / jnp.sum(available, axis=-1))


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
  total = jnp.sum(weights)
  return jnp.sum(_weighted(weights, cross_entropy(logits, labels))) / jnp.where(total > 0, total, 1)


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
  losses = weighted = cross_entropy(logits, labels)
  if class_weights is not None:
    weighted = _weighted(_weights_of_examples(class_weights, labels, logits), losses)
  inner = weighted if weight_inside else losses
  # A power below 1 has no gradient at 0, where the loss of a perfect example is flat.
  error = -jnp.expm1(-jnp.where(inner > 0, inner, 1))
  return jnp.where(inner > 0, error**gamma, 1) * weighted


def sigmoid_focal_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  gamma: ArrayLike = 2.0,
  alpha: ArrayLike | None = None,
) -> jax.Array:
  """Binary cross-entropies of each class against the rest that fade for what is well classified.

    loss = -sum_c a_c (1 - p_c)^gamma log p_c,
    p_c = sigmoid(logit_c), a_c = alpha for the label, 1 - sigmoid(logit_c), 1 - alpha otherwise

  The sum of `optax.sigmoid_focal_loss` over the classes. A class with the logit -inf has no share.

  Args:
    logits: `[..., num_classes]`.
    labels: integers, `[...]`.
    gamma: non-negative scalar; 2 in the paper.
    alpha: in [0, 1], 0.25 in the paper; None: all weights are 1.

  Returns:
    `[...]`, float32 or wider; NaN for labels out of range that are traced.

  Raises:
    ValueError: if the shapes do not fit, or (where concrete) labels or `alpha` are out of range or `gamma`
      negative.

  References:
    Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, eq. 5
    (https://arxiv.org/abs/1708.02002).

  Examples:
    >>> print(sigmoid_focal_loss(jnp.zeros((1, 2)), jnp.array([0]), gamma=0.0))
    [1.3862944]
  """
  require_labels(logits, labels)
  require_not_negative(gamma=gamma)
  if alpha is not None:
    require_share(alpha=alpha)
  (logits,), labels = accumulated(logits), jnp.asarray(labels)
  num_classes = logits.shape[-1]
  own = jax.nn.one_hot(labels, num_classes, dtype=logits.dtype)
  masked = jnp.isneginf(logits)
  losses = optax.sigmoid_focal_loss(jnp.where(masked, 0, logits), own, alpha=alpha, gamma=gamma)
  losses = jnp.where(masked, jnp.where(own > 0, jnp.inf, 0), losses)
  return jnp.sum(losses, axis=-1) * one_or_nan(labels, num_classes, losses.dtype)


def multi_label_bce(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
  """Binary cross-entropy of every class, averaged over an example's classes.

    loss = -mean_c (y_c log sigmoid(logit_c) + (1 - y_c) log sigmoid(-logit_c))

  The mean of `optax.sigmoid_binary_cross_entropy`; that of a batch is the mean over all its entries.

  Args:
    logits: `[..., num_classes]`; a class with the logit -inf has no share.
    labels: 0 or 1 for each class, `[..., num_classes]`.

  Returns:
    `[...]`, float32 or wider, in nats; NaN for an example with traced labels other than 0 and 1.

  Raises:
    ValueError: if the shapes differ, or (where concrete) labels are others than 0 and 1.

  Examples:
    >>> print(multi_label_bce(jnp.zeros((1, 3)), jnp.array([[1, 0, 1]])))
    [0.6931472]
  """
  shape = jnp.shape(logits)
  if not shape or 0 in shape or jnp.shape(labels) != shape:
    raise ValueError(
      f'Expected logits and labels [..., num_classes], not empty; got {shape} and {jnp.shape(labels)}.'
    )
  require_multi_labels(labels=labels)
  (logits,) = accumulated(logits)
  labels = jnp.asarray(labels).astype(logits.dtype)
  masked, right = jnp.isneginf(logits), (labels == 0) | (labels == 1)
  terms = optax.sigmoid_binary_cross_entropy(jnp.where(masked, 0, logits), labels)
  terms = jnp.where(masked, jnp.where(labels > 0, jnp.inf, 0), terms)
  values = jnp.sum(terms, -1) / jnp.sum(~masked, -1, dtype=terms.dtype)
  return jnp.where(jnp.all(right, -1), values, jnp.nan)


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
  return at_labels(jnp.asarray(class_weights, logits.dtype), labels)


def _weighted(weights: jax.Array, losses: jax.Array) -> jax.Array:
  """Returns `weights * losses`, 0 for a weight of 0 also where the loss is infinite."""
  return jnp.where(weights == 0, 0, weights * losses)
