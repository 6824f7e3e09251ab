"""Few-shot data: images of base classes, to learn from, and of novel ones, which episodes are drawn from."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from experiments.harness import data as harness_data
from experiments.harness.data import Images
from jaxlab import data


class Published(NamedTuple):
  """A split into base and novel classes that is in general use.

  Attributes:
    classes: base classes.
    base: their images.
    novel: images of novel classes.
    side: of the network's view, in pixels.
    source: where images and classes come from.
  """

  classes: int
  base: int
  novel: int
  side: int
  source: str


PUBLISHED = {
  'mini_imagenet': Published(
    64, 64 * 600, 20 * 600, 84,
    'photographs of ImageNet; base is train.csv and novel test.csv of Ravi & Larochelle 2017 '
    '(github.com/twitter-research/meta-learning-lstm, data/miniImagenet), 600 images a class',
  ),
  'tiered_imagenet': Published(
    351, 448695, 206209, 84,
    'photographs of ImageNet; base is train.csv and novel test.csv of Ren et al. 2018 '
    '(github.com/renmengye/few-shot-ssl-public, fewshot/data/tiered_imagenet_split), 351 and 160 classes',
  ),
  'cub': Published(
    100, 5885, 2953, 84,
    'CUB-200-2011 (data.caltech.edu/records/65de6-vp158); of its 200 class folders base has the 1st, 3rd, '
    '5th, ..., novel the 4th, 8th, 12th, ... (Chen et al. 2019, github.com/wyharveychen/CloserLookFewShot)',
  ),
  'cifar_fs': Published(
    64, 64 * 600, 20 * 600, 32,
    'the images of CIFAR-100 as files, training and test together, 600 a class; base and novel are the '
    'training and test classes of Bertinetto et al. 2019 (github.com/bertinetto/r2d2)',
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseAndNovel(Images):
  """Images of base classes (the training records) and of novel ones (the test records).

  A published set (`PUBLISHED`) is read from `<folder>/<name>/base` and `<folder>/<name>/novel`, one folder a
  class. Images are brought to 1.15 times the side of the network's view on the host, and cropped from there
  on the device.

  Attributes:
    base_classes: labels of the training split that are base classes; None: all.
    novel_classes: likewise of the test split.
    novel_size: images of novel classes; programs are made for them.
    folder: of published sets.
  """

  base_classes: tuple[int, ...] | None = None
  novel_classes: tuple[int, ...] | None = None
  novel_size: int
  folder: str = 'data'

  @classmethod
  def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
    """Puts in what is known of the data set."""
    name, folder = values.get('name', ''), values.get('folder', 'data')
    if name not in PUBLISHED:
      return super().complete(values)
    own, options = PUBLISHED[name], {'root': f'{folder}/{name}', 'decode': False}
    stored = int(1.15 * own.side)
    return {
      'num_classes': own.classes, 'train_size': own.base, 'novel_size': own.novel,
      'train_split': 'base', 'test_split': 'novel', 'train_options': options, 'test_options': options,
      'train_decode': {'size': stored}, 'test_decode': {'size': stored},
      'stored_image': (stored, stored, 3), 'image_size': own.side, 'num_threads': 16,
      'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225), **values,
    }  # fmt: skip

  @property
  def needs(self) -> str:
    """Where the data come from, in a sentence."""
    if self.name not in PUBLISHED:
      return super().needs
    folders = ' and '.join(
      f'{getattr(self, f"{split}_options")["root"]}/{getattr(self, f"{split}_split")}'
      for split in ('train', 'test')
    )
    return f'one folder a class in {folders}: {PUBLISHED[self.name].source}'

  def check(self) -> Any:
    """Yields what is wrong with the values."""
    yield from super().check()
    if self.train_size is None:
      yield 'train_size: missing; schedule and programs are made for it.'
    for name in ('train_size', 'novel_size'):
      if (size := getattr(self, name)) is not None and size < 1:
        yield f'{name}={size}: expected at least 1.'
    for name in ('base_classes', 'novel_classes'):
      if (classes := getattr(self, name)) is not None and len(set(classes)) < max(len(classes), 1):
        yield f'{name}={classes}: expected different labels.'


class Sources(NamedTuple):
  """The data of an experiment.

  Attributes:
    base: images of base classes.
    novel: images of novel classes.
  """

  base: data.Source
  novel: data.Source


def load(own: BaseAndNovel) -> Sources:
  """Returns the images of base and of novel classes, their labels and first records looked at.

  Raises:
    ValueError: if they are not what the setting says.
    FileNotFoundError: if they are not there; the message says what is needed.
  """
  base, novel = _load(own, 'train', own.base_classes), _load(own, 'test', own.novel_classes)
  harness_data.check_source(own, base)
  data.check_labels(data.source_labels(base), own.num_classes)
  harness_data.check_size('data.novel_size', own.novel_size, novel)
  transform = harness_data.reading(own, 'test')['transform']
  first = next(data.epoch_batches(data.subset(novel, range(2)), 2, transform=transform))
  data.check_batch(first, image_shape=own.stored_image)
  return Sources(base, novel)


def _load(own: BaseAndNovel, split: str, classes: tuple[int, ...] | None) -> data.Source:
  name = 'image_folder' if own.name in PUBLISHED else own.name
  try:
    options = dict(getattr(own, f'{split}_options'))
    if name == 'image_folder':  # novel classes are others than those of the base
      options.setdefault('classes_of', None)
    source = data.load(name, getattr(own, f'{split}_split'), **options)
  except FileNotFoundError as error:
    raise FileNotFoundError(f'{error} {own.name} needs {own.needs}.') from error
  if classes is None:
    return source
  return data.subset(source, np.flatnonzero(np.isin(data.source_labels(source), classes)))
