"""Losses that tell an example from others: NT-Xent, SupCon, and InfoNCE against a queue of past keys."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_positive, require_same_shape


def normalize(x: ArrayLike, axis: int = -1) -> jax.Array:
  """Scales vectors to unit Euclidean length: `x / max(|x|, 1e-12)`.

  A zero vector stays zero, and its gradient is finite.

  Args:
    x: vectors of shape `[..., dim]`.
    axis: the axis of the components.

  Returns:
    An array of the shape and dtype of `x`; the squares are summed in at least float32.

  Examples:
    >>> print(normalize(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
    [[0.6 0.8]
     [0.  0. ]]
  """
  (wide,) = accumulated(x)
  # rsqrt of the clamped sum: a square root has no gradient at zero, not even behind a `maximum`.
  squares = jnp.sum(wide * wide, axis=axis, keepdims=True)
  return (wide * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))).astype(jnp.result_type(x))


def nt_xent(
  z1: ArrayLike, z2: ArrayLike, temperature: ArrayLike = 0.5, *, normalized: bool = False
) -> jax.Array:
  """Normalized temperature-scaled cross-entropy of two views.

  With the rows of both views stacked to `z` of shape `[2 * batch, dim]` and `s = z @ z.T / temperature`,
  row `i` and row `i ± batch` are views of one image. Each of the `2 * batch` anchors is classified among
  the other `2 * batch - 1` rows:

    loss = mean_i (logsumexp_{j != i} s[i, j] - s[i, i ± batch])

  Negatives are those of the whole (global) batch.

  Args:
    z1: embeddings of the first views, `[batch, dim]`.
    z2: embeddings of the second views, `[batch, dim]`, in the same order.
    temperature: positive scalar; 0.1 on ImageNet, 0.5 on CIFAR-10 in the paper.
    normalized: the rows are used as they are (the caller has normalized them) instead of being
      brought to unit length here.

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: if the shapes differ or are no matrices, for a batch of one, or if `temperature <= 0`.

  References:
    Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020, eq. 1
    (https://arxiv.org/abs/2002.05709).

  Examples:
    >>> z = jnp.eye(4)
    >>> round(float(nt_xent(z, z, temperature=0.5)), 4)
    0.5944
  """
  require_same_shape(2, z1=z1, z2=z2)
  require_positive(temperature=temperature)
  batch = jnp.shape(z1)[0]
  if batch < 2:
    raise ValueError(f'NT-Xent needs at least 2 images for a negative, got a batch of {batch}.')
  z1, z2 = accumulated(z1, z2)
  if not normalized:
    z1, z2 = normalize(z1), normalize(z2)
  z = jnp.concatenate([z1, z2])
  logits = z @ z.T / temperature
  logits = jnp.where(jnp.eye(2 * batch, dtype=bool), -jnp.inf, logits)
  # Each pair is the positive of both of its ends.
  positives = jnp.sum(z1 * z2, axis=-1) / temperature
  return jnp.mean(jax.nn.logsumexp(logits, axis=-1)) - jnp.mean(positives)


def supervised_contrastive_loss(
  z: ArrayLike, labels: ArrayLike, temperature: ArrayLike = 0.1, *, normalized: bool = False
) -> jax.Array:
  """SupCon: each example is drawn to all others of its label.

  With `s = z @ z.T / temperature` and the positives `P(i) = {p != i: label p = label i}`:

    loss = mean_i -1 / |P(i)| sum_{p in P(i)} (s[i, p] - logsumexp_{j != i} s[i, j])

  over the anchors i that have positives; 0 if none has. Several views of an image are rows of their own with
  its label. With two views of images whose labels all differ it is `nt_xent`.

  Args:
    z: embeddings, `[batch, dim]`; negatives are those of the whole (global) batch.
    labels: any integers, `[batch]`: they are only compared.
    temperature: positive scalar; 0.1 in the paper's experiments.
    normalized: the rows are used as they are (the caller has normalized them) instead of being
      brought to unit length here.

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: if the shapes do not fit, the labels are no integers, or `temperature <= 0`.

  References:
    Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, eq. 2 (https://arxiv.org/abs/2004.11362).

  Examples:
    >>> z = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(float(supervised_contrastive_loss(z, jnp.array([4, 4, 7]), temperature=1.0)), 4)
    0.3133
  """
  require_positive(temperature=temperature)
  shape = jnp.shape(z)
  if len(shape) != 2 or jnp.shape(labels) != shape[:1]:
    raise ValueError(
      f'Expected z [batch, dim] and labels [batch], got {shape} and {jnp.shape(labels)}.'
    )
  if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
    raise ValueError(f'labels must be integers, got {jnp.result_type(labels)}.')
  (z,), labels = accumulated(z), jnp.asarray(labels)
  z = z if normalized else normalize(z)
  logits = z @ z.T / temperature
  itself = jnp.eye(shape[0], dtype=bool)
  positive = (labels[:, None] == labels) & ~itself
  count = jnp.sum(positive, axis=1)
  others = jax.nn.logsumexp(jnp.where(itself, -jnp.inf, logits), axis=1)
  total = jnp.sum(jnp.where(positive, logits, 0), axis=1)
  # An anchor alone in the batch has no other to compare with.
  losses = jnp.where(count > 0, others - total / jnp.maximum(count, 1), 0)
  return jnp.sum(losses) / jnp.maximum(jnp.sum(count > 0), 1)


def multi_view_contrastive_loss(
  views: Sequence[ArrayLike],
  temperature: ArrayLike = 0.1,
  base_temperature: ArrayLike = 0.07,
  *,
  normalized: bool = False,
) -> jax.Array:
  """SupCon without labels: each view of an image is drawn to the other views of it.

  `temperature / base_temperature` times `supervised_contrastive_loss` of all views, images being their own
  classes; with two views, times `nt_xent`. The factor scales the gradient, as a learning rate does:
  `base_temperature=temperature` gives the loss of the papers, the default that of SupCon's code.

  Args:
    views: at least two arrays `[batch, dim]`, rows in the same order.
    temperature: positive scalar.
    base_temperature: positive scalar.
    normalized: the rows are used as they are (the caller has normalized them) instead of being
      brought to unit length here.

  Returns:
    A scalar, float32 or wider.

  Raises:
    ValueError: for a single view (there is no positive), a batch of one (there is no negative), shapes that
      differ, or a temperature that is not positive.

  References:
    Khosla et al., Supervised Contrastive Learning, NeurIPS 2020 (https://arxiv.org/abs/2004.11362), and its
    code; Cao & Wu, Rethinking Self-Supervised Learning: Small is Beautiful, 2021
    (https://arxiv.org/abs/2103.13559), whose SimCLR it is.

  Examples:
    >>> z = jnp.eye(4)
    >>> round(float(multi_view_contrastive_loss([z, z], 0.5, 0.5)), 4)
    0.5944
  """
  require_positive(temperature=temperature, base_temperature=base_temperature)
  if len(views) < 2:
    raise ValueError(f'A contrastive loss needs at least 2 views for a positive, got {len(views)}.')
  require_same_shape(2, **{f'views[{index}]': view for index, view in enumerate(views)})
  batch = jnp.shape(views[0])[0]
  if batch < 2:
    raise ValueError(
      f'A contrastive loss needs at least 2 images for a negative, got a batch of {batch}.'
    )
  z = jnp.concatenate([jnp.asarray(view) for view in views])
  images = jnp.tile(jnp.arange(batch), len(views))
  value = supervised_contrastive_loss(z, images, temperature, normalized=normalized)
  return value * (temperature / base_temperature)


def info_nce_queue(
  query: ArrayLike, key: ArrayLike, queue: ArrayLike, temperature: ArrayLike = 0.2
) -> tuple[jax.Array, jax.Array]:
  """Cross-entropy of each query's own key against a queue of keys of earlier batches.

    logits = [sum(query * key), query @ queue] / temperature
    loss = mean(logsumexp(logits) - logits[:, 0])

  No gradient flows into `key` and `queue`. Take the loss with the queue as it was *before* the step's
  keys are pushed.

  Args:
    query: unit vectors, `[batch, dim]` (see `normalize`).
    key: unit vectors of the other view from the momentum encoder, `[batch, dim]`.
    queue: unit vectors as columns, `[dim, size]`.
    temperature: positive scalar; 0.2 in MoCo v2, 0.07 in MoCo.

  Returns:
    The scalar loss and the logits, `[batch, 1 + size]`; the correct class is 0.

  Raises:
    ValueError: if shapes do not fit or `temperature <= 0`.

  References:
    He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020, eq. 1
    (https://arxiv.org/abs/1911.05722); Chen et al., MoCo v2 (https://arxiv.org/abs/2003.04297).
  """
  require_same_shape(2, query=query, key=key)
  require_positive(temperature=temperature)
  if jnp.ndim(queue) != 2 or jnp.shape(queue)[0] != jnp.shape(query)[1]:
    raise ValueError(
      f'queue must be [dim, size] with dim = {jnp.shape(query)[1]} of the query, '
      f'got {jnp.shape(queue)}.'
    )
  query, key, queue = accumulated(query, key, queue)
  key, queue = jax.lax.stop_gradient((key, queue))
  positive = jnp.sum(query * key, axis=-1, keepdims=True)
  logits = jnp.concatenate([positive, query @ queue], axis=-1) / temperature
  loss = jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[:, 0])
  return loss, logits


def queue_init(
  key: jax.Array, dim: int, size: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> tuple[jax.Array, jax.Array]:
  """Returns a queue of `size` random unit columns, `[dim, size]`, and its int32 write position, 0.

  Args:
    key: a typed PRNG key.
    dim: length of a vector.
    size: number of vectors; a multiple of every batch size pushed later. 65536 in MoCo on ImageNet.
    dtype: of the queue.

  Raises:
    ValueError: if `dim` or `size` is not positive.
  """
  require_positive(dim=dim, size=size)
  return normalize(jax.random.normal(key, (dim, size), dtype), axis=0), jnp.zeros((), jnp.int32)


def queue_push(
  queue: ArrayLike, pointer: ArrayLike, keys: ArrayLike
) -> tuple[jax.Array, jax.Array]:
  """Overwrites the oldest vectors of a queue with a batch of new ones.

  Args:
    queue: `[dim, size]`.
    pointer: int scalar, the column of the oldest vector.
    keys: `[batch, dim]`; no gradient flows through them.

  Returns:
    The queue with `keys` in columns `pointer, pointer + 1, ...` (modulo `size`), and the next pointer,
    `(pointer + batch) % size`.

  Raises:
    ValueError: if the shapes do not fit or `size` is no multiple of `batch`, so that the vectors would
      not stay for the same number of steps each.

  Examples:
    >>> queue, pointer = queue_push(jnp.zeros((1, 4)), 2, jnp.array([[5.0], [6.0]]))
    >>> queue.tolist(), int(pointer)
    ([[0.0, 0.0, 5.0, 6.0]], 0)
  """
  if jnp.ndim(queue) != 2 or jnp.ndim(keys) != 2 or jnp.shape(queue)[0] != jnp.shape(keys)[1]:
    raise ValueError(
      f'Expected queue [dim, size] and keys [batch, dim], got {jnp.shape(queue)} and '
      f'{jnp.shape(keys)}.'
    )
  queue, keys = jnp.asarray(queue), jax.lax.stop_gradient(jnp.asarray(keys))
  size, batch = queue.shape[1], keys.shape[0]
  if size % batch:
    raise ValueError(
      f'The queue size must be a multiple of the batch size, got {size} and {batch}: '
      f'choose {size // batch * batch or batch}.'
    )
  columns = (pointer + jnp.arange(batch)) % size
  pushed = queue.at[:, columns].set(keys.T.astype(queue.dtype), unique_indices=True)
  return pushed, jnp.asarray((pointer + batch) % size, jnp.int32)
