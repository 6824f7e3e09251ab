"""Labels that are wrong on purpose: the noise under which learning from noisy labels is measured.

Host code in NumPy on labels `[records]` of classes 0 .. num_classes - 1; a generator that is passed in is
advanced. The same generator and labels give the same noise.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxlab.data.sources.source import as_labels, check_labels

# Where CIFAR-10's classes are mistaken (Patrini et al. 2017): truck for automobile, bird for airplane, deer
# for horse, cat and dog for one another.
CIFAR10_CONFUSIONS = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}

# The superclass of each of CIFAR-100's classes (Krizhevsky 2009).
CIFAR100_SUPERCLASSES = (
  4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11,
  1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3,
  2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2,
  15, 6, 0, 17, 8, 14, 13,
)  # fmt: skip


def symmetric_noise(
  rng: np.random.Generator,
  labels: np.ndarray,
  rate: float,
  num_classes: int,
  *,
  include_true: bool = True,
) -> np.ndarray:
  """Replaces each label with probability `rate` by a uniform draw.

  Args:
    rng: NumPy generator; advanced.
    labels: integers `[records]`.
    rate: in [0, 1).
    num_classes: C.
    include_true: draws are of all classes, so that `rate * (C - 1) / C` of the labels become wrong (PENCIL's
      scripts); otherwise of the other ones.

  Returns:
    int32 `[records]`.

  Raises:
    ValueError: for a rate outside of its range, labels that are none, or fewer than two classes.

  >>> rng, labels = np.random.default_rng(0), np.arange(1000) % 10
  >>> float(np.mean(symmetric_noise(rng, labels, 0.5, 10, include_true=False) != labels))
  0.473
  """
  labels = _checked(labels, rate, num_classes)
  if num_classes < 2:
    raise ValueError(
      f'num_classes={num_classes}: expected at least two, to mistake one for another.'
    )
  drawn = rng.random(len(labels)) < rate
  if include_true:
    others = rng.integers(num_classes, size=len(labels))
  else:
    others = (labels + rng.integers(1, num_classes, size=len(labels))) % num_classes
  return np.where(drawn, others, labels).astype(np.int32)


def asymmetric_noise(
  rng: np.random.Generator, labels: np.ndarray, rate: float, confusions: Mapping[int, int]
) -> np.ndarray:
  """Replaces each label with probability `rate` by the class that it is mistaken for.

  Args:
    rng: NumPy generator; advanced.
    labels: integers `[records]`.
    rate: in [0, 1); the share of wrong labels of the classes that are mistaken.
    confusions: class -> the class that is given for it; other classes stay. See `CIFAR10_CONFUSIONS` and
      `next_class`.

  Returns:
    int32 `[records]`.

  Raises:
    ValueError: for a rate outside of its range, or labels that are none.

  >>> asymmetric_noise(np.random.default_rng(0), np.array([0, 1, 2, 1]), 0.9, {1: 2}).tolist()
  [0, 2, 2, 2]
  """
  labels = _checked(labels, rate)
  size = max([int(labels.max()), *confusions, *confusions.values()]) + 1
  others = np.arange(size)
  others[list(confusions)] = list(confusions.values())
  drawn = rng.random(len(labels)) < rate
  return np.where(drawn, others[labels], labels).astype(np.int32)


def next_class(groups: Sequence[int]) -> dict[int, int]:
  """Returns confusions of each class with the next one of its group, of the last with the first.

  Args:
    groups: of each class: zeros for pair noise over all classes, `CIFAR100_SUPERCLASSES` for the asymmetric
      noise of CIFAR-100.

  >>> next_class([0, 0, 0]), next_class([7, 3, 7, 3])
  ({0: 1, 1: 2, 2: 0}, {0: 2, 1: 3, 2: 0, 3: 1})
  """
  groups, found = np.asarray(groups), {}
  for group in np.unique(groups):
    members = np.flatnonzero(groups == group)
    found |= dict(zip(members.tolist(), np.roll(members, -1).tolist(), strict=True))
  return dict(sorted(found.items()))


def noise_rate(given: np.ndarray, true: np.ndarray) -> float:
  """Returns the share of labels, of any shape, that are not the true ones; one of -1 (no class) never is.

  >>> noise_rate(np.array([0, 1, 1, 0]), np.array([0, 1, 0, -1]))
  0.5
  """
  given, true = np.asarray(given), np.asarray(true)
  if given.shape != true.shape or not given.size:
    raise ValueError(
      f'given and true labels must be of one shape, got {given.shape}, {true.shape}.'
    )
  return float(np.mean(given != true))


def _checked(labels: np.ndarray, rate: float, num_classes: int | None = None) -> np.ndarray:
  if not 0 <= rate < 1:
    raise ValueError(f'rate={rate}: expected a share of wrong labels in [0, 1).')
  labels = as_labels(labels, 'labels')
  if num_classes is not None:
    check_labels(labels, num_classes)
  return labels
