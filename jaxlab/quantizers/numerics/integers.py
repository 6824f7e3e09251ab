"""Integer execution: dots and convolutions of 8-bit codes with int32 accumulation; packed 4-bit codes.

`acc = sum (q_x - z_x)(q_w - z_w)` is exact; `requantization` turns it into the next layer's codes.

>>> import jax.numpy as jnp
>>> x, w = jnp.array([[255, 0, 7]], jnp.uint8), jnp.array([[-128], [127], [2]], jnp.int8)
>>> integer_dot(x, w, x_zero_point=5)
Array([[-32631]], dtype=int32)

What qwix expresses is left to it: `as_qarray` gives symmetric signed weights of up to 8 bits, per tensor,
channel or group, as a `qwix.QArray`, for `qwix.dot_general` and its providers. It cannot express the rest:
its dots return floats, where requantization needs the accumulator; only one operand may have a zero point
(RepQ-ViT and GPTQ give both one); groups below 128 are dequantized before the dot; unsigned 4-bit and
zero points outside the code range have no type; a padded convolution corrects the zero point with a second
convolution. And an array of `jnp.int4` takes a byte per code in host memory and files, hence `pack_int4`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.quantizers.numerics.affine import AffineParams, AffineQuantizer, quantize
from jaxlab.quantizers.numerics.exact_sums import conv_sums, dot_sums
from jaxlab.tracing import is_concrete

if TYPE_CHECKING:
  import qwix

Array = jax.Array
Padding = str | Sequence[tuple[int, int]]


def integer_dot(
  x: Array, kernel: Array, x_zero_point: Array = 0, kernel_zero_point: Array | None = None
) -> Array:
  """Returns the int32 accumulator `sum_i (q_x[..., i] - z_x)(q_w[i, o] - z_w[o])`: `[..., out]`.

  Computed as `q_x q_w - z_x sum_in q_w` (and, with `z_w`, `- z_w sum_in (q_x - z_x)`), the dot in int8 (on a
  CPU in float32, exactly: `exact_sums`).

  Args:
    x: int8 or uint8 codes `[..., in]`.
    kernel: int8 or uint8 codes `[in, out]`.
    x_zero_point: code of 0, a whole number, scalar.
    kernel_zero_point: whole numbers, scalar or `[out]` (also `[1, out]`); None for symmetric weights.

  Raises:
    ValueError: for codes that are not 8-bit integers, shapes that do not fit, zero points that are not
      whole numbers (RepQ-ViT's merged ones: round them first), or so many inputs that the accumulator
      may exceed 31 bits.
  """
  if kernel.ndim != 2 or x.shape[-1] != kernel.shape[0]:
    raise ValueError(f'x {x.shape} and kernel {kernel.shape}: expected [..., in] and [in, out].')
  _check_sum(kernel.shape[0], x, x_zero_point, kernel, kernel_zero_point)
  x, x_zero_point = _signed(x, x_zero_point, 'x')
  kernel, kernel_zero_point = _signed(kernel, kernel_zero_point, 'kernel')
  sums = dot_sums(x, kernel, of_x=kernel_zero_point is not None)
  x_zero_point = jnp.reshape(x_zero_point, ())
  acc = sums.products - x_zero_point * sums.kernel
  if kernel_zero_point is not None:
    rows = sums.x - x.shape[-1] * x_zero_point
    acc = acc - rows * jnp.reshape(kernel_zero_point, -1)
  return acc


def integer_conv(
  x: Array,
  kernel: Array,
  x_zero_point: Array = 0,
  kernel_zero_point: Array | None = None,
  *,
  strides: Sequence[int] | None = None,
  padding: Padding = 'SAME',
  dilation: Sequence[int] | None = None,
  input_dilation: Sequence[int] | None = None,
  groups: int = 1,
) -> Array:
  """Returns the int32 accumulator of a convolution of codes, e.g. NHWC: `[batch, height, width, out]`.

  One to three spatial axes. The image is padded with the code of 0, so that one constant per output channel
  corrects its zero point. That of the kernel takes the sum of each window, a pass over the image without
  multiplications.

  Args:
    x: int8 or uint8 codes `[batch, *positions, in]`.
    kernel: int8 or uint8 codes `[*window, in / groups, out]`.
    x_zero_point: code of 0, a whole number that is itself a code, scalar.
    kernel_zero_point: whole numbers, scalar or `[out]`; None for symmetric weights.
    strides: of the window; None: 1.
    padding: `'SAME'`, `'VALID'` or a pair for each spatial axis.
    dilation: of the kernel; None: 1.
    input_dilation: of the input; None: 1.
    groups: feature groups.

  Raises:
    ValueError: as `integer_dot`.
  """
  rank = kernel.ndim - 2
  if not 1 <= rank <= 3 or x.ndim != kernel.ndim or x.shape[-1] != kernel.shape[-2] * groups:
    raise ValueError(
      f'x {x.shape} and kernel {kernel.shape}: expected [batch, *positions, in] and '
      f'[*window, in / {groups}, out] with one to three spatial axes.'
    )
  strides, dilation, input_dilation = (
    tuple(each or (1,) * rank) for each in (strides, dilation, input_dilation)
  )
  inputs = int(np.prod(kernel.shape[:-1]))
  _check_sum(inputs, x, x_zero_point, kernel, kernel_zero_point)
  x, x_zero_point = _signed(x, x_zero_point, 'x')
  kernel, kernel_zero_point = _signed(kernel, kernel_zero_point, 'kernel')
  if is_concrete(x_zero_point) and not -128 <= int(x_zero_point) <= 127:
    raise ValueError(
      'x_zero_point is no code, so that there is no code of 0 to pad with: calibrate the input with '
      "rule='asymmetric_clipped', or with a range that contains 0."
    )
  if isinstance(padding, str):
    window = [(size - 1) * d + 1 for size, d in zip(kernel.shape[:-2], dilation, strict=True)]
    padding = jax.lax.padtype_to_pads(x.shape[1:-1], window, strides, padding)
  inner = [(*pair, d - 1) for pair, d in zip(padding, input_dilation, strict=True)]
  edges = [(0, 0, 0), *inner, (0, 0, 0)]
  x_zero_point = jnp.reshape(x_zero_point, ())
  x = jax.lax.pad(x, x_zero_point.astype(jnp.int8), edges)
  of_x = kernel_zero_point is not None
  sums = conv_sums(x, kernel, strides=strides, dilation=dilation, groups=groups, of_x=of_x)
  acc = sums.products - x_zero_point * sums.kernel
  if of_x:
    rows = sums.x - inputs * x_zero_point
    if groups > 1:
      rows = jnp.repeat(rows, kernel.shape[-1] // groups, -1)
    acc = acc - rows * jnp.reshape(kernel_zero_point, -1)
  return acc


def grouped_integer_dot(
  x: Array,
  kernel: Array,
  kernel_scale: Array,
  x_zero_point: Array = 0,
  kernel_zero_point: Array | None = None,
) -> Array:
  """Returns `sum_g s_w[g, o] acc_g` for weights with a scale for each run of inputs: float32 `[..., out]`.

  Times `s_x` it is the layer's output. Every group has an exact int32 accumulator of its own.

  Args:
    x: int8 or uint8 codes `[..., in]`.
    kernel: int8 or uint8 codes `[in, out]`.
    kernel_scale: `[in / group, out]`.
    x_zero_point: code of 0, a whole number, scalar.
    kernel_zero_point: whole numbers `[in / group, out]`, or None.

  Raises:
    ValueError: as `integer_dot`, or if the groups do not divide the inputs.
  """
  inputs, groups = kernel.shape[0], kernel_scale.shape[0]
  if kernel.ndim != 2 or x.shape[-1] != inputs:
    raise ValueError(f'x {x.shape} and kernel {kernel.shape}: expected [..., in] and [in, out].')
  if inputs % groups:
    raise ValueError(f'{groups} groups of scales do not divide {inputs} inputs.')
  size = inputs // groups
  x_groups = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, size), -2, 0)
  kernel_groups = kernel.reshape(groups, size, -1)
  if kernel_zero_point is None:
    acc = jax.vmap(lambda a, w: integer_dot(a, w, x_zero_point))(x_groups, kernel_groups)
  else:
    _check_whole(kernel_zero_point, 'kernel_zero_point')
    acc = jax.vmap(lambda a, w, z: integer_dot(a, w, x_zero_point, z))(
      x_groups, kernel_groups, jnp.asarray(kernel_zero_point)
    )
  scale = kernel_scale.reshape(groups, *(1,) * (x.ndim - 1), -1)
  return jnp.sum(acc.astype(jnp.float32) * scale, 0)


def as_qarray(quantizer: AffineQuantizer, kernel: Array, params: AffineParams) -> 'qwix.QArray':
  """Returns the quantized kernel as a `qwix.QArray`: int4 up to 4 bits, else int8.

  Args:
    quantizer: a symmetric rule of at most 8 bits.
    kernel: float kernel, any rank.
    params: from `calibrate`.

  Raises:
    ValueError: for rules with a zero point or more than 8 bits.
  """
  import qwix

  if not quantizer.signed or quantizer.bits > 8:
    raise ValueError(
      f'A qwix weight is symmetric and of at most 8 bits; got rule={quantizer.rule!r}, '
      f'bits={quantizer.bits}. Use integer_dot with zero points.'
    )
  limit = 2 ** (quantizer.bits - 1) - 1
  if is_concrete(params.high) and np.any(np.asarray(params.high) > limit):
    raise ValueError(f'params are for codes up to {params.high}, the quantizer for {limit}.')
  codes = quantize(quantizer, kernel, params, jnp.int8)
  scale = params.scale
  if quantizer.granularity == 'group':
    scale = jnp.squeeze(scale, quantizer.axis % kernel.ndim + 1)
  return qwix.QArray(codes.astype(jnp.int4) if quantizer.bits <= 4 else codes, scale)


def pack_int4(codes: Array, axis: int = -2) -> Array:
  """Returns 4-bit codes two a byte: `(c[2k] & 15) | (c[2k + 1] & 15) << 4` along `axis`, uint8.

  >>> import jax.numpy as jnp
  >>> pack_int4(jnp.array([[-8], [7], [1]]))
  Array([[120],
         [  1]], dtype=uint8)

  Args:
    codes: integers in [-8, 7] or [0, 15]; an odd length is filled with a 0.
    axis: the contracting axis; of Flax kernels the second last.

  Raises:
    ValueError: for concrete codes outside of both ranges.
  """
  if not jnp.issubdtype(codes.dtype, jnp.integer):
    raise ValueError(f'codes must be integers; got {codes.dtype}.')
  if is_concrete(codes) and codes.size:
    values = np.asarray(codes)
    low, high = int(values.min()), int(values.max())
    if low < -8 or high > (7 if low < 0 else 15):
      raise ValueError(f'codes in [{low}, {high}] are not 4-bit: expected [-8, 7] or [0, 15].')
  moved = jnp.moveaxis(codes, axis, 0).astype(jnp.uint8) & 15
  if moved.shape[0] % 2:
    moved = jnp.pad(moved, ((0, 1), *((0, 0),) * (moved.ndim - 1)))
  return jnp.moveaxis(moved[::2] | (moved[1::2] << 4), 0, axis)


def unpack_int4(packed: Array, size: int, *, axis: int = -2, signed: bool = True) -> Array:
  """Returns the codes that `pack_int4` packed: int8, or uint8 if not `signed`.

  Args:
    packed: uint8.
    size: length of `axis` before packing.
    axis: the packed axis.
    signed: extends the sign.

  Raises:
    ValueError: if `size` codes do not take that many bytes.
  """
  moved = jnp.moveaxis(packed, axis, 0)
  if packed.dtype != jnp.uint8 or moved.shape[0] != -(-size // 2):
    raise ValueError(
      f'packed {packed.dtype} of shape {packed.shape} does not hold {size} codes along axis {axis}: '
      f'expected {-(-size // 2)} bytes of uint8.'
    )
  pairs = jnp.stack([moved & 15, moved >> 4], 1)
  codes = pairs.reshape(-1, *moved.shape[1:])[:size]
  if signed:
    codes = ((codes ^ 8).astype(jnp.int8) - 8).astype(jnp.int8)
  return jnp.moveaxis(codes, 0, axis)


def _signed(codes: Array, zero_point: Array | None, name: str) -> tuple[Array, Array | None]:
  """Returns int8 codes and their int32 zero point; unsigned ones are moved down by 128, exactly."""
  if codes.dtype not in (jnp.int8, jnp.uint8):
    raise ValueError(f'{name} must hold int8 or uint8 codes; got {codes.dtype}.')
  unsigned = codes.dtype == jnp.uint8
  if zero_point is None:
    zero_point = 0 if unsigned else None
  if zero_point is not None:
    _check_whole(zero_point, f'{name}_zero_point')
    offset = 128 if unsigned else 0
    if is_concrete(zero_point):
      zero_point = np.asarray(zero_point).astype(np.int32) - np.int32(offset)
    else:
      zero_point = zero_point.astype(jnp.int32) - offset
  if unsigned:
    codes = jax.lax.bitcast_convert_type(codes ^ 128, jnp.int8)
  return codes, zero_point


def _check_whole(value: Array, name: str) -> None:
  # NumPy throughout: inside `jit`, jax would trace operations on concrete arrays, too.
  if is_concrete(value) and np.any(np.asarray(value) % 1):
    raise ValueError(
      f'{name} must be a whole number for integer execution; got {value}. Round it and recalibrate.'
    )


def _spread(codes: Array, zero_point: Array | None) -> int:
  """Returns the largest distance of a code from its zero point; 255 for a traced one, a code itself."""
  if not is_concrete(zero_point) or codes.dtype not in (jnp.int8, jnp.uint8):
    return 255
  zero_point = 0 if zero_point is None else zero_point
  info, zero = jnp.iinfo(codes.dtype), np.asarray(zero_point, np.float64)
  return int(max(np.max(np.abs(info.min - zero)), np.max(np.abs(info.max - zero))))


def _check_sum(
  inputs: int, x: Array, x_zero_point: Array, kernel: Array, kernel_zero_point: Array | None
) -> None:
  spreads = _spread(x, x_zero_point), _spread(kernel, kernel_zero_point)
  if inputs * spreads[0] * spreads[1] >= 2**31:
    raise ValueError(
      f'{inputs} inputs may overflow the int32 accumulator ({inputs} * {spreads[0]} * {spreads[1]} >= 2^31): '
      f'split the contraction (or clip zero points far outside of the codes).'
    )
  if np.size(x_zero_point) != 1:
    raise ValueError(
      f'x_zero_point must be a scalar; got shape {np.shape(x_zero_point)}. Per-channel activations '
      f'cannot leave the sum: reparametrize them to one scale.'
    )
