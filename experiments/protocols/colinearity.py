"""A decay of the alignment of consecutive matrices: its options, and a recipe's optimizer with it."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal

import optax

from experiments.harness import networks
from experiments.harness.networks import Network
from jaxlab import models, training


@dataclasses.dataclass(frozen=True)
class Decay:
  """Options of the decay, and of `jaxlab.models.weight_pairs`.

  Attributes:
    lam: the coefficient; None: the default of `'product'`.
    kind: of the regularizer.
    power: of `'row_power'`.
    ratio: of `'excess'`.
    every: steps from one decay to the next.
    pairs: which matrices of a block.
    per_head: a pair a head; otherwise those of attention are of all heads at once.
    fold_norm: whether the norm before the first matrix multiplies it.
    guarded: whether steps that would be unstable are shortened; of `'product'`.
  """

  lam: float | None = None
  kind: Literal['product', 'row_power', 'excess', 'cosine'] = 'product'
  power: float = 4
  ratio: float = 2
  every: int = 1
  pairs: tuple[Literal['mlp', 'vo', 'qk'], ...] = ('mlp', 'vo')
  per_head: bool = True
  fold_norm: bool = False
  guarded: bool = True

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    for name in ('lam', 'power', 'ratio'):
      value = getattr(self, name)
      if value is not None and not math.isfinite(value):
        yield f'{name}={value}: expected a finite number.'


def pairs_of(network: Network, own: Decay) -> tuple[models.WeightPair, ...]:
  """Returns the pairs of matrices that are decayed."""
  model = networks.create(network.model)
  return models.weight_pairs(model, own.pairs, per_head=own.per_head, fold_norm=own.fold_norm)


def decayed(network: Network, own: Decay, schedule: optax.Schedule) -> optax.GradientTransformation:
  """Returns the optimizer of the network's recipe with the decay beside that of weights."""
  options = {name: getattr(own, name) for name in ('lam', 'kind', 'power', 'ratio', 'every')}
  guard = schedule if own.guarded and own.kind == 'product' else None
  decay = training.colinearity_decay(pairs_of(network, own), **options, learning_rate=guard)
  return network.recipe.optimizer.make(schedule, decoupled=decay)
