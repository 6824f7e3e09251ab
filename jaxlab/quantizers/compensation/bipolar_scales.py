"""The search for the scales of NBC's bipolar logarithms, on held-out examples."""

import functools
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.quantizers.compensation.bipolar import (
  BipolarCompensation,
  BipolarStats,
  PredictionStats,
  debias,
  init_bipolar_stats,
  init_prediction_stats,
  prediction_r2,
  solve_bipolar,
  update_bipolar_stats,
  update_prediction_stats,
)
from jaxlab.quantizers.compensation.linear import LinearStats, stats_dtype

Array = jax.Array
SCALE_FACTORS = (0.25, 1.0, 4.0, 16.0, float('inf'))  # of the mean magnitude


def select_nbc_scales(
  x: Array,
  err: Array,
  factors: Sequence[float] = SCALE_FACTORS,
  holdout: Array | None = None,
  ridge: float = 1e-6,
  debiased: bool = True,
) -> tuple[float, float]:
  """Returns the pair `(scale_x, scale_err)` with the best R^2 on held-out examples.

  Candidates are `factors` times the mean magnitude of x, and of err; infinity, the linear map, is best kept
  among them. Not for `jit`.

  Args:
    x: block inputs `[batch, ..., in]`.
    err: errors `[batch, ..., out]`.
    factors: of the mean magnitudes.
    holdout: examples that score instead of being fitted, bool `[batch]`; None: every fourth.
    ridge: as in `fit_nbc`.
    debiased: as in `fit_nbc`.

  Raises:
    ValueError: for values that are not finite.

  Warns:
    RuntimeWarning: for fewer than four examples: then the fit scores itself; for fewer rows than inputs + 1.
  """
  if holdout is None:
    holdout = holdout_mask(0, len(x))
    if len(x) < 4:
      warn_no_holdout(len(x))
  held = np.asarray(holdout, bool)
  train = np.ones(len(x), bool) if not held.any() or held.all() else ~held
  weights = np.stack([train, held if held.any() else train]).astype(np.float32)

  def fold(update, weights):
    update = jax.jit(functools.partial(update, weights=weights))
    return lambda state, *arrays: jax.device_get(update(state, x, err, *arrays))

  _, pair = search(
    scale_candidates(np.mean(np.abs(x)), np.mean(np.abs(err)), factors),
    init_bipolar_stats(x.shape[-1], err.shape[-1]),
    fold(update_candidate_stats, weights[0]),
    fold(update_candidate_predictions, weights),
    functools.partial(solve_bipolar, ridge=ridge),
    debiased,
  )
  return pair


def search(
  scales: tuple[Sequence[float], Sequence[float]],
  empty: BipolarStats,
  fold_stats: Callable[..., BipolarStats],
  fold_predictions: Callable[..., PredictionStats],
  solve: Callable[..., BipolarCompensation],
  debiased: bool,
) -> tuple[float, tuple[float, float]]:
  """Returns the best R^2 on held-out examples and its pair of scales, in two passes over the rows.

  Args:
    scales: candidates for the input's scale, and for the error's.
    empty: statistics of no rows.
    fold_stats: `(state, scales_x, scales_err) -> state` by `update_candidate_stats` with the weights of the
      examples that are fitted.
    fold_predictions: `(state, params) -> state` by `update_candidate_predictions`.
    solve: `(stats, scale_x, scale_err) -> params`.
    debiased: as in `fit_nbc`.
  """
  sides = [np.asarray(side, stats_dtype()) for side in scales]
  pairs = [(i, j) for i in range(len(sides[0])) for j in range(len(sides[1]))]
  stats = fold_stats(_stack(empty, *map(len, sides)), *sides)
  solved = [solve(_pick(stats, i, j), scales[0][i], scales[1][j]) for i, j in pairs]
  blank = init_prediction_stats(empty.z_max.shape[-1])
  blank = jax.tree.map(lambda a: np.zeros((len(pairs), 2, *a.shape), a.dtype), blank)
  sums = fold_predictions(blank, jax.tree.map(lambda *leaves: jnp.stack(leaves), *solved))
  scores = []
  for index, params in enumerate(solved):
    train, held = (PredictionStats(*(a[index, side] for a in sums)) for side in (0, 1))
    score = float(prediction_r2(held, debias(params, train, debiased).kappa))
    scores.append(-np.inf if np.isnan(score) else score)
  best = int(np.argmax(scores))
  if scores[best] == -np.inf:
    return -np.inf, (np.inf, np.inf)
  return scores[best], (scales[0][pairs[best][0]], scales[1][pairs[best][1]])


# Which statistics depend on the scale of the error; all depend on that of the input.
_OF_ERR = BipolarStats(LinearStats(None, None, 0, None, 0, 0), 0)


def _stack(empty: BipolarStats, num_x: int, num_err: int) -> BipolarStats:
  grow = lambda axis, a: np.zeros((num_x, *([] if axis is None else [num_err]), *a.shape), a.dtype)  # noqa: E731
  return jax.tree.map(grow, _OF_ERR, empty, is_leaf=lambda leaf: leaf is None)


def _pick(stats: BipolarStats, i: int, j: int) -> BipolarStats:
  one = lambda axis, a: a[i] if axis is None else a[i, j]  # noqa: E731
  return jax.tree.map(one, _OF_ERR, stats, is_leaf=lambda leaf: leaf is None)


def update_candidate_stats(
  stats: BipolarStats,
  x: Array,
  err: Array,
  scales_x: Array,
  scales_err: Array,
  *,
  weights: Array,
  kernel_size: int | None = None,
) -> BipolarStats:
  """Returns the statistics of all pairs of scales with a batch added.

  The products of inputs with inputs are taken once for each of their scales.

  Args:
    stats: `[scales_x, ...]`, or `[scales_x, scales_err, ...]` what depends on both.
    x: as in `update_bipolar_stats`.
    err: the same.
    scales_x: `[scales_x]`.
    scales_err: `[scales_err]`.
    weights: of the examples, `[batch]`.
    kernel_size: of the convolutional form.
  """

  def of_input_scale(own: tuple[BipolarStats, Array]) -> BipolarStats:
    update = functools.partial(update_bipolar_stats, kernel_size=kernel_size, weights=weights)
    axes = (_OF_ERR, None, None, None, 0)
    every = jax.vmap(update, in_axes=axes, out_axes=_OF_ERR)
    return every(own[0], x, err, own[1], scales_err)

  return jax.lax.map(of_input_scale, (stats, scales_x))


def update_candidate_predictions(
  stats: PredictionStats, x: Array, err: Array, params: BipolarCompensation, *, weights: Array
) -> PredictionStats:
  """Returns the statistics `[pairs, 2, ...]` of all predictions with a batch added.

  Args:
    stats: of the predictions on the examples that are fitted, and on those held out.
    x: as in `update_prediction_stats`.
    err: the same.
    params: `[pairs, ...]`.
    weights: of the examples, for the first and the second of the statistics, `[2, batch]`.
  """
  both = jax.vmap(update_prediction_stats, in_axes=(0, None, None, None, 0))
  return jax.lax.map(lambda own: both(own[0], x, err, own[1], weights), (stats, params))


def holdout_mask(start: int, size: int) -> np.ndarray:
  """Returns which of examples `start .. start + size - 1` are held out: every fourth, bool `[size]`."""
  return np.arange(start, start + size) % 4 == 3


def warn_no_holdout(count: int) -> None:
  """Warns that there are too few examples to hold a quarter out."""
  warnings.warn(
    f'{count} calibration examples: too few to hold a quarter out, the fit scores itself.',
    RuntimeWarning,
    stacklevel=3,
  )


def scale_candidates(
  mean_x: float, mean_err: float, factors: Sequence[float]
) -> tuple[list[float], list[float]]:
  """Returns the scales of either side; a mean magnitude of 0 leaves the identity alone."""
  sides = []
  for mean in (float(mean_x), float(mean_err)):
    scales = {float('inf') if mean == 0 or np.isinf(f) else f * mean for f in factors}
    sides.append(sorted(scales))
  return sides[0], sides[1]
