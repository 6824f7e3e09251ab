"""Slimmable pretraining: in every step the whole network learns first, then narrower ones in turn.

All are leading channels of one set of weights (`jaxlab.models.slimmable`). Batch statistics belong to one
width: a network is judged with those of passes over the training images.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from experiments.harness import data as harness_data
from experiments.harness import networks
from experiments.harness.data import Augment
from experiments.harness.runs import say
from experiments.harness.tasks import ImageTask
from experiments.protocols import feature_evaluation, pretraining, siamese
from jaxlab import data, losses, models, training

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True)
class Guidance:
  """What networks of each width learn from.

  Attributes:
    teacher: 'momentum': all from a momentum encoder at full width; 'online': narrow ones from the whole
      network of this step, which has its own projections as targets; 'self': each from its own projections.
    base: of the whole network, 'cosine' (negative) or 'infonce' over both views.
    distill: of the narrow ones, likewise.
    predictor: whether the whole network has one.
    own_head: whether the narrow ones have one of their own.
    growing: whether the range of widths grows over the training; else it is whole from the first epoch on.
    title: of the row.
  """

  teacher: Literal['momentum', 'online', 'self'] = 'momentum'
  base: Literal['cosine', 'infonce'] = 'cosine'
  distill: Literal['cosine', 'infonce'] = 'cosine'
  predictor: bool = True
  own_head: bool = True
  growing: bool = True
  title: str = ''


@dataclasses.dataclass(frozen=True)
class Widths:
  """Which shares of the channels are trained.

  Attributes:
    low: the smallest.
    high: the largest.
    step: between widths that are drawn: each is a branch of the compiled step.
    judged: that are evaluated.
    passes: over the training images, of which a width's batch statistics are the mean.
    augment: of the images in these passes.
  """

  low: float = 0.25
  high: float = 1.0
  step: float = 0.125
  judged: tuple[float, ...] = (0.25, 0.5, 1.0)
  passes: int = 3
  augment: Augment = dataclasses.field(
    default_factory=lambda: Augment(kind='resized_crop', scale=(0.8, 1.0))
  )

  @property
  def drawn(self) -> tuple[float, ...]:
    """All widths that a step may train, from small to large."""
    count = round((self.high - self.low) / self.step)
    return tuple(self.low + index * self.step for index in range(count + 1))

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    if not 0 < self.low < self.high <= 1 or self.step <= 0:
      yield f'low={self.low}, high={self.high}, step={self.step}: expected 0 < low < high <= 1 in steps.'
    elif not np.isclose((self.high - self.low) / 3 / self.step % 1, (0, 1), atol=1e-6).any():
      yield f'step={self.step}: a third of high - low = {self.high - self.low:g} is no multiple of it.'
    if outside := [w for w in self.judged if not 0 < w <= self.high]:
      yield f'judged={outside}: expected widths in (0, {self.high}].'
    if not self.judged or self.passes < 1:
      yield f'judged={self.judged}, passes={self.passes}: expected at least one of each.'


class Networks(NamedTuple):
  """The trained modules: a slimmable encoder, and heads for the whole network and for narrow ones."""

  encoder: models.Encoder
  predictor: nn.Module | None
  distiller: nn.Module | None


def compare(kind: str, predictions: list[Array], targets: list[Array], temperature: float) -> Array:
  """Returns the mean over both pairs of a view's prediction and the other view's target.

  'cosine': the negative cosine; 'infonce': NT-Xent of the two, targets without gradient.
  """
  targets = jax.lax.stop_gradient(targets)
  if kind == 'cosine':
    return losses.simsiam_loss(*predictions, *targets)
  pairs = zip(predictions, reversed(targets), strict=True)
  return sum(losses.nt_xent(p, z, temperature) for p, z in pairs) / 2


def project(
  encoder: models.Encoder, params: PyTree, width: float, views: list[Array]
) -> list[Array]:
  """Returns the projections of the views at a width, each with batch statistics of its own."""
  small, own = models.at_width(encoder, params, width, views[0])
  own = training.cast_floating(own, views[0].dtype)
  return siamese.wide(models.apply_in_turn(small, {'params': own}, views)[0])


def predict(head: nn.Module | None, params: PyTree, z: list[Array]) -> list[Array]:
  """Returns predictions of projections; without a head these themselves."""
  return z if head is None else models.apply_in_turn(head, {'params': params}, z)[0]


class Step(NamedTuple):
  """What one iteration needs to know.

  Attributes:
    nets: the modules.
    own: what they learn from.
    widths: that narrow networks may have, the branches of the iteration; without, the whole network learns
      alone.
    optimizer: with a learning rate of 1.
    momentum: share of the teacher that is kept; may be traced.
    temperature: of InfoNCE.
    penalty: `(params, skipped patterns) -> scalar` added to each loss.
  """

  nets: Networks
  own: Guidance
  widths: tuple[float, ...]
  optimizer: optax.GradientTransformation
  momentum: Array | float
  temperature: float = 0.5
  penalty: Callable[[PyTree, Sequence[str]], Array] = lambda params, skip: jnp.float32(0)


class Iterated(NamedTuple):
  """What one iteration leaves.

  Attributes:
    params: trained.
    opt_state: the optimizer's.
    teacher: parameters of the momentum encoder.
    losses: of the whole network, and of the narrow ones in order.
    projections: of the whole network.
    targets: what the narrow ones learned from.
  """

  params: PyTree
  opt_state: PyTree
  teacher: PyTree
  losses: Array
  projections: list[Array]
  targets: list[Array]


def iterate(
  step: Step,
  params: PyTree,
  opt_state: PyTree,
  teacher: PyTree,
  views: list[Array],
  rate: Array | float,
  drawn: Array,
  narrow: Array | bool = True,
) -> Iterated:
  """Updates the whole network, then narrow ones in turn, one optimizer step each.

  Args:
    step: modules and rules.
    params: `{'encoder', 'predictor', 'distiller'}`, as far as there are such.
    opt_state: the optimizer's.
    teacher: parameters of the momentum encoder; unused without.
    views: two.
    rate: learning rate.
    drawn: indices into `step.widths`, one for each narrow network.
    narrow: whether there are narrow ones in this iteration.
  """
  nets, own = step.nets, step.own
  if own.teacher == 'momentum':
    teacher = optax.incremental_update(params['encoder'], teacher, 1 - step.momentum)
    targets = jax.lax.stop_gradient(project(nets.encoder, teacher, 1, views))

  def move(params: PyTree, opt_state: PyTree, gradient: PyTree) -> tuple[PyTree, PyTree]:
    updates, opt_state = step.optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates)), opt_state

  def whole(params: PyTree) -> tuple[Array, tuple[Array, list[Array]]]:
    z = project(nets.encoder, params['encoder'], 1, views)
    p = predict(nets.predictor, params.get('predictor'), z)
    value = compare(own.base, p, targets if own.teacher == 'momentum' else z, step.temperature)
    return value + step.penalty(params, ('(predictor|distiller)/.*',)), (value, z)

  def at(width: float) -> Callable[[PyTree], tuple[Array, Array]]:
    def loss(params: PyTree) -> tuple[Array, Array]:
      z = project(nets.encoder, params['encoder'], width, views)
      name = 'distiller' if own.own_head else 'predictor'
      p = predict(getattr(nets, name), params.get(name), z)
      kind = own.base if own.teacher == 'self' else own.distill
      value = compare(kind, p, z if own.teacher == 'self' else targets, step.temperature)
      return value + step.penalty(params, ()), value

    return jax.grad(loss, has_aux=True)

  gradient, (value, z) = jax.grad(whole, has_aux=True)(params)
  if own.teacher != 'momentum':
    targets = jax.lax.stop_gradient(z)
  params, opt_state = move(params, opt_state, gradient)
  branches = [at(width) for width in step.widths]

  def below(carry: tuple[PyTree, PyTree], index: Array) -> tuple[tuple[PyTree, PyTree], Array]:
    params, opt_state = carry
    gradient, value = jax.lax.switch(index, branches, params)
    return move(params, opt_state, gradient), value

  def all_below(params: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree, Array]:
    (params, opt_state), values = jax.lax.scan(below, (params, opt_state), drawn)
    return params, opt_state, values

  def none_below(params: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree, Array]:
    return params, opt_state, jnp.zeros(len(drawn), value.dtype)

  values = []
  if branches:
    params, opt_state, values = jax.lax.cond(narrow, all_below, none_below, params, opt_state)
  return Iterated(params, opt_state, teacher, jnp.stack([value, *values]), z, targets)


def draw_widths(key: Array, epoch: Array, epochs: int, own: Widths, growing: bool) -> Array:
  """Returns the indices of two narrow widths, the wider one first.

  The second is the smallest of this epoch, the first uniform between that and the largest, rounded to the
  widths that there are; in the first quarter of a growing range both are the largest.
  """
  floor = own.low
  if growing:
    floor = models.width_floor(epoch, epochs, own.low, own.high)
  drawn = jax.random.uniform(key, (), minval=floor, maxval=own.high)
  return jnp.round((jnp.stack([drawn, jnp.asarray(floor)]) - own.low) / own.step).astype(jnp.int32)


def narrow_passes(epochs: int, own: Widths, growing: bool) -> np.ndarray:
  """Returns how many networks of each of `own.drawn` a step trains behind the whole one, on average.

  The mean over the training's epochs of what `draw_widths` is expected to draw; a growing range has none in
  its first quarter.

  Returns:
    `[len(own.drawn)]`; the sum is 2, or 2 less the first quarter's share of the epochs.
  """
  centers, half = np.asarray(own.drawn), own.step / 2
  found = np.zeros(len(centers))
  for epoch in range(epochs // 4 if growing else 0, epochs):
    floor = float(models.width_floor(epoch, epochs, own.low, own.high)) if growing else own.low
    reach = np.minimum(centers + half, own.high) - np.maximum(centers - half, floor)
    found += np.maximum(reach, 0) / (own.high - floor)
    found[round((floor - own.low) / own.step)] += 1
  return found / epochs


def evaluator(
  config: pretraining.Settings, own: Widths, sources: Mapping[str, data.Source]
) -> Callable[[str, PyTree], dict[str, float]]:
  """Returns `(title, params) -> metrics` at all widths that are judged.

  `foreign_knn_*` are the neighbors with the leading statistics of the largest width in place of the width's
  own.
  """
  backbone = networks.create(config.model, num_classes=None)
  blank = jnp.zeros((2, *config.data.view))
  small = {width: models.narrow(backbone, width) for width in own.judged}
  judges = {w: feature_evaluation.evaluator(config, net, sources) for w, net in small.items()}
  task = ImageTask.of(config.data, own.augment)
  prepare = jax.jit(lambda keys, batch: task.augmented(keys, batch))

  def batches() -> Iterator[Array]:
    loader = harness_data.loader(
      config.data, sources['train'], config.recipe.batch_size, mesh=config.mesh, seed=config.seed
    )
    count = own.passes * (config.data.train_size // config.recipe.batch_size)
    try:
      for step, batch in enumerate(itertools.islice(loader, count)):
        yield prepare(data.example_keys(jax.random.key(config.seed), step, batch['index']), batch)
    finally:
      loader.close()

  def calibrated(params: PyTree, width: float) -> dict[str, PyTree]:
    net, cut = models.at_width(backbone, params['encoder']['backbone'], width, blank)
    shapes = jax.eval_shape(net.init, jax.random.key(0), blank)['batch_stats']
    stats = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return training.recompute_batch_stats(net, {'params': cut, 'batch_stats': stats}, batches())

  def evaluate(title: str, params: PyTree) -> dict[str, float]:
    say(f'{title}: batch statistics and features at {len(own.judged)} widths')
    metrics, largest = {}, calibrated(params, own.high)['batch_stats']
    for width in own.judged:
      variables = calibrated(params, width)
      for kind, value in judges[width](variables).items():
        metrics[f'{kind.removesuffix("_fp")}_{width:g}'] = value
      foreign = models.slice_params(largest, variables['batch_stats'])
      found = judges[width]({**variables, 'batch_stats': foreign})
      metrics[f'foreign_knn_{width:g}'] = found['knn_fp']
    return metrics

  return evaluate
