"""Gates of 0 and 1 that are closed one after another, those first whose gradients were least."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

Array = jax.Array
PyTree = Any


class GateState(NamedTuple):
  """What the selection carries along.

  Attributes:
    count: finished steps.
    importance: of each gate, summed since the last removal.
  """

  count: Array
  importance: PyTree


def remove_least(mask: ArrayLike, importance: ArrayLike, count: ArrayLike) -> Array:
  """Returns a mask with `count` more zeros, at the open gates of least importance; of equal ones the later.

  Args:
    mask: 0 or 1, `[gates]`.
    importance: `[gates]`.
    count: gates to close, may be traced; never the last open one.

  Raises:
    ValueError: unless mask and importance are vectors of one size.

  >>> remove_least([1, 0, 1, 1, 1], [3.0, 0.0, 1.0, 1.0, 2.0], 1).tolist()
  [1, 0, 1, 0, 1]
  """
  mask, importance = jnp.asarray(mask), jnp.asarray(importance)
  if mask.ndim != 1 or mask.shape != importance.shape:
    raise ValueError(f'Expected mask and importance [gates], got {mask.shape}, {importance.shape}.')
  is_open = mask > 0
  count = jnp.minimum(count, jnp.sum(is_open) - 1)
  keys = jnp.where(is_open, importance, jnp.inf)[::-1]
  rank = jnp.argsort(jnp.argsort(keys, stable=True), stable=True)[::-1]
  return jnp.where(is_open & (rank >= count), mask, 0)


def select_gates(
  keep: int,
  *,
  begin: int,
  end: int,
  rounds: int = 10,
  kind: Literal['absolute', 'squared'] = 'absolute',
) -> optax.GradientTransformation:
  """Returns the optimizer of a mask: open gates are closed in rounds until `keep` are left.

  From step `begin` on the sizes of a gate's gradients are summed, the first-order effect of closing it; every
  `(end - begin) // rounds` steps the `ceil((gates - keep) / rounds)` open gates with the smallest sums are
  closed for good, and the sums start anew. Nothing else changes the mask. For a group of `by_path`.

  Args:
    keep: open gates at the end, of each mask.
    begin: step from which sums are taken.
    end: step behind which no gate is closed any more.
    rounds: removals.
    kind: 'absolute' sums |gradient|, 'squared' gradient^2.

  Raises:
    ValueError: for numbers out of range; from `init` for a mask with less than `keep` gates.

  References:
    Zhou, Zhu & Wu, All You Need in Knowledge Distillation Is a Tailored Coordinate System, AAAI 2025
    (https://arxiv.org/abs/2412.09388): a mask with accumulated gradients that removes dimensions bit by bit;
    rule and schedule are inferred.

  Examples:
    >>> optimizer = select_gates(1, begin=0, end=2, rounds=2)
    >>> mask = jnp.ones(3)
    >>> state = optimizer.init(mask)
    >>> for _ in range(2):
    ...   updates, state = optimizer.update(jnp.array([0.1, -3.0, 2.0]), state, mask)
    ...   mask += updates
    >>> mask.tolist()
    [0.0, 1.0, 0.0]
  """
  if keep < 1 or rounds < 1 or not 0 <= begin < end:
    raise ValueError(
      f'keep={keep}, rounds={rounds}, begin={begin}, end={end}: expected positive numbers, and steps in '
      'this order.'
    )
  if end - begin < rounds:
    raise ValueError(
      f'rounds={rounds}: {end - begin} steps from begin={begin} to end={end} are too few.'
    )
  if kind not in ('absolute', 'squared'):
    raise ValueError(f"kind is {kind!r}, expected 'absolute' or 'squared'.")
  interval = (end - begin) // rounds

  def init(params: PyTree) -> GateState:
    for leaf in jax.tree.leaves(params):
      if leaf.ndim != 1 or leaf.size < keep:
        raise ValueError(f'keep={keep}: a mask of shape {leaf.shape} has not so many gates.')
    return GateState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

  def update(
    updates: PyTree, state: GateState, params: PyTree | None = None
  ) -> tuple[PyTree, GateState]:
    if params is None:
      raise ValueError('select_gates needs the parameters.')
    step = state.count + 1
    passed = step - begin
    due = (passed > 0) & (passed % interval == 0) & (passed <= interval * rounds)

    def summed(importance: Array, gradient: Array) -> Array:
      size = jnp.abs(gradient) if kind == 'absolute' else jnp.square(gradient)
      return jnp.where(passed > 0, importance + size, importance)

    def moved(mask: Array, importance: Array) -> Array:
      each = -(-(mask.size - keep) // rounds)
      count = jnp.clip(jnp.sum(mask > 0) - keep, 0, each)
      return jnp.where(due, remove_least(mask, importance, count) - mask, 0).astype(mask.dtype)

    sums = jax.tree.map(summed, state.importance, updates)
    changes = jax.tree.map(moved, params, sums)
    left = jax.tree.map(lambda own: jnp.where(due, 0, own), sums)
    return changes, GateState(step, left)

  return optax.GradientTransformation(init, update)
