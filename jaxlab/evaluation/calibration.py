"""Calibration: does a classifier's confidence agree with how often it is right?"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxlab.losses._arguments import accumulated
from jaxlab.tracing import is_concrete


class Calibration(NamedTuple):
  """Calibration errors, and the reliability diagram behind them.

  Attributes:
    ece: scalar, expected calibration error.
    mce: scalar, maximum calibration error.
    counts: int32 `[num_bins]`, examples of each bin.
    accuracy: `[num_bins]`, share of right predictions in the bin; 0 for an empty bin.
    confidence: `[num_bins]`, mean confidence in the bin; 0 for an empty bin.
  """

  ece: jax.Array
  mce: jax.Array
  counts: jax.Array
  accuracy: jax.Array
  confidence: jax.Array


def expected_calibration_error(
  confidences: ArrayLike,
  correct: ArrayLike,
  num_bins: int = 15,
  mask: ArrayLike | None = None,
) -> Calibration:
  """Calibration errors over bins of equal width, right-closed: bin b is (b / B, (b + 1) / B].

    ECE = sum_b |acc_b - conf_b| count_b / sum_b count_b,  MCE = max over the filled bins |acc_b - conf_b|

  Args:
    confidences: `[examples]` in [0, 1], usually the largest softmax probability. A confidence of exactly 0
      is in no bin and does not count.
    correct: bool `[examples]`, whether the prediction (the argmax) is the label.
    num_bins: number of bins B.
    mask: `[examples]`, false for examples that do not count (padding).

  Returns:
    A `Calibration`, float32 or wider; errors are NaN if no example counts, or one with NaN.

  Raises:
    ValueError: lengths that differ, num_bins < 1, confidences outside [0, 1] where they are concrete.

  References:
    Guo et al., On Calibration of Modern Neural Networks, ICML 2017, https://arxiv.org/abs/1706.04599.

  >>> result = expected_calibration_error(
  ...   np.array([0.9, 0.8, 0.3]), np.array([1, 0, 1]), num_bins=2
  ... )
  >>> round(float(result.ece), 4), round(float(result.mce), 4), result.counts.tolist()
  (0.4667, 0.7, [1, 2])
  """
  if num_bins < 1:
    raise ValueError(f'num_bins is {num_bins}, expected a number >= 1.')
  if jnp.ndim(confidences) != 1 or jnp.shape(correct) != jnp.shape(confidences):
    raise ValueError(
      f'confidences have shape {jnp.shape(confidences)}, correct {jnp.shape(correct)}; expected '
      '[examples] for both.'
    )
  if mask is not None and jnp.shape(mask) != jnp.shape(confidences):
    raise ValueError(f'mask has shape {jnp.shape(mask)}, expected {jnp.shape(confidences)}.')
  if is_concrete(confidences) and (mask is None or is_concrete(mask)):
    values = np.asarray(confidences)[... if mask is None else np.asarray(mask, bool)]
    if not np.all((values >= 0) & (values <= 1)):
      raise ValueError(
        f'confidences run from {values.min()} to {values.max()}, expected probabilities in [0, 1], not '
        'logits.'
      )
  (confidences,) = accumulated(confidences)
  dtype = confidences.dtype
  edges = jnp.asarray(np.linspace(0, 1, num_bins + 1), dtype)
  bins = jnp.searchsorted(edges, confidences, side='left') - 1
  counted = (bins >= 0) if mask is None else (bins >= 0) & jnp.asarray(mask, bool)
  bins = jnp.where(counted, bins, num_bins)  # past the end: dropped

  def total(values: ArrayLike, dtype: jnp.dtype = dtype) -> jax.Array:
    values = jnp.broadcast_to(jnp.asarray(values, dtype), bins.shape)
    return jnp.zeros((num_bins,), dtype).at[bins].add(values, mode='drop')

  counts = total(1, jnp.int32)
  size = jnp.maximum(counts, 1)
  accuracy, confidence = total(jnp.asarray(correct, bool)) / size, total(confidences) / size
  gaps = jnp.abs(accuracy - confidence)
  unknown = (
    jnp.isnan(confidences) if mask is None else jnp.isnan(confidences) & jnp.asarray(mask, bool)
  )
  defined = (jnp.sum(counts) > 0) & ~jnp.any(unknown)
  ece = jnp.where(defined, jnp.sum(gaps * counts) / jnp.sum(counts), jnp.nan)
  mce = jnp.where(defined, jnp.max(gaps), jnp.nan)
  return Calibration(ece, mce, counts, accuracy, confidence)
