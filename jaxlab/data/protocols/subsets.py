"""Small data: random parts of a set, as few images in all, of each class, or of few classes."""

import numpy as np

from jaxlab.data.protocols.few_shot import few_shot_split
from jaxlab.data.sources.source import as_labels


def sample_subset(
  rng: np.random.Generator,
  labels: np.ndarray,
  *,
  total: int | None = None,
  per_class: int | None = None,
  num_classes: int | None = None,
) -> np.ndarray:
  """Draws a part of a set without replacement.

  `total` alone: uniformly so many images; `per_class` alone: so many of each class; `num_classes` with one of
  them: so many classes, and `total / num_classes` or `per_class` images of each.

  Args:
    rng: NumPy generator; advanced.
    labels: integers `[records]`.
    total: images in all.
    per_class: images of each class.
    num_classes: classes, which are drawn uniformly.

  Returns:
    int64 positions without duplicates; of several classes class by class.

  Raises:
    ValueError: for a subset that is larger than the set, more images than a class has, more classes than
      there are, a total that does not divide over the classes; unless one of `total`, `per_class` is given.

  References:
    Cao & Wu, Rethinking Self-Supervised Learning: Small is Beautiful, 2021
    (https://arxiv.org/abs/2103.13559): 10 000 or 50 000 images of ImageNet.

  >>> labels = np.arange(60) % 3
  >>> rng = np.random.default_rng(0)
  >>> (
  ...   len(sample_subset(rng, labels, total=7)),
  ...   labels[sample_subset(rng, labels, per_class=2)].tolist(),
  ... )
  (7, [0, 0, 1, 1, 2, 2])
  """
  labels = as_labels(labels, 'labels')
  if (total is None) == (per_class is None):
    raise ValueError(
      f'total={total}, per_class={per_class}: expected one of the two, images in all or of each class.'
    )
  for name, value in (('total', total), ('per_class', per_class), ('num_classes', num_classes)):
    if value is not None and value < 1:
      raise ValueError(f'{name}={value}: expected at least 1.')
  if total is not None and total > len(labels):
    raise ValueError(f'total={total} exceeds the {len(labels)} images of the set.')
  if num_classes is None:
    if total is not None:
      return rng.permutation(len(labels))[:total]
    return few_shot_split(rng, labels, per_class)
  known = np.unique(labels)
  if num_classes > len(known):
    raise ValueError(f'num_classes={num_classes} exceeds the {len(known)} classes of the set.')
  if total is not None and total % num_classes:
    raise ValueError(f'total={total} does not divide over num_classes={num_classes}.')
  chosen = rng.permutation(known)[:num_classes]
  positions = np.flatnonzero(np.isin(labels, chosen))
  count = per_class if total is None else total // num_classes
  return positions[few_shot_split(rng, labels[positions], count)]
