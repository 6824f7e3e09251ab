"""Learned steps of signed activations, one a channel or one a tensor, as GPLQ trains them."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.quantizers.numerics.bit_widths import Bits, check_bits, code_range
from jaxlab.quantizers.numerics.learned import scale_gradient
from jaxlab.quantizers.numerics.quantiles import select_quantiles
from jaxlab.quantizers.numerics.rounding import clip_inclusive, widen
from jaxlab.tracing import is_concrete

Array = jax.Array

FLOOR = 1e-8  # smallest step: channels that are always 0
MAX_BITS = 8


def activation_fake_quantize(
  x: Array,
  step: Array,
  bits: Bits,
  *,
  axis: int = -1,
  grad_factor: Array | float | None = None,
) -> Array:
  """Returns `clip(round(x / s), Q_n, Q_p) s`, signed, with LSQ's gradients.

  With `v = x / s`, `Q_n = -2^(b-1)`, `Q_p = 2^(b-1) - 1`: the gradient of `x` is the upstream one where
  `Q_n <= v <= Q_p`, else 0. That of a step is `g` times the sum over the elements that share it of the
  upstream one times `round(v) - v` where `Q_n < v < Q_p`, `Q_n` where `v <= Q_n`, `Q_p` where `v >= Q_p`.
  So *at* a bound both get something; `lsq_fake_quantize` differs there for the step, and in what `g`
  counts. Steps below 1e-8 count as 1e-8 and get no gradient.

  Args:
    x: float array.
    step: `[channels]` along `axis`, or a scalar.
    bits: 2 to 8; may be traced.
    axis: the channel axis.
    grad_factor: `g`; by default `1 / sqrt(N Q_p)`, N the number of elements that share a step.

  Raises:
    ValueError: for bits out of range, or steps that are neither one nor one a channel.

  References:
    Liang et al., GPLQ: A General, Practical, and Lightning QAT Method for Vision Transformers, NeurIPS 2025
    (https://arxiv.org/abs/2506.11784), equation 1; Esser et al. 2020 for the gradients.
  """
  _check_bits(bits)
  wide = widen(x)
  own = jnp.asarray(step, jnp.result_type(step, wide))
  count = x.size
  if own.ndim:
    valid = x.ndim and -x.ndim <= axis < x.ndim
    if not valid or own.shape != (x.shape[axis],):
      raise ValueError(
        f'step {own.shape} must be a scalar or have one entry a channel, axis {axis} of x {x.shape}.'
      )
    count //= x.shape[axis]
    own = own.reshape([-1 if i == axis % x.ndim else 1 for i in range(x.ndim)])
  low, high = (bound.astype(wide.dtype) for bound in code_range(bits, signed=True))
  if grad_factor is None:
    grad_factor = jax.lax.rsqrt(float(count) * high)
  own = scale_gradient(clip_inclusive(own, FLOOR, jnp.inf), grad_factor)
  return _fake_quantize(wide, own, low, high).astype(x.dtype)


@jax.custom_jvp
def _fake_quantize(x: Array, step: Array, low: Array, high: Array) -> Array:
  return jnp.clip(jnp.round(x / step), low, high) * step


@_fake_quantize.defjvp
def _fake_quantize_jvp(primals, tangents):
  x, step, low, high = primals
  ratio = x / step
  codes = jnp.clip(jnp.round(ratio), low, high)
  passed = (ratio >= low) & (ratio <= high)
  between = (ratio > low) & (ratio < high)
  # The difference element by element: over a tensor the two sums would nearly cancel.
  slope = codes - jnp.where(between, ratio, 0)
  return codes * step, jnp.where(passed, tangents[0], 0) + slope * tangents[1]


def step_of_range(minimum: Array, maximum: Array, bits: Bits) -> Array:
  """Returns `max(|minimum|, |maximum|) / Q_p`, at least 1e-8: the first steps, of any shape.

  Raises:
    ValueError: for bits out of range, or concrete bounds that are not finite.
  """
  _check_bits(bits)
  largest = jnp.maximum(jnp.abs(widen(minimum)), jnp.abs(widen(maximum)))
  if is_concrete(largest) and not np.all(np.isfinite(largest)):
    raise ValueError(
      'The range of the activations is not finite: is the calibration batch free of NaN and infinity?'
    )
  return jnp.maximum(largest / code_range(bits, signed=True)[1].astype(largest.dtype), FLOOR)


def step_of_percentiles(x: Array, bits: Bits, *, lower: float = 0.01, upper: float = 0.99) -> Array:
  """Returns `max(|p_lower|, |p_upper|) / Q_p` of all values, at least 1e-8: the first step of a tensor.

  Args:
    x: float array.
    bits: 2 to 8; may be traced.
    lower: share of the values below the lower percentile.
    upper: share below the upper one.

  Raises:
    ValueError: for bits or shares out of range, an empty array, or concrete values that are not finite.
  """
  bounds = select_quantiles(widen(x), [lower, upper])
  return step_of_range(*(bound.reshape(()) for bound in bounds), bits)


def _check_bits(bits: Bits) -> None:
  check_bits(bits, minimum=2)
  if is_concrete(bits) and np.any(np.asarray(bits) > MAX_BITS):
    raise ValueError(f'bits must lie in [2, {MAX_BITS}]; got {bits}.')
