"""8-bit floats with delayed scaling: saturating casts, scales from past maxima, a linear layer both ways.

The recipe of NVIDIA's Transformer Engine: `float8_e4m3fn` for activations and weights, `float8_e5m2` for
gradients, one scale a tensor from the largest magnitude of the last 16 steps, sums in float32.

`flax.linen.fp8_ops` has the same recipe within flax's layers (`dot_general_cls`), and differs in this: it
keeps and divides by the reciprocal of the scale, in the compute dtype; it pushes maxima that are not
finite into its history, where they hold the scale for as many steps as the history is long; its scales and
histories are variables that a train state of its own overwrites by their gradients. qwix scales by the
current maximum. So both are left aside here; the products themselves are jax's `dot_general` of float8
operands.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxlab.tracing import is_concrete

Array = jax.Array

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
HISTORY = 16


def cast_saturating(x: Array, dtype: DTypeLike) -> Array:
  """Returns `x` in a float8 dtype, values beyond its largest (448, or 57344) clipped to it.

  Without the clipping the cast gives NaN (E4M3) or infinity (E5M2). Rounding is to nearest, half to even; NaN
  stays NaN.

  Args:
    x: float array.
    dtype: `jnp.float8_e4m3fn` or `jnp.float8_e5m2`.

  Raises:
    ValueError: for another dtype, or what is not floating.

  Examples:
    >>> cast_saturating(jnp.array([500.0, -0.3]), jnp.float8_e4m3fn).astype(float).tolist()
    [448.0, -0.3125]
  """
  top, x = _largest(dtype), jnp.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f'x must be floating, got {x.dtype}.')
  # In float32, where both limits are numbers.
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return _round_to_odd(jnp.clip(wide, -top, top)).astype(dtype)


@jax.custom_jvp
def _round_to_odd(x: Array) -> Array:
  """Returns `x` with 6 bits behind the leading one, the last one set where anything was cut off.

  XLA may round to float16 on its way to float8 (that of jax 0.8 on CPUs, without fusion emitters), which then
  rounds ties that are none. Rounding to odd first makes every further rounding to at most 4 bits that of `x`
  itself (Boldo & Melquiond, IEEE Transactions on Computers 2008).
  """
  info = jnp.finfo(x.dtype)
  unsigned = {32: jnp.uint32, 64: jnp.uint64}[info.bits]
  last = unsigned(1 << (info.nmant - 6))
  raw = jax.lax.bitcast_convert_type(x, unsigned)
  cut = raw & (last - unsigned(1))
  return jax.lax.bitcast_convert_type(jnp.where(cut > 0, (raw - cut) | last, raw), x.dtype)


@_round_to_odd.defjvp
def _round_to_odd_jvp(primals, tangents):
  return _round_to_odd(*primals), tangents[0]


def float8_fake_quantize(x: Array, scale: Array, dtype: DTypeLike) -> Array:
  """Returns `cast_saturating(x scale) / scale` in the dtype of `x`.

  Args:
    x: float array.
    scale: positive, in float32: multiplied by before the cast, divided by behind it.
    dtype: float8.

  Raises:
    ValueError: for another dtype, or a concrete scale that is not positive and finite.
  """
  scale = _checked(scale)
  wide = jnp.promote_types(jnp.result_type(x), jnp.float32)
  codes = cast_saturating(jnp.asarray(x, wide) * scale, dtype).astype(wide)
  # A divisor for each element: by one for all, XLA multiplies with its reciprocal, which rounds once more.
  return (codes / (scale + 0 * codes)).astype(jnp.result_type(x))


class DelayedScale(NamedTuple):
  """State of one tensor's scaling.

  Attributes:
    history: float32 `[length]`, the largest magnitudes of the last steps, the newest first.
    scale: float32, what the tensor is multiplied by in the next step.
  """

  history: Array
  scale: Array


def init_delayed_scale(length: int = HISTORY) -> DelayedScale:
  """Returns the state before the first step: a history of zeros, scale 1.

  Raises:
    ValueError: if the length is not positive.
  """
  if length < 1:
    raise ValueError(f'length must be positive, got {length}.')
  return DelayedScale(jnp.zeros(length, jnp.float32), jnp.float32(1))


def update_delayed_scale(
  state: DelayedScale, amax: Array, dtype: DTypeLike, *, margin: float = 0
) -> DelayedScale:
  """Returns the state behind a step, `scale = largest(dtype) / max(history) / 2^margin`.

  The scale stays as it is while the history is all 0, or where the quotient is not positive and finite. A
  maximum that is not finite leaves history and scale alone.

  Args:
    state: of the tensor.
    amax: `max |x|` of this step, a scalar.
    dtype: float8 of the tensor.
    margin: in bits, a reserve for growing tensors.

  Raises:
    ValueError: for another dtype.
  """
  top = _largest(dtype)
  amax = jax.lax.stop_gradient(jnp.asarray(amax, jnp.float32))
  pushed = jnp.concatenate([amax[None], state.history[:-1]])
  history = jnp.where(jnp.isfinite(amax), pushed, state.history)
  largest = jnp.max(history)
  scale = jnp.float32(top) / jnp.where(largest > 0, largest, 1) / jnp.float32(2.0**margin)
  good = (largest > 0) & jnp.isfinite(scale) & (scale > 0)
  return DelayedScale(history, jnp.where(good, scale, state.scale))


class Float8Scales(NamedTuple):
  """What the three tensors of a product are multiplied by, float32 scalars."""

  x: Array
  kernel: Array
  gradient: Array


@jax.custom_vjp
def float8_dot(x: Array, kernel: Array, scales: Float8Scales, probe: Array) -> Array:
  """Returns `x @ kernel` of float8 operands: E4M3 forward, the gradient in E5M2 in both products backward.

    y  = (x8 @ w8) / (s_x s_w),  x8 = cast(x s_x), w8 = cast(w s_w)
    dx = (g8 @ w8^T) / (s_g s_w),  dw = (x8^T @ g8) / (s_x s_g),  g8 = cast(g s_g)

  with sums in float32. Gradients pass values that were clipped, too.

  Args:
    x: `[..., in]`, float.
    kernel: `[in, out]`, float.
    scales: of this step.
    probe: any scalar; its "gradient" is `max |g|`, which the next step's scale needs and only the backward
      pass knows. (The scales have none.)

  Returns:
    `[..., out]`, in the common dtype of `x` and `kernel`.
  """
  return _forward(x, kernel, scales, probe)[0]


def _forward(x: Array, kernel: Array, scales: Float8Scales, probe: Array) -> tuple[Array, Any]:
  if kernel.ndim != 2 or x.shape[-1] != kernel.shape[0]:
    raise ValueError(
      f'float8_dot takes x [..., in] and a kernel [in, out], got {x.shape} and {kernel.shape}.'
    )
  scales = Float8Scales(*map(_checked, scales))
  x8 = cast_saturating(x.astype(jnp.float32) * scales.x, E4M3)
  w8 = cast_saturating(kernel.astype(jnp.float32) * scales.kernel, E4M3)
  y = _product(x8.reshape(-1, x.shape[-1]), w8, 1, 0) / (scales.x * scales.kernel)
  y = y.reshape(*x.shape[:-1], kernel.shape[-1]).astype(jnp.result_type(x, kernel))
  # Of the operands only their dtypes are kept.
  like = jnp.zeros((), x.dtype), jnp.zeros((), kernel.dtype), jnp.zeros((), jnp.result_type(probe))
  return y, (x8, w8, scales, like)


def _backward(kept: Any, g: Array) -> tuple[Array, Array, Float8Scales, Array]:
  x8, w8, scales, like = kept
  wide = g.astype(jnp.float32)
  g8 = cast_saturating(wide * scales.gradient, E5M2).reshape(-1, g.shape[-1])
  dx = _product(g8, w8, 1, 1) / (scales.gradient * scales.kernel)
  dw = _product(x8.reshape(-1, x8.shape[-1]), g8, 0, 0) / (scales.x * scales.gradient)
  dx, dw = (d.astype(own.dtype) for d, own in zip((dx.reshape(x8.shape), dw), like))
  nothing = jax.tree.map(jnp.zeros_like, scales)
  return dx, dw, nothing, jnp.max(jnp.abs(wide)).astype(like[2].dtype)


float8_dot.defvjp(_forward, _backward)


@jax.custom_vjp
def float8_round(x: Array, scale: Array, gradient_scale: Array, probe: Array) -> Array:
  """Returns `x` rounded to E4M3; its gradient is rounded to E5M2. `probe` as in `float8_dot`."""
  return float8_fake_quantize(x, scale, E4M3)


def _round_forward(x: Array, scale: Array, gradient_scale: Array, probe: Array):
  like = jnp.zeros((), jnp.result_type(probe))
  return float8_fake_quantize(x, scale, E4M3), (scale, gradient_scale, like)


def _round_backward(kept: Any, g: Array):
  scale, gradient_scale, like = kept
  amax = jnp.max(jnp.abs(g)).astype(like.dtype)
  rounded = float8_fake_quantize(g, gradient_scale, E5M2)
  return rounded, jnp.zeros_like(scale), jnp.zeros_like(gradient_scale), amax


float8_round.defvjp(_round_forward, _round_backward)


def _product(a: Array, b: Array, of_a: int, of_b: int) -> Array:
  """Returns the product over an axis of each, summed in float32."""
  return jax.lax.dot_general(
    a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32
  )


def _largest(dtype: DTypeLike) -> float:
  if jnp.dtype(dtype) not in (jnp.dtype(E4M3), jnp.dtype(E5M2)):
    raise ValueError(f'dtype must be float8_e4m3fn or float8_e5m2, got {jnp.dtype(dtype).name}.')
  return float(jnp.finfo(dtype).max)


def _checked(scale: Array) -> Array:
  if is_concrete(scale) and not np.all((np.asarray(scale) > 0) & np.isfinite(np.asarray(scale))):
    raise ValueError(f'A float8 scale must be positive and finite, got {scale}.')
  return jnp.asarray(scale, jnp.float32)
