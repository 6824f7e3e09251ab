"""The supervised training of a model on a task: one program for all."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from experiments.harness.sections import Recipe
from experiments.harness.tasks import Task
from jaxlab import data, models
from jaxlab.quantizers import Quantized
from jaxlab.training import (
  Initial,
  LossState,
  Out,
  Program,
  TrainState,
  blank_rows,
  cast_floating,
  make_program,
  read_rows,
  write_rows,
)

Array = jax.Array
PyTree = Any


class Seen(NamedTuple):
  """What a loss sees besides outputs and targets.

  Attributes:
    step: finished optimizer steps, a scalar.
    teacher: the teacher's outputs for the same inputs; None: there is none.
    captured: what the modules named by `program(captured=...)` hand on, by path.
    taught: likewise of the teacher.
    constants: the values of `program(constants=...)`.
    rows: the records' rows of `program(table=...)`.
    index: the records' places in their source, which constants of every record are looked up by.
  """

  step: Array
  teacher: Array | None
  captured: Mapping[str, Any] = {}
  taught: Mapping[str, Any] = {}
  constants: PyTree = None
  rows: PyTree = None
  index: Array | None = None


class Table(NamedTuple):
  """State of every training record, which a loss reads (`Seen.rows`) and a step changes.

  It starts with zeros, in `state.extra['table']`; see `jaxlab.training.example_table`.

  Attributes:
    shapes: of all records' rows, `jax.ShapeDtypeStruct`s `[records, ...]`.
    update: `(outputs, targets, seen) -> rows`, what the batch's rows are behind a step; outputs carry no
      gradient.
  """

  shapes: PyTree
  update: Callable[[Array, Array, Seen], PyTree]


Loss = Callable[[Array, Array, Seen], Array]


def cross_entropy(outputs: Array, targets: Array, seen: Seen) -> Array:
  """Returns the softmax cross-entropy of every target."""
  del seen
  return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)


def streams(key: Array) -> tuple[Array, dict[str, Array]]:
  """Returns the key that draws the parameters, and the base keys of what every step draws."""
  init_key, key = jax.random.split(key)
  return init_key, {
    'augment': key,
    'mixup': jax.random.fold_in(key, 1),
    'dropout': jax.random.fold_in(key, 2),
  }


def program(
  model: nn.Module,
  task: Task,
  recipe: Recipe,
  steps_per_epoch: int,
  *,
  loss: Loss = cross_entropy,
  teacher: nn.Module | Quantized | None = None,
  constants: PyTree = None,
  prepare: Callable[[PyTree], PyTree] = lambda params: params,
  collections: Mapping[str, PyTree] | None = None,
  unbind: Callable[[PyTree], Mapping[str, PyTree]] = lambda params: {'params': params},
  before_call: Callable[[dict[str, PyTree]], dict[str, PyTree]] = lambda variables: variables,
  options: Mapping[str, Any] | None = None,
  optimizer: Callable[[optax.Schedule], optax.GradientTransformation] | None = None,
  frozen: Sequence[str] = (),
  hooks: Sequence[models.Hook] = (),
  captured: Sequence[str] = (),
  taught: Sequence[str] = (),
  watched: Mapping[str, Callable[[Seen], Array]] = MappingProxyType({}),
  mix: Callable[[Array, Array, Array], tuple[Array, Array, Array]] | None = None,
  table: Table | None = None,
  average: Callable[[Array], Array] | None = None,
  repeats: bool = False,
  draw: Callable[[Array], tuple[Array, dict[str, Array]]] = streams,
) -> Program:
  """Returns the training as pure functions.

  A teacher's variables are `frozen['teacher']`; it sees the very inputs of the student, augmented and mixed,
  in evaluation mode.

  Args:
    model: what is trained.
    task: says inputs and targets.
    recipe: of the training.
    steps_per_epoch: optimizer steps of an epoch.
    loss: `(outputs, targets, seen) -> values`, which are averaged; outputs are in float32.
    teacher: a model that the loss learns from; or a quantized network, of which shapes are enough.
    constants: shapes of arrays that the loss reads (`Seen.constants`); their values are
      `frozen['constants']`.
    prepare: applied to the parameters as they were drawn.
    collections: variables that steps carry along besides those that the model makes itself.
    unbind: the model's variables as a function of what is trained, which is more than the parameters where
      steps or ranges of quantizers are learned: `lambda trained: network.update(**trained).unbind()[0]`, with
      `prepare=lambda _: {'params': ..., 'lsq': ...}` and the network's `hooks`.
    before_call: applied to all variables before every call of the model, carried ones included: what
      `Quantized.prepare` is.
    options: keyword arguments of the model, in place of the task's.
    optimizer: made of the learning rate's schedule, in place of the recipe's own: groups of parameters
      (`training.by_path`), a decoupled transformation (`recipe.optimizer.make(schedule, decoupled=...)`).
    frozen: patterns of parameters that stay.
    hooks: around the model's modules in training.
    captured: patterns of modules whose outputs the loss reads (`Seen.captured`): penalties on features,
      distillation from block to block.
    taught: likewise of the teacher.
    watched: scalars of every step, by name, which become metrics; `state.extra` holds the largest value that
      each had in any step.
    mix: `(key, inputs, step) -> (inputs, partners, share)`, in place of the recipe's mixup and CutMix; the
      loss is that of both targets, `share` of a record's own.
    table: state of every record; a batch then holds a record once, and nothing is mixed.
    average: `finished steps -> share` that a moving average of what is trained keeps behind a step; it is
      `state.extra['average']`, and starts with what the training starts with.
    repeats: whether a batch may hold a record twice: its copies are told apart by their place.
    draw: `key -> (key of the parameters, streams)`, see `streams`.
  """
  schedule = recipe.schedule.make(recipe.epochs, steps_per_epoch)
  if optimizer is None:
    made = recipe.optimizer.make(schedule, frozen)
  elif frozen:
    raise ValueError(f'frozen={tuple(frozen)} belongs to the optimizer that is given.')
  else:
    made = optimizer(schedule)
  mixes = mix
  if mix is None and (recipe.mixup > 0 or recipe.cutmix > 0):
    mixes = lambda key, x, step: mixed(key, x, recipe)  # noqa: E731
  if table is not None and (mixes is not None or repeats or recipe.microbatches > 1):
    raise ValueError(
      'A table of records needs each record once a step, not mixed, and no microbatches, whose means are '
      'over fewer records.'
    )
  batch = task.batch(recipe.batch_size)
  program_options = recipe.program_options
  dtype = program_options['compute_dtype'] or 'float32'
  options = task.options if options is None else options

  def init(key: Array) -> Initial:
    init_key, keys = draw(key)
    blank = jax.tree.map(lambda leaf: jnp.zeros((2, *leaf.shape[1:]), leaf.dtype), task.batch(2))
    args, kwargs = call(task.augmented(jax.random.split(init_key, 2), blank))
    variables = dict(model.init(init_key, *args, **kwargs))
    params = prepare(variables.pop('params'))
    largest = {name: jnp.float32(-jnp.inf) for name in watched}
    if table is not None:
      largest['table'] = blank_rows(table.shapes)
    if average is not None:
      largest['average'] = params
    return Initial(params, {**variables, **(collections or {})}, largest, keys)

  def own_loss(
    params: PyTree, state: LossState, batch: PyTree, keys: dict[str, Array]
  ) -> tuple[Array, Out]:
    index = jnp.arange(len(batch['index'])) if repeats else batch['index']
    each = jax.vmap(lambda i: jax.random.fold_in(keys['augment'], i))(index)
    x, y = cast_floating(task.augmented(each, batch), dtype), task.targets(batch)
    if mixes is not None:
      x, partner, share = mixes(keys['mixup'], x, state.step)
    told, teacher_parts = None, {}
    if teacher is not None:
      told, teacher_parts = _teach(teacher, state.frozen['teacher'], taught, x)
    args, kwargs = call(x)
    (outputs, changed), parts = models.capture(
      model,
      before_call({**unbind(params), **state.model_state}),
      captured,
      *args,
      mutable=list(state.model_state),
      hooks=hooks,
      rngs={'dropout': keys['dropout'], 'drop_path': jax.random.fold_in(keys['dropout'], 1)},
      **kwargs,
      **options,
    )
    outputs = cast_floating(outputs, jnp.promote_types(outputs.dtype, jnp.float32))
    held = state.frozen['constants'] if constants is not None else None
    rows = read_rows(state.extra['table'], batch['index']) if table is not None else None
    seen = Seen(state.step, told, parts, teacher_parts, held, rows, batch['index'])

    def mean_loss(outputs: Array, targets: Array) -> Array:
      return jnp.mean(loss(outputs, targets, seen))

    if mixes is not None:
      value = data.mixup_loss(mean_loss, outputs, y, partner, share)
    else:
      value = mean_loss(outputs, y)
    values = {name: fn(seen).astype(jnp.float32) for name, fn in watched.items()}
    largest = {name: jnp.maximum(state.extra[name], value) for name, value in values.items()}
    scores = {name: jnp.mean(own) for name, own in task.score(outputs, y).items() if name != 'loss'}
    scores = {'accuracy' if name == 'correct' else name: own for name, own in scores.items()}
    metrics = {**scores, 'learning_rate': schedule(state.step), **values}
    if table is not None:
      new = table.update(jax.lax.stop_gradient(outputs), y, seen)
      largest['table'] = write_rows(state.extra['table'], batch['index'], new)
    if average is not None:
      largest['average'] = state.extra['average']
    kept = {**state.model_state, **changed}
    return value, Out(model_state=kept, extra=largest, metrics=metrics)

  def moved(state: TrainState) -> TrainState:
    own = optax.incremental_update(state.params, state.extra['average'], 1 - average(state.step))
    return state.replace(extra={**state.extra, 'average': own})

  given = {}
  if isinstance(teacher, Quantized):
    given['teacher'] = jax.eval_shape(lambda: teacher.variables.tree)
  elif teacher is not None:
    given['teacher'] = abstract_variables(teacher, task)
  if constants is not None:
    given['constants'] = constants
  after = None if average is None else moved
  return make_program(
    init, own_loss, made, batch, frozen=given or None, after=after, **program_options
  )


def call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
  """Returns arguments and keywords of a model for a task's inputs; a mapping holds keywords."""
  return ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})


def mixed(key: Array, images: Array, recipe: Recipe) -> tuple[Array, Array, Array]:
  """Returns a batch that is mixed as a recipe says: images, partners and the share of the first."""

  def either(mix: Callable[..., tuple[Array, Array, Array]], alpha: float) -> Any:
    return lambda key: mix(key, images, alpha, partners=recipe.mix_partners)

  mixup, cutmix = either(data.mixup, recipe.mixup), either(data.cutmix, recipe.cutmix)
  if not (recipe.mixup and recipe.cutmix):
    return (cutmix if recipe.cutmix else mixup)(key)
  choice, key = jax.random.split(key)
  return jax.lax.cond(jax.random.bernoulli(choice), cutmix, mixup, key)


def _teach(
  teacher: nn.Module | Quantized, variables: PyTree, taught: Sequence[str], x: Any
) -> tuple[Any, dict[str, Any]]:
  """Returns the teacher's outputs, and what its modules `taught` hand on, in evaluation mode."""
  if not isinstance(teacher, Quantized):
    return models.capture(teacher, variables, taught, x)
  variables = teacher.prepare(variables) if teacher.prepare else variables
  return models.capture(
    teacher.model, variables, taught, x, hooks=teacher.hooks, **{**teacher.kwargs, 'train': False}
  )


def abstract_inputs(task: Task) -> Any:
  """Returns the shapes of what a model reads of two records in training."""
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2))
  return jax.eval_shape(task.augmented, keys, task.batch(2))


def abstract_variables(model: nn.Module, task: Task) -> dict[str, PyTree]:
  """Returns the shapes of a model's variables."""
  args, kwargs = call(abstract_inputs(task))
  return dict(jax.eval_shape(model.init, jax.random.key(0), *args, **kwargs))
