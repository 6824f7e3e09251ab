"""Lists the papers, their settings, and what each needs."""

import ast
import dataclasses
import importlib
import importlib.util
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.harness import launcher


def names() -> list[str]:
  """Returns the papers that have both settings and a module."""
  folders = sorted(path.parent.name for path in launcher.CONFIGS.glob('*/embedded.py'))
  return [name for name in folders if importlib.util.find_spec(f'experiments.{name}')]


def summary(path: pathlib.Path) -> str:
  """Returns the first line of a module's docstring, without importing it."""
  return (ast.get_docstring(ast.parse(path.read_text())) or '').partition('\n')[0]


def papers() -> None:
  """Prints one line a paper."""
  width = max(map(len, names()))
  for name in names():
    print(f'{name:{width}}  {summary(pathlib.Path(__file__).parents[1] / f"{name}.py")}')
  print(
    '\npython -m experiments.PAPER runs one; python -m experiments list PAPER shows its settings.'
  )


def settings(chosen: Sequence[str] = ()) -> None:
  """Prints the settings of some papers (default: all) with what each needs.

  Raises:
    SystemExit: with status 2, for a paper that does not exist.
  """
  if unknown := [name for name in chosen if name not in names()]:
    print(f'there is no paper {", ".join(unknown)}; papers: {", ".join(names())}')
    raise SystemExit(2)
  for paper in chosen or names():
    print(f'{paper}: {summary(pathlib.Path(__file__).parents[1] / f"{paper}.py")}')
    for path in launcher.settings(paper):
      print(f'  {path.stem}: {summary(path)}')
      for text in needs(paper, path):
        print(f'    {text}')
    print()


def needs(paper: str, path: pathlib.Path) -> Iterator[str]:
  """Yields what a setting needs: data, public weights."""
  if not hasattr(importlib.import_module(f'experiments.{paper}'), 'Settings'):
    return
  found = dict.fromkeys(_needs(launcher.load(paper, path)))
  yield from found


def _needs(value: Any) -> Iterator[str]:
  if hasattr(value, 'needs'):
    yield f'needs {value.needs}'
  if getattr(value, 'pretrained', None):
    yield f'needs weights {value.pretrained} (huggingface.co/timm)'
  if isinstance(value, Mapping):
    for child in value.values():
      yield from _needs(child)
  elif dataclasses.is_dataclass(value):
    for field in dataclasses.fields(value):
      yield from _needs(getattr(value, field.name))
