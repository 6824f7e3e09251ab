"""What is wrong with the settings of a comparison of ways to adapt a frozen network."""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from experiments.harness import results
from experiments.harness.settings import found_by, problems
from experiments.protocols import adaptation
from experiments.protocols.adaptation import Row, Settings
from experiments.protocols.adaptation_costs import COSTS, accounted

PyTree = Any


def check(config: Settings, table: Mapping[str, Row]) -> Iterator[str]:
  """Yields what is wrong with rows, networks, and claims about them."""
  if unknown := sorted({*config.runs, *config.tuning} - {*table}):
    yield f'runs, tuning: {", ".join(map(repr, unknown))} are none of the rows {", ".join(table)}.'
    return
  for name, own in config.tuning.items():
    if wrong := sorted({*own.tasks} - {*config.target}):
      yield f'tuning.{name}.tasks: {wrong} are none of the targets {", ".join(config.target)}.'

  if can_be_built(config):
    yield from _check_methods(config, table)
  groups = [target.group for target in config.target.values()]
  names = [*config.target, *groups, 'mean', *COSTS]
  titles = [re.escape(row.title) for row in table.values()]
  yield from results.check_claims(config, titles, list(map(re.escape, names)))


def can_be_built(config: Settings) -> bool:
  """Returns whether nothing is wrong with what all rows build on, which their own errors would repeat."""
  wrong = [*config.network.check(), *problems(config.recipe)]
  return bool(config.tasks) and {*config.tasks} <= {*config.target} and not wrong


def _check_methods(config: Settings, table: Mapping[str, Row]) -> Iterator[str]:
  """Yields what is wrong with the rows' options, and with the fields of the network that they change.

  A row is traced once for all tasks on which its options are the same, whatever the fields: they must leave
  variables as they are.
  """

  def compare_shapes(fields: Mapping[str, Any]) -> None:
    if _shapes(config, **fields) != _shapes(config):
      raise ValueError(f'model={fields}: expected fields that leave the variables as they are.')

  def build(name: str, task: str) -> None:
    target, own = config.target[task], config.tuned(name, task)
    made = adaptation.adapted(config, table[name], own, target, target.size)
    jax.eval_shape(made.program.init, jax.random.key(0))

  seen, wrong = set(), set()
  for name, task in itertools.product(config.runs, config.tasks):
    own, place, found = config.tuned(name, task), f'tuning.{name} on {task}', []
    fields, options = repr(sorted(own.model.items())), (name, repr(sorted(own.options.items())))
    if own.model and fields not in seen:
      found += found_by(place, compare_shapes, own.model)
    if options not in seen:
      found += found_by(place, build, name, task)
    seen |= {fields, options}
    wrong |= {name} if found else set()
    yield from found
  if config.accounted and not [*config.check_accounted()]:
    for name in (own for own in config.runs if own not in wrong):
      yield from found_by('accounted', accounted, config, table[name], name)


def _shapes(config: Settings, **fields: Any) -> PyTree:
  """Returns the shapes of the frozen network's variables, with some fields in place of its own."""
  model = adaptation.backbone(config, **fields)
  return adaptation.shapes_of(model, config.network.data.view)
