"""Self-supervised pretraining: a network learns from views of images without their labels.

What is trained is a loss of the views; `training` makes a run of it. Networks and targets of siamese methods
are in `siamese`; frozen backbones are judged by `feature_evaluation`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.harness.data import Augment, Images
from experiments.harness.runs import Run
from experiments.harness.sections import Experiment, Recipe, check_batch
from experiments.harness.settings import found_by, free
from experiments.harness.tasks import ImageTask
from experiments.protocols.feature_evaluation import Evaluation
from jaxlab import data
from jaxlab.training import Initial, LossState, Out, TrainState, cast_floating, make_program

Array = jax.Array
PyTree = Any
Views = list[Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of a pretraining.

  Attributes:
    data: images; labels are for the evaluation alone.
    augment: by which views are drawn.
    model: name and fields of the backbone.
    recipe: of the pretraining.
    eval: of the frozen backbone.
  """

  data: Images
  augment: Augment
  model: Mapping[str, Any]
  recipe: Recipe
  eval: Evaluation = free(default_factory=Evaluation)

  @property
  def task(self) -> ImageTask:
    """How images are read, augmented or not."""
    return ImageTask.of(self.data, self.augment)


Loss = Callable[[PyTree, LossState, Views, dict[str, Array]], tuple[Array, Out]]


def training(
  config: Settings,
  title: str,
  init: Callable[[Array], Initial],
  loss: Loss,
  *,
  epochs: int | None = None,
  views: Callable[[Array, Array], Any] | None = None,
  after: Callable[[TrainState], TrainState] | None = None,
  frozen: Sequence[str] = (),
  decides: Mapping[str, Any] | None = None,
) -> Run:
  """Returns the pretraining that minimizes `loss`.

  Args:
    config: the settings.
    title: name of the run's row.
    init: `key -> Initial`; its `key` holds the stream `'views'`, and those that `loss` draws from.
    loss: `(params, state, views, keys) -> (value, Out)`; keys are those of the step.
    epochs: in place of the recipe's.
    views: `(keys, images) -> views` with one key an image; default: two of `config.augment`.
    after: see `make_program`; moves momentum encoders.
    frozen: patterns of parameters that stay.
    decides: what else decides what the run ends with, see `Run`.
  """
  recipe = dataclasses.replace(config.recipe, epochs=epochs or config.recipe.epochs)
  steps = config.data.train_size // recipe.batch_size
  schedule = recipe.schedule.make(recipe.epochs, steps)
  options = recipe.program_options
  views = two_views(config) if views is None else views

  def own_loss(
    params: PyTree, state: LossState, batch: PyTree, keys: dict[str, Array]
  ) -> tuple[Array, Out]:
    each = jax.vmap(lambda index: jax.random.fold_in(keys['views'], index))(batch['index'])
    seen = cast_floating(views(each, batch['image']), options['compute_dtype'] or jnp.float32)
    value, out = loss(params, state, seen, keys)
    return value, out._replace(metrics={**out.metrics, 'learning_rate': schedule(state.step)})

  batch = config.task.batch(recipe.batch_size)
  program = make_program(
    init,
    own_loss,
    recipe.optimizer.make(schedule, frozen),
    {name: batch[name] for name in ('image', 'index')},
    after=after,
    **options,
  )
  own = {'model': config.model, 'augment': config.augment, **(decides or {})}
  return Run(config, config.data, recipe, program, recipe.epochs * steps, own, title)


def two_views(config: Settings) -> Callable[[Array, Array], Views]:
  """Returns `(keys, images) -> [view, view]`, both drawn by `config.augment`."""
  options = {'mean': config.data.mean, 'std': config.data.std, **config.augment.crop_options()}
  augment = data.resized_crop_augment(config.data.view[0], **options)
  return lambda keys, images: data.draw_views(augment, keys, images)


def check(config: Settings) -> Iterator[str]:
  """Yields what is wrong with data, augmentation and recipe."""
  recipe, size = config.recipe, config.data.train_size
  if size is None:
    yield 'data.train_size: missing; the schedule is made for it.'
  elif size < recipe.batch_size:
    yield f'recipe.batch_size={recipe.batch_size} exceeds data.train_size={size}.'
  elif recipe.epochs > 0:
    steps = size // recipe.batch_size
    yield from found_by('recipe.schedule', recipe.schedule.make, recipe.epochs, steps)
  yield from check_batch(config.mesh, recipe.batch_size, 'recipe.batch_size')
  if config.augment.kind != 'resized_crop':
    yield f"augment.kind={config.augment.kind!r}: expected 'resized_crop', which draws the views."
  else:
    yield from found_by('augment', two_views, config)
  if recipe.mixup:
    yield f'recipe.mixup={recipe.mixup}: expected 0, there are no labels to mix.'
