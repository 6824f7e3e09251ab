"""Quantiles of large arrays without sorting them."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.quantizers.numerics.row_sums import Rows, has_one_cpu, rows_of, whole

Array = jax.Array
TAIL = 0.01  # share of the values that a partial sort is faster for than counting
FEW = 64


def select_quantiles(x: Array, shares: Sequence[float], axes: Sequence[int] | None = None) -> Array:
  """Returns quantiles that interpolate linearly between neighbors, as `jnp.quantile(..., keepdims=True)`.

  With `x_(0) <= ... <= x_(n-1)` and `p (n - 1) = k + w`, `0 <= w < 1`: `(1 - w) x_(k) + w x_(k+1)`. The
  order statistics are exact. They are found by their bits, most significant first: as many counts of the
  values below a bound as a float has bits, all quantiles at once (on a single CPU, those near the ends by
  a partial sort). So it needs no sorted copy of `x`, an array
  split over devices stays where it is (devices exchange counts), and it compiles in seconds for a TPU, where
  a sort of millions takes half a minute. Positions are exact for sizes at which `p (n - 1)` in float32 is
  not.

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
  # Found before the search, which has to wait for it: of two collectives that do not depend on each other,
  # one in a loop, XLA on CPUs may start either first, on each device another, and they would wait for ever.
  missing = jnp.any(jnp.isnan(x), axes, keepdims=True)
  found = quantiles_of_finite(jnp.where(missing, jnp.nan, x), tuple(shares.tolist()), axes)
  return jnp.where(missing, jnp.nan, found)


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantiles_of_finite(x: Array, shares: tuple[float, ...], axes: tuple[int, ...]) -> Array:
  """Returns `select_quantiles` of arguments that are known to be right: no NaN, or nothing else."""
  count = math.prod(x.shape[axis] for axis in axes)
  positions = np.asarray(shares) * (count - 1)
  ranks = np.floor(positions).astype(np.int32)
  # Where few values lie beyond all ranks, a CPU sorts these; it would need the whole array on each device.
  few = np.max(np.where(ranks < count // 2, ranks + 2, count - ranks)) <= max(FEW, count * TAIL)
  few = few and has_one_cpu()
  kept = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))

  def by_ends(x: Array) -> Array:
    others = [axis for axis in range(x.ndim) if axis not in axes]
    x = jnp.transpose(x, [*others, *axes]).reshape(-1, count)
    return quantiles_by_ends(x, x, np.asarray([count]), shares).reshape(-1, *kept)

  def by_counts(x: Array, cut: Callable[..., Rows]) -> Array:
    weights = jnp.asarray(positions - ranks, x.dtype).reshape(-1, *(1,) * x.ndim)
    return _interpolate(*_counted(x, ranks, axes, cut), weights)

  return jax.lax.platform_dependent(
    x,
    cpu=by_ends if few else functools.partial(by_counts, cut=rows_of),
    default=functools.partial(by_counts, cut=whole),
  )


def _interpolate(low: Array, high: Array, weights: Array) -> Array:
  between = (weights > 0) & (low < high)
  return jnp.where(between, low * (1 - weights) + high * weights, low)


def quantiles_by_ends(
  top: Array, bottom: Array, counts: np.ndarray, shares: Sequence[float]
) -> Array:
  """Returns quantiles of rows of different lengths by sorting their ends, for shares near 0 and 1.

  Args:
    top: `[rows, columns]`, filled up with -inf.
    bottom: the same rows, filled up with inf.
    counts: of the values in each row, `[rows]` or `[1]`, plain numbers.
    shares: as in `select_quantiles`; the further from the ends, the more is sorted.

  Returns:
    `[shares, rows]`.
  """
  positions = np.asarray(shares)[:, None] * (counts - 1)
  ranks = np.floor(positions).astype(np.int32)
  above = np.minimum(ranks + 1, counts - 1)
  from_below = np.broadcast_to(np.asarray(shares)[:, None] < 0.5, ranks.shape)
  size_below = int(np.max(above, where=from_below, initial=-1)) + 1
  size_above = int(np.max(counts - ranks, where=~from_below, initial=0))
  ends = []
  if size_below:
    ends.append(-jax.lax.top_k(-bottom, size_below)[0])
  if size_above:
    ends.append(jax.lax.top_k(top, size_above)[0])
  ends = jnp.concatenate(ends, -1)
  low, high = (
    jnp.take_along_axis(ends, np.where(from_below, k, size_below + counts - 1 - k).T, -1).T
    for k in (ranks, above)
  )
  return _interpolate(low, high, jnp.asarray(positions - ranks, low.dtype))


def _counted(
  x: Array, ranks: np.ndarray, axes: tuple[int, ...], cut: Callable[..., Rows]
) -> tuple[Array, Array]:
  """Returns the values of ranks `ranks` and of those above them, by counting."""
  unsigned = jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint64
  sign = unsigned(1 << (8 * x.dtype.itemsize - 1))
  raw = jax.lax.bitcast_convert_type(x, unsigned)
  # Unsigned integers in the order of the floats: negative ones grow with their magnitude.
  keys = cut(jnp.where(raw >= sign, ~raw, raw | sign), axes, ~unsigned(0))

  def value(key: Array) -> Array:
    key = key.reshape(-1, *keys.kept)
    return jax.lax.bitcast_convert_type(jnp.where(key >= sign, key & ~sign, ~key), x.dtype)

  low, high = _neighbors(keys, jnp.asarray(ranks))
  return value(low), value(high)


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
