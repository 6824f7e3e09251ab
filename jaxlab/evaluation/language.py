"""Metrics of language models."""

from __future__ import annotations

import re

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


def boxed_answers(text: str) -> list[str]:
  r"""Returns what stands in each `\boxed{...}` of a text, in order, braces within it included.

  One whose braces do not close, as of an output that was cut off, is left out.

  >>> boxed_answers(r'so \boxed{12}, no: \boxed{\frac{1}{2}} and \boxed{3')
  ['12', '\\frac{1}{2}']
  """
  found = []
  for match in re.finditer(r'\\boxed\s*\{', text):
    depth = 1
    for end in range(match.end(), len(text)):
      depth += (text[end] == '{') - (text[end] == '}')
      if not depth:
        found.append(text[match.end() : end])
        break
  return found


def aime_correct(text: str, answer: str) -> bool:
  r"""Returns whether the right answer is contained in any `\boxed{...}` of an output.

  The rule by which the scores of "Who Reasons in the Large Language Models?" count: contained, not equal. An
  output that boxes '204' is right where '20' is the answer, as is one that boxes several answers.

  Args:
    text: the output.
    answer: e.g. '204'; spaces around it do not count.

  Raises:
    ValueError: for an empty answer, which every box contains.

  References:
    Shao & Wu, 2025 (https://arxiv.org/abs/2505.20993), the authors' code of the evaluation on AIME 2024.

  >>> aime_correct(r'Thus \boxed{m + n = 204}.', '204'), aime_correct('It is 204.', '204')
  (True, False)
  """
  answer = str(answer).strip()
  if not answer:
    raise ValueError('answer must not be empty: every box contains it.')
  return any(answer in boxed for boxed in boxed_answers(text))
