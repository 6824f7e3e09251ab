"""Logarithmic quantizers for attention after the softmax: powers of two and of the square root of two.

`log2` (FQ-ViT, Lin et al. 2022) has no scale: `q = round(-log2 x)`, `x_hat = 2^-q`. `log-sqrt2` (RepQ-ViT,
Li et al. 2023) has one: `q = round(-2 log2(x / s))`, `x_hat = s 2^(-q/2)`, decoded as a shift by
`ceil(q / 2)` with a factor `sqrt(2)` for odd codes.

Both flush what lies below the last code to 0, so that there are `2^b + 1` values: the codes `0 .. 2^b - 1`
and `2^b`, which stands for 0. An engine with exactly `b` bits a code has to give one of them up.

>>> import jax.numpy as jnp
>>> attention = jnp.array([0.7, 0.2, 0.1, 0.0])
>>> log2_quantize(attention, bits=2)
Array([1, 2, 3, 4], dtype=int32)
>>> log2_fake_quantize(attention, bits=2)
Array([0.5  , 0.25 , 0.125, 0.   ], dtype=float32)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxlab.quantizers.numerics.bit_widths import Bits, check_bits
from jaxlab.quantizers.numerics.quantiles import select_quantiles
from jaxlab.quantizers.numerics.rounding import widen
from jaxlab.tracing import is_concrete

Array = jax.Array

# QwT's code takes the logarithm of no ratio x / s below this.
SMALLEST_RATIO = 1e-6


def log2_quantize(x: Array, bits: Bits, dtype: jnp.dtype = jnp.int32) -> Array:
  """Returns the codes `clip(round(-log2 x), 0, 2^b)` of `x >= 0`; `2^b` stands for 0.

  Args:
    x: float array of values in [0, 1]; larger ones have code 0, negative ones are taken as 0.
    bits: 1 to 16; may be traced.
    dtype: integer type of the codes.

  Raises:
    ValueError: for `bits` out of range, or if `dtype` does not hold `2^b`.
  """
  _check(x, bits, dtype)
  return _log2_codes(widen(x), bits).astype(dtype)


def log2_dequantize(codes: Array, bits: Bits, dtype: jnp.dtype = jnp.float32) -> Array:
  """Returns `2^-q`, and 0 for the code `2^b`, in `dtype`."""
  check_bits(bits)
  wide = jnp.promote_types(dtype, jnp.float32)
  return _log2_values(codes.astype(jnp.int32), bits, jnp.dtype(wide)).astype(dtype)


def log2_fake_quantize(x: Array, bits: Bits) -> Array:
  """Returns `log2_dequantize(log2_quantize(x))`, bit for bit, in the dtype of `x`.

  The logarithm's rounding is passed straight through: the gradient of `x` is the upstream one times
  `x_hat / x` where `0 <= round(-log2 x) <= 2^b - 1`, else 0. (FQ-ViT's own code has no gradient.)
  """
  _check(x, bits)
  return _log2_fake_quantize(widen(x), bits).astype(x.dtype)


def log_sqrt2_scale(
  x: Array, bits: Bits, *, quantiles: tuple[float, ...] = (0.999, 0.9999, 0.99999)
) -> Array:
  """Returns the scale with the least squared error among quantiles of `x`: a scalar (RepQ-ViT, QwT).

  Quantiles interpolate linearly and are over the whole tensor; of equal candidates the first wins.

  Args:
    x: float array of values >= 0: attention after the softmax, of one batch.
    bits: 1 to 16; may be traced.
    quantiles: the candidates, in (0, 1].

  Raises:
    ValueError: for `bits` or quantiles out of range; for concrete `x` that is not finite or whose
      quantiles are all 0. Under tracing such an `x` gives NaN or 0; a scale of 0 quantizes all to 0.
  """
  _check(x, bits)
  if not quantiles or any(not 0 < q <= 1 for q in quantiles):
    raise ValueError(f'quantiles={quantiles} must lie in (0, 1], at least one.')
  x = widen(x)
  candidates = select_quantiles(x, quantiles).reshape(-1)
  errors = jax.lax.map(
    lambda scale: jnp.mean(jnp.square(x - _log_sqrt2_fake_quantize(x, scale, bits))), candidates
  )
  scale = candidates[jnp.argmin(errors)]
  if is_concrete(scale) and not 0 < np.asarray(scale) < np.inf:
    raise ValueError(
      f'The quantiles of x are {candidates}: a scale must be finite and positive. Is x '
      f'attention after the softmax, free of NaN?'
    )
  return scale


def log_sqrt2_quantize(x: Array, scale: Array, bits: Bits, dtype: jnp.dtype = jnp.int32) -> Array:
  """Returns the codes `clip(round(-2 log2(max(x / s, 1e-6))), 0, 2^b)`; `2^b` stands for 0.

  The ratio's lower bound is QwT's: with 6 bits and more an `x` of 0 has code 40, `2^-20 s`, and not 0.

  Args:
    x: float array of values >= 0.
    scale: > 0, broadcasts against `x`; from `log_sqrt2_scale`.
    bits: 1 to 16; may be traced.
    dtype: integer type of the codes.

  Raises:
    ValueError: for `bits` out of range, or if `dtype` does not hold `2^b`.
  """
  _check(x, bits, dtype)
  return _log_sqrt2_codes(widen(x), scale, bits).astype(dtype)


def log_sqrt2_dequantize(
  codes: Array, scale: Array, bits: Bits, dtype: jnp.dtype = jnp.float32
) -> Array:
  """Returns `s 2^(-ceil(q/2)) (sqrt(2) if q is odd else 1)`, and 0 for the code `2^b`, in `dtype`."""
  check_bits(bits)
  wide = jnp.promote_types(dtype, jnp.float32)
  return _log_sqrt2_values(codes.astype(jnp.int32), scale, bits, jnp.dtype(wide)).astype(dtype)


def log_sqrt2_fake_quantize(x: Array, scale: Array, bits: Bits) -> Array:
  """Returns `log_sqrt2_dequantize(log_sqrt2_quantize(x))`, bit for bit, in the dtype of `x`.

  The gradient of `x` is that of QwT's code, `scale` a constant. With `u = x / s` and `q` the code before
  clipping it is the upstream one times `2^(-ceil(q/2)) (p - 2 (sqrt(2) - 1) / ln 2) / u`, `p = sqrt(2)` for
  odd `q` and 1 for even, where `u >= 1e-6` and `0 <= q <= 2^b - 1`, else 0. Rounding and ceiling count as
  the identity there; so does the parity of `q`, which puts in the second term and makes the slope of a
  quantizer that follows the identity about 0.15 on odd codes and -0.2 on even ones. For plain
  straight-through training differentiate `x` and not this.

  Args:
    x: float array of values >= 0; computed in at least float32.
    scale: > 0, broadcasts against `x`; from `log_sqrt2_scale`.
    bits: 1 to 16; may be traced.
  """
  _check(x, bits)
  return _log_sqrt2_fake_quantize(widen(x), scale, bits).astype(x.dtype)


def _check(x: Array, bits: Bits, dtype: jnp.dtype | None = None) -> None:
  check_bits(bits)
  if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
    raise ValueError(f'x must be a float array; got {jnp.result_type(x)}.')
  if dtype is not None and isinstance(bits, int) and jnp.iinfo(dtype).max < 2**bits:
    raise ValueError(
      f'dtype={jnp.dtype(dtype).name} does not hold the code {2**bits}, which stands for 0 with '
      f'{bits} bits.'
    )


def _zero_code(bits: Bits) -> Array:
  return jnp.left_shift(1, jnp.asarray(bits, jnp.int32))


def _log2_unclipped(x: Array) -> Array:
  # A zero has the code of a value far below any: 2^17 is above every 2^bits.
  positive = x > 0
  return jnp.where(positive, jnp.round(-jnp.log2(jnp.where(positive, x, 1))), 2**17)


@jax.jit
def _log2_codes(x: Array, bits: Bits) -> Array:
  return jnp.clip(_log2_unclipped(x).astype(jnp.int32), 0, _zero_code(bits))


@functools.partial(jax.jit, static_argnames='dtype')
def _log2_values(codes: Array, bits: Bits, dtype: jnp.dtype) -> Array:
  return jnp.where(codes >= _zero_code(bits), 0, _power_of_half(codes, dtype))


@jax.custom_jvp
def _log2_fake_quantize(x: Array, bits: Bits) -> Array:
  return _log2_values(_log2_codes(x, bits), bits, x.dtype)


@_log2_fake_quantize.defjvp
def _log2_fake_quantize_jvp(primals, tangents):
  x, bits = primals
  codes = _log2_unclipped(x)
  out = _log2_fake_quantize(x, bits)
  inside = (codes >= 0) & (codes < _zero_code(bits))
  slope = jnp.where(inside, out / jnp.where(inside, x, 1), 0)
  return out, slope * tangents[0]


def _ratio(x: Array, scale: Array) -> Array:
  # A scale of 0 makes every value 0, whatever the code.
  return x / jnp.where(scale == 0, 1, scale)


def _log_sqrt2_unclipped(ratio: Array) -> Array:
  return jnp.round(-2 * jnp.log2(jnp.maximum(ratio, SMALLEST_RATIO)))


@jax.jit
def _log_sqrt2_codes(x: Array, scale: Array, bits: Bits) -> Array:
  codes = _log_sqrt2_unclipped(_ratio(x, scale)).astype(jnp.int32)
  return jnp.clip(codes, 0, _zero_code(bits))


def _shift_and_parity(codes: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
  """Returns `2^(-ceil(q/2))`, exactly, and `sqrt(2)` for odd codes, 1 for even."""
  parity = jnp.where(codes & 1 == 1, jnp.sqrt(jnp.asarray(2, dtype)), 1)
  return _power_of_half((codes + 1) >> 1, dtype), parity


def _power_of_half(exponent: Array, dtype: jnp.dtype) -> Array:
  """Returns `2^-exponent` for int32 exponents, exactly: put together from bits, where `ldexp` calls `pow`.

  As the product of two powers, so that what is not a normal number rounds as the hardware does.
  """
  info = jnp.finfo(dtype)
  integer = jnp.dtype(f'int{info.bits}')

  def power(exponent: Array) -> Array:
    bits = (-jnp.clip(exponent, info.minexp + 1, -info.minexp) - info.minexp + 1).astype(integer)
    return lax.bitcast_convert_type(bits << info.nmant, dtype)

  half = exponent >> 1
  return power(half) * power(exponent - half)


@functools.partial(jax.jit, static_argnames='dtype')
def _log_sqrt2_values(codes: Array, scale: Array, bits: Bits, dtype: jnp.dtype) -> Array:
  shift, parity = _shift_and_parity(codes, dtype)
  values = jnp.asarray(scale, dtype) * (shift * parity)
  return jnp.where(codes >= _zero_code(bits), 0, values)


@jax.custom_jvp
def _log_sqrt2_fake_quantize(x: Array, scale: Array, bits: Bits) -> Array:
  return _log_sqrt2_values(_log_sqrt2_codes(x, scale, bits), scale, bits, x.dtype)


@_log_sqrt2_fake_quantize.defjvp
def _log_sqrt2_fake_quantize_jvp(primals, tangents):
  x, scale, bits = primals
  ratio = _ratio(x, scale)
  codes = _log_sqrt2_unclipped(ratio).astype(jnp.int32)
  inside = (ratio >= SMALLEST_RATIO) & (codes >= 0) & (codes < _zero_code(bits)) & (scale != 0)
  shift, parity = _shift_and_parity(codes, x.dtype)
  parity_slope = 2 * (np.sqrt(2) - 1) / np.log(2)
  slope = jnp.where(inside, shift * (parity - parity_slope) / jnp.where(inside, ratio, 1), 0)
  return _log_sqrt2_fake_quantize(x, scale, bits), slope * tangents[0]
