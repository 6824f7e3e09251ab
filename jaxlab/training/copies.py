"""Several copies of one training at once, each with its own hyperparameters, on the same batches.

Their parameters are stacked, a copy along the first axis; a loss is the sum of the copies' own, so that no
copy's gradient knows of another. What they share (a frozen backbone's forward pass) is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

PyTree = Any


def optimizer_of_copies(
  make: Callable[..., optax.GradientTransformation], hyperparameters: Mapping[str, ArrayLike]
) -> optax.GradientTransformation:
  """Returns the optimizer of stacked parameters, each copy of which is updated as if it were alone.

    optimizer_of_copies(optax.adamw, {'learning_rate': [1e-3, 1e-2], 'weight_decay': [0.05, 0.0]})

  The values lie in the optimizer's state (`optax.inject_hyperparams`), which `vmap` runs over. A schedule
  that all copies share goes behind: `optax.chain(optimizer_of_copies(...), optax.scale_by_schedule(share))`.

  Args:
    make: of one copy, called with a scalar of each hyperparameter.
    hyperparameters: `[copies]` each, by their names as arguments of `make`.

  Returns:
    A transformation of trees whose leaves are `[copies, ...]`.

  Raises:
    ValueError: for hyperparameters that are none or of several lengths; from `init`, for parameters of
      another number of copies.
  """
  values = {name: jnp.asarray(own, jnp.float32) for name, own in hyperparameters.items()}
  shapes = {name: own.shape for name, own in values.items()}
  if not shapes or len(set(shapes.values())) > 1 or any(len(own) != 1 for own in shapes.values()):
    raise ValueError(f'hyperparameters have shapes {shapes}: expected some, all [copies].')
  (count,) = next(iter(shapes.values()))
  injected = optax.inject_hyperparams(make)
  # Numbers of a copy come from the state; these only say which arguments there are.
  nominal = injected(**dict.fromkeys(values, 0.0))

  def init(params: PyTree) -> PyTree:
    require_copies(params, count)
    return jax.vmap(lambda own, leaves: injected(**own).init(leaves))(values, params)

  def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, PyTree]:
    if params is None:
      return jax.vmap(nominal.update)(updates, state)
    return jax.vmap(nominal.update)(updates, state, params)

  return optax.GradientTransformation(init, update)


def require_copies(params: PyTree, count: int) -> None:
  """Raises ValueError unless every leaf holds `count` copies along its first axis."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    if not jnp.ndim(leaf) or leaf.shape[0] != count:
      raise ValueError(
        f'{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}: expected {count} copies along its '
        'first axis.'
      )


def stack_copies(init: Callable[[jax.Array], PyTree], keys: jax.Array) -> PyTree:
  """Returns the stacked values of `init(key)` for each of `keys` `[copies]`; equal keys start alike."""
  return jax.vmap(init)(keys)


def copy_at(stacked: PyTree, index: int) -> PyTree:
  """Returns one copy of stacked parameters, without their first axis."""
  return jax.tree.map(lambda leaf: leaf[index], stacked)
