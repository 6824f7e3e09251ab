"""Several independent runs of one program, side by side as one."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlab.training import Program, TrainState

Array = jax.Array
PyTree = Any


def replicate(single: Program, count: int) -> Program:
  """Returns `count` independent runs of a program as one, mapped over a leading axis of the state.

  Run k starts from `run_key(key, k)`. Images and labels of a batch have the runs on their second axis,
  `index` belongs to all; metrics are means. One after the other with the same keys and batches, the runs end
  with the same parameters up to rounding.
  """

  def init(key: Array) -> TrainState:
    return jax.vmap(lambda k: single.init(run_key(key, k)))(jnp.arange(count))

  axes = {name: None if name == 'index' else 1 for name in single.batch}

  def step(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
    new, metrics = jax.vmap(single.step, in_axes=(0, None, axes))(state, frozen, batch)
    return new, {name: jnp.mean(values) for name, values in metrics.items()}

  batch = {
    name: leaf
    if axes[name] is None
    else jax.ShapeDtypeStruct((leaf.shape[0], count, *leaf.shape[1:]), leaf.dtype)
    for name, leaf in single.batch.items()
  }
  return Program(init, step, batch, single.rules, single.frozen)


def run_key(key: Array, run: Array | int) -> Array:
  """Returns the key that the `run`-th of several runs of a program starts from."""
  return jax.random.fold_in(key, run)
