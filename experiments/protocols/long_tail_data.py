"""Long-tailed training sets and balanced test sets, from settings or from a user's own features."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.harness import data as harness_data
from experiments.harness import sources
from experiments.harness.data import Augment, Images
from experiments.harness.known_data import KNOWN
from experiments.harness.settings import found_by
from experiments.protocols.features import read_features
from experiments.protocols.stages import Staged
from jaxlab import data

# Published lists: classes, training images, most and fewest of a class, mean and deviation of channels.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LISTED = {
  'ImageNet_LT': (1000, 115846, 1280, 5, _IMAGENET),
  'Places_LT': (365, 62500, 4980, 5, _IMAGENET),
  'iNaturalist18': (8142, 437513, 1000, 2, ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))),
}


@dataclasses.dataclass(frozen=True)
class Imbalance:
  """Where a training set's imbalance comes from.

  - 'split': all records of a small set; `test_per_class` of each class are drawn for the test, then the
    training records with exponential counts. Both depend on the seed.
  - 'exponential', 'step': the training split, reduced by the published selection (legacy NumPy seed
    `selection_seed`), and the whole test split.
  - 'listed': files named by published text lists.
  - 'features': the records of `Imbalanced.features` as they are.

  Attributes:
    kind: of those.
    max_count: training images of the largest class.
    ratio: of the largest class to the smallest.
    test_per_class: see 'split'.
    selection_seed: see 'exponential'.
  """

  kind: Literal['split', 'exponential', 'step', 'listed', 'features']
  max_count: int = 1
  ratio: float = 1.0
  test_per_class: int = 0
  selection_seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongTailed(Images):
  """Images of imbalanced classes.

  A published list (`LISTED`) is read from `<folder>/<name>_train.txt` and so on, its photographs from below
  `<folder>/<name>`. They are decoded to 256x256 (shorter side, center) on the host and cropped from there on
  the device; tests see the central 224.

  Attributes:
    imbalance: where it comes from.
    folder: of published lists.
    validation_options: options of `jaxlab.data.ListedImages` for published validation records; None: there
      are none.
  """

  imbalance: Imbalance
  folder: str = 'data'
  validation_options: Mapping[str, Any] | None = None

  @classmethod
  def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
    """Puts in what is known of the data set."""
    name, folder = values.get('name', ''), values.get('folder', 'data')
    if name not in LISTED:
      known = {k: v for k, v in KNOWN.get(name, {}).items() if k != 'train_size'}
      return {**known, **values}
    classes, size, most, fewest, (mean, std) = LISTED[name]
    lists = {'train': 'train', 'test': 'test', 'validation': 'val'}
    if name == 'iNaturalist18':  # its validation list is what is tested on
      lists = {'train': 'train', 'test': 'val'}
    known = {
      f'{split}_options': {
        'path': f'{folder}/{name}_{file}.txt', 'root': f'{folder}/{name}', 'decode': False,
      }
      for split, file in lists.items()
    }  # fmt: skip
    return {
      'num_classes': classes, 'train_size': size, 'stored_image': (256, 256, 3), 'image_size': 224,
      'mean': mean, 'std': std, 'num_threads': 16, 'num_workers': 16, **known,
      'train_decode': {'size': 256, 'draft': True}, 'test_decode': {'size': 224, 'resize': 256},
      'imbalance': {'kind': 'listed', 'max_count': most, 'ratio': most / fewest}, **values,
    }  # fmt: skip

  @property
  def needs(self) -> str:
    """Where the data come from, in a sentence."""
    if self.imbalance.kind == 'listed':
      lists = (self.train_options, self.test_options, self.validation_options or {})
      files = [str(options['path']) for options in lists if options]
      return sources.listed(self.name, files, str(self.train_options['root']))
    if self.imbalance.kind in ('exponential', 'step'):
      return f'{super().needs}; the long-tailed selection is made from it'
    return super().needs

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    if self.imbalance.kind != 'features':
      yield from found_by('imbalance', nominal_facts, self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imbalanced(Staged):
  """Settings of an experiment on imbalanced classes.

  Attributes:
    data: the images.
    features: an npz file of a user's own features, which take the place of the images; see `with_features`.
    standardize_features: bring each of their dimensions to mean 0 and variance 1 over the training records.
      On pixels as they are, a loss with a floor below probabilities gives most examples no gradient: digits
      of values up to 16 or 255 end at a mean recall of 15 or 13 % in place of 93 % (3 seeds).
  """

  data: LongTailed
  features: str = ''
  standardize_features: bool = True


class Facts(NamedTuple):
  """What only the data know.

  Attributes:
    counts: training images of each class, int `[num_classes]`.
    size: their sum.
  """

  counts: np.ndarray
  size: int


class Sources(NamedTuple):
  """The data of an experiment.

  Attributes:
    train: long-tailed records.
    test: records of every class.
    validation: published validation records, where there are some and they were asked for.
    facts: about the training records.
  """

  train: data.Source
  test: data.Source
  validation: data.Source | None
  facts: Facts

  @property
  def labels(self) -> np.ndarray:
    """The labels of the test records."""
    return data.source_labels(self.test)


def nominal_facts(own: LongTailed) -> Facts:
  """Returns what the settings promise of the training records.

  Exact where it follows from them. For a published list the exponential profile from `max_count` down to
  `max_count / ratio`: enough to build and compile programs; training takes the list's own.
  """
  make = data.step_counts if own.imbalance.kind == 'step' else data.exponential_counts
  counts = make(own.num_classes, own.imbalance.max_count, own.imbalance.ratio)
  return Facts(counts, own.train_size or int(counts.sum()))


def load(config: Imbalanced, *, validation: bool = False) -> Sources:
  """Returns the data of an experiment; published validation records are read only if they are asked for.

  Raises:
    ValueError: if the data are not what the settings say.
    FileNotFoundError: if they are not there.
  """
  own, kind = config.data, config.data.imbalance.kind
  held_out = None
  if kind == 'features':
    train, test = features_of(config)
  elif kind == 'listed':
    train, test = (
      data.ListedImages(**options, num_classes=own.num_classes)
      for options in (own.train_options, own.test_options)
    )
    if validation and own.validation_options:
      held_out = data.ListedImages(**own.validation_options, num_classes=own.num_classes)
  else:
    train, test = (
      data.load(own.name, getattr(own, f'{split}_split'), **getattr(own, f'{split}_options'))
      for split in ('train', 'test')
    )
    if kind == 'split':
      train, test = pooled_split(train, test, own, config.seed)
    else:
      counts = nominal_facts(own).counts
      labels = data.source_labels(train)
      train = data.subset(
        train, data.select_imbalanced(labels, counts, own.imbalance.selection_seed)
      )
  harness_data.check_source(own, train)
  counts = data.class_counts(data.source_labels(train), own.num_classes)
  return Sources(train, test, held_out, Facts(counts, len(train)))


def pooled_split(
  train: data.Source, test: data.Source, own: LongTailed, seed: int
) -> tuple[data.Source, data.Source]:
  """Returns long-tailed training and balanced test records out of both splits of a set in memory."""
  parts = [data.materialize(source) for source in (train, test)]
  pool = data.InMemory(
    {name: np.concatenate([part[name] for part in parts]) for name in ('image', 'label')},
    own.num_classes,
  )
  chosen = data.split_long_tailed(
    pool.arrays['label'],
    max_count=own.imbalance.max_count,
    ratio=own.imbalance.ratio,
    test_per_class=own.imbalance.test_per_class,
    seed=seed,
  )
  return data.subset(pool, chosen[0]), data.subset(pool, chosen[1])


def with_features(config: Imbalanced) -> Imbalanced:
  """Returns the settings that run on `config.features` in place of images, if there are some.

  The backbone is the identity, so that every stage trains a linear classifier on the features, standardized
  or as they are; nothing is augmented, and the claims, whose margins belong to the setting's own data, are
  dropped.
  """
  if not config.features:
    return config
  arrays = read_features(config.features)
  records, dim = arrays['train_features'].shape
  own = LongTailed(
    name='features',
    num_classes=int(arrays['train_labels'].max()) + 1,
    train_size=records,
    stored_image=(1, 1, dim),
    dtype='float32',
    train_options={'sha1': digest(arrays), 'standardized': config.standardize_features},
    imbalance=Imbalance('features', *_extremes(arrays['train_labels'])),
  )
  return dataclasses.replace(
    config, data=own, model={'name': 'linear'}, augment=Augment(), claims=(), pictured=()
  )


def digest(arrays: Mapping[str, np.ndarray]) -> str:
  """Returns the SHA-1 of arrays: other features are another run."""
  found = hashlib.sha1()
  for name in sorted(arrays):
    found.update(np.ascontiguousarray(arrays[name]).data)
  return found.hexdigest()


def _extremes(labels: np.ndarray) -> tuple[int, float]:
  counts = np.bincount(labels)
  return int(counts.max()), float(counts.max() / counts.min())


def features_of(config: Imbalanced) -> tuple[data.Source, data.Source]:
  """Returns the training and test records of `config.features`."""
  arrays = read_features(config.features)
  if config.standardize_features:
    arrays |= standardized(arrays['train_features'], arrays['test_features'])
  return tuple(
    data.InMemory(
      {'image': arrays[f'{split}_features'][:, None, None], 'label': arrays[f'{split}_labels']},
      config.data.num_classes,
    )
    for split in ('train', 'test')
  )


def standardized(train: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
  """Returns `{train,test}_features` of mean 0 and variance 1 over `train`; a constant dimension becomes 0."""
  mean, deviation = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
  # What varies by rounding alone is constant.
  varies = deviation > 1e-6 * np.abs(train).max(0)
  scale = np.where(varies, 1 / np.where(varies, deviation, 1), 0)
  given = {'train_features': train, 'test_features': test}
  return {name: ((x - mean) * scale).astype(np.float32) for name, x in given.items()}


def held_out_counts(counts: np.ndarray, share: float) -> np.ndarray:
  """Returns how many records of each class a hold-out takes: the rounded share, at least one.

  Raises:
    ValueError: if nothing would be left of a class.
  """
  if not share:
    return np.zeros_like(counts)
  taken = np.maximum(np.round(share * counts).astype(counts.dtype), 1)
  if np.any(taken >= counts):
    worst = int(np.argmin(counts - taken))
    raise ValueError(
      f'holdout={share} leaves nothing of class {worst}, which has {counts[worst]} training images.'
    )
  return taken


def held_out(
  source: data.Source, counts: np.ndarray, share: float, seed: int
) -> tuple[data.Source, data.Source]:
  """Returns the records that a hold-out leaves, and those that it takes."""
  labels = data.source_labels(source)
  out = data.select_imbalanced(labels, held_out_counts(counts, share), seed)
  kept = np.setdiff1d(np.arange(len(labels)), out)
  return data.subset(source, kept), data.subset(source, out)
