"""Quantiles of large arrays without sorting them."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.quantizers.row_sums import Rows, rows_of, whole

Array = jax.Array


def select_quantiles(x: Array, shares: Sequence[float], axes: Sequence[int] | None = None) -> Array:
  """Returns quantiles that interpolate linearly between neighbors, as `jnp.quantile(..., keepdims=True)`.

  With `x_(0) <= ... <= x_(n-1)` and `p (n - 1) = k + w`, `0 <= w < 1`: `(1 - w) x_(k) + w x_(k+1)`. The
  order statistics are exact. They are found by their bits, most significant first: as many counts of the
  values below a bound as a float has bits, all quantiles at once. So it needs no sorted copy of `x`, an array
  split over devices stays where it is (devices exchange counts), and it compiles in seconds for a TPU, where
  a sort of millions takes half a minute. Positions are exact for sizes at which `p (n - 1)` in float32 is not.

  Args:
    x: float32 or float64, below 2^31 values a quantile. No gradient passes.
    shares: the `p`, plain numbers in [0, 1].
    axes: reduced axes, kept with size 1; None: all.

  Returns:
    `[len(shares), *x.shape with axes of size 1]`; NaN where `x` has a NaN.

  Raises:
    ValueError: for another dtype, an empty array, no share or one outside of [0, 1].

  >>> select_quantiles(jnp.asarray([4.0, 1.0, 3.0, 2.0]), [0.5, 1.0]).ravel().tolist()
  [2.5, 4.0]
  """
  x = jax.lax.stop_gradient(jnp.asarray(x))
  shares = np.asarray(shares, np.float64).reshape(-1)
  if x.dtype not in (jnp.float32, jnp.float64):
    raise ValueError(f'select_quantiles needs float32 or float64, got {x.dtype}.')
  if not len(shares) or not np.all((shares >= 0) & (shares <= 1)):
    raise ValueError(f'shares={shares.tolist()} must lie in [0, 1], at least one.')
  axes = tuple(range(x.ndim)) if axes is None else tuple(axis % x.ndim for axis in axes)
  count = math.prod(x.shape[axis] for axis in axes)
  if not count:
    raise ValueError(
      f'select_quantiles over axes {axes} of an array {x.shape}: there are no values.'
    )
  positions = shares * (count - 1)
  ranks = np.floor(positions)
  return _select(x, ranks.astype(np.int32), (positions - ranks).astype(x.dtype), axes=axes)


@functools.partial(jax.jit, static_argnames='axes')
def _select(x: Array, ranks: Array, weights: Array, *, axes: tuple[int, ...]) -> Array:
  # Found before the loop, which has to wait for it: of two collectives that do not depend on each other,
  # one in a loop, XLA on CPUs may start either first, on each device another, and they would wait for ever.
  missing = jnp.any(jnp.isnan(x), axes, keepdims=True)
  x = jnp.where(missing, jnp.nan, x)
  unsigned = jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint64
  sign = unsigned(1 << (8 * x.dtype.itemsize - 1))
  raw = jax.lax.bitcast_convert_type(x, unsigned)
  # Unsigned integers in the order of the floats: negative ones grow with their magnitude.
  keys = jnp.where(raw >= sign, ~raw, raw | sign)

  def value(key: Array) -> Array:
    return jax.lax.bitcast_convert_type(jnp.where(key >= sign, key & ~sign, ~key), x.dtype)

  def find(rows: Rows) -> Array:
    low, high = map(value, _neighbors(rows, ranks))
    share = weights.reshape(-1, *(1,) * (low.ndim - 1))
    between = (share > 0) & (low < high)
    found = jnp.where(between, low * (1 - share) + high * share, low)
    return found.reshape(-1, *rows.kept)

  # What fills up a row lies above all values, so that no rank reaches it.
  found = jax.lax.platform_dependent(
    keys,
    cpu=lambda keys: find(rows_of(keys, axes, ~unsigned(0))),
    default=lambda keys: find(whole(keys, axes)),
  )
  return jnp.where(missing, jnp.nan, found)


def _neighbors(keys: Rows, ranks: Array) -> tuple[Array, Array]:
  """Returns the keys of ranks `ranks` and of those above them, `[ranks, *sum_shape]`."""
  unsigned = keys.data.dtype.type
  bits = 8 * unsigned(0).itemsize
  ranks = ranks.reshape(-1, *(1,) * len(keys.sum_shape))

  def set_bit(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
    key, at_most = carry
    trial = key | (unsigned(1 << (bits - 1)) >> i.astype(unsigned))
    below = keys.total(lambda row: (row < trial).astype(jnp.int32))
    fits = below <= ranks
    # The last trial that does not fit is the key that is found, plus one.
    return jnp.where(fits, trial, key), jnp.where(fits, at_most, below)

  shape = (len(ranks), *keys.sum_shape)
  start = jnp.zeros(shape, unsigned), jnp.full(shape, jnp.iinfo(jnp.int32).max)
  key, at_most = jax.lax.fori_loop(0, bits, set_bit, start)
  last = ~unsigned(0)
  above = keys.least(lambda row: jnp.where(row > key, row, last), last)
  return key, jnp.where(at_most > ranks + 1, key, above)
