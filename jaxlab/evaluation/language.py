"""Metrics of language models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def perplexity(cross_entropy: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
  """Exponential of the mean cross-entropy of a token, `exp(sum(mask * loss) / sum(mask))`.

  Over several batches the losses are to be concatenated, or their sums: perplexities do not average. That of
  a byte-level model is a byte's: `log2` of it are the bits per byte.

  Args:
    cross_entropy: `[...]`, of each token in nats (`jaxlab.losses.next_token_cross_entropy`).
    mask: false or 0 for terms that do not count; its axes are the first ones of `cross_entropy`, e.g.
      `[batch]` or `[batch, time]`. None: all count.

  Returns:
    A float32 (or wider) scalar, at least 1; NaN if no term counts. 1 is certainty, the vocabulary's size
    uniform guessing.

  Raises:
    ValueError: if the mask's axes are not those of `cross_entropy`.

  >>> float(perplexity(jnp.log(jnp.array([2.0, 8.0])))), float(perplexity(jnp.zeros(3)))
  (4.0, 1.0)
  """
  losses = jnp.asarray(cross_entropy)
  losses = losses.astype(jnp.promote_types(losses.dtype, jnp.float32))
  if mask is None:
    return jnp.exp(jnp.mean(losses))
  mask = jnp.asarray(mask).astype(bool)
  if mask.shape != losses.shape[: mask.ndim]:
    raise ValueError(f'mask {mask.shape} must have the first axes of cross_entropy {losses.shape}.')
  mask = mask.reshape(mask.shape + (1,) * (losses.ndim - mask.ndim))
  return jnp.exp(jnp.mean(losses, where=jnp.broadcast_to(mask, losses.shape)))
