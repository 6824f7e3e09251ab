"""Adaptors by which the neighbors of a dropped block make up for it: one program for the gaps of a stage."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness import data as harness_data
from experiments.harness.runs import Run, Variables
from experiments.harness.sections import check_batch
from experiments.harness.settings import section
from experiments.harness.supervised import streams
from experiments.protocols import few_shot_compression
from experiments.protocols.few_shot_compression import Tuning
from jaxlab import compression, data, losses, models
from jaxlab.training import Initial, LossState, Out, make_program, map_batches

Array = jax.Array
PyTree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(few_shot_compression.Settings):
  """Settings of the compression of a network with few images, the first of `totals` for adaptors.

  Attributes:
    recovery: of adaptors.
    last_conv: see `compression.adaptor_positions`.
  """

  recovery: Tuning = section(Tuning)
  last_conv: Literal['trunk', 'code'] = 'trunk'

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    yield from super().check()
    if self.totals and self.totals[0] > 1:
      size = self.recovery.batch(self.totals[0], self.mesh)
      yield from check_batch(
        self.mesh, size, f'recovery: a batch of {size} of {self.totals[0]} images'
      )


class Recovery:
  """Adaptors around each of some blocks of a stage, one gap at a time.

  All gaps share one program: the block that is out is a mask, and where a gap has no adaptor an identity
  that is not trained stands. Adaptors are part of the kernels next to them.

  Attributes:
    model: the whole network.
    blocks: that are taken out in turn.
    positions: of each block's adaptors.
  """

  def __init__(self, config: Settings, blocks: Sequence[str]):
    self.model, self.blocks = few_shot_compression.whole_network(config), tuple(blocks)
    self.positions = [
      compression.adaptor_positions(self.model, [block], last_conv=config.last_conv)
      for block in blocks
    ]

  def init(self, params: Variables) -> PyTree:
    """Returns identities `[blocks, channels, channels]` at the positions of any block."""
    everywhere = compression.AdaptorPositions(
      *(tuple(dict.fromkeys(path for own in side for path in own)) for side in zip(*self.positions))
    )
    one = compression.init_adaptors(params, everywhere)
    return jax.tree.map(lambda eye: jnp.tile(eye, (len(self.blocks), 1, 1)), one)

  def trained(self, adaptors: PyTree) -> PyTree:
    """Returns which adaptors each block has, bool `[blocks, 1, 1]`."""

    def own(path: Any, leaf: Array) -> np.ndarray:
      *where, side = [part.key for part in path]
      has = ['/'.join(where) in getattr(positions, side) for positions in self.positions]
      return np.array(has)[:, None, None]

    return jax.tree_util.tree_map_with_path(own, adaptors)

  def errors(self, adaptors: PyTree, whole: Variables, x: Array) -> Array:
    """Returns the errors of the map without each block, but with its adaptors, `[blocks, batch]`."""
    path = models.feature_map_path(self.model)
    target = models.capture(self.model, whole, [path], x)[1][path]

    def without(own: PyTree, has: PyTree, stays: Array) -> Array:
      own = jax.tree.map(lambda a, on: jnp.where(on, a, jnp.eye(len(a), dtype=a.dtype)), own, has)
      folded = {**whole, 'params': compression.fold_adaptors(whole['params'], own)}
      masks = dict(zip(self.blocks, stays, strict=True))
      variables, hooks = compression.masked(self.model, folded, masks)
      found = models.capture(self.model, variables, [path], x, hooks=hooks)[1][path]
      return losses.mimic_loss(found, target)

    has = jax.tree.map(jnp.asarray, self.trained(adaptors))
    stays = 1 - jnp.eye(len(self.blocks))
    # Of one gap at a time the activations are there for the backward pass, computed again.
    one = jax.checkpoint(lambda each: without(*each))
    return jax.lax.map(one, (adaptors, has, stays))


def recovery(config: Settings, blocks: Sequence[str]) -> Run:
  """Returns the training of the adaptors around each of some blocks of a stage."""
  total, own = config.totals[0], Recovery(config, blocks)
  recipe = config.recovery.recipe(total, config.mesh)
  task = few_shot_compression.task(config, total)
  whole = models.abstract_variables(own.model, config.network.data.view)

  def init(key: Array) -> Initial:
    shapes = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), whole['params'])
    return Initial(own.init(shapes), key=streams(key)[1])

  def loss(adaptors: PyTree, state: LossState, batch: PyTree, keys: PyTree) -> tuple[Array, Out]:
    each = jax.vmap(lambda i: jax.random.fold_in(keys['augment'], i))(batch['index'])
    x = task.augmented(each, batch)
    errors = jnp.mean(own.errors(adaptors, state.frozen['whole'], x), 1)
    # Gaps do not touch each other: the sum's gradient is that of each alone.
    return jnp.sum(errors), Out(metrics=dict(zip(blocks, errors, strict=True)))

  optimizer = recipe.optimizer.make(recipe.schedule.make(recipe.epochs, 1))
  program = make_program(
    init, loss, optimizer, task.batch(recipe.batch_size), frozen={'whole': dict(whole)},
    **recipe.program_options,
  )  # fmt: skip
  decides = {
    **few_shot_compression.ancestry(config), 'blocks': list(blocks), 'last_conv': config.last_conv
  }  # fmt: skip
  images = few_shot_compression.images(config, total)
  title = f'adaptors around {len(blocks)} gaps'
  return Run(config, images, recipe, program, recipe.epochs, decides, title)


def remaining_errors(
  config: Settings,
  blocks: Sequence[str],
  adaptors: Sequence[PyTree],
  whole: Variables,
  source: data.Source,
) -> list[dict[str, float]]:
  """Returns by block the errors of the gaps over all images as they are evaluated, of each of `adaptors`.

  With trained adaptors they are the blocks' recoverability.
  """
  own, total = Recovery(config, blocks), config.totals[0]
  task = few_shot_compression.task(config, total)
  # Weights as arguments: as constants they would be part of a program, one for each of the adaptors.
  errors = jax.jit(lambda *given: own.errors(*given[:2], task.inputs(given[2])).T)
  options = harness_data.reading(few_shot_compression.images(config, total), 'test')
  options |= {'batch_size': config.recovery.batch(total, config.mesh), 'mesh': config.mesh.make()}
  found = []
  for each in adaptors:
    values = map_batches(functools.partial(errors, each, whole), source, **options)
    means = np.asarray(values, np.float64).mean(0).tolist()
    found.append(dict(zip(blocks, means, strict=True)))
  return found
