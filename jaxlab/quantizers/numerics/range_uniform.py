"""Uniform quantizers over a learned range `[lower, upper]`: EWGS's, which QFD uses, and QFD's of features.

What is learned (both ends of the range, the scale of the output) is an argument, so that it lives in any
pytree and `jax.grad` reaches it. Half precisions are computed in float32 and returned as they came.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.quantizers.numerics.bit_widths import Bits, check_bits
from jaxlab.quantizers.numerics.rounding import widen
from jaxlab.tracing import is_concrete

Array = jax.Array

MIN_WIDTH = 1e-6  # of a range whose ends have crossed
DEAD_WIDTH = 1e-3  # of the range of activations that are all the same
HALF_NORMAL = (1 - 2 / np.pi) ** 0.5  # deviation of |x| for a standard normal x


class Range(NamedTuple):
  """The ends of a range, scalars in at least float32."""

  lower: Array
  upper: Array


def range_quantize(
  x: Array, lower: Array, upper: Array, bits: Bits, *, signed: bool | Array, delta: float = 0.0
) -> Array:
  """Returns `x` on `2^b` levels between the ends of a range, in units of the range.

    z = (x - lower) / max(upper - lower, 1e-6)
    q = round(clip(z, 0, 1) (2^b - 1)) / (2^b - 1)
    y = 2 q - 1 in [-1, 1] if signed (weights), else q in [0, 1] (activations)

  Rounding is half to even: one bit is a threshold at the middle of the range, which itself goes down. It
  passes the gradient straight through, or scaled element by element as in EWGS: `g (1 + delta sign(g) (z -
  q))`, g what arrives at the rounding. Clipping passes where `0 <= z <= 1`, *both ends inside*; there the
  ends get `dz/dlower = (z - 1) / (upper - lower)` and `dz/dupper = -z / (upper - lower)`, elsewhere
  nothing. Once the ends have crossed, the width is a constant.

  Args:
    x: float array.
    lower: end of the range, broadcasts against `x`.
    upper: the other end.
    bits: 1 to 16; may be traced.
    signed: whether the levels are symmetric about 0; may be traced.
    delta: not negative; 0 is straight-through.

  Raises:
    ValueError: for bits out of range, or a negative `delta`.

  References:
    Lee et al., Network Quantization with Element-wise Gradient Scaling, CVPR 2021
    (https://arxiv.org/abs/2104.00903) and its code; Zhu et al., Quantized Feature Distillation for Network
    Quantization, AAAI 2023 (https://arxiv.org/abs/2307.10638).

  Examples:
    >>> range_quantize(jnp.array([0.0, 0.4, 2.0]), 0.0, 1.0, 1, signed=False).tolist()
    [0.0, 0.0, 1.0]
  """
  unit, _ = _unit_levels(x, lower, upper, bits, delta)
  if isinstance(signed, bool):
    y = 2 * (unit - 0.5) if signed else unit
  else:
    y = unit + signed * (unit - 1)
  return y.astype(jnp.result_type(x))


def quantize_feature(
  features: Array,
  lower: Array,
  upper: Array,
  bits: Bits,
  *,
  units: Literal['feature', 'scaled'] = 'feature',
  beta: Array | None = None,
  delta: float = 0.0,
) -> Array:
  """Returns features on `2^b` levels, the target that QFD's teacher hands to its student.

  In `'feature'` units they are mapped back, `lower + (upper - lower) q`; in `'scaled'` ones they stay in the
  units of the range, `beta q` with a learned scalar, and the layers behind adapt. Gradients as in
  `range_quantize`; with one bit each coordinate is one of two values.

  Args:
    features: float array, e.g. pooled, `[batch, channels]`.
    lower: end of the range, a scalar.
    upper: the other end.
    bits: 1 to 16; 4 by default for classification in QFD, 8 for detection; may be traced.
    units: above.
    beta: of `'scaled'`; starts at `feature_scale`.
    delta: see `range_quantize`.

  Raises:
    ValueError: for unknown units, `beta` missing or given in vain, bits or `delta` out of range.

  References:
    Zhu et al., AAAI 2023; `'scaled'` is that of a third party's code
    (hsjo827/Quantized_Feature_Distillation).
  """
  if units not in ('feature', 'scaled'):
    raise ValueError(f"units={units!r}; choose 'feature' or 'scaled'.")
  if (beta is None) == (units == 'scaled'):
    raise ValueError(f"beta goes with units='scaled'; got beta={beta} and units={units!r}.")
  unit, (lower, width) = _unit_levels(features, lower, upper, bits, delta)
  y = lower + width * unit if units == 'feature' else jnp.asarray(beta, unit.dtype) * unit
  return y.astype(jnp.result_type(features))


def _unit_levels(
  x: Array, lower: Array, upper: Array, bits: Bits, delta: float
) -> tuple[Array, tuple[Array, Array]]:
  """Returns `q` in [0, 1], and the range as (lower, width)."""
  check_bits(bits)
  if not delta >= 0:
    raise ValueError(f'delta must not be negative, got {delta}.')
  x = widen(x)
  lower, upper = (jnp.asarray(end, jnp.result_type(end, x)) for end in (lower, upper))
  dtype = jnp.result_type(x, lower, upper)
  width = jnp.where(upper - lower >= MIN_WIDTH, upper - lower, MIN_WIDTH)
  unit = (x - lower) / width
  inside = (unit >= 0) & (unit <= 1)
  clipped = jnp.where(inside, unit, jax.lax.stop_gradient(jnp.clip(unit, 0, 1)))
  steps = (2.0 ** jnp.asarray(bits, dtype)) - 1
  return _round_scaled(clipped, steps, float(delta)), (lower, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _round_scaled(x: Array, steps: Array, delta: float) -> Array:
  return jnp.round(x * steps) / steps


def _round_scaled_fwd(x: Array, steps: Array, delta: float):
  rounded = _round_scaled(x, steps, delta)
  return rounded, (x - rounded if delta else None, steps)


def _round_scaled_bwd(delta: float, kept, g: Array):
  error, steps = kept
  scaled = g * (1 + delta * jnp.sign(g) * error) if delta else g
  return scaled, jnp.zeros_like(steps)


_round_scaled.defvjp(_round_scaled_fwd, _round_scaled_bwd)


def weight_range(weight: Array) -> Range:
  """Returns the first range of weights, `[-3 std, 3 std]` with the unbiased deviation over all of them.

  Raises:
    ValueError: for concrete weights that are not finite or all the same, which have no range.
  """
  deviation = jnp.std(widen(weight), ddof=1)
  if is_concrete(deviation) and not (np.isfinite(deviation) and deviation > 0):
    raise ValueError(
      f'Weights of deviation {deviation} have no range: are they all 0, or not finite?'
    )
  return Range(-3 * deviation, 3 * deviation)


def activation_range(x: Array, *, signed: bool | None = False) -> Range:
  """Returns the first range of activations.

  Behind a ReLU `[min x, 3 std / sqrt(1 - 2 / pi)]`, the factor that of the positive half of a normal
  distribution; signed ones (features of a ViT) `[-3 std, 3 std]`. Activations that are all the same get a
  range 0.001 wide.

  Args:
    x: float array, of a first batch.
    signed: None: whether any value is negative.

  Raises:
    ValueError: for concrete values that are not finite, or not all the same and yet above their own range.
  """
  x = widen(x)
  deviation, minimum = jnp.std(x, ddof=1), jnp.min(x)
  if is_concrete(deviation) and not (np.isfinite(deviation) and np.isfinite(minimum)):
    raise ValueError(
      'The activations of the calibration batch are not finite: is it free of NaN and infinity?'
    )
  negative = minimum < 0 if signed is None else jnp.asarray(signed)
  varies = jnp.max(x) > minimum
  lower = jnp.where(negative & varies, -3 * deviation, minimum)
  upper = 3 * deviation / jnp.where(negative, 1, HALF_NORMAL).astype(x.dtype)
  upper = jnp.where(varies, upper, lower + DEAD_WIDTH)
  if is_concrete(upper) and not upper > lower:
    raise ValueError(
      f'The range [{lower}, {upper}] does not open: the activations lie too far from 0 for their deviation.'
    )
  return Range(lower, upper)


def output_scale(exact: Array, quantized: Array) -> Array:
  """Returns EWGS's first scale of a layer's output, `mean|exact| / mean|quantized|`.

  Args:
    exact: the layer's output with float operands, without its bias.
    quantized: with operands in the units of their ranges.

  Returns:
    A scalar in at least float32; 1 where the quantized output is all 0.
  """
  sizes = [jnp.mean(jnp.abs(widen(y))) for y in (exact, quantized)]
  return jnp.where(sizes[1] > 0, sizes[0] / jnp.where(sizes[1] > 0, sizes[1], 1), 1)


def feature_scale(features: Array, lower: Array, upper: Array, bits: Bits) -> Array:
  """Returns the first `beta` of `quantize_feature`, `mean(clip(z, 0, 1)) / mean(q)`; 1 where all q are 0."""
  unit, (lower, width) = _unit_levels(features, lower, upper, bits, 0.0)
  clipped = jnp.mean(jnp.clip((widen(features) - lower) / width, 0, 1))
  level = jnp.mean(unit)
  return jnp.where(level > 0, clipped / jnp.where(level > 0, level, 1), 1)
