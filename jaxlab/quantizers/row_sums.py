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

  There a reduction to few values writes the whole array of what it adds to memory and does not use vector
  instructions, while adding one row of some thousand values after the other does.

  The first axis, over which a batch may be split among devices, is never cut across rows in a way that moves
  values between devices: each row holds a part of every device's examples.
  """
  kept_axes = [axis for axis in range(x.ndim) if axis not in axes]
  kept = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
  features = math.prod(x.shape[axis] for axis in kept_axes)
  batch = math.gcd(x.shape[0], SHARDS) if 0 in axes else 1
  x = jnp.transpose(x, [axis for axis in range(x.ndim) if axis in axes] + kept_axes)
  x = x.reshape(batch, -1, features)
  rest = x.shape[1]
  count = -(-rest // max(LANES // (batch * features), 1))
  lanes = -(-rest // count)
  x = jnp.pad(x, ((0, 0), (0, count * lanes - rest), (0, 0)), constant_values=fill)
  return Rows(jnp.swapaxes(x.reshape(batch, count, lanes, features), 0, 1), (0, 1), kept)
