"""What a network is asked: shapes, inputs, targets and scores of images, tokens, sequences and boxes.

A task turns a batch of records into what a model reads and what it is to say, and judges what it says. Tasks
are
hashable: equal ones share compilations.
"""

import dataclasses
import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from experiments.harness.data import Augment, Images, Tokens
from jaxlab import data, losses, models

Array = jax.Array
Batch = dict[str, Array]


class Task(Protocol):
  """What protocols know of a task.

  Attributes:
    options: keyword arguments of the model in training.
  """

  options: dict[str, Any]

  def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a global batch of records."""

  def inputs(self, batch: Batch) -> Any:
    """Returns what the model reads of a batch in evaluation."""

  def augmented(self, keys: Array, batch: Batch) -> Any:
    """Returns what the model reads in training; `keys` has one typed key a record."""

  def targets(self, batch: Batch) -> Any:
    """Returns what the model is to say."""

  def score(self, outputs: Any, targets: Any) -> dict[str, Array]:
    """Returns values `[batch]` of each record: `loss`, and what else says how good the outputs are."""


@dataclasses.dataclass(frozen=True)
class ImageTask:
  """Classification of images: records `image`, `label`, `index`."""

  stored: tuple[int, int, int]
  view: tuple[int, int, int]
  dtype: str
  mean: float | tuple[float, ...]
  std: float | tuple[float, ...]
  augment: Augment = dataclasses.field(default=Augment(), compare=False)

  @classmethod
  def of(cls, own: Images, augment: Augment | None = None) -> 'ImageTask':
    """Returns the task of a data set."""
    augment = Augment() if augment is None else augment
    parts = own.stored_image, own.view, own.dtype, own.mean, own.std, augment
    return MultiLabelTask(*parts, own.num_classes) if own.multi_label else cls(*parts)

  @property
  def options(self) -> dict[str, Any]:
    """Keyword arguments of the model in training."""
    return {'train': True}

  def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a global batch of records."""
    index = jax.ShapeDtypeStruct((size,), jnp.int32)
    image = jax.ShapeDtypeStruct((size, *self.stored), jnp.dtype(self.dtype))
    return {'image': image, 'label': index, 'index': index}

  def inputs(self, batch: Batch) -> Array:
    """Returns normalized images, which have the network's size."""
    return data.normalize(data.to_float(batch['image']), self.mean, self.std)

  def augmented(self, keys: Array, batch: Batch) -> Array:
    """Returns normalized images under the augmentation."""
    own = self.augment
    if own.kind == 'none':
      return self.inputs(batch)
    if own.kind == 'resized_crop':
      crop = data.resized_crop_augment(
        self.view[0], **own.crop_options(), mean=self.mean, std=self.std
      )
      return data.draw_views(crop, keys, batch['image'], 1)[0]
    crop = functools.partial(
      data.random_crop, size=self.view[:2], padding=own.padding, mode=own.fill
    )
    steps = [crop]
    if own.flip:
      steps.append(data.random_flip)
    images = jax.vmap(data.compose(*steps))(keys, data.to_float(batch['image']))
    images = data.normalize(images, self.mean, self.std)
    if not own.cutout:
      return images
    each = jax.vmap(lambda key: jax.random.fold_in(key, len(steps)))(keys)
    return jax.vmap(functools.partial(data.random_cutout, side=own.cutout))(each, images)

  def targets(self, batch: Batch) -> Array:
    """Returns the labels."""
    return batch['label']

  def score(self, outputs: Array, targets: Array) -> dict[str, Array]:
    """Returns `loss` and `correct` of each image."""
    return class_scores(outputs, targets)


@dataclasses.dataclass(frozen=True)
class MultiLabelTask(ImageTask):
  """Which classes an image shows: records `image`, `multi_label` float `[num_classes]`, `index`."""

  num_classes: int = 0

  def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a global batch of records."""
    shapes = super().batch(size)
    del shapes['label']
    present = jax.ShapeDtypeStruct((size, self.num_classes), jnp.float32)
    return {**shapes, 'multi_label': present}

  def targets(self, batch: Batch) -> Array:
    """Returns 1 for each class that is there, else 0."""
    return batch['multi_label']

  def score(self, outputs: Array, targets: Array) -> dict[str, Array]:
    """Returns of each image `loss`, and `correct`, the share of classes on the right side of 0."""
    outputs = outputs.astype(jnp.float32)
    right = jnp.mean(((outputs > 0) == (targets > 0)).astype(jnp.float32), -1)
    correct = jnp.where(jnp.any(jnp.isnan(outputs), -1), jnp.nan, right)
    return {'loss': losses.multi_label_bce(outputs, targets), 'correct': correct}


@dataclasses.dataclass(frozen=True)
class PointAugment:
  """The augmentation of clouds of points: `jaxlab.data.{random_point_dropout, random_scale_shift}`."""

  dropout: float = 0.0
  scale: tuple[float, float] = (1.0, 1.0)
  shift: float = 0.0


@dataclasses.dataclass(frozen=True)
class ArrayTask:
  """Classification of arrays, rows of a table or clouds: records `features` float, `label`, `index`."""

  shape: tuple[int, ...]
  augment: PointAugment = dataclasses.field(default=PointAugment(), compare=False)

  @property
  def options(self) -> dict[str, Any]:
    """Keyword arguments of the model in training."""
    return {'train': True}

  def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a global batch of records."""
    index = jax.ShapeDtypeStruct((size,), jnp.int32)
    features = jax.ShapeDtypeStruct((size, *self.shape), jnp.float32)
    return {'features': features, 'label': index, 'index': index}

  def inputs(self, batch: Batch) -> Array:
    """Returns the features."""
    return batch['features']

  def augmented(self, keys: Array, batch: Batch) -> Array:
    """Returns the features under the augmentation."""
    own, x = self.augment, batch['features']
    if own == PointAugment():
      return x

    def change(key: Array, points: Array) -> Array:
      drop, move = jax.random.split(key)
      points = data.random_point_dropout(drop, points, own.dropout)
      return data.random_scale_shift(move, points, own.scale, own.shift)

    return jax.vmap(change)(keys, x)

  def targets(self, batch: Batch) -> Array:
    """Returns the labels."""
    return batch['label']

  def score(self, outputs: Array, targets: Array) -> dict[str, Array]:
    """Returns `loss` and `correct` of each record."""
    return class_scores(outputs, targets)


@dataclasses.dataclass(frozen=True)
class TokenTask:
  """The next token at every position: records `tokens` `[length + 1]`, `index`."""

  length: int

  @classmethod
  def of(cls, own: Tokens) -> 'TokenTask':
    """Returns the task of a data set."""
    return cls(own.length)

  @property
  def options(self) -> dict[str, Any]:
    """Keyword arguments of the model in training."""
    return {}

  def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a global batch of records."""
    return {
      'tokens': jax.ShapeDtypeStruct((size, self.length + 1), jnp.int32),
      'index': jax.ShapeDtypeStruct((size,), jnp.int32),
    }

  def inputs(self, batch: Batch) -> Array:
    """Returns all tokens but the last."""
    return batch['tokens'][:, :-1]

  def augmented(self, keys: Array, batch: Batch) -> Array:
    """Returns all tokens but the last."""
    del keys
    return self.inputs(batch)

  def targets(self, batch: Batch) -> Array:
    """Returns each position's next token."""
    return batch['tokens'][:, 1:]

  def score(self, outputs: Array, targets: Array) -> dict[str, Array]:
    """Returns `loss` and `correct`, means over the positions of each window."""
    outputs = outputs.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    correct = is_correct(outputs, targets)
    return {'loss': jnp.mean(loss, -1), 'correct': jnp.mean(correct, -1)}


@dataclasses.dataclass(frozen=True)
class CompletionTask(TokenTask):
  """The next token where it belongs to a completion: records `tokens`, `counted` bool `[length]`, `index`."""

  def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a global batch of records."""
    counted = jax.ShapeDtypeStruct((size, self.length), jnp.bool_)
    return {**super().batch(size), 'counted': counted}

  def targets(self, batch: Batch) -> tuple[Array, Array]:
    """Returns each position's next token, and where it counts."""
    return batch['tokens'][:, 1:], batch['counted']

  def score(self, outputs: Array, targets: tuple[Array, Array]) -> dict[str, Array]:
    """Returns `loss` and `correct`, means over each completion, and `exact`, 1 where all of it is correct.

    That is whether the model, always taking the most probable token, writes this completion.
    """
    tokens, counted = targets
    outputs = outputs.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, tokens)
    correct = is_correct(outputs, tokens)
    present = jnp.maximum(jnp.sum(counted, -1), 1)
    exact = jnp.min(jnp.where(counted, correct, 1), -1)
    return {
      'loss': jnp.sum(jnp.where(counted, loss, 0), -1) / present,
      'correct': jnp.sum(jnp.where(counted, correct, 0), -1) / present,
      'exact': exact,
    }


@dataclasses.dataclass(frozen=True)
class SentenceTask:
  """A vector for every sentence: records `tokens` `[length]`, `valid` bool `[length]`, `index`.

  The model reads both, as keywords `tokens` and `mask`; what is padded counts nowhere. There is nothing to
  say: sentences are encoded, and encoders compared.
  """

  length: int

  @property
  def options(self) -> dict[str, Any]:
    """Keyword arguments of the model in training."""
    return {'train': True}

  def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a global batch of records."""
    return {
      'tokens': jax.ShapeDtypeStruct((size, self.length), jnp.int32),
      'valid': jax.ShapeDtypeStruct((size, self.length), jnp.bool_),
      'index': jax.ShapeDtypeStruct((size,), jnp.int32),
    }

  def inputs(self, batch: Batch) -> Batch:
    """Returns the model's keywords."""
    return {'tokens': batch['tokens'], 'mask': batch['valid']}

  def augmented(self, keys: Array, batch: Batch) -> Batch:
    """Returns the model's keywords."""
    del keys
    return self.inputs(batch)

  def targets(self, batch: Batch) -> Array:
    """Returns which tokens count."""
    return batch['valid']

  def embed(self, outputs: Array, mask: Array) -> Array:
    """Returns the mean of each sentence's tokens `[batch, width]`, of length 1."""
    return models.mean_embedding(outputs, mask)

  def score(self, outputs: Array, targets: Array) -> dict[str, Array]:
    """Returns nothing: one sentence alone is neither right nor wrong."""
    del outputs, targets
    return {}


@dataclasses.dataclass(frozen=True)
class SequenceTask:
  """A label at every position of ragged sequences, padded to one length.

  Records: `sequence` float `[length, channels]`, `valid` bool `[length]` (False at padding), `label`
  int `[length]`, `index`. The model reads the pair (sequence, valid); what is padded counts nowhere. (A
  loader's own field `mask` says which records of a last batch are there.)
  """

  length: int
  channels: int

  @property
  def options(self) -> dict[str, Any]:
    """Keyword arguments of the model in training."""
    return {'train': True}

  def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a global batch of records."""
    shape = (size, self.length)
    return {
      'sequence': jax.ShapeDtypeStruct((*shape, self.channels), jnp.float32),
      'valid': jax.ShapeDtypeStruct(shape, jnp.bool_),
      'label': jax.ShapeDtypeStruct(shape, jnp.int32),
      'index': jax.ShapeDtypeStruct((size,), jnp.int32),
    }

  def inputs(self, batch: Batch) -> tuple[Array, Array]:
    """Returns sequences, zero where they are padded, and what is valid."""
    return jnp.where(batch['valid'][..., None], batch['sequence'], 0), batch['valid']

  def augmented(self, keys: Array, batch: Batch) -> tuple[Array, Array]:
    """Returns `inputs`."""
    del keys
    return self.inputs(batch)

  def targets(self, batch: Batch) -> tuple[Array, Array]:
    """Returns labels, and which are valid."""
    return batch['label'], batch['valid']

  def score(self, outputs: Array, targets: tuple[Array, Array]) -> dict[str, Array]:
    """Returns `loss` and `correct`, means over what is there of each sequence."""
    labels, valid = targets
    outputs = outputs.astype(jnp.float32)
    loss = optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.where(valid, labels, 0))
    correct = is_correct(outputs, labels)
    present = jnp.maximum(jnp.sum(valid, -1), 1)
    return {
      'loss': jnp.sum(jnp.where(valid, loss, 0), -1) / present,
      'correct': jnp.sum(jnp.where(valid, correct, 0), -1) / present,
    }


@dataclasses.dataclass(frozen=True)
class BoxTask:
  """Boxes in images, padded to one number.

  Records: `image`, `boxes` float `[count, 4]`, `label` int `[count]`, `valid` bool `[count]`, `index`.
  What a detector says and how it is judged is the detector's own: `score` is passed in.
  """

  stored: tuple[int, int, int]
  count: int
  mean: float | tuple[float, ...]
  std: float | tuple[float, ...]
  scorer: Any

  @property
  def options(self) -> dict[str, Any]:
    """Keyword arguments of the model in training."""
    return {'train': True}

  def batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a global batch of records."""
    return {
      'image': jax.ShapeDtypeStruct((size, *self.stored), jnp.uint8),
      'boxes': jax.ShapeDtypeStruct((size, self.count, 4), jnp.float32),
      'label': jax.ShapeDtypeStruct((size, self.count), jnp.int32),
      'valid': jax.ShapeDtypeStruct((size, self.count), jnp.bool_),
      'index': jax.ShapeDtypeStruct((size,), jnp.int32),
    }

  def inputs(self, batch: Batch) -> Array:
    """Returns normalized images."""
    return data.normalize(data.to_float(batch['image']), self.mean, self.std)

  def augmented(self, keys: Array, batch: Batch) -> Array:
    """Returns `inputs`: boxes move with what an augmentation moves."""
    del keys
    return self.inputs(batch)

  def targets(self, batch: Batch) -> Batch:
    """Returns boxes, labels, and which are valid."""
    return {name: batch[name] for name in ('boxes', 'label', 'valid')}

  def score(self, outputs: Any, targets: Batch) -> dict[str, Array]:
    """Returns what the detector's own function says of each image."""
    return self.scorer(outputs, targets)


def class_scores(outputs: Array, labels: Array) -> dict[str, Array]:
  """Returns `loss`, the softmax cross-entropy, and `correct` of each logit vector."""
  outputs = outputs.astype(jnp.float32)
  loss = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
  return {'loss': loss, 'correct': is_correct(outputs, labels)}


def is_correct(outputs: Array, labels: Array) -> Array:
  """Returns 1.0 where the largest output is the label's, 0.0 where it is not, and NaN where one is NaN."""
  hits = (jnp.argmax(outputs, -1) == labels).astype(jnp.float32)
  return jnp.where(jnp.any(jnp.isnan(outputs), -1), jnp.nan, hits)
