"""Losses of language models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated
from jaxlab.losses._labels import require_classes, require_labels
from jaxlab.losses.classification import cross_entropy


def next_token_cross_entropy(
  logits: ArrayLike, tokens: ArrayLike, mask: ArrayLike | None = None
) -> jax.Array:
  """Cross-entropy of each token given those before it, in nats.

    loss[b, t] = -log softmax(logits[b, t])[tokens[b, t + 1]]

  Args:
    logits: `[batch, time, vocab]`, of a decoder over `tokens[:, :-1]`.
    tokens: integers `[batch, time + 1]`.
    mask: `[batch, time + 1]`, false or 0 for padding tokens on either side; None: none.

  Returns:
    `[batch, time]`, float32 or wider: 0 where the token or its predecessor is padding (the terms that count
    are those of `next_token_mask`).

  Raises:
    ValueError: if the shapes do not fit, or tokens are no integers or (where concrete) out of the vocabulary.

  >>> next_token_cross_entropy(jnp.zeros((1, 2, 4)), jnp.array([[3, 0, 1]])).round(3).tolist()
  [[1.3860000371932983, 1.3860000371932983]]
  """
  (logits,), tokens = accumulated(logits), jnp.asarray(tokens)
  if not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f'tokens must be integers, got {tokens.dtype}.')
  if logits.ndim != 3 or tokens.shape != (logits.shape[0], logits.shape[1] + 1):
    raise ValueError(
      f'Expected logits [batch, time, vocab] and tokens [batch, time + 1]; got {logits.shape} and '
      f'{tokens.shape}. Feed the decoder tokens[:, :-1].'
    )
  if mask is None:
    return cross_entropy(logits, tokens[:, 1:])
  if jnp.shape(mask) != tokens.shape:
    raise ValueError(f'mask {jnp.shape(mask)} must have the shape of tokens, {tokens.shape}.')
  counts = next_token_mask(mask)
  require_classes(tokens[:, 1:], logits.shape[-1], counts, 'tokens')
  # The logits are masked, too: those of padding may overflow, and 0 * inf would reach the gradient.
  logits = jnp.where(counts[..., None], logits, 0)
  return jnp.where(counts, cross_entropy(logits, jnp.where(counts, tokens[:, 1:], 0)), 0)


def token_classifier_loss(
  logits: ArrayLike, labels: ArrayLike, loss_mask: ArrayLike, mode: str = 'text_only'
) -> jax.Array:
  """Mean cross-entropy of a classifier of tokens, in nats.

    text_only:     sum_i m_i CE(logits_i, labels_i) / sum_i m_i
    all_positions: mean_i CE(logits_i, labels_i)

  Args:
    logits: `[..., num_classes]`.
    labels: integers `[...]`; where they do not count, anything.
    loss_mask: `[...]`, m: true for the tokens that count, those of the text; false for instruction, special
      tokens and padding.
    mode: `'text_only'`, or `'all_positions'`: the official code of LLMLingua-2 gives padding and special
      tokens a label, too, and no token is left out.

  Returns:
    A scalar, float32 or wider; 0 where no token counts.

  Raises:
    ValueError: for another mode, shapes that do not fit, or labels that are no integers or (where concrete,
      where they count) out of range.

  Source: LLMLingua-2 (arXiv 2403.12968), used by EFPC (arXiv 2503.07956); that the text alone counts is
  inferred.

  >>> logits = jnp.zeros((1, 2, 2))
  >>> token_classifier_loss(logits, jnp.array([[0, 1]]), [[True, False]]).round(3).item()
  0.6930000185966492
  """
  if mode not in ('text_only', 'all_positions'):
    raise ValueError(f"mode={mode!r}, expected 'text_only' or 'all_positions'.")
  (logits,), labels = accumulated(logits), jnp.asarray(labels)
  counts = jnp.asarray(loss_mask).astype(bool)
  require_labels(logits, labels, counts if mode == 'text_only' else jnp.ones_like(counts))
  if mode == 'all_positions':
    return jnp.mean(cross_entropy(logits, labels))
  # The logits are masked, too: those of padding may overflow, and 0 * inf would reach the gradient.
  logits = jnp.where(counts[..., None], logits, 0)
  values = cross_entropy(logits, jnp.where(counts, labels, 0))
  total = jnp.maximum(jnp.sum(counts), 1).astype(values.dtype)
  return jnp.sum(jnp.where(counts, values, 0)) / total


def next_token_mask(mask: ArrayLike) -> jax.Array:
  """Returns bool `[batch, time]` of a mask `[batch, time + 1]`: the token and its predecessor are real."""
  mask = jnp.asarray(mask).astype(bool)
  return mask[:, :-1] & mask[:, 1:]
