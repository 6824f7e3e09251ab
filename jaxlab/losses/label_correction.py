"""Losses that train the labels along with the network: each example has label logits of its own.

PENCIL: Yi & Wu, Probabilistic End-to-end Noise Correction for Learning with Noisy Labels, CVPR 2019
(https://arxiv.org/abs/1903.07788), and PENCIL: Deep Learning with Noisy Labels, TPAMI 2022
(https://arxiv.org/abs/2202.08436). D2: Wang & Wu, Repetitive Reprediction Deep Decipher for Semi-Supervised
Learning, AAAI 2020 (https://arxiv.org/abs/1908.04345). CURL: Luo & Wu, Neural Network Pruning with
Residual-Connections and Limited-Data, CVPR 2020 (https://arxiv.org/abs/1911.08114).

p = softmax(logits) is the prediction, y = softmax(label_logits) the label distribution. No gradient is
stopped: that of the label logits is the label's update, see `jaxlab.training.step_rows`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import (
  accumulated,
  require_not_negative,
  require_same_shape,
  require_share,
)
from jaxlab.losses._labels import at_labels, require_classes, require_labels, wide
from jaxlab.losses.classification import cross_entropy


class PencilTerms(NamedTuple):
  """What `pencil_terms` returns, `[...]` each.

  Attributes:
    classification: `1/C sum_j p_j (log p_j - log y_j)`.
    compatibility: of the label distribution and the given label.
    entropy: `-1/C sum_j p_j log p_j`.
  """

  classification: jax.Array
  compatibility: jax.Array
  entropy: jax.Array


def initial_label_logits(labels: ArrayLike, num_classes: int, scale: float = 10.0) -> jax.Array:
  """Label logits that stand for given labels: `scale * onehot(label)`, zeros for a label of -1.

  Args:
    labels: integers `[...]` in [-1, num_classes); -1 where there is no label.
    num_classes: C.
    scale: K of PENCIL; 10 gives the label a probability of 0.9996 among ten classes.

  Returns:
    float32 `[..., num_classes]`.

  Raises:
    ValueError: if labels are no integers or (concrete) outside of their range.

  Examples:
    >>> initial_label_logits(jnp.array([1, -1]), 3).tolist()
    [[0.0, 10.0, 0.0], [0.0, 0.0, 0.0]]
  """
  require_classes(wide(labels) + 1, num_classes + 1, name='labels + 1')
  return scale * jax.nn.one_hot(labels, num_classes)


def pencil_terms(
  logits: ArrayLike,
  label_logits: ArrayLike,
  labels: ArrayLike,
  *,
  compatibility: Literal['code', 'paper'] = 'code',
) -> PencilTerms:
  """The three terms of PENCIL's loss, of each example.

    classification = 1/C sum_j p_j (log p_j - log y_j)
    compatibility  = -log y[label]           'paper'
                   = -log softmax(y)[label]  'code': the official code takes the softmax twice
    entropy        = -1/C sum_j p_j log p_j

  The mean over a batch of B divides the first and the last by B C, as the official code does.

  Args:
    logits: `[..., num_classes]`.
    label_logits: `[..., num_classes]`, of the examples' label distributions.
    labels: integers `[...]`, the labels as they were given.
    compatibility: which of the two forms; reported numbers come from the code.

  Returns:
    The terms, float32 or wider; NaN where a traced label is out of range.

  Raises:
    ValueError: if shapes or labels do not fit, or for another form.

  References:
    PENCIL, equations (3) to (9) of the conference version.

  Examples:
    >>> logits, label_logits = jnp.zeros((1, 2)), jnp.array([[10.0, 0.0]])
    >>> [round(float(term[0]), 4) for term in pencil_terms(logits, label_logits, jnp.array([0]))]
    [2.1534, 0.3133, 0.3466]
  """
  if compatibility not in ('code', 'paper'):
    raise ValueError(f"compatibility is {compatibility!r}, expected 'code' or 'paper'.")
  require_same_shape(logits=logits, label_logits=label_logits)
  require_labels(logits, labels)
  sums = _sums(logits, label_logits)
  there = ~(jnp.isneginf(logits) | jnp.isneginf(label_logits))
  log_label = jnp.where(there, sums.log_y, -jnp.inf)
  if compatibility == 'code':
    log_label = jax.nn.log_softmax(jnp.where(there, jnp.exp(sums.log_y), -jnp.inf), axis=-1)
  own = -at_labels(log_label, labels)
  return PencilTerms(sums.divergence / sums.classes, own, sums.entropy / sums.classes)


def pencil_loss(
  logits: ArrayLike,
  label_logits: ArrayLike,
  labels: ArrayLike,
  alpha: ArrayLike = 0.1,
  beta: ArrayLike = 0.4,
  *,
  compatibility: Literal['code', 'paper'] = 'code',
) -> jax.Array:
  """PENCIL's loss of its second stage, of each example.

    classification + alpha * compatibility + beta * entropy

  Args:
    logits: `[..., num_classes]`.
    label_logits: `[..., num_classes]`.
    labels: integers `[...]`, as they were given.
    alpha: weight of the compatibility with them, not negative.
    beta: weight of the prediction's entropy, not negative; 0 lets labels drift to flat ones.
    compatibility: see `pencil_terms`.

  Returns:
    `[...]`, float32 or wider.

  Raises:
    ValueError: as `pencil_terms`, or for negative weights.

  References:
    PENCIL, equation (3) of the conference version.

  Examples:
    >>> loss = pencil_loss(jnp.zeros((1, 2)), jnp.array([[10.0, 0.0]]), jnp.array([0]), 0.1, 0.4)
    >>> round(float(loss[0]), 4)
    2.3234
  """
  require_not_negative(alpha=alpha, beta=beta)
  terms = pencil_terms(logits, label_logits, labels, compatibility=compatibility)
  return terms.classification + alpha * terms.compatibility + beta * terms.entropy


def label_distribution_loss(logits: ArrayLike, label_logits: ArrayLike) -> jax.Array:
  """PENCIL's loss of its third stage: divergence from corrected labels, which stay as they are.

    1/C sum_j p_j (log p_j - log y_j)

  Args:
    logits: `[..., num_classes]`.
    label_logits: `[..., num_classes]`; no gradient reaches them.

  Returns:
    `[...]`, float32 or wider.

  Raises:
    ValueError: if shapes differ.

  Examples:
    >>> round(float(label_distribution_loss(jnp.zeros((1, 2)), jnp.array([[10.0, 0.0]]))[0]), 4)
    2.1534
  """
  require_same_shape(logits=logits, label_logits=label_logits)
  label_logits = jax.lax.stop_gradient(jnp.asarray(label_logits))
  sums = _sums(logits, label_logits)
  return sums.divergence / sums.classes


def d2_loss(
  logits: ArrayLike,
  pseudo_logits: ArrayLike,
  alpha: ArrayLike = 0.1,
  beta: ArrayLike = 0.03,
  *,
  kind: Literal['kl_reverse', 'kl', 'mse'] = 'kl_reverse',
) -> jax.Array:
  """D2's loss, of each example: the prediction against its pseudo-label, and the prediction's entropy.

    alpha * D + beta * -sum_j p_j log p_j
    'kl_reverse': D = sum_j p_j (log p_j - log q_j);  'kl': D = sum_j q_j (log q_j - log p_j)
    'mse': D = sum_j (q_j - p_j)^2

  with q = softmax(pseudo_logits). Unlike PENCIL's, sums are not divided by the number of classes. The
  gradient of the pseudo-logits sums to zero over classes, so their sum never changes. Where the gradient of
  the logits vanishes under 'kl_reverse', q is proportional to `p^(1 - beta / alpha)`.

  Args:
    logits: `[..., num_classes]`.
    pseudo_logits: `[..., num_classes]`.
    alpha: weight of the divergence, not negative.
    beta: weight of the entropy, not negative; below `alpha`, or predictions do not sharpen.
    kind: of the divergence; the paper's is 'kl_reverse'.

  Returns:
    `[...]`, float32 or wider.

  Raises:
    ValueError: if shapes differ, weights are negative, or for another kind.

  References:
    R2-D2, section 3 (the loss), theorems 1 and 2 (equality constraint, exponential link).

  Examples:
    >>> round(float(d2_loss(jnp.zeros((1, 2)), jnp.array([[10.0, 0.0]]))[0]), 4)
    0.4515
  """
  if kind not in ('kl_reverse', 'kl', 'mse'):
    raise ValueError(f"kind is {kind!r}, expected 'kl_reverse', 'kl' or 'mse'.")
  require_same_shape(logits=logits, pseudo_logits=pseudo_logits)
  require_not_negative(alpha=alpha, beta=beta)
  sums = _sums(logits, pseudo_logits)
  divergence = sums.divergence
  if kind == 'kl':
    divergence = jnp.sum(jnp.exp(sums.log_y) * (sums.log_y - sums.log_p), -1)
  elif kind == 'mse':
    divergence = jnp.sum(jnp.square(jnp.exp(sums.log_y) - jnp.exp(sums.log_p)), -1)
  return alpha * divergence + beta * sums.entropy


def label_refinement_loss(
  logits: ArrayLike, pseudo_logits: ArrayLike, labels: ArrayLike, weight: ArrayLike = 0.7
) -> jax.Array:
  """CURL's loss while a teacher's logits are refined, of each example.

    weight * sum_j p_j (log p_j - log q_j) + (1 - weight) * -log p[label]

  with q = softmax(pseudo_logits), which start as the teacher's logits of the image and take a plain gradient
  step each time it is seen (`jaxlab.training.step_rows`, rate 1 in the code).

  Args:
    logits: of the small network, `[..., num_classes]`.
    pseudo_logits: `[..., num_classes]`.
    labels: integers `[...]`.
    weight: share of the divergence, in [0, 1].

  Returns:
    `[...]`, float32 or wider.

  Raises:
    ValueError: if shapes or labels do not fit, or the weight is no share.

  References:
    CURL, section on label refinement.

  Examples:
    >>> loss = label_refinement_loss(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.array([0]))
    >>> round(float(loss[0]), 4)
    0.2079
  """
  require_same_shape(logits=logits, pseudo_logits=pseudo_logits)
  require_share(weight=weight)
  divergence = _sums(logits, pseudo_logits).divergence
  return weight * divergence + (1 - weight) * cross_entropy(logits, labels)


class _Sums(NamedTuple):
  """Sums over classes `[...]` of the prediction p and the label distribution y.

  Attributes:
    divergence: `sum p (log p - log y)`.
    entropy: `-sum p log p`.
    classes: how many there are, without masked ones.
    log_p: log-probabilities, 0 where a class is masked.
    log_y: likewise of the label distribution; -inf where a class is masked there alone.
  """

  divergence: jax.Array
  entropy: jax.Array
  classes: jax.Array
  log_p: jax.Array
  log_y: jax.Array


def _sums(logits: ArrayLike, label_logits: ArrayLike) -> _Sums:
  """Returns sums over the classes that `logits` do not mask.

  Label logits grow by hundreds: the logarithm of a softmax that underflows would be infinite.
  """
  logits, label_logits = accumulated(logits, label_logits)
  there = ~jnp.isneginf(logits)
  log_p = jnp.where(there, jax.nn.log_softmax(logits, axis=-1), 0)
  log_y = jnp.where(there, jax.nn.log_softmax(label_logits, axis=-1), 0)
  p = jnp.where(there, jnp.exp(log_p), 0)
  divergence, entropy = jnp.sum(p * (log_p - log_y), -1), -jnp.sum(p * log_p, -1)
  return _Sums(divergence, entropy, jnp.sum(there, -1), log_p, log_y)
