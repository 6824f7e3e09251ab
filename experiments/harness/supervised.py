"""The supervised training of a model on a task: one program for all."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from experiments.harness.sections import Recipe
from experiments.harness.tasks import Task
from jaxlab import data, models
from jaxlab.training import Initial, LossState, Out, Program, cast_floating, make_program

Array = jax.Array
PyTree = Any


class Seen(NamedTuple):
  """What a loss sees besides outputs and targets.

  Attributes:
    step: finished optimizer steps, a scalar.
    teacher: the teacher's outputs for the same inputs; None: there is none.
    captured: what the modules named by `program(captured=...)` hand on, by path.
    taught: likewise of the teacher.
  """

  step: Array
  teacher: Array | None
  captured: Mapping[str, Any] = {}
  taught: Mapping[str, Any] = {}


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
  teacher: nn.Module | None = None,
  prepare: Callable[[PyTree], PyTree] = lambda params: params,
  frozen: Sequence[str] = (),
  hooks: Sequence[models.Hook] = (),
  captured: Sequence[str] = (),
  taught: Sequence[str] = (),
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
    teacher: a model that the loss learns from.
    prepare: applied to the parameters as they were drawn.
    frozen: patterns of parameters that stay.
    hooks: around the model's modules in training.
    captured: patterns of modules whose outputs the loss reads (`Seen.captured`): penalties on features,
      distillation from block to block.
    taught: likewise of the teacher.
    repeats: whether a batch may hold a record twice: its copies are told apart by their place.
    draw: `key -> (key of the parameters, streams)`, see `streams`.
  """
  schedule = recipe.schedule.make(recipe.epochs, steps_per_epoch)
  optimizer = recipe.optimizer.make(schedule, frozen)
  batch = task.batch(recipe.batch_size)
  options = recipe.program_options
  dtype = options['compute_dtype'] or 'float32'

  def init(key: Array) -> Initial:
    init_key, keys = draw(key)
    blank = jax.tree.map(lambda leaf: jnp.zeros((2, *leaf.shape[1:]), leaf.dtype), task.batch(2))
    variables = dict(model.init(init_key, task.augmented(jax.random.split(init_key, 2), blank)))
    return Initial(prepare(variables.pop('params')), variables, {}, keys)

  def own_loss(
    params: PyTree, state: LossState, batch: PyTree, keys: dict[str, Array]
  ) -> tuple[Array, Out]:
    index = jnp.arange(len(batch['index'])) if repeats else batch['index']
    each = jax.vmap(lambda i: jax.random.fold_in(keys['augment'], i))(index)
    x, y = cast_floating(task.augmented(each, batch), dtype), task.targets(batch)
    if recipe.mixup > 0:
      x, partner, share = data.mixup(keys['mixup'], x, recipe.mixup)
    told, teacher_parts = None, {}
    if teacher is not None:
      told, teacher_parts = models.capture(teacher, state.frozen['teacher'], taught, x)
    (outputs, changed), parts = models.capture(
      model,
      {'params': params, **state.model_state},
      captured,
      x,
      mutable=list(state.model_state),
      hooks=hooks,
      rngs={'dropout': keys['dropout'], 'drop_path': jax.random.fold_in(keys['dropout'], 1)},
      **task.options,
    )
    outputs = cast_floating(outputs, jnp.promote_types(outputs.dtype, jnp.float32))

    def mean_loss(outputs: Array, targets: Array) -> Array:
      return jnp.mean(loss(outputs, targets, Seen(state.step, told, parts, teacher_parts)))

    if recipe.mixup > 0:
      value = data.mixup_loss(mean_loss, outputs, y, partner, share)
    else:
      value = mean_loss(outputs, y)
    metrics = {
      'accuracy': jnp.mean(task.score(outputs, y)['correct']),
      'learning_rate': schedule(state.step),
    }
    return value, Out(model_state=dict(changed), metrics=metrics)

  given = None
  if teacher is not None:
    given = {'teacher': abstract_variables(teacher, task)}
  return make_program(init, own_loss, optimizer, batch, frozen=given, **options)


def abstract_variables(model: nn.Module, task: Task) -> dict[str, PyTree]:
  """Returns the shapes of a model's variables."""
  inputs = jax.eval_shape(task.inputs, task.batch(2))
  return dict(jax.eval_shape(model.init, jax.random.key(0), inputs))
