"""How the weights of a tuned network differ from those it was tuned from, by module type and block.

The tool Delta of "Who Reasons in the Large Language Models?" (Shao & Wu, NeurIPS 2025,
https://arxiv.org/abs/2505.20993). Host code in NumPy, one tensor at a time: with
`models.open_state_dict(...)` in place of trees, two checkpoints of any size are compared in the memory of
their largest tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxlab.models.parameter_surgery import block_of
from jaxlab.trees import tree_paths

PyTree = Any


class ChangeHistogram(NamedTuple):
  """How relative changes are distributed.

  Attributes:
    counts: int64 `[bins]`.
    normalized: float64 `[bins]`, `counts / (max counts + 1e-6)`.
    edges: float64 `[bins + 1]`, equally spaced.
  """

  counts: np.ndarray
  normalized: np.ndarray
  edges: np.ndarray


def parameter_distances(base: PyTree, tuned: PyTree) -> dict[str, float]:
  """Returns the Frobenius norm of each parameter's change, `|w_tuned - w_base|`, the largest first.

  Not divided by size or norm: larger matrices tend to change more.

  Args:
    base: tree of arrays, or a mapping that reads them by name (`models.open_state_dict`).
    tuned: of the same architecture.

  Returns:
    `{path: norm}`, biases and norms included. Differences are taken in at least float32, and summed in
    float64.

  Raises:
    ValueError: if names or shapes differ, naming the first.

  References:
    Shao & Wu, 2025 (https://arxiv.org/abs/2505.20993), tool Delta and the authors' code.

  >>> base = {'bias': np.zeros(2), 'kernel': np.zeros(4)}
  >>> parameter_distances(base, {**base, 'kernel': np.ones(4)})
  {'kernel': 2.0, 'bias': 0.0}
  """
  norms = {path: norm for path, _, norm in _changes(base, tuned)}
  return dict(sorted(norms.items(), key=lambda item: -item[1]))


def delta_norms(base: PyTree, tuned: PyTree) -> dict[str, np.ndarray]:
  """Returns the Frobenius norms of the changes of weight matrices, by module type and block.

  Args:
    base: tree of arrays, or a mapping that reads them by name (`models.open_state_dict`).
    tuned: of the same architecture.

  Returns:
    `{type: float64 [num_blocks]}`: of each module with a weight of two axes or more within blocks, by its
    path there (`self_attn/o_proj`); biases and norms do not count. NaN where a block has no such module.

  Raises:
    ValueError: if names or shapes differ, naming the first; if no block has a weight matrix.

  References:
    Shao & Wu, 2025 (https://arxiv.org/abs/2505.20993), tool Delta.

  >>> base = {f'layers_{i}': {'o_proj': {'kernel': np.zeros((2, 2))}} for i in (0, 1)}
  >>> tuned = {**base, 'layers_1': {'o_proj': {'kernel': np.ones((2, 2))}}}
  >>> {name: norms.tolist() for name, norms in delta_norms(base, tuned).items()}
  {'o_proj': [0.0, 2.0]}
  """
  norms: dict[str, dict[int, float]] = {}
  depth = 0
  for path, num_axes, norm in _changes(base, tuned):
    index, inner = block_of(path) or (None, '')
    if index is None:
      continue
    depth = max(depth, index + 1)
    if num_axes >= 2:
      norms.setdefault(inner.rpartition('/')[0], {})[index] = norm
  if not norms:
    raise ValueError('base has no weight matrix in a block, such as layers_3 or blocks.3.')
  return {
    name: np.array([found.get(index, np.nan) for index in range(depth)])
    for name, found in norms.items()
  }


def relative_change(
  base: ArrayLike, tuned: ArrayLike, epsilon: float = 1e-8, limit: float = 1.0
) -> np.ndarray:
  """Returns the change of each weight relative to its size, its sign kept, clipped.

    clip((w_tuned - w_base) / (|w_base| + epsilon), -limit, limit)

  A weight that was exactly 0 changes by the limit, or by 0 if it still is 0.

  Args:
    base: weights of any shape.
    tuned: of the same shape.
    epsilon: added to sizes.
    limit: at which changes are clipped.

  Returns:
    float32 (float64 for float64 weights), of the shape of the weights.

  Raises:
    ValueError: if shapes differ, or for an epsilon or limit that is not positive.

  References:
    Shao & Wu, 2025 (https://arxiv.org/abs/2505.20993), tool Delta as in the authors' code; the paper's text
    divides by w_base.

  >>> relative_change([2.0, -2.0, 0.0], [3.0, -1.0, 1.0]).round(3).tolist()
  [0.5, 0.5, 1.0]
  """
  for name, value in (('epsilon', epsilon), ('limit', limit)):
    if not value > 0:
      raise ValueError(f'{name} must be positive, got {value}.')
  base, tuned = _wide(base), _wide(tuned)
  if base.shape != tuned.shape:
    raise ValueError(f'base has {base.shape}, tuned {tuned.shape}; expected the same shape.')
  return np.clip((tuned - base) / (np.abs(base) + epsilon), -limit, limit)


def change_histogram(
  change: ArrayLike, bins: int = 200, drop: float = 0.99, limit: float = 1.0
) -> ChangeHistogram:
  """Returns the distribution of relative changes inside of (-drop, drop), in equal bins of [-limit, limit].

  Args:
    change: of `relative_change`, any shape.
    bins: number of bins.
    drop: changes of at least this size, and so the clipped ones, are not counted.
    limit: of the bins.

  Raises:
    ValueError: unless `0 < drop <= limit` and bins are positive.

  References:
    Shao & Wu, 2025 (https://arxiv.org/abs/2505.20993), the authors' code of the distributions' figure.

  >>> change_histogram([-0.5, 0.25, 0.3, 1.0], bins=4).counts.tolist()
  [0, 1, 2, 0]
  """
  if not 0 < drop <= limit or bins < 1:
    raise ValueError(
      f'expected 0 < drop <= limit and bins >= 1; got drop={drop}, limit={limit}, bins={bins}.'
    )
  change = np.asarray(change)
  counts, edges = np.histogram(change[np.abs(change) < drop], bins, (-limit, limit))
  return ChangeHistogram(counts, counts / (counts.max() + 1e-6), edges.astype(np.float64))


def is_bimodal(counts: ArrayLike, window: int = 9, ratio: float = 1.2) -> bool:
  """Returns whether a histogram over [-1, 1] has a mode on either side of 0, with a valley between them.

  The histogram is smoothed by a moving average (its ends by what bins are there). It has two modes if the
  highest bins on either side of 0 are both at least `ratio` times the lowest value between them: ripples of a
  tail are no modes. The paper judges by eye: window and ratio are this library's.

  Args:
    counts: `[bins]`, symmetric around 0, e.g. of `change_histogram`.
    window: bins of the moving average, odd.
    ratio: of the modes to the valley.

  Raises:
    ValueError: unless counts are a vector of at least `window` bins, and the window is odd.

  >>> (
  ...   is_bimodal([0, 2, 6, 2, 1, 1, 3, 7, 1, 0], window=1),
  ...   is_bimodal([0, 1, 2, 5, 5, 2, 1, 0], window=1),
  ... )
  (True, False)
  """
  counts = np.asarray(counts, np.float64)
  if window < 1 or window % 2 == 0:
    raise ValueError(f'window must be odd and positive, got {window}.')
  if counts.ndim != 1 or counts.size < max(window, 2):
    raise ValueError(
      f'counts must be a vector of at least {max(window, 2)} bins, got {counts.shape}.'
    )
  average = lambda x: np.convolve(x, np.ones(window), 'same')  # noqa: E731
  smooth = average(counts) / average(np.ones_like(counts))
  half = counts.size // 2
  left, right = np.argmax(smooth[:half]), counts.size - half + np.argmax(smooth[-half:])
  modes, valley = min(smooth[left], smooth[right]), smooth[left : right + 1].min()
  return bool(modes > 0 and modes >= ratio * valley)


def _changes(base: PyTree, tuned: PyTree) -> Iterator[tuple[str, int, float]]:
  """Yields path, number of axes and Frobenius norm of the change, reading one tensor of each at a time."""
  first, second = _by_name(base), _by_name(tuned)
  differing = sorted(first.keys() ^ second.keys())
  if differing:
    there, missing = ('base', 'tuned') if differing[0] in first else ('tuned', 'base')
    raise ValueError(
      f'{differing[0]}: in {there}, missing in {missing}; expected one architecture.'
    )
  for path in first:
    a, b = _wide(first[path]), _wide(second[path])
    if a.shape != b.shape:
      raise ValueError(f'{path}: base has {a.shape}, tuned {b.shape}; expected one architecture.')
    yield path, a.ndim, float(np.sqrt(np.sum(np.square(b - a, dtype=np.float64))))


def _by_name(tree: PyTree) -> Mapping[str, ArrayLike]:
  # A mapping that JAX does not know reads its arrays when asked for them.
  if isinstance(tree, Mapping) and jax.tree_util.all_leaves([tree]):
    return tree
  return dict(tree_paths(tree))


def _wide(leaf: ArrayLike) -> np.ndarray:
  leaf = np.asarray(leaf)
  return leaf if leaf.dtype == np.float64 else leaf.astype(np.float32)
