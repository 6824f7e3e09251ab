"""Random-access sources of records: `len(source)`, `source[i] -> dict`.

A record holds `image` (uint8 `[height, width, channels]`), `label` (np.int32) and `index` (np.int32, its
position in the source). A source also has `num_classes` and `class_names`.
"""

import gzip
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

Record = dict[str, Any]

FASHION_MNIST_CLASSES = (
  'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat',
  'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot',
)  # fmt: skip
FASHION_MNIST_DIR = '/usr/share/datasets/fashion-mnist'  # of Debian's dataset-fashion-mnist
FASHION_MNIST_VARIABLE = 'JAXLAB_FASHION_MNIST_DIR'


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
    ValueError: lengths that differ, labels out of range, NaN images.
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
      self.arrays['label'] = labels = labels.astype(np.int32)
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


class Digits(InMemory):
  """scikit-learn's 1797 handwritten digits, 8x8 gray, 10 classes; needs no network.

  Args:
    split: 'train' (1297 with the default test_size) or 'test'.
    seed: of the random split; the test records are the first of the permutation.
    test_size: number of test records.

  The 17 gray levels of the original are spread over 0..255.
  """

  def __init__(self, split: str = 'train', seed: int = 0, test_size: int = 500):
    from sklearn.datasets import load_digits

    _check_split(split, ('train', 'test'))
    digits = load_digits()
    if not 0 < test_size < len(digits.target):
      raise ValueError(f'test_size is {test_size}, expected 1 to {len(digits.target) - 1}.')
    order = np.random.default_rng(seed).permutation(len(digits.target))
    rows = order[:test_size] if split == 'test' else order[test_size:]
    images = np.round(digits.images[rows] * (255 / 16)).astype(np.uint8)[..., None]
    super().__init__({'image': images, 'label': digits.target[rows]}, 10)


class FashionMNIST(InMemory):
  """Fashion-MNIST (Xiao et al. 2017): 60000 + 10000 images, 28x28 gray, 10 classes.

  Args:
    split: 'train' or 'test'.
    folder: holds `{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]`. Default: the environment variable
      JAXLAB_FASHION_MNIST_DIR, else the folder of Debian's package `dataset-fashion-mnist`; when the
      default folder has no such files, TFDS is asked.

  Raises:
    FileNotFoundError: if the data is nowhere; the message says how to get it.
  """

  def __init__(self, split: str = 'train', folder: str | os.PathLike | None = None):
    _check_split(split, ('train', 'test'))
    chosen = folder or os.environ.get(FASHION_MNIST_VARIABLE)
    path = pathlib.Path(chosen or FASHION_MNIST_DIR)
    prefix = 'train' if split == 'train' else 't10k'
    images, labels = _find(path, f'{prefix}-images-idx3-ubyte'), None
    if images:
      labels = _find(path, f'{prefix}-labels-idx1-ubyte')
    if images and labels:
      arrays = {'image': _read_idx(images)[..., None], 'label': _read_idx(labels)}
    else:
      advice = (
        f'No Fashion-MNIST idx files in {path}. Install them (Debian, Ubuntu: '
        '`apt install dataset-fashion-mnist`), name their folder by the argument `folder` or by '
        f'${FASHION_MNIST_VARIABLE}'
      )
      if chosen:
        raise FileNotFoundError(f'{advice}.')
      try:
        arrays = materialize(Catalogue('fashion_mnist', split))
      except FileNotFoundError as error:
        raise FileNotFoundError(f'{advice}, or use TFDS. {error}') from None
    super().__init__(arrays, 10, FASHION_MNIST_CLASSES)


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


class ImageFolder:
  """Image files in one subfolder per class: `root/<class>/**/*.jpg`; classes and files sorted by name.

  Args:
    root: the folder.
    decode: False leaves `image` as the file's bytes, for `DecodeImage`.

  Raises:
    FileNotFoundError: if root is no folder.
    ValueError: if it has no subfolders, or a class has no images.
  """

  extensions = frozenset({'.jpg', '.jpeg', '.png', '.bmp', '.webp', '.ppm', '.tif', '.tiff'})

  def __init__(self, root: str | os.PathLike, decode: bool = True):
    root = pathlib.Path(root)
    if not root.is_dir():
      raise FileNotFoundError(f'root {root} is not a folder.')
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith('.'))
    if not folders:
      raise ValueError(f'{root} has no subfolders; expected one per class: {root}/<class>/<image>.')
    self.class_names = tuple(folder.name for folder in folders)
    self.num_classes = len(folders)
    self._files: list[tuple[pathlib.Path, int]] = []
    for label, folder in enumerate(folders):
      files = sorted(p for p in folder.rglob('*') if p.suffix.lower() in self.extensions)
      if not files:
        raise ValueError(f'class folder {folder} holds no images ({", ".join(self.extensions)}).')
      self._files += [(file, label) for file in files]
    self._decode = decode

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: int) -> Record:
    path, label = self._files[index]
    image: Any = path.read_bytes()
    if self._decode:
      from jaxlab.data.decode import decode_image

      try:
        image = decode_image(image)
      except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return {'image': image, 'label': np.int32(label), 'index': np.int32(index)}


def _check_split(split: str, known: Sequence[str]) -> None:
  if split not in known:
    raise ValueError(f'split is {split!r}, expected one of {list(known)}.')


def _count_classes(labels: np.ndarray | None) -> int:
  return 0 if labels is None else int(labels.max()) + 1


def _find(folder: pathlib.Path, name: str) -> pathlib.Path | None:
  candidates = (folder / name, folder / f'{name}.gz')
  return next((path for path in candidates if path.exists()), None)


def _read_idx(path: pathlib.Path) -> np.ndarray:
  """Reads an idx file of unsigned bytes: 0, 0, type, rank, sizes (big-endian int32), data."""
  with gzip.open(path) if path.suffix == '.gz' else path.open('rb') as file:
    data = file.read()
  rank = data[3] if data[:3] == b'\x00\x00\x08' else 0
  header = 4 + 4 * rank
  shape = np.frombuffer(data[4:header], '>i4')
  if not rank or len(shape) != rank or len(data) != header + shape.prod(dtype=np.int64):
    raise ValueError(f'{path} is not a complete idx file of unsigned bytes; fetch it again.')
  return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
