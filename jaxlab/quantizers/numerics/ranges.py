"""Range estimates: how wide a quantizer opens for the data it has seen.

Two kinds. An *observer* keeps a running estimate over batches, a pair of pure functions in the manner of
optax: `init()` gives a state, `update(state, x)` the next one, `range(state)` its `(minimum, maximum)`. A
*search* looks at one tensor and tries candidates. Both end in `params_from_range`, or give scales directly.

>>> import jax.numpy as jnp
>>> observer = min_max_observer(AffineQuantizer(4, 'asymmetric'))
>>> state = observer.update(observer.init(), jnp.array([-1.0, 2.0]))
>>> state = observer.update(state, jnp.array([0.0, 3.0]))
>>> [float(bound.squeeze()) for bound in observer.range(state)]
[-1.0, 3.0]
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlab.quantizers.numerics.affine import (
  AffineParams,
  AffineQuantizer,
  affine_fake_quantize,
  cut_groups,
  min_max,
  params_from_range,
  reduction_axes,
)
from jaxlab.quantizers.numerics.bit_widths import Bits
from jaxlab.quantizers.numerics.quantiles import select_quantiles
from jaxlab.quantizers.numerics.rounding import widen
from jaxlab.quantizers.numerics.row_sums import Rows, rows_of, whole

Array = jax.Array
PyTree = Any
PERCENTILES = (0.999, 0.9999, 0.99999)  # of RepQ-ViT's search


class RangeState(NamedTuple):
  """State of an observer: its estimate, what it has to remember besides, and the number of batches."""

  minimum: Array
  maximum: Array
  seen_minimum: Array
  seen_maximum: Array
  batches: Array


class Observer(NamedTuple):
  """A running range estimate as pure functions.

  Attributes:
    init: `() -> state`, or `(x) -> state` for a batch or its shape: a state that keeps its shapes and dtypes
      through `update`, as `lax.scan` asks for. Without `x`, the first update gives it shapes.
    update: `(state, x) -> state`.
    range: `state -> (minimum, maximum)`, kept dimensions as in `min_max`; infinite before any batch.
  """

  init: Callable[..., RangeState]
  update: Callable[[RangeState, Array], RangeState]
  range: Callable[[RangeState], tuple[Array, Array]]


def _observer(
  estimate: Callable[[RangeState, Array, Array, Array], tuple[Array, Array]],
  quantizer: AffineQuantizer,
) -> Observer:
  """Returns the observer whose estimate after a batch is `estimate(state with what was seen, x)`."""

  def init(x: Array | jax.ShapeDtypeStruct | None = None) -> RangeState:
    infinity = jnp.float32(jnp.inf)
    state = RangeState(infinity, -infinity, infinity, -infinity, jnp.int32(0))
    if x is None:
      return state
    shapes = jax.eval_shape(update, state, x)
    return jax.tree.map(lambda a, shape: jnp.full(shape.shape, a, shape.dtype), state, shapes)

  def update(state: RangeState, x: Array) -> RangeState:
    x = widen(jax.lax.stop_gradient(x))
    low, high = min_max(quantizer, x)
    seen_low, seen_high = (
      jnp.minimum(state.seen_minimum, low),
      jnp.maximum(state.seen_maximum, high),
    )
    minimum, maximum = estimate(state, x, seen_low, seen_high)
    return RangeState(minimum, maximum, seen_low, seen_high, state.batches + 1)

  return Observer(init, update, lambda state: (state.minimum, state.maximum))


def _averaged(state: RangeState, low: Array, high: Array, momentum: float) -> tuple[Array, Array]:
  """Returns the exponential average of the bounds; the first batch sets it."""
  first = state.batches == 0
  # On the first batch the old bounds are infinite: keep them out of the arithmetic.
  old_low, old_high = jnp.where(first, low, state.minimum), jnp.where(first, high, state.maximum)
  return (
    old_low * momentum + low * (1 - momentum),
    old_high * momentum + high * (1 - momentum),
  )


def min_max_observer(quantizer: AffineQuantizer) -> Observer:
  """Returns the observer of the smallest and largest value seen so far."""
  return _observer(lambda state, x, low, high: (low, high), quantizer)


def averaged_running_min_max_observer(
  quantizer: AffineQuantizer, momentum: float = 0.99
) -> Observer:
  """Returns the exponential average `r <- m r + (1 - m) r_seen` of the *running* extremes (SSQL's code).

  `r_seen` is the extreme over all batches so far, not of the last one. The first batch sets `r`.
  """
  return _observer(lambda state, x, low, high: _averaged(state, low, high, momentum), quantizer)


def averaged_min_max_observer(quantizer: AffineQuantizer, momentum: float = 0.99) -> Observer:
  """Returns the exponential average of each batch's extremes (FQ-ViT's EMA).

  The first batch sets the estimate per channel of `axis` (the reference: the last); a per-tensor estimate is
  the extreme over channels of it, and stays a scalar from then on: later batches enter per channel, against
  the scalar, and are reduced again.
  """
  if quantizer.granularity not in ('tensor', 'channel'):
    raise ValueError(f"granularity={quantizer.granularity!r}: expected 'tensor' or 'channel'.")
  channels = dataclasses.replace(quantizer, granularity='channel')

  def estimate(state, x, low, high):
    low, high = _averaged(state, *min_max(channels, x), momentum)
    if quantizer.granularity == 'tensor':
      axes = tuple(range(x.ndim))
      return jnp.min(low, axes, keepdims=True), jnp.max(high, axes, keepdims=True)
    return low, high

  return _observer(estimate, quantizer)


def gaussian_observer(quantizer: AffineQuantizer, deviations: float = 2.0) -> Observer:
  """Returns `mean -+ deviations * std` of the last batch, with the unbiased standard deviation."""

  def estimate(state, x, low, high):
    x = cut_groups(quantizer, x)
    axes = reduction_axes(quantizer, x.ndim - (quantizer.granularity == 'group'))
    mean = jnp.mean(x, axes, keepdims=True)
    spread = deviations * jnp.std(x, axes, keepdims=True, ddof=1)
    return mean - spread, mean + spread

  return _observer(estimate, quantizer)


def quantile_observer(
  quantizer: AffineQuantizer, quantile: float = 0.99999, momentum: float = 0.99
) -> Observer:
  """Returns the exponential average of the `1 - quantile` and `quantile` quantiles, per tensor (FQ-ViT).

  Quantiles interpolate linearly; the first batch sets the estimate.

  Raises:
    ValueError: unless the granularity is `'tensor'` and `0.5 < quantile <= 1`.
  """
  if quantizer.granularity != 'tensor':
    raise ValueError(f"granularity={quantizer.granularity!r}: this estimate is for 'tensor' alone.")
  if not 0.5 < quantile <= 1:
    raise ValueError(f'quantile={quantile} must lie in (0.5, 1].')

  def estimate(state, x, low, high):
    bounds = select_quantiles(widen(x), [1 - quantile, quantile])
    low, high = bounds.reshape(2, *(1,) * x.ndim)
    return _averaged(state, low, high, momentum)

  return _observer(estimate, quantizer)


def top_k_percentile_range(
  quantizer: AffineQuantizer, x: Array, fraction: float
) -> tuple[Array, Array]:
  """Returns the extremes of `x` cut at the k-th largest magnitude `v`: `[max(min, -v), min(max, v)]`.

  `k = int(fraction * n + 0.5)` with `n` all elements, divided (rounded down) by the number of scales;
  `k = 0` cuts nothing. To use it over several batches hand in their concatenation. (SSQL's toolbox.)
  """
  x = widen(x)
  low, high = min_max(quantizer, x)
  size = x.size
  x = cut_groups(quantizer, x)
  axes = reduction_axes(quantizer, x.ndim - (quantizer.granularity == 'group'))
  moved = jnp.moveaxis(jnp.abs(x), axes, range(-len(axes), 0))
  flat = moved.reshape(*moved.shape[: x.ndim - len(axes)], -1)
  k = int(fraction * size + 0.5) // low.size
  if k == 0:
    return low, high
  bound = jax.lax.top_k(flat, k)[0][..., -1].reshape(low.shape)
  return jnp.maximum(low, -bound), jnp.minimum(high, bound)


def _squared_error(
  quantizer: AffineQuantizer, x: Array, params: AffineParams, power: float = 2.0
) -> Array:
  """Returns the mean over what shares a scale of `|x - x_hat|^power`, dimensions kept."""
  safe = jnp.where(params.scale == 0, 1, params.scale)
  x_hat = affine_fake_quantize(x, safe, params.zero_point, params.low, params.high)
  axes = reduction_axes(quantizer, x.ndim - (quantizer.granularity == 'group'))
  return jnp.mean(jnp.abs(x - x_hat) ** power, axes, keepdims=True)


def mse_range(
  quantizer: AffineQuantizer,
  x: Array,
  bits: Bits | None = None,
  *,
  candidates: int = 90,
  step: float = 0.01,
) -> tuple[Array, Array]:
  """Returns the shrunk range with the least squared error of the fake-quantized tensor (OMSE, FQ-ViT).

  Candidate `i` is `(1 - step * i) * (min, max)`, `i = 0 .. candidates - 1`; the first of equal ones wins.
  Each scale is searched on its own. `rule='asymmetric_clipped'` with `hold_zero=False` is the reference's.
  """
  x = widen(x)
  low, high = min_max(quantizer, x)
  x = cut_groups(quantizer, x)

  def visit(i, best):
    factor = 1 - step * i.astype(low.dtype)
    error = _squared_error(
      quantizer, x, params_from_range(quantizer, low * factor, high * factor, bits)
    )
    better = error < best[0]
    return jnp.where(better, error, best[0]), jnp.where(better, factor, best[1])

  start = (jnp.full_like(low, jnp.inf), jnp.ones_like(low))
  _, factor = jax.lax.fori_loop(0, candidates, visit, start)
  return low * factor, high * factor


def mse_ternary_range(
  quantizer: AffineQuantizer,
  x: Array,
  bits: Bits | None = None,
  *,
  steps: int = 15,
  power: float = 2.4,
) -> tuple[Array, Array]:
  """Returns the range `(1 - p / 100) * (min, max)` found by ternary search over `p` in `[0, 80]`.

  The error is the mean of `|x - x_hat|^power`, with codes rounded half up as in the reference (SSQL's
  toolbox); the result is the best of all `p` evaluated. Per tensor.

  Raises:
    ValueError: unless the granularity is `'tensor'`.
  """
  if quantizer.granularity != 'tensor':
    raise ValueError(f"granularity={quantizer.granularity!r}: this search is for 'tensor' alone.")
  x = widen(x)
  low, high = min_max(quantizer, x)

  def error(percent: Array) -> Array:
    shrink = 1 - percent / 100
    params = params_from_range(quantizer, low * shrink, high * shrink, bits)
    codes = jnp.floor(x / params.scale + 0.5) + params.zero_point
    x_hat = (jnp.clip(codes, params.low, params.high) - params.zero_point) * params.scale
    return jnp.mean(jnp.abs(x - x_hat) ** power)

  def visit(_, carry):
    left, right, best_error, best = carry
    third = (right - left) / 3
    points = jnp.stack([left + third, right - third])
    errors = jnp.stack([error(points[0]), error(points[1])])
    for i in range(2):
      better = errors[i] < best_error
      best_error, best = (
        jnp.where(better, errors[i], best_error),
        jnp.where(better, points[i], best),
      )
    shrink_right = errors[0] < errors[1]
    return (
      jnp.where(shrink_right, left, points[0]),
      jnp.where(shrink_right, points[1], right),
      best_error,
      best,
    )

  zero = jnp.zeros((), low.dtype)
  start = (zero, zero + 80, zero + jnp.inf, zero)
  best = jax.lax.fori_loop(0, steps, visit, start)[-1]
  return low * (1 - best / 100), high * (1 - best / 100)


def percentile_range(
  quantizer: AffineQuantizer,
  x: Array,
  bits: Bits | None = None,
  *,
  quantiles: tuple[float, ...] = PERCENTILES,
) -> tuple[Array, Array]:
  """Returns the range between the `1 - p` and `p` quantiles with the least squared error (RepQ-ViT, QwT).

  Quantiles interpolate linearly; of equal candidates the first wins. Each scale is searched on its own.
  `rule='asymmetric'` is the reference's.

  Raises:
    ValueError: for quantiles outside (0.5, 1].
  """
  if not quantiles or any(not 0.5 < q <= 1 for q in quantiles):
    raise ValueError(f'quantiles={quantiles} must lie in (0.5, 1], at least one.')
  x = cut_groups(quantizer, widen(x))
  axes = reduction_axes(quantizer, x.ndim - (quantizer.granularity == 'group'))
  bounds = select_quantiles(x, [1 - p for p in quantiles] + list(quantiles), axes)
  return best_candidate(quantizer, x, bits, bounds, axes)


def best_candidate(
  quantizer: AffineQuantizer, x: Array, bits: Bits | None, bounds: Array, axes: Sequence[int]
) -> tuple[Array, Array]:
  """Returns the range with the least squared error over `axes` of x; of equal candidates the first.

  Args:
    quantizer: its rule and bits.
    x: NaN counts for nothing.
    bits: see `params_from_range`.
    bounds: `[2 * candidates, ...]`, minima before maxima, `axes` of size 1.
    axes: of x.
  """
  low, high = jnp.split(bounds, 2)
  high = jnp.maximum(low, high)  # the interpolation rounds: of a constant, low may exceed high
  errors = _candidate_errors(x, params_from_range(quantizer, low, high, bits), axes)
  best = errors[0], low[0], high[0]
  for new in zip(errors[1:], low[1:], high[1:]):
    better = new[0] < best[0]
    best = tuple(jnp.where(better, n, old) for n, old in zip(new, best))
  return best[1], best[2]


def _candidate_errors(x: Array, params: AffineParams, axes: Sequence[int]) -> Array:
  """Returns `sum |x - x_hat|^2` over `axes`, kept with size 1, for `params` `[candidates, ...]`."""

  def sums(x: Array, cut: Callable[..., Rows]) -> Array:
    rows = cut(x, axes, x.dtype.type(jnp.nan))
    scale = jnp.where(params.scale == 0, 1, params.scale)

    def each(a: Array) -> Array:
      if a.ndim:
        a = jnp.broadcast_to(a, scale.shape).reshape(-1, *rows.sum_shape)
      return a

    own = [each(a) for a in (scale, params.zero_point, params.low, params.high)]

    def visit(row: Array) -> Array:
      return jnp.where(jnp.isnan(row), 0, (row - affine_fake_quantize(row, *own)) ** 2)

    return rows.total(visit).reshape(-1, *rows.kept)

  return jax.lax.platform_dependent(
    x,
    cpu=lambda x: sums(x, rows_of),
    default=lambda x: sums(x, whole),
  )


def power_of_two_factor(
  x: Array, bits: Bits = 8, factors: int = 4, *, hold_zero: bool = True
) -> AffineParams:
  """Returns per-channel scales `s1 * 2^k_c` for the input of a LayerNorm (PTF, FQ-ViT).

  `s8 = (max - min) / (2^b - 1)` over the whole tensor, `s1 = s8 / 2^(factors - 1)`; each channel of the
  last axis picks the `k` in `0 .. factors - 1` with the least squared error, the first of equal ones. The
  zero point is common, from `s8`.

  Args:
    x: `[..., channels]`.
    bits: code width.
    factors: number of powers tried.
    hold_zero: widens the range to hold 0, see `AffineQuantizer`; False is FQ-ViT's.
  """
  tensor = AffineQuantizer(rule='asymmetric_clipped', hold_zero=hold_zero)
  coarse = params_from_range(tensor, *min_max(tensor, x), bits)
  channel = dataclasses.replace(tensor, granularity='channel')
  scales = [coarse.scale / 2 ** (factors - 1 - k) for k in range(factors)]
  errors = jnp.stack([_squared_error(channel, x, coarse.replace(scale=scale)) for scale in scales])
  choice = jnp.argmin(errors, axis=0)
  return coarse.replace(scale=scales[0] * 2.0**choice)
