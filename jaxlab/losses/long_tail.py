"""Losses for training sets whose classes have very different numbers of examples.

`class_counts` are the numbers of *training* examples per class, positive integers `[num_classes]`, never
those of a batch. The test set is class-balanced.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlab.losses._arguments import (
  accumulated,
  require_positive,
  require_same_shape,
  require_share,
)
from jaxlab.losses._labels import at_labels, one_or_nan, require_class_counts, require_labels
from jaxlab.losses.classification import (
  cross_entropy,
  label_smoothing_cross_entropy,
  weighted_cross_entropy,
)
from jaxlab.tracing import is_concrete


def class_balanced_weights(class_counts: ArrayLike, beta: float = 0.9999) -> np.ndarray:
  """Class weights inverse to the effective number of examples, of mean 1.

    w[c] = (1 - beta) / (1 - beta^n[c]),  scaled so that sum_c w[c] = num_classes

  Computed on the host: in float32 the difference `1 - beta^n` would cost four digits.

  Args:
    class_counts: positive integers, `[num_classes]`; concrete.
    beta: in [0, 1); 0 gives all ones, towards 1 it approaches weights `1 / n`.

  Returns:
    float64 `[num_classes]` (NumPy).

  Raises:
    ValueError: if a count is not a positive integer, or `beta` is out of range.

  References:
    Cui et al., Class-Balanced Loss Based on Effective Number of Samples, CVPR 2019, eq. 2
    (https://arxiv.org/abs/1901.05555); 0.9999 is LDAM's.

  Examples:
    >>> class_balanced_weights([100, 10]).round(3).tolist()
    [0.183, 1.817]
  """
  require_class_counts(class_counts)
  if not 0 <= beta < 1:
    raise ValueError(f'beta must be in [0, 1), got {beta}.')
  weights = (1 - beta) / (1 - beta ** np.asarray(class_counts, np.float64))
  return weights / weights.sum() * weights.size


def deferred_class_weights(
  class_counts: ArrayLike, epoch: ArrayLike, start: int = 160, beta: float = 0.9999
) -> np.ndarray | jax.Array:
  """Class weights of deferred re-weighting: ones until `start`, `class_balanced_weights` from then on.

  Args:
    class_counts: positive integers, `[num_classes]`; concrete.
    epoch: counted from 0; may be traced.
    start: the first epoch with weights; 160 of 200 for CIFAR in the paper.
    beta: see `class_balanced_weights`.

  Returns:
    `[num_classes]`: NumPy float64, or a jax array for an `epoch` that is one.

  Raises:
    ValueError: as `class_balanced_weights`.

  References:
    Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019,
    algorithm 1 (https://arxiv.org/abs/1906.07413).
  """
  weights = class_balanced_weights(class_counts, beta)
  where = jnp.where if isinstance(epoch, jax.Array) else np.where
  return where(epoch < start, 1.0, weights)


def ldam_margins(class_counts: ArrayLike, max_margin: ArrayLike = 0.5) -> jax.Array:
  """Margins inverse to the fourth root of the counts: `max_margin * (min(n) / n)^(1/4)`.

  Args:
    class_counts: positive integers, `[num_classes]`.
    max_margin: positive scalar, the margin of the smallest class.

  Returns:
    `[num_classes]` in jax's default float type.

  Raises:
    ValueError: if (where concrete) a count is not a positive integer or `max_margin <= 0`.

  References: Cao et al., NeurIPS 2019, eq. 13, as `ldam_loss`.

  Examples:
    >>> ldam_margins(jnp.array([160, 10])).tolist()
    [0.25, 0.5]
  """
  require_class_counts(class_counts)
  require_positive(max_margin=max_margin)
  counts = jnp.asarray(class_counts, float)
  return max_margin * (jnp.min(counts) / counts) ** 0.25


def ldam_loss(
  cosines: ArrayLike,
  labels: ArrayLike,
  class_counts: ArrayLike,
  class_weights: ArrayLike | None = None,
  *,
  max_margin: ArrayLike = 0.5,
  scale: ArrayLike = 30.0,
) -> jax.Array:
  """Label-distribution-aware margin loss: cross-entropy after the true class gave up its margin.

    loss = weighted_cross_entropy(scale * (cosines - margins[y] onehot(y)), y)

  Args:
    cosines: `[batch, num_classes]`, of unit features and unit class weights; used as they are to predict.
    labels: integers, `[batch]`.
    class_counts: positive integers, `[num_classes]`.
    class_weights: non-negative, `[num_classes]`, see `deferred_class_weights`; None: all 1.
    max_margin: positive scalar, see `ldam_margins`.
    scale: positive scalar.

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: if the shapes do not fit, or values are (where concrete) out of range.

  References:
    Cao et al., Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss, NeurIPS 2019,
    eq. 12 (https://arxiv.org/abs/1906.07413); 0.5 and 30 are those of the paper's code.
  """
  require_labels(cosines, labels)
  require_class_counts(class_counts, jnp.shape(cosines)[-1])
  require_positive(scale=scale)
  (cosines,) = accumulated(cosines)
  margins = ldam_margins(class_counts, max_margin).astype(cosines.dtype)
  own = jax.nn.one_hot(labels, cosines.shape[-1], dtype=cosines.dtype)
  weights = jnp.ones(cosines.shape[-1]) if class_weights is None else class_weights
  return weighted_cross_entropy(scale * (cosines - own * margins), labels, weights)


def balanced_softmax_loss(
  logits: ArrayLike, labels: ArrayLike, class_counts: ArrayLike
) -> jax.Array:
  """Cross-entropy of `softmax(logits + log n)`; predict by the plain logits.

  Args:
    logits: `[..., num_classes]`.
    labels: integers, `[...]`.
    class_counts: positive integers n, `[num_classes]`.

  Returns:
    `[...]`, float32 or wider, in nats.

  Raises:
    ValueError: if the shapes do not fit, or (where concrete) labels or counts are out of range.

  References:
    Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020, eq. 4
    (https://arxiv.org/abs/2007.10740).

  Examples:
    >>> counts = jnp.array([30, 10])
    >>> jnp.exp(-balanced_softmax_loss(jnp.zeros((1, 2)), jnp.array([1]), counts)).tolist()
    [0.25]
  """
  require_labels(logits, labels)
  require_class_counts(class_counts, jnp.shape(logits)[-1])
  (logits,) = accumulated(logits)
  logits += jnp.log(jnp.asarray(class_counts, logits.dtype))
  return cross_entropy(logits, labels)


def logit_adjusted_loss(
  logits: ArrayLike, labels: ArrayLike, class_counts: ArrayLike, tau: ArrayLike = 1.0
) -> jax.Array:
  """Cross-entropy of `softmax(logits + tau log(n / sum n))`; predict by the plain logits.

  With `tau` 1 it equals `balanced_softmax_loss`, with 0 the cross-entropy.

  Args:
    logits: `[..., num_classes]`.
    labels: integers, `[...]`.
    class_counts: positive integers n, `[num_classes]`.
    tau: scalar.

  Returns:
    `[...]`, float32 or wider, in nats.

  Raises:
    ValueError: if the shapes do not fit, or (where concrete) labels or counts are out of range.

  References:
    Menon et al., Long-tail learning via logit adjustment, ICLR 2021, eq. 10
    (https://arxiv.org/abs/2007.07314).
  """
  require_labels(logits, labels)
  logits = adjust_logits(logits, class_counts, -jnp.asarray(tau))
  return cross_entropy(logits, labels)


def adjust_logits(logits: ArrayLike, class_counts: ArrayLike, tau: ArrayLike = 1.0) -> jax.Array:
  """Takes the class frequencies out of a classifier trained by cross-entropy (post hoc adjustment).

    logits - tau log(n / sum n)

  Args:
    logits: `[..., num_classes]`.
    class_counts: positive integers n, `[num_classes]`.
    tau: scalar.

  Returns:
    `[..., num_classes]`, float32 or wider.

  Raises:
    ValueError: if the shapes do not fit or (where concrete) a count is not a positive integer.

  References:
    Menon et al., ICLR 2021, eq. 9 (https://arxiv.org/abs/2007.07314).
  """
  require_same_shape(logits=logits)
  require_class_counts(class_counts, jnp.shape(logits)[-1])
  (logits,) = accumulated(logits)
  counts = jnp.asarray(class_counts, logits.dtype)
  return logits - jnp.asarray(tau, logits.dtype) * jnp.log(counts / jnp.sum(counts))


def label_aware_smoothing(
  class_counts: ArrayLike, head: float, tail: float, shape: str = 'concave'
) -> np.ndarray:
  """Label smoothing per class: `head` for the largest class, `tail` for the smallest.

  With `u = (n - min n) / (max n - min n)` and `d = head - tail`:

    concave: tail + d sin(pi u / 2)
    linear:  tail + d u
    convex:  head + d sin(3 pi / 2 + pi u / 2)

  Args:
    class_counts: positive integers n, `[num_classes]`; concrete.
    head: in [0, 1].
    tail: in [0, 1]; (head, tail) = (0.4, 0.1) for CIFAR-100-LT of ratio 100 and Places-LT, (0.3, 0) for
      ImageNet-LT and iNaturalist 2018 in the paper's code.
    shape: 'concave', 'linear' or 'convex'.

  Returns:
    float64 `[num_classes]` (NumPy).

  Raises:
    ValueError: if a count is not a positive integer, all counts are equal, or an argument is out of range.

  References:
    Zhong et al., Improving Calibration for Long-Tailed Recognition, CVPR 2021, eq. 6 to 8
    (https://arxiv.org/abs/2104.00466).

  Examples:
    >>> label_aware_smoothing([100, 55, 10], 0.4, 0.1, 'linear').round(3).tolist()
    [0.4, 0.25, 0.1]
  """
  require_class_counts(class_counts)
  require_share(head=head, tail=tail)
  counts = np.asarray(class_counts, np.float64)
  if counts.min() == counts.max():
    raise ValueError(
      f'class_counts must differ for label-aware smoothing, got {counts[0]:g} for every class: '
      'use label_smoothing_cross_entropy.'
    )
  u = (counts - counts.min()) / (counts.max() - counts.min())
  curves = {
    'concave': tail + (head - tail) * np.sin(np.pi / 2 * u),
    'linear': tail + (head - tail) * u,
    'convex': head + (head - tail) * np.sin(1.5 * np.pi + np.pi / 2 * u),
  }
  if shape not in curves:
    raise ValueError(f'shape must be one of {sorted(curves)}, got {shape!r}.')
  return curves[shape]


def label_aware_smoothing_loss(
  logits: ArrayLike, labels: ArrayLike, smoothing: ArrayLike
) -> jax.Array:
  """`label_smoothing_cross_entropy` with the smoothing of each example's class (Zhong et al., eq. 5).

  Args:
    logits: `[..., num_classes]`.
    labels: integers, `[...]`.
    smoothing: in [0, 1], `[num_classes]`, see `label_aware_smoothing`.

  Returns:
    `[...]`, float32 or wider, in nats.

  Raises:
    ValueError: if the shapes do not fit, or labels or smoothing are (where concrete) out of range.
  """
  require_labels(logits, labels)
  if jnp.shape(smoothing) != jnp.shape(logits)[-1:]:
    raise ValueError(
      f'smoothing must be {jnp.shape(logits)[-1:]} for logits {jnp.shape(logits)}, '
      f'got {jnp.shape(smoothing)}.'
    )
  require_share(smoothing=smoothing)
  (smoothing,) = accumulated(smoothing)
  return label_smoothing_cross_entropy(logits, labels, at_labels(smoothing, labels))


def gml_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  class_counts: ArrayLike,
  *,
  power: ArrayLike = 1.0,
  prob_floor: ArrayLike = 1e-5,
  mask: ArrayLike | None = None,
) -> jax.Array:
  """Minus log of the geometric mean over classes of the soft recall in the batch (for `power` 1).

    s[i] = max(softmax(logits[i] + log n)[y_i], prob_floor)
    r[c] = mean of s over the examples of class c
    loss = (mean over the classes c in the batch of (-log r[c])^power)^(1 / power)

  The logarithm comes after the mean over a class, so that its hopeless examples do not dominate. The batch
  is the global one, and classes without an example in it do not count. Predict by the plain logits.

  Args:
    logits: `[batch, num_classes]`.
    labels: integers, `[batch]`.
    class_counts: positive integers n of the training set, `[num_classes]`.
    power: at least 1; 1 is the paper's loss.
    prob_floor: in (0, 1); an example below it has no gradient.
    mask: `[batch]`, false for examples that do not count (padding); None: all count. The loss is 0 if none
      does.

  Returns:
    A scalar in [0, -log(prob_floor)], float32 or wider.

  Raises:
    ValueError: if the shapes do not fit, the batch is empty, or values are (where concrete) out of range.

  References:
    Du & Wu, No One Left Behind: Improving the Worst Categories in Long-Tailed Learning, CVPR 2023
    (https://arxiv.org/abs/2303.03630); power and floor are those of the authors' code.

  Examples:
    >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]]))
    >>> loss = gml_loss(logits, jnp.array([0, 0, 1]), jnp.array([10, 10]))
    >>> round(float(jnp.exp(-loss)), 4)  # sqrt(0.7 * 0.5)
    0.5916
  """
  if jnp.ndim(logits) != 2:
    raise ValueError(f'logits must be [batch, num_classes], got {jnp.shape(logits)}.')
  require_labels(logits, labels, mask)
  if is_concrete(power) and not np.all(np.asarray(power) >= 1):
    raise ValueError(f'power must be at least 1, got {power}.')
  if is_concrete(prob_floor) and not 0 < np.asarray(prob_floor) < 1:
    raise ValueError(f'prob_floor must be in (0, 1), got {prob_floor}.')
  (logits,), labels = accumulated(logits), jnp.asarray(labels)
  counts = jnp.ones(labels.shape, bool) if mask is None else jnp.asarray(mask, bool)
  # Whatever padding holds, it must reach neither the value nor the gradient.
  logits, labels = jnp.where(counts[:, None], logits, 0), jnp.where(counts, labels, 0)
  probs = jnp.exp(-balanced_softmax_loss(logits, labels, class_counts))
  probs = jnp.where(probs < prob_floor, prob_floor, probs)

  own = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype) * counts[:, None]
  sizes = jnp.sum(own, axis=0)
  recalls = jnp.sum(own * probs[:, None], axis=0) / jnp.maximum(sizes, 1)
  present = sizes > 0
  # Rounding may not lift a recall above 1: a power of a negative number is not defined.
  surprise = -jnp.log(jnp.where(present, jnp.minimum(recalls, 1), 1))
  # In units of the largest, no power under- or overflows; the unit cancels, so it needs no gradient.
  unit = jax.lax.stop_gradient(jnp.max(surprise))
  unit = jnp.where(unit > 0, unit, 1)
  mean = jnp.sum((surprise / unit) ** power) / jnp.maximum(jnp.sum(present), 1)
  # A root has no gradient at 0.
  loss = jnp.where(mean == 0, 0, jnp.where(mean == 0, 1, mean) ** (1 / power)) * unit
  return loss * jnp.prod(one_or_nan(labels, logits.shape[-1], loss.dtype))


def ensemble_probabilities(
  logits_new: ArrayLike, logits_old: ArrayLike, t_new: ArrayLike = 1.0, t_old: ArrayLike = 1.0
) -> jax.Array:
  """Mean of two classifiers' probabilities: `(softmax(new / t_new) + softmax(old / t_old)) / 2`.

  GML wins back mean accuracy with it: the two classifiers share one feature extractor.

  Args:
    logits_new: `[..., num_classes]`, of the re-trained classifier.
    logits_old: `[..., num_classes]`, as the old classifier uses them to predict.
    t_new: positive scalar temperature of the new classifier.
    t_old: positive scalar temperature of the old classifier.

  Returns:
    `[..., num_classes]`, float32 or wider.

  Raises:
    ValueError: if the shapes differ or a temperature is not positive.

  References: as `gml_loss`.
  """
  require_same_shape(logits_new=logits_new, logits_old=logits_old)
  require_positive(t_new=t_new, t_old=t_old)
  logits_new, logits_old = accumulated(logits_new, logits_old)
  return (jax.nn.softmax(logits_new / t_new) + jax.nn.softmax(logits_old / t_old)) / 2
