"""Kernels by the percentile search: fake-quantized, with the constants of their codes."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxlab.quantizers.networks.layers import (
  Layer,
  as_matrix,
  channel_shape,
  check_channels,
  from_matrix,
  tree_layer,
)
from jaxlab.quantizers.networks.operands import (
  CHANNEL,
  affine_constants,
  constants_of_range,
  fake_quantize_operand,
)
from jaxlab.quantizers.networks.rules import Bits
from jaxlab.quantizers.numerics.quantiles import quantiles_by_ends
from jaxlab.quantizers.numerics.ranges import PERCENTILES, best_candidate
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any

SMALL = 2**19  # values of a kernel that may be searched together with others
LENGTHS = 8  # largest ratio of lengths in one such search


def quantize_kernels(
  params: PyTree, kernel_bits: Mapping[str, Bits], layers: Mapping[str, Layer] | None = None
) -> tuple[PyTree, dict[str, dict[str, Array]]]:
  """Returns `params` with fake-quantized kernels, and `{path: constants}` of the collection's `kernel`.

  One range per output channel, by `percentile_range`. Kernels of equal shape share one
  compilation, and small ones of about the same length one search; both for all bit-widths.

  Args:
    params: parameter tree.
    kernel_bits: bit-width by path of the module.
    layers: of `find_layers`, which know the outputs of kernels; None: what the tree tells (`tree_layer`).
  """
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  channels, kernels = {}, {}
  for path in kernel_bits:
    kernel = flat[f'{path}/kernel']
    layer = tree_layer(flat, path) if layers is None else layers[path]
    channels[path] = check_channels(path, layer, kernel.shape)
    kernels[path] = kernel if channels[path] == (-1,) else as_matrix(kernel, channels[path])
  groups: dict[tuple, list[str]] = {}
  for path, bits in kernel_bits.items():
    kernel = kernels[path]
    alone = (path,) if not _is_small(kernel, bits) else (_length_class(kernel), kernel.dtype)
    groups.setdefault(alone, []).append(path)
  found = {}
  for paths in groups.values():
    own = [kernels[path] for path in paths]
    if len(paths) == 1:
      found[paths[0]] = _quantize_kernel(*own, kernel_bits[paths[0]])
    else:
      each = _quantize_kernels_together(own, [kernel_bits[path] for path in paths])
      found |= dict(zip(paths, each))
  constants = {}
  for path in kernel_bits:
    kernel, constants[path] = found[path]
    if channels[path] != (-1,):
      shape = flat[f'{path}/kernel'].shape
      kernel, each = (
        from_matrix(kernel, shape, channels[path]),
        channel_shape(shape, channels[path]),
      )
      for name in ('scale', 'zero_point'):
        constants[path][name] = constants[path][name].reshape(each)
    flat[f'{path}/kernel'] = kernel
  return traverse_util.unflatten_dict(flat, sep='/'), constants


def _is_small(kernel: Array, bits: Bits) -> bool:
  """Whether a kernel may be searched together with others, laid side by side in host memory."""
  if not (is_concrete(kernel) and is_concrete(bits)) or kernel.size > SMALL:
    return False
  return isinstance(kernel, np.ndarray) or len(kernel.sharding.device_set) == 1


def _length_class(kernel: Array) -> int:
  return math.ceil(math.log(max(kernel.size // kernel.shape[-1], 1), LENGTHS))


@jax.jit
def _quantize_kernel(kernel: Array, bits: Bits) -> tuple[Array, dict[str, Array]]:
  constants = affine_constants(CHANNEL, kernel, bits)
  return fake_quantize_operand(kernel, constants), constants


def _quantize_kernels_together(
  kernels: Sequence[Array], bits: Sequence[Bits]
) -> list[tuple[Array, dict[str, Array]]]:
  """Returns what `_quantize_kernel` does, for each, by one search over the rows of all channels.

  It is the search that takes long to compile; all the rest is done by NumPy.
  """
  matrices = [np.asarray(kernel).reshape(-1, kernel.shape[-1]).T for kernel in kernels]
  columns = max(matrix.shape[1] for matrix in matrices)
  rows = np.concatenate(
    [
      np.pad(matrix, ((0, 0), (0, columns - matrix.shape[1])), constant_values=np.nan)
      for matrix in matrices
    ]
  )
  channels = [len(matrix) for matrix in matrices]
  each = np.repeat(np.asarray(bits, np.float32), channels)
  lengths = tuple(matrix.shape[::-1] for matrix in matrices)
  rows, constants = jax.device_get(_quantize_rows(rows, each, lengths))
  found = []
  for kernel, matrix, end in zip(kernels, matrices, np.cumsum(channels)):
    start = end - len(matrix)
    new = rows[start:end, : matrix.shape[1]].T.reshape(kernel.shape)
    own = {
      name: leaf[start:end] if name in ('scale', 'zero_point') else leaf[start]
      for name, leaf in constants.items()
    }
    home = None if isinstance(kernel, np.ndarray) else kernel.sharding
    found.append(jax.device_put((new, own), home and next(iter(home.device_set))))
  return found


@functools.partial(jax.jit, static_argnames='lengths')
def _quantize_rows(
  rows: Array, bits: Array, lengths: tuple[tuple[int, int], ...]
) -> tuple[Array, dict[str, Array]]:
  """Returns fake-quantized rows and their constants.

  Args:
    rows: `[channels, columns]`, filled up with NaN.
    bits: `[channels]`.
    lengths: number of values a channel, and of channels, for each kernel.
  """
  wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
  counts = np.repeat(*np.transpose(lengths))
  fill = np.arange(rows.shape[1]) >= counts[:, None]
  shares = [1 - p for p in PERCENTILES] + list(PERCENTILES)
  ends = (jnp.where(fill, value, wide) for value in (-jnp.inf, jnp.inf))
  bounds = quantiles_by_ends(*ends, counts, shares)
  minimum, maximum = best_candidate(CHANNEL, wide, bits[:, None], bounds[..., None], (1,))
  # What the sorted ends of a broken row are is not said.
  minimum = jnp.where(jnp.all(fill | jnp.isfinite(wide), 1), minimum[:, 0], jnp.nan)
  constants = constants_of_range(CHANNEL, minimum, maximum[:, 0], bits)
  own = {name: leaf[:, None] for name, leaf in constants.items()}
  return fake_quantize_operand(rows, own), constants
