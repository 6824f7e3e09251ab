"""Adding a fitted linear compensation to a block's output, in half precision or float (QwT)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxlab.quantizers.compensation.conv import convolve
from jaxlab.quantizers.compensation.linear import HIGHEST, LinearCompensation

Array = jax.Array
HALF_MAX = 65504.0  # largest finite IEEE float16


@functools.partial(jax.jit, static_argnames='dtype')
def apply_linear_compensation(
  y: Array, x: Array, compensation: LinearCompensation, dtype: Any = jnp.float16
) -> Array:
  """Returns `y + x W + b`, the compensated output of a block.

  With a 16-bit `dtype`, x and W are rounded to it, the product is accumulated in float32 and rounded
  once, and the bias is added in float32: QwT's evaluation. If a value overflows float16, the product of
  this call is taken in float32.

  Args:
    y: output of the quantized block, `[..., out]`.
    x: its input, `[..., in]`; for a convolution `[batch, height, width, in]`.
    compensation: weight `[in, out]`, or HWIO: a grouped convolution with padding k // 2 and the stride that
      the sizes of x and y say (`conv.stride_of`).
    dtype: of the product's operands: float16, bfloat16 or float32 (as precise as x).
  """
  x, y = jnp.asarray(x), jnp.asarray(y)
  product = compensation_product(x, compensation.weight, y.shape, dtype)
  wide = jnp.promote_types(y.dtype, jnp.float32)
  return (y.astype(wide) + product.astype(wide) + compensation.bias.astype(wide)).astype(y.dtype)


def compensation_product(x: Array, weight: Array, out_shape: tuple, dtype: Any) -> Array:
  """Returns `x W` (or the convolution of x) with operands of `dtype`, in at least float32."""
  wide = jnp.promote_types(jnp.promote_types(x.dtype, weight.dtype), jnp.float32)

  def product(a, b, accumulate):
    if b.ndim == 4:
      return convolve(a, b, out_shape, accumulate)
    return jnp.matmul(a, b, precision=HIGHEST, preferred_element_type=accumulate)

  def multiply(narrow, accumulate):
    a, b = x.astype(narrow), weight.astype(narrow)
    if jnp.dtype(narrow).itemsize >= jnp.dtype(accumulate).itemsize:
      return product(a, b, accumulate)
    # The product of two rounded values is exact in float32, in which a CPU multiplies much faster.
    return lax.platform_dependent(
      a,
      b,
      cpu=lambda a, b: product(a.astype(accumulate), b.astype(accumulate), accumulate),
      default=lambda a, b: product(a, b, accumulate),
    )

  dtype = jnp.dtype(dtype)
  if dtype not in (jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16)):
    return multiply(wide, wide)
  accumulated = multiply(dtype, jnp.float32)
  rounded = accumulated.astype(dtype).astype(wide)
  if dtype == jnp.bfloat16:
    return rounded
  fits = jnp.all(jnp.abs(accumulated) <= HALF_MAX)
  return lax.cond(fits, lambda: rounded, lambda: multiply(wide, wide))
