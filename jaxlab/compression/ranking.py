"""One list of all channels of a network, the least important of which are removed.

Host code in NumPy, in float64: what stays is decided by comparisons that float32 would decide otherwise.
"""

from collections.abc import Callable, Collection, Mapping

import numpy as np


def global_ranking(
  scores: Mapping[str, np.ndarray],
  num_remove: int,
  *,
  min_ratio: float = 0.3,
  protected: Collection[str] = (),
) -> dict[str, np.ndarray]:
  """Removes the channels of the lowest scores over all groups, with a floor under each group.

  All channels are sorted by score, ties by group and channel. Of the first `num_remove` each is removed,
  unless its group is protected or keeps less than `min_ratio` of its channels by then: the floor is looked at
  before a removal, so that a group of n ends with at least `ceil(min_ratio n) - 1`. Channels that are passed
  over count, so fewer than `num_remove` are removed.

  Args:
    scores: of each channel, `[channels]` by group; the larger, the more important. Groups are channels that
      are removed together, such as a residual trunk's in all of its blocks.
    num_remove: entries of the list that are looked at.
    min_ratio: in (0, 1].
    protected: groups that stay whole.

  Returns:
    bool `[channels]` by group: what stays.

  Raises:
    ValueError: for numbers out of their range, scores that are no finite vectors, a protected group that is
      not there, or a group of which nothing would be left.

  References:
    Luo & Wu, Neural Network Pruning with Residual-Connections and Limited-Data, CVPR 2020
    (https://arxiv.org/abs/1911.08114), with the code's order of looking.

  >>> scores = {'a': np.array([3.0, 1.0, 2.0]), 'b': np.array([0.5, 4.0, 5.0])}
  >>> {name: keep.tolist() for name, keep in global_ranking(scores, 2).items()}
  {'a': [True, False, True], 'b': [False, True, True]}
  """
  keep = _ranked(scores, num_remove, min_ratio, protected)
  if empty := [name for name, own in keep.items() if not own.any()]:
    raise ValueError(
      f'nothing would be left of {", ".join(empty)}: protect it, or take a larger min_ratio.'
    )
  return keep


def _ranked(
  scores: Mapping[str, np.ndarray], num_remove: int, min_ratio: float, protected: Collection[str]
) -> dict[str, np.ndarray]:
  """Returns what stays, also if that is nothing of a group."""
  values = {name: np.asarray(own, np.float64) for name, own in scores.items()}
  for name, own in values.items():
    if own.ndim != 1 or not own.size:
      raise ValueError(f'scores[{name!r}] must be a vector, got shape {own.shape}.')
    if wrong := np.sum(~np.isfinite(own)):
      raise ValueError(
        f'scores[{name!r}]: {wrong} of {own.size} are not finite; are the network and its inputs?'
      )
  total = sum(own.size for own in values.values())
  if not 0 <= num_remove <= total:
    raise ValueError(f'num_remove={num_remove}: expected 0 to {total}, the channels of all groups.')
  if not 0 < min_ratio <= 1:
    raise ValueError(f'min_ratio={min_ratio}: expected a share in (0, 1].')
  if unknown := sorted(set(protected) - set(values)):
    raise ValueError(f'protected: {unknown} are none of the groups {", ".join(values)}.')
  entries = [(name, channel) for name, own in values.items() for channel in range(own.size)]
  order = np.argsort(np.concatenate(list(values.values())), kind='stable')
  keep = {name: np.ones(own.size, bool) for name, own in values.items()}
  for name, channel in (entries[place] for place in order[:num_remove]):
    if name not in protected and keep[name].sum() / keep[name].size >= min_ratio:
      keep[name][channel] = False
  return keep


def search_num_remove(
  scores: Mapping[str, np.ndarray],
  cost: Callable[[Mapping[str, np.ndarray]], float],
  target: float,
  *,
  min_ratio: float = 0.3,
  protected: Collection[str] = (),
) -> int:
  """Returns the fewest entries of `global_ranking`'s list that bring a network's cost down to a target.

  What stays of a longer list is a part of what stays of a shorter one, so costs fall along it and some
  `log2(channels)` of them are looked at.

  Args:
    scores: as for `global_ranking`.
    cost: of what stays, bool `[channels]` by group; such as multiply-accumulates.
    target: the cost that is allowed.
    min_ratio: as there.
    protected: as there.

  Raises:
    ValueError: if the whole list does not reach the target.

  >>> scores = {'a': np.array([3.0, 1.0, 2.0, 5.0])}
  >>> search_num_remove(scores, lambda keep: keep['a'].sum(), 2)
  2
  """

  def kept(count: int) -> dict[str, np.ndarray]:
    return _ranked(scores, count, min_ratio, protected)

  total = sum(np.size(own) for own in scores.values())
  # The longest list that empties no group, then the shortest that is cheap enough.
  longest = total
  if not all(own.any() for own in kept(total).values()):
    longest = _first(total, lambda n: not all(own.any() for own in kept(n).values())) - 1
  if (least := cost(kept(longest))) > target:
    raise ValueError(
      f'target={target:g}: {least:g} is the least that min_ratio={min_ratio} and what is protected leave.'
    )
  return _first(longest, lambda n: cost(kept(n)) <= target)


def _first(last: int, holds: Callable[[int], bool]) -> int:
  """Returns the first of 0 to `last` for which something holds that holds from there on."""
  low, high = 0, last
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if holds(middle) else (middle + 1, high)
  return low
