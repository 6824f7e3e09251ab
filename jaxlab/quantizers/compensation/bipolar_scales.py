"""The search for the scales of NBC's bipolar logarithms, on held-out examples."""

import warnings
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.quantizers.compensation.bipolar import (
  debias,
  init_bipolar_stats,
  init_prediction_stats,
  prediction_r2,
  solve_bipolar,
  update_bipolar_stats,
  update_prediction_stats,
)

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

  Warns:
    RuntimeWarning: for fewer than four examples: then the fit scores itself.
  """
  if holdout is None:
    holdout = holdout_mask(0, len(x))
    if len(x) < 4:
      warn_no_holdout(len(x))
  held = np.asarray(holdout, bool)
  train = np.ones(len(x), bool) if not held.any() or held.all() else ~held
  score = held if held.any() else train
  pairs = scale_candidates(np.mean(np.abs(x)), np.mean(np.abs(err)), factors)

  @jax.jit
  def r2(scale_x, scale_err):
    stats = init_bipolar_stats(x.shape[-1], err.shape[-1])
    stats = update_bipolar_stats(
      stats, x, err, scale_x, scale_err, weights=jnp.asarray(train, jnp.float32)
    )
    params = solve_bipolar(stats, scale_x, scale_err, ridge)
    sums = [
      update_prediction_stats(
        init_prediction_stats(err.shape[-1]), x, err, params, jnp.asarray(mask, jnp.float32)
      )
      for mask in (train, score)
    ]
    return prediction_r2(sums[1], debias(params, sums[0], debiased).kappa)

  scores = [float(r2(*pair)) for pair in pairs]
  best = int(np.nanargmax([-np.inf if np.isnan(s) else s for s in scores]))
  return pairs[best]


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
) -> list[tuple[float, float]]:
  """Returns all pairs of scales; a mean magnitude of 0 leaves the identity alone."""
  sides = []
  for mean in (float(mean_x), float(mean_err)):
    scales = {float('inf') if mean == 0 or np.isinf(f) else f * mean for f in factors}
    sides.append(sorted(scales))
  return [(a, b) for a in sides[0] for b in sides[1]]
