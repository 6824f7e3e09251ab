"""How the rows of an adaptation are trained: learning rates and options, of all tasks and of single ones."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.harness.sections import Recipe


@dataclasses.dataclass(frozen=True)
class TaskTuning:
  """How a row is trained on one task, where that differs from the row's `Tuning`.

  Attributes:
    rates: learning rates; None: the row's.
    decays: weight decays; None: the row's.
    model: fields of the network in training, added to those of the row.
    options: of the method, likewise.
  """

  rates: tuple[float, ...] | None = None
  decays: tuple[float, ...] | None = None
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def check(self) -> Iterator[str]:
    """Yields what is wrong with the values."""
    for name in ('rates', 'decays'):
      own = getattr(self, name) or ()
      if len(set(own)) < len(own) or any(value < 0 for value in own):
        yield f'{name}={own}: expected different numbers of at least 0.'


@dataclasses.dataclass(frozen=True)
class Tuning(TaskTuning):
  """How a row is trained, where that is not said by the recipe alone.

  Attributes:
    rates: learning rates; of several, trained side by side, the best on held-out images is taken; none: the
      recipe's.
    decays: weight decays, likewise.
    model: fields of the network in training, such as `drop_path`.
    options: of the method.
    tasks: what differs on single tasks, by task.
  """

  rates: tuple[float, ...] = ()
  decays: tuple[float, ...] = ()
  tasks: dict[str, TaskTuning] = dataclasses.field(default_factory=dict)

  def on(self, task: str) -> 'Tuning':
    """Returns how the row is trained on a task."""
    own = self.tasks.get(task, TaskTuning())
    return Tuning(
      rates=self.rates if own.rates is None else own.rates,
      decays=self.decays if own.decays is None else own.decays,
      model={**self.model, **own.model},
      options={**self.options, **own.options},
    )

  def pairs(self, recipe: Recipe) -> list[tuple[float, float]]:
    """Returns all pairs of a learning rate and a weight decay."""
    rates = self.rates or (recipe.schedule.base,)
    return list(itertools.product(rates, self.decays or (recipe.optimizer.weight_decay,)))

  def overruled(self, tasks: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yields what is given for the row, though each of the tasks has its own: key and value."""
    own = [self.tasks.get(task, TaskTuning()) for task in tasks]
    for name in ('rates', 'decays'):
      if getattr(self, name) and all(getattr(each, name) is not None for each in own):
        yield name, getattr(self, name)
    for name in ('model', 'options'):
      for key, value in getattr(self, name).items():
        if all(key in getattr(each, name) for each in own):
          yield f'{name}.{key}', value
