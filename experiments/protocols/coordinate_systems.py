"""Coordinate systems of a teacher's features: their axes, bits that are stored of each image, a picture."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import jax
import numpy as np

from experiments.harness import pictures
from experiments.harness.runs import say
from experiments.harness.sections import Experiment
from experiments.protocols import teacher_features
from experiments.protocols.teacher_features import Arrays
from jaxlab import evaluation, losses

Array = jax.Array

RECORDS = 65536  # whose bits are found at once


@dataclasses.dataclass(frozen=True)
class Coordinates:
  """The coordinate system, and how it is tailored.

  Attributes:
    count: of axes; None: all that there are, or by
    share: of the variance that they explain; None: by `count`.
    multiple: that their number is rounded up to, for `share`.
    keep: axes that are left; None: half of them.
    rounds: removals.
    begin: share of the training behind which gradients are summed.
    end: share behind which no axis is removed.
    importance: 'absolute' sums the sizes of gradients, 'squared' their squares.
  """

  count: int | None = None
  share: float | None = None
  multiple: int = 1
  keep: int | None = None
  rounds: int = 10
  begin: float = 0.1
  end: float = 0.5
  importance: Literal['absolute', 'squared'] = 'absolute'

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.count is not None and self.share is not None:
      yield f'count={self.count}, share={self.share}: expected one of the two.'
    if self.share is not None and not 0 < self.share <= 1:
      yield f'share={self.share}: expected a share in (0, 1].'
    for name in ('count', 'keep', 'multiple', 'rounds'):
      if getattr(self, name) is not None and getattr(self, name) < 1:
        yield f'{name}={getattr(self, name)}: expected at least 1.'
    if not 0 <= self.begin < self.end <= 1:
      yield f'begin={self.begin}, end={self.end}: expected shares of the training in this order.'

  def left_of(self, count: int) -> int:
    """Returns how many of so many axes are left at the end."""
    return self.keep or max(count // 2, 1)


class Space(NamedTuple):
  """What a teacher leaves behind for the training.

  Attributes:
    mean: of its features.
    axes: 'pca' of them, and as many 'random' ones, `[dim, count]`.
    variance: along all axes of PCA.
    stored: bits of every image, and the hyperplanes, `bits`, `weight`, `bias`.
  """

  mean: np.ndarray
  axes: Mapping[str, np.ndarray]
  variance: np.ndarray
  stored: Mapping[str, Array]

  @property
  def count(self) -> int:
    """Number of axes."""
    return self.axes['pca'].shape[1]


def space(config: Experiment, features: np.ndarray) -> Space:
  """Returns the coordinates of a teacher's features `[records, dim]`, and its bits.

  Args:
    config: the experiment; its section `coordinates`, and `bits` and `std` of hyperplanes are used.
    features: without augmentation.

  Raises:
    ValueError: for features that are of no use, or have fewer axes than the settings ask for.
  """
  teacher_features.require_features(features)
  records, dim = features.shape
  if records <= dim:
    say(f'WARNING: {records} images of {dim} features: their axes are poor estimates.')
  found, own = losses.coordinate_system(features), config.coordinates
  there = len(found.variance)
  count = own.count or there
  if own.share is not None:
    count = losses.num_components(found.variance, own.share, own.multiple)
  if count > there or (own.keep or 1) > count:
    raise ValueError(
      f'coordinates.count={count}, keep={own.keep}: the features have {there} axes with variance.'
    )
  key, hash_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1))
  random = np.linalg.qr(np.asarray(jax.random.normal(key, (dim, dim))))[0][:, :count]
  std = config.std or float(found.variance.sum() ** -0.5)
  weight = losses.draw_hyperplanes(hash_key, dim, config.bits, std)
  bias = losses.hyperplane_bias(weight, features)
  starts = range(0, records, RECORDS)
  bits = [losses.hash_bits(features[start : start + RECORDS], weight, bias) for start in starts]
  stored = {'bits': np.concatenate(bits), 'weight': weight, 'bias': bias}
  share = found.variance[:count].sum() / found.variance.sum()
  say(f'{count} of {dim} axes, {100 * share:.1f} % of the variance')
  axes = {'pca': found.components[:, :count], 'random': random}
  return Space(found.mean, axes, found.variance, stored)


def probe(told: Mapping[str, Arrays], axes: np.ndarray | None = None) -> float:
  """Returns the accuracy of a linear classifier of a teacher's features, in percent.

  Args:
    told: of the splits 'train' and 'test', see `teacher_features.compute`.
    axes: along which; None: as they are.
  """
  both = [told[split]['features'] for split in ('train', 'test')]
  both = both if axes is None else [own @ axes for own in both]
  scale = np.sqrt(np.mean(np.square(both[0] - both[0].mean(0)))) or 1.0
  train, test = ((own - both[0].mean(0)) / scale for own in both)
  labels = [told[split]['targets'] for split in ('train', 'test')]
  fitted = evaluation.logistic_probe(
    train, labels[0], num_classes=int(max(labels[0].max(), labels[1].max())) + 1, steps=400,
    learning_rate=0.05,
  )  # fmt: skip
  return 100 * float(evaluation.probe_accuracy(fitted, test, labels[1]))


def draw(
  config: Experiment, found: Space, told: Mapping[str, Arrays], picture: pathlib.Path
) -> None:
  """Draws over the number of axes the variance that they keep, and a probe's accuracy along them."""
  kept = 100 * np.cumsum(found.variance) / found.variance.sum()
  count = found.count
  probed = [own for own in config.probed if own <= count]
  with pictures.drawn(picture, 1, 2, size=(10, 3.8)) as (left_axis, right_axis):
    left_axis.plot(range(1, len(kept) + 1), kept)
    marks = {'axes': count, 'left': config.coordinates.left_of(count)}
    for (label, place), style in zip(marks.items(), (':', '--'), strict=True):
      left_axis.axvline(place, color='gray', linestyle=style, label=f'{label}: {place}')
    left_axis.set_ylabel('variance of the teacher (%)')
    for label, axes in found.axes.items():
      values = [probe(told, axes[:, :own]) for own in probed]
      right_axis.plot(probed, values, marker='o', label=label)
    right_axis.set_ylabel('linear probe of the teacher (%)')
    for axis in (left_axis, right_axis):
      axis.set_xlabel('axes')
      axis.legend(frameon=False, fontsize=8)
    left_axis.figure.suptitle(pictures.title(config))
