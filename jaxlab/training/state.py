"""What a training run is: its state, and the functions that make and advance it."""

from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax

PyTree = Any


class TrainState(flax.struct.PyTreeNode):
  """All arrays of a run, and nothing else: what a checkpoint holds.

  Attributes:
    step: int32 scalar, the number of finished optimizer steps.
    params: trainable parameters.
    opt_state: the optimizer's state.
    model_state: the model's other collections, e.g. `{'batch_stats': ...}`.
    extra: what a method carries from step to step: a momentum teacher, a queue, label estimates.
  """

  step: jax.Array
  params: PyTree
  opt_state: PyTree
  model_state: PyTree = flax.struct.field(default_factory=dict)
  extra: PyTree = flax.struct.field(default_factory=dict)


class Program(flax.struct.PyTreeNode):
  """A training run as pure functions: enough to start it, resume it, and compile it for a pod.

  Attributes:
    init: `key -> state`, jit-able; draws all initial values.
    step: `(state, batch) -> (state, metrics)`, pure and jit-able; metrics are scalars by name.
      Randomness comes from `fold_in(key, state.step)`, so a resumed run draws what it would have drawn.
    batch: the *global* batch as `jax.ShapeDtypeStruct`s.
    rules: partition rules of the parameters, see `jaxlab.parallel.partition`.
  """

  init: Callable[[jax.Array], TrainState] = flax.struct.field(pytree_node=False)
  step: Callable[[TrainState, PyTree], tuple[TrainState, dict[str, jax.Array]]] = flax.struct.field(
    pytree_node=False
  )
  batch: PyTree
  rules: Sequence[tuple[str, Any]] = flax.struct.field(pytree_node=False, default=())
