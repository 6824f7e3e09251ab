"""How the weights of a tuned network differ from those it was tuned from, by module type and block.

The tool Delta of "Who Reasons in the Large Language Models?" (Shao & Wu, NeurIPS 2025,
https://arxiv.org/abs/2505.20993). Host code in NumPy, one tensor at a time: with
`models.open_state_dict(...)` in place of trees, two checkpoints of any size are compared in the memory of
their largest tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike

from jaxlab.models.lazy_checkpoints import LazyStateDict
from jaxlab.models.parameter_surgery import block_of, require_same_architecture
from jaxlab.trees import tree_paths

PyTree = Any

_PART = 2**20  # entries that are compared at a time


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


class ParameterChange(NamedTuple):
  """How a parameter changed.

  Attributes:
    path: its name.
    block: index of its block; None: it lies in none.
    module: path of its module in the block (`self_attn/o_proj`), or of it all.
    num_axes: of the parameter: weight matrices have two or more.
    norm: Frobenius norm of the change.
    histogram: of its relative changes; None: not asked for.
  """

  path: str
  block: int | None
  module: str
  num_axes: int
  norm: float
  histogram: ChangeHistogram | None = None


def parameter_changes(
  base: PyTree, tuned: PyTree, bins: int | None = None, drop: float = 0.99
) -> Iterator[ParameterChange]:
  """Yields how each parameter changed, norm and distribution, from one reading of both.

  Args:
    base: tree of arrays, or a mapping that reads them by name (`models.open_state_dict`).
    tuned: of the same architecture.
    bins: of the histogram of relative changes (`change_histogram`; the paper's has 200); None: none.
    drop: see `change_histogram`.

  Raises:
    ValueError: if names or shapes differ, naming the first: before anything is read where shapes are known.

  References:
    Shao & Wu, 2025 (https://arxiv.org/abs/2505.20993), tool Delta and the authors' code.

  >>> base, tuned = ({'layers_0': {'up_proj': {'kernel': np.ones((2, 2)) * i}}} for i in (1, 2))
  >>> [(own.block, own.module, own.norm) for own in parameter_changes(base, tuned)]
  [(0, 'up_proj', 2.0)]
  """
  if bins is not None:
    change_histogram([], bins, drop)  # raises what is wrong with them
  for path, a, b in _pairs(base, tuned):
    square, counts, edges = 0.0, None, None
    for first, second in _parts(a, b):
      square += float(np.sum(np.square(second - first, dtype=np.float64)))
      if bins is not None:
        own = change_histogram(relative_change(first, second), bins, drop)
        counts, edges = own.counts if counts is None else counts + own.counts, own.edges
    histogram = None
    if counts is not None:
      histogram = ChangeHistogram(counts, counts / (counts.max() + 1e-6), edges)
    block, inner = block_of(path) or (None, path)
    module = re.sub('[/.][^/.]*$', '', inner)
    yield ParameterChange(path, block, module, np.ndim(a), float(np.sqrt(square)), histogram)


def changes_by_module(changes: Iterable[ParameterChange]) -> dict[str, dict[int, ParameterChange]]:
  """Returns the changes of weight matrices within blocks by module type, and there by block."""
  found: dict[str, dict[int, ParameterChange]] = {}
  for own in changes:
    if own.block is not None and own.num_axes >= 2:
      found.setdefault(own.module, {})[own.block] = own
  return found


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
  norms = {own.path: own.norm for own in parameter_changes(base, tuned)}
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
  changes = list(parameter_changes(base, tuned))
  found = changes_by_module(changes)
  if not found:
    raise ValueError('base has no weight matrix in a block, such as layers_3 or blocks.3.')
  depth = 1 + max(own.block for own in changes if own.block is not None)
  return {
    name: np.array([own[index].norm if index in own else np.nan for index in range(depth)])
    for name, own in found.items()
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


def is_bimodal(
  counts: ArrayLike,
  window: int = 9,
  ratio: float = 1.2,
  min_height: float = 0.25,
  deviations: float = 4.0,
) -> bool:
  """Returns whether a histogram over [-1, 1] has a mode on either side of 0, with a valley between them.

  The histogram is smoothed by a moving average (its ends by what bins are there). It has two modes if two
  local maxima on opposite sides of 0 are both at least `ratio` times the lowest value between them; there may
  be others, such as that of weights that did not change. Values whose window reaches the bin of 0 are on
  neither side. Ripples are no maxima: those below `min_height` times the largest value on either side, and
  those above the valley by fewer than `deviations` standard deviations of the difference of two counts, which
  chance makes of a few thousand weights. The paper judges by eye: all of this is inferred.

  Args:
    counts: `[bins]`, how many weights fall into each, symmetric around 0, e.g. of `change_histogram`; not
      normalized.
    window: bins of the moving average, odd.
    ratio: of the modes to the valley.
    min_height: of a mode, a share of the largest smoothed value on either side.
    deviations: of a mode above the valley; 0: chance does not matter.

  Raises:
    ValueError: unless counts are a vector of at least `window` bins, the window is odd, the height lies in
      [0, 1] and deviations are not negative.

  >>> (
  ...   is_bimodal([0, 20, 60, 20, 10, 10, 30, 70, 10, 0], window=1),
  ...   is_bimodal([0, 10, 20, 50, 50, 20, 10, 0], window=1),
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
  if not 0 <= min_height <= 1:
    raise ValueError(f'min_height must be in [0, 1], got {min_height}.')
  if deviations < 0:
    raise ValueError(f'deviations must not be negative, got {deviations}.')
  average = lambda x: np.convolve(x, np.ones(window), 'same')  # noqa: E731
  smooth = average(counts) / average(np.ones_like(counts))
  padded = np.pad(smooth, 1, constant_values=-np.inf)
  peaks = (smooth > 0) & (smooth >= padded[:-2]) & (smooth >= padded[2:])
  # 0 lies in the middle bin, or on the edge of the middle two.
  places, reach = np.arange(counts.size), window // 2
  left, right = places + reach < (counts.size - 1) // 2, places - reach > counts.size // 2
  peaks &= smooth >= min_height * np.max(smooth, where=left | right, initial=0)

  def two_modes(i: int, j: int) -> bool:
    mode, valley = min(smooth[i], smooth[j]), smooth[i : j + 1].min()
    chance = np.sqrt((mode + valley) / window)
    return bool(mode >= ratio * valley and mode - valley >= deviations * chance)

  return any(
    two_modes(i, j) for i in np.flatnonzero(peaks & left) for j in np.flatnonzero(peaks & right)
  )


def _pairs(base: PyTree, tuned: PyTree) -> Iterator[tuple[str, ArrayLike, ArrayLike]]:
  """Yields path and both arrays, reading one tensor of each at a time."""
  first, second = _by_name(base), _by_name(tuned)
  if isinstance(first, LazyStateDict) and isinstance(second, LazyStateDict):
    require_same_architecture(base=first.shapes, tuned=second.shapes)
  differing = sorted(first.keys() ^ second.keys())
  if differing:
    there, missing = ('base', 'tuned') if differing[0] in first else ('tuned', 'base')
    raise ValueError(
      f'{differing[0]}: in {there}, missing in {missing}; expected one architecture.'
    )
  for path in first:
    a, b = np.asarray(first[path]), np.asarray(second[path])
    if a.shape != b.shape:
      raise ValueError(f'{path}: base has {a.shape}, tuned {b.shape}; expected one architecture.')
    yield path, a, b


def _parts(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields both arrays part by part, in at least float32: what is computed of them takes no more memory."""
  a, b = a.reshape(-1), b.reshape(-1)
  for start in range(0, max(a.size, 1), _PART):
    part = slice(start, start + _PART)
    yield _wide(a[part]), _wide(b[part])


def _by_name(tree: PyTree) -> Mapping[str, ArrayLike]:
  # A mapping that JAX does not know reads its arrays when asked for them.
  if isinstance(tree, Mapping) and jax.tree_util.all_leaves([tree]):
    return tree
  return dict(tree_paths(tree))


def _wide(leaf: ArrayLike) -> np.ndarray:
  leaf = np.asarray(leaf)
  return leaf if leaf.dtype == np.float64 else leaf.astype(np.float32)
