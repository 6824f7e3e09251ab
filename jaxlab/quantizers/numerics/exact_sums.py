"""Sums of products of 8-bit codes in int32: in integers where there are units for it, in float32 on a CPU.

XLA's CPU backend multiplies arrays of integers tens of times slower than arrays of floats. Sums of
integers in float32 are exact up to 2^24, in whatever order they are taken: 1024 products of two int8. On
a CPU a longer sum is cut into parts along its channels, each exact in float32, added in int32. The sums of
one operand alone, which the zero point of the other one multiplies, come from the same product: the kernel
gets one more output, with ones. What is compiled for a TPU or GPU is one product of integers and plain sums.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlab.models.convolution import conv_general_dilated

Array = jax.Array

EXACT_TERMS = 2**24 // 128**2
HIGHEST = lax.Precision.HIGHEST


class ExactSums(NamedTuple):
  """Sums over the contracted axes, all int32.

  Attributes:
    products: of `x * kernel`, `[..., out]`.
    kernel: of the kernel, `[out]`.
    x: of the input, for each group of channels: `[..., groups]`; None if not asked for.
  """

  products: Array
  kernel: Array
  x: Array | None


def dot_sums(x: Array, kernel: Array, *, of_x: bool) -> ExactSums:
  """Returns the sums of a matrix product.

  Args:
    x: int8 `[..., in]`.
    kernel: int8 `[in, out]`.
    of_x: whether those of `x` are needed, `[..., 1]`.
  """
  forms = (functools.partial(form, of_x=of_x) for form in (_float_dot, _integer_dot))
  return lax.platform_dependent(x, kernel, **dict(zip(('cpu', 'default'), forms)))


def _integer_dot(x: Array, kernel: Array, of_x: bool) -> ExactSums:
  numbers = (((x.ndim - 1,), (0,)), ((), ()))
  return ExactSums(
    lax.dot_general(x, kernel, numbers, preferred_element_type=jnp.int32),
    jnp.sum(kernel, 0, dtype=jnp.int32),
    jnp.sum(x, -1, keepdims=True, dtype=jnp.int32) if of_x else None,
  )


def _float_dot(x: Array, kernel: Array, of_x: bool) -> ExactSums:
  flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
  total, columns, rows = 0, 0, 0
  for part in _parts(kernel.shape[0], EXACT_TERMS):
    own, matrix = flat[:, part], _floats_after(flat, kernel[part])
    total += jnp.dot(own, matrix, precision=HIGHEST).astype(jnp.int32)
    columns += jnp.sum(matrix, 0).astype(jnp.int32)
    if of_x:
      rows += _channel_sums(own)
  products = total.reshape(*x.shape[:-1], -1)
  return ExactSums(products, columns, rows.reshape(*x.shape[:-1], 1) if of_x else None)


def _floats_after(x: Array, kernel: Array) -> Array:
  """Returns the kernel in float32, made once `x` (floats, finite) is there.

  XLA would otherwise start with the kernels of all layers and keep all of them as floats: ten times the
  memory, and none of it in a cache. Its CPU backend drops `optimization_barrier` before it sets the order.
  """
  if not x.size:
    return kernel.astype(jnp.float32)
  return kernel.astype(jnp.float32) + 0 * x[(0,) * x.ndim]


def _channel_sums(x: Array) -> Array:
  """Returns the sums over the last axis, kept, in int32, as a product with ones: faster than a reduction."""
  ones = jnp.ones((x.shape[-1], 1), x.dtype)
  sums = jnp.dot(x.reshape(-1, x.shape[-1]), ones, precision=HIGHEST)
  return sums.reshape(*x.shape[:-1], 1).astype(jnp.int32)


def conv_sums(
  x: Array,
  kernel: Array,
  *,
  strides: Sequence[int],
  dilation: Sequence[int],
  groups: int,
  of_x: bool,
) -> ExactSums:
  """Returns the sums of a convolution without padding, of any number of spatial axes.

  Args:
    x: int8 `[batch, *positions, in]`.
    kernel: int8 `[*window, in / groups, out]`.
    strides: of the window.
    dilation: of the kernel.
    groups: feature groups.
    of_x: whether those of `x` are needed.
  """
  letters = 'XYZ'[: kernel.ndim - 2]
  conv = functools.partial(
    conv_general_dilated,
    window_strides=strides,
    padding='VALID',
    rhs_dilation=dilation,
    dimension_numbers=(f'N{letters}C', f'{letters}IO', f'N{letters}C'),
    feature_group_count=groups,
  )
  options = {'strides': strides, 'dilation': dilation, 'groups': groups, 'of_x': of_x}
  integers, floats = (
    functools.partial(form, conv, **options) for form in (_integer_conv, _float_conv)
  )
  if math.prod(kernel.shape[:-2]) > EXACT_TERMS:
    return integers(x, kernel)
  return lax.platform_dependent(x, kernel, cpu=floats, default=integers)


def _integer_conv(
  conv: Callable[..., Array],
  x: Array,
  kernel: Array,
  strides: Sequence[int],
  dilation: Sequence[int],
  groups: int,
  of_x: bool,
) -> ExactSums:
  windows = None
  if of_x:
    sums = jnp.sum(x.reshape(*x.shape[:-1], groups, -1), -1, dtype=jnp.int32)
    windows = _window_sums(sums, kernel.shape[:-2], strides, dilation)
  return ExactSums(
    conv(x, kernel, preferred_element_type=jnp.int32),
    jnp.sum(kernel, tuple(range(kernel.ndim - 1)), dtype=jnp.int32),
    windows,
  )


def _window_sums(
  x: Array, size: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> Array:
  window, steps, spread = ((1, *each, 1) for each in (size, strides, dilation))
  zero = jnp.zeros((), x.dtype)
  return lax.reduce_window(x, zero, lax.add, window, steps, 'VALID', window_dilation=spread)


def _float_conv(
  conv: Callable[..., Array],
  x: Array,
  kernel: Array,
  strides: Sequence[int],
  dilation: Sequence[int],
  groups: int,
  of_x: bool,
) -> ExactSums:
  grouped = x.reshape(*x.shape[:-1], groups, -1).astype(jnp.float32)
  total, columns, windows = 0, 0, 0
  window = kernel.shape[:-2]
  for part in _parts(kernel.shape[-2], EXACT_TERMS // math.prod(window)):
    images = grouped[..., part]
    own = _floats_after(grouped, kernel[..., part, :])
    flat = images.reshape(*x.shape[:-1], -1)
    total += conv(flat, own, precision=HIGHEST).astype(jnp.int32)
    columns += jnp.sum(own, tuple(range(own.ndim - 1))).astype(jnp.int32)
    if of_x and groups == 1:
      windows += _window_sums(_channel_sums(flat), window, strides, dilation)
    elif of_x:
      ones = jnp.ones((*window, 1, groups), jnp.float32)
      sums = conv(_channel_sums(images)[..., 0].astype(jnp.float32), ones, precision=HIGHEST)
      windows += sums.astype(jnp.int32)
  return ExactSums(total, columns, windows if of_x else None)


def _parts(size: int, most: int) -> list[slice]:
  """Returns slices of about equal length that cover `size` elements, each of at most `most`."""
  count = max(-(-size // most), 1)
  bounds = [size * i // count for i in range(count + 1)]
  return [slice(*pair) for pair in itertools.pairwise(bounds)]
