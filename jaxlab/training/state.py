"""What a training run is: its state, and the functions that make and advance it."""

from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax

PyTree = Any
Rules = Sequence[tuple[str, Any]]


class TrainState(flax.struct.PyTreeNode):
  """All arrays of a run, and nothing else: what a checkpoint holds.

  Attributes:
    step: int32 scalar, the number of finished optimizer steps.
    params: trainable parameters.
    opt_state: the optimizer's state.
    model_state: the model's other collections, e.g. `{'batch_stats': ...}`.
    extra: what a method carries from step to step: a momentum teacher, a queue, label estimates.
    key: raw data of the run's base keys (`jax.random.key_data`); steps draw from them folded with `step`.
  """

  step: jax.Array
  params: PyTree
  opt_state: PyTree
  model_state: PyTree = flax.struct.field(default_factory=dict)
  extra: PyTree = flax.struct.field(default_factory=dict)
  key: PyTree = flax.struct.field(default_factory=dict)


class Program(flax.struct.PyTreeNode):
  """A training run as pure functions: enough to start it, resume it, and compile it for a pod.

  Attributes:
    init: `key -> state`, jit-able; draws all initial values.
    step: `(state, frozen, batch) -> (state, metrics)`, pure and jit-able; metrics are scalars by name.
      Randomness comes from keys folded with `state.step`, so a resumed run draws what it would have drawn.
    batch: the *global* batch as `jax.ShapeDtypeStruct`s.
    rules: partition rules of the parameters, see `jaxlab.parallel.partition`.
    frozen: what steps read and none changes (a teacher, a backbone), as `jax.ShapeDtypeStruct`s. Its values
      are given to `fit`; no checkpoint holds them.
  """

  init: Callable[[jax.Array], TrainState] = flax.struct.field(pytree_node=False)
  step: Callable[[TrainState, PyTree, PyTree], tuple[TrainState, dict[str, jax.Array]]] = (
    flax.struct.field(pytree_node=False)
  )
  batch: PyTree
  rules: Rules = flax.struct.field(pytree_node=False, default=())
  frozen: PyTree = flax.struct.field(default_factory=dict)
