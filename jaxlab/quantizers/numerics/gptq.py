"""GPTQ: weights rounded one input column at a time, each error compensated in the columns to come.

Frantar et al., *GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers*, 2023, in
the steps of the authors' code. Per layer: accumulate the Hessian over calibration batches, then solve.

>>> import jax, jax.numpy as jnp
>>> from jaxlab.quantizers.numerics.hessians import accumulate_hessian, init_hessian
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
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.quantizers.numerics.bit_widths import Bits, check_bits
from jaxlab.tracing import is_concrete

Array = jax.Array


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


def row_params(
  weight: Array,
  bits: Bits,
  *,
  symmetric: bool = False,
  mse: bool = False,
  one_sided: bool = False,
) -> tuple[Array, Array]:
  """Returns GPTQ's `(scale, zero_point)` over the last axis of `weight`, for codes `[0, 2^b - 1]`.

  The range always contains 0; a row of zeros has the range (-1, 1). Asymmetric: `s = (max - min) /
  (2^b - 1)`, `z = round(-min / s)`. Symmetric: `s = 2 max|w| / (2^b - 1)`, `z = 2^(b-1)`.

  Args:
    weight: `[..., in]`.
    bits: code width; may be traced.
    symmetric: see above.
    mse: tries ranges of 1, 0.99, ..., 0.21 of the full one and takes the one with the least
      `sum |w - w_hat|^2.4`; of equal ones the first. `z` follows the range, except if symmetric.
    one_sided: if symmetric, takes half of the step for a row without a negative element, as the authors' code
      does: with the same `z` half of the codes do nothing there, and larger weights saturate.
  """
  weight = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
  high = jnp.asarray(2.0, weight.dtype) ** jnp.asarray(bits, weight.dtype) - 1
  low_end = jnp.minimum(jnp.min(weight, -1), 0)
  high_end = jnp.maximum(jnp.max(weight, -1), 0)
  if symmetric:
    high_end = jnp.maximum(-low_end, high_end)
    low_end = jnp.where(low_end < 0, -high_end, low_end) if one_sided else -high_end
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
  one_sided: bool = False,
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
    hessian: `[in, in]`, see `hessians.accumulate_hessian`.
    bits: 2 to 16.
    symmetric: see `row_params`.
    mse: see `row_params`.
    one_sided: see `row_params`.
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
  flags = {
    'symmetric': symmetric,
    'mse': mse,
    'one_sided': one_sided,
    'group_size': group_size,
    'block_size': block_size,
    'act_order': act_order,
    'static_groups': static_groups,
  }
  return _solved(_gptq, weight, weight.shape, hessian, bits, damping, flags)


def _solved(
  program: Callable[..., Any],
  weight: Array,
  shape: tuple[int, ...],
  hessian: Array,
  bits: Bits,
  damping: Array,
  flags: dict[str, Any],
) -> Any:
  """Returns what a jitted program finds for a weight, as a matrix of this shape; checks both."""
  _check(weight, shape, hessian, bits, flags['group_size'], flags['block_size'], damping)
  block_size = min(flags['block_size'], shape[1])
  result = program(weight, hessian, bits, damping, **{**flags, 'block_size': block_size})
  if is_concrete(result[0]) and not np.all(np.isfinite(result[0])):
    raise ValueError(
      f'The damped Hessian is not positive definite (damping={damping}): use more calibration data or a '
      f'larger damping.'
    )
  return result


def _check(weight, shape, hessian, bits, group_size, block_size, damping) -> None:
  check_bits(bits, minimum=2)
  if len(shape) != 2 or hessian.shape != (shape[-1],) * 2:
    raise ValueError(
      f'weight {shape} and hessian {hessian.shape}: expected [out, in] and [in, in].'
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


_FLAGS = (
  'symmetric', 'mse', 'one_sided', 'group_size', 'block_size', 'act_order', 'static_groups',
)  # fmt: skip


@functools.partial(jax.jit, static_argnames=_FLAGS)
def _gptq(
  weight: Array,
  hessian: Array,
  bits: Bits,
  damping: Array,
  *,
  symmetric: bool,
  mse: bool,
  one_sided: bool,
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
  rule = {'symmetric': symmetric, 'mse': mse, 'one_sided': one_sided}
  params = functools.partial(row_params, bits=bits, **rule)
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

  order = jnp.argsort(-diagonal, stable=True) if act_order else None
  group_of = jnp.arange(columns) // group_size
  if act_order:
    weight, hessian = weight[:, order], hessian[order][:, order]
    group_of = order // group_size if static_groups else group_of
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
          lambda: (_column(scales, group), _column(zeros, group)),
        )
        scales, zeros = _with_column(scales, scale, group), _with_column(zeros, zero, group)
      scale, zero = _column(scales, group), _column(zeros, group)
      own, row = _column(block, i), jax.lax.dynamic_slice_in_dim(upper_block, i, 1, 0)
      code = _codes(own, scale, zero, high)
      value = (code - zero) * scale
      error = (own - value) / _column(row, i)
      block = block - error[:, None] * row
      return (
        block,
        _with_column(errors, error, i),
        _with_column(codes, code, column),
        _with_column(quantized, value, column),
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
  quantized, codes, group_of = quantized[:, :columns], codes[:, :columns], group_of[:columns]
  if act_order:
    back = jnp.argsort(order)
    quantized, codes, group_of = quantized[:, back], codes[:, back], group_of[back]
  return GPTQResult(
    quantized.astype(given), codes.astype(jnp.int32), scales, zeros, group_of.astype(jnp.int32)
  )


# Slices, not gathers and scatters, which XLA takes long to compile and to run on a CPU.
def _column(matrix: Array, index: Array) -> Array:
  return jax.lax.dynamic_slice_in_dim(matrix, index, 1, 1)[:, 0]


def _with_column(matrix: Array, column: Array, index: Array) -> Array:
  return jax.lax.dynamic_update_slice_in_dim(matrix, column[:, None], index, 1)


def gptq_kernel(kernel: Array, hessian: Array, bits: Bits = 4, **options) -> GPTQKernel:
  """Quantizes a Flax kernel `[in, out]` (dense) or `[height, width, in, out]` (convolution) by `gptq`.

  Args:
    kernel: for a convolution, its window and inputs are flattened channel by channel, as `unfold` does.
    hessian: over the layer's inputs, for a convolution over `unfold`ed ones: `[in * window] * 2`. (For a
      grouped convolution call it for each group's kernel and inputs.)
    bits: 2 to 16.
    **options: see `gptq`.

  Raises:
    ValueError: as `gptq`.
    TypeError: for an option that it does not have.
  """
  known = gptq.__kwdefaults__
  if unknown := [name for name in options if name not in known]:
    raise TypeError(f'gptq_kernel has no option {", ".join(unknown)}; it has {", ".join(known)}.')
  flags = {**known, **options}
  shape = kernel.shape[-1], math.prod(kernel.shape[:-1])
  return _solved(_gptq_kernel, kernel, shape, hessian, bits, flags.pop('damping'), flags)


@functools.partial(jax.jit, static_argnames=_FLAGS)
def _gptq_kernel(
  kernel: Array, hessian: Array, bits: Bits, damping: Array, **flags: Any
) -> GPTQKernel:
  """Returns what `_gptq` finds, from and to Flax layout, by one program."""
  *window, inputs, outputs = kernel.shape
  rows = jnp.moveaxis(kernel, -2, 0).reshape(-1, outputs).T
  result = _gptq(rows, hessian, bits, damping, **flags)

  def restore(matrix: Array) -> Array:
    return jnp.moveaxis(matrix.T.reshape(inputs, *window, outputs), 0, -2)

  return GPTQKernel(
    restore(result.weight),
    restore(result.codes),
    result.scale.T,
    result.zero_point.T,
    result.group,
  )


def dequantize_groups(codes: Array, scale: Array, zero_point: Array, group: Array) -> Array:
  """Returns `(codes - z[:, group]) * s[:, group]` of a `GPTQResult`: its `weight`, bit for bit."""
  return (codes.astype(scale.dtype) - zero_point[:, group]) * scale[:, group]
