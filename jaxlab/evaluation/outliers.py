"""Outliers in a network's activations: how large they are, and whether the data or the weights make them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

PyTree = Any
BlockOutputs = Sequence[ArrayLike] | ArrayLike


class OutlierStatistics(NamedTuple):
  """What the activations of each block look like, float32 or wider, `[blocks]` each.

  Attributes:
    peak: `max |A|`.
    maximum: `max A`.
    minimum: `min A`.
    mean_abs: `mean |A|`.
    kurtosis: `E (A - mean)^4 / (E (A - mean)^2)^2` over all elements: 3 for a normal distribution, 0 where
      all elements are equal.
  """

  peak: jax.Array
  maximum: jax.Array
  minimum: jax.Array
  mean_abs: jax.Array
  kurtosis: jax.Array


def outlier_statistics(
  block_outputs: BlockOutputs, *, per_input: bool = False
) -> OutlierStatistics:
  """Returns the size of every block's activations.

  Args:
    block_outputs: arrays `[batch, ...]`, one a block, of any shape; or one array `[blocks, batch, ...]`. See
      `models.block_outputs`.
    per_input: take the statistics of each example, and average them over the batch, as TWEO's test of data
      independence does; otherwise they are of the whole batch.

  Raises:
    ValueError: for no blocks, empty outputs, or with `per_input` outputs without a batch.

  References:
    Liang et al., TWEO: Transformers Without Extreme Outliers Enables FP8 Training and Quantization for
    Dummies, CVPR 2026 (https://arxiv.org/abs/2511.23225). The kurtosis is common in the literature, not
    theirs.

  Examples:
    >>> statistics = outlier_statistics([jnp.array([[1.0, -3.0]])])
    >>> statistics.peak.tolist(), statistics.mean_abs.tolist(), statistics.kurtosis.tolist()
    ([3.0], [2.0], [1.0])
  """
  outputs = [jnp.asarray(y) for y in block_outputs]
  if not outputs:
    raise ValueError('block_outputs holds no block.')
  each = [_statistics(y, per_input) for y in outputs]
  return OutlierStatistics(*(jnp.stack(values) for values in zip(*each)))


def _statistics(y: jax.Array, per_input: bool) -> OutlierStatistics:
  if not y.size or (per_input and y.ndim < 2):
    raise ValueError(f'Block outputs must be [batch, ...] and not empty, got {y.shape}.')
  y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
  rows = y.reshape(len(y), -1) if per_input else y.reshape(1, -1)
  centered = rows - jnp.mean(rows, 1, keepdims=True)
  # Relative to the largest, so that fourth powers neither overflow nor vanish.
  largest = jnp.max(jnp.abs(centered), 1, keepdims=True)
  squares = jnp.square(centered / jnp.where(largest > 0, largest, 1))
  variance, fourth = jnp.mean(squares, 1), jnp.mean(jnp.square(squares), 1)
  values = OutlierStatistics(
    peak=jnp.max(jnp.abs(rows), 1),
    maximum=jnp.max(rows, 1),
    minimum=jnp.min(rows, 1),
    mean_abs=jnp.mean(jnp.abs(rows), 1),
    kurtosis=fourth / jnp.where(variance > 0, variance**2, 1),
  )
  return OutlierStatistics(*(jnp.mean(value) for value in values))


class DataIndependence(NamedTuple):
  """Statistics by block in the three settings of `data_independence`, each averaged over inputs.

  Attributes:
    trained: trained weights, real data.
    drawn: random weights, real data.
    noise: trained weights, random data.
  """

  trained: OutlierStatistics
  drawn: OutlierStatistics
  noise: OutlierStatistics


def data_independence(
  block_outputs: Callable[[PyTree, PyTree], BlockOutputs],
  trained: PyTree,
  drawn: PyTree,
  data: PyTree,
  noise: PyTree,
) -> DataIndependence:
  """Whether outliers come from the data or from the trained weights (TWEO's contradiction test).

  If they come from the weights, `noise` has peaks as high as `trained`, and `drawn` has none.

  Args:
    block_outputs: `(variables, inputs) -> outputs of all blocks`, pure; see `models.block_outputs`.
    trained: the network's variables.
    drawn: variables as initialized.
    data: a batch of real inputs.
    noise: random inputs: tokens uniform over the vocabulary, or pixels uniform in [0, 255], normalized as the
      images are.

  Raises:
    ValueError: as `outlier_statistics`.

  References:
    Liang et al., CVPR 2026, as `outlier_statistics`: above 1,000 for `trained` and `noise`, below 10 for
    `drawn`, in Qwen2.5-0.5B and ViT.
  """
  pairs = (trained, data), (drawn, data), (trained, noise)
  return DataIndependence(
    *(outlier_statistics(block_outputs(*pair), per_input=True) for pair in pairs)
  )
