"""Small data: the part of a set that something is trained on."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from experiments.harness.data import Images
from jaxlab import data


@dataclasses.dataclass(frozen=True)
class Subset:
  """A part of a set, see `jaxlab.data.sample_subset`; without values the whole."""

  total: int | None = None
  per_class: int | None = None
  num_classes: int | None = None

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.total is not None and self.per_class is not None:
      yield f'total={self.total}, per_class={self.per_class}: expected one of the two.'
    elif self.num_classes is not None and self.total is None and self.per_class is None:
      yield f'num_classes={self.num_classes}: give total or per_class, too.'
    for name, value in dataclasses.asdict(self).items():
      if value is not None and value < 1:
        yield f'{name}={value}: expected at least 1.'
    if self.total and self.num_classes and self.total % self.num_classes:
      yield f'total={self.total} does not divide over num_classes={self.num_classes}.'

  def of(self, own: Images) -> Images:
    """Returns the section of the part.

    Raises:
      ValueError: if the set has not so many images or classes.
    """
    classes = self.num_classes or own.num_classes
    count = self.total or (self.per_class or 0) * classes or own.train_size
    if classes > own.num_classes or count > own.train_size:
      raise ValueError(
        f'{count} images of {classes} classes exceed the {own.train_size} of {own.num_classes}.'
      )
    return dataclasses.replace(own, train_size=count)

  def draw(self, rng: np.random.Generator, source: data.Source) -> data.Source:
    """Returns the part of a source; advances the generator.

    Raises:
      ValueError: if a class has not so many images.
    """
    if self == Subset():
      return source
    # Without classes labels need not be read.
    labels = np.zeros(len(source), np.int32)
    if self.per_class is not None or self.num_classes is not None:
      labels = data.source_labels(source)
    return data.subset(source, data.sample_subset(rng, labels, **dataclasses.asdict(self)))
