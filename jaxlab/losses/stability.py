"""Losses of fine-tuning that keep features near those of the pre-trained network."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_not_negative, require_same_shape
from jaxlab.losses.classification import label_smoothing_cross_entropy
from jaxlab.losses.contrastive import normalize


def stability_loss(embeddings: ArrayLike, frozen_embeddings: ArrayLike) -> jax.Array:
  """Mean cosine between embeddings and those of the frozen network; to be maximized.

    mean(sum(normalize(embeddings) * normalize(sg(frozen_embeddings))))

  with sg the stop-gradient and norms of at least 1e-12: a zero vector has cosine 0.

  Args:
    embeddings: `[..., dim]`.
    frozen_embeddings: `[..., dim]`, of the pre-trained network on the same images; no gradient.

  Returns:
    A scalar in [-1, 1], float32 or wider.

  Raises:
    ValueError: if the shapes differ or are empty.

  References:
    Fu et al., Worst Case Matters for Few-Shot Recognition, ECCV 2022
    (https://arxiv.org/abs/2203.06574).

  Examples:
    >>> x = jnp.array([[2.0, 0.0], [0.0, 1.0]])
    >>> float(stability_loss(x, jnp.array([[1.0, 0.0], [1.0, 0.0]])))
    0.5
  """
  require_same_shape(embeddings=embeddings, frozen_embeddings=frozen_embeddings)
  if 0 in jnp.shape(embeddings):
    raise ValueError(f'embeddings must not be empty, got {jnp.shape(embeddings)}.')
  embeddings, frozen_embeddings = accumulated(embeddings, frozen_embeddings)
  frozen = jax.lax.stop_gradient(normalize(frozen_embeddings))
  return jnp.mean(jnp.sum(normalize(embeddings) * frozen, axis=-1))


def acsr_loss(
  logits: ArrayLike,
  labels: ArrayLike,
  embeddings: ArrayLike,
  frozen_embeddings: ArrayLike,
  *,
  beta: ArrayLike = 0.1,
  smoothing: ArrayLike = 0.1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Few-shot fine-tuning with stability regularization.

    loss = mean(label_smoothing_cross_entropy(logits, labels, smoothing))
           - beta stability_loss(embeddings, frozen_embeddings)

  Args:
    logits: `[batch, num_classes]`, of the support images.
    labels: integers, `[batch]`.
    embeddings: `[base_batch, dim]`, of images of the base classes by the network being fine-tuned, from a
      forward pass of their own.
    frozen_embeddings: `[base_batch, dim]`, of the same images by the pre-trained network; no gradient.
    beta: non-negative scalar.
    smoothing: in [0, 1].

  Returns:
    The scalar loss, float32 or wider, and a dict of its terms, `cross_entropy` and `cosine`.

  Raises:
    ValueError: if the shapes do not fit, or (where concrete) labels or smoothing are out of range or `beta`
      is negative.

  References:
    Fu et al., Worst Case Matters for Few-Shot Recognition, ECCV 2022
    (https://arxiv.org/abs/2203.06574); the defaults are those of the authors' code.
  """
  require_not_negative(beta=beta)
  cross_entropy = jnp.mean(label_smoothing_cross_entropy(logits, labels, smoothing))
  cosine = stability_loss(embeddings, frozen_embeddings)
  return cross_entropy - beta * cosine, {'cross_entropy': cross_entropy, 'cosine': cosine}
