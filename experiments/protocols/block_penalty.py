"""A penalty on what all blocks of a network hand on, in the loss: its options, and the loss with it."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from experiments.harness import networks
from experiments.harness.networks import Network
from experiments.harness.settings import found_by
from experiments.harness.supervised import Loss, Seen, cross_entropy
from experiments.protocols.outlier_statistics import Watched
from jaxlab import models
from jaxlab.training import schedules

Array = jax.Array
Size = Callable[..., Array]  # `(outputs of all blocks, *, tau, power) -> a scalar`


@dataclasses.dataclass(frozen=True)
class Penalty:
  """A penalty on the outputs of all blocks, which grows with a power of their size.

  Attributes:
    weight: of the penalty in the loss.
    tau: magnitude that costs 1.
    power: of the size over tau.
    decay: of the weight over the training.
  """

  weight: float = 0.01
  tau: float = 3.0
  power: float = 4
  decay: Literal['constant', 'cosine'] = 'constant'

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values, but for those that the penalty itself refuses."""
    if not 0 <= self.weight < math.inf:
      yield f'weight={self.weight}: expected a number of at least 0.'
    for name in ('tau', 'power'):
      if not math.isfinite(getattr(self, name)):
        yield f'{name}={getattr(self, name)}: expected a finite number.'

  @property
  def form(self) -> dict[str, float]:
    """Options of the penalty."""
    return {'tau': self.tau, 'power': self.power}


def check(penalty: Penalty, size: Size) -> Iterator[str]:
  """Yields which options the penalty itself refuses."""
  yield from found_by('penalty', size, [jnp.ones(1)], **penalty.form)


def block_penalty(network: Network, penalty: Penalty, size: Size) -> Watched:
  """Returns `seen -> size(outputs of all blocks)`, without its weight."""

  def penalty_of(seen: Seen) -> Array:
    parts = models.anatomy(networks.create(network.model))
    return size(models.block_outputs(seen.captured, parts), **penalty.form)

  return penalty_of


def penalized(network: Network, penalty: Penalty, size: Size) -> Loss:
  """Returns cross-entropy plus `weight size(outputs of all blocks)`."""
  added, weight = block_penalty(network, penalty, size), schedules.constant(penalty.weight)
  if penalty.decay == 'cosine':
    steps = network.data.train_size // network.recipe.batch_size
    weight = schedules.cosine(penalty.weight, steps * network.recipe.epochs)

  def loss(outputs: Array, targets: Array, seen: Seen) -> Array:
    return cross_entropy(outputs, targets, seen) + weight(seen.step) * added(seen)

  return loss
