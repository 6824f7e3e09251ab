"""Settings of few-shot episodes: a network, its training on base classes, its fine-tuning in episodes."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from flax import linen as nn

from experiments.harness import networks
from experiments.harness.data import Augment
from experiments.harness.sections import Experiment, Optimizer, Recipe, check_batch
from experiments.harness.settings import found_by, free, section
from experiments.protocols import partial_tuning
from experiments.protocols.few_shot_data import BaseAndNovel
from jaxlab import models
from jaxlab.models.wide_resnet import WideResNet


@dataclasses.dataclass(frozen=True)
class Episodes:
  """N-way K-shot episodes of novel classes.

  Attributes:
    count: number of episodes.
    num_ways: classes of an episode.
    num_shots: support images of a class.
    num_queries: images of a class that are classified.
    per_call: episodes that are worked on until results are written.
  """

  count: int = 500
  num_ways: int = 5
  num_shots: int = 1
  num_queries: int = 15
  per_call: int = free(64)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from at_least_one(self, 'count', 'num_ways', 'num_shots', 'num_queries', 'per_call')


@dataclasses.dataclass(frozen=True)
class FineTuning:
  """The fine-tuning in an episode.

  Attributes:
    trained: what of the network is.
    dropout: in what is trained, of wide residual networks.
    steps: each sees all support images.
    learning_rate: constant.
    optimizer: with its own options; starts anew in every episode.
    augment: of support images.
    at_once: episodes that a device works on together, as one batch; None: one after the other.
  """

  trained: partial_tuning.Choice = 'last_stage'
  dropout: float = 0.0
  steps: int = 100
  learning_rate: float = 0.1
  optimizer: Optimizer = section(Optimizer)
  augment: Augment = section(Augment)
  at_once: int | None = free(None)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from at_least_one(self, 'steps', *(['at_once'] if self.at_once is not None else []))
    if not self.learning_rate > 0:
      yield f'learning_rate={self.learning_rate}: expected a positive number.'
    if not 0 <= self.dropout < 1:
      yield f'dropout={self.dropout}: expected a share in [0, 1).'


@dataclasses.dataclass(frozen=True)
class BaseImages:
  """Images of base classes that episodes see.

  Attributes:
    batch_size: drawn in a step, with replacement.
    limit: images that they are drawn from, chosen once; None: all.
    judged: images whose features tell how far those of the fine-tuned network have moved.
  """

  batch_size: int = 256
  limit: int | None = None
  judged: int = 1024

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from at_least_one(self, 'batch_size', *(['limit'] if self.limit is not None else []))


def at_least_one(own: Any, *names: str) -> Iterator[str]:
  """Yields the fields of a section that are below 1."""
  for name in names:
    if getattr(own, name) < 1:
      yield f'{name}={getattr(own, name)}: expected at least 1.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Experiment):
  """Settings of an experiment in episodes.

  Attributes:
    data: images of base and novel classes.
    model: name and fields of the network; a classifier is put over it.
    checkpoint: a file of its weights by PyTorch's names (`jaxlab.models.read_state_dict`); empty: it is
      trained here on the base classes.
    augment: of images in that training.
    recipe: of that training.
    episodes: of novel classes.
    fine_tuning: in an episode.
    base: images of base classes in episodes.
  """

  data: BaseAndNovel
  model: Mapping[str, Any]
  checkpoint: str = ''
  augment: Augment = section(Augment)
  recipe: Recipe
  episodes: Episodes = section(Episodes)
  fine_tuning: FineTuning = section(FineTuning)
  base: BaseImages = section(BaseImages)

  @property
  def num_base(self) -> int:
    """Base images that episodes draw from."""
    return min(self.base.limit or self.data.train_size, self.data.train_size)

  @property
  def backbone(self) -> nn.Module:
    """The network without a classifier, as it is fine-tuned."""
    backbone = networks.create(self.model, num_classes=None)
    if isinstance(backbone, WideResNet):
      backbone = backbone.clone(dropout=self.fine_tuning.dropout)
    return backbone

  @property
  def part(self) -> partial_tuning.Part:
    """What is fine-tuned; its `start` is where stored activations go in, if images are not augmented."""
    own = partial_tuning.part(self.backbone, self.fine_tuning.trained)
    return own if self.fine_tuning.augment.kind == 'none' else own._replace(start=None)


def check(config: Settings) -> Iterator[str]:
  """Yields what is wrong with settings that depend on one another."""
  own, recipe = config.data, config.recipe
  cropped = own.stored_image != own.view
  if any(side > stored for side, stored in zip(own.view, own.stored_image, strict=True)):
    yield f'data.image_size={own.image_size}: expected at most the side of {own.stored_image}.'
  if cropped and config.augment.kind != 'resized_crop' and not config.checkpoint:
    yield f"augment.kind={config.augment.kind!r}: expected 'resized_crop', images are stored larger."
  if cropped and config.fine_tuning.augment.kind == 'pad_crop':
    yield "fine_tuning.augment.kind='pad_crop': expected 'resized_crop', images are stored larger."
  if config.checkpoint and not config.checkpoint.endswith(('.safetensors', '.npz')):
    yield f'checkpoint={config.checkpoint!r} is neither .safetensors nor .npz.'
  yield from check_batch(config.mesh, recipe.batch_size, 'recipe.batch_size')
  if own.novel_classes is not None and config.episodes.num_ways > len(own.novel_classes):
    most = len(own.novel_classes)
    yield f'episodes.num_ways={config.episodes.num_ways}: expected at most {most}, the novel classes.'
  if own.train_size is not None:
    if recipe.batch_size > own.train_size:
      yield f'recipe.batch_size={recipe.batch_size} exceeds data.train_size={own.train_size}.'
    elif recipe.epochs > 0 and recipe.batch_size > 0:
      steps = own.train_size // recipe.batch_size
      yield from found_by('recipe.schedule', recipe.schedule.make, recipe.epochs, steps)
    if not 1 <= config.base.judged <= config.num_base:
      yield f'base.judged={config.base.judged}: expected 1 to {config.num_base}, the base images.'
  try:
    backbone = config.backbone
  except (ValueError, TypeError) as error:
    yield f'model: {error}'
    return
  yield from found_by('model', partial_tuning.part, backbone, config.fine_tuning.trained)
  yield from found_by('model', models.abstract_variables, backbone, own.view)
