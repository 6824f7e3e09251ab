"""Fine-tuning: a pretrained backbone and a fresh linear classifier over it learn from labels together."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.harness import networks, runs, supervised
from experiments.harness.data import Augment
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import Recipe
from experiments.harness.settings import found_by
from experiments.harness.tasks import ImageTask
from experiments.protocols import pretraining
from jaxlab import data, models
from jaxlab.models.classifier_heads import Classifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineTuning:
  """How a pretrained backbone is trained on.

  Attributes:
    recipe: of the training.
    augment: of its images.
    model: fields in which the network differs from the pretrained one, such as `drop_path`.
    layer_decay: block b of n has the learning rate times `layer_decay^(n - b)`, the stem that of
      `layer_decay^(n + 1)`; the head, and what stands between blocks and head, the whole rate.
    head_init: initializer of the classifier.
  """

  recipe: Recipe
  augment: Augment = dataclasses.field(default_factory=Augment)
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  layer_decay: float = 1.0
  head_init: str = 'torch'

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not 0 < self.layer_decay <= 1:
      yield f'layer_decay={self.layer_decay}: expected a number in (0, 1].'


def classifier(config: pretraining.Settings, own: FineTuning) -> Classifier:
  """Returns the backbone under a linear classifier."""
  model = {**config.model, **own.model}
  return networks.classifier(model, config.data.num_classes, kernel_init=own.head_init)


def rates_by_depth(
  model: Classifier, params: Mapping[str, Any], layer_decay: float
) -> tuple[tuple[str, float], ...]:
  """Returns pairs (pattern, factor on the learning rate) of a `Classifier`'s backbone.

  Blocks are those of `models.anatomy`. The stem and what else the backbone itself holds (a class token,
  position embeddings) are the layer before the first block. With `layer_decay` 1 there are no pairs.

  Args:
    model: the network.
    params: its parameters, or their shapes.
    layer_decay: see `FineTuning`.

  >>> vit = models.create('vit_tiny_patch16_224', depth=2, image_size=32, num_classes=None)
  >>> model = Classifier(vit, models.Linear(10))
  >>> params = jax.eval_shape(model.init, jax.random.key(0), jax.numpy.zeros((1, 32, 32, 3)))[
  ...   'params'
  ... ]
  >>> for pair in rates_by_depth(model, params, 0.5):
  ...   print(*pair)
  backbone/blocks_0/.* 0.25
  backbone/blocks_1/.* 0.5
  backbone/patch_embed/proj/.* 0.125
  backbone/cls_token 0.125
  backbone/pos_embed 0.125
  """
  if layer_decay == 1:
    return ()
  anatomy = models.anatomy(model)
  own = [name for name, leaf in params['backbone'].items() if not isinstance(leaf, Mapping)]
  first = [*(f'{path}/.*' for path in anatomy.stem), *(f'backbone/{name}' for name in own)]
  paths, count = anatomy.block_paths, len(anatomy.block_paths)
  pairs = [(f'{path}/.*', layer_decay ** (count - index)) for index, path in enumerate(paths)]
  return (*pairs, *((path, layer_decay ** (count + 1)) for path in first))


def training(
  config: pretraining.Settings, own: FineTuning, title: str, start: Any, frozen: Sequence[str] = ()
) -> Run:
  """Returns the fine-tuning.

  Args:
    config: the settings of the pretraining: its data and model.
    own: how it is trained on.
    title: of the run.
    start: the `identity` of the pretraining, or what else decides the weights.
    frozen: patterns of parameters that stay; running statistics move in all layers.
  """
  model, steps = classifier(config, own), config.data.train_size // own.recipe.batch_size
  task = ImageTask.of(config.data, own.augment)
  params = supervised.abstract_variables(model, task)['params']
  rates = (
    *own.recipe.optimizer.lr_multipliers,
    *rates_by_depth(model, params, own.layer_decay),
  )
  optimizer = dataclasses.replace(own.recipe.optimizer, lr_multipliers=rates)
  make = functools.partial(optimizer.make, frozen=frozen)
  program = supervised.program(model, task, own.recipe, steps, optimizer=make)
  decides = {'model': config.model, 'fine_tuning': own, 'start': start}
  decides |= {'frozen': list(frozen)} if frozen else {}
  return Run(config, config.data, own.recipe, program, own.recipe.epochs * steps, decides, title)


def accuracy(
  config: pretraining.Settings,
  own: FineTuning,
  run: Run,
  backbone: Variables,
  sources: Mapping[str, data.Source],
  folder: pathlib.Path,
) -> float:
  """Fine-tunes a backbone, from wherever `folder` was left, and returns the test accuracy in percent.

  Args:
    config: the settings of the pretraining.
    own: how it is trained on.
    run: of `training`.
    backbone: its variables.
    sources: the splits 'train' and 'test'.
    folder: of this run.
  """
  start = {name: {'backbone': tree} for name, tree in backbone.items()}
  found = runs.train(run, sources['train'], folder, start=start, fresh=('head/.*',))
  return judged(config, own, found.variables, sources['test'])


def judged(
  config: pretraining.Settings, own: FineTuning, variables: Variables, source: data.Source
) -> float:
  """Returns the accuracy of a fine-tuned network on test records, in percent."""
  model = classifier(config, own)
  return networks.accuracy(config, config.data, model, config.task, variables, source)


def check(config: pretraining.Settings, own: FineTuning, key: str = 'fine_tuning') -> Iterator[str]:
  """Yields what is wrong with the settings of a fine-tuning under the name `key`."""
  size, batch = config.data.train_size, own.recipe.batch_size
  if not config.data.num_classes:
    yield f'{key}: the data have no classes.'
  elif size is not None and size < batch:
    yield f'{key}.recipe.batch_size={batch} exceeds data.train_size={size}.'
  elif size is not None:
    yield from found_by(key, lambda: training(config, own, '', None).trace())
