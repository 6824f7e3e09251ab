"""Values with a natural order, such as ages, learned as distributions over a grid of labels.

Deep label distribution learning (DLDL; Gao et al., TIP 2017), its second version, which learns the
expectation too (DLDL-v2; Gao et al., IJCAI 2018, arXiv 2007.01771), and what they are compared with:
classification with the expectation as prediction (DEX; Rothe et al. 2018), ranking (Chen et al. 2017) and
plain regression.

Values are in the units of `labels`, `[num_labels]` and strictly increasing. Losses are of each example,
`[batch]`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jaxlab.losses._arguments import (
  accumulated,
  require_finite,
  require_no_nan,
  require_not_negative,
)
from jaxlab.tracing import is_concrete

Array = jax.Array
Regression = Literal['l1', 'smooth_l1', 'l2']

MIN_SIGMA = 1e-10  # of the official code


class DistributionLoss(NamedTuple):
  """What `dldl_v2_loss` returns, of each example `[batch]`.

  Attributes:
    value: the loss.
    divergence: the Kullback-Leibler divergence from target to prediction, a sum over labels.
    regression: the loss of the expectation.
    expectation: the prediction.
  """

  value: Array
  divergence: Array
  regression: Array
  expectation: Array


def gaussian_label_distribution(
  y: ArrayLike, sigma: ArrayLike, labels: ArrayLike, outside: Literal['raise', 'clip'] = 'raise'
) -> Array:
  """Returns the normal distribution around each value on the grid of labels, normalized over it.

  `p_k ~ exp(-(l_k - y)^2 / (2 sigma^2))`, DLDL-v2 equation 3, computed as a softmax: with a deviation of 0 it
  is the one-hot vector of the nearest label (where two are equally near, half of each).

  Args:
    y: values `[batch]`, not necessarily labels.
    sigma: deviations `[batch]`, or one for all; 0 becomes 1e-10.
    labels: `[num_labels]`.
    outside: 'clip': values outside of the labels are taken for the nearest one. Otherwise they raise; traced
      ones cannot, and get a distribution that is cut off.

  Returns:
    `[batch, num_labels]`.

  Raises:
    ValueError: for shapes that do not fit, labels that do not increase, and, if concrete, values that are not
      finite or outside, and negative deviations.

  >>> gaussian_label_distribution(jnp.array([0.5]), 1.0, jnp.arange(2.0))
  Array([[0.5, 0.5]], dtype=float32)
  """
  y, labels = _values(y, labels, outside)
  sigma = _deviations(sigma, y)
  distance = (labels - y[:, None]) / sigma[:, None]
  return jax.nn.softmax(-jnp.square(distance) / 2, axis=-1)


def label_expectation(probabilities: ArrayLike, labels: ArrayLike) -> Array:
  """Returns `sum_k q_k l_k` of distributions `[..., num_labels]`, `[...]`, in at least float32."""
  probabilities, labels = accumulated(probabilities, labels)
  require_labels(labels, probabilities.shape[-1])
  return jnp.sum(probabilities * labels, axis=-1)


def regression_loss(predictions: ArrayLike, y: ArrayLike, kind: Regression = 'l1') -> Array:
  """Returns `|e|`, Huber's smooth version with threshold 1, or `e^2`, of errors `e = prediction - y`.

  Raises:
    ValueError: for another kind, or shapes that differ.
  """
  predictions, y = accumulated(predictions, y)
  if predictions.shape != y.shape:
    raise ValueError(f'predictions are {predictions.shape}, y is {y.shape}; expected one shape.')
  error = predictions - y
  # Where the error is 0, so is its derivative; that of `jnp.abs` is 1.
  size = error * jax.lax.stop_gradient(jnp.sign(error))
  if kind == 'l1':
    return size
  if kind == 'smooth_l1':
    return jnp.where(size < 1, jnp.square(error) / 2, size - 0.5)
  if kind == 'l2':
    return jnp.square(error)
  raise ValueError(f"kind is {kind!r}, expected 'l1', 'smooth_l1' or 'l2'.")


def dldl_v2_loss(
  logits: ArrayLike,
  y: ArrayLike,
  sigma: ArrayLike,
  labels: ArrayLike,
  weight: float = 1.0,
  *,
  kl_reduction: Literal['elements', 'batch'] = 'elements',
  regression: Regression = 'l1',
  outside: Literal['raise', 'clip'] = 'raise',
) -> DistributionLoss:
  """Returns the loss of DLDL-v2: of the distribution, and of its expectation.

  `KL(p || q) / n + weight |sum_k q_k l_k - y|` with p of `gaussian_label_distribution` and
  `q = softmax(logits)`. The paper has n = 1 (`'batch'`). The official code averages the divergence over all
  elements, n = num_labels (`'elements'`): its weight of the expectation is so much larger.

  Args:
    logits: `[batch, num_labels]`.
    y: values `[batch]`.
    sigma: their deviations, `[batch]` or one for all.
    labels: `[num_labels]`.
    weight: of the expectation's loss, lambda in the paper; 0 is DLDL.
    kl_reduction: see above.
    regression: of the expectation, see `regression_loss`.
    outside: see `gaussian_label_distribution`.

  Raises:
    ValueError: as `gaussian_label_distribution`; for a negative weight, and logits of another shape.

  >>> found = dldl_v2_loss(jnp.zeros((1, 3)), jnp.array([2.0]), 1.0, jnp.arange(3.0))
  >>> found.expectation, found.regression
  (Array([1.], dtype=float32), Array([1.], dtype=float32))
  """
  if kl_reduction not in ('elements', 'batch'):
    raise ValueError(f"kl_reduction is {kl_reduction!r}, expected 'elements' or 'batch'.")
  require_not_negative(weight=weight)
  (logits,) = accumulated(logits)
  target = gaussian_label_distribution(y, sigma, labels, outside)
  y, labels = _values(y, labels, outside)
  if logits.shape != target.shape:
    raise ValueError(f'logits are {logits.shape}, expected {target.shape}: a label each.')
  divergence = optax.losses.kl_divergence(jax.nn.log_softmax(logits, -1), target)
  expectation = label_expectation(jax.nn.softmax(logits, -1), labels)
  error = regression_loss(expectation, y, regression)
  share = 1 / len(labels) if kl_reduction == 'elements' else 1.0
  return DistributionLoss(share * divergence + weight * error, divergence, error, expectation)


def nearest_label(y: ArrayLike, labels: ArrayLike) -> Array:
  """Returns the index of the label that is nearest to each value, int32 `[batch]`; of two the lower one."""
  y, labels = _values(y, labels, 'clip')
  return jnp.argmin(jnp.abs(labels - y[:, None]), axis=-1).astype(jnp.int32)


def dex_loss(logits: ArrayLike, y: ArrayLike, labels: ArrayLike) -> Array:
  """Returns the cross-entropy of each value's nearest label; the prediction is `label_expectation`.

  DEX, Deep Expectation (Rothe, Timofte & Van Gool, IJCV 2018).

  Args:
    logits: `[batch, num_labels]`.
    y: values `[batch]`.
    labels: `[num_labels]`.
  """
  (logits,) = accumulated(logits)
  require_labels(labels, logits.shape[-1])
  chosen = jax.nn.one_hot(nearest_label(y, labels), logits.shape[-1], dtype=logits.dtype)
  return -jnp.sum(chosen * jax.nn.log_softmax(logits, -1), -1)


def rank_code(y: ArrayLike, labels: ArrayLike) -> Array:
  """Returns which labels but the last a value exceeds, `r_k = 1[y > l_k]`, `[batch, num_labels - 1]`.

  The target of ranking: the limit of `soft_rank_code` of distributions without deviation.

  >>> rank_code(jnp.array([1.0]), jnp.arange(4.0))
  Array([[1., 0., 0.]], dtype=float32)
  """
  y, labels = _values(y, labels, 'clip')
  return (y[:, None] > labels[:-1]).astype(y.dtype)


def soft_rank_code(probabilities: ArrayLike) -> Array:
  """Returns the share above each label but the last, `1 - cumsum(p)_k`, `[..., num_labels - 1]`.

  Ranking learns the complementary cumulative distribution of the values, DLDL their density (DLDL-v2,
  section 3): a linear map of each other.

  >>> soft_rank_code(jnp.array([0.25, 0.5, 0.25]))
  Array([0.75, 0.25], dtype=float32)
  """
  (probabilities,) = accumulated(probabilities)
  return (1 - jnp.cumsum(probabilities, axis=-1))[..., :-1]


def ranking_loss(
  logits: ArrayLike, y: ArrayLike, labels: ArrayLike, kind: Literal['bce', 'mse'] = 'bce'
) -> Array:
  """Returns the mean over labels of the loss of `sigmoid(logits)` against `rank_code(y, labels)`.

  Args:
    logits: `[batch, num_labels - 1]`.
    y: values `[batch]`.
    labels: `[num_labels]`.
    kind: binary cross-entropy, or the squared difference.

  Raises:
    ValueError: for another kind, or logits of another shape than the code's.
  """
  (logits,) = accumulated(logits)
  code = rank_code(y, labels)
  if logits.shape != code.shape:
    raise ValueError(f'logits are {logits.shape}, expected {code.shape}: a label fewer.')
  if kind == 'bce':
    return jnp.mean(jax.nn.softplus(logits) - code * logits, -1)
  if kind == 'mse':
    return jnp.mean(jnp.square(jax.nn.sigmoid(logits) - code), -1)
  raise ValueError(f"kind is {kind!r}, expected 'bce' or 'mse'.")


def rank_predict(probabilities: ArrayLike, labels: ArrayLike) -> Array:
  """Returns the label behind as many as are exceeded with a probability of at least 1/2, `[...]`.

  Args:
    probabilities: `[..., num_labels - 1]`.
    labels: `[num_labels]`.

  >>> rank_predict(jnp.array([0.9, 0.5, 0.4]), jnp.arange(10.0, 14.0))
  Array(12., dtype=float32)
  """
  probabilities, labels = accumulated(probabilities, labels)
  require_labels(labels, probabilities.shape[-1] + 1)
  return labels[jnp.sum(probabilities >= 0.5, axis=-1)]


def to_unit_range(y: ArrayLike, labels: ArrayLike) -> Array:
  """Returns values with the first label at -1 and the last at 1: what an output through tanh is to say."""
  y, labels = accumulated(y, labels)
  require_labels(labels)
  return 2 * (y - labels[0]) / (labels[-1] - labels[0]) - 1


def from_unit_range(x: ArrayLike, labels: ArrayLike) -> Array:
  """Returns the values of `to_unit_range`'s result."""
  x, labels = accumulated(x, labels)
  require_labels(labels)
  return labels[0] + (x + 1) / 2 * (labels[-1] - labels[0])


def require_labels(labels: ArrayLike, count: int | None = None) -> None:
  """Raises ValueError unless labels are `[count]` (at least two) and, if concrete, increase strictly."""
  shape = jnp.shape(labels)
  if len(shape) != 1 or shape[0] < 2 or count not in (None, shape[0]):
    expected = '[num_labels], at least two' if count is None else f'[{count}] like the predictions'
    raise ValueError(f'labels must be {expected}, got shape {shape}.')
  if is_concrete(labels):
    steps = np.diff(np.asarray(labels, np.float64))
    if not np.all(steps > 0):
      place = int(np.argmin(steps > 0))
      raise ValueError(f'labels must increase strictly; they do not behind position {place}.')


def _values(y: ArrayLike, labels: ArrayLike, outside: str) -> tuple[Array, Array]:
  """Returns values and labels in at least float32, looked at and perhaps clipped."""
  if outside not in ('raise', 'clip'):
    raise ValueError(f"outside is {outside!r}, expected 'raise' or 'clip'.")
  require_labels(labels)
  require_finite(y=y)
  if jnp.ndim(y) != 1:
    raise ValueError(f'y must be [batch], got shape {jnp.shape(y)}.')
  if outside == 'raise' and is_concrete(y) and is_concrete(labels):
    held, ends = np.asarray(y), np.asarray(labels)[[0, -1]]
    wrong = np.flatnonzero((held < ends[0]) | (held > ends[1]))
    if wrong.size:
      raise ValueError(
        f'{wrong.size} values of y lie outside of the labels {ends[0]:g} to {ends[1]:g}, the first at '
        f"position {wrong[0]}: {held[wrong[0]]:g}; outside='clip' takes them for the nearest label."
      )
  y, labels = accumulated(y, labels)
  return (jnp.clip(y, labels[0], labels[-1]) if outside == 'clip' else y), labels


def _deviations(sigma: ArrayLike, y: Array) -> Array:
  require_no_nan(sigma=sigma)
  require_not_negative(sigma=sigma)
  if jnp.shape(sigma) not in ((), y.shape):
    raise ValueError(f'sigma must be {y.shape} like y, or a number; got shape {jnp.shape(sigma)}.')
  (sigma,) = accumulated(sigma)
  return jnp.broadcast_to(jnp.maximum(sigma, MIN_SIGMA), y.shape)
