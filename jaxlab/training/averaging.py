"""Averages of networks: trees of equal structure, entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

PyTree = Any


def average_pytrees(trees: Sequence[PyTree]) -> PyTree:
  """Returns `1/K sum_k trees[k]`, the uniform soup of `K` networks (Wortsman et al. 2022).

  Give parameters and batch statistics together, `{'params': ..., 'batch_stats': ...}`, to average both as
  BTM does (Yu et al. 2024). The average of running variances is not the variance of the averaged
  network's activations; to have that, run the network in train mode over some batches.

  Args:
    trees: equal in structure and shapes. Floating (and complex) leaves are summed in at least float32 and
      come back in the first tree's dtype; integers, booleans and keys are those of the first tree.

  Returns:
    The average; one tree alone comes back as it is.

  Raises:
    ValueError: for no tree, or naming the paths where structure, shape or dtype differ.

  >>> average_pytrees([{'w': jnp.array([1.0, 2.0])}, {'w': jnp.array([3.0, 2.0])}])
  {'w': Array([2., 2.], dtype=float32)}
  """
  if not trees:
    raise ValueError('average_pytrees needs at least one tree.')
  for index, tree in enumerate(trees[1:], start=1):
    _require_alike(trees[0], tree, f'trees[{index}]')
  if len(trees) == 1:
    return trees[0]

  def mean(first, *others):
    if not _averaged(first):
      return first
    total = sum((_wide(other) for other in others), _wide(first))
    return (total / len(trees)).astype(jnp.result_type(first))

  return jax.tree.map(mean, *trees)


def running_average(average: PyTree, new: PyTree, count: ArrayLike) -> PyTree:
  """Returns the average of `count + 1` trees from that of the first `count` and one more.

  `count / (count + 1) * average + 1 / (count + 1) * new`: `average_pytrees` one tree at a time, with one
  average in memory. `count` may be traced.

  Args:
    average: the average so far; leaves that are not floating are kept.
    new: equal in structure and shapes.
    count: the number of trees in `average`; with 0 the result is `new`.

  Raises:
    ValueError: for a negative (concrete) `count`, or naming the paths where the trees differ.
  """
  if not isinstance(count, jax.core.Tracer) and np.asarray(count) < 0:
    raise ValueError(
      f'running_average: count={count} is negative; it is the number of trees so far.'
    )
  _require_alike(average, new, 'new')

  def move(old, value):
    if not _averaged(old):
      return old
    old_wide, share = _wide(old), 1 / (jnp.asarray(count) + 1)
    share = share.astype(old_wide.dtype)
    return ((1 - share) * old_wide + share * _wide(value)).astype(jnp.result_type(old))

  return jax.tree.map(move, average, new)


def warm_decay(decay: ArrayLike, count: ArrayLike) -> jax.Array:
  """Returns the share of a moving average that its `count`-th update keeps: `min(decay, (1 + n) / (10 + n))`.

  Early updates move it faster: `average <- average - (1 - share) (average - new)`
  (`optax.incremental_update(new, average, 1 - share)`).

  Args:
    decay: the share that it comes to, in [0, 1].
    count: number of the update, from 1; may be traced.

  >>> [round(float(warm_decay(0.999, n)), 4) for n in (1, 100, 100_000)]
  [0.1818, 0.9182, 0.999]
  """
  count = jnp.asarray(count, jnp.result_type(float))
  return jnp.minimum(decay, (1 + count) / (10 + count))


def warm_decay_per_epoch(decay: float, steps_per_epoch: int) -> Callable[[ArrayLike], jax.Array]:
  """Returns the share that a moving average keeps behind a step, where it is updated once an epoch.

  Behind the last step of the n-th epoch `warm_decay(decay, n)`, behind any other step 1: it stays.

  Args:
    decay: see `warm_decay`.
    steps_per_epoch: optimizer steps.

  Returns:
    A function of the number of finished steps, which may be traced.

  Raises:
    ValueError: for a share out of range or an epoch without steps.

  References:
    Yu & Wu, A Unified Pruning Framework for Vision Transformers, 2023 (https://arxiv.org/abs/2111.15127), the
    official code.

  >>> share = warm_decay_per_epoch(0.999, 4)
  >>> [round(float(share(step)), 4) for step in (3, 4, 5, 8)]
  [1.0, 0.1818, 1.0, 0.25]
  """
  if not 0 <= decay <= 1 or steps_per_epoch < 1:
    raise ValueError(
      f'decay={decay}, steps_per_epoch={steps_per_epoch}: expected a share in [0, 1], and at least 1.'
    )

  def share(step: ArrayLike) -> jax.Array:
    count, rest = jnp.divmod(jnp.asarray(step), steps_per_epoch)
    return jnp.where(rest == 0, warm_decay(decay, jnp.maximum(count, 1)), 1.0)

  return share


def _averaged(leaf: ArrayLike) -> bool:
  return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _wide(leaf: ArrayLike) -> jax.Array:
  leaf = jnp.asarray(leaf)
  return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))


def _require_alike(first: PyTree, other: PyTree, name: str) -> None:
  """Raises ValueError, naming the paths, unless the trees have equal leaves but for their values."""

  def described(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
      jax.tree_util.keystr(path, simple=True, separator='/'): (
        f'{jnp.result_type(leaf)} {jnp.shape(leaf)}'
      )
      for path, leaf in leaves
    }

  a, b = described(first), described(other)
  problems = [f'missing in {name}: {path}' for path in a if path not in b]
  problems += [f'only in {name}: {path}' for path in b if path not in a]
  problems += [
    f'{path}: {a[path]} and {b[path]} ({name})' for path in a if path in b and a[path] != b[path]
  ]
  if not problems and jax.tree.structure(first) != jax.tree.structure(other):
    problems = [f'the containers of {name} are of other types']
  if problems:
    shown = problems[:10] + (['...'] if len(problems) > 10 else [])
    raise ValueError(
      f'Only networks of one architecture can be averaged; they differ in {len(problems)} places:\n  '
      + '\n  '.join(shown)
    )
