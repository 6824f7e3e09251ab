"""Values with an order, such as ages, predicted from images: data, task, prediction, measures."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness.data import Images
from experiments.harness.runs import Variables
from experiments.harness.sections import Experiment
from experiments.harness.settings import found_by
from experiments.harness.tasks import Batch, ImageTask
from jaxlab import data, evaluation, losses
from jaxlab.training import map_batches

Array = jax.Array
Outputs = Literal['distribution', 'rank', 'scalar']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Valued(Images):
  """Images with a value each: records hold `value` and `sigma` as well.

  Attributes:
    grid: (low, high, step) of the labels.
  """

  grid: tuple[float, float, float]

  @classmethod
  def complete(cls, values: dict[str, Any]) -> dict[str, Any]:
    """Puts in what follows from the grid."""
    values = super().complete(values)
    if 'grid' not in values:
      return values
    grid = {'grid': tuple(values['grid'])}
    for split in ('train_options', 'test_options'):
      values[split] = {**values.get(split, {}), **grid}
    return {**values, 'num_classes': len(data.value_grid(*values['grid']))}

  @property
  def labels(self) -> np.ndarray:
    """The labels, float32 `[num_labels]`."""
    return data.value_grid(*self.grid).astype(np.float32)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    yield from found_by('grid', data.value_grid, *self.grid)


@dataclasses.dataclass(frozen=True)
class Augment:
  """The augmentation of DLDL-v2's faces, in this order; what is 0 or None is left out.

  Attributes:
    flip: probability of a mirror image.
    grayscale: probability of no color.
    rescale: smallest side to which an image is reduced before it is brought back to its size.
    rotation: largest angle to either side, in degrees.
    jitter: strength of the jitter of brightness, contrast and saturation.
  """

  flip: float = 0.0
  grayscale: float = 0.0
  rescale: int | None = None
  rotation: float = 0.0
  jitter: float = 0.0

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    for name in ('flip', 'grayscale'):
      if not 0 <= getattr(self, name) <= 1:
        yield f'{name}={getattr(self, name)}: expected a probability.'
    if self.rotation < 0 or self.jitter < 0:
      yield f'rotation={self.rotation}, jitter={self.jitter}: expected at least 0.'

  def apply(self, key: Array, image: Array) -> Array:
    """Returns an image in [0, 1] under the augmentation."""
    steps = []
    if self.flip:
      steps.append(functools.partial(data.random_flip, probability=self.flip))
    if self.grayscale:
      steps.append(functools.partial(data.random_grayscale, probability=self.grayscale))
    if self.rescale is not None:
      steps.append(functools.partial(data.random_rescale, low=self.rescale))
    if self.rotation:
      steps.append(functools.partial(data.random_rotation, limit=np.deg2rad(self.rotation)))
    if self.jitter:
      strengths = (self.jitter,) * 3 + (0.0,)
      steps.append(lambda key, image: data.random_color_jitter(key, image, *strengths))
    return data.compose(*steps)(key, image) if steps else image


@dataclasses.dataclass(frozen=True)
class OrdinalTask(ImageTask):
  """Values of images: records `image`, `value`, `sigma`, `label`, `index`.

  Attributes:
    grid: (low, high, step) of the labels.
    outputs: what the network says: a logit a label; one for each but the last, that it is exceeded; or one
      number, whose tanh is the value.
    change: of training images.
  """

  grid: tuple[float, float, float] = (0.0, 1.0, 1.0)
  outputs: Outputs = 'distribution'
  change: Augment = dataclasses.field(default=Augment(), compare=False)

  @classmethod
  def of(cls, own: Valued, outputs: Outputs, change: Augment) -> 'OrdinalTask':
    """Returns the task of a data set."""
    parts = own.stored_image, own.view, own.dtype, own.mean, own.std
    return cls(*parts, grid=own.grid, outputs=outputs, change=change)

  @property
  def labels(self) -> Array:
    """The labels, `[num_labels]`."""
    return jnp.asarray(data.value_grid(*self.grid), jnp.float32)

  @property
  def num_outputs(self) -> int:
    """How many numbers the network says."""
    count = len(data.value_grid(*self.grid))
    return {'distribution': count, 'rank': count - 1, 'scalar': 1}[self.outputs]

  def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a global batch of records."""
    number = jax.ShapeDtypeStruct((size,), jnp.float32)
    return {**super().batch(size), 'value': number, 'sigma': number}

  def augmented(self, keys: Array, batch: Batch) -> Array:
    """Returns normalized images under the augmentation."""
    images = jax.vmap(self.change.apply)(keys, data.to_float(batch['image']))
    return data.normalize(images, self.mean, self.std)

  def targets(self, batch: Batch) -> Batch:
    """Returns values and their deviations."""
    return {name: batch[name] for name in ('value', 'sigma')}

  def predict(self, outputs: Array) -> Array:
    """Returns the values `[batch]` that outputs stand for."""
    outputs = outputs.astype(jnp.float32)
    if self.outputs == 'scalar':
      return losses.from_unit_range(jnp.tanh(outputs[:, 0]), self.labels)
    if self.outputs == 'rank':
      return losses.rank_predict(jax.nn.sigmoid(outputs), self.labels)
    return losses.label_expectation(jax.nn.softmax(outputs), self.labels)

  def score(self, outputs: Array, targets: Batch) -> dict[str, Array]:
    """Returns `error` of each image, in the values' unit."""
    return {'error': jnp.abs(self.predict(outputs) - targets['value'])}


class Predicted(dict):
  """What a network says of test records, by name: `value`, `truth`, `sigma`, and `outputs`."""


def predict(
  config: Experiment,
  own: Valued,
  model: nn.Module,
  task: OrdinalTask,
  source: data.Source,
  variables: Variables,
  mirror: bool = False,
) -> Predicted:
  """Returns the predictions of all test records; `mirror`: the mean of an image's and its mirror image's."""
  static = {'model': model, 'task': task, 'mirror': mirror}
  options = {'batch_size': config.eval_batch_size, 'mesh': config.mesh.make()}
  fn = functools.partial(_predict, variables, **static)
  return Predicted(map_batches(fn, source, **options, **harness_data.reading(own, 'test')))


@functools.partial(jax.jit, static_argnames=('model', 'task', 'mirror'))
def _predict(
  variables: Variables, batch: Batch, *, model: nn.Module, task: OrdinalTask, mirror: bool
) -> dict[str, Array]:
  x = task.inputs(batch)
  outputs = model.apply(variables, x, train=False)
  value = task.predict(outputs)
  if mirror:
    value = (value + task.predict(model.apply(variables, x[:, :, ::-1], train=False))) / 2
  return {'value': value, 'outputs': outputs, 'truth': batch['value'], 'sigma': batch['sigma']}


def measures(found: Mapping[str, np.ndarray]) -> dict[str, float]:
  """Returns `evaluation.value_metrics` of predictions."""
  return evaluation.value_metrics(found['value'], found['truth'], found['sigma'])


def shown_image(own: Valued, source: data.Source, index: int) -> np.ndarray:
  """Returns a test image as pictures show it, `[height, width]` or with three channels."""
  transform = harness_data.reading(own, 'test')['transform']
  record = source[index]
  image = (transform(record) if transform else record)['image']
  return image[..., 0] if image.shape[-1] == 1 else image
