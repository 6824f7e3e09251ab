"""One gradient step: from a loss and an optimizer to a program.

A loss is a function `(params, state, batch, key) -> (value, Out)`: `state` (`LossState`) is what it reads
besides the parameters, `Out` what it leaves. `make_program` adds gradient, accumulation over microbatches,
precision, optimizer and keys. A step of another shape (several networks, several widths in turn) is written
by hand on `apply_gradients`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlab.training.accumulate import accumulate_gradients
from jaxlab.training.precision import cast_floating
from jaxlab.training.state import Program, Rules, TrainState

Array = jax.Array
PyTree = Any


class LossState(NamedTuple):
  """What a loss reads besides parameters and batch.

  Attributes:
    step: int32 scalar, the number of finished optimizer steps.
    model_state: the model's collections as the last microbatch left them.
    extra: what the method carries along, likewise.
    frozen: arrays that no step changes: a teacher, a backbone.
  """

  step: Array
  model_state: PyTree
  extra: PyTree
  frozen: PyTree


class Out(NamedTuple):
  """What a loss leaves besides its value.

  Attributes:
    model_state: the model's collections for the next microbatch; None: as they were.
    extra: what the method carries along; None: as it was.
    metrics: scalars by name; means over the microbatches.
  """

  model_state: PyTree | None = None
  extra: PyTree | None = None
  metrics: Mapping[str, Array] = {}


class Initial(NamedTuple):
  """What a program starts from.

  Attributes:
    params: trainable parameters.
    model_state: the model's other collections.
    extra: what the method carries along.
    key: typed keys of the run's randomness, one or a pytree of several streams; None: the key that was given.
  """

  params: PyTree
  model_state: PyTree = {}  # noqa: RUF012
  extra: PyTree = {}  # noqa: RUF012
  key: PyTree | None = None


Loss = Callable[[PyTree, LossState, PyTree, PyTree], tuple[Array, Out]]


def make_program(
  init: Callable[[Array], Initial],
  loss: Loss,
  optimizer: optax.GradientTransformation,
  batch: PyTree,
  *,
  frozen: PyTree = None,
  microbatches: int = 1,
  compute_dtype: jnp.dtype | str | None = None,
  after: Callable[[TrainState], TrainState] | None = None,
  rules: Rules = (),
) -> Program:
  """Returns the program that minimizes `loss`.

  With `microbatches=n` the step goes through the batch in `n` parts (see `accumulate_gradients`): gradients
  and metrics are means, `model_state` and `extra` go from each part to the next. The key that the loss is
  given is each of the run's base keys folded with `state.step`, and with the microbatch's index where there
  are several.

  Args:
    init: `key -> Initial`, draws all initial values.
    loss: `(params, state, batch, key) -> (value, Out)`, a mean over examples.
    optimizer: see `make_optimizer`, and `by_path` for several.
    batch: the global batch as `jax.ShapeDtypeStruct`s.
    frozen: shapes of the arrays that `state.frozen` holds; the values are given to `fit`.
    microbatches: static; divides the batch.
    compute_dtype: parameters and floating arrays of the batch are cast to it for the loss, gradients come
      back in the parameters' own type; None: no cast. `model_state`, `extra` and `frozen` stay as they are.
    after: applied to the state behind every optimizer step: moving averages, queues, clipping of parameters.
    rules: partition rules of the parameters.
  """

  def start(key: Array) -> TrainState:
    own = init(key)
    keys = key if own.key is None else own.key
    return TrainState(
      jnp.int32(0),
      own.params,
      optimizer.init(own.params),
      own.model_state,
      own.extra,
      jax.tree.map(jax.random.key_data, keys),
    )

  def step(state: TrainState, frozen: PyTree, batch: PyTree) -> tuple[TrainState, dict[str, Array]]:
    def micro_loss(params, carried, batch):
      index, model_state, extra = carried
      if compute_dtype is not None:
        params, batch = cast_floating((params, batch), compute_dtype)
      keys = step_keys(state, index if microbatches > 1 else None)
      value, out = loss(params, LossState(state.step, model_state, extra, frozen), batch, keys)
      model_state = model_state if out.model_state is None else out.model_state
      extra = extra if out.extra is None else out.extra
      return value, ((index + 1, model_state, extra), {'loss': value, **out.metrics})

    carried = (jnp.int32(0), state.model_state, state.extra)
    (_, ((_, model_state, extra), metrics)), gradients = accumulate_gradients(
      micro_loss, state.params, carried, batch, microbatches
    )
    new = apply_gradients(state, gradients, optimizer, model_state=model_state, extra=extra)
    return (new if after is None else after(new)), metrics

  return Program(start, step, batch, rules, {} if frozen is None else frozen)


def apply_gradients(
  state: TrainState, gradients: PyTree, optimizer: optax.GradientTransformation, **changes: PyTree
) -> TrainState:
  """Returns the state behind one optimizer step; `changes` are further fields (`model_state`, `extra`)."""
  updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  return state.replace(step=state.step + 1, params=params, opt_state=opt_state, **changes)


def step_keys(state: TrainState, microbatch: Array | int | None = None) -> PyTree:
  """Returns the state's keys folded with its step, and with the microbatch's index if one is given."""

  def fold(data: Array) -> Array:
    key = jax.random.fold_in(jax.random.wrap_key_data(data), state.step)
    return key if microbatch is None else jax.random.fold_in(key, microbatch)

  return jax.tree.map(fold, state.key)
