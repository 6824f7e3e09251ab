"""Losses of several experts that learn together: nested collaborative learning (NCL)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_not_negative
from jaxlab.losses._labels import require_class_counts, require_labels
from jaxlab.losses.classification import cross_entropy


def hard_categories(logits: ArrayLike, labels: ArrayLike, num_hard: int) -> jax.Array:
  """The true class and the `num_hard - 1` other classes with the largest logits.

  Of equal logits the class with the lower index comes first.

  Args:
    logits: `[..., num_classes]`.
    labels: integers, `[...]`.
    num_hard: between 1 and `num_classes`; static.

  Returns:
    bool `[..., num_classes]` with exactly `num_hard` true values a row; none under `jit` for a label out of
    range.

  Raises:
    ValueError: if the shapes do not fit, or labels (where concrete) or `num_hard` are out of range.

  Examples:
    >>> hard_categories(jnp.array([[3.0, 1.0, 2.0, 0.0]]), jnp.array([3]), 2).tolist()
    [[True, False, False, True]]
  """
  require_labels(logits, labels)
  logits = jnp.asarray(logits)
  num_classes = logits.shape[-1]
  if not 1 <= num_hard <= num_classes:
    raise ValueError(f'num_hard must be between 1 and {num_classes} classes, got {num_hard}.')
  own = jnp.asarray(labels)[..., None] == jnp.arange(num_classes)
  _, chosen = jax.lax.top_k(jnp.where(own, jnp.inf, logits), num_hard)
  hard = jnp.put_along_axis(jnp.zeros_like(own), chosen, True, axis=-1, inplace=False)
  return hard & jnp.any(own, axis=-1, keepdims=True)


def ncl_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  class_counts: ArrayLike,
  *,
  num_hard: int,
  diversity_factor: ArrayLike = 0.6,
  hard_diversity_factor: ArrayLike = 0.6,
  ce_ratio: ArrayLike = 1.0,
  hard_ratio: ArrayLike = 1.0,
) -> jax.Array:
  """Nested collaborative learning: balanced experts on all and on hard classes that teach each other.

  With `z = logits + log n` and `h = z * hard_categories(logits[0], labels, num_hard)` (classes outside get
  logit 0, not -inf, as in the authors' code, but for masked ones; the hard classes are expert 0's for all
  and have no gradient):

    loss = sum over experts of mean(ce_ratio CE(z, y) + hard_ratio CE(h, y))
           + diversity_factor D(z) + hard_diversity_factor D(h)
    D(z) = 1 / (experts - 1) sum_{i != j} mean(sum_c p_j (log p_j - log(p_i + 1e-9))),  p = softmax(z)

  The gradient of D flows into both experts of a pair. Predict by the mean of the experts' logits.

  Args:
    logits: `[experts, batch, num_classes]`, at least 2 experts; 3 in the paper.
    labels: integers, `[batch]`.
    class_counts: positive integers n, `[num_classes]`.
    num_hard: size of the hard set, between 1 and `num_classes`; static. 30 of 100 classes in the paper.
    diversity_factor: non-negative weight of the experts' divergence over all classes.
    hard_diversity_factor: the same over the hard classes.
    ce_ratio: non-negative weight of the cross-entropy over all classes.
    hard_ratio: the same over the hard classes.

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: if the shapes do not fit, there is one expert only, or values are (where concrete) out of
      range.

  References:
    Li et al., Nested Collaborative Learning for Long-Tailed Visual Recognition, CVPR 2022
    (https://arxiv.org/abs/2203.15359).
  """
  if jnp.ndim(logits) != 3 or jnp.shape(logits)[0] < 2:
    raise ValueError(
      f'logits must be [experts, batch, num_classes] of at least 2 experts, got {jnp.shape(logits)}.'
    )
  (logits,), labels = accumulated(logits), jnp.asarray(labels)
  require_class_counts(class_counts, logits.shape[-1])
  require_not_negative(
    diversity_factor=diversity_factor,
    hard_diversity_factor=hard_diversity_factor,
    ce_ratio=ce_ratio,
    hard_ratio=hard_ratio,
  )
  mask = hard_categories(logits[0], labels, num_hard)
  logits += jnp.log(jnp.asarray(class_counts, logits.dtype))
  hard_logits = jnp.where(mask | (logits == -jnp.inf), logits, 0)

  def sum_of_experts(logits):
    losses = cross_entropy(logits, jnp.broadcast_to(labels, logits.shape[:2]))
    return jnp.sum(jnp.mean(losses, axis=1))

  return (
    ce_ratio * sum_of_experts(logits)
    + hard_ratio * sum_of_experts(hard_logits)
    + diversity_factor * _divergence_of_experts(logits)
    + hard_diversity_factor * _divergence_of_experts(hard_logits)
  )


def _divergence_of_experts(logits: jax.Array) -> jax.Array:
  """Returns the KL divergence summed over ordered pairs of experts, by the number of partners."""
  experts = logits.shape[0]
  log_probs = jax.nn.log_softmax(logits)
  probs = jnp.exp(log_probs)
  # A masked class has probability 0; its logarithm would make the product NaN.
  log_probs = jnp.where(log_probs == -jnp.inf, 0, log_probs)
  # [i, j, batch, num_classes]: expert i follows expert j.
  terms = probs[None] * (log_probs[None] - jnp.log(probs[:, None] + 1e-9))
  divergences = jnp.mean(jnp.sum(terms, axis=-1), axis=-1)
  return jnp.sum(divergences, where=~jnp.eye(experts, dtype=bool)) / (experts - 1)
