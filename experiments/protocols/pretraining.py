"""Self-supervised pretraining: a network learns from views of images without their labels.

What is trained is a loss of the views; `training` makes a run of it. Networks and targets of siamese methods
are in `siamese`; frozen backbones are judged by `feature_evaluation`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.harness import pictures
from experiments.harness.data import Augment, Images
from experiments.harness.runs import Run, say
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


class Length(NamedTuple):
  """Of a training, in optimizer steps: all of them, and those of an epoch."""

  num_steps: int
  steps_per_epoch: int


def length(config: Settings, epochs: int | None = None) -> Length:
  """Returns the length of a pretraining of `epochs`, by default the recipe's."""
  steps = max((config.data.train_size or 0) // config.recipe.batch_size, 1)
  return Length((epochs or config.recipe.epochs) * steps, steps)


COLLAPSED = 0.3  # below this spread of unit-length features images hardly differ


def say_collapse(title: str, history: Sequence[Mapping[str, Any]]) -> float:
  """Returns the last `z_std` of a training's metrics, and says so if all images have one feature by then."""
  z_std = [line['z_std'] for line in history if 'z_std' in line][-1]
  if z_std < COLLAPSED:
    say(f'WARNING: {title} has collapsed: z_std={z_std:.3f}, all images have one feature.')
  return z_std


def draw_curves(
  config: Settings, histories: Mapping[str, Sequence[Mapping[str, Any]]], picture: Any
) -> None:
  """Draws loss, nearest neighbors (where they were judged on the way) and spread of pretrainings by title."""
  labels = {'loss': 'loss', 'knn_fp': 'nearest neighbors (%)', 'z_std': 'spread of projections'}
  pictures.curves(picture, config, histories, labels)


def training(
  config: Settings,
  title: str,
  init: Callable[[Array], Initial],
  loss: Callable[..., tuple[Array, Out]],
  *,
  epochs: int | None = None,
  views: Callable[[Array, Array], Any] | None = None,
  after: Callable[[TrainState], TrainState] | None = None,
  frozen: Sequence[str] = (),
  optimizer: Callable[[optax.Schedule], optax.GradientTransformation] | None = None,
  cast_views: bool = True,
  fields: Sequence[str] = (),
  view_fields: Mapping[str, Sequence[int]] = MappingProxyType({}),
  decides: Mapping[str, Any] | None = None,
) -> Run:
  """Returns the pretraining that minimizes `loss`.

  Args:
    config: the settings.
    title: name of the run's row.
    init: `key -> Initial`; its `key` holds the stream `'views'`, and those that `loss` draws from.
    loss: `(params, state, views, keys, *fields) -> (value, Out)`; keys are those of the step.
    epochs: in place of the recipe's.
    views: `(keys, images, **view_fields) -> views` with one key an image; default: two of `config.augment`.
    after: see `make_program`; moves momentum encoders.
    frozen: patterns of parameters that stay.
    optimizer: of the schedule of the learning rate, in place of the recipe's.
    cast_views: whether the loss sees views in the type of the computation; otherwise in float32.
    fields: of a batch, which the loss is given besides the views, such as `'index'`, or labels that a metric
      is measured by.
    view_fields: shapes of further fields of a record, float32, that `views` is given by their names.
    decides: what else decides what the run ends with, see `Run`.
  """
  recipe = dataclasses.replace(config.recipe, epochs=epochs or config.recipe.epochs)
  num_steps, steps_per_epoch = length(config, epochs)
  schedule = recipe.schedule.make(recipe.epochs, steps_per_epoch)
  options = recipe.program_options
  views = two_views(config) if views is None else views

  def own_loss(
    params: PyTree, state: LossState, batch: PyTree, keys: dict[str, Array]
  ) -> tuple[Array, Out]:
    each = jax.vmap(lambda index: jax.random.fold_in(keys['views'], index))(batch['index'])
    dtype = options['compute_dtype'] if cast_views else None
    given = {name: batch[name] for name in view_fields}
    seen = cast_floating(views(each, batch['image'], **given), dtype or jnp.float32)
    value, out = loss(params, state, seen, keys, *(batch[name] for name in fields))
    return value, out._replace(metrics={**out.metrics, 'learning_rate': schedule(state.step)})

  batch = config.task.batch(recipe.batch_size)
  further = {
    name: jax.ShapeDtypeStruct((recipe.batch_size, *shape), jnp.float32)
    for name, shape in view_fields.items()
  }
  program = make_program(
    init,
    own_loss,
    optimizer(schedule) if optimizer else recipe.optimizer.make(schedule, frozen),
    {**{name: batch[name] for name in ('image', 'index', *fields)}, **further},
    after=after,
    **options,
  )
  own = {'model': config.model, 'augment': config.augment, **(decides or {})}
  return Run(config, config.data, recipe, program, num_steps, own, title)


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
  for name in ('mixup', 'cutmix'):
    if getattr(recipe, name):
      yield f'recipe.{name}={getattr(recipe, name)}: expected 0, there are no labels to mix.'
