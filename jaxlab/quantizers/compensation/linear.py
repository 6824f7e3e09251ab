"""Closed-form linear compensation of a quantized block: QwT (Fu et al. 2025, arXiv 2411.13918).

Behind each block of a quantized network a small float layer predicts the block's error from its input,
`y = block(x) + x W + b`. The layer is the least-squares solution over calibration rows. It is found from
centered sufficient statistics that are updated batch by batch: no activation matrix is ever whole.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlab.tracing import is_concrete

Array = jax.Array
HIGHEST = lax.Precision.HIGHEST


class LinearStats(NamedTuple):
  """Weighted, centered first and second moments of rows (x, err), in `groups` independent regressions.

  Batches are merged about their own means (Chan, Golub & LeVeque 1983), so that float32 loses nothing to a
  large mean. Everything is float64 where x64 is enabled, else float32: then weights agree with those of
  float64 to some 1e-7 times the condition number of the *correlation* matrix of x.

  Attributes:
    count: sum of the row weights, `[]`.
    mean_x: `[groups, features]`.
    mean_err: `[groups, outputs]`.
    scatter_x: `sum (x - mean)^T (x - mean)`, `[groups, features, features]`.
    scatter_x_err: `sum (x - mean)^T (err - mean)`, `[groups, features, outputs]`.
    scatter_err: `sum (err - mean)^2`, `[groups, outputs]`.
  """

  count: Array
  mean_x: Array
  mean_err: Array
  scatter_x: Array
  scatter_x_err: Array
  scatter_err: Array


class LinearCompensation(NamedTuple):
  """The layer that predicts an error: `weight` `[in, out]` (convolution: HWIO), `bias` `[out]`, `r2` `[]`."""

  weight: Array
  bias: Array
  r2: Array


def stats_dtype() -> jnp.dtype:
  """Returns the dtype of sufficient statistics: float64 where x64 is enabled, else float32."""
  return jax.dtypes.canonicalize_dtype(np.float64)


def init_linear_stats(in_features: int, out_features: int, groups: int = 1) -> LinearStats:
  """Returns the statistics of no rows.

  Raises:
    ValueError: if `groups` does not divide both numbers of features.
  """
  if groups < 1 or in_features % groups or out_features % groups:
    raise ValueError(
      f'groups={groups} must divide in_features={in_features} and out_features={out_features}.'
    )
  p, o, dtype = in_features // groups, out_features // groups, stats_dtype()
  shapes = ((), (groups, p), (groups, o), (groups, p, p), (groups, p, o), (groups, o))
  return LinearStats(*(np.zeros(shape, dtype) for shape in shapes))


@jax.jit
def update_linear_stats(
  stats: LinearStats, x: Array, err: Array, weights: Array | None = None
) -> LinearStats:
  """Returns `stats` with the rows of one batch added.

  Args:
    stats: from `init_linear_stats`.
    x: `[..., in_features]`; the features of a group are adjacent.
    err: `[..., out_features]`, as many rows.
    weights: of the examples, `[batch]`, e.g. 0 for a held-out one, or of the rows, over the first axes of x;
      None: all 1.

  Raises:
    ValueError: if the numbers of rows or features differ from each other or from the statistics.
  """
  groups, p = stats.mean_x.shape[-2:]
  o = stats.mean_err.shape[-1]
  if x.shape[:-1] != err.shape[:-1]:
    raise ValueError(
      f'Rows of x {x.shape[:-1]} and err {err.shape[:-1]} differ: a linear compensation needs one input '
      f'token per output token (a strided block needs the convolutional form).'
    )
  if x.shape[-1] != groups * p or err.shape[-1] != groups * o:
    raise ValueError(
      f'Statistics of {groups * p} inputs and {groups * o} outputs got x {x.shape} and err {err.shape}.'
    )
  dtype = stats.mean_x.dtype
  ones = jnp.ones(x.shape[:-1], dtype)
  if weights is not None:
    ones = ones * weights.astype(dtype).reshape(*weights.shape, *(1,) * (ones.ndim - weights.ndim))
  w = ones.reshape(-1, 1, 1)
  x = x.astype(dtype).reshape(-1, groups, p)
  err = err.astype(dtype).reshape(-1, groups, o)
  count = jnp.sum(w)
  safe = jnp.where(count > 0, count, 1)
  mean_x, mean_err = jnp.sum(w * x, 0) / safe, jnp.sum(w * err, 0) / safe
  x, err = x - mean_x, err - mean_err
  product = lambda a, b: jnp.einsum('ngi,ngo->gio', a, b, precision=HIGHEST)  # noqa: E731
  batch = LinearStats(
    count, mean_x, mean_err, product(w * x, x), product(w * x, err), jnp.sum(w * err**2, 0)
  )
  return merge_linear_stats(stats, batch)


@jax.jit
def merge_linear_stats(a: LinearStats, b: LinearStats) -> LinearStats:
  """Returns the statistics of the rows of both."""
  count = a.count + b.count
  share = b.count / jnp.where(count > 0, count, 1)
  dx, de = b.mean_x - a.mean_x, b.mean_err - a.mean_err
  k = a.count * share
  return LinearStats(
    count,
    a.mean_x + share * dx,
    a.mean_err + share * de,
    a.scatter_x + b.scatter_x + k * dx[..., :, None] * dx[..., None, :],
    a.scatter_x_err + b.scatter_x_err + k * dx[..., :, None] * de[..., None, :],
    a.scatter_err + b.scatter_err + k * de**2,
  )


def solve_linear(
  stats: LinearStats,
  ridge: float | Array = 0.0,
  *,
  penalize_bias: bool = True,
  total: Array | None = None,
) -> LinearCompensation:
  """Returns the minimizer of `|err - x W - b|^2 + ridge (|W|^2 + |b|^2)` and its R^2, per group.

  Features are scaled to unit scatter, and directions whose eigenvalue is below `4 sqrt(features) eps` of the
  largest are left out (a pseudo-inverse), so collinear features and too few rows do no harm. Concrete
  statistics are solved in float64 by NumPy, traced ones in their own dtype.

  `R^2 = 1 - sum (err - prediction)^2 / sum (err - mean)^2`, one number for all outputs; 0 where the
  denominator is 0; NaN if the solution is not finite.

  Args:
    stats: of at least one row.
    ridge: absolute.
    penalize_bias: whether the bias is in the penalty (QwT's ResNet code: yes).
    total: denominator of R^2, in place of the scatter about the mean over all rows.

  Returns:
    weight `[groups, features, outputs]`, bias `[groups * outputs]`, r2 `[]`.

  Raises:
    ValueError: for concrete statistics that are not finite, or of no rows.

  Warns:
    RuntimeWarning: if there are fewer rows than features + 1.
  """
  dtype, eps = stats.scatter_x.dtype, jnp.finfo(stats.scatter_x.dtype).eps
  if is_traced((stats, ridge, total)):
    return _solve(stats, ridge, penalize_bias, total, eps, jnp)
  stats = jax.tree.map(lambda a: np.asarray(a, np.float64), stats)
  ridge = np.asarray(ridge, np.float64)
  if not all(np.all(np.isfinite(a)) for a in stats):
    raise ValueError(
      'Calibration rows are not finite: inputs or errors hold NaN or infinity (look at the data, and at '
      'overflow in the network).'
    )
  if stats.count <= 0:
    raise ValueError('The statistics hold no rows: give at least one calibration batch.')
  features = stats.mean_x.shape[-1]
  if stats.count < features + 1:
    warnings.warn(
      f'{stats.count:.0f} calibration rows for {features} features and a bias: the solution of least '
      f'norm is used. Give more images, or ridge > 0.',
      RuntimeWarning,
      stacklevel=2,
    )
  total = None if total is None else np.asarray(total, np.float64)
  solved = _solve(stats, ridge, penalize_bias, total, eps, np)
  return LinearCompensation(*(jnp.asarray(a, dtype) for a in solved))


def _solve(stats, ridge, penalize_bias, total, eps, xp) -> LinearCompensation:
  n, mx, me = stats.count, stats.mean_x, stats.mean_err
  p = mx.shape[-1]
  # The bias is eliminated: with a penalty on it, it leaves a rank-one term at the means.
  k = n * ridge / (n + ridge) if penalize_bias else 0.0
  normal = stats.scatter_x + k * mx[..., :, None] * mx[..., None, :] + ridge * xp.eye(p)
  right = stats.scatter_x_err + k * mx[..., :, None] * me[..., None, :]
  diagonal = xp.diagonal(normal, axis1=-2, axis2=-1)
  # A constant feature has nothing but rounding errors as scatter; scaled up they would look like data.
  spread = xp.diagonal(stats.scatter_x, axis1=-2, axis2=-1)
  constant = (spread <= n * (16 * eps * mx) ** 2) & (xp.asarray(ridge) == 0)
  used = (diagonal > 0) & ~constant
  unit = xp.where(used, 1 / xp.sqrt(xp.where(used, diagonal, 1)), 0)
  scaled = normal * unit[..., :, None] * unit[..., None, :]
  values, vectors = xp.linalg.eigh(scaled)
  kept = values > 4 * p**0.5 * eps * xp.maximum(values[..., -1:], 0)
  inverse = xp.where(kept, 1 / xp.where(kept, values, 1), 0)
  rotated = xp.swapaxes(vectors, -1, -2) @ (unit[..., None] * right)
  weight = unit[..., None] * (vectors @ (inverse[..., None] * rotated))
  offset = me - xp.einsum('gi,gio->go', mx, weight)
  bias = offset * (n / (n + ridge)) if penalize_bias else offset
  squares = _sum_of_squares(stats, weight, bias, xp)
  denominator = xp.sum(stats.scatter_err) if total is None else total
  nonzero = denominator > 0
  r2 = xp.where(nonzero, 1 - xp.sum(squares) / xp.where(nonzero, denominator, 1), 0.0)
  return LinearCompensation(weight, bias.reshape(-1), r2)


def _sum_of_squares(stats: LinearStats, weight: Any, bias: Any, xp: Any) -> Any:
  """Returns `sum (err - x W - b)^2` of each output, `[groups, outputs]`, from the statistics alone."""
  fit = xp.einsum('gio,gio->go', weight, stats.scatter_x @ weight - 2 * stats.scatter_x_err)
  offset = stats.mean_err - xp.einsum('gi,gio->go', stats.mean_x, weight) - bias
  return stats.scatter_err + fit + stats.count * offset**2


def is_traced(tree: Any) -> bool:
  """Returns whether an array of `tree` is traced or spread over processes: not one for NumPy."""
  return not all(map(is_concrete, jax.tree.leaves(tree)))


def by_numpy(*trees: Any) -> tuple[Any, ...]:
  """Returns the module that computes with `trees`, and them: NumPy, which compiles nothing, if it can."""
  if is_traced(trees):
    return jnp, *trees
  return np, *jax.tree.map(np.asarray, trees)


def fit_linear_compensation(
  x: Array, err: Array, ridge: float = 0.0, *, bias: bool = True, penalize_bias: bool = True
) -> LinearCompensation:
  """Returns the least-squares layer `err ~ x W + b` (QwT, eq. of the closed form).

  The result is not gated: see `gate`.

  >>> x = jnp.arange(6.0).reshape(3, 2) ** 2
  >>> fit = fit_linear_compensation(x, x @ jnp.array([[1.0], [2.0]]) + 3)
  >>> [round(float(v), 3) for v in (*fit.weight[:, 0], fit.bias[0], fit.r2)]
  [1.0, 2.0, 3.0, 1.0]

  Args:
    x: block inputs `[..., in]`; all leading axes are rows.
    err: float minus quantized block output, `[..., out]`.
    ridge: absolute penalty on weight and bias.
    bias: whether there is one; otherwise the bias is 0, and R^2 counts from 0 instead of from the mean.
    penalize_bias: whether the bias is in the penalty.

  Raises:
    ValueError: if the rows differ in number, or values are not finite.
  """
  stats = init_linear_stats(x.shape[-1], err.shape[-1])
  stats = update_linear_stats(stats, x, err)
  if not bias:
    stats, penalize_bias = _about_zero(stats), False
  solved = solve_linear(stats, ridge, penalize_bias=penalize_bias)
  return solved._replace(weight=solved.weight[0])


def _about_zero(stats: LinearStats) -> LinearStats:
  """Returns the moments about 0 in place of those about the means."""
  mx, me = stats.mean_x, stats.mean_err
  return LinearStats(
    stats.count,
    jnp.zeros_like(mx),
    jnp.zeros_like(me),
    stats.scatter_x + stats.count * mx[..., :, None] * mx[..., None, :],
    stats.scatter_x_err + stats.count * mx[..., :, None] * me[..., None, :],
    stats.scatter_err + stats.count * me**2,
  )


def gate(compensation: LinearCompensation) -> LinearCompensation:
  """Returns `compensation` where its R^2 is positive, else one of zeros; NaN counts as failure."""
  weight, bias, r2 = compensation
  if is_traced(compensation):
    good = r2 > 0
    return LinearCompensation(jnp.where(good, weight, 0), jnp.where(good, bias, 0), r2)
  if not np.asarray(r2) > 0:  # by NumPy: nothing to compile for each shape
    weight, bias = (jnp.asarray(np.zeros(a.shape, a.dtype)) for a in (weight, bias))
  return LinearCompensation(weight, bias, r2)
