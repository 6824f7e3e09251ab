"""How close predicted values, such as ages, are to the true ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

MIN_SIGMA = 1e-10  # of the official code of DLDL-v2


def epsilon_error(predictions: ArrayLike, y: ArrayLike, sigma: ArrayLike) -> float:
  """Returns `mean(1 - exp(-(prediction - y)^2 / (2 sigma^2)))`, the measure of the ChaLearn challenges.

  It is 0 for predictions that are right and 1 for those far beyond the deviation of the annotators.

  Args:
    predictions: `[records]`.
    y: true values `[records]`.
    sigma: deviations `[records]`, or one for all; 0 becomes 1e-10.

  Raises:
    ValueError: for shapes that differ, values that are not finite, and negative deviations.

  >>> round(epsilon_error([20.0, 30.0], [20.0, 33.0], 3.0), 3)
  0.197
  """
  predictions, y = _checked(predictions, y)
  sigma = np.asarray(sigma, np.float64)
  if sigma.shape not in ((), y.shape) or not np.all(sigma >= 0):
    raise ValueError(
      f'sigma must be {y.shape} or a number, of at least 0; got shape {sigma.shape}.'
    )
  distance = (predictions - y) / np.maximum(sigma, MIN_SIGMA)
  return float(np.mean(-np.expm1(-np.minimum(np.square(distance), 1e3) / 2)))


def cumulative_score(predictions: ArrayLike, y: ArrayLike, limit: float) -> float:
  """Returns the percentage of predictions that err by at most `limit`.

  >>> cumulative_score([20.0, 30.0], [20.0, 33.5], 3)
  50.0
  """
  predictions, y = _checked(predictions, y)
  return 100 * float(np.mean(np.abs(predictions - y) <= limit))


def value_metrics(
  predictions: ArrayLike, y: ArrayLike, sigma: ArrayLike | None = None
) -> dict[str, float]:
  """Returns what is reported of predicted ages and of predicted attractiveness.

  `mae` and `rmse`, in the values' unit; `pearson`, their correlation (0 where one side is constant); `cs3`,
  `cs5` and `cs8` of `cumulative_score`; and with deviations `epsilon_error`.

  Args:
    predictions: `[records]`.
    y: true values `[records]`.
    sigma: see `epsilon_error`; None: there are none.

  Raises:
    ValueError: as `epsilon_error`.
  """
  predictions, y = _checked(predictions, y)
  error = predictions - y
  spread = np.std(predictions) * np.std(y)
  covariance = np.mean((predictions - predictions.mean()) * (y - y.mean()))
  found = {
    'mae': float(np.mean(np.abs(error))),
    'rmse': float(np.sqrt(np.mean(np.square(error)))),
    'pearson': float(covariance / spread) if spread > 0 else 0.0,
    **{f'cs{limit}': cumulative_score(predictions, y, limit) for limit in (3, 5, 8)},
  }
  return found | ({} if sigma is None else {'epsilon_error': epsilon_error(predictions, y, sigma)})


def _checked(predictions: ArrayLike, y: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  predictions, y = np.asarray(predictions, np.float64), np.asarray(y, np.float64)
  if predictions.ndim != 1 or predictions.shape != y.shape or not len(y):
    raise ValueError(
      f'expected predictions and y [records], got {predictions.shape} and {y.shape}.'
    )
  for name, values in (('predictions', predictions), ('y', y)):
    if (bad := np.flatnonzero(~np.isfinite(values))).size:
      raise ValueError(f'{name} holds NaN or infinity, first at position {bad[0]}.')
  return predictions, y
