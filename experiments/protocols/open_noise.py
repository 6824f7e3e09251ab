"""Noise of an open world: images of no class among the training records, labels moved, classes unequal."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from experiments.harness import sources as known_sources
from experiments.harness.data import Records
from experiments.harness.settings import found_by
from jaxlab import data


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenNoise(Records):
  """Unequal classes whose labels are wrong in two ways, see `jaxlab.data.make_ncifar`.

  The data set is the one whose images are of no class.

  Attributes:
    closed_rate: share of labels that are moved to another class.
    open_rate: share of images that are replaced by such of no class.
    imbalance: largest class over smallest.
    max_count: records of the largest class.
    without: classes of the other data set that are left out, as they look like classes of this one.
  """

  closed_rate: float
  open_rate: float
  max_count: int
  imbalance: float = 1.0
  without: tuple[int, ...] = ()

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not (self.closed_rate >= 0 <= self.open_rate and self.closed_rate + self.open_rate < 1):
      yield (
        f'closed_rate={self.closed_rate}, open_rate={self.open_rate}: expected rates of at least 0 with a '
        'sum below 1.'
      )
    yield from found_by(
      'imbalance, max_count', data.exponential_counts, 2, self.max_count, self.imbalance
    )

  @property
  def needs(self) -> str:
    """Where the images of no class come from, in a sentence."""
    return known_sources.needs(self.name, self.train_options.get('root'))

  def images(self) -> np.ndarray:
    """Returns the images of no class."""
    source = data.in_memory(data.load(self.name, self.train_split, **self.train_options))
    keep = ~np.isin(source.arrays['label'], self.without)
    return source.arrays['image'][keep]

  def size(self, num_classes: int) -> int:
    """Returns the number of training records that are drawn."""
    return int(data.exponential_counts(num_classes, self.max_count, self.imbalance).sum())

  def draw(self, rng: np.random.Generator, train: data.InMemory) -> 'Drawn':
    """Returns records with the noise, of clean ones."""
    made = data.make_ncifar(
      rng, train.arrays['image'], train.arrays['label'], self.images(), self.closed_rate, self.open_rate,
      self.imbalance, max_count=self.max_count,
    )  # fmt: skip
    arrays = {'image': made['image'], 'label': made['noisy_label']}
    noisy = data.InMemory(arrays, train.num_classes, train.class_names)
    return Drawn(noisy, made['noisy_label'], made['true_label'])


class Drawn(NamedTuple):
  """What `OpenNoise.draw` returns.

  Attributes:
    train: records with the labels as they are given.
    given: these labels, int32 `[records]`.
    true: what they are, -1 for images of no class.
  """

  train: data.InMemory
  given: np.ndarray
  true: np.ndarray
