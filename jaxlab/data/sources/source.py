"""Random-access sources of records: `len(source)`, `source[i] -> dict`.

A record holds `image` (uint8 `[height, width, channels]`), `label` (np.int32) and `index` (np.int32, its
position in the source); where an image shows several classes, `multi_label` (float32 `[num_classes]`, 1 for
each that is there) besides `label` or in its place, and `known` (float32 `[num_classes]`, 0 for each of which
nothing is told) where that is so of some. A source also has `num_classes` and `class_names`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Record = dict[str, Any]


class Source(Protocol):
  """What the pipeline asks of a data set."""

  num_classes: int
  class_names: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Record: ...


class InMemory:
  """A source over stacked arrays, e.g. those of `materialize`.

  Args:
    arrays: at least `image` (`[records, height, width, channels]`) and `label`, all of one length;
      `index` is added.
    num_classes: default: the largest label plus one.
    class_names: default: the numbers.

  Raises:
    ValueError: lengths that differ, labels that are no classes (see `as_labels`), NaN images.
  """

  def __init__(
    self,
    arrays: Mapping[str, np.ndarray],
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
  ):
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
      raise ValueError(f'arrays must be non-empty and of one length, got lengths {lengths}.')
    size = next(iter(lengths.values()))
    self.arrays = {name: np.asarray(array) for name, array in arrays.items()}
    self.arrays['index'] = np.arange(size, dtype=np.int32)
    labels = self.arrays.get('label')
    if labels is not None:
      self.arrays['label'] = labels = as_labels(labels)
    if num_classes is None:
      num_classes = len(class_names) if class_names else _count_classes(labels)
    self.num_classes = num_classes
    self.class_names = tuple(class_names or map(str, range(num_classes)))
    if len(self.class_names) != num_classes:
      raise ValueError(f'{len(self.class_names)} class_names for {num_classes} classes.')
    if labels is not None:
      check_labels(labels, num_classes)
    if 'image' in self.arrays:
      check_images(self.arrays['image'])

  def __len__(self) -> int:
    return len(self.arrays['index'])

  def __getitem__(self, index: int) -> Record:
    return {name: array[index] for name, array in self.arrays.items()}

  def gather(self, indices: np.ndarray) -> Record:
    """Returns a batch, the records at `indices`, with one indexing operation a field."""
    return {name: array[indices] for name, array in self.arrays.items()}


def materialize(source: Source) -> dict[str, np.ndarray]:
  """Returns all records of a small source as stacked arrays, `{'image': [records, ...], ...}`."""
  if isinstance(source, InMemory):
    return dict(source.arrays)
  return stack_records([source[i] for i in range(len(source))])


def in_memory(source: Source) -> InMemory:
  """Returns the source with all its records held in memory; what is in memory already is returned."""
  if isinstance(source, InMemory):
    return source
  return InMemory(materialize(source), source.num_classes, source.class_names)


def stack_records(records: Sequence[Record]) -> dict[str, np.ndarray]:
  """Returns the records' fields stacked along a new first axis.

  Raises:
    ValueError: if the records differ in their fields or in a field's shape.
  """
  first = records[0]
  batch = {}
  for record in records:
    if record.keys() != first.keys():
      raise ValueError(f'records have different fields: {sorted(first)} and {sorted(record)}.')
  for name in first:
    shapes = {np.shape(record[name]): record.get('index') for record in records}
    if len(shapes) > 1:
      (shape_a, index_a), (shape_b, index_b) = list(shapes.items())[:2]
      raise ValueError(
        f'field {name!r} differs in shape: {shape_a} in record {index_a}, {shape_b} in record '
        f'{index_b}. Bring images to one size with a transform, e.g. jaxlab.data.DecodeImage(size).'
      )
    batch[name] = np.stack([record[name] for record in records])
  return batch


def as_labels(labels: np.ndarray, name: str = 'label') -> np.ndarray:
  """Returns labels as int32 `[records]`; integers, or floats that are whole numbers.

  Raises:
    ValueError: if they are of another shape (one-hot, `[records, 1]`), of another kind (fractions, text,
      objects), or beyond int32; it names the first that is wrong.
  """
  labels = np.asarray(labels)
  if labels.ndim != 1:
    advice = {1: f'{name}[:, 0]'}.get(labels.shape[-1], f'{name}.argmax(1) of one-hot rows')
    raise ValueError(
      f'{name} has shape {labels.shape}, expected [records]{f": take {advice}" if labels.ndim == 2 else ""}.'
    )
  if not np.issubdtype(labels.dtype, np.integer) and not np.issubdtype(labels.dtype, np.floating):
    raise ValueError(f'{name} has dtype {labels.dtype}, expected integers: number the classes.')
  limits = np.iinfo(np.int32)
  wide = labels if np.issubdtype(labels.dtype, np.integer) else labels.astype(np.float64)
  # NaN compares false, too.
  right = (wide >= limits.min) & (wide <= limits.max)
  if wide is not labels:
    right &= wide == np.floor(wide)
  wrong = np.flatnonzero(~right)
  if wrong.size:
    raise ValueError(
      f'{wrong.size} values of {name} are no integers of 32 bits, the first at position {wrong[0]}: '
      f'{labels[wrong[0]]}.'
    )
  return labels.astype(np.int32)


def check_labels(labels: np.ndarray, num_classes: int) -> None:
  """Raises ValueError unless all labels are integers in 0 .. num_classes - 1."""
  labels = np.asarray(labels)
  if not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f'label has dtype {labels.dtype}, expected integers.')
  wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if wrong.size:
    raise ValueError(
      f'{wrong.size} labels are out of range 0..{num_classes - 1}, the first at position {wrong[0]}: '
      f'{labels.reshape(-1)[wrong[0]]}. Check num_classes or the labels.'
    )


def check_multi_labels(labels: np.ndarray, num_classes: int) -> None:
  """Raises ValueError unless labels are 0 or 1 for each class, `[records, num_classes]`."""
  labels = np.asarray(labels)
  if labels.ndim != 2 or labels.shape[1] != num_classes:
    raise ValueError(
      f'multi_label has shape {labels.shape}, expected [records, {num_classes}]: 0 or 1 for each class.'
    )
  wrong = np.flatnonzero(((labels != 0) & (labels != 1)).any(1))
  if wrong.size:
    row = labels[wrong[0]]
    raise ValueError(
      f'{wrong.size} rows of multi_label hold other values than 0 and 1, the first is row {wrong[0]}: '
      f'{row[(row != 0) & (row != 1)][0]}.'
    )


def check_images(images: np.ndarray) -> None:
  """Raises ValueError unless images are `[batch, height, width, channels]` and finite."""
  images = np.asarray(images)
  if images.ndim != 4:
    raise ValueError(
      f'image has shape {images.shape}, expected [batch, height, width, channels]; gray images need '
      'a last axis of 1.'
    )
  if np.issubdtype(images.dtype, np.floating):
    bad = np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(axis=1))
    if bad.size:
      raise ValueError(
        f'{bad.size} of {len(images)} images hold NaN or infinity, the first at position {bad[0]}.'
      )
  elif images.dtype != np.uint8:
    raise ValueError(f'image has dtype {images.dtype}, expected uint8 or floats.')


def source_labels(source: Source) -> np.ndarray:
  """Returns the labels of all records, int32 `[records]`, without reading images where that is possible.

  A source says its labels by `arrays['label']` (`InMemory`) or `labels`; else every record is read once.
  """
  if isinstance(source, InMemory):
    return source.arrays['label']
  if hasattr(source, 'labels'):
    return np.asarray(source.labels, np.int32)
  return np.array([source[i]['label'] for i in range(len(source))], np.int32)


def _count_classes(labels: np.ndarray | None) -> int:
  return 0 if labels is None else int(labels.max()) + 1
