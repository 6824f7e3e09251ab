"""Several independent runs of one program, side by side as one."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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


def sweep(single: Program, values: Mapping[str, Sequence[float]]) -> Program:
  """Returns runs of a program under several values (learning rates, weight decays) side by side as one.

  All start from the same key and see the same batches, augmented alike; each is what it would be alone. What
  does not depend on the values, such as the pass through a frozen network that nothing is fed back into, is
  computed once.

  A run whose loss, parameters or statistics are not finite has `diverged`: it stays as it was before that
  step, and the others go on. Metrics are means over those that have not, the loss is NaN if all have; one
  more, `diverged`, counts the others.

  Args:
    single: whose `frozen[name]` is a scalar for each name of `values`; all else of it is shared.
    values: by name, all of one length.

  Returns:
    The program whose parameters, optimizer state and `frozen[name]` have the runs on their first axis. Its
    `extra` is `{'runs': that of the runs, 'diverged': [runs]}`.

  Raises:
    ValueError: for lists of no or of different lengths.
  """
  counts = {len(own) for own in values.values()}
  if len(counts) != 1 or 0 in counts:
    raise ValueError(f'values={dict(values)}: expected as many of each, at least one.')
  (count,) = counts
  state_axes = TrainState(None, 0, 0, 0, 0, None)
  frozen_axes = {name: 0 if name in values else None for name in single.frozen}

  def init(key: Array) -> TrainState:
    run = lambda _: single.init(key)  # noqa: E731
    state = jax.vmap(run, out_axes=state_axes)(jnp.arange(count))
    return state.replace(extra={'runs': state.extra, 'diverged': jnp.zeros(count, bool)})

  def step_or_stay(state: TrainState, stays: Array, frozen: PyTree, batch: PyTree) -> Any:
    new, metrics = single.step(state, frozen, batch)
    stays |= ~_all_finite((metrics.get('loss', 0.0), new.params, new.model_state))
    for name in ('params', 'opt_state', 'model_state', 'extra'):
      held = jax.tree.map(
        lambda old, own: jnp.where(stays, old, own), getattr(state, name), getattr(new, name)
      )
      new = new.replace(**{name: held})
    return new, stays, metrics

  def step(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
    run = jax.vmap(step_or_stay, (state_axes, 0, frozen_axes, None), (state_axes, 0, 0))
    runs = state.replace(extra=state.extra['runs'])
    new, gone, metrics = run(runs, state.extra['diverged'], frozen, batch)
    sums = {name: jnp.sum(jnp.where(gone, 0, own), axis=0) for name, own in metrics.items()}
    left = jnp.sum(~gone)
    means = {name: own / jnp.maximum(left, 1) for name, own in sums.items()}
    if 'loss' in sums:
      means['loss'] = sums['loss'] / left  # without any run left no number, which ends the training
    new = new.replace(extra={'runs': new.extra, 'diverged': gone})
    return new, {**means, 'diverged': jnp.sum(gone).astype(jnp.float32)}

  many = jax.ShapeDtypeStruct((count,), jnp.float32)
  frozen = {**single.frozen, **dict.fromkeys(values, many)}
  return Program(init, step, single.batch, (), frozen)


def diverged(state: TrainState) -> np.ndarray:
  """Returns which runs of a `sweep` have diverged, bool `[runs]`."""
  return np.asarray(state.extra['diverged'])


def _all_finite(tree: PyTree) -> Array:
  floating = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
  return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in floating]))
