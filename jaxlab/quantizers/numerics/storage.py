"""A quantized array at its real size.

>>> stored = store(AffineQuantizer(4, 'symmetric', 'channel'), jnp.ones((64, 8)))
>>> stored.codes.nbytes, bool(jnp.allclose(stored.dequantize(), 1))
(256, True)
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.quantizers.numerics import affine
from jaxlab.quantizers.numerics.affine import AffineParams, AffineQuantizer
from jaxlab.quantizers.numerics.integers import pack_int4, unpack_int4
from jaxlab.tracing import is_concrete

Array = jax.Array


class QuantizedArray(flax.struct.PyTreeNode):
  """Codes of an affine quantizer in as few bytes as they take, with what gives their values back.

  Attributes:
    codes: up to 4 bits two a byte along the second last axis (the last of a vector, and where the second last
      has one element, as in depthwise kernels), uint8; up to 8 bits int8 or uint8; else int16 or uint16. (2
      and 3 bits take 4.)
    scale: as in `AffineParams`, in its dtype.
    zero_point: the same; None for symmetric rules.
    quantizer: static choices.
    shape: of the array.
  """

  codes: Array
  scale: Array
  zero_point: Array | None
  quantizer: AffineQuantizer = flax.struct.field(pytree_node=False)
  shape: tuple[int, ...] = flax.struct.field(pytree_node=False)

  def integer_codes(self) -> Array:
    """Returns the unpacked codes in the array's shape, int8, uint8, int16 or uint16."""
    if self.quantizer.bits > 4:
      return self.codes
    axis = _packed_axis(self.shape)
    if self.codes.shape == self.shape and self.shape[axis] > 1:
      axis = -2  # written when one element was packed alone
    return unpack_int4(self.codes, self.shape[axis], axis=axis, signed=self.quantizer.signed)

  def dequantize(self, dtype: jnp.dtype = jnp.float32) -> Array:
    """Returns the values, bit for bit those of `affine.fake_quantize` where the scale is not 0."""
    quantizer = self.quantizer
    low, high = affine.code_range(quantizer.bits, quantizer.signed, quantizer.narrow)
    zero_point = jnp.zeros_like(self.scale) if self.zero_point is None else self.zero_point
    params = AffineParams(self.scale, zero_point, low, high)
    return affine.dequantize(quantizer, self.integer_codes(), params, dtype)


def store(
  quantizer: AffineQuantizer, x: Array, params: AffineParams | None = None
) -> QuantizedArray:
  """Returns `x` quantized, at its real size.

  Args:
    quantizer: static choices; its `bits` is the width of the codes.
    x: float array of at least one dimension.
    params: from `calibrate` or `params_from_range`; by default the extremes of `x`.

  Raises:
    ValueError: for a constant range other than 0 (no scale, so no codes that give it back), or params of
      another width.
  """
  if x.ndim == 0:
    raise ValueError('x is a scalar; keep it as a float.')
  if params is None:
    params = affine.calibrate(quantizer, x)
  low, high = affine.code_range(quantizer.bits, quantizer.signed, quantizer.narrow)
  if _differ(params.low, low) or _differ(params.high, high):
    raise ValueError(
      f'params are for codes [{params.low}, {params.high}], the quantizer has {quantizer.bits} bits.'
    )
  if is_concrete(x) and is_concrete(params.scale):
    cut = affine.cut_groups(quantizer, np.asarray(x))
    if np.any((np.asarray(params.scale) == 0) & (cut != 0)):
      raise ValueError(
        f'A range without extent in an array {x.shape} holds values other than 0, which a scale of 0 cannot '
        f"give back: use rule='symmetric', or keep the array as floats."
      )
  width = 8 if quantizer.bits <= 8 else 16
  codes = affine.quantize(
    quantizer, x, params, jnp.dtype(f'{"" if quantizer.signed else "u"}int{width}')
  )
  codes = pack_codes(codes, quantizer.bits)
  zero_point = None if quantizer.signed else params.zero_point
  return QuantizedArray(codes, params.scale, zero_point, quantizer, tuple(x.shape))


def _differ(a: Array, b: Array) -> bool:
  return is_concrete(a) and is_concrete(b) and np.any(np.asarray(a) != np.asarray(b))


def pack_codes(codes: Array, bits: int) -> Array:
  """Returns codes of so many bits as a `QuantizedArray` holds them."""
  return pack_int4(codes, _packed_axis(codes.shape)) if bits <= 4 else codes


def _packed_axis(shape: tuple[int, ...]) -> int:
  return -2 if len(shape) > 1 and shape[-2] > 1 else -1
