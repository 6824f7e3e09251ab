"""What a paper's module does on its command line besides the experiment, such as to use what was trained."""

import argparse
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Command(NamedTuple):
  """A command of a paper, its module's `COMMAND`.

  Attributes:
    option: which asks for it, such as '--compress'.
    title: of its options in the help.
    add_options: adds them, `option` among them, to a group of a parser.
    run: does it, with the parsed options.
  """

  option: str
  title: str
  add_options: Callable[[Any], None]
  run: Callable[[argparse.Namespace], None]


def of(paper: str) -> Command | None:
  """Returns a paper's command, if it has one."""
  return getattr(importlib.import_module(f'experiments.{paper}'), 'COMMAND', None)


def asked_for(paper: str, options: argparse.Namespace, changes: Sequence[str]) -> Command | None:
  """Returns the paper's command if its option is there.

  Args:
    paper: the paper.
    options: of its command line, parsed.
    changes: of settings.

  Raises:
    ValueError: if options of the experiment are there besides it, or its own without it.
  """
  command = of(paper)
  if command is None:
    return None
  parser = argparse.ArgumentParser(add_help=False)
  command.add_options(parser.add_argument_group())
  own = {action.dest: action for action in parser._actions}
  given = [name for key, action in own.items() if getattr(options, key) != action.default
           for name in action.option_strings[:1]]  # fmt: skip
  if command.option in given:
    others = options.seeds, options.workdir, options.print_config, options.config != 'embedded'
    if changes or any(others):
      raise ValueError(
        f'{command.option} takes no settings, seeds or work directory: leave them out.'
      )
    return command
  if given:
    raise ValueError(f'{given[0]} belongs to {command.option}, which is not there.')
  return None
