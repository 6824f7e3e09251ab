"""Affine (uniform) quantizers: `q = clip(round(x / s) + z, low, high)`, `x_hat = (q - z) * s`.

An `AffineQuantizer` holds the static choices, an `AffineParams` the arrays. `calibrate` makes the arrays,
`quantize`, `dequantize` and `fake_quantize` use them:

>>> import jax.numpy as jnp
>>> quantizer = AffineQuantizer(bits=8, rule='symmetric', granularity='channel', axis=-1)
>>> kernel = jnp.array([[0.5, -2.0], [1.0, 0.3]])
>>> params = calibrate(quantizer, kernel)
>>> quantize(quantizer, kernel, params, dtype=jnp.int8)
Array([[  64, -127],
       [ 127,   19]], dtype=int8)

Bit-widths may be traced scalars: `calibrate(quantizer, x, bits=bits)` inside `jit` serves all of them with
one compilation.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from jaxlab.quantizers.numerics.bit_widths import Bits, check_bits, code_range
from jaxlab.quantizers.numerics.extremes import extremes
from jaxlab.tracing import is_concrete

Array = jax.Array
Rule = Literal['symmetric', 'half_range', 'asymmetric', 'asymmetric_clipped']
Granularity = Literal['tensor', 'channel', 'token', 'group']
DEGENERATE = Literal['widen', 'identity', 'error']


@dataclasses.dataclass(frozen=True)
class AffineQuantizer:
  """The static choices of an affine quantizer.

  Attributes:
    bits: code width, 1 to 16; functions that take `bits=` override it, also by a traced scalar.
    rule: how a range `[minimum, maximum]` becomes scale `s` and zero point `z`, with `m` the larger of
      `|minimum|` and `|maximum|`:

      - `'symmetric'`: `s = m / (2^(b-1) - 1)`, `z = 0`, signed codes. The extreme is a code: the choice
        of integer engines.
      - `'half_range'`: `s = m / ((2^b - 1) / 2)`, `z = 0`, signed codes. The extreme sits on a
        rounding tie (SSQL's weights, FQ-ViT, torch.ao), which half-to-even rounds outwards. So that the
        last bit of a division does not decide it, on another mesh otherwise than on this one, `s` is
        made four units in the last place smaller.
      - `'asymmetric'`: `s = (maximum - minimum) / (2^b - 1)`, `z = -round(minimum / s)`, not clipped;
        unsigned codes (SSQL's activations, RepQ-ViT, QwT).
      - `'asymmetric_clipped'`: the same of a range that is widened to hold 0, so that 0 is one of the codes
        (padding needs it, integer engines too), and `z` clipped to the codes.
    granularity: what shares a scale: the whole `'tensor'`; each index of `axis` (`'channel'`); each
      slice along `axis` (`'token'`: everything but `axis` has a scale of its own); or each run of
      `group_size` elements along `axis` (`'group'`).
    axis: the channel axis, the axis that a token spans, or the axis that is cut into groups. For Flax
      kernels the output channel is the last axis, the input the one before. Several channel axes (heads and
      their features, experts and their outputs) are a tuple.
    group_size: elements per group.
    narrow: leaves out the lowest signed code, so that codes are `[-(2^(b-1) - 1), 2^(b-1) - 1]`.
    hold_zero: False takes ranges for `'asymmetric_clipped'` as they come, with `s >= 1.19e-7`, as FQ-ViT's
      code does: where 0 lies outside, the clipped `z` maps most values to one end.

  Raises:
    ValueError: for bits, rules, granularities or group sizes that do not exist, and for signed codes of
      1 bit, which are -1 and 0.
  """

  bits: int = 8
  rule: Rule = 'symmetric'
  granularity: Granularity = 'tensor'
  axis: int | tuple[int, ...] = -1
  group_size: int | None = None
  narrow: bool = False
  hold_zero: bool = True

  def __post_init__(self):
    check_bits(self.bits)
    _check_signed(self.bits, self.rule)
    for name, options in (('rule', Rule), ('granularity', Granularity)):
      value = getattr(self, name)
      if value not in options.__args__:
        raise ValueError(f'{name}={value!r} is none of {", ".join(map(repr, options.__args__))}.')
    if isinstance(self.axis, Sequence):
      object.__setattr__(self, 'axis', tuple(int(axis) for axis in self.axis))
      if self.granularity != 'channel':
        raise ValueError(
          f"axis={self.axis}: several axes go with granularity='channel'; got {self.granularity!r}."
        )
    if not self.hold_zero and self.rule != 'asymmetric_clipped':
      raise ValueError(f"hold_zero goes with rule='asymmetric_clipped'; got rule={self.rule!r}.")
    if self.narrow and not self.signed:
      raise ValueError(f'narrow=True takes signed codes; rule={self.rule!r} has none.')
    if (self.granularity == 'group') != (self.group_size is not None):
      raise ValueError(
        f"group_size goes with granularity='group'; got granularity={self.granularity!r}, "
        f'group_size={self.group_size}.'
      )
    if self.group_size is not None and self.group_size < 1:
      raise ValueError(f'group_size must be positive; got {self.group_size}.')

  @property
  def signed(self) -> bool:
    """Whether codes are signed: the rules without a zero point."""
    return self.rule in ('symmetric', 'half_range')


class AffineParams(flax.struct.PyTreeNode):
  """The arrays of an affine quantizer; they broadcast against `x` (grouped: against `x` cut into groups).

  Attributes:
    scale: width of a step, > 0; 0 marks what is to stay as it is (`on_degenerate='identity'`).
    zero_point: the code of 0.
    low: the lowest code.
    high: the highest code.
  """

  scale: Array
  zero_point: Array
  low: Array
  high: Array


def _check_signed(bits: Bits, rule: str) -> None:
  """Raises ValueError for signed codes of 1 bit, -1 and 0, which hold no positive value."""
  if rule not in ('symmetric', 'half_range') or not is_concrete(bits):
    return
  if np.any(np.asarray(bits) == 1):
    raise ValueError(f'rule={rule!r} has signed codes and needs at least 2 bits; got bits={bits}.')


def reduction_axes(quantizer: AffineQuantizer, ndim: int) -> tuple[int, ...]:
  """Returns the axes of a tensor (cut into groups, if grouped) that share a scale.

  Raises:
    ValueError: if the tensor has no such axis.
  """
  if quantizer.granularity == 'tensor':
    return tuple(range(ndim))
  axes = _axes(quantizer, ndim)
  if quantizer.granularity == 'channel':
    return tuple(i for i in range(ndim) if i not in axes)
  return axes if quantizer.granularity == 'token' else (axes[0] + 1,)


def _axes(quantizer: AffineQuantizer, ndim: int) -> tuple[int, ...]:
  axes = quantizer.axis if isinstance(quantizer.axis, tuple) else (quantizer.axis,)
  for axis in axes:
    if not -ndim <= axis < ndim:
      raise ValueError(f'axis={axis} is not an axis of a tensor with {ndim} dimensions.')
  return tuple(axis % ndim for axis in axes)


def cut_groups(quantizer: AffineQuantizer, x: Array) -> Array:
  """Returns `x` with the group axis `[n]` cut into `[n / group_size, group_size]`; others as they are.

  Raises:
    ValueError: if the axis is not divisible by the group size.
  """
  if quantizer.granularity != 'group':
    return x
  (axis,) = _axes(quantizer, x.ndim)
  size, group = x.shape[axis], quantizer.group_size
  if size % group:
    raise ValueError(f'group_size={group} does not divide axis {axis} of shape {x.shape}.')
  return x.reshape(*x.shape[:axis], size // group, group, *x.shape[axis + 1 :])


def params_from_range(
  quantizer: AffineQuantizer,
  minimum: Array,
  maximum: Array,
  bits: Bits | None = None,
  *,
  on_degenerate: Literal['widen', 'identity', 'error'] = 'widen',
) -> AffineParams:
  """Returns scale and zero point for the range `[minimum, maximum]` by the quantizer's rule.

  Args:
    quantizer: static choices.
    minimum: lowest value, any shape that broadcasts against the tensor.
    maximum: highest value, same shape. The result is differentiable in both; `fake_quantize` decides
      whether the gradient is used.
    bits: in place of `quantizer.bits`; may be traced.
    on_degenerate: what becomes of a range without extent (a constant tensor or channel; for the signed rules
      one of zeros alone): `'widen'` makes it hold 0, and gives zeros the scale 1, so that each constant is a
      code; `'identity'` gives the scale 0, at which `fake_quantize` returns values as they are; `'error'`
      raises, where the range is concrete.

  Raises:
    ValueError: for concrete ranges that are not finite or have minimum > maximum, for those without extent
      if `on_degenerate='error'`, and for signed codes of 1 bit, which are -1 and 0.
  """
  if on_degenerate not in DEGENERATE.__args__:
    raise ValueError(
      f'on_degenerate={on_degenerate!r}; choose {", ".join(map(repr, DEGENERATE.__args__))}.'
    )
  _check_range(minimum, maximum)
  if on_degenerate == 'error':
    _check_extent(quantizer, minimum, maximum)
  minimum, maximum = jnp.asarray(minimum), jnp.asarray(maximum)
  _check_signed(quantizer.bits if bits is None else bits, quantizer.rule)
  dtype = jnp.promote_types(jnp.promote_types(minimum.dtype, maximum.dtype), jnp.float32)
  minimum, maximum = minimum.astype(dtype), maximum.astype(dtype)
  low, high = code_range(
    quantizer.bits if bits is None else bits, quantizer.signed, quantizer.narrow
  )
  low, high = low.astype(dtype), high.astype(dtype)
  levels = jnp.asarray(2.0, dtype) ** jnp.asarray(quantizer.bits if bits is None else bits, dtype)
  marked = on_degenerate == 'identity'
  if quantizer.signed:
    extreme = jnp.maximum(jnp.abs(minimum), jnp.abs(maximum))
    half = (levels - 1) / 2 if quantizer.rule == 'half_range' else jnp.maximum(levels / 2 - 1, 1)
    scale = extreme / half
    if quantizer.rule == 'half_range':
      scale = scale * (1 - 4 * jnp.finfo(dtype).eps)
    scale = scale if marked else _positive(scale)
    return AffineParams(scale, jnp.zeros_like(scale), low, high)
  clipped, flat = quantizer.rule == 'asymmetric_clipped', minimum == maximum
  if clipped and not quantizer.hold_zero:
    scale = jnp.maximum((maximum - minimum) / (levels - 1), jnp.finfo(jnp.float32).eps)
  else:
    if clipped or not marked:
      widened = clipped | flat
      minimum = jnp.where(widened, jnp.minimum(minimum, 0), minimum)
      maximum = jnp.where(widened, jnp.maximum(maximum, 0), maximum)
    scale = (maximum - minimum) / (levels - 1)
    scale = jnp.where(flat, 0, scale) if marked else _positive(scale)
  zero_point = low - jnp.round(minimum / jnp.where(scale == 0, 1, scale))
  zero_point = jnp.clip(zero_point, low, high) if clipped else zero_point
  return AffineParams(scale, jax.lax.stop_gradient(zero_point), low, high)


def _positive(scale: Array) -> Array:
  """Returns 1 for scales of 0: those of zeros, and of values that are too small to be divided."""
  return jnp.where(scale == 0, 1, scale)


def _check_range(minimum: Array, maximum: Array) -> None:
  if not (is_concrete(minimum) and is_concrete(maximum)):
    return
  minimum, maximum = np.asarray(minimum), np.asarray(maximum)
  if not (np.all(np.isfinite(minimum)) and np.all(np.isfinite(maximum))):
    raise ValueError(
      f'The range [{np.min(minimum)}, {np.max(maximum)}] is not finite: was the observer shown '
      f'data, and is the data free of NaN and infinity?'
    )
  if np.any(minimum > maximum):
    raise ValueError(f'minimum {minimum} lies above maximum {maximum}.')


def _check_extent(quantizer: AffineQuantizer, minimum: Array, maximum: Array) -> None:
  if not (is_concrete(minimum) and is_concrete(maximum)):
    return
  minimum, maximum = np.asarray(minimum), np.asarray(maximum)
  zeros = (minimum == 0) & (maximum == 0)
  empty = np.ravel(zeros if quantizer.signed else minimum == maximum)
  if empty.any():
    raise ValueError(
      f'{empty.sum()} of {empty.size} ranges have no extent (index {np.flatnonzero(empty)[:5].tolist()}): '
      f'their values are constant. Leave them in float, or choose another on_degenerate.'
    )


def min_max(quantizer: AffineQuantizer, x: Array) -> tuple[Array, Array]:
  """Returns the smallest and largest value of whatever shares a scale, dimensions kept."""
  x = cut_groups(quantizer, x)
  ndim = x.ndim - (quantizer.granularity == 'group')
  return extremes(x, reduction_axes(quantizer, ndim))


def calibrate(
  quantizer: AffineQuantizer,
  x: Array,
  bits: Bits | None = None,
  *,
  on_degenerate: Literal['widen', 'identity', 'error'] = 'widen',
) -> AffineParams:
  """Returns the parameters for the minimum and maximum of `x`; arguments as in `params_from_range`.

  Other range estimates (percentiles, mean squared error) are in `jaxlab.quantizers.ranges`; hand theirs
  to `params_from_range`.
  """
  return params_from_range(quantizer, *min_max(quantizer, x), bits, on_degenerate=on_degenerate)


def affine_fake_quantize(
  x: Array, scale: Array, zero_point: Array, low: Array, high: Array
) -> Array:
  """Returns `(clip(round(x / s) + z, low, high) - z) * s`: the one function all the rest is made of.

  Straight-through: the gradient of `x` is the upstream one where the rounded code before clipping lies
  in `[low, high]`, both ends included, else 0. The gradient of `s` is
  `sum(upstream * (q - z - mask * x / s))`; wrap `scale` in `stop_gradient` where it is a constant.

  Args:
    x: any float array.
    scale: step, > 0, broadcasts against `x`.
    zero_point: code of 0; may be fractional (RepQ-ViT after merging).
    low: lowest code.
    high: highest code.
  """
  return _straight_through(x, scale, zero_point, low, high, False)


@jax.custom_jvp
def _straight_through(
  x: Array, scale: Array, zero_point: Array, low: Array, high: Array, skip: Array
) -> Array:
  """Returns `affine_fake_quantize`, and `x` where `skip`.

  Its derivative is in closed form. What sums up to the gradient of the scale are products of arrays that
  exist anyway, the result and the masked upstream gradient, so that no further array of this size is made.
  """
  codes = jnp.clip(jnp.round(x / scale) + zero_point, low, high)
  return jnp.where(skip, x, (codes - zero_point) * scale)


def _straight_through_jvp(primals, tangents):
  x, scale, zero_point, low, high, skip = primals
  x_dot, scale_dot, zero_point_dot = (
    None if isinstance(tangent, SymbolicZero) else tangent for tangent in tangents[:3]
  )
  out = _straight_through(*primals)
  code = jnp.round(x / scale) + zero_point
  passed = (code >= low) & (code <= high) | skip
  inner = jnp.zeros_like(out) if x_dot is None else x_dot
  if scale_dot is None:
    out_dot = jnp.where(passed, inner, 0)
  else:
    # Inside (q - z - x / s) s_dot, else (q - z) s_dot.
    share = jnp.where(skip, 0, scale_dot / scale)
    out_dot = jnp.where(passed, inner - x * share, 0) + out * share
  if zero_point_dot is not None:
    out_dot = out_dot - jnp.where(passed, 0, scale * zero_point_dot)
  return out, out_dot.astype(out.dtype)


_straight_through.defjvp(_straight_through_jvp, symbolic_zeros=True)
# Arrays of one shape are traced and differentiated once.
_straight_through_once = jax.jit(_straight_through)


def fake_quantize(
  quantizer: AffineQuantizer,
  x: Array,
  params: AffineParams,
  *,
  scale_grad: bool = False,
  degenerate: Literal['element', 'tensor'] = 'element',
) -> Array:
  """Returns `dequantize(quantize(x))`, bit for bit, with straight-through gradients.

  Args:
    quantizer: static choices.
    x: float array; computed in at least float32, returned in its own dtype.
    params: from `calibrate` or `params_from_range`.
    scale_grad: lets the gradient pass through `params.scale` to whatever it was computed from.
    degenerate: where `scale` is 0 (a constant range calibrated with `on_degenerate='identity'`) values are
      returned as they are: those with that scale (`'element'`), or, if any scale is 0, the whole tensor
      (`'tensor'`, SSQL's code).
  """
  if not scale_grad:
    params = jax.lax.stop_gradient(params)
  cut = cut_groups(quantizer, x)
  flat = params.scale == 0
  safe = jnp.where(flat, 1, params.scale)
  skip = jnp.any(flat) if degenerate == 'tensor' else flat
  wide = cut.astype(_compute_dtype(x))
  compute = _straight_through if is_concrete(wide) else _straight_through_once
  out = compute(wide, safe, params.zero_point, params.low, params.high, skip)
  return out.astype(x.dtype).reshape(x.shape)


def quantize(
  quantizer: AffineQuantizer, x: Array, params: AffineParams, dtype: jnp.dtype | None = jnp.int32
) -> Array:
  """Returns the codes `clip(round(x / s) + z, low, high)` of `x`, in its shape.

  Args:
    quantizer: static choices.
    x: float array.
    params: from `calibrate` or `params_from_range`. Where the scale is 0 there is no code for a constant
      other than 0; the code is the zero point.
    dtype: integer type that holds the codes; None keeps floats, for fractional zero points.

  Raises:
    ValueError: if `dtype` cannot hold `quantizer.bits` bits, or the codes that (concrete) `params` are for.
  """
  if dtype is not None:
    info = jnp.iinfo(dtype)
    needed = quantizer.bits - quantizer.signed
    if jnp.iinfo(dtype).max < 2**needed - 1 or (quantizer.signed and info.min == 0):
      raise ValueError(
        f'dtype={jnp.dtype(dtype).name} does not hold {quantizer.bits}-bit '
        f'{"signed" if quantizer.signed else "unsigned"} codes.'
      )
    if (
      is_concrete(params.low)
      and is_concrete(params.high)
      and (np.any(np.asarray(params.low) < info.min) or np.any(np.asarray(params.high) > info.max))
    ):
      raise ValueError(
        f'dtype={jnp.dtype(dtype).name} does not hold the codes [{params.low}, {params.high}] of params.'
      )
  cut = cut_groups(quantizer, x)
  safe = jnp.where(params.scale == 0, jnp.inf, params.scale)
  codes = jnp.round(cut.astype(_compute_dtype(x)) / safe) + params.zero_point
  codes = jnp.clip(codes, params.low, params.high).reshape(x.shape)
  return codes if dtype is None else codes.astype(dtype)


def dequantize(
  quantizer: AffineQuantizer, codes: Array, params: AffineParams, dtype: jnp.dtype = jnp.float32
) -> Array:
  """Returns `(codes - z) * s` in `dtype`."""
  cut = cut_groups(quantizer, codes)
  values = (cut.astype(params.scale.dtype) - params.zero_point) * params.scale
  return values.reshape(codes.shape).astype(dtype)


def _compute_dtype(x: Array) -> jnp.dtype:
  return jnp.promote_types(x.dtype, jnp.float32)
