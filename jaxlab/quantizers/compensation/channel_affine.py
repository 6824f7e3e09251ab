"""Channel-wise affine compensation behind a quantized module: QwT-v2 (Tang et al. 2025, arXiv 2505.20932).

`y_c <- gamma_c y_c + beta_c`, the least-squares fit of the quantized output to the float one in each
channel by itself. Two numbers a channel, which an integer engine folds into its requantization.
"""

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.quantizers.compensation.linear import by_numpy, is_traced, stats_dtype

Array = jax.Array
MAX_GAMMA = 16.0  # bound of `solve_channel_affine(clip=True)`


class ChannelAffine(NamedTuple):
  """Scale `gamma` and shift `beta` of each channel, `[channels]`."""

  gamma: Array
  beta: Array


class ChannelAffineStats(NamedTuple):
  """Centered moments of each channel over all rows, merged as in `LinearStats`; `[channels]` but count."""

  count: Array
  mean_quant: Array
  mean_full: Array
  scatter_quant: Array
  scatter_full: Array
  coscatter: Array


def init_channel_affine_stats(channels: int) -> ChannelAffineStats:
  """Returns the statistics of no rows."""
  zeros = [np.zeros(channels, stats_dtype()) for _ in range(5)]
  return ChannelAffineStats(np.zeros((), stats_dtype()), *zeros)


@functools.partial(jax.jit, static_argnames='axis')
def update_channel_affine_stats(
  stats: ChannelAffineStats,
  y_quant: Array,
  y_full: Array,
  axis: int = -1,
  weights: Array | None = None,
) -> ChannelAffineStats:
  """Returns `stats` with a batch added.

  Args:
    stats: from `init_channel_affine_stats`.
    y_quant: outputs of the quantized module; `axis` holds the channels, all others are rows.
    y_full: outputs of the float module, same shape.
    axis: of the channels.
    weights: of the examples along axis 0, `[batch]`, or of rows, over the first axes.

  Raises:
    ValueError: if the shapes differ, or the axis is out of range or of another size.
  """
  axis = _check(y_quant, y_full.shape, axis)
  if y_quant.shape[axis] != stats.mean_quant.shape[-1]:
    raise ValueError(
      f'Statistics of {stats.mean_quant.shape[-1]} channels got {y_quant.shape} with axis={axis}.'
    )
  dtype = stats.mean_quant.dtype
  w = jnp.ones(y_quant.shape[0], dtype) if weights is None else weights.astype(dtype)
  w = jnp.broadcast_to(w.reshape(*w.shape, *(1,) * (y_quant.ndim - w.ndim)), y_quant.shape)
  w, q, f = (
    jnp.moveaxis(a.astype(dtype), axis, -1).reshape(-1, a.shape[axis]) for a in (w, y_quant, y_full)
  )
  count = jnp.sum(w[:, 0])
  safe = jnp.where(count > 0, count, 1)
  mean_q, mean_f = jnp.sum(w * q, 0) / safe, jnp.sum(w * f, 0) / safe
  q, f = q - mean_q, f - mean_f
  sums = [jnp.sum(w * product, 0) for product in (q * q, f * f, q * f)]
  return merge_channel_affine_stats(stats, ChannelAffineStats(count, mean_q, mean_f, *sums))


def _check(y: Array, other: tuple, axis: int) -> int:
  if y.shape != tuple(other):
    raise ValueError(f'y_quant {y.shape} and y_full {tuple(other)} differ in shape.')
  if not -y.ndim <= axis < y.ndim:
    raise ValueError(f'axis={axis} is not an axis of {y.shape}.')
  return axis % y.ndim


@jax.jit
def merge_channel_affine_stats(a: ChannelAffineStats, b: ChannelAffineStats) -> ChannelAffineStats:
  """Returns the statistics of the rows of both."""
  count = a.count + b.count
  share = b.count / jnp.where(count > 0, count, 1)
  dq, df, k = b.mean_quant - a.mean_quant, b.mean_full - a.mean_full, a.count * share
  return ChannelAffineStats(
    count,
    a.mean_quant + share * dq,
    a.mean_full + share * df,
    a.scatter_quant + b.scatter_quant + k * dq**2,
    a.scatter_full + b.scatter_full + k * df**2,
    a.coscatter + b.coscatter + k * dq * df,
  )


def stats_of_sum(stats: ChannelAffineStats) -> ChannelAffineStats:
  """Returns the statistics of `(q, q + f)` from those of `(q, f)`."""
  return stats._replace(
    mean_full=stats.mean_quant + stats.mean_full,
    scatter_full=stats.scatter_quant + 2 * stats.coscatter + stats.scatter_full,
    coscatter=stats.scatter_quant + stats.coscatter,
  )


def solve_channel_affine(
  stats: ChannelAffineStats, eps: float = 1e-12, clip: bool = False
) -> ChannelAffine:
  """Returns `gamma = cov(q, f) / var(q)`, `beta = mean(f) - gamma mean(q)`.

  A channel with `var(q) <= eps (1 + mean(q)^2)` is constant: gamma = 1, beta = mean(f) - mean(q).

  Args:
    stats: of at least two rows.
    eps: relative variance of a constant channel.
    clip: keep |gamma| in [1/16, 16], its sign kept, and warn if that changes one.

  Raises:
    ValueError: for concrete statistics that are not finite, or of fewer than two rows.
  """
  if not is_traced(stats):
    if not all(np.all(np.isfinite(a)) for a in stats):
      raise ValueError('Calibration rows are not finite: module outputs hold NaN or infinity.')
    if np.asarray(stats.count) < 2:
      raise ValueError(f'An affine fit needs at least two rows; the statistics hold {stats.count}.')
  affine, changed = _solve(*by_numpy(stats), eps, clip)
  affine = ChannelAffine(*map(jnp.asarray, affine))
  if not is_traced(changed) and changed:
    warnings.warn(
      f'gamma of {int(changed)} channels clipped to 1/16..16.', RuntimeWarning, stacklevel=2
    )
  return affine


def _solve(
  xp: Any, stats: ChannelAffineStats, eps: float | Array, clip: bool
) -> tuple[ChannelAffine, Array]:
  """Returns the fit, and how many channels were clipped."""
  n = xp.maximum(stats.count, 1)
  constant = stats.scatter_quant / n <= eps * (1 + stats.mean_quant**2)
  gamma = stats.coscatter / xp.where(constant, 1, stats.scatter_quant)
  free = gamma = xp.where(constant, 1, gamma)
  if clip:
    sign = xp.where(gamma < 0, -1, 1).astype(gamma.dtype)
    gamma = sign * xp.clip(xp.abs(gamma), 1 / MAX_GAMMA, MAX_GAMMA)
  beta = stats.mean_full - gamma * stats.mean_quant
  return ChannelAffine(gamma, beta), xp.sum(gamma != free)


def channel_affine_errors(stats: ChannelAffineStats, affine: ChannelAffine) -> Array:
  """Returns the mean of `(y_full - gamma y_quant - beta)^2` of each channel, from the statistics alone."""
  xp, stats, (gamma, beta) = by_numpy(stats, affine)
  n = xp.maximum(stats.count, 1)
  varied = stats.scatter_full - 2 * gamma * stats.coscatter + gamma**2 * stats.scatter_quant
  offset = stats.mean_full - gamma * stats.mean_quant - beta
  return jnp.asarray(xp.maximum(varied, 0) / n + offset**2)


@jax.jit
def gate_channel_affine(affine: ChannelAffine, fit: ChannelAffine, held_out: ChannelAffineStats):
  """Returns `affine`, but the identity in channels where `fit` makes the held-out rows worse.

  Args:
    affine: fitted on all rows.
    fit: fitted on the rows that are not held out.
    held_out: statistics of the others.
  """
  identity = ChannelAffine(jnp.ones_like(fit.gamma), jnp.zeros_like(fit.beta))
  worse = channel_affine_errors(held_out, fit) > channel_affine_errors(held_out, identity)
  return jax.tree.map(lambda kept, new: jnp.where(worse, kept, new), identity, affine)


def fit_channel_affine(
  y_quant: Array, y_full: Array, axis: int = -1, eps: float = 1e-12
) -> ChannelAffine:
  """Returns the affine map of each channel that brings `y_quant` closest to `y_full`.

  >>> y = jnp.array([[1.0, 5.0], [3.0, 5.0]])
  >>> affine = fit_channel_affine(y, 2 * y + 1)
  >>> affine.gamma.tolist(), affine.beta.tolist()
  ([2.0, 1.0], [1.0, 6.0])

  Raises:
    ValueError: if the shapes differ, the axis is out of range, there are fewer than two rows, or values are
      not finite.
  """
  axis = _check(y_quant, y_full.shape, axis)
  stats = init_channel_affine_stats(y_quant.shape[axis])
  return solve_channel_affine(update_channel_affine_stats(stats, y_quant, y_full, axis), eps)


@functools.partial(jax.jit, static_argnames='axis')
def apply_channel_affine(y: Array, affine: ChannelAffine, axis: int = -1) -> Array:
  """Returns `gamma * y + beta` along `axis`, computed in at least float32, in the dtype of y."""
  if not -y.ndim <= axis < y.ndim:
    raise ValueError(f'axis={axis} is not an axis of {y.shape}.')
  y = jnp.asarray(y)
  shape = [1] * y.ndim
  shape[axis] = -1
  gamma, beta = (a.reshape(shape) for a in affine)
  return (gamma * y.astype(jnp.promote_types(y.dtype, jnp.float32)) + beta).astype(y.dtype)
