"""Quantizers whose range is learned, or bounded by a function: LSQ, LSQ+, PACT, DoReFa.

All are free functions of arrays. What is learned (step, zero point, clipping value) is an argument, so that
it lives in any pytree and `jax.grad` reaches it:

>>> import jax, jax.numpy as jnp
>>> x = jnp.array([-0.7, 0.1, 0.3, 0.9])
>>> low, high = code_range(3, signed=True)
>>> scale = lsq_scale(x, high)
>>> loss = lambda s: jnp.sum((lsq_fake_quantize(x, s, low, high) - x) ** 2)
>>> jax.grad(loss)(scale).shape
(1,)

bfloat16 inputs are computed in float32 and returned as bfloat16; keep the learned arrays in float32, where
a step of a learning rate is not rounded away.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.quantizers.numerics.bit_widths import Bits, check_bits, code_range
from jaxlab.quantizers.numerics.rounding import (
  clip_inclusive,
  round_straight_through,
  widen,
)
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any


@jax.custom_jvp
def scale_gradient(x: Array, factor: Array) -> Array:
  """Returns `x`; its gradient is the upstream one times `factor`.

  >>> import jax
  >>> float(jax.grad(scale_gradient)(3.0, 0.5))
  0.5
  """
  del factor
  return jnp.asarray(x)


@scale_gradient.defjvp
def _scale_gradient_jvp(primals, tangents):
  x, factor = primals
  return jnp.asarray(x), (tangents[0] * factor).astype(jnp.result_type(x))


def lsq_scale(
  x: Array,
  high: Array,
  axis: int | tuple[int, ...] | None = None,
  *,
  on_zeros: Literal['error', 'mean'] = 'error',
) -> Array:
  """Returns LSQ's first step `2 mean|x| / sqrt(Q_p)` (Esser et al. 2020, section 2.1).

  Args:
    x: float array: the weights, or the activations of a first batch.
    high: the highest code `Q_p`, > 0.
    axis: the channel axis or axes, for a step of each channel (its own mean); None for one step.
    on_zeros: what becomes of a channel of zeros alone, for which there is no step: `'error'`, or `'mean'`,
      which gives it the mean of the other channels' steps, so that it can be learned.

  Returns:
    Step in at least float32: `[1, ..., channels, ..., 1]`, or of one element with all dimensions kept.

  Raises:
    ValueError: for concrete `x` that is not finite, or has a channel of zeros alone (`on_zeros='mean'`: is
      all zeros), or if `high` is not positive.
  """
  x = widen(x)
  _check_high(high)
  if on_zeros not in ('error', 'mean'):
    raise ValueError(f"on_zeros={on_zeros!r}; choose 'error' or 'mean'.")
  channels = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
  for own in channels:
    if not -x.ndim <= own < x.ndim:
      raise ValueError(f'axis={own} is not an axis of a tensor with {x.ndim} dimensions.')
  kept = {own % x.ndim for own in channels}
  axes = tuple(i for i in range(x.ndim) if i not in kept)
  scale = 2 * jnp.mean(jnp.abs(x), axes, keepdims=True) / jnp.sqrt(jnp.asarray(high, x.dtype))
  if on_zeros == 'mean':
    mean = jnp.sum(scale) / jnp.maximum(jnp.sum(scale > 0), 1)
    scale = jnp.where(scale == 0, mean, scale)
  good = (np.asarray(scale) > 0) & np.isfinite(scale) if is_concrete(scale) else True
  if not np.all(good):
    bad = np.flatnonzero(~good)
    raise ValueError(
      f'No positive finite step for channels {bad[:5].tolist()}: their values are all 0, or not finite.'
    )
  return scale


def lsq_fake_quantize(
  x: Array,
  scale: Array,
  low: Array,
  high: Array,
  *,
  grad_factor: Array | None = None,
  floor: float | None = None,
) -> Array:
  """Returns `round(clip(x / s, Q_n, Q_p)) s` with LSQ's gradients (Esser et al. 2020, equations 1 to 5).

  With `v = x / s`: the gradient of `x` is the upstream one where `Q_n <= v <= Q_p`, else 0. That of `s` is
  `g` times the sum of the upstream one times `round(v) - v` inside and `Q_n` or `Q_p` outside. The test is
  on the *unrounded* `v`, both ends inside; `affine_fake_quantize` and `lsq_plus_fake_quantize` test the
  rounded code instead, and at two bits the two differ for many weights.

  Args:
    x: float array.
    scale: the step, > 0, broadcasts against `x`; see `lsq_scale`.
    low: the lowest code `Q_n`: `-2^(b-1)`, or 0 behind a ReLU. `code_range` gives both.
    high: the highest code `Q_p`, > 0.
    grad_factor: `g`; by default `1 / sqrt(N Q_p)` with `N` the elements of the *whole* `x`, also for steps
      of channels, and with the batch for activations, as in the reference code.
    floor: steps below it count as `floor` and get no gradient (1e-6 in SSQL's toolbox); None leaves it to
      the caller to keep the step positive.

  Raises:
    ValueError: if `high` is not positive (one signed bit).
  """
  _check_high(high)
  wide = widen(x)
  low, high = jnp.asarray(low, wide.dtype), jnp.asarray(high, wide.dtype)
  if grad_factor is None:
    grad_factor = jax.lax.rsqrt(float(x.size) * high)
  scale = jnp.asarray(scale, wide.dtype)
  if floor is not None:
    scale = clip_inclusive(scale, floor, jnp.inf)
  scale = scale_gradient(scale, grad_factor)
  compute = _lsq if is_concrete(wide) else _lsq_once
  return compute(wide, scale, low, high).astype(x.dtype)


@jax.custom_jvp
def _lsq(x: Array, scale: Array, low: Array, high: Array) -> Array:
  return jnp.round(jnp.clip(x / scale, low, high)) * scale


@_lsq.defjvp
def _lsq_jvp(primals, tangents):
  x, scale, low, high = primals
  out = _lsq(*primals)
  ratio = x / scale
  inside = (ratio >= low) & (ratio <= high)
  # The step's slope, (x_hat - x) / s inside and x_hat / s outside, as products of arrays that exist anyway:
  # the result, and the masked upstream gradient.
  share = tangents[1] / scale
  return out, jnp.where(inside, tangents[0] - x * share, 0) + out * share


# Arrays of one shape are traced and differentiated once.
_lsq_once = jax.jit(_lsq)


def lsq_plus_fake_quantize(
  x: Array,
  scale: Array,
  zero_point: Array,
  low: Array,
  high: Array,
  *,
  grad_factor: Array | float = 1.0,
) -> Array:
  """Returns `(clip(round(x / s) + z, low, high) - z) s`, scale and zero point both learned.

  LSQ+ (Bhalgat et al. 2020) as PyTorch's learnable fake-quantize operators do it: the forward pass uses the
  zero point rounded and clipped to `[low, high]`. The gradient of `x` is the upstream one where the rounded
  code lies in `[low, high]`, both ends inside, else 0. Inside, `s` gets `(x_hat - x) / s` and `z` nothing;
  where the code saturates at `q`, `s` gets `q - z` and `z` gets `-s`, each times the upstream gradient and
  `grad_factor`.

  Args:
    x: float array.
    scale: > 0, broadcasts against `x`.
    zero_point: learned, as a float; broadcasts against `x`.
    low: lowest code.
    high: highest code.
    grad_factor: for example `1 / sqrt(N (high - low))`.
  """
  wide = widen(x)
  low, high = jnp.asarray(low, wide.dtype), jnp.asarray(high, wide.dtype)
  scale = scale_gradient(jnp.asarray(scale, wide.dtype), grad_factor)
  zero_point = scale_gradient(jnp.asarray(zero_point, wide.dtype), grad_factor)
  zero_point = _rounded_zero_point(zero_point, low, high)
  steps = round_straight_through(wide / scale)
  codes = jax.lax.stop_gradient(steps + zero_point)
  inside = (codes >= low) & (codes <= high)
  # Inside, the zero point cancels exactly; leaving it out keeps its gradient free of rounding there.
  saturated = jnp.clip(codes, low, high) - zero_point
  return (jnp.where(inside, steps, saturated) * scale).astype(x.dtype)


@jax.custom_jvp
def _rounded_zero_point(zero_point: Array, low: Array, high: Array) -> Array:
  return jnp.clip(jnp.round(zero_point), low, high)


@_rounded_zero_point.defjvp
def _rounded_zero_point_jvp(primals, tangents):
  return _rounded_zero_point(*primals), tangents[0]


def pact_fake_quantize(
  x: Array, alpha: Array, bits: Bits, *, signed: bool = False, wide: bool = False
) -> Array:
  """Returns `round(clip(x, 0, alpha) / s) s`, `s = alpha / (2^b - 1)` (PACT, Choi et al. 2018).

  The gradient of `x` is the upstream one where `0 <= x <= alpha`, else 0; that of `alpha` the sum of the
  upstream one where `x >= alpha`. None passes through `s`.

  Args:
    x: float array, usually behind a ReLU.
    alpha: the learned clipping value, > 0, broadcasts against `x`. It starts at 10 in SSQL's toolbox.
    bits: 1 to 16 (2 at least if signed); may be traced.
    signed: clips to `[-alpha, alpha]` with `s = alpha / (2^(b-1) - 1)`; `alpha` gets minus the upstream
      gradient where `x <= -alpha`.
    wide: with `signed`, keeps `s = alpha / (2^b - 1)` as SSQL's toolbox does: `2^(b+1) - 1` levels,
      which is one bit more than asked for. For comparison with its numbers alone.

  Raises:
    ValueError: for bits out of range, or `wide` without `signed`.
  """
  if wide and not signed:
    raise ValueError('wide=True is about signed inputs; give signed=True with it.')
  check_bits(bits, minimum=2 if signed and not wide else 1)
  levels = 2.0 ** jnp.asarray(bits, jnp.float32)
  high = levels / 2 - 1 if signed and not wide else levels - 1
  x_wide = widen(x)
  alpha = jnp.asarray(alpha, x_wide.dtype)
  return _pact(x_wide, alpha, high.astype(x_wide.dtype), signed).astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _pact(x: Array, alpha: Array, high: Array, signed: bool) -> Array:
  scale = alpha / high
  return jnp.round(jnp.clip(x, -alpha if signed else 0, alpha) / scale) * scale


@_pact.defjvp
def _pact_jvp(signed, primals, tangents):
  x, alpha, high = primals
  low = -alpha if signed else jnp.zeros_like(alpha)
  inside = jnp.where((x >= low) & (x <= alpha), tangents[0], 0)
  above = jnp.where(x >= alpha, tangents[1], 0)
  below = jnp.where(x <= low, tangents[1], 0) if signed else 0
  return _pact(x, alpha, high, signed), inside + above - below


def pact_penalty(alphas: PyTree, weight: float = 1e-4) -> Array:
  """Returns `weight * sum alpha^2` over all clipping values of a pytree (PACT, section 3.3).

  1e-4 is the weight in SSQL's toolbox; the term is added to the loss, so that the gradient is
  `2 * weight * alpha`.
  """
  return weight * sum(jnp.sum(jnp.square(widen(alpha))) for alpha in jax.tree.leaves(alphas))


def dorefa_weights(weight: Array, bits: Bits) -> Array:
  """Returns `2 Q_b(tanh(w) / (2 max|tanh w|) + 1/2) - 1`, `Q_b(v) = round(v (2^b - 1)) / (2^b - 1)`.

  DoReFa-Net (Zhou et al. 2016, equation 9). The result lies in [-1, 1] whatever the size of the weights,
  and has no zero among its `2^b` values. The rounding is passed straight through; the gradient goes through
  the tanh and the maximum. Weights that are all 0 are returned as they are.

  Args:
    weight: float array; one maximum over all of it.
    bits: 2 to 16 (one bit is another function there: the sign); may be traced.
  """
  check_bits(bits, minimum=2)
  bounded = jnp.tanh(widen(weight))
  largest = jnp.max(jnp.abs(bounded))
  unit = bounded / (2 * jnp.where(largest == 0, 1, largest)) + 0.5
  out = 2 * _unit_quantize(unit, bits) - 1
  return jnp.where(largest == 0, bounded, out).astype(weight.dtype)


def dorefa_activations(x: Array, bits: Bits) -> Array:
  """Returns `Q_b(clip(x, 0, 1))`, gradient 1 where `0 <= x <= 1`, else 0 (DoReFa-Net, section 2.4)."""
  check_bits(bits)
  return _unit_quantize(clip_inclusive(widen(x), 0.0, 1.0), bits).astype(x.dtype)


def dorefa_mean_weights(weight: Array, bits: Bits, axis: int = -1) -> Array:
  """Returns `(Q_b(tanh(w) / m_c + 1/2) - 1/2) m_c`, `m_c = 2 mean|tanh w|` of each output channel.

  The variant of SSQL's toolbox, which keeps the weights' size. Codes are clipped to `[0, 2^b - 1]`, but the
  gradient passes straight through *also where they are clipped*: it is the upstream one times `1 - tanh(w)^2`
  everywhere, with `m_c` a constant. A channel of zeros stays as it is.

  Args:
    weight: float array.
    bits: 2 to 16; may be traced.
    axis: the output channel: last in Flax kernels.
  """
  check_bits(bits, minimum=2)
  wide = widen(weight)
  axes = tuple(i for i in range(wide.ndim) if i != axis % wide.ndim)
  return _dorefa_mean(wide, bits, axes).astype(weight.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _dorefa_mean(weight: Array, bits: Bits, axes: tuple[int, ...]) -> Array:
  bounded = jnp.tanh(weight)
  mean = 2 * jnp.mean(jnp.abs(bounded), axes, keepdims=True)
  unit = bounded / jnp.where(mean == 0, 1, mean) + 0.5
  _, high = code_range(bits, signed=False)
  high = high.astype(weight.dtype)
  codes = jnp.clip(jnp.round(unit * high), 0, high)
  return (codes / high - 0.5) * mean


@_dorefa_mean.defjvp
def _dorefa_mean_jvp(axes, primals, tangents):
  weight, bits = primals
  slope = 1 - jnp.square(jnp.tanh(weight))
  return _dorefa_mean(weight, bits, axes), slope * tangents[0]


def dorefa_scaled_activations(
  x: Array, bits: Bits, *, offset: float = 0.0, slope: float = 0.1
) -> Array:
  """Returns `Q_b(clip(slope x + o, 0, 1)) - o`, the activations of SSQL's toolbox.

  The result stands for `slope x` and not for `x`: it is not scaled back. The gradient is `slope` times the
  upstream one where `0 <= slope x + o <= 1`, else 0.

  Args:
    x: float array.
    bits: 1 to 16; may be traced.
    offset: `o`: 0 behind a ReLU, 0.5 for signed inputs.
    slope: 0.1 in the toolbox.
  """
  check_bits(bits)
  unit = clip_inclusive(slope * widen(x) + offset, 0.0, 1.0)
  return (_unit_quantize(unit, bits) - offset).astype(x.dtype)


def _unit_quantize(unit: Array, bits: Bits) -> Array:
  """Returns `round(v (2^b - 1)) / (2^b - 1)`, straight-through."""
  _, high = code_range(bits, signed=False)
  high = high.astype(unit.dtype)
  return round_straight_through(unit * high) / high


def _check_high(high: Array) -> None:
  if is_concrete(high) and not np.all(np.asarray(high) > 0):
    raise ValueError(
      f'The highest code must be positive; got {high}: LSQ needs 2 signed bits or more.'
    )
