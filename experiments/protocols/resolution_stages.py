"""Pretraining in stages of growing images: each goes on with all that the one before has learned."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.harness.runs import Run
from experiments.protocols import pretraining, siamese
from experiments.protocols.pretraining import Length
from jaxlab import data
from jaxlab.training import TrainState

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
  """A stage of a pretraining: side of its views, epochs and learning rate (None: the recipe's)."""

  size: int
  epochs: int | None = None
  base: float | None = None

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.size < 1 or (self.epochs is not None and self.epochs < 1):
      yield f'size={self.size}, epochs={self.epochs}: expected at least 1.'
    if self.base is not None and self.base < 0:
      yield f'base={self.base}: expected at least 0.'

  @property
  def name(self) -> str:
    """What tells the stage from others: `56px_100` or `56px_100_0.03`, without what is the recipe's."""
    given = (f'{value:g}' for value in (self.epochs, self.base) if value is not None)
    return '_'.join((f'{self.size}px', *given))

  def length(self, config: pretraining.Settings) -> Length:
    """Returns the length of the stage."""
    return pretraining.length(config, self.epochs)


def training(
  config: pretraining.Settings,
  stage: Stage,
  nets: siamese.Networks,
  targets: siamese.Targets,
  decides: Mapping[str, Any],
) -> Run:
  """Returns the pretraining of a stage: two views of its size, an optimizer and a schedule of its own.

  Args:
    config: the settings.
    stage: of the pretraining.
    nets: the modules, for images of any size.
    targets: what predictions are compared with.
    decides: what else decides what the run ends with, such as the stage before.
  """
  if stage.base is not None:
    schedule = dataclasses.replace(config.recipe.schedule, base=stage.base)
    recipe = dataclasses.replace(config.recipe, schedule=schedule)
    config = dataclasses.replace(config, recipe=recipe)
  normal = {'mean': config.data.mean, 'std': config.data.std}
  augment = data.resized_crop_augment(stage.size, **config.augment.crop_options(), **normal)
  count, side = 2 * config.model.get('norm_groups', 1), stage.size
  blank = jnp.zeros((count, side, side, config.data.view[2]))

  return pretraining.training(
    config, f'{side} pixels', siamese.init(nets, targets, blank),
    siamese.view_loss(nets, targets), epochs=stage.epochs,
    views=lambda keys, images: data.draw_views(augment, keys, images), after=targets.after,
    decides={'size': side, **decides},
  )  # fmt: skip


def carry(before: TrainState, drawn: TrainState) -> TrainState:
  """Returns a drawn state with all that the stage before has learned: networks, targets, queue.

  Step, optimizer and keys are those of the drawn state.
  """
  return drawn.replace(params=before.params, model_state=before.model_state, extra=before.extra)
