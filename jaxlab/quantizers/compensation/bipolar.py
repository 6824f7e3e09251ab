"""Nonlinear bipolar compensation (NBC, Sun & Wu 2026, arXiv 2605.16423): linear between logarithms.

The block's input and its error go through a sign-preserving logarithm, a linear layer is fitted
between the two in closed form, and its prediction is mapped back:

  y = block(x) + kappa * T_se^-1(clip(T_sx(x) W + b)),   T_s(x) = sign(x) log(1 + |x| / s).

The paper's abstract fixes this structure; the form of T, its scales, the clip and the debiasing factor
kappa are choices made here, such that infinite scales give QwT.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.quantizers.compensation.conv import kernel_of, patches, stride_of
from jaxlab.quantizers.compensation.linear import (
  LinearStats,
  by_numpy,
  init_linear_stats,
  is_traced,
  solve_linear,
  stats_dtype,
  update_linear_stats,
)
from jaxlab.quantizers.compensation.linear_apply import compensation_product

Array = jax.Array
MAX_KAPPA = 4.0


def blt(x: Array, scale: float | Array = 1.0) -> Array:
  """Returns the bipolar logarithm `sign(x) log(1 + |x| / scale)`; the identity where scale is infinite.

  >>> blt(jnp.array([-1.0, 0.0, 1.0])).round(3).tolist()
  [-0.6930000185966492, 0.0, 0.6930000185966492]

  Args:
    x: any shape, computed and returned in at least float32.
    scale: > 0, broadcasts against x.

  Raises:
    ValueError: for a concrete scale that is not positive.
  """
  x, scale, linear, finite = _operands(x, scale)
  sign = jnp.where(x < 0, -1, 1).astype(x.dtype)  # unlike jnp.sign, with the slope 1 / scale at 0
  magnitude = sign * x
  ratio = magnitude / finite
  # Far out log1p(r) = log(r), which as a difference cannot overflow.
  far = magnitude > 1e8 * finite
  log_far = jnp.log(jnp.where(far, magnitude, 1)) - jnp.log(finite)
  z = jnp.where(far, log_far, jnp.log1p(jnp.where(far, 1, ratio)))
  return jnp.where(linear, x, sign * z)


def inverse_blt(z: Array, scale: float | Array = 1.0) -> Array:
  """Returns `sign(z) scale (exp(|z|) - 1)`, the inverse of `blt`; results stop at the largest finite float.

  Args:
    z: any shape, computed and returned in at least float32.
    scale: > 0, broadcasts against z; infinite: the identity.

  Raises:
    ValueError: for a concrete scale that is not positive.
  """
  z, scale, linear, finite = _operands(z, scale)
  sign = jnp.where(z < 0, -1, 1).astype(z.dtype)
  magnitude = sign * z
  far = magnitude > 20
  near_value = finite * jnp.expm1(jnp.where(far, 1, magnitude))
  largest = jnp.finfo(z.dtype).max
  exponent = jnp.where(far & ~linear, magnitude, 0) + jnp.log(finite)
  far_value = jnp.exp(jnp.minimum(exponent, float(np.log(largest))))
  value = jnp.minimum(jnp.where(far, far_value, near_value), largest)
  return jnp.where(linear, z, sign * value)


def check_scale(scale: float | Array) -> None:
  """Raises ValueError for a concrete scale that is not positive; infinity is allowed."""
  if not is_traced(scale) and not np.all(np.asarray(scale) > 0):
    raise ValueError(f'scale={scale} must be positive (infinite: no transform).')


def _operands(x: Array, scale: float | Array) -> tuple[Array, Array, Array, Array]:
  """Returns x and scale in one dtype, where scale is infinite, and a scale that is finite everywhere."""
  check_scale(scale)
  x = jnp.asarray(x)
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  scale = jnp.asarray(scale, x.dtype)
  linear = jnp.isinf(scale)
  return x, scale, linear, jnp.where(linear, 1, scale)


class BipolarCompensation(NamedTuple):
  """The arrays of NBC.

  Attributes:
    weight: `[in, out]`, or HWIO for a convolution.
    bias: `[out]`.
    scale_x: scale of the input's transform, `[]`; infinite: the identity.
    scale_err: that of the error.
    z_max: bound of the prediction before the inverse transform, `[out]`; infinite for an infinite scale.
    kappa: debiasing factor `[out]`.
    r2: R^2 in the original space, `[]`.
  """

  weight: Array
  bias: Array
  scale_x: Array
  scale_err: Array
  z_max: Array
  kappa: Array
  r2: Array


class BipolarStats(NamedTuple):
  """Moments of the transformed rows, and the largest transformed error of each channel, `[out]`."""

  linear: LinearStats
  z_max: Array


class PredictionStats(NamedTuple):
  """How a prediction p fits the error e in the original space, per channel `[out]` (but count).

  Attributes:
    count: rows.
    mean: of e.
    scatter: `sum (e - mean)^2`.
    square: `sum e^2`.
    product: `sum p e`.
    prediction: `sum p^2`.
  """

  count: Array
  mean: Array
  scatter: Array
  square: Array
  product: Array
  prediction: Array


def init_bipolar_stats(
  in_features: int, out_features: int, groups: int = 1, kernel_size: int = 1
) -> BipolarStats:
  """Returns the statistics of no rows."""
  linear = init_linear_stats(in_features * kernel_size**2, out_features, groups)
  return BipolarStats(linear, np.zeros(out_features, stats_dtype()))


def update_bipolar_stats(
  stats: BipolarStats,
  x: Array,
  err: Array,
  scale_x: Array,
  scale_err: Array,
  *,
  kernel_size: int | None = None,
  weights: Array | None = None,
) -> BipolarStats:
  """Returns `stats` with a batch added.

  Args:
    stats: from `init_bipolar_stats`.
    x: block inputs `[..., in]`.
    err: errors of the output, `[..., out]`.
    scale_x: scalar.
    scale_err: scalar.
    kernel_size: for the convolutional form over `[batch, height, width, channels]`; None: linear.
    weights: of the examples, `[batch]`, or of rows, over the first axes; those with weight 0 do not count for
      z_max either.
  """
  check_scale(scale_x)
  check_scale(scale_err)
  return _update_bipolar_stats(stats, x, err, scale_x, scale_err, weights, kernel_size)


@functools.partial(jax.jit, static_argnums=6)
def _update_bipolar_stats(stats, x, err, scale_x, scale_err, weights, kernel_size):
  dtype = stats.z_max.dtype
  u = blt(x.astype(dtype), scale_x)
  v = blt(err.astype(dtype), scale_err)
  if kernel_size is not None:
    u = patches(u, kernel_size, stride_of(x.shape, err.shape))
  magnitude = jnp.abs(v)
  if weights is not None:
    counts = (weights > 0).reshape(*weights.shape, *(1,) * (v.ndim - weights.ndim))
    magnitude = jnp.where(counts, magnitude, 0)
  largest = jnp.max(magnitude, axis=tuple(range(v.ndim - 1)))
  return BipolarStats(
    update_linear_stats(stats.linear, u, v, weights), jnp.maximum(stats.z_max, largest)
  )


def solve_bipolar(
  stats: BipolarStats,
  scale_x: float | Array,
  scale_err: float | Array,
  ridge: float = 1e-6,
  kernel_size: int | None = None,
) -> BipolarCompensation:
  """Returns the fit of the transformed error, with kappa 1 and R^2 0 (`debias` sets both).

  Args:
    stats: of the transformed rows.
    scale_x: as in the statistics.
    scale_err: as in the statistics.
    ridge: penalty on the weight alone, relative to the mean square of a transformed input.
    kernel_size: of the convolutional form.
  """
  linear = stats.linear
  dtype = stats.z_max.dtype
  xp, linear = by_numpy(linear)
  squares = xp.diagonal(linear.scatter_x, axis1=-2, axis2=-1) + linear.count * linear.mean_x**2
  solved = solve_linear(linear, ridge * xp.mean(squares), penalize_bias=False)
  weight = (
    by_numpy(solved.weight)[1][0] if kernel_size is None else kernel_of(solved.weight, kernel_size)
  )
  scale_x, scale_err = jnp.asarray(scale_x, dtype), jnp.asarray(scale_err, dtype)
  xp, bound, infinite = by_numpy(stats.z_max, scale_err)
  z_max = jnp.asarray(xp.where(xp.isinf(infinite), xp.inf, bound), dtype)
  kappa = jnp.asarray(xp.ones(solved.bias.shape, solved.bias.dtype))
  return BipolarCompensation(
    jnp.asarray(weight), solved.bias, scale_x, scale_err, z_max, kappa, jnp.zeros((), dtype)
  )


def predict_bipolar(
  x: Array, params: BipolarCompensation, out_shape: tuple, dtype: Any = jnp.float32
) -> Array:
  """Returns the predicted error, `out_shape`, in at least float32; `dtype` is of the product's operands."""
  u = blt(x, params.scale_x)
  z = compensation_product(u, params.weight, out_shape, dtype) + params.bias
  return params.kappa * inverse_blt(jnp.clip(z, -params.z_max, params.z_max), params.scale_err)


@functools.partial(jax.jit, static_argnames='dtype')
def apply_nbc(y: Array, x: Array, params: BipolarCompensation, dtype: Any = jnp.float16) -> Array:
  """Returns `y` plus the predicted error.

  Args:
    y: output of the quantized block.
    x: its input.
    params: from `fit_nbc`.
    dtype: of the matrix product's operands; the transforms are in at least float32.
  """
  x, y = jnp.asarray(x), jnp.asarray(y)
  wide = jnp.promote_types(y.dtype, jnp.float32)
  error = predict_bipolar(x, params, y.shape, dtype)
  return (y.astype(wide) + error.astype(wide)).astype(y.dtype)


def init_prediction_stats(out_features: int) -> PredictionStats:
  """Returns the statistics of no rows."""
  zeros = [np.zeros(out_features, stats_dtype()) for _ in range(5)]
  return PredictionStats(np.zeros((), stats_dtype()), *zeros)


@jax.jit
def update_prediction_stats(
  stats: PredictionStats,
  x: Array,
  err: Array,
  params: BipolarCompensation,
  weights: Array | None = None,
) -> PredictionStats:
  """Returns `stats` with the predictions of `params` on a batch added."""
  dtype = stats.mean.dtype
  p = predict_bipolar(x, params, err.shape).astype(dtype)
  e = err.astype(dtype)
  w = jnp.ones(e.shape[0], dtype) if weights is None else weights.astype(dtype)
  w = jnp.broadcast_to(w.reshape(*w.shape, *(1,) * (e.ndim - w.ndim)), (*e.shape[:-1], 1))
  axes = tuple(range(e.ndim - 1))
  count = jnp.sum(w)
  mean = jnp.sum(w * e, axes) / jnp.where(count > 0, count, 1)
  sums = [jnp.sum(w * value, axes) for value in ((e - mean) ** 2, e * e, p * e, p * p)]
  total = stats.count + count
  share = count / jnp.where(total > 0, total, 1)
  delta = mean - stats.mean
  sums[0] = sums[0] + stats.count * share * delta**2
  added = [old + new for old, new in zip(stats[2:], sums)]
  return PredictionStats(total, stats.mean + share * delta, *added)


def debias(
  params: BipolarCompensation, stats: PredictionStats, debiased: bool = True
) -> BipolarCompensation:
  """Returns `params` with kappa and R^2.

  `kappa = sum p e / sum p^2` of each channel, clipped to [0, 4] (0/0: 1): the inverse of a mean of logarithms
  under-estimates. No kappa for an infinite scale of the error.

  Args:
    params: with kappa 1.
    stats: of the predictions of `params`.
    debiased: whether to set kappa.
  """
  xp, own, scale_err = by_numpy(stats, params.scale_err)
  if debiased:
    ratio = own.product / xp.where(own.prediction > 0, own.prediction, 1)
    use = (own.prediction > 0) & ~xp.isinf(scale_err)
    kappa = xp.where(use, xp.clip(ratio, 0, MAX_KAPPA), 1)
    params = params._replace(kappa=jnp.asarray(kappa, params.kappa.dtype))
  return params._replace(r2=prediction_r2(stats, params.kappa))


def prediction_r2(stats: PredictionStats, kappa: Array) -> Array:
  """Returns `1 - sum (e - kappa p)^2 / sum (e - mean e)^2`; 0 where all errors are equal."""
  xp, stats, kappa = by_numpy(stats, kappa)
  squares = stats.square - 2 * kappa * stats.product + kappa**2 * stats.prediction
  total = xp.sum(stats.scatter)
  r2 = xp.where(total > 0, 1 - xp.sum(squares) / xp.where(total > 0, total, 1), 0.0)
  return jnp.asarray(r2, stats.square.dtype)


def gate_bipolar(params: BipolarCompensation) -> BipolarCompensation:
  """Returns `params` if their R^2 is positive, else a compensation of zeros; NaN counts as failure."""
  xp, own = by_numpy(params)
  zero = lambda a: jnp.asarray(xp.where(own.r2 > 0, a, xp.zeros_like(a)))  # noqa: E731
  return params._replace(weight=zero(own.weight), bias=zero(own.bias), kappa=zero(own.kappa))


def fit_nbc(
  x: Array,
  err: Array,
  scale_x: float | Array = 1.0,
  scale_err: float | Array = 1.0,
  ridge: float = 1e-6,
  debiased: bool = True,
) -> BipolarCompensation:
  """Returns the linear map between bipolar logarithms of x and err; not gated.

  Args:
    x: block inputs `[..., in]`.
    err: float minus quantized block output, `[..., out]`.
    scale_x: of the inputs' transform, > 0, scalar, may be infinite (the identity).
    scale_err: of the errors'.
    ridge: relative penalty on the weight.
    debiased: whether to fit kappa.

  Raises:
    ValueError: for scales <= 0, rows that differ in number, or values that are not finite.

  Warns:
    RuntimeWarning: if there are fewer rows than inputs + 1.
  """
  stats = init_bipolar_stats(x.shape[-1], err.shape[-1])
  params = solve_bipolar(
    update_bipolar_stats(stats, x, err, scale_x, scale_err), scale_x, scale_err, ridge
  )
  predicted = update_prediction_stats(init_prediction_stats(err.shape[-1]), x, err, params)
  return debias(params, predicted, debiased)
