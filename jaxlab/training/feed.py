"""What the loop reads from, and the check that it fits the program."""

from typing import Any, Protocol

import jax
import numpy as np

from jaxlab.data.pipeline import process_shard

PyTree = Any


class DataIterator(Protocol):
  """An endless iterator of host batches whose position can be saved, e.g. `jaxlab.data.make_loader`."""

  def __next__(self) -> dict[str, np.ndarray]:
    """Returns this process's rows of the next global batch."""

  def get_state(self) -> Any:
    """Returns the position, JSON-able and equal in all processes."""

  def set_state(self, state: Any) -> None:
    """Goes to a position that `get_state` returned."""


class Declared:
  """The arrays of `data` that a program declares, each batch checked before it is used."""

  def __init__(self, data: DataIterator, batch: dict[str, jax.ShapeDtypeStruct]):
    """Takes `batch`, the global batch with shardings, from `ShardedProgram.batch`."""
    self._data, self._first = data, True
    self._expected = {}
    for name, like in batch.items():
      _, processes = process_shard(like.sharding, like.shape[0])
      self._expected[name] = ((like.shape[0] // processes, *like.shape[1:]), like.dtype)

  def __iter__(self) -> 'Declared':
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    """Returns the next batch.

    Raises:
      ValueError: if an array is missing, has another shape or type, or (in the first batch) is not
        finite.
    """
    host = next(self._data)
    missing = [name for name in self._expected if name not in host]
    if missing:
      raise ValueError(f'The batch has no {missing}, which the program needs; it has {list(host)}.')
    batch = {name: np.asarray(host[name]) for name in self._expected}
    for name, array in batch.items():
      shape, dtype = self._expected[name]
      if array.shape != shape or array.dtype != dtype:
        raise ValueError(
          f'batch[{name!r}] is {array.dtype}{list(array.shape)} in this process; the program was made '
          f'for {dtype}{list(shape)}.'
        )
      if self._first and np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise ValueError(f'batch[{name!r}] holds values that are not finite.')
    self._first = False
    return batch

  def get_state(self) -> Any:
    """Returns the position of the data."""
    return self._data.get_state()
