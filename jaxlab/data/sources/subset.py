"""Some records of a source, as a source."""

from collections.abc import Sequence

import numpy as np

from jaxlab.data.sources.source import InMemory, Record, Source, source_labels


class Subset:
  """Some records of a source, in a new order; lazy. See `subset`."""

  def __init__(self, source: Source, indices: np.ndarray):
    self._source, self._indices = source, indices
    self.num_classes, self.class_names = source.num_classes, source.class_names
    if hasattr(source, 'labels'):
      self.labels = source.labels[indices]
    if hasattr(source, 'paths'):
      self.paths = tuple(source.paths[index] for index in indices)

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, index: int) -> Record:
    return {**self._source[int(self._indices[index])], 'index': np.int32(index)}


def subset(source: Source, indices: np.ndarray) -> Source:
  """Returns a source of the records of `source` at `indices`, in that order.

  Record `i` of it has index `i`; classes stay. A source in memory gives one in memory.

  Args:
    source: any source.
    indices: integers `[records]`; may repeat.

  Raises:
    ValueError: indices that are empty, not integers, or out of range.
  """
  indices = np.asarray(indices)
  if indices.ndim != 1 or not indices.size or not np.issubdtype(indices.dtype, np.integer):
    raise ValueError(
      f'indices have shape {indices.shape} and dtype {indices.dtype}, expected a non-empty vector of '
      'integers.'
    )
  if not 0 <= indices.min() <= indices.max() < len(source):
    raise ValueError(
      f'indices run from {indices.min()} to {indices.max()}, but source has {len(source)} records.'
    )
  if isinstance(source, InMemory):
    return InMemory(source.gather(indices), source.num_classes, source.class_names)
  return Subset(source, indices)


class ClassSubset(Subset):
  """The records of some classes of a source, numbered anew; lazy. See `class_subset`."""

  def __init__(self, source: Source, indices: np.ndarray, labels: np.ndarray, names: Sequence[str]):
    super().__init__(source, indices)
    self.labels, self.num_classes, self.class_names = labels, len(names), tuple(names)

  def __getitem__(self, index: int) -> Record:
    return {**super().__getitem__(index), 'label': self.labels[index]}


def class_subset(source: Source, classes: Sequence[int]) -> Source:
  """Returns a source of the records of some classes, which are numbered anew in the given order.

  A source in memory gives one in memory. Of a source that does not say its labels every record is read once.

  Args:
    source: of records with one label.
    classes: different labels of it.

  Raises:
    ValueError: for classes that the source does not have, or that occur twice, or if no record is of them.
  """
  chosen = np.asarray(classes, np.int64).reshape(-1)
  if not len(chosen) or len(set(chosen)) < len(chosen):
    raise ValueError(f'classes={tuple(classes)}: expected different classes, at least one.')
  if not 0 <= chosen.min() <= chosen.max() < source.num_classes:
    raise ValueError(
      f'classes={tuple(classes)}: the source has the classes 0 to {source.num_classes - 1}.'
    )
  number = np.full(source.num_classes, -1)
  number[chosen] = np.arange(len(chosen))
  labels = number[source_labels(source)]
  rows = np.flatnonzero(labels >= 0)
  if not len(rows):
    raise ValueError(f'classes={tuple(classes)}: no record of the source is of them.')
  labels, names = labels[rows].astype(np.int32), [source.class_names[label] for label in chosen]
  if isinstance(source, InMemory):
    return InMemory({**source.gather(rows), 'label': labels}, len(chosen), names)
  return ClassSubset(source, rows, labels, names)
