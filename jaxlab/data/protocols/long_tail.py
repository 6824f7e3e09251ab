"""Long-tailed data sets: class counts, selections, groups of classes.

Host code in NumPy on labels `[records]` of classes 0 .. num_classes - 1; what comes out are counts and
positions. The exponential and step protocols are those of Cao et al., Learning Imbalanced Datasets with
Label-Distribution-Aware Margin Loss, NeurIPS 2019 (https://arxiv.org/abs/1906.07413), appendix.
"""

import numpy as np

from jaxlab.data.sources.source import (
  check_labels,
)


def exponential_counts(
  num_classes: int, max_count: int, ratio: float | None = None, *, factor: float | None = None
) -> np.ndarray:
  """Class counts that fall exponentially: `int(max_count * (1 / ratio) ** (c / (num_classes - 1)))`.

  Truncated, in float64. Class 0 is the head.

  Args:
    num_classes: number of classes C.
    max_count: images of class 0; 50000 / C in CIFAR-LT.
    ratio: imbalance, images of the first class to those of the last; >= 1.
    factor: in place of `ratio`: its inverse, which the published code takes (0.01 for ratio 100). Not every
      factor is `1 / ratio` of some float64, and truncation can make that an image.

  Returns:
    int64 `[num_classes]`.

  Raises:
    ValueError: numbers out of range, or a count that truncates to 0.

  >>> exponential_counts(10, 5000, ratio=100).tolist()
  [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
  """
  factor = _factor(num_classes, max_count, ratio, factor)
  last = max(num_classes - 1, 1)
  counts = [int(max_count * factor ** (c / last)) for c in range(num_classes)]
  return _positive(counts, max_count, factor)


def step_counts(
  num_classes: int, max_count: int, ratio: float | None = None, *, factor: float | None = None
) -> np.ndarray:
  """Class counts of two heights: `max_count` for the first C // 2 classes, `int(max_count / ratio)` else.

  Args:
    num_classes: number of classes C.
    max_count: images of a class of the first half.
    ratio: imbalance; >= 1. The count is `max_count * (1 / ratio)`, truncated, in float64.
    factor: in place of `ratio`: its inverse, as in `exponential_counts`.

  Returns:
    int64 `[num_classes]`.

  Raises:
    ValueError: numbers out of range, or a count that truncates to 0.
  """
  factor = _factor(num_classes, max_count, ratio, factor)
  head = num_classes // 2
  counts = [max_count] * head + [int(max_count * factor)] * (num_classes - head)
  return _positive(counts, max_count, factor)


def class_counts(
  labels: np.ndarray, num_classes: int | None = None, allow_empty: bool = False
) -> np.ndarray:
  """Counts the records of each class.

  Args:
    labels: integers `[records]`.
    num_classes: default: the largest label plus one.
    allow_empty: whether a class may have no records; losses and samplers need all.

  Returns:
    int64 `[num_classes]`.

  Raises:
    ValueError: labels out of range, or (unless allowed) a class without records, which is named.
  """
  labels = np.asarray(labels)
  if labels.ndim != 1 or not labels.size:
    raise ValueError(f'labels have shape {labels.shape}, expected a non-empty vector.')
  if num_classes is None:
    num_classes = int(labels.max()) + 1
  check_labels(labels, num_classes)
  counts = np.bincount(labels, minlength=num_classes).astype(np.int64)
  empty = np.flatnonzero(counts == 0)
  if empty.size and not allow_empty:
    raise ValueError(
      f'{_name_classes(empty)} no images among {len(labels)} labels of {num_classes} classes; every '
      'class needs at least one. Draw again with a smaller ratio, or relabel the classes that remain.'
    )
  return counts


def select_imbalanced(labels: np.ndarray, counts: np.ndarray, seed: int = 0) -> np.ndarray:
  """Selects `counts[c]` records of every class c, as the published CIFAR-LT sets do.

  NumPy's legacy generator `RandomState(seed)` shuffles, for c ascending, the positions of class c in
  place; the first `counts[c]` are taken.

  Args:
    labels: integers `[records]`.
    counts: integers `[num_classes]`, e.g. `exponential_counts(...)`.
    seed: 0 for the published sets.

  Returns:
    int64 `[counts.sum()]`: positions, class by class.

  Raises:
    ValueError: a class has fewer records than asked for, or a count < 1.
  """
  counts = np.asarray(counts)
  if counts.ndim != 1 or not np.issubdtype(counts.dtype, np.integer) or (counts < 1).any():
    raise ValueError(f'counts must be a vector of integers >= 1, got {counts}.')
  _require_available(labels, counts, 'counts ask for')
  rng = np.random.RandomState(seed)
  chosen = []
  for c, count in enumerate(counts):
    positions = np.flatnonzero(np.asarray(labels) == c)
    rng.shuffle(positions)
    chosen.append(positions[:count])
  return np.concatenate(chosen)


def split_long_tailed(
  labels: np.ndarray,
  *,
  max_count: int,
  ratio: float,
  test_per_class: int,
  seed: int = 0,
  num_classes: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Makes a long-tailed training set and a balanced test set of one small set of records.

  The test records are drawn first: they depend on (seed, test_per_class) alone, so that sets of different
  ratio are tested on the same images. The training sets of one seed are nested.

  Args:
    labels: integers `[records]`.
    max_count: training images of class 0.
    ratio: imbalance of the training set, see `exponential_counts`.
    test_per_class: test images of every class.
    seed: of the draws.
    num_classes: default: the largest label plus one.

  Returns:
    (train, test): int64 positions, class by class; disjoint.

  Raises:
    ValueError: a class has fewer records than asked for, or numbers out of range.

  >>> train, test = split_long_tailed(np.arange(60) % 3, max_count=12, ratio=4, test_per_class=5)
  >>> len(train), len(test), np.bincount(train % 3).tolist()
  (21, 15, [12, 6, 3])
  """
  if test_per_class < 1:
    raise ValueError(f'test_per_class is {test_per_class}, expected a number >= 1.')
  labels = np.asarray(labels)
  available = class_counts(labels, num_classes)
  counts = exponential_counts(len(available), max_count, ratio)
  what = f'test_per_class {test_per_class} and the training counts need'
  _require_available(labels, counts + test_per_class, what)
  rng = np.random.default_rng(seed)
  train, test = [], []
  for c, count in enumerate(counts):
    positions = rng.permutation(np.flatnonzero(labels == c))
    test.append(positions[:test_per_class])
    train.append(positions[test_per_class : test_per_class + count])
  return np.concatenate(train), np.concatenate(test)


def shot_groups(counts: np.ndarray, many: int = 100, few: int = 20) -> dict[str, np.ndarray]:
  """Groups classes by training images: many n > 100, few n < 20, medium otherwise (both bounds included).

  Args:
    counts: integers `[num_classes]`, of the training set.
    many: classes with more are 'many'; take a smaller number where the head has no more than 100.
    few: classes with fewer are 'few'.

  Returns:
    {'many', 'medium', 'few'}: bool `[num_classes]` each; every class is in exactly one group.

  Raises:
    ValueError: few > many + 1, which would put a class into two groups.

  References:
    Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019.
  """
  counts = np.asarray(counts)
  if counts.ndim != 1:
    raise ValueError(f'counts have shape {counts.shape}, expected [num_classes].')
  if few > many + 1:
    raise ValueError(f'few is {few}, many is {many}; expected few <= many + 1.')
  head, tail = counts > many, counts < few
  return {'many': head, 'medium': ~head & ~tail, 'few': tail}


def index_groups(counts: np.ndarray, boundaries: tuple[int, int]) -> dict[str, np.ndarray]:
  """Groups classes by their rank in training images, as MiSLAS and BTM do.

  Args:
    counts: integers `[num_classes]`, of the training set.
    boundaries: (a, b): the a classes with most images are 'many', those up to rank b 'medium', the rest
      'few'. Ranks of equal counts follow the class number. In the code of MiSLAS and BTM: CIFAR-100-LT
      (36, 71), ImageNet-LT (390, 835), Places-LT (131, 288), iNaturalist 2018 (842, 4543).

  Returns:
    {'many', 'medium', 'few'}: bool `[num_classes]` each.

  Raises:
    ValueError: unless 0 <= a <= b <= num_classes.
  """
  counts = np.asarray(counts)
  first, second = boundaries
  if counts.ndim != 1 or not 0 <= first <= second <= len(counts):
    raise ValueError(
      f'boundaries are {boundaries} for counts of shape {counts.shape}, expected 0 <= a <= b <= '
      'num_classes.'
    )
  rank = np.empty(len(counts), np.int64)
  rank[np.argsort(-counts, kind='stable')] = np.arange(len(counts))
  return {'many': rank < first, 'medium': (rank >= first) & (rank < second), 'few': rank >= second}


def undersample_indices(
  rng: np.random.Generator, labels: np.ndarray, cap: int, num_classes: int | None = None
) -> np.ndarray:
  """Draws min(n_c, cap) records of every class uniformly, without replacement.

  Args:
    rng: NumPy generator; advanced.
    labels: integers `[records]`.
    cap: most records of a class; 10 in BTM.
    num_classes: default: the largest label plus one.

  Returns:
    int64 `[sum_c min(n_c, cap)]`: positions, class by class.

  Raises:
    ValueError: cap < 1, or a class without records.

  References:
    Yu et al., Reviving Undersampling for Long-Tailed Learning (BTM), https://arxiv.org/abs/2401.16811.
  """
  if cap < 1:
    raise ValueError(f'cap is {cap}, expected a number >= 1.')
  counts = class_counts(labels, num_classes)
  members = np.split(np.argsort(labels, kind='stable'), np.cumsum(counts)[:-1])
  return np.concatenate([rng.permutation(rows)[:cap] for rows in members])


def balanced_subsets(
  rng: np.random.Generator,
  labels: np.ndarray,
  cap: int,
  num_subsets: int,
  num_classes: int | None = None,
) -> list[np.ndarray]:
  """Returns `num_subsets` independent draws of `undersample_indices`, all of one length.

  Raises:
    ValueError: num_subsets < 1, cap < 1, or a class without records.
  """
  if num_subsets < 1:
    raise ValueError(f'num_subsets is {num_subsets}, expected a number >= 1.')
  return [undersample_indices(rng, labels, cap, num_classes) for _ in range(num_subsets)]


def _factor(num_classes: int, max_count: int, ratio: float | None, factor: float | None) -> float:
  """Returns the imbalance factor, in (0, 1]; raises ValueError for numbers out of range."""
  if num_classes < 1 or max_count < 1:
    raise ValueError(
      f'num_classes is {num_classes}, max_count is {max_count}, expected numbers >= 1.'
    )
  if (ratio is None) == (factor is None):
    raise ValueError(f'ratio is {ratio}, factor is {factor}, expected one of them.')
  if factor is not None:
    if not 0 < factor <= 1:
      raise ValueError(
        f'factor is {factor}, expected a number in (0, 1]: images of the smallest class to those of the '
        'largest.'
      )
    return factor
  if not 1 <= ratio < float('inf'):
    raise ValueError(
      f'ratio is {ratio}, expected a number >= 1: images of the largest class to those of the smallest '
      '(the inverse of an imbalance factor).'
    )
  return 1 / ratio


def _positive(counts: list[int], max_count: int, factor: float) -> np.ndarray:
  result = np.array(counts, np.int64)
  empty = np.flatnonzero(result < 1)
  if empty.size:
    raise ValueError(
      f'{_name_classes(empty)} no images: max_count {max_count} at ratio {1 / factor:g} truncates to 0. Use '
      f'a ratio below {max_count}.'
    )
  return result


def _require_available(labels: np.ndarray, counts: np.ndarray, what: str) -> None:
  available = class_counts(labels, len(counts), allow_empty=True)
  short = np.flatnonzero(available < counts)
  if short.size:
    c = short[0]
    raise ValueError(
      f'class {c} has {available[c]} images, {what} {counts[c]} ({short.size} such classes). Lower '
      'the counts or bring more data.'
    )


def _name_classes(classes: np.ndarray) -> str:
  listed = ', '.join(map(str, classes[:5].tolist())) + (', ...' if len(classes) > 5 else '')
  return f'class {listed} has' if len(classes) == 1 else f'classes {listed} have'
