"""Supervised contrast with learnable class centers, for imbalanced training sets: PaCo and GPaCo."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import (
  accumulated,
  require_not_negative,
  require_positive,
  require_share,
)
from jaxlab.losses._labels import one_or_nan, require_class_counts, require_classes


def paco_loss(
  features: ArrayLike,
  labels: ArrayLike,
  classifier_logits: ArrayLike,
  class_counts: ArrayLike | None = None,
  *,
  alpha: ArrayLike = 0.01,
  beta: ArrayLike = 1.0,
  gamma: ArrayLike = 1.0,
  temperature: ArrayLike = 0.05,
  supervised_temperature: ArrayLike = 1.0,
  smoothing: ArrayLike = 0.0,
) -> jax.Array:
  """Parametric contrastive loss: each query among the classes and all other features.

  The first `batch` rows of `features` are the queries i; with the class prior `pi = n / sum n`:

    A = [(classifier_logits + log(pi + 1e-9)) / supervised_temperature,
         queries @ features.T / temperature] - its row's maximum
    positives  W = [beta * smoothed_onehot(y_i), alpha * 1(y_j = y_i, j != i)]
    candidates V = [1, gamma * 1(j != i)]
    loss = mean_i sum_j W (log(sum_k V exp(A) + 1e-12) - A) / sum_j W

  where `smoothed_onehot` has `1 - smoothing` at the label and `smoothing / (num_classes - 1)` elsewhere;
  masked classes count in neither.

  GPaCo: `features` are the queries, then a queue of momentum keys. PaCo: the queries, the batch's keys,
  then the queue, without smoothing. The gradient reaches every row; stop it in keys and queue.

  Args:
    features: unit vectors, `[batch + others, dim]` (see `normalize`).
    labels: integers, `[batch + others]`, of the rows of `features`.
    classifier_logits: `[batch, num_classes]`, of the queries; -inf masks a class.
    class_counts: positive integers n, `[num_classes]`; None: no prior.
    alpha: non-negative weight of a positive feature.
    beta: positive weight of the class center.
    gamma: non-negative weight of a feature among the candidates.
    temperature: positive scalar of the features.
    supervised_temperature: positive scalar of the classifier.
    smoothing: in [0, 1].

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: if the shapes do not fit, there are fewer than 2 classes, or values are (where concrete)
      out of range.

  References:
    Cui et al., Parametric Contrastive Learning, ICCV 2021, eq. 4 (https://arxiv.org/abs/2107.12028), and
    Generalized Parametric Contrastive Learning, TPAMI 2023 (https://arxiv.org/abs/2209.12400). The
    constants 1e-9 and 1e-12 are the code's, the defaults its settings for CIFAR-100-LT.
  """
  if jnp.ndim(features) != 2 or jnp.ndim(classifier_logits) != 2:
    raise ValueError(
      'Expected features [batch + others, dim] and classifier_logits [batch, num_classes], got '
      f'{jnp.shape(features)} and {jnp.shape(classifier_logits)}.'
    )
  (rows, _), (batch, num_classes) = jnp.shape(features), jnp.shape(classifier_logits)
  if rows < batch or jnp.shape(labels) != (rows,):
    raise ValueError(
      f'Expected at least the {batch} rows of classifier_logits in features and a label for each row, '
      f'got {rows} rows and labels {jnp.shape(labels)}.'
    )
  if not batch or num_classes < 2:
    raise ValueError(
      'classifier_logits must have a row and at least 2 classes, '
      f'got {jnp.shape(classifier_logits)}.'
    )
  require_classes(labels, num_classes)
  require_positive(
    beta=beta, temperature=temperature, supervised_temperature=supervised_temperature
  )
  require_share(smoothing=smoothing)
  require_not_negative(alpha=alpha, gamma=gamma)

  features, logits = accumulated(features, classifier_logits)
  labels = jnp.asarray(labels)
  if class_counts is not None:
    require_class_counts(class_counts, num_classes)
    counts = jnp.asarray(class_counts, logits.dtype)
    logits += jnp.log(counts / jnp.sum(counts) + 1e-9)

  contrast = features[:batch] @ features.T / temperature
  all_logits = jnp.concatenate([logits / supervised_temperature, contrast], axis=1)
  all_logits -= jax.lax.stop_gradient(jnp.max(all_logits, axis=1, keepdims=True))
  others = ~jnp.eye(batch, rows, dtype=bool)
  own = jax.nn.one_hot(labels[:batch], num_classes, dtype=logits.dtype)
  available = logits != -jnp.inf
  spread = smoothing / jnp.maximum(jnp.sum(available, axis=1, keepdims=True) - 1, 1)
  centers = beta * ((1 - smoothing) * own + spread * (available * (1 - own)))
  same = alpha * (others & (labels[:batch, None] == labels[None, :]))
  positives = jnp.concatenate([centers, same], axis=1)
  candidates = jnp.concatenate([jnp.ones_like(logits), gamma * others], axis=1)
  log_normalizer = jnp.log(jnp.sum(candidates * jnp.exp(all_logits), axis=1, keepdims=True) + 1e-12)
  losses = positives * jnp.where(positives == 0, 0, log_normalizer - all_logits)
  loss = jnp.mean(jnp.sum(losses, axis=1) / jnp.sum(positives, axis=1))
  return loss * jnp.prod(one_or_nan(labels, num_classes, loss.dtype))
