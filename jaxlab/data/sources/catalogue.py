"""Data sets of the TFDS catalogue."""

import os
from collections.abc import Sequence

import numpy as np

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

  Raises:
    FileNotFoundError: if the data set is not prepared; the message holds the command that does it.
    ValueError: unknown name or split, or features without `image` or `label`.
  """

  def __init__(
    self,
    name: str,
    split: str = 'train',
    data_dir: str | os.PathLike | None = None,
    decode: bool = True,
    fields: Sequence[str] = (),
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
    for field in ('image', 'label', *fields):
      if field not in builder.info.features:
        raise ValueError(
          f'TFDS {name!r} has no feature {field!r}; it has {sorted(builder.info.features)}.'
        )
    decoders = None if decode else {'image': tfds.decode.SkipDecoding()}
    try:
      self._source = builder.as_data_source(split=split, decoders=decoders)
    except NotImplementedError as error:  # prepared, but not as array_record
      raise FileNotFoundError(prepare_advice(name, data_dir)) from error
    self._fields = tuple(fields)
    label = builder.info.features['label']
    self.num_classes = label.num_classes
    self.class_names = tuple(label.names or map(str, range(label.num_classes)))

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> Record:
    record = self._source[index]
    return {
      'image': record['image'],
      'label': np.int32(record['label']),
      'index': np.int32(index),
      **{name: record[name] for name in self._fields},
    }


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
