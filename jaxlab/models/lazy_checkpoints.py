"""Checkpoints that are larger than memory: one tensor is read at a time."""

import os
import pathlib
from collections.abc import Iterator, Mapping

import numpy as np


class LazyStateDict(Mapping[str, np.ndarray]):
  """The arrays of safetensors files by name, each read when it is asked for, and not kept.

  Made by `open_state_dict`.
  """

  def __init__(self, files: Mapping[str, str]):
    self._files = dict(files)

  def __getitem__(self, name: str) -> np.ndarray:
    import safetensors

    with safetensors.safe_open(self._files[name], framework='numpy') as file:
      return file.get_tensor(name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)

  def __contains__(self, name: object) -> bool:
    return name in self._files


def open_state_dict(path: str | os.PathLike) -> LazyStateDict:
  """Returns the arrays of a safetensors checkpoint by name, without reading any.

  Args:
    path: a `.safetensors` file, or a folder, all of whose `.safetensors` files are taken (the shards of one
      checkpoint).

  Raises:
    FileNotFoundError: if there is no such file or folder, or none in it.
    ValueError: for a file that is not safetensors, is cut off or damaged; for a name in two of the files.
  """
  import safetensors

  path = pathlib.Path(path)
  files = sorted(path.glob('*.safetensors')) if path.is_dir() else [path]
  if not files or not files[0].is_file():
    raise FileNotFoundError(f"there is no file {os.fspath(path)!r}, or none '*.safetensors' in it.")
  places: dict[str, str] = {}
  for file in map(os.fspath, files):
    try:
      with safetensors.safe_open(file, framework='numpy') as opened:
        names = list(opened.keys())
    except (safetensors.SafetensorError, OSError) as error:
      raise ValueError(f'{file!r} is no whole safetensors file: {error}.') from error
    for name in names:
      if name in places:
        raise ValueError(f'{name} is in {places[name]!r} and in {file!r}; give one of them.')
      places[name] = file
  return LazyStateDict(places)
