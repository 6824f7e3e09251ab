"""Which blocks to drop: the price of each is the error that stays behind over the time that it saves."""

from collections.abc import Mapping

import numpy as np


def saved_share(whole: float, part: float) -> float:
  """Returns the share `(whole - part) / whole` of a time, or of multiply-accumulates, that is saved.

  Raises:
    ValueError: unless `whole` is positive and `part` not negative.

  >>> saved_share(4.0, 3.0)
  0.25
  """
  if not (whole > 0 and part >= 0 and np.isfinite([whole, part]).all()):
    raise ValueError(f'whole={whole}, part={part}: expected a positive number, and another.')
  return (whole - part) / whole


def require_savings(saved: Mapping[str, float]) -> None:
  """Raises ValueError, naming the blocks, unless all save a share in (0, 1]; see `pruning_scores`.

  >>> require_savings({'a': 0.125, 'b': 0.25})
  """
  if wrong := [f'{name} ({own:.3g})' for name, own in saved.items() if not (0 < own <= 1)]:
    raise ValueError(
      f'saved by {", ".join(wrong)}: expected shares in (0, 1]. Measure times again on an idle machine, or '
      'take shares of multiply-accumulates.'
    )


def pruning_scores(
  recoverability: Mapping[str, float], saved: Mapping[str, float]
) -> dict[str, float]:
  """Returns the price of each block, `recoverability / saved`: the smaller, the sooner it goes.

  Args:
    recoverability: error of the features that stays behind when a block is dropped and its neighbors are
      adapted.
    saved: share of the network's latency (or of its multiply-accumulates) that it takes.

  Raises:
    ValueError: for blocks that one of the two lacks, an error that is negative or not finite (its adaptors
      diverged), or a share that is not positive: times of small blocks are noise on a busy machine; measure
      again, or take multiply-accumulates.

  References:
    Wang & Wu, Practical Network Acceleration with Tiny Sets, CVPR 2023 (https://arxiv.org/abs/2202.07861).

  >>> pruning_scores({'a': 0.5, 'b': 0.25}, {'a': 0.125, 'b': 0.25})
  {'a': 4.0, 'b': 1.0}
  """
  if set(recoverability) != set(saved) or not saved:
    raise ValueError(
      f'recoverability has blocks {", ".join(recoverability)}; saved has {", ".join(saved)}.'
    )
  if wrong := [name for name, own in recoverability.items() if not (0 <= own < np.inf)]:
    raise ValueError(f'recoverability of {", ".join(wrong)}: expected finite errors.')
  require_savings(saved)
  return {name: float(own) / float(saved[name]) for name, own in recoverability.items()}


def select_blocks(scores: Mapping[str, float], count: int) -> tuple[str, ...]:
  """Returns the `count` blocks of the smallest scores, the smallest first; of equal ones the first.

  Raises:
    ValueError: for more blocks than there are, or less than one.

  >>> select_blocks({'a': 4.0, 'b': 1.0, 'c': 2.0}, 2)
  ('b', 'c')
  """
  if not 1 <= count <= len(scores):
    raise ValueError(f'count={count}: expected 1 to {len(scores)}, the blocks that can be dropped.')
  return tuple(sorted(scores, key=lambda name: scores[name])[:count])
