"""CSRA (Zhu & Wu 2021): class-specific residual attention over a map of features, for several labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import ArrayLike

from jaxlab.models.heads import unit
from jaxlab.tracing import is_concrete

Array = jax.Array

# Of several heads, by their number; a head of infinite temperature takes the maximum.
TEMPERATURES = {
  1: (1.0,),
  2: (1.0, math.inf),
  4: (1.0, 2.0, 4.0, math.inf),
  6: (*map(float, range(1, 6)), math.inf),
  8: (*map(float, range(1, 8)), math.inf),
}
# Uniform within +-1/sqrt(features), each head for itself: PyTorch's rule of a 1x1 convolution.
_rows = nn.initializers.variance_scaling(
  1 / 3, 'fan_in', 'uniform', in_axis=-1, out_axis=-2, batch_axis=0
)


def csra_temperatures(num_heads: int) -> tuple[float, ...]:
  """Returns the temperatures of CSRA's heads: they are fixed by their number.

  Raises:
    ValueError: for another number than 1, 2, 4, 6 and 8.

  >>> csra_temperatures(4)
  (1.0, 2.0, 4.0, inf)
  """
  if num_heads not in TEMPERATURES:
    raise ValueError(
      f'num_heads is {num_heads}, expected one of {", ".join(map(str, TEMPERATURES))}, or temperatures.'
    )
  return TEMPERATURES[num_heads]


def csra_scores(features: ArrayLike, weight: ArrayLike) -> Array:
  """Returns each class's score at every position, its classifier of length 1, the features of any.

    s_bnc = <m_c, x_bn> / |m_c|

  Args:
    features: `[batch, height, width, dim]`, or positions along one axis, `[batch, positions, dim]`.
    weight: a classifier for each class, `[num_classes, dim]`, not normalized; gradients flow through its
      norms, which are at least 1e-12.

  Returns:
    `[batch, positions, num_classes]`, positions in raster order, float32 or wider.

  Raises:
    ValueError: if shapes do not fit or hold no position.

  References:
    Zhu & Wu, Residual Attention: A Simple but Effective Method for Multi-Label Recognition, ICCV 2021
    (https://arxiv.org/abs/2108.02456), equation 2.

  Examples:
    >>> csra_scores(jnp.array([[[3.0, 4.0], [1.0, 0.0]]]), jnp.array([[0.0, 2.0]])).tolist()
    [[[4.0], [0.0]]]
  """
  features, weight = jnp.asarray(features), jnp.asarray(weight)
  shape = features.shape
  if len(shape) not in (3, 4) or weight.ndim != 2 or weight.shape[1] != shape[-1] or 0 in shape:
    raise ValueError(
      'Expected features [batch, height, width, dim] or [batch, positions, dim], with positions, and weight '
      f'[num_classes, dim]; got {shape} and {weight.shape}.'
    )
  positions = features.reshape(shape[0], -1, shape[-1])
  wide = jnp.promote_types(jnp.result_type(features, weight), jnp.float32)
  return jnp.matmul(positions, unit(weight, -1).T, preferred_element_type=wide)


def class_attention(scores: ArrayLike, temperature: float = 1.0) -> Array:
  """Returns where each class looks: `softmax(temperature * scores)` over positions.

  Args:
    scores: of `csra_scores`, `[batch, positions, num_classes]`.
    temperature: positive; infinite: all on the best position, shared where several are.

  Returns:
    `[batch, positions, num_classes]`, sums over positions are 1; float32 or wider.

  Raises:
    ValueError: for scores of another shape, or a temperature that is not positive.
  """
  scores = _scores(scores)
  _require_temperature(temperature)
  if temperature == math.inf:
    best = (scores == jnp.max(scores, 1, keepdims=True)).astype(scores.dtype)
    return best / jnp.sum(best, 1, keepdims=True)
  return jax.nn.softmax(temperature * scores, axis=1)


def csra_head(
  features: ArrayLike,
  weight: ArrayLike,
  temperature: float = 1.0,
  lam: ArrayLike = 0.1,
  *,
  allow_negative: bool = False,
) -> Array:
  """Returns one head's logits: the mean of a class's scores, and `lam` times their attention-weighted sum.

    y_bc = mean_n s_bnc + lam * sum_n softmax_n(temperature * s_bnc) s_bnc

  With an infinite temperature the sum is `max_n s_bnc`; with `lam` 0 this is global average pooling under a
  classifier of length 1. On a single position it is `(1 + lam) s`.

  Args:
    features: `[batch, height, width, dim]` or `[batch, positions, dim]`.
    weight: `[num_classes, dim]`, see `csra_scores`.
    temperature: static and positive; `math.inf` for the maximum. The authors' code marks it by 99.
    lam: the attention's weight, a scalar.
    allow_negative: whether `lam` may be below 0.

  Returns:
    `[batch, num_classes]`, float32 or wider.

  Raises:
    ValueError: if shapes do not fit, the temperature is not positive, or `lam` (where concrete) is negative.

  References:
    Zhu & Wu 2021 (https://arxiv.org/abs/2108.02456), equations 3 to 6.

  Examples:
    >>> features, weight = jnp.array([[[1.0], [3.0]]]), jnp.array([[2.0]])
    >>> float(csra_head(features, weight, math.inf, 0.5)[0, 0])
    3.5
  """
  _require_temperature(temperature)
  scores = csra_scores(features, weight)
  if temperature == math.inf:
    return max_residual(scores, lam, allow_negative=allow_negative)
  _require_lam(lam, allow_negative)
  scores = _scores(scores)
  attended = jnp.sum(class_attention(scores, temperature) * scores, 1)
  return jnp.mean(scores, 1) + lam * attended


def max_residual(score_map: ArrayLike, lam: ArrayLike, *, allow_negative: bool = False) -> Array:
  """Returns `mean + lam * max` of each class's scores over positions: CSRA without training.

  For any network that was trained with global average pooling under a linear classifier: its scores at every
  position are `features @ kernel + bias`, whose mean are its logits.

  Args:
    score_map: `[batch, positions, num_classes]` or `[batch, height, width, num_classes]`.
    lam: weight of the maximum, a scalar; some 0.1 to 1.
    allow_negative: whether `lam` may be below 0.

  Returns:
    `[batch, num_classes]`, float32 or wider.

  Raises:
    ValueError: for scores of another shape, or a `lam` that (where concrete) is negative.

  References:
    Zhu & Wu 2021 (https://arxiv.org/abs/2108.02456), figure 1.

  Examples:
    >>> float(max_residual(jnp.array([[[1.0], [3.0]]]), 0.5)[0, 0])
    3.5
  """
  _require_lam(lam, allow_negative)
  scores = _scores(score_map)
  return jnp.mean(scores, 1) + lam * jnp.max(scores, 1)


class CSRAMultiHead(nn.Module):
  """CSRA's classifier over a map of features: the sum of heads, each with classifiers of its own.

  Parameter `weight` `[num_heads, num_classes, dim]`, uniform within +-1/sqrt(dim); there is no bias. The same
  in training and evaluation.

  Attributes:
    num_classes: number of logits.
    num_heads: 1, 2, 4, 6 or 8, which decides on the temperatures.
    lam: the attention's weight in all heads; 0: global average pooling.
    temperatures: of the heads, in place of those of `csra_temperatures`; `math.inf`: the maximum.
    allow_negative: whether `lam` may be below 0.

  Raises:
    ValueError: at construction, if a field is out of its range.
  """

  num_classes: int
  num_heads: int = 1
  lam: float = 0.1
  temperatures: Sequence[float] | None = None
  allow_negative: bool = False

  def __post_init__(self):
    if self.num_classes < 1:
      raise ValueError(f'CSRAMultiHead: num_classes={self.num_classes} must be positive.')
    own = self.head_temperatures
    if len(own) != self.num_heads:
      raise ValueError(f'CSRAMultiHead: {len(own)} temperatures for num_heads={self.num_heads}.')
    for temperature in own:
      _require_temperature(temperature)
    _require_lam(self.lam, self.allow_negative)
    super().__post_init__()

  @property
  def head_temperatures(self) -> tuple[float, ...]:
    """The heads' temperatures."""
    if self.temperatures is not None:
      return tuple(self.temperatures)
    return csra_temperatures(self.num_heads)

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[batch, height, width, dim]` or `[batch, positions, dim]` to logits `[batch, num_classes]`."""
    shape = (self.num_heads, self.num_classes, x.shape[-1])
    weight = self.param('weight', _rows, shape, jnp.float32)
    x, weight = nn.dtypes.promote_dtype(x, weight, dtype=x.dtype)
    return csra_logits(x, weight, self.head_temperatures, self.lam, self.allow_negative)


def csra_logits(
  features: ArrayLike,
  weights: ArrayLike,
  temperatures: Sequence[float],
  lam: ArrayLike,
  allow_negative: bool = False,
) -> Array:
  """Returns the sum of the heads' logits `[batch, num_classes]`, what `CSRAMultiHead` computes.

  Args:
    features: `[batch, height, width, dim]` or `[batch, positions, dim]`.
    weights: `[num_heads, num_classes, dim]`.
    temperatures: of each head.
    lam: of all heads.
    allow_negative: see `csra_head`.

  Raises:
    ValueError: as `csra_head`, and if there are not as many temperatures as heads.
  """
  weights = jnp.asarray(weights)
  if weights.ndim != 3 or len(temperatures) != len(weights) or not len(weights):
    raise ValueError(
      f'Expected weights [num_heads, num_classes, dim] and a temperature for each head; got '
      f'{weights.shape} and {len(temperatures)} temperatures.'
    )
  heads = zip(weights, temperatures, strict=True)
  return sum(csra_head(features, w, t, lam, allow_negative=allow_negative) for w, t in heads)


def _scores(scores: ArrayLike) -> Array:
  """Returns scores `[batch, positions, num_classes]` in at least float32."""
  scores = jnp.asarray(scores)
  if scores.ndim not in (3, 4) or 0 in scores.shape:
    raise ValueError(
      'Expected scores [batch, positions, num_classes] or [batch, height, width, num_classes], not empty; '
      f'got {scores.shape}.'
    )
  wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
  return wide.reshape(len(wide), -1, wide.shape[-1])


def _require_temperature(temperature: Any) -> None:
  if not temperature > 0:
    raise ValueError(f'temperature is {temperature}, expected a positive number, or math.inf.')


def _require_lam(lam: ArrayLike, allow_negative: bool) -> None:
  if is_concrete(lam) and not (lam >= 0 or (allow_negative and lam == lam)):
    raise ValueError(f'lam is {lam}, expected at least 0; allow_negative=True takes others.')
