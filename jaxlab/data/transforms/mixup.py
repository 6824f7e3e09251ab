"""Mixup: convex combinations of pairs of images, with the same combination of their losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Partners = Literal['permutation', 'flip']


def mixup(
  key: jax.Array,
  images: ArrayLike,
  alpha: float,
  *,
  own_half: bool = False,
  partners: Partners = 'permutation',
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Mixes each image of a batch with a partner: `lam * x + (1 - lam) * x[permutation]`.

  One `lam ~ Beta(alpha, alpha)` and one permutation for the whole batch.

  Args:
    key: of the draws.
    images: floats `[batch, ...]`.
    alpha: of the Beta distribution; a Python number of at least 0. With 0 the images stay as they are, lam 1.
    own_half: takes `max(lam, 1 - lam)`, so that every image is at least half of its mixture.
    partners: 'permutation': uniform, which gathers the batch where it is split over devices; 'flip': the
      batch from its end, as timm has it, which devices exchange by pairs (of a shuffled batch, any other
      image is as likely a partner).

  Returns:
    The mixed images in the dtype of `images`, the permutation int32 `[batch]` (the partner of row i is
    row `permutation[i]`), and `lam`, a float32 scalar in [0, 1]; `mixup_loss` takes the latter two.

  Raises:
    ValueError: images of integers, or without a batch axis; alpha < 0; other partners.

  References:
    Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018, https://arxiv.org/abs/1710.09412.

  >>> images = jnp.arange(4.0)[:, None]
  >>> mixed, permutation, lam = mixup(jax.random.key(0), images, alpha=0.2)
  >>> bool(jnp.allclose(mixed, lam * images + (1 - lam) * images[permutation]))
  True
  """
  images = jnp.asarray(images)
  if not images.ndim:
    raise ValueError('images is a scalar, expected [batch, ...].')
  _require_floats(images)
  if not alpha >= 0:
    raise ValueError(f'alpha={alpha}: expected a number of at least 0.')
  if alpha == 0:
    return images, jnp.arange(len(images), dtype=jnp.int32), jnp.ones((), jnp.float32)
  key_lam, key_permutation = jax.random.split(key)
  lam = jax.random.beta(key_lam, alpha, alpha, dtype=jnp.float32)
  lam = jnp.maximum(lam, 1 - lam) if own_half else lam
  others, permutation = take_partners(key_permutation, images, partners)
  return _blend(images, others, lam), permutation, lam


def take_partners(
  key: jax.Array, images: ArrayLike, partners: Partners
) -> tuple[jax.Array, jax.Array]:
  """Returns each image's partner, `[batch, ...]`, and which row that is, int32 `[batch]`; see `mixup`."""
  images = jnp.asarray(images)
  rows = jnp.arange(len(images), dtype=jnp.int32)
  if partners == 'flip':
    return images[::-1], rows[::-1]
  if partners != 'permutation':
    raise ValueError(f"partners={partners!r}: expected 'permutation' or 'flip'.")
  permutation = jax.random.permutation(key, rows)
  return images[permutation], permutation


def mix_images(images: ArrayLike, permutation: ArrayLike, lam: ArrayLike) -> jax.Array:
  """Returns `lam * images + (1 - lam) * images[permutation]`, in the dtype of `images`.

  Args:
    images: floats `[batch, ...]`.
    permutation: integers `[batch]`, each row's partner.
    lam: a scalar in [0, 1].

  Raises:
    ValueError: images of integers, or a permutation of another length.
  """
  images, permutation = jnp.asarray(images), jnp.asarray(permutation)
  _require_floats(images)
  if permutation.shape != images.shape[:1]:
    raise ValueError(
      f'permutation has shape {permutation.shape}, expected {images.shape[:1]} for images '
      f'{images.shape}.'
    )
  return _blend(images, images[permutation], lam)


def _blend(images: jax.Array, others: jax.Array, lam: ArrayLike) -> jax.Array:
  dtype = jnp.promote_types(images.dtype, jnp.float32)
  lam = jnp.asarray(lam, dtype)
  return (lam * images.astype(dtype) + (1 - lam) * others.astype(dtype)).astype(images.dtype)


def mixup_loss(
  loss: Callable[[jax.Array, jax.Array], jax.Array],
  logits: ArrayLike,
  labels: ArrayLike,
  permutation: ArrayLike,
  lam: ArrayLike,
) -> jax.Array:
  """Returns `lam * loss(logits, labels) + (1 - lam) * loss(logits, labels[permutation])`.

  Args:
    loss: (logits, labels) -> values of any shape, e.g. `[batch]`.
    logits: `[batch, num_classes]`, of the mixed images.
    labels: `[batch, ...]`, of the images before mixing.
    permutation: integers `[batch]`, from `mixup`.
    lam: scalar, from `mixup`.
  """
  logits, labels = jnp.asarray(logits), jnp.asarray(labels)
  own, partner = loss(logits, labels), loss(logits, labels[jnp.asarray(permutation)])
  lam = jnp.asarray(lam, own.dtype)
  return lam * own + (1 - lam) * partner


def _require_floats(images: jax.Array) -> None:
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(f'images has dtype {images.dtype}, expected floats; use to_float first.')
