"""Which channels of a group stay: those of the highest scores, of a target width.

Host code in NumPy. Ties are decided by index: of equal scores the earlier channels are removed first.
"""

import numpy as np


def highest_channels(scores: np.ndarray, count: int) -> np.ndarray:
  """Returns the channels that stay when those of the lowest scores are removed.

  Of a transformer's embedding, of an MLP's hidden channels, of a convolution.

  Args:
    scores: `[channels]`; the larger, the more important.
    count: channels that stay.

  Returns:
    int64 `[count]`, ascending.

  Raises:
    ValueError: for scores that are no finite vector, or a count that is not in 1 to their number.

  References:
    Yu & Wu, A Unified Pruning Framework for Vision Transformers, 2023 (https://arxiv.org/abs/2111.15127).

  >>> highest_channels(np.array([3.0, 1.0, 2.0, 5.0]), 2).tolist()
  [0, 3]
  """
  scores = _finite_vector(scores)
  if not 1 <= count <= scores.size:
    raise ValueError(f'count={count}: expected 1 to {scores.size}, the channels that are there.')
  return np.sort(np.argsort(scores, kind='stable')[scores.size - count :])


def highest_channels_by_head(scores: np.ndarray, width: int, num_heads: int) -> np.ndarray:
  """Returns the channels of an attention that stay, as many of each head to be.

  The channels are cut into `num_heads` equal runs, whatever heads they belonged to, and each run keeps its
  `width / num_heads` highest: from 12 heads of 64 channels to 3, a new head has 64 channels of four old ones.

  Args:
    scores: `[channels]`, of the same channel in queries, keys and values.
    width: channels that stay in all.
    num_heads: heads to be.

  Returns:
    int64 `[width]`, ascending.

  Raises:
    ValueError: for scores that are no finite vector, or if the channels, or those that are removed, do not
      divide by the heads.

  References:
    Yu & Wu, A Unified Pruning Framework for Vision Transformers, 2023 (https://arxiv.org/abs/2111.15127).

  >>> highest_channels_by_head(np.array([9.0, 8.0, 7.0, 1.0, 2.0, 3.0]), 2, 2).tolist()
  [0, 5]
  """
  scores = _finite_vector(scores)
  size = scores.size
  if not 1 <= width <= size:
    raise ValueError(f'width={width}: expected 1 to {size}, the channels that are there.')
  if num_heads < 1 or size % num_heads or (size - width) % num_heads:
    raise ValueError(
      f'{size} channels, of which {size - width} are removed to keep width={width}, do not divide by '
      f'num_heads={num_heads}.'
    )
  runs = scores.reshape(num_heads, -1)
  starts = np.arange(0, size, size // num_heads)
  kept = [highest_channels(own, width // num_heads) + first for own, first in zip(runs, starts)]
  return np.concatenate(kept)


def _finite_vector(scores: np.ndarray) -> np.ndarray:
  scores = np.asarray(scores, np.float64)
  if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
    raise ValueError(
      f'scores must be a vector of finite numbers, got shape {scores.shape}'
      + ('.' if scores.ndim != 1 or not scores.size else ' with some that are not.')
    )
  return scores
