"""Orders of training that weigh classes or parts of a set: the argument `sampler` of `make_loader`.

A sampler is a pure function `epoch -> indices` of its labels and its seed, so that a resumed loader draws
what the uninterrupted one would have. Draws repeat records, often within a batch: give repetitions
augmentations of their own by keys from the position in the batch instead of `index`.

The laws are those of Kang et al., Decoupling Representation and Classifier for Long-Tailed Recognition,
ICLR 2020 (https://arxiv.org/abs/1910.09217), section 3.1; n_c counts the records of class c.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from jaxlab.data.protocols.long_tail import class_counts

Sampler = Callable[[int], np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class _Sampler:
  """Labels `[records]` of the source, a seed, and the number of draws in an epoch (None: records).

  Raises:
    ValueError: labels that are no class numbers, a class below the largest without records,
      seed < 0, num_samples < 1.
  """

  labels: np.ndarray
  seed: int = 0
  num_samples: int | None = None

  def __post_init__(self):
    if self.seed < 0:
      raise ValueError(f'seed is {self.seed}, expected a number >= 0.')
    if self.num_samples is not None and self.num_samples < 1:
      raise ValueError(f'num_samples is {self.num_samples}, expected a number >= 1 or None.')
    # At once, not when first drawn: this raises for labels that are none.
    object.__setattr__(self, 'labels', np.asarray(self.labels))
    object.__setattr__(self, 'counts', class_counts(self.labels))

  @functools.cached_property
  def members(self) -> np.ndarray:
    """The records sorted by class, `[records]`."""
    return np.argsort(self.labels, kind='stable')

  @functools.cached_property
  def starts(self) -> np.ndarray:
    """Where each class begins in `members`."""
    return np.cumsum(self.counts) - self.counts

  @property
  def draws(self) -> int:
    """Length of an epoch."""
    return len(self.labels) if self.num_samples is None else self.num_samples


class _Independent(_Sampler):
  """Each draw: a class by `_class_probabilities`, then one of its records uniformly; with replacement."""

  def _class_probabilities(self, epoch: int) -> np.ndarray:
    """Returns the law of the drawn class in an epoch, float64 `[num_classes]`."""
    raise NotImplementedError

  def __call__(self, epoch: int) -> np.ndarray:
    rng = np.random.default_rng((self.seed, epoch))
    probabilities = self._class_probabilities(epoch)
    classes = rng.choice(len(probabilities), self.draws, p=probabilities)
    return self.members[self.starts[classes] + rng.integers(self.counts[classes])]


@dataclasses.dataclass(frozen=True, eq=False)
class ClassBalancedSampler(_Independent):
  """Every class equally often: p_c = 1 / C.

  Args:
    labels: integers `[records]`, the classes of the source's records.
    seed: of the draws.
    num_samples: draws in an epoch; default: the number of records.

  Raises:
    ValueError: a class without records, or numbers out of range.

  >>> sampler = ClassBalancedSampler(np.array([0] * 99 + [1]), num_samples=1000)
  >>> share = np.mean(sampler(epoch=3) == 99)
  >>> bool(0.45 < share < 0.55)
  True
  """

  def _class_probabilities(self, epoch: int) -> np.ndarray:
    return np.full(len(self.counts), 1 / len(self.counts))


@dataclasses.dataclass(frozen=True, eq=False)
class SquareRootSampler(_Independent):
  """Between class-balanced and natural: p_c = sqrt(n_c) / sum_k sqrt(n_k).

  Args:
    labels: integers `[records]`, the classes of the source's records.
    seed: of the draws.
    num_samples: draws in an epoch; default: the number of records.

  Raises:
    ValueError: a class without records, or numbers out of range.
  """

  def _class_probabilities(self, epoch: int) -> np.ndarray:
    roots = np.sqrt(self.counts)
    return roots / roots.sum()


@dataclasses.dataclass(frozen=True, eq=False)
class MixedSampler(_Independent):
  """A mixture of natural and class-balanced draws: p_c = (1 - b) n_c / N + b / C.

  With `num_epochs`, b = min(epoch / num_epochs, 1) (epoch from 0): progressively-balanced sampling.

  Args:
    labels: integers `[records]`, the classes of the source's records.
    seed: of the draws.
    num_samples: draws in an epoch; default: the number of records.
    balance: b, in [0, 1]; not used with `num_epochs`.
    num_epochs: number of epochs in which b goes from 0 to 1; None: b stays at `balance`.

  Raises:
    ValueError: a class without records, or numbers out of range.
  """

  balance: float = 0.5
  num_epochs: int | None = None

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.balance <= 1:
      raise ValueError(f'balance is {self.balance}, expected a number in [0, 1].')
    if self.num_epochs is not None and self.num_epochs < 1:
      raise ValueError(f'num_epochs is {self.num_epochs}, expected a number >= 1 or None.')

  def _class_probabilities(self, epoch: int) -> np.ndarray:
    balance = self.balance if self.num_epochs is None else min(epoch / self.num_epochs, 1.0)
    return (1 - balance) * self.counts / self.counts.sum() + balance / len(self.counts)


@dataclasses.dataclass(frozen=True, eq=False)
class ClassAwareSampler(_Sampler):
  """Classes in a shuffled cycle, a few images of each at a time, these in shuffled cycles of their own.

  Every cycle over the classes names each class once, in a new order, and takes the next
  `num_samples_per_class` records of its cycle, which is shuffled anew when it has ended. So class counts
  differ by at most `num_samples_per_class`, and a class repeats no record before all had their turn.
  The cycles run on over the epochs: epoch e holds the draws e * num_samples ... of one endless stream.

  Args:
    labels: integers `[records]`, the classes of the source's records.
    seed: of the cycles.
    num_samples: draws in an epoch; default: the number of records.
    num_samples_per_class: consecutive draws from a class (4 in the second stages of MiSLAS and BTM).

  Raises:
    ValueError: a class without records, or numbers out of range.

  References:
    Shen et al., Relay Backpropagation, ECCV 2016; as used by Zhong et al., Improving Calibration for
    Long-Tailed Recognition (MiSLAS), CVPR 2021, https://arxiv.org/abs/2104.00466, and Yu et al., Reviving
    Undersampling for Long-Tailed Learning (BTM), https://arxiv.org/abs/2401.16811.
  """

  num_samples_per_class: int = 4

  def __post_init__(self):
    super().__post_init__()
    if self.num_samples_per_class < 1:
      raise ValueError(
        f'num_samples_per_class is {self.num_samples_per_class}, expected a number >= 1.'
      )

  def __call__(self, epoch: int) -> np.ndarray:
    """Returns the records of an epoch, int64 `[num_samples]`."""
    num_classes, run = len(self.counts), self.num_samples_per_class
    visits, offsets = np.divmod(np.arange(epoch * self.draws, (epoch + 1) * self.draws), run)
    rounds, places = np.divmod(visits, num_classes)
    first = rounds[0]
    orders = np.stack(
      [
        np.random.default_rng((self.seed, 0, r)).permutation(num_classes)
        for r in range(first, rounds[-1] + 1)
      ]
    )
    classes = orders[rounds - first, places]
    # A round visits each class once, so a class's draws before this one are known without a replay.
    sizes = self.counts[classes]
    cycles, ranks = np.divmod(rounds * run + offsets, sizes)
    # Classes of one size are in step: their cycles are shuffled together, which spares many generators.
    for size in np.unique(sizes):
      alike = np.flatnonzero(self.counts == size)
      rows = np.flatnonzero(sizes == size)
      for cycle in np.unique(cycles[rows]):
        rng = np.random.default_rng((self.seed, 1, int(size), int(cycle)))
        order = rng.permuted(np.tile(np.arange(size), (len(alike), 1)), axis=1)
        here = rows[cycles[rows] == cycle]
        ranks[here] = order[np.searchsorted(alike, classes[here]), ranks[here]]
    return self.members[self.starts[classes] + ranks]


@dataclasses.dataclass(frozen=True, eq=False)
class TwoStreamSampler:
  """Batches of two parts: records of one stream, each once an epoch, then some of a second, in cycles.

  An epoch is a random order of `first`, without the records that fill no whole batch. `second` is gone
  through in random orders, one behind the other, which begin anew with each epoch; where an order ends within
  a batch, the next one puts off the records that the batch has already, so that none comes twice. For
  semi-supervised training: unlabeled records and labeled ones.

  Args:
    first: integers, positions in the source.
    second: integers, other positions.
    batch_size: records of a batch.
    second_size: of these, from the second stream.
    seed: of the orders.

  Attributes:
    steps: batches of an epoch.

  Raises:
    ValueError: for streams that are empty, share a record or hold one twice, for parts of a batch that are
      empty or larger than their stream, and for a seed below 0.

  References:
    Tarvainen & Valpola, Mean teachers are better role models, NeurIPS 2017, and its code.

  >>> sampler = TwoStreamSampler(np.arange(4), np.arange(4, 7), batch_size=4, second_size=2)
  >>> batches = sampler(epoch=0).reshape(sampler.steps, 4)
  >>> sorted(batches[:, :2].ravel().tolist()), [len(set(row)) for row in batches[:, 2:].tolist()]
  ([0, 1, 2, 3], [2, 2])
  """

  first: np.ndarray
  second: np.ndarray
  batch_size: int
  second_size: int
  seed: int = 0

  def __post_init__(self):
    for name in ('first', 'second'):
      stream = np.asarray(getattr(self, name))
      if stream.ndim != 1 or not stream.size or not np.issubdtype(stream.dtype, np.integer):
        raise ValueError(
          f'{name} has shape {stream.shape} and dtype {stream.dtype}, expected a non-empty vector of '
          'integers.'
        )
      object.__setattr__(self, name, stream)
    both = np.concatenate([self.first, self.second])
    if len(np.unique(both)) < len(both):
      raise ValueError('first and second hold a record twice, or share one.')
    if not 0 < self.second_size < self.batch_size:
      raise ValueError(
        f'second_size is {self.second_size}, expected 1 to {self.batch_size - 1}, a part of the batch.'
      )
    for name, size in (('first', self.batch_size - self.second_size), ('second', self.second_size)):
      if size > len(getattr(self, name)):
        raise ValueError(f'{name} has {len(getattr(self, name))} records, a batch takes {size}.')
    if self.seed < 0:
      raise ValueError(f'seed is {self.seed}, expected a number >= 0.')

  @property
  def steps(self) -> int:
    """Batches of an epoch."""
    return len(self.first) // (self.batch_size - self.second_size)

  def __call__(self, epoch: int) -> np.ndarray:
    """Returns the records of an epoch, `[steps * batch_size]`, batch by batch."""
    rng, size = np.random.default_rng((self.seed, epoch)), self.second_size
    first = rng.permutation(self.first)[: self.steps * (self.batch_size - size)]
    second = np.empty((self.steps, size), self.second.dtype)
    rest = rng.permutation(self.second)
    for row in second:
      begun, rest = rest[:size], rest[size:]
      if len(begun) < size:
        rest = rng.permutation(self.second)
        again = np.isin(rest, begun)
        rest = np.concatenate([rest[~again], rest[again]])
        begun, rest = np.concatenate([begun, rest[: size - len(begun)]]), rest[size - len(begun) :]
      row[:] = begun
    return np.concatenate([first.reshape(self.steps, -1), second], 1).ravel()


def draw_epoch(sampler: Sampler, epoch: int, num_records: int) -> np.ndarray:
  """Returns the indices that the sampler draws for an epoch, int64 `[draws]`.

  Raises:
    ValueError: unless they are a non-empty vector of integers in 0 .. num_records - 1.
  """
  indices = np.asarray(sampler(epoch))
  if indices.ndim != 1 or not indices.size or not np.issubdtype(indices.dtype, np.integer):
    raise ValueError(
      f'sampler returns shape {indices.shape} of {indices.dtype} in epoch {epoch}, expected a non-empty '
      'vector of integers.'
    )
  if not 0 <= indices.min() <= indices.max() < num_records:
    raise ValueError(
      f'sampler draws indices from {indices.min()} to {indices.max()} in epoch {epoch}, but source has '
      f'{num_records} records; make the sampler from the labels of this source.'
    )
  return indices.astype(np.int64)
