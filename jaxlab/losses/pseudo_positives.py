"""Several positives for one view: nearest neighbors in a queue are its labels, another queue its classifier.

Zhu, Fu & Wu, Multi-Label Self-Supervised Learning with Scene Images, ICCV 2023
(https://arxiv.org/abs/2308.03286).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_positive
from jaxlab.losses.contrastive import normalize, queue_push


def top_k_pseudo_labels(features: ArrayLike, queue: ArrayLike, k: int = 20) -> jax.Array:
  """Marks the `k` columns of a queue whose products with a feature are largest.

  Args:
    features: `[batch, dim]`; lengths do not matter.
    queue: unit vectors as columns, `[dim, size]`, without those of this batch.
    k: positives of each row; static. Of equal products the first columns count.

  Returns:
    `[batch, size]` of 0 and 1, float32 or wider; carries no gradient.

  Raises:
    ValueError: if shapes do not fit, or `k` is not in 1 to `size`.

  References:
    Zhu et al. 2023, section 3.2.

  Examples:
    >>> top_k_pseudo_labels(
    ...   jnp.array([[1.0, 0.0]]), jnp.array([[0.6, 1.0, 0.0], [0.8, 0.0, 1.0]]), 2
    ... )
    Array([[1., 1., 0.]], dtype=float32)
  """
  _require_queue(queue, features)
  size = jnp.shape(queue)[1]
  if not 1 <= k <= size:
    raise ValueError(f'k is {k}, expected 1 to {size}, the vectors in the queue.')
  features, queue = jax.lax.stop_gradient(accumulated(features, queue))
  _, nearest = jax.lax.top_k(features @ queue, k)
  rows = jnp.arange(len(features))[:, None]
  return jnp.zeros((len(features), size), features.dtype).at[rows, nearest].set(1)


def multi_label_queue_loss(
  projections: ArrayLike,
  queue: ArrayLike,
  labels: ArrayLike,
  temperature: ArrayLike = 0.2,
  *,
  positives_only: bool = False,
) -> jax.Array:
  """Binary cross-entropy of a view against every vector of a queue, a mean over queue and batch.

    x = normalize(projections) @ queue / temperature
    loss = -mean(y log sigmoid(x) + (1 - y) log sigmoid(-x))

  That projections are brought to unit length is [inferred] from the temperature, which InfoNCE shares.

  Args:
    projections: `[batch, dim]`.
    queue: unit vectors as columns, `[dim, size]`; no gradient.
    labels: `[batch, size]` of 0 and 1, see `top_k_pseudo_labels`; no gradient.
    temperature: positive scalar.
    positives_only: leaves out the term of `1 - y` (an ablation of the paper).

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: if shapes do not fit or `temperature` is not positive.

  References:
    Zhu et al. 2023, eq. 4; the whole loss is `info_nce_queue` plus 0.5 times this, at small scale
    in the second half of the training alone.
  """
  x, labels = _logits(projections, queue, labels, temperature)
  terms = labels * jax.nn.softplus(-x)
  if not positives_only:
    terms = terms + (1 - labels) * jax.nn.softplus(x)
  return jnp.mean(terms)


def neighbor_queue_loss(
  projections: ArrayLike, queue: ArrayLike, labels: ArrayLike, temperature: ArrayLike = 0.2
) -> jax.Array:
  """InfoNCE with each pseudo positive in turn, against all that is none: a mean over positives and batch.

    x = normalize(projections) @ queue / temperature
    loss = mean over i with y_i = 1 of -log(exp(x_i) / (exp(x_i) + sum over j with y_j = 0 of exp(x_j)))

  The paper's ablation of the binary cross-entropy, "kNN".

  Args:
    projections: `[batch, dim]`.
    queue: unit vectors as columns, `[dim, size]`; no gradient.
    labels: `[batch, size]` of 0 and 1, at least one of each a row; no gradient.
    temperature: positive scalar.

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: if shapes do not fit or `temperature` is not positive.

  References:
    Zhu et al. 2023, table of losses. How terms are averaged is [inferred].
  """
  x, labels = _logits(projections, queue, labels, temperature)
  others = jax.nn.logsumexp(jnp.where(labels > 0, -jnp.inf, x), axis=-1, keepdims=True)
  terms = labels * jax.nn.softplus(others - x)
  return jnp.mean(jnp.sum(terms, -1) / jnp.sum(labels, -1))


def queues_push(
  queues: Sequence[ArrayLike], pointer: ArrayLike, keys: Sequence[ArrayLike]
) -> tuple[list[jax.Array], jax.Array]:
  """Overwrites the oldest columns of several queues at one place, so that their columns belong together.

  Args:
    queues: each `[dim, size]`, of one size.
    pointer: int scalar, the column of the oldest vectors.
    keys: one `[batch, dim]` for each queue; no gradient flows through them.

  Returns:
    The queues with the keys in columns `pointer, pointer + 1, ...` (modulo `size`), and the next pointer.

  Raises:
    ValueError: if the queues differ in size, or as `queue_push`.

  Examples:
    >>> queues = jnp.zeros((1, 2)), jnp.zeros((2, 2))
    >>> (a, b), pointer = queues_push(queues, 1, (jnp.array([[5.0]]), jnp.array([[6.0, 7.0]])))
    >>> a.tolist(), b.tolist(), int(pointer)
    ([[0.0, 5.0]], [[0.0, 6.0], [0.0, 7.0]], 0)
  """
  sizes = [jnp.shape(queue)[1:] for queue in queues]
  if not queues or len(queues) != len(keys) or len({*sizes}) != 1:
    raise ValueError(
      f'Expected queues [dim, size] of one size and keys for each, got {list(map(jnp.shape, queues))} and '
      f'{list(map(jnp.shape, keys))}.'
    )
  pushed = [queue_push(queue, pointer, own) for queue, own in zip(queues, keys, strict=True)]
  return [queue for queue, _ in pushed], pushed[0][1]


def _logits(
  projections: ArrayLike, queue: ArrayLike, labels: ArrayLike, temperature: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """Returns cosines over the temperature and labels, in at least float32, once all has been looked at."""
  require_positive(temperature=temperature)
  _require_queue(queue, projections)
  expected = (jnp.shape(projections)[0], jnp.shape(queue)[1])
  if jnp.shape(labels) != expected:
    raise ValueError(f'labels must be [batch, size] = {expected}, got {jnp.shape(labels)}.')
  projections, queue, labels = accumulated(projections, queue, labels)
  queue, labels = jax.lax.stop_gradient((queue, labels))
  return normalize(projections) @ queue / temperature, labels


def _require_queue(queue: ArrayLike, features: ArrayLike) -> None:
  shapes = jnp.shape(features), jnp.shape(queue)
  if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][0]:
    raise ValueError(
      f'Expected [batch, dim] and queue [dim, size], got {shapes[0]} and {shapes[1]}.'
    )
