"""Features that a network elsewhere computed of labeled images, in a file that says where they come from.

A device without that network trains on them. A file is `.npz`, read into memory, or `.array_record`, records
of which are read as they are needed. On buckets (`gs://...`) there are `.npz` alone.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from jaxlab.data.sources.source import Record, as_labels, check_labels

DTYPES = ('float16', 'float32')
SUFFIXES = ('.npz', '.array_record')
FORMAT = 1
Batch = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureHeader:
  """What features are.

  Attributes:
    network: fingerprint of the network and its weights.
    data: fingerprint of the images, and of how they are read.
    layers: that were gathered, in words or numbers: `'0+1+2'`.
    shape: of a record's features, `(tokens, width)`.
    dtype: 'float16' or 'float32'.
    count: records.
    num_classes: number of labels.
    num_prefix_tokens: tokens before the patches.
    views: records of each image: all images in their order, view after view.
  """

  network: str
  data: str
  layers: str
  shape: tuple[int, ...]
  dtype: str
  count: int
  num_classes: int
  num_prefix_tokens: int = 1
  views: int = 1

  def __post_init__(self):
    shape = tuple(self.shape)
    sizes = (self.count, self.num_classes, self.num_prefix_tokens, self.views)
    if len(shape) != 2 or any(type(own) is not int for own in (*shape, *sizes)):
      raise ValueError(
        f'shape={self.shape}, count={self.count!r}, num_classes={self.num_classes!r}, '
        f'num_prefix_tokens={self.num_prefix_tokens!r}, views={self.views!r}: expected integers, and '
        '(tokens, width) as shape.'
      )
    object.__setattr__(self, 'shape', shape)
    if self.dtype not in DTYPES:
      raise ValueError(f'dtype={self.dtype!r}: expected one of {", ".join(DTYPES)}.')
    if min(self.shape) < 1 or self.count < 1 or self.num_classes < 1:
      raise ValueError(
        f'shape={self.shape}, count={self.count}, num_classes={self.num_classes}: expected at least 1.'
      )
    if self.views < 1 or self.count % self.views:
      raise ValueError(f'views={self.views}: expected a divisor of count={self.count}.')
    if not 0 <= self.num_prefix_tokens < shape[0]:
      raise ValueError(
        f'num_prefix_tokens={self.num_prefix_tokens}: expected 0 to {shape[0] - 1}, for patches are left.'
      )

  @property
  def record_bytes(self) -> int:
    """Bytes of a record's features: what is transferred for an image."""
    return math.prod(self.shape) * np.dtype(self.dtype).itemsize

  @property
  def wire_dtype(self) -> np.dtype:
    """The type as it is written: little-endian."""
    return np.dtype(self.dtype).newbyteorder('<')

  def to_json(self) -> str:
    """Returns the fields as text."""
    return json.dumps({'format': FORMAT, **dataclasses.asdict(self)})

  @classmethod
  def from_json(cls, text: str, where: str) -> FeatureHeader:
    """Returns the header that a text says; raises ValueError, naming `where`, if it says none."""
    try:
      held = json.loads(text)
      if held.pop('format') != FORMAT:
        raise ValueError('of another format')
      return cls(**held)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      raise ValueError(f'{where} is no header of features: {error}.') from None


def write_feature_file(
  path: str | os.PathLike, batches: Iterable[Batch], header: FeatureHeader
) -> None:
  """Writes features and labels, whole or not at all: first to `<path>.partial`, by one process at a time.

  Args:
    path: `.npz` or `.array_record`.
    batches: pairs of features `[batch, *header.shape]` and labels `[batch]`, `header.count` records in all.
    header: what they are.

  Raises:
    ValueError: for another kind of file, batches that are not what the header says, labels that are no
      classes, and values that are not finite in the header's type. The file that was there stays.
  """
  path = feature_path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # Under one name, so that what a killed process left is written over.
  partial = path.with_name(f'{path.name}.partial')
  partial.unlink(missing_ok=True)
  try:
    checked = check_batches(batches, header, str(path))
    if path.suffix == '.npz':
      _write_npz(partial, checked, header)
    else:
      _write_records(partial, checked, header)
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)


def feature_path(path: str | os.PathLike) -> pathlib.Path:
  """Returns the path of a file of features, an `epath` on buckets.

  Raises:
    ValueError: for another kind of file, and for `.array_record` on a bucket.
  """
  bucket = '://' in str(path)
  path = epath.Path(path) if bucket else pathlib.Path(path)
  if path.suffix not in SUFFIXES:
    raise ValueError(f'{path}: expected a file {" or ".join(SUFFIXES)}.')
  if bucket and path.suffix != '.npz':
    raise ValueError(f'{path}: expected .npz, other files of features are on local disks alone.')
  return path


def check_batches(batches: Iterable[Batch], header: FeatureHeader, where: str) -> Iterator[Batch]:
  """Yields batches as the header says they are; raises ValueError at the first that is not."""
  count = 0
  for features, labels in batches:
    features, labels = np.asarray(features), as_labels(labels, f'{where}: label')
    if features.shape[1:] != header.shape or len(features) != len(labels):
      raise ValueError(
        f'{where}: features {features.shape} and {len(labels)} labels; expected [records, '
        f'{", ".join(map(str, header.shape))}] and as many labels.'
      )
    with np.errstate(over='ignore'):
      narrow = features.astype(header.wire_dtype, copy=False)
    wrong = np.flatnonzero(~np.isfinite(narrow).reshape(len(narrow), -1).all(1))
    if wrong.size:
      raise ValueError(
        f'{where}: {wrong.size} records hold values that are not finite in {header.dtype}, the first is '
        f'record {count + wrong[0]}.'
      )
    try:
      check_labels(labels, header.num_classes)
    except ValueError as error:
      raise ValueError(f'{where}, from record {count} on: {error}') from None
    count += len(labels)
    if count > header.count:
      raise ValueError(f'{where}: at least {count} records, but the header says {header.count}.')
    yield narrow, labels
  if count != header.count:
    raise ValueError(f'{where}: {count} records, but the header says {header.count}.')


class FeatureFile:
  """A source of the records of a file: `features` of `header.shape`, `label`, `index`.

  All that can be wrong with the file is found before the first record is handed out.

  Args:
    path: see `write_feature_file`.
    expected: fields of the header that must have these values: `{'network': fingerprint}`.

  Attributes:
    header: what the features are.
    labels: int32 `[records]`.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: for one that is cut off, damaged or of another kind; features of another network or other
      data than expected; labels and features that are not equally many; values that are not finite.
  """

  def __init__(self, path: str | os.PathLike, expected: Mapping[str, Any] | None = None):
    self.path = feature_path(path)
    if not self.path.is_file():
      raise FileNotFoundError(f'{path}: there is no such file of features.')
    self._features, self._records = None, None
    # `header` is what is handed out, `_stored` what the file holds: see `astype`.
    if self.path.suffix == '.npz':
      text, features, labels = self._read_npz()
      self.header = FeatureHeader.from_json(text, str(path))
      if len(features) != len(labels):
        raise ValueError(f'{path}: {len(labels)} labels for features of {len(features)} records.')
      if features.dtype != self.header.wire_dtype:
        raise ValueError(f'{path}: features are {features.dtype}, not {self.header.dtype}.')
      self._features, self._stored = features, self.header
      batches = in_batches(features, labels)
    else:
      self._records = _open_records(self.path)
      self.header = self._stored = FeatureHeader.from_json(_text(self._records, 0), str(path))
      batches = self._stored_batches(256)
    if other := {
      name: (getattr(self.header, name), value)
      for name, value in (expected or {}).items()
      if getattr(self.header, name) != value
    }:
      told = '; '.join(
        f'{name} {held!r}, expected {want!r}' for name, (held, want) in other.items()
      )
      raise ValueError(f'{path} holds other features: {told}.')
    self.labels = np.concatenate([own for _, own in check_batches(batches, self.header, str(path))])
    self.num_classes = self.header.num_classes
    self.class_names = tuple(map(str, range(self.num_classes)))

  def __len__(self) -> int:
    return self.header.count

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f'record {index} of {len(self)}.')
    features = self._features[index] if self._records is None else self._record(index)[0]
    features = features.astype(self.header.wire_dtype, copy=False)
    return {'features': features, 'label': self.labels[index], 'index': np.int32(index)}

  def gather(self, indices: np.ndarray) -> Record:
    """Returns the records at `indices`, stacked."""
    indices = np.asarray(indices)
    if self._records is None:
      features = self._features[indices]
    else:
      features = np.stack([self._record(int(i))[0] for i in indices])
    return {
      'features': features.astype(self.header.wire_dtype, copy=False),
      'label': self.labels[indices],
      'index': indices.astype(np.int32),
    }

  def astype(self, dtype: str) -> FeatureFile:
    """Returns the same records rounded to a type as they are read: those of a file written in that type.

    Raises:
      ValueError: for a wider type than the file's, and values that are not finite in it.
    """
    if dtype == self.header.dtype:
      return self
    header = dataclasses.replace(self.header, dtype=dtype)
    if header.record_bytes > self.header.record_bytes:
      raise ValueError(
        f'{self.path}: dtype={dtype!r}: expected no wider one than {self.header.dtype}.'
      )
    for _ in check_batches(self.batches(), header, str(self.path)):
      pass
    found = copy.copy(self)
    found.header = header
    return found

  def batches(self, size: int = 256) -> Iterator[Batch]:
    """Yields all records' features and labels in order, `size` at a time."""
    for start in range(0, len(self), size):
      found = self.gather(np.arange(start, min(start + size, len(self))))
      yield found['features'], found['label']

  def _read_npz(self) -> tuple[str, np.ndarray, np.ndarray]:
    try:
      with self.path.open('rb') as stream:
        if not zipfile.is_zipfile(stream):
          raise ValueError('another kind of file, or cut off')
        stream.seek(0)
        with np.load(stream, allow_pickle=False) as file:
          return str(file['header']), file['features'], file['label']
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
      raise ValueError(f'{self.path} is no whole file of features: {error}.') from None

  def _record(self, index: int) -> tuple[np.ndarray, int]:
    blob = _read(self._records, index + 1)
    size = self._stored.record_bytes
    if len(blob) != size + 4:
      raise ValueError(f'{self.path}: record {index} has {len(blob)} bytes, expected {size + 4}.')
    features = np.frombuffer(blob, self._stored.wire_dtype, offset=4).reshape(self.header.shape)
    return features, int(np.frombuffer(blob, '<i4', count=1)[0])

  def _stored_batches(self, size: int) -> Iterator[Batch]:
    held = len(self._records) - 1
    for start in range(0, held, size):
      features, labels = zip(
        *(self._record(i) for i in range(start, min(start + size, held))), strict=True
      )
      yield np.stack(features), np.array(labels)


def _write_npz(path: pathlib.Path, batches: Iterable[Batch], header: FeatureHeader) -> None:
  """Writes what `np.savez` would, batch by batch."""
  about = {'descr': header.wire_dtype.str, 'fortran_order': False}
  about['shape'], labels = (header.count, *header.shape), []
  with path.open('wb') as stream, zipfile.ZipFile(stream, 'w') as file:
    with file.open('features.npy', 'w', force_zip64=True) as member:
      np.lib.format.write_array_header_1_0(member, about)
      for own, label in batches:
        member.write(own.tobytes())
        labels.append(label)
    for name, own in ('label', np.concatenate(labels)), ('header', np.array(header.to_json())):
      with file.open(f'{name}.npy', 'w') as member:
        np.lib.format.write_array(member, own, allow_pickle=False)


def _write_records(path: pathlib.Path, batches: Iterable[Batch], header: FeatureHeader) -> None:
  from array_record.python.array_record_module import ArrayRecordWriter

  writer = ArrayRecordWriter(str(path), 'group_size:1,uncompressed')
  try:
    writer.write(header.to_json().encode())
    for features, labels in batches:
      for own, label in zip(features, labels, strict=True):
        writer.write(np.asarray(label, '<i4').tobytes() + own.tobytes())
  finally:
    writer.close()


def _open_records(path: pathlib.Path) -> Any:
  from array_record.python.array_record_data_source import ArrayRecordDataSource

  try:
    records = ArrayRecordDataSource([str(path)])
    len(records)
  except (RuntimeError, ValueError, IndexError, OSError) as error:
    raise ValueError(f'{path} is no whole file of features: {error}.') from None
  return records


def _read(records: Any, index: int) -> bytes:
  try:
    return records[index]
  except (RuntimeError, ValueError, IndexError) as error:
    raise ValueError(f'record {index} of a file of features cannot be read: {error}.') from None


def _text(records: Any, index: int) -> str:
  return _read(records, index).decode('utf-8', 'replace')


def in_batches(features: np.ndarray, labels: np.ndarray, size: int = 256) -> Iterator[Batch]:
  """Yields arrays in parts of `size` records."""
  for start in itertools.count(0, size):
    if start >= len(features):
      return
    yield features[start : start + size], labels[start : start + size]
