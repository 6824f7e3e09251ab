"""Losses of masked-image modeling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated, require_same_shape


def mae_loss(
  predictions: ArrayLike, patches: ArrayLike, mask: ArrayLike, *, normalize_patches: bool = False
) -> jax.Array:
  """Mean squared error of the removed patches' pixels.

    sum(mask * mean((predictions - target)^2, over pixels)) / sum(mask)

  The target is `patches`, or with `normalize_patches` each patch standardized by its own mean and
  variance: `(patch - mean) / sqrt(var + 1e-6)`, with the unbiased variance.

  Args:
    predictions: `[batch, num_patches, pixels]`.
    patches: the images cut by `jaxlab.models.masked_autoencoder.patchify`, of the same shape.
    mask: `[batch, num_patches]`; 1 where a patch was removed from the encoder's input, else 0.
    normalize_patches: standardize the target (`norm_pix_loss` of the authors' code).

  Returns:
    A scalar, float32 or wider; 0 if nothing is masked.

  Raises:
    ValueError: if the shapes do not fit, or if a patch of one value is to be standardized.

  References:
    He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022
    (https://arxiv.org/abs/2111.06377).
  """
  require_same_shape(3, predictions=predictions, patches=patches)
  if jnp.shape(mask) != jnp.shape(patches)[:2]:
    raise ValueError(
      f'mask must be [batch, num_patches] = {jnp.shape(patches)[:2]}, got {jnp.shape(mask)}.'
    )
  predictions, targets, mask = accumulated(predictions, patches, mask)
  if normalize_patches:
    if targets.shape[-1] < 2:
      raise ValueError('normalize_patches needs at least 2 values in a patch, got 1.')
    mean = jnp.mean(targets, axis=-1, keepdims=True)
    variance = jnp.var(targets, axis=-1, keepdims=True, ddof=1)
    targets = (targets - mean) * jax.lax.rsqrt(variance + 1e-6)
  errors = jnp.mean((predictions - targets) ** 2, axis=-1)
  total = jnp.sum(mask)
  return jnp.sum(errors * mask) / jnp.where(total > 0, total, 1)
