"""Data sets of the TFDS catalogue."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlab.data.sources.image_file import FileBytes
from jaxlab.data.sources.source import Record


class Catalogue:
  """Any data set of the TFDS catalogue, read at random through array_record, without TensorFlow.

  `Catalogue('cifar10', 'train')`, `Catalogue('imagenet2012', 'validation', decode=False)`.

  Args:
    name: as in `tfds.builder`, e.g. 'cifar100', 'imagenet2012:5.1.0'.
    split: as in TFDS, e.g. 'train', 'test', 'train[:10%]'.
    data_dir: where TFDS keeps its data; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
    decode: False leaves `image` as encoded bytes, for `DecodeImage` (faster: JPEGs can be decoded at
      reduced size).
    fields: names of further features to put into the records.
    label: the feature that is the class; None: records hold none, but what `fields` names.
    labels: where an image has several labels, the feature that lists them, e.g. 'labels' (`voc`) or
      'objects/label' (`coco`): records hold `multi_label` (float32 `[num_classes]`, 1 for each class that is
      listed) in place of `label`.
    unsure: the feature that lists the classes that an image may count for as well, e.g. 'labels' of `voc`
      besides 'labels_no_difficult': records hold `known` (float32 `[num_classes]`, 0 for a class that is
      listed there alone).

  Raises:
    FileNotFoundError: if the data set is not prepared; the message holds the command that does it.
    ValueError: unknown name or split, or features without `image` or labels.
  """

  def __init__(
    self,
    name: str,
    split: str = 'train',
    data_dir: str | os.PathLike | None = None,
    decode: bool = True,
    fields: Sequence[str] = (),
    label: str | None = 'label',
    labels: str | None = None,
    unsure: str | None = None,
  ):
    import tensorflow_datasets as tfds

    try:
      builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    except tfds.core.registered.DatasetNotFoundError:
      raise ValueError(
        f'TFDS knows no data set {name!r}; see https://www.tensorflow.org/datasets/catalog.'
      ) from None
    except ValueError as error:  # found on disk, in another format
      if 'file_format' not in str(error) and 'file format' not in str(error):
        raise
      raise FileNotFoundError(prepare_advice(name, data_dir)) from error
    if not builder.is_prepared() or not builder.info.splits:
      raise FileNotFoundError(prepare_advice(name, data_dir))
    single = () if labels or label is None else (label,)
    for field in ('image', *single, *fields):
      if field not in builder.info.features:
        raise ValueError(
          f'TFDS {name!r} has no feature {field!r}; it has {sorted(builder.info.features)}.'
        )
    decoders = None if decode else {'image': tfds.decode.SkipDecoding()}
    try:
      self._source = builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError as error:  # prepared, but not as array_record
      raise FileNotFoundError(prepare_advice(name, data_dir)) from error
    self._fields, self._title = tuple(fields), f'{name}, split {split!r}'
    if unsure and not labels:
      raise ValueError(f'unsure={unsure!r} adds to labels, which is not given.')
    self._labels = tuple(labels.split('/')) if labels else ()
    self._unsure = tuple(unsure.split('/')) if unsure else ()
    features = builder.info.features
    self._label = None if labels else label
    if unsure:
      _listed(features, self._unsure, name)
    self.num_classes, self.class_names = 0, ()
    if labels or label is not None:
      classes = _listed(features, self._labels, name) if labels else features[label]
      self.num_classes = classes.num_classes
      self.class_names = tuple(classes.names or map(str, range(classes.num_classes)))

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Record:
    record = self._source[index]
    image = record['image']
    if isinstance(image, bytes):
      image = FileBytes(image, f'{self._title}, record {index}')
    return {
      'image': image,
      **self._labels_of(record),
      'index': np.int32(index),
      **{name: record[name] for name in self._fields},
    }

  def _labels_of(self, record: Record) -> Record:
    if not self._labels:
      return {} if self._label is None else {'label': np.int32(record[self._label])}
    found = {'multi_label': self._present(record, self._labels)}
    if self._unsure:
      listed = self._present(record, self._unsure)
      found['known'] = 1 - listed * (1 - found['multi_label'])
    return found

  def _present(self, record: Record, path: Sequence[str]) -> np.ndarray:
    """Returns 1 for each class that the sequence at `path` lists, else 0."""
    for part in path:
      record = record[part]
    present = np.zeros(self.num_classes, np.float32)
    present[np.asarray(record, np.int64)] = 1
    return present


def _listed(features: Any, path: Sequence[str], name: str) -> Any:
  """Returns the class labels that a sequence at `path` lists."""
  found = features
  for part in path:
    # What a sequence lists is its `feature`, by names where it lists several things.
    found = getattr(found, 'feature', found)
    if not hasattr(found, 'keys') or part not in found:
      raise ValueError(f'TFDS {name!r} has no feature {"/".join(path)!r}; it has {features}.')
    found = found[part]
  found = getattr(found, 'feature', found)
  if not hasattr(found, 'num_classes'):
    raise ValueError(f'TFDS {name!r}: {"/".join(path)!r} are no class labels but {found}.')
  return found


def prepare_advice(name: str, data_dir: str | os.PathLike | None = None) -> str:
  """Returns what to tell a user who lacks a TFDS data set: the command that prepares it."""
  folder = f' --data_dir={data_dir}' if data_dir else ''
  return (
    f'TFDS data set {name!r} is not prepared as array_record'
    f'{f" in {data_dir}" if data_dir else ""}. Prepare it once (this alone needs tensorflow, which may '
    'live in another environment):\n'
    '  pip install tensorflow tensorflow-datasets array-record\n'
    f'  tfds build {name} --file_format=array_record{folder}'
  )
