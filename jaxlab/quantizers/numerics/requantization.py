"""Requantization: from an int32 accumulator to the next layer's codes, in float or fixed point.

`y = s_x s_w acc + bias`, `q_y = clip(round(y / s_y) + z_y, low, high)`. A channel-wise affine map behind the
layer (QwT-v2, a batch norm) changes nothing but constants: fold it with `fold_channel_affine`.

In fixed point (as gemmlowp and TFLite do it) the multiplier `M = s_x s_w / s_y` is `m0 2^(e - 31)`. The
product `acc m0` needs 64 bits; `requantize_fixed_point` makes it of two 32-bit halves on the device, without
x64 mode. The constants are made on the host, in NumPy's float64.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.tracing import is_concrete

Array = jax.Array


class FixedPoint(NamedTuple):
  """Constants of fixed-point requantization for each output channel (or one for all).

  Attributes:
    multiplier: uint32 `m0 = round(M / 2^e 2^31)`, in `[2^30, 2^31]`; 0 for `M = 0`.
    exponent: int32 `e = floor(log2 M) + 1`, in [-31, 0] (at -31 `m0` may be smaller).
    bias: int32 `round(bias / (s_x s_w))`.
  """

  multiplier: Array
  exponent: Array
  bias: Array


def requantize_constants(
  x_scale: Array, kernel_scale: Array, bias: Array | None, y_scale: Array
) -> tuple[Array, Array]:
  """Returns `(s_x s_w / s_y, bias / s_y)`, the multiplier and the offset of `requantize`.

  Args:
    x_scale: scalar.
    kernel_scale: scalar or `[out]`.
    bias: `[out]` or None.
    y_scale: scalar, > 0.
  """
  multiplier = jnp.asarray(x_scale) * kernel_scale / y_scale
  return multiplier, jnp.zeros_like(multiplier) if bias is None else bias / y_scale


def requantize(
  accumulator: Array,
  multiplier: Array,
  offset: Array,
  zero_point: Array,
  *,
  low: int = 0,
  high: int = 255,
  dtype: jnp.dtype = jnp.uint8,
) -> Array:
  """Returns the codes `clip(round(acc M + offset) + z, low, high)`, half to even.

  In float32 an accumulator above 2^24 is rounded before it is scaled, by less than one part in 2^24.

  Args:
    accumulator: int32 `[..., out]`.
    multiplier: `M`, scalar or `[out]`; may be negative.
    offset: scalar or `[out]`.
    zero_point: code of 0.
    low: lowest code.
    high: highest code.
    dtype: of the codes.
  """
  wide = jnp.promote_types(jnp.result_type(multiplier), jnp.float32)
  codes = jnp.round(accumulator.astype(wide) * multiplier + offset) + zero_point
  return jnp.clip(codes, low, high).astype(dtype)


def fixed_point_constants(
  x_scale: Array, kernel_scale: Array, bias: Array | None, y_scale: Array
) -> FixedPoint:
  """Returns the constants of `requantize_fixed_point`, NumPy arrays made in float64 on the host.

  Args:
    x_scale: scalar, concrete.
    kernel_scale: scalar or `[out]`, >= 0.
    bias: `[out]` or None.
    y_scale: scalar, > 0.

  Raises:
    ValueError: unless `0 <= M < 1`, if the bias does not fit int32 or belongs to a scale of 0.
  """
  step = np.float64(x_scale) * np.asarray(kernel_scale, np.float64)
  ratio = np.atleast_1d(step / np.float64(y_scale))
  if np.any(ratio < 0):
    raise ValueError(
      f'Channels {np.flatnonzero(ratio < 0)[:5].tolist()} have a negative scale, which fixed point has not: '
      f'flip_negative_channels first.'
    )
  if not np.all(ratio < 1):
    raise ValueError(
      f'The multiplier s_x s_w / s_y reaches {np.max(ratio)}; fixed point takes [0, 1). Is y_scale the '
      f"output's own?"
    )
  exponent = np.floor(np.log2(np.where(ratio > 0, ratio, 0.5))).astype(np.int32) + 1
  exponent = np.maximum(exponent, -31)
  multiplier = np.round(np.ldexp(ratio, 31 - exponent)).astype(np.uint32)
  bias = np.zeros(ratio.shape) if bias is None else np.asarray(bias, np.float64)
  step = np.broadcast_to(step, np.broadcast_shapes(ratio.shape, bias.shape))
  if np.any((step == 0) & (bias != 0)):
    raise ValueError(
      'A channel with scale 0 has a bias: its constant output has no fixed-point form.'
    )
  codes = np.round(bias / np.where(step == 0, 1, step))
  if np.any(np.abs(codes) >= 2**31):
    raise ValueError(f'The bias code {np.max(np.abs(codes)):.4g} does not fit int32.')
  return FixedPoint(multiplier, exponent, codes.astype(np.int32))


def requantize_fixed_point(
  accumulator: Array,
  constants: FixedPoint,
  zero_point: Array,
  *,
  low: int = 0,
  high: int = 255,
  dtype: jnp.dtype = jnp.uint8,
) -> Array:
  """Returns `clip((((acc + bias) m0 + 2^(30 - e)) >> (31 - e)) + z, low, high)`: integers alone.

  Rounds half up, where `requantize` rounds half to even. `acc + bias` must fit int32, which the caller knows
  from the number of inputs; the 64-bit product is made of halves and is exact.

  Args:
    accumulator: int32 `[..., out]`.
    constants: from `fixed_point_constants`.
    zero_point: code of 0, a whole number.
    low: lowest code.
    high: highest code.
    dtype: of the codes.
  """
  if accumulator.dtype != jnp.int32:
    raise ValueError(f'accumulator must be int32; got {accumulator.dtype}.')
  total = accumulator + jnp.asarray(constants.bias, jnp.int32)
  upper, lower = _multiply_wide(total, jnp.asarray(constants.multiplier, jnp.uint32))
  shift = 31 - jnp.asarray(constants.exponent, jnp.int32)
  # Half a unit of the result, as a 64-bit number: bit shift - 1.
  bit = (shift - 1).astype(jnp.uint32)
  one = jnp.uint32(1)
  half_lower = jnp.where(bit < 32, one << (bit & 31), 0)
  half_upper = jnp.where(bit < 32, 0, one << (bit & 31))
  rounded = lower + half_lower
  upper = upper + half_upper + (rounded < lower)
  signed = jax.lax.bitcast_convert_type(upper, jnp.int32)
  # M < 1 makes shift at least 31, so that the result fits 32 bits.
  near = jax.lax.bitcast_convert_type((upper << 1) | (rounded >> 31), jnp.int32)
  result = jnp.where(shift == 31, near, signed >> jnp.maximum(shift - 32, 0))
  # The result may lie at int32's end: clip before the zero point is added.
  zero_point = jnp.asarray(zero_point, jnp.int32)
  return (jnp.clip(result, low - zero_point, high - zero_point) + zero_point).astype(dtype)


def _multiply_wide(a: Array, b: Array) -> tuple[Array, Array]:
  """Returns the 64-bit product of int32 `a` and uint32 `b` as two uint32 halves, two's complement."""
  bits = jax.lax.bitcast_convert_type(a, jnp.uint32)
  a_low, a_high, b_low, b_high = bits & 0xFFFF, bits >> 16, b & 0xFFFF, b >> 16
  low, cross, other = a_low * b_low, a_low * b_high, a_high * b_low
  middle = (low >> 16) + (cross & 0xFFFF) + (other & 0xFFFF)
  upper = a_high * b_high + (cross >> 16) + (other >> 16) + (middle >> 16)
  # A negative `a` was read as a + 2^32.
  return upper - jnp.where(a < 0, b, 0), (low & 0xFFFF) | (middle << 16)


def fold_channel_affine(
  weight_scale: Array, bias: Array | None, gamma: Array, beta: Array
) -> tuple[Array, Array]:
  """Returns `(gamma s_w, gamma bias + beta)`: the layer followed by `gamma y + beta` (QwT-v2).

  Codes of weights and activations stay as they are. Only right where nothing non-linear stands between
  the layer and the map. An output quantizer that was calibrated before has to be calibrated again.

  Args:
    weight_scale: scalar or `[..., out]`; with groups of inputs `[groups, out]`. A scalar becomes `[out]`.
    bias: `[out]`, or None for 0.
    gamma: `[out]`; negative ones make negative scales, see `flip_negative_channels`.
    beta: `[out]`.
  """
  return weight_scale * gamma, beta if bias is None else gamma * bias + beta


def flip_negative_channels(kernel: Array, weight_scale: Array) -> tuple[Array, Array]:
  """Returns `(codes, |scale|)`, the codes of channels with a negative scale negated.

  Args:
    kernel: signed codes `[..., out]`.
    weight_scale: scalar or `[out]`.

  Raises:
    ValueError: for unsigned codes, or if a channel to flip holds the lowest code, which has no mirror
      image (use `narrow=True`, or the symmetric rule, which does not reach it).
  """
  info = jnp.iinfo(kernel.dtype)
  if info.min == 0:
    raise ValueError(f'Unsigned codes ({kernel.dtype}) have no mirror image; use signed ones.')
  negative = jnp.broadcast_to(weight_scale < 0, kernel.shape[-1:])
  if is_concrete(kernel) and is_concrete(weight_scale):
    stuck = (np.asarray(weight_scale) < 0) & np.any(
      np.asarray(kernel) == info.min, tuple(range(kernel.ndim - 1))
    )
    if stuck.any():
      raise ValueError(
        f'Channels {np.flatnonzero(stuck)[:5].tolist()} hold the code {info.min}, which cannot be '
        f'negated: quantize with narrow=True.'
      )
  return jnp.where(negative, -kernel, kernel).astype(kernel.dtype), jnp.abs(weight_scale)
