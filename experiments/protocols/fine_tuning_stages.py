"""Fine-tuning in stages, each on images of another size: what few labels make of a pretrained network.

Inputs are mixed (mixup, CutMix, or both in turn); a network goes from stage to stage with its position code
resampled.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import networks, supervised
from experiments.harness.data import Augment, Images
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Recipe, check_batch
from experiments.harness.settings import found_by
from experiments.harness.tasks import ImageTask
from experiments.protocols import pretraining
from jaxlab import data, losses, models

Array = jax.Array
Mix = Callable[[Array, Array, Array], tuple[Array, Array, Array]]

FIELDS = {field.name for field in dataclasses.fields(Images)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """A fine-tuning.

  Attributes:
    recipe: of the training.
    augment: of training images.
    data: fields of the data set that differ from those of the pretraining, such as sizes.
    mix: 'alternate': mixup in even epochs, CutMix in odd ones.
    alpha: of the mixtures' Beta distribution.
    label_smoothing: of the cross-entropy.
  """

  recipe: Recipe
  augment: Augment
  data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  mix: Literal['alternate', 'cutmix', 'mixup', 'none'] = 'alternate'
  alpha: float = 0.5
  label_smoothing: float = 0.1

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not 0 <= self.label_smoothing <= 1:
      yield f'label_smoothing={self.label_smoothing}: expected a share in [0, 1].'
    if self.alpha < 0:
      yield f'alpha={self.alpha}: expected at least 0.'
    if self.recipe.mixup:
      yield f'recipe.mixup={self.recipe.mixup}: expected 0; see mix and alpha.'
    if unknown := sorted({*self.data} - FIELDS):
      yield f'data: {unknown} are no fields of a data set.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(pretraining.Settings):
  """Settings of a pretraining and what follows it.

  Attributes:
    stages: fine-tunings by name, one after the other in the order of their names.
    fan_in_scaled: patterns of kernels that are drawn with PyTorch's default deviation, wherever training
      starts from drawn ones: see `networks.Network`.
  """

  stages: dict[str, Stage]
  fan_in_scaled: tuple[str, ...] = ()

  @property
  def stage_names(self) -> list[str]:
    """The names of the stages in their order."""
    return sorted(self.stages)


def network(config: Settings, own: Images, num_classes: int | None) -> nn.Module:
  """Returns the network for the views of a data set; position codes are stored for their size."""
  model = networks.create(config.model, num_classes=num_classes)
  return model.clone(image_size=own.view[0]) if hasattr(model, 'image_size') else model


def drawn(config: Settings, params: Any) -> Any:
  """Returns drawn parameters as a training starts from them."""
  return networks.fan_in_scaled(config.fan_in_scaled, params)


def frozen(model: nn.Module) -> tuple[str, ...]:
  """Returns patterns of parameters that stay: the random features of a performer."""
  linear = isinstance(model, models.T2TViT) and model.performer
  return ('.*/random_features',) * linear


def mixer(kind: str, alpha: float, steps_per_epoch: int = 1) -> Mix | None:
  """Returns `(key, images, step) -> (images, partners, share)`; an image keeps at least half of itself.

  Args:
    kind: see `Stage.mix`; None is returned for 'none'.
    alpha: of the Beta distribution.
    steps_per_epoch: of 'alternate'.
  """
  options = {'alpha': alpha, 'own_half': True}
  kinds = {'mixup': data.mixup, 'cutmix': data.cutmix}
  if kind in kinds:
    return lambda key, x, step: kinds[kind](key, x, **options)
  if kind == 'none':
    return None

  def alternate(key: Array, x: Array, step: Array) -> tuple[Array, Array, Array]:
    each = [functools.partial(kinds[name], **options) for name in ('mixup', 'cutmix')]
    return jax.lax.cond(step // steps_per_epoch % 2 == 0, *each, key, x)

  return alternate


def stage_data(config: Settings, name: str) -> Images:
  """Returns the data set as a stage reads it."""
  return dataclasses.replace(config.data, **config.stages[name].data)


def training(
  config: Settings, name: str, title: str, *, further: int = 0, before: Run | None = None
) -> Run:
  """Returns the training of a stage.

  Args:
    config: the settings.
    name: of the stage.
    title: of the run.
    further: epochs in addition to the recipe's.
    before: the run that it starts from.
  """
  stage, own = config.stages[name], stage_data(config, name)
  recipe = dataclasses.replace(stage.recipe, epochs=stage.recipe.epochs + further)
  steps = max((own.train_size or 0) // recipe.batch_size, 1)
  model = network(config, own, own.num_classes)

  def loss(outputs: Array, targets: Array, seen: supervised.Seen) -> Array:
    del seen
    return losses.label_smoothing_cross_entropy(outputs, targets, stage.label_smoothing)

  program = supervised.program(
    model, ImageTask.of(own, stage.augment), recipe, steps,
    loss=loss, mix=mixer(stage.mix, stage.alpha, steps), frozen=frozen(model),
    prepare=functools.partial(drawn, config),
  )  # fmt: skip
  decides = {'model': config.model, 'fan_in_scaled': config.fan_in_scaled, 'stage': stage}
  decides['before'] = before.identity if before else None
  return Run(config, own, recipe, program, recipe.epochs * steps, decides, title)


def check(config: Settings) -> Iterator[str]:
  """Yields what is wrong with the stages."""
  if not config.stages:
    yield 'stages: expected at least one.'
  for pattern in config.fan_in_scaled:
    yield from found_by('fan_in_scaled', _matches, config, pattern)
  for name, stage in config.stages.items():
    key, size = f'stages.{name}', stage.recipe.batch_size
    yield from check_batch(config.mesh, size, f'{key}.recipe.batch_size')
    if (config.data.train_size or size) < size:
      yield f'{key}.recipe.batch_size={size} exceeds data.train_size={config.data.train_size}.'
    if not {*stage.data} - FIELDS:
      yield from found_by(f'{key}.data', _fits, config, name)


def _fits(config: Settings, name: str) -> None:
  """Raises ValueError if a stage's images do not fit the network."""
  own = stage_data(config, name)
  model = network(config, own, own.num_classes)
  jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *own.view)))


def _matches(config: Settings, pattern: str) -> None:
  """Raises ValueError if a pattern matches no kernel of the network."""
  model = network(config, config.data, config.data.num_classes)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *config.data.view)))
  models.map_matching(lambda path, kernel: kernel, shapes['params'], pattern)


def enlarged(variables: Variables, model: nn.Module) -> Variables:
  """Returns variables whose position code is resampled to the grid of `model`, where it has one."""
  params = dict(variables['params'])
  if isinstance(model, models.ViT):
    prefix = model.num_embedded_prefix_tokens
    params['pos_embed'] = models.resample_position_embedding(
      params['pos_embed'], model.grid, num_prefix_tokens=prefix
    )
  return {**variables, 'params': params}


def accuracy(config: Settings, name: str, variables: Variables) -> float:
  """Returns the accuracy of a stage's network on the test records in percent."""
  own = stage_data(config, name)
  model, source = network(config, own, own.num_classes), harness_data.load(own, 'test')
  return networks.accuracy(config, own, model, ImageTask.of(own), variables, source)
