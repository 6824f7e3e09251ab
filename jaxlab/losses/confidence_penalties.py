"""Penalties on confident predictions, for classes that look alike: maximum entropy, pairwise confusion."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_not_negative
from jaxlab.losses._labels import one_or_nan, require_labels, wide
from jaxlab.losses.classification import cross_entropy


def max_entropy_loss(logits: ArrayLike, labels: ArrayLike, gamma: ArrayLike = 1.0) -> jax.Array:
  """Cross-entropy less the entropy of the prediction, `-log p[label] - gamma H(p)`, `p = softmax(logits)`.

  Args:
    logits: `[..., num_classes]`; -inf masks a class.
    labels: integers, `[...]`.
    gamma: weight of the entropy, not negative.

  Returns:
    `[...]`, float32 or wider, in nats.

  Raises:
    ValueError: if the shapes do not fit, or labels or `gamma` are (where concrete) out of range.

  References:
    Dubey et al., Maximum-Entropy Fine Grained Classification, NeurIPS 2018
    (https://arxiv.org/abs/1809.05934).

  >>> round(float(max_entropy_loss(jnp.zeros((1, 4)), jnp.array([0]))[0]), 6)
  0.0
  """
  require_labels(logits, labels)
  require_not_negative(gamma=gamma)
  (logits,) = accumulated(logits)
  log_p = jax.nn.log_softmax(logits, -1)
  inside = jnp.where(logits > -jnp.inf, log_p, 0)
  entropy = -jnp.sum(jax.nn.softmax(logits, -1) * inside, -1)
  return cross_entropy(logits, labels) - gamma * entropy


def pairwise_confusion(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
  """Mean squared distance between the predictions for examples of different classes in a batch.

    1 / |pairs| sum_{i, j: y_i != y_j} |p_i - p_j|^2,  p = softmax(logits)

  Added to a cross-entropy with a weight of 10 to 20, it brings predictions closer that should not be sure.

  Args:
    logits: `[batch, num_classes]`; -inf masks a class.
    labels: integers, `[batch]`.

  Returns:
    A scalar, float32 or wider; 0 in a batch of a single class.

  Raises:
    ValueError: if the shapes do not fit, or labels are (where concrete) out of range.

  References:
    Dubey et al., Pairwise Confusion for Fine-Grained Visual Classification, ECCV 2018
    (https://arxiv.org/abs/1705.08016).

  >>> logits = jnp.array([[50.0, 0.0], [0.0, 50.0], [50.0, 0.0]])
  >>> float(pairwise_confusion(logits, jnp.array([0, 1, 1])))
  1.0
  """
  if jnp.ndim(logits) != 2:
    raise ValueError(f'logits must be [batch, num_classes], got {jnp.shape(logits)}.')
  require_labels(logits, labels)
  (logits,), labels = accumulated(logits), wide(labels)
  p = jax.nn.softmax(logits, -1)
  square = jnp.sum(p * p, -1)
  distances = square[:, None] + square - 2 * jnp.matmul(p, p.T, precision='highest')
  differ = labels[:, None] != labels
  total = jnp.sum(jnp.where(differ, distances, 0)) / jnp.maximum(jnp.sum(differ), 1)
  return total * jnp.prod(one_or_nan(labels, logits.shape[-1], p.dtype))
