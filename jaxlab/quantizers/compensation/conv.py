"""Closed-form compensation of a convolutional block: QwT's grouped convolution (arXiv 2411.13918).

The compensation of a ResNet block is a grouped convolution on the block's input, with the block's stride. Its
rows are patches (channel-major, then kernel row, kernel column) at all output positions.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlab.models.convolution import conv_general_dilated
from jaxlab.quantizers.compensation.linear import (
  HIGHEST,
  LinearCompensation,
  LinearStats,
  init_linear_stats,
  is_traced,
  merge_linear_stats,
  solve_linear,
  stats_dtype,
  update_linear_stats,
)

Array = jax.Array


class ConvStats(NamedTuple):
  """Statistics of patches and errors, and the errors' scatter about their mean over the images alone.

  Attributes:
    linear: moments of the rows.
    count: number of images (sum of their weights), `[]`.
    mean: of the error at each position and channel, `[height, width, out]`.
    scatter: squared deviations from it, summed, `[]`.
  """

  linear: LinearStats
  count: Array
  mean: Array
  scatter: Array


def num_groups(in_features: int, out_features: int, channels_per_group: int | None = None) -> int:
  """Returns the number of groups of a convolutional compensation.

  By default the largest common divisor of both numbers of channels that is at most
  `max(in_features // 64, 1)`, which is QwT's number wherever that divides them. With `channels_per_group`
  it is `max(in_features // channels_per_group, 1)`.

  Raises:
    ValueError: if the number that `channels_per_group` asks for does not divide both.
  """
  if channels_per_group is None:
    most = max(in_features // 64, 1)
    common = math.gcd(in_features, out_features)
    return max(groups for groups in range(1, most + 1) if common % groups == 0)
  groups = max(in_features // channels_per_group, 1)
  if in_features % groups or out_features % groups:
    raise ValueError(
      f'{groups} groups (channels_per_group={channels_per_group}) do not divide {in_features} input and '
      f'{out_features} output channels; choose another channels_per_group, or None for one that does.'
    )
  return groups


def stride_of(x_shape: tuple, y_shape: tuple) -> int:
  """Returns the stride of a block, 1 or 2, from the shapes `[batch, height, width, channels]` around it.

  Raises:
    ValueError: if the output is neither as large as the input nor exactly half of it.
  """
  if len(x_shape) == len(y_shape) == 4:
    for stride in (1, 2):
      if tuple(x_shape[1:3]) == tuple(size * stride for size in y_shape[1:3]):
        return stride
  raise ValueError(
    f'A convolutional compensation needs a block of stride 1 or 2 over [batch, height, width, channels]; '
    f'got input {tuple(x_shape)} and output {tuple(y_shape)} (odd sizes: crop or pad the images).'
  )


def check_kernel_size(kernel_size: int) -> None:
  """Raises ValueError if the kernel size is not odd."""
  if kernel_size < 1 or kernel_size % 2 == 0:
    raise ValueError(f'kernel_size={kernel_size}: expected an odd size.')


def patches(x: Array, kernel_size: int, stride: int) -> Array:
  """Returns `[batch, rows, columns, channels * kernel_size^2]`, channel-major, padded by kernel_size // 2.

  Raises:
    ValueError: if the kernel size is not odd (the output would not lie on the block's).
  """
  check_kernel_size(kernel_size)
  if kernel_size == 1:
    return x[:, ::stride, ::stride]
  pads = [(kernel_size // 2,) * 2] * 2
  return lax.conv_general_dilated_patches(
    x,
    (kernel_size,) * 2,
    (stride,) * 2,
    pads,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    precision=HIGHEST,
  )


def convolve(x: Array, weight: Array, out_shape: tuple, accumulate: jnp.dtype) -> Array:
  """Returns the grouped convolution of x with `weight` `[k, k, in / groups, out]`, padded by k // 2."""
  stride, kernel_size = stride_of(x.shape, out_shape), weight.shape[0]
  return conv_general_dilated(
    x,
    weight,
    (stride,) * 2,
    [(kernel_size // 2,) * 2] * 2,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    feature_group_count=x.shape[-1] // weight.shape[2],
    precision=HIGHEST,
    preferred_element_type=accumulate,
  )


def init_conv_stats(
  in_features: int, err_shape: tuple, kernel_size: int = 1, groups: int = 1
) -> ConvStats:
  """Returns the statistics of no images; `err_shape` is `[batch, height, width, out]` of an error."""
  linear = init_linear_stats(in_features * kernel_size**2, err_shape[-1], groups)
  zeros = lambda *shape: np.zeros(shape, stats_dtype())  # noqa: E731
  return ConvStats(linear, zeros(), zeros(*err_shape[1:]), zeros())


@functools.partial(jax.jit, static_argnames='kernel_size')
def update_conv_stats(
  stats: ConvStats,
  x: Array,
  err: Array,
  kernel_size: int = 1,
  weights: Array | None = None,
) -> ConvStats:
  """Returns `stats` with a batch added.

  Args:
    stats: from `init_conv_stats`.
    x: block inputs `[batch, height, width, in]`.
    err: errors of the output, `[batch, rows, columns, out]`.
    kernel_size: odd.
    weights: of the images, `[batch]`.
  """
  rows = patches(x, kernel_size, stride_of(x.shape, err.shape))
  dtype = stats.mean.dtype
  w = jnp.ones(err.shape[0], dtype) if weights is None else weights.astype(dtype)
  w, e = w[:, None, None, None], err.astype(dtype)
  count = jnp.sum(w)
  mean = jnp.sum(w * e, 0) / jnp.where(count > 0, count, 1)
  batch = ConvStats(
    update_linear_stats(_empty_like(stats.linear), rows, err, weights),
    count,
    mean,
    jnp.sum(w * (e - mean) ** 2),
  )
  return merge_conv_stats(stats, batch)


def _empty_like(stats: LinearStats) -> LinearStats:
  return jax.tree.map(jnp.zeros_like, stats)


@jax.jit
def merge_conv_stats(a: ConvStats, b: ConvStats) -> ConvStats:
  """Returns the statistics of the images of both."""
  count = a.count + b.count
  share = b.count / jnp.where(count > 0, count, 1)
  delta = b.mean - a.mean
  return ConvStats(
    merge_linear_stats(a.linear, b.linear),
    count,
    a.mean + share * delta,
    a.scatter + b.scatter + a.count * share * jnp.sum(delta**2),
  )


def solve_conv(stats: ConvStats, kernel_size: int = 1, ridge: float = 1e-3) -> LinearCompensation:
  """Returns the compensation as a convolution kernel HWIO; see `solve_linear`.

  The denominator of R^2 is the scatter about the mean over images at each position and channel, as in
  QwT's code for ResNets.
  """
  solved = solve_linear(stats.linear, ridge, total=stats.scatter)
  return solved._replace(weight=kernel_of(solved.weight, kernel_size))


def kernel_of(weight: Array, kernel_size: int) -> Array:
  """Returns `[groups, channels * k * k, outputs]` as a kernel `[k, k, channels, groups * outputs]`."""
  groups, features, outputs = weight.shape
  k = kernel_size
  if not is_traced(weight):
    weight = np.asarray(weight)  # nothing to compile for each shape
  kernel = weight.reshape(groups, features // k**2, k, k, outputs)
  kernel = kernel.transpose(2, 3, 1, 0, 4)
  return jnp.asarray(kernel.reshape(k, k, features // k**2, groups * outputs))


def fit_conv_compensation(
  x: Array,
  err: Array,
  kernel_size: int = 1,
  groups: int = 1,
  stride: int | None = None,
  ridge: float = 1e-3,
) -> LinearCompensation:
  """Returns the grouped convolution that predicts `err` from `x`, by ridge regression (QwT's ResNet form).

  Args:
    x: block inputs `[batch, height, width, in]`.
    err: float minus quantized block output, `[batch, rows, columns, out]`.
    kernel_size: odd; padding is kernel_size // 2.
    groups: divisor of both numbers of channels.
    stride: 1 or 2; None: from the sizes.
    ridge: absolute penalty, on the bias too.

  Returns:
    kernel `[k, k, in / groups, out]`, bias `[out]`, r2 `[]`.

  Raises:
    ValueError: for shapes, groups or a stride that do not fit, or values that are not finite.
  """
  implied = stride_of(x.shape, err.shape)
  if stride is not None and stride != implied:
    raise ValueError(f'stride={stride}, but x {x.shape} and err {err.shape} say {implied}.')
  stats = init_conv_stats(x.shape[-1], err.shape, kernel_size, groups)
  return solve_conv(update_conv_stats(stats, x, err, kernel_size), kernel_size, ridge)
