"""Sums over large arrays that are looked at again and again, as fast as the platform can add."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
LANES = 8192  # values that are added at once: with a few sums of each they stay in a core's cache
SHARDS = 32


class Rows(NamedTuple):
  """An array made ready for sums over some of its axes.

  Attributes:
    data: `[rows, ...]`, the values; what fills up the last row is the `fill` of `rows_of`.
    axes: of a row, summed.
    kept: shape of a sum: that of the array with summed axes of size 1.
  """

  data: Array
  axes: tuple[int, ...]
  kept: tuple[int, ...]

  @property
  def sum_shape(self) -> tuple[int, ...]:
    """Shape of a row with summed axes of size 1: what a bound for each sum has to be broadcast against."""
    row = self.data.shape[1:]
    return tuple(1 if axis in self.axes else size for axis, size in enumerate(row))

  def total(self, visit: Callable[[Array], Array]) -> Array:
    """Returns the sum of `visit(row)` over the summed axes of all rows, `[candidates, *sum_shape]`.

    `visit` maps a row elementwise to `[candidates, *row]`, in the dtype of the sum.
    """
    return self._fold(visit, jnp.add, jnp.sum, 0)

  def least(self, visit: Callable[[Array], Array], largest: Array) -> Array:
    """Returns the minimum of `visit(row)` in place of its sum; no value is above `largest`."""
    return self._fold(visit, jnp.minimum, jnp.min, largest)

  def _fold(self, visit, combine, reduce, start) -> Array:
    axes = tuple(axis + 1 for axis in self.axes)
    if len(self.data) == 1:
      return reduce(visit(self.data[0]), axes, keepdims=True)
    shape = jax.eval_shape(visit, self.data[0])
    step = lambda folded, row: (combine(folded, visit(row)), None)  # noqa: E731
    start = jnp.full(shape.shape, start, shape.dtype)
    folded, _ = jax.lax.scan(step, start, self.data)
    return reduce(folded, axes, keepdims=True)


def whole(x: Array, axes: Sequence[int], fill: Array) -> Rows:
  """Returns `x` as a single row, which needs no `fill`: for compilers that add up an array in one go."""
  del fill
  kept = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
  return Rows(x[None], tuple(axes), kept)


def rows_of(x: Array, axes: Sequence[int], fill: Array) -> Rows:
  """Returns `x` cut into rows for XLA on a CPU.

  There a reduction of computed values to few writes all of them to memory and does not use vector
  instructions, while adding one row of some thousand values after the other does.

  With several devices, the first axis, over which a batch may be split, is not cut in a way that moves values
  between devices: each row holds a part of every device's examples.
  """
  others = [axis for axis in range(x.ndim) if axis not in axes]
  kept = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
  features = math.prod(x.shape[axis] for axis in others)
  batch = math.gcd(x.shape[0], SHARDS) if 0 in axes and not has_one_cpu() else 1
  x = jnp.transpose(x, [axis for axis in range(x.ndim) if axis in axes] + others)
  x = x.reshape(batch, -1, features)
  lanes, extra = _divide(x.shape[1], max(LANES // (batch * features), 1))
  if extra:
    x = jnp.pad(x, ((0, 0), (0, extra), (0, 0)), constant_values=fill)
  if batch == 1:
    return Rows(x.reshape(-1, lanes, features), (0,), kept)
  return Rows(jnp.swapaxes(x.reshape(batch, -1, lanes, features), 0, 1), (0, 1), kept)


def has_one_cpu() -> bool:
  """Returns whether there is one CPU device alone, so that no array of it is split over several."""
  return len(jax.devices('cpu')) == 1


def _divide(size: int, largest: int) -> tuple[int, int]:
  """Returns the length of rows, at most `largest`, and what `size` lacks to be a multiple of it."""
  for lanes in range(min(largest, size), largest // 4, -1):
    if size % lanes == 0:
      return lanes, 0
  lanes = -(-size // -(-size // largest))
  return lanes, -size % lanes
