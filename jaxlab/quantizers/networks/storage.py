"""Trees of quantized parameters at their real size, in memory and as safetensors files.

>>> from jaxlab.quantizers import store
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

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxlab.quantizers.numerics.affine import AffineQuantizer
from jaxlab.quantizers.numerics.storage import QuantizedArray
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any

FORMAT = 'jaxlab.quantized.1'


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


def save_quantized(
  path: str | os.PathLike, tree: Mapping[str, PyTree], *, notes: Mapping[str, Any] = {}
) -> int:
  """Writes a tree of arrays and `QuantizedArray`s as one safetensors file; returns its size in bytes.

  An array at `fc/bias` is the tensor `fc/bias`; a quantized one is `fc/kernel.codes`, `fc/kernel.scale` and
  `fc/kernel.zero_point`, its static choices are JSON in the file's metadata, so that other tools can read it.

  Args:
    path: local or remote; replaced if it exists.
    tree: nested dicts with string keys, without '/' or a last part that ends in `.codes`, `.scale` or
      `.zero_point`. What is read back is that bit for bit, but for empty dicts, which leave no trace.
    notes: kept in the file's metadata as JSON, for `read_notes`.

  Raises:
    ValueError: for a tree that is empty or has such a name, a leaf that is no array, an array that this
      process cannot read, or one of a dtype that `load_quantized` does not give back (int4, most kinds of
      float8, complex).
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
      choices[name] = {**dataclasses.asdict(leaf.quantizer), 'shape': [int(n) for n in leaf.shape]}
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
    if not hasattr(array, 'dtype'):
      raise ValueError(f'{name!r} is a {type(array).__name__}, expected an array.')
    if str(array.dtype) not in _DTYPES.values():
      raise ValueError(
        f'{name!r} has dtype {array.dtype}, which the file cannot give back; the dtypes are '
        f'{", ".join(sorted(_DTYPES.values()))}.'
      )
  host = {
    name: np.ascontiguousarray(jax.device_get(array)).reshape(np.shape(array))  # keeps scalars
    for name, array in tensors.items()
  }
  metadata = {'format': FORMAT, 'quantizers': json.dumps(choices, sort_keys=True, default=_plain)}
  metadata |= {'notes': json.dumps(notes, sort_keys=True)} if notes else {}
  data = safetensors_numpy.save(host, metadata)
  target = epath.Path(path)
  partial = target.with_name(f'{target.name}.partial')
  partial.write_bytes(data)
  partial.replace(target)
  return len(data)


def load_quantized(path: str | os.PathLike) -> dict[str, PyTree]:
  """Returns the tree that `save_quantized` wrote.

  Arrays of 64 bits are NumPy's, unless 64 bits are enabled in JAX, which would make 32 of them.

  Raises:
    ValueError: for a file of another format, or one in which a part of a quantized array is missing.
  """
  import safetensors
  from etils import epath

  data = epath.Path(path).read_bytes()
  metadata = _metadata(path, data)
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


def read_notes(path: str | os.PathLike) -> dict[str, Any]:
  """Returns the notes with which `save_quantized` wrote a file."""
  from etils import epath

  return json.loads(_metadata(path, epath.Path(path).read_bytes()).get('notes', '{}'))


def _metadata(path: str | os.PathLike, data: bytes) -> dict[str, str]:
  header = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])
  metadata = header.get('__metadata__', {})
  if metadata.get('format') != FORMAT:
    raise ValueError(
      f'{os.fspath(path)!r} has format {metadata.get("format")!r}, not {FORMAT!r}: it was not written by '
      f'save_quantized.'
    )
  return metadata


# `safetensors.numpy` writes bfloat16 but does not read it.
_FLOAT8 = {'F8_E4M3': 'float8_e4m3fn', 'F8_E5M2': 'float8_e5m2'}
_DTYPES = {'BOOL': 'bool', 'BF16': 'bfloat16', **_FLOAT8} | {
  f'{letter}{bits}': f'{kind}{bits}'
  for letter, kind in (('F', 'float'), ('I', 'int'), ('U', 'uint'))
  for bits in (8, 16, 32, 64)
  if letter != 'F' or bits > 8
}


def _plain(number: np.generic) -> int | float | bool:
  """Returns a NumPy scalar as Python's own, which JSON knows."""
  return number.item()


def _array(view: Mapping[str, Any]) -> Array:
  dtype = jnp.dtype(_DTYPES[view['dtype']])
  array = np.frombuffer(view['data'], dtype).reshape(view['shape'])
  return jnp.asarray(array) if jax.dtypes.canonicalize_dtype(dtype) == dtype else array.copy()
