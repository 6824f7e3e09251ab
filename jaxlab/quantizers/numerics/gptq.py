"""GPTQ: weights rounded one input column at a time, each error compensated in the columns to come.

Frantar et al., *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers*, 2023, in
the steps of the authors' code. Per layer: accumulate the Hessian over calibration batches, then solve.

>>> import jax, jax.numpy as jnp
>>> x = jax.random.normal(jax.random.key(0), (4, 16, 8))
>>> kernel = jax.random.normal(jax.random.key(1), (8, 3))
>>> state = accumulate_hessian(init_hessian(8), x)
>>> result = gptq_kernel(kernel, state.hessian, bits=4)
>>> result.kernel.shape, result.codes.dtype, result.scale.shape
((8, 3), dtype('int32'), (1, 3))

In a transformer the layers are done in order of execution; all linear maps of a block see the inputs that the
already quantized blocks before it give.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.quantizers.numerics.affine import Bits, check_bits
from jaxlab.tracing import is_concrete

Array = jax.Array
Padding = str | Sequence[tuple[int, int]]


class HessianState(NamedTuple):
  """`(2 / n) sum x x^T` over all tokens, with `n` the number of *sequences* (or images) so far."""

  hessian: Array
  sequences: Array


class GPTQResult(NamedTuple):
  """A quantized weight. `codes` are unsigned; `x_hat = (codes - zero_point) * scale` of their group.

  Attributes:
    weight: `x_hat`, `[out, in]`.
    codes: int32 in `[0, 2^b - 1]`, `[out, in]`.
    scale: `[out, groups]`.
    zero_point: `[out, groups]`, whole numbers.
    group: int32 `[in]`, the group of each column. Runs of the axis, unless `act_order` chose the columns.
  """

  weight: Array
  codes: Array
  scale: Array
  zero_point: Array
  group: Array


class GPTQKernel(NamedTuple):
  """The same in Flax layout: `kernel` and `codes` `[..., in, out]`, `scale`, `zero_point` `[groups, out]`.

  `group` `[in * window]` belongs to the flattened inputs, channel by channel as `unfold` orders them.
  """

  kernel: Array
  codes: Array
  scale: Array
  zero_point: Array
  group: Array


def init_hessian(features: int, dtype: jnp.dtype = jnp.float32) -> HessianState:
  """Returns the state before any batch, for inputs of so many features."""
  return HessianState(jnp.zeros((features, features), dtype), jnp.zeros((), dtype))


def accumulate_hessian(state: HessianState, x: Array) -> HessianState:
  """Returns the state after a batch: `H <- H n / (n + t) + (2 / (n + t)) sum x x^T`.

  Args:
    state: from `init_hessian` or an earlier batch.
    x: inputs of the layer: `[sequences, tokens..., features]`, or one sequence `[tokens, features]`; for a
      convolution those of `unfold`. May be sharded: sums are global.
  """
  features = state.hessian.shape[0]
  if x.ndim < 2 or x.shape[-1] != features:
    raise ValueError(f'x of shape {x.shape}: expected [sequences, tokens, {features}].')
  batch = x.shape[0] if x.ndim > 2 else 1
  total = state.sequences + batch
  rows = jnp.sqrt(2 / total) * x.reshape(-1, features).astype(state.hessian.dtype)
  product = jnp.matmul(rows.T, rows, precision='highest')
  return HessianState(state.hessian * (state.sequences / total) + product, total)


def unfold(
  x: Array,
  kernel_size: tuple[int, int],
  strides: tuple[int, int] = (1, 1),
  padding: Padding = 'SAME',
  dilation: tuple[int, int] = (1, 1),
) -> Array:
  """Returns the patches a convolution sees: `[batch, height, width, channels * window]`, channels slowest.

  Args:
    x: `[batch, height, width, channels]`.
    kernel_size: height and width of the window.
    strides: of the convolution.
    padding: of the convolution.
    dilation: of the kernel.
  """
  return jax.lax.conv_general_dilated_patches(
    x,
    kernel_size,
    strides,
    padding,
    rhs_dilation=dilation,
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    precision=jax.lax.Precision.HIGHEST,
  )


def row_params(
  weight: Array, bits: Bits, *, symmetric: bool = False, mse: bool = False
) -> tuple[Array, Array]:
  """Returns GPTQ's `(scale, zero_point)` over the last axis of `weight`, for codes `[0, 2^b - 1]`.

  The range always contains 0; a row of zeros has the range (-1, 1). Asymmetric: `s = (max - min) /
  (2^b - 1)`, `z = round(-min / s)`. Symmetric: `min = -max|w|` if any element is negative, `z = 2^(b-1)`
  whatever the range, so that without a negative element half of the codes do nothing.

  Args:
    weight: `[..., in]`.
    bits: code width; may be traced.
    symmetric: see above.
    mse: tries ranges of 1, 0.99, ..., 0.21 of the full one and takes the one with the least
      `sum |w - w_hat|^2.4`; of equal ones the first. `z` follows the range, except if symmetric.
  """
  weight = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
  high = jnp.asarray(2.0, weight.dtype) ** jnp.asarray(bits, weight.dtype) - 1
  low_end = jnp.minimum(jnp.min(weight, -1), 0)
  high_end = jnp.maximum(jnp.max(weight, -1), 0)
  if symmetric:
    high_end = jnp.maximum(-low_end, high_end)
    low_end = jnp.where(low_end < 0, -high_end, low_end)
  empty = (low_end == 0) & (high_end == 0)
  low_end, high_end = jnp.where(empty, -1, low_end), jnp.where(empty, 1, high_end)

  def params(shrink: Array) -> tuple[Array, Array]:
    scale = (high_end * shrink - low_end * shrink) / high
    if symmetric:
      return scale, jnp.full_like(scale, (high + 1) / 2)
    return scale, jnp.round(-low_end * shrink / scale)

  if not mse:
    return params(jnp.ones((), weight.dtype))

  def visit(i, best):
    scale, zero_point = params(1 - i.astype(weight.dtype) / 100)
    codes = _codes(weight, scale[..., None], zero_point[..., None], high)
    error = (codes - zero_point[..., None]) * scale[..., None] - weight
    error = jnp.sum(jnp.abs(error) ** 2.4, -1)
    new = (error, scale, zero_point)
    return tuple(jnp.where(error < best[0], n, old) for n, old in zip(new, best, strict=True))

  scale, zero_point = params(jnp.ones((), weight.dtype))
  start = (jnp.full_like(scale, jnp.inf), scale, zero_point)
  return jax.lax.fori_loop(0, 80, visit, start)[1:]


def _codes(weight: Array, scale: Array, zero_point: Array, high: Array) -> Array:
  return jnp.clip(jnp.round(weight / scale) + zero_point, 0, high)


def gptq(
  weight: Array,
  hessian: Array,
  bits: Bits = 4,
  *,
  symmetric: bool = False,
  mse: bool = False,
  group_size: int | None = None,
  block_size: int = 128,
  damping: float = 0.01,
  act_order: bool = False,
  static_groups: bool = False,
) -> GPTQResult:
  """Quantizes a weight so that the layer's output on the calibration data changes little.

  One jitted function for each shape and set of flags; `bits` and `damping` may vary without a compilation.

  Args:
    weight: `[out, in]`. An input that was always 0 (a zero on the Hessian's diagonal) gets weights of 0.
    hessian: `[in, in]`, see `accumulate_hessian`.
    bits: 2 to 16.
    symmetric: see `row_params`.
    mse: see `row_params`.
    group_size: columns that share a scale; None: all. A group's parameters are computed when its first
      column is reached, from weights with the updates of the blocks *before* the current one.
    block_size: columns that are updated at once; the later ones are updated after each block. For a fixed
      order it changes nothing but speed, and which updates a group's parameters have seen.
    damping: this share of the diagonal's mean is added to the diagonal.
    act_order: takes the columns by falling diagonal. Groups are then runs of that order.
    static_groups: computes all groups' parameters beforehand, from the weight as it is; a column keeps the
      group of its place in the weight, also under `act_order`.

  Raises:
    ValueError: for shapes that do not fit, bits or damping out of range, non-finite input, or a Hessian
      that is not positive definite in spite of the damping.
  """
  _check(weight, hessian, bits, group_size, block_size, damping)
  result = _gptq(
    weight,
    hessian,
    bits,
    damping,
    symmetric=symmetric,
    mse=mse,
    group_size=group_size,
    block_size=min(block_size, weight.shape[1]),
    act_order=act_order,
    static_groups=static_groups,
  )
  if is_concrete(result.weight) and not np.all(np.isfinite(result.weight)):
    raise ValueError(
      f'The damped Hessian is not positive definite (damping={damping}): use more calibration data or a '
      f'larger damping.'
    )
  return result


def _check(weight, hessian, bits, group_size, block_size, damping) -> None:
  check_bits(bits, minimum=2)
  if weight.ndim != 2 or hessian.shape != (weight.shape[-1],) * 2:
    raise ValueError(
      f'weight {weight.shape} and hessian {hessian.shape}: expected [out, in] and [in, in].'
    )
  if block_size < 1 or (group_size is not None and group_size < 1):
    raise ValueError(
      f'block_size={block_size} and group_size={group_size} must be positive (group_size None: one group).'
    )
  if is_concrete(damping) and np.asarray(damping) < 0:
    raise ValueError(f'damping={damping} must not be negative.')
  for name, value in (('weight', weight), ('hessian', hessian)):
    if is_concrete(value) and not np.all(np.isfinite(value)):
      raise ValueError(f'{name} holds NaN or infinity: are weights and calibration data finite?')


_FLAGS = ('symmetric', 'mse', 'group_size', 'block_size', 'act_order', 'static_groups')


@functools.partial(jax.jit, static_argnames=_FLAGS)
def _gptq(
  weight: Array,
  hessian: Array,
  bits: Bits,
  damping: Array,
  *,
  symmetric: bool,
  mse: bool,
  group_size: int | None,
  block_size: int,
  act_order: bool,
  static_groups: bool,
) -> GPTQResult:
  given = weight.dtype
  dtype = jnp.promote_types(jnp.promote_types(weight.dtype, hessian.dtype), jnp.float32)
  weight, hessian = weight.astype(dtype), hessian.astype(dtype)
  rows, columns = weight.shape
  high = jnp.asarray(2.0, dtype) ** jnp.asarray(bits, dtype) - 1
  params = functools.partial(row_params, bits=bits, symmetric=symmetric, mse=mse)
  # Without groups the range is that of the whole weight, dead inputs included.
  whole = params(weight[:, None]) if group_size is None else None
  group_size = group_size or columns
  groups = -(-columns // group_size)

  diagonal = jnp.diagonal(hessian)
  dead = diagonal == 0
  hessian = hessian + jnp.diag(dead.astype(dtype))
  weight = jnp.where(dead, 0, weight)
  diagonal = jnp.diagonal(hessian)

  # Zeros change no range that contains 0, so that a last, shorter group may be filled with them.
  grouped = jnp.pad(weight, ((0, 0), (0, groups * group_size - columns)))
  grouped = grouped.reshape(rows, groups, group_size)
  beforehand = static_groups or groups == 1
  if whole is not None:
    scales, zeros = whole
  else:
    scales, zeros = params(grouped) if beforehand else (jnp.ones((rows, groups), dtype),) * 2

  order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(columns)
  weight, hessian = weight[:, order], hessian[order][:, order]
  group_of = (order if static_groups else jnp.arange(columns)) // group_size
  hessian = hessian + damping * jnp.mean(diagonal) * jnp.eye(columns, dtype=dtype)
  factor = jax.scipy.linalg.cho_factor(hessian, lower=True)
  inverse = jax.scipy.linalg.cho_solve(factor, jnp.eye(columns, dtype=dtype))
  upper = jnp.linalg.cholesky(inverse, upper=True)

  # Whole blocks, and whole groups for the slices below; an added column is 0 and touches no other.
  blocks = -(-columns // block_size)
  width = max(blocks * block_size, groups * group_size)
  extra = width - columns
  weight = jnp.pad(weight, ((0, 0), (0, extra)))
  upper = jnp.pad(upper, ((0, extra), (0, extra))) + jnp.diag(jnp.arange(width) >= columns)
  group_of = jnp.pad(group_of, (0, extra), mode='edge')

  def visit_block(b, carry):
    outer, codes, quantized, scales, zeros = carry
    start = b * block_size
    block = jax.lax.dynamic_slice_in_dim(outer, start, block_size, 1)
    upper_rows = jax.lax.dynamic_slice_in_dim(upper, start, block_size, 0)
    upper_block = jax.lax.dynamic_slice_in_dim(upper_rows, start, block_size, 1)

    def visit_column(i, inner):
      block, errors, codes, quantized, scales, zeros = inner
      column = start + i
      group = group_of[column]
      if not beforehand:
        starts = (column % group_size == 0) & (column < columns)
        scale, zero = jax.lax.cond(
          starts,
          lambda: params(jax.lax.dynamic_slice_in_dim(outer, column, group_size, 1)),
          lambda: (scales[:, group], zeros[:, group]),
        )
        scales, zeros = scales.at[:, group].set(scale), zeros.at[:, group].set(zero)
      scale, zero = scales[:, group], zeros[:, group]
      code = _codes(block[:, i], scale, zero, high)
      value = (code - zero) * scale
      error = (block[:, i] - value) / upper_block[i, i]
      block = block - error[:, None] * upper_block[i]
      return (
        block,
        errors.at[:, i].set(error),
        codes.at[:, column].set(code),
        quantized.at[:, column].set(value),
        scales,
        zeros,
      )

    inner = (block, jnp.zeros_like(block), codes, quantized, scales, zeros)
    inner = jax.lax.fori_loop(0, block_size, visit_column, inner)
    _, errors, codes, quantized, scales, zeros = inner
    later = jnp.arange(width) >= start + block_size
    update = jnp.matmul(errors, upper_rows, precision='highest')
    outer = outer - jnp.where(later, update, 0)
    return outer, codes, quantized, scales, zeros

  carry = (weight, jnp.zeros_like(weight), jnp.zeros_like(weight), scales, zeros)
  _, codes, quantized, scales, zeros = jax.lax.fori_loop(0, blocks, visit_block, carry)
  back = jnp.argsort(order)
  return GPTQResult(
    quantized[:, :columns][:, back].astype(given),
    codes[:, :columns][:, back].astype(jnp.int32),
    scales,
    zeros,
    group_of[:columns][back].astype(jnp.int32),
  )


def gptq_kernel(kernel: Array, hessian: Array, bits: Bits = 4, **options) -> GPTQKernel:
  """Quantizes a Flax kernel `[in, out]` (dense) or `[height, width, in, out]` (convolution) by `gptq`.

  Args:
    kernel: for a convolution, its window and inputs are flattened channel by channel, as `unfold` does.
    hessian: over the layer's inputs, for a convolution over `unfold`ed ones: `[in * window] * 2`. (For a
      grouped convolution call it for each group's kernel and inputs.)
    bits: 2 to 16.
    **options: see `gptq`.
  """
  return _flax_layout(gptq(_rows(kernel), hessian, bits, **options), kernel.shape)


@jax.jit
def _rows(kernel: Array) -> Array:
  return jnp.moveaxis(kernel, -2, 0).reshape(-1, kernel.shape[-1]).T


@functools.partial(jax.jit, static_argnames='shape')
def _flax_layout(result: GPTQResult, shape: tuple[int, ...]) -> GPTQKernel:
  *window, inputs, outputs = shape

  def restore(matrix: Array) -> Array:
    return jnp.moveaxis(matrix.T.reshape(inputs, *window, outputs), 0, -2)

  return GPTQKernel(
    restore(result.weight),
    restore(result.codes),
    result.scale.T,
    result.zero_point.T,
    result.group,
  )


def output_error(weight: Array, quantized: Array, state: HessianState) -> Array:
  """Returns `sum ||(W_hat - W) x||^2` over all calibration tokens, from the Hessian alone: a scalar.

  Args:
    weight: `[out, in]`.
    quantized: `[out, in]`.
    state: after all batches.
  """
  difference = (quantized - weight).astype(state.hessian.dtype)
  product = jnp.matmul(difference, state.hessian, precision='highest')
  return jnp.sum(product * difference) * state.sequences / 2


def dequantize_groups(codes: Array, scale: Array, zero_point: Array, group: Array) -> Array:
  """Returns `(codes - z[:, group]) * s[:, group]` of a `GPTQResult`: its `weight`, bit for bit."""
  return (codes.astype(scale.dtype) - zero_point[:, group]) * scale[:, group]
