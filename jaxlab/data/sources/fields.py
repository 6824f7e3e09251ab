"""Records with further fields, computed beforehand, or with other labels."""

from collections.abc import Mapping

import numpy as np

from jaxlab.data.sources.source import (
  InMemory,
  Record,
  Source,
  as_labels,
  check_labels,
  check_multi_labels,
)


class WithFields:
  """A source whose records have further fields, such as a score map of each image.

  Args:
    source: any source.
    fields: arrays `[records, ...]` by name.

  Raises:
    ValueError: for arrays of another length, or names that records have already.

  >>> digits = InMemory({'image': np.zeros((2, 4, 4, 1), np.uint8), 'label': np.arange(2)})
  >>> int(WithFields(digits, {'score': np.array([3, 4])})[1]['score'])
  4
  """

  def __init__(self, source: Source, fields: Mapping[str, np.ndarray]):
    self._source, self._fields = source, {name: np.asarray(a) for name, a in fields.items()}
    self.num_classes, self.class_names = source.num_classes, source.class_names
    for name, array in self._fields.items():
      if len(array) != len(source):
        raise ValueError(f'field {name!r} has {len(array)} rows for {len(source)} records.')
    if taken := sorted(self._fields.keys() & source[0].keys()):
      raise ValueError(f'records have fields {taken} already.')
    if isinstance(source, InMemory):
      self.gather = lambda indices: {**source.gather(indices), **self._rows(indices)}

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Record:
    return {**self._source[index], **self._rows(index)}

  def _rows(self, indices: int | np.ndarray) -> Record:
    return {name: array[indices] for name, array in self._fields.items()}


class Relabeled:
  """A source whose records have other labels: noisy ones, corrected ones, predicted ones.

  Args:
    source: any source.
    labels: integers `[records]`, classes of the source; or `[records, num_classes]`, 1 for each class that an
      image shows and 0 for others, of records that hold `multi_label`.

  Attributes:
    labels: int32 `[records]`, of single labels.

  Raises:
    ValueError: for labels of another length, or outside of the source's classes.

  >>> digits = InMemory({'image': np.zeros((2, 4, 4, 1), np.uint8), 'label': np.arange(2)})
  >>> [int(record['label']) for record in Relabeled(digits, np.array([1, 0]))]
  [1, 0]
  """

  def __init__(self, source: Source, labels: np.ndarray):
    self._source, labels = source, np.asarray(labels)
    self.num_classes, self.class_names = source.num_classes, source.class_names
    if len(labels) != len(source):
      raise ValueError(f'{len(labels)} labels for {len(source)} records.')
    if labels.ndim == 2:
      self._field, self._labels = 'multi_label', labels.astype(np.float32)
      check_multi_labels(self._labels, source.num_classes)
    else:
      self._field, self._labels = 'label', as_labels(labels, 'labels')
      check_labels(self._labels, source.num_classes)
      self.labels = self._labels
    if hasattr(source, 'paths'):
      self.paths = source.paths
    if hasattr(source, 'gather'):
      self.gather = lambda indices: {**source.gather(indices), self._field: self._labels[indices]}

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Record:
    return {**self._source[index], self._field: self._labels[index]}
