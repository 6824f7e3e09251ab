"""Small data: random parts of a set, as few images in all, of each class, or of few classes."""

import numpy as np

from jaxlab.data.protocols.few_shot import few_shot_split
from jaxlab.data.sources.source import InMemory, Source, as_labels, source_labels


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


def sample_tiny_set(
  rng: np.random.Generator, labels: np.ndarray | Source, total: int
) -> np.ndarray:
  """Draws a few images, class by class: each time a class, uniformly, and an image of it that is still left.

  From as many images on as there are classes, `total / classes` of each: classes are equally frequent either
  way, also in a set where they are not. A source whose labels are not in memory is read at random until
  all images are found: some thousands of ImageNet for a thousand.

  Args:
    rng: NumPy generator; advanced.
    labels: integers `[records]`, or a source with them.
    total: images in all; from the number of classes on a multiple of it.

  Returns:
    int64 positions without duplicates.

  Raises:
    ValueError: for a total that is not positive, larger than the set, or no multiple of the classes; or a
      class with too few images for its share.

  References:
    The code of Wang & Wu, Practical Network Acceleration with Tiny Sets, CVPR 2023
    (https://arxiv.org/abs/2202.07861), which draws 50, 100 and 500 images of ImageNet so, and 1000 as one of
    each class.

  >>> labels = np.repeat(np.arange(100), 5)
  >>> drawn = sample_tiny_set(np.random.default_rng(0), labels, 50)
  >>> len(set(drawn.tolist())), len(set(labels[drawn].tolist())) < 50
  (50, True)
  """
  read = None
  if not isinstance(labels, np.ndarray):
    read = labels
    if isinstance(read, InMemory) or hasattr(read, 'labels'):
      labels, read = source_labels(read), None
  classes = np.arange(read.num_classes) if read else np.unique(as_labels(labels, 'labels'))
  size, share = len(labels), total // len(classes)
  if not 1 <= total <= size:
    raise ValueError(f'total={total}: expected 1 to {size}, the images of the set.')
  if share and total % len(classes):
    raise ValueError(f'total={total} is no multiple of the {len(classes)} classes of the set.')
  order = iter(rng.permutation(size))
  left: dict[int, list[int]] = {int(own): [] for own in classes}

  def one_of(own: int) -> int | None:
    while not left[own]:
      if (index := next(order, None)) is None:
        return None
      left[int(read[int(index)]['label'] if read else labels[index])].append(int(index))
    return left[own].pop(0)

  if share:
    drawn = [one_of(int(own)) for own in np.repeat(classes, share)]
    if None in drawn:
      short = classes[drawn.index(None) // share]
      raise ValueError(f'total={total}: class {short} has fewer than its {share} images.')
    return np.array(drawn, np.int64)
  drawn = []
  while len(drawn) < total:
    if (index := one_of(int(rng.choice(classes)))) is not None:
      drawn.append(index)
  return np.array(drawn, np.int64)
