"""Checkpoints that are larger than memory: one tensor is read, or written, at a time."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

INDEX = 'model.safetensors.index.json'
# Types of the format, by NumPy's names.
_TYPES = {
  'float64': 'F64', 'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16', 'int64': 'I64', 'int32': 'I32',
  'int16': 'I16', 'int8': 'I8', 'uint64': 'U64', 'uint32': 'U32', 'uint16': 'U16', 'uint8': 'U8',
  'bool': 'BOOL',
}  # fmt: skip
# What a checkpoint's folder holds besides weights: configuration and tokenizer.
_BESIDE = ('.json', '.txt', '.model', '.jinja')


class LazyTensor(NamedTuple):
  """A tensor that is not in memory.

  Attributes:
    shape: of the array.
    dtype: of the array.
    read: returns the array.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


class LazyStateDict(Mapping[str, np.ndarray]):
  """Arrays by name, each read when it is asked for, and not kept.

  Made by `open_state_dict`, and out of others by `merge_parameters` and `untied`.

  Attributes:
    tensors: by name.
  """

  def __init__(self, tensors: Mapping[str, LazyTensor]):
    self.tensors = dict(tensors)

  @property
  def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes by name: what `select_parameters` needs."""
    return {name: jax.ShapeDtypeStruct(own.shape, own.dtype) for name, own in self.tensors.items()}

  def __getitem__(self, name: str) -> np.ndarray:
    return self.tensors[name].read()

  def __iter__(self) -> Iterator[str]:
    return iter(self.tensors)

  def __len__(self) -> int:
    return len(self.tensors)

  def __contains__(self, name: object) -> bool:
    return name in self.tensors


def open_state_dict(path: str | os.PathLike) -> LazyStateDict:
  """Returns the arrays of a safetensors checkpoint by name, without reading any.

  Args:
    path: a `.safetensors` file; or a folder: of one with an index (`model.safetensors.index.json`) the files
      that it names are taken, of another all its `.safetensors` files (the shards of one checkpoint).

  Raises:
    FileNotFoundError: if there is no such file or folder, or none in it.
    ValueError: for a file that is not safetensors, is cut off or damaged; for a name in two of the files; for
      an index that is no whole one, or whose files or tensors are not all there. Also when an array is read
      from a file that was cut off since.
  """
  path = pathlib.Path(path)
  index = path / INDEX
  listed = _weight_map(index) if index.is_file() else {}
  if listed:
    files = [path / name for name in sorted(set(listed.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
      raise ValueError(f'{os.fspath(index)!r} names {", ".join(missing)}, which is not there.')
  else:
    files = sorted(path.glob('*.safetensors')) if path.is_dir() else [path]
  if not files or not files[0].is_file():
    raise FileNotFoundError(f"there is no file {os.fspath(path)!r}, or none '*.safetensors' in it.")
  tensors: dict[str, LazyTensor] = {}
  places: dict[str, str] = {}
  for file in map(os.fspath, files):
    for name, own in _tensors(file).items():
      if name in places:
        raise ValueError(f'{name} is in {places[name]!r} and in {file!r}; give one of them.')
      places[name], tensors[name] = file, own
  if missing := sorted(listed.keys() - tensors.keys()):
    raise ValueError(
      f'{os.fspath(index)!r} names {missing[0]} in {listed[missing[0]]}, which does not hold it.'
    )
  return LazyStateDict(tensors)


def _weight_map(index: pathlib.Path) -> dict[str, str]:
  try:
    found = json.loads(index.read_text(encoding='utf-8'))['weight_map']
    return {str(name): str(file) for name, file in found.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{os.fspath(index)!r} is no whole index, JSON with 'weight_map': {error!r}."
    ) from error


def save_state_dict(
  folder: str | os.PathLike,
  state_dict: Mapping[str, np.ndarray],
  *,
  max_shard_bytes: float = 5e9,
  beside: str | os.PathLike | None = None,
  overwrite: bool = False,
) -> None:
  """Writes arrays as a safetensors checkpoint, one after the other: memory is that of a single array.

  `model.safetensors`, or with more than one shard `model-00001-of-00003.safetensors` and so on and
  `model.safetensors.index.json`, as transformers names and reads them. The folder appears when all is
  written, or not at all; one that is replaced is `<folder>.old` until then, where the next call finds it if
  this one is killed.

  Args:
    folder: that is made.
    state_dict: arrays by name, a dict or a `LazyStateDict`.
    max_shard_bytes: a file holds tensors of at most so many bytes, or a single one.
    beside: folder of another checkpoint, whose configuration and tokenizer are copied; where `state_dict` has
      a head, `tie_word_embeddings` of `config.json` becomes false.
    overwrite: replace a folder that is there.

  Raises:
    ValueError: for a folder that is there, no arrays, a type that the format does not have; from the
      arrays, what reading them raises.
  """
  folder = pathlib.Path(folder)
  old = folder.with_name(f'{folder.name}.old')
  _restore(old, folder)
  if folder.exists() and not overwrite:
    raise ValueError(f'{os.fspath(folder)!r} is there already; give another folder.')
  if not isinstance(state_dict, LazyStateDict):
    state_dict = LazyStateDict({name: _held(array) for name, array in state_dict.items()})
  shards = _shards(state_dict.tensors, max_shard_bytes)
  partial = folder.with_name(f'{folder.name}.partial')
  if partial.exists():  # left by a process that was killed
    shutil.rmtree(partial)
  partial.mkdir(parents=True)
  try:
    weight_map, total = {}, 0
    for number, names in enumerate(shards, 1):
      file = f'model-{number:05d}-of-{len(shards):05d}' if len(shards) > 1 else 'model'
      own = {name: state_dict.tensors[name] for name in names}
      total += _write(partial / f'{file}.safetensors', own)
      weight_map |= dict.fromkeys(names, f'{file}.safetensors')
    if len(shards) > 1:
      index = {'metadata': {'total_size': total}, 'weight_map': dict(sorted(weight_map.items()))}
      (partial / INDEX).write_text(json.dumps(index, indent=2) + '\n')
    if beside is not None:
      _copy_beside(pathlib.Path(beside), partial, 'lm_head.weight' in state_dict)
    if folder.exists():
      folder.replace(old)
    partial.replace(folder)
  except BaseException:
    _restore(old, folder)
    shutil.rmtree(partial, ignore_errors=True)
    raise
  _restore(old, folder)


def _restore(old: pathlib.Path, folder: pathlib.Path) -> None:
  """Moves back what was to be replaced, or removes it if it has been."""
  if old.exists() and folder.exists():
    shutil.rmtree(old)
  elif old.exists():
    old.replace(folder)


def _copy_beside(source: pathlib.Path, target: pathlib.Path, has_head: bool) -> None:
  for file in source.glob('*'):
    if file.suffix not in _BESIDE or file.name.endswith('.index.json') or not file.is_file():
      continue
    text = file.read_bytes()
    if file.name == 'config.json' and has_head:
      config = json.loads(text)
      if config.get('tie_word_embeddings'):  # the head has become one of its own
        text = json.dumps({**config, 'tie_word_embeddings': False}, indent=2).encode()
    (target / file.name).write_bytes(text)


def _tensors(file: str) -> dict[str, LazyTensor]:
  """Returns the tensors of a file."""
  by_type = {theirs: ours for ours, theirs in _TYPES.items()}

  def read(name: str) -> np.ndarray:
    with _opened(file) as opened:
      return opened.get_tensor(name)

  found = {}
  with _opened(file) as opened:
    for name in opened.keys():  # noqa: SIM118
      part = opened.get_slice(name)
      kind = by_type.get(part.get_dtype())
      if kind is None:
        raise ValueError(f'{file!r}: {name} has the type {part.get_dtype()}, unknown here.')
      shape = tuple(part.get_shape())
      found[name] = LazyTensor(shape, jnp.dtype(kind), lambda name=name: read(name))
  return found


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Any]:
  import safetensors

  try:
    with safetensors.safe_open(file, framework='numpy') as opened:
      yield opened
  except (safetensors.SafetensorError, OSError) as error:
    raise ValueError(f'{file!r} is no whole safetensors file: {error}.') from error


def _held(array: np.ndarray) -> LazyTensor:
  array = np.asarray(array)
  return LazyTensor(array.shape, array.dtype, lambda: array)


def _size(tensor: LazyTensor) -> int:
  return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize


def _shards(tensors: Mapping[str, LazyTensor], limit: float) -> list[list[str]]:
  """Returns names by shard, in order."""
  if not tensors:
    raise ValueError('state_dict holds no arrays.')
  if not limit > 0:
    raise ValueError(f'max_shard_bytes must be positive, got {limit}.')
  shards: list[list[str]] = [[]]
  room = limit
  for name, own in tensors.items():
    if own.dtype.name not in _TYPES:
      raise ValueError(f'{name} has the type {own.dtype}, which safetensors do not have.')
    if shards[-1] and _size(own) > room:
      shards, room = [*shards, []], limit
    shards[-1].append(name)
    room -= _size(own)
  return shards


def _write(path: pathlib.Path, tensors: Mapping[str, LazyTensor]) -> int:
  """Writes a file tensor by tensor, as huggingface.co/docs/safetensors has it; returns the tensors' bytes."""
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name, own in tensors.items():
    start, end = end, end + _size(own)
    shape = list(own.shape)
    header[name] = {
      'dtype': _TYPES[own.dtype.name], 'shape': shape, 'data_offsets': [start, end]
    }  # fmt: skip
  text = json.dumps(header, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for name, own in tensors.items():
      _append(file, name, own)
    file.flush()
    os.fsync(file.fileno())
  return end


def _append(file: BinaryIO, name: str, tensor: LazyTensor) -> None:
  array = np.ascontiguousarray(tensor.read())
  if array.dtype != tensor.dtype or array.size * array.dtype.itemsize != _size(tensor):
    raise ValueError(
      f'{name}: expected {tensor.dtype} {tensor.shape}, read {array.dtype} {array.shape}.'
    )
  file.write(array.reshape(-1).view(np.uint8).data)
