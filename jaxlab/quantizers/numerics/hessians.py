"""Hessians of linear layers: of the squared error of their outputs, from the inputs that they see."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Padding = str | Sequence[tuple[int, int]]


class HessianState(NamedTuple):
  """`(2 / n) sum x x^T` over all tokens, with `n` the number of *sequences* (or images) so far."""

  hessian: Array
  sequences: Array


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
  kernel_size: Sequence[int],
  strides: Sequence[int] = (1, 1),
  padding: Padding = 'SAME',
  dilation: Sequence[int] = (1, 1),
) -> Array:
  """Returns the patches a convolution sees: `[batch, *positions, channels * window]`, channels slowest.

  They are copies, made an axis at a time: `kernel_size` slices, put side by side.

  Args:
    x: `[batch, *positions, channels]`, e.g. `[batch, height, width, channels]`.
    kernel_size: sizes of the window.
    strides: of the convolution.
    padding: of the convolution, `'SAME'`, `'VALID'` or pairs (low, high).
    dilation: of the kernel.

  >>> x = jnp.arange(4.0).reshape(1, 4, 1)
  >>> unfold(x, (3,), (1,), 'SAME', (1,))[0].tolist()
  [[0.0, 0.0, 1.0], [0.0, 1.0, 2.0], [1.0, 2.0, 3.0], [2.0, 3.0, 0.0]]
  """
  windows = [(size - 1) * step + 1 for size, step in zip(kernel_size, dilation, strict=True)]
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(x.shape[1:-1], windows, strides, padding)
  sides = ((0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0))
  patches = jax.lax.pad(x, jnp.zeros((), x.dtype), sides)
  for axis, (size, stride, step) in enumerate(zip(kernel_size, strides, dilation), start=1):
    last = (patches.shape[axis] - windows[axis - 1]) // stride * stride
    taps = [
      jax.lax.slice_in_dim(patches, tap * step, tap * step + last + 1, stride, axis)
      for tap in range(size)
    ]
    patches = jnp.stack(taps, -1)
  return patches.reshape(*patches.shape[: x.ndim - 1], -1)


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
