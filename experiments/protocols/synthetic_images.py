"""Images made of a trained network, which judge what is made of it."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.harness.data import Images
from experiments.harness.runs import Call, Variables, say
from jaxlab import compression, data, models

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Synthesis:
  """How images are made, see `compression.synthesize`; the defaults are those for images of 224 pixels.

  Attributes:
    count: images, of different classes where there are enough.
    recognized: share of them that the network must recognize.
    steps: see there, as are the others.
  """

  count: int = 50
  recognized: float = 0.9
  steps: int = 2000
  learning_rate: float = 0.25
  betas: tuple[float, float] = (0.5, 0.9)
  warmup_steps: int = 100
  shift: int = 30
  flip: bool = True
  variation_weight: float = 1e-4
  variation_power: float = 1.0
  norm_weight: float = 1e-5

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if self.count < 1 or not 0 <= self.recognized <= 1:
      yield f'count={self.count}, recognized={self.recognized}: expected at least 1, and a share.'
    if not 0 <= self.warmup_steps < self.steps:
      yield f'warmup_steps={self.warmup_steps}: expected at least 0 and less than steps={self.steps}.'
    if not self.learning_rate > 0 or not self.variation_power > 0:
      yield (
        f'learning_rate={self.learning_rate}, variation_power={self.variation_power}: expected positive '
        'numbers.'
      )
    if min(self.variation_weight, self.norm_weight) < 0:
      yield (
        f'variation_weight={self.variation_weight}, norm_weight={self.norm_weight}: expected at least 0.'
      )


def check_shift(own: Synthesis, images: Images) -> Iterator[str]:
  """Yields a problem if images are shifted by more than they have."""
  side = min(images.view[:2])
  if not 0 <= own.shift < side:
    yield f'synthesis.shift={own.shift}: expected 0 to {side - 1}, of images of {images.view}.'


def made(
  own: Synthesis,
  images: Images,
  model: nn.Module,
  variables: Variables,
  key: Array,
  labels: Array | None = None,
) -> tuple[Array, Array, Array]:
  """Returns images as the network reads them, the classes that they were made for, and its logits.

  Without `labels` they are of `own.count` drawn classes.
  """
  options = dataclasses.asdict(own)
  del options['recognized']
  label_key, key = jax.random.split(key)
  count = options.pop('count')
  if labels is None:
    labels = compression.distinct_labels(label_key, count, images.num_classes)
  for name, value in (('low', 0.0), ('high', 1.0)):
    pixel = jnp.full((1, 1, images.view[-1]), value)
    options[name] = data.normalize(pixel, images.mean, images.std)
  predict = functools.partial(model.apply, variables)
  found, _ = compression.synthesize(key, predict, labels, images.view, **options)
  return found, labels, predict(found)


def make(
  own: Synthesis,
  images: Images,
  model: nn.Module,
  variables: Variables,
  key: Array,
  total: int | None = None,
) -> tuple[Array, Array, Array]:
  """Returns what `made` does, compiled.

  Args:
    own: how they are made.
    images: the network's.
    model: the network.
    variables: of it.
    key: a typed key.
    total: number of images, each class as often; `own.count` of them are made at once (fewer, if so they
      are parts of one size). None: `own.count`.

  Raises:
    ValueError: if the network does not recognize enough of the images.
  """
  function = jax.jit(functools.partial(made, own, images, model))
  total = own.count if total is None else total
  parts = -(-total // own.count)
  label_key, _ = jax.random.split(key)
  labels = compression.distinct_labels(label_key, total, images.num_classes)
  # What fills up the last part is cut off again.
  chunks = np.resize(labels, (parts, -(-total // parts)))
  keys = [key, *(jax.random.fold_in(key, part) for part in range(1, parts))]
  made_parts = [
    jax.device_get(function(variables, *each)) for each in zip(keys, chunks, strict=True)
  ]
  found, labels, logits = (jnp.asarray(np.concatenate(own)[:total]) for own in zip(*made_parts))
  share = compression.require_recognized(logits, labels, own.recognized)
  say(f'synthetic images: {share:.0%} of {len(labels)} recognized')
  return found, labels, logits


def call(own: Synthesis, images: Images, model: nn.Module) -> Call:
  """Returns the making of images as a program."""

  def shapes(mesh: jax.sharding.Mesh) -> tuple[Any, tuple[Any, ...]]:
    del mesh
    variables = models.abstract_variables(model, images.view)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return functools.partial(made, own, images, model), (variables, key)

  return Call(shapes)
