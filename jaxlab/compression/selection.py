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


def half_block(index: int, depth: int) -> tuple[str, ...]:
  """Returns the parts of a transformer that are left out together, a block's worth, in steps of half a block.

  2 i: block i; 2 i + 1: the MLP of block i and the attention of block i + 1, of which the last block has none
  behind it; -1: the attention of block 0.

  Args:
    index: -1 to 2 depth - 1.
    depth: number of blocks.

  Returns:
    Paths, as `structure(model).parts` of a `ViT` has them.

  Raises:
    ValueError: for another index.

  References:
    Yu & Wu, A Unified Pruning Framework for Vision Transformers, 2023 (https://arxiv.org/abs/2111.15127), the
    official code.

  >>> half_block(4, 12), half_block(5, 12)
  (('blocks_2',), ('blocks_2/mlp', 'blocks_3/attention'))
  """
  if not -1 <= index < 2 * depth:
    raise ValueError(f'index={index}: expected -1 to {2 * depth - 1}, of depth={depth}.')
  block, odd = divmod(index, 2)
  if not odd:
    return (f'blocks_{block}',)
  halves = ((block, 'mlp'), (block + 1, 'attention'))
  return tuple(f'blocks_{own}/{part}' for own, part in halves if 0 <= own < depth)
