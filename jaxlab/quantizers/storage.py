"""Quantized parameters at their real size, in memory and as safetensors files.

>>> import jax.numpy as jnp
>>> quantizer = AffineQuantizer(4, 'symmetric', 'channel')
>>> params = {'fc': {'kernel': jnp.ones((64, 8)), 'bias': jnp.zeros(8)}}
>>> params['fc']['kernel'] = store(quantizer, params['fc']['kernel'])
>>> size_in_bytes(params)  # 64 * 8 / 2 codes, 8 scales, 8 biases
320
>>> bool(jnp.allclose(restore(params)['fc']['kernel'], 1))
True
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxlab.quantizers import affine
from jaxlab.quantizers.affine import AffineParams, AffineQuantizer
from jaxlab.quantizers.integer import pack_int4, unpack_int4
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any

FORMAT = 'jaxlab.quantized.1'


class QuantizedArray(flax.struct.PyTreeNode):
  """Codes of an affine quantizer in as few bytes as they take, with what gives their values back.

  Attributes:
    codes: up to 4 bits two a byte along the second last axis (the last of a vector), uint8; up to 8 bits
      int8 or uint8; else int16 or uint16. (2 and 3 bits take 4.)
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
  if quantizer.bits <= 4:
    codes = pack_int4(codes, _packed_axis(x.shape))
  zero_point = None if quantizer.signed else params.zero_point
  return QuantizedArray(codes, params.scale, zero_point, quantizer, tuple(x.shape))


def _differ(a: Array, b: Array) -> bool:
  return is_concrete(a) and is_concrete(b) and np.any(np.asarray(a) != np.asarray(b))


def _packed_axis(shape: tuple[int, ...]) -> int:
  return -2 if len(shape) > 1 else -1


def restore(tree: PyTree, dtype: jnp.dtype = jnp.float32) -> PyTree:
  """Returns `tree` with every `QuantizedArray` dequantized to `dtype`; other leaves as they are."""
  return jax.tree.map(
    lambda leaf: leaf.dequantize(dtype) if isinstance(leaf, QuantizedArray) else leaf,
    tree,
    is_leaf=lambda leaf: isinstance(leaf, QuantizedArray),
  )


def size_in_bytes(tree: PyTree) -> int:
  """Returns the bytes of all buffers of a tree: codes, scales, zero points and whatever is float.

  A `jnp.int4` array counts a byte a code, which is what its host buffer takes.
  """
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def save_quantized(path: str | os.PathLike, tree: Mapping[str, PyTree]) -> int:
  """Writes a tree of arrays and `QuantizedArray`s as one safetensors file; returns its size in bytes.

  An array at `fc/bias` is the tensor `fc/bias`; a quantized one is `fc/kernel.codes`, `fc/kernel.scale` and
  `fc/kernel.zero_point`, its static choices are JSON in the file's metadata, so that other tools can read it.

  Args:
    path: local or remote; replaced if it exists.
    tree: nested dicts with string keys, without '/' or a last part that ends in `.codes`, `.scale` or
      `.zero_point`.

  Raises:
    ValueError: for a tree that is empty or has such a name, or an array that this process cannot read.
  """
  from etils import epath
  from safetensors import numpy as safetensors_numpy

  tensors: dict[str, np.ndarray] = {}
  choices: dict[str, Any] = {}
  for keys, leaf in traverse_util.flatten_dict(dict(tree)).items():
    if any(not isinstance(key, str) or '/' in key for key in keys):
      raise ValueError(f'{keys}: keys must be strings without a slash.')
    name = '/'.join(keys)
    if isinstance(leaf, QuantizedArray):
      choices[name] = {**dataclasses.asdict(leaf.quantizer), 'shape': list(leaf.shape)}
      parts = {'codes': leaf.codes, 'scale': leaf.scale, 'zero_point': leaf.zero_point}
      tensors |= {f'{name}.{part}': array for part, array in parts.items() if array is not None}
    elif name.endswith(('.codes', '.scale', '.zero_point')):
      raise ValueError(f'{name!r} reads as a part of a quantized array; rename it.')
    else:
      tensors[name] = leaf
  if not tensors:
    raise ValueError('The tree holds no array.')
  for name, array in tensors.items():
    if not is_concrete(array):
      raise ValueError(
        f'{name!r} is traced, or spread over several processes, none of which can read it: save outside of '
        f'`jit`, what `jax.experimental.multihost_utils.process_allgather(tree, tiled=True)` returns.'
      )
  host = {
    name: np.ascontiguousarray(jax.device_get(array)).reshape(np.shape(array))  # keeps scalars
    for name, array in tensors.items()
  }
  metadata = {'format': FORMAT, 'quantizers': json.dumps(choices, sort_keys=True)}
  data = safetensors_numpy.save(host, metadata)
  target = epath.Path(path)
  partial = target.with_name(f'{target.name}.partial')
  partial.write_bytes(data)
  partial.replace(target)
  return len(data)


def load_quantized(path: str | os.PathLike) -> dict[str, PyTree]:
  """Returns the tree that `save_quantized` wrote.

  Raises:
    ValueError: for a file of another format, or one in which a part of a quantized array is missing.
  """
  import safetensors
  from etils import epath

  data = epath.Path(path).read_bytes()
  header = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])
  metadata = header.get('__metadata__', {})
  if metadata.get('format') != FORMAT:
    raise ValueError(
      f'{os.fspath(path)!r} has format {metadata.get("format")!r}, not {FORMAT!r}: it was not written by '
      f'save_quantized.'
    )
  tensors = {name: _array(view) for name, view in safetensors.deserialize(data)}
  flat: dict[str, Any] = {}
  for name, choice in json.loads(metadata['quantizers']).items():
    shape = tuple(choice.pop('shape'))
    quantizer = AffineQuantizer(**choice)
    needed = ('codes', 'scale') if quantizer.signed else ('codes', 'scale', 'zero_point')
    missing = [part for part in needed if f'{name}.{part}' not in tensors]
    if missing:
      raise ValueError(f'{os.fspath(path)!r} has no {", ".join(missing)} of {name!r}.')
    parts = {part: tensors.pop(f'{name}.{part}') for part in needed}
    flat[name] = QuantizedArray(**{'zero_point': None, **parts}, quantizer=quantizer, shape=shape)
  return traverse_util.unflatten_dict({**flat, **tensors}, sep='/')


# `safetensors.numpy` writes bfloat16 but does not read it.
_DTYPES = {'BOOL': 'bool', 'BF16': 'bfloat16'} | {
  f'{letter}{bits}': f'{kind}{bits}'
  for letter, kind in (('F', 'float'), ('I', 'int'), ('U', 'uint'))
  for bits in (8, 16, 32, 64)
  if letter != 'F' or bits > 8
}


def _array(view: Mapping[str, Any]) -> Array:
  dtype = jnp.dtype(_DTYPES[view['dtype']])
  return jnp.asarray(np.frombuffer(view['data'], dtype).reshape(view['shape']))
