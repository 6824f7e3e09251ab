"""Lists the papers, their settings, and what each needs."""

import argparse
import ast
import pathlib
import shutil
import textwrap
from collections.abc import Sequence

from experiments.harness import launcher, sources


def summary(path: pathlib.Path) -> str:
  """Returns the first line of a module's docstring, without importing it."""
  return (ast.get_docstring(ast.parse(path.read_text())) or '').partition('\n')[0]


def paper_summary(paper: str) -> str:
  """Returns the first line of a paper's docstring."""
  return summary(pathlib.Path(__file__).parents[1] / f'{paper}.py')


def papers(arguments: Sequence[str] = ()) -> None:
  """Prints one line a paper."""
  del arguments
  names = launcher.papers()
  width = max(map(len, names))
  with launcher.errors_without_traceback():
    for name in names:
      print(f'{name:{width}}  {paper_summary(name)}')
    print(
      '\npython -m experiments.PAPER runs one; python -m experiments list PAPER shows its settings;\n'
      'python -m experiments help shows the other commands.'
    )


def main(arguments: Sequence[str]) -> None:
  """Prints the settings of some papers with what each needs."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments list',
    description='Lists settings, and the data and public weights that each needs.',
  )
  parser.add_argument('papers', nargs='*', metavar='PAPER', help='default: all')
  chosen = parser.parse_args(arguments).papers
  with launcher.errors_without_traceback():
    for paper in chosen:
      launcher.settings(paper)  # all names are looked at before the first is shown
    for paper in chosen or launcher.papers():
      show(paper)


def show(paper: str) -> None:
  """Prints a paper's settings and what each needs."""
  print(f'{paper}: {paper_summary(paper)}')
  for path in launcher.settings(paper):
    print(_wrapped(f'{path.stem}: {summary(path)}', 2))
    for text in sources.needed(launcher.load(paper, path)):
      print(_wrapped(f'needs {text}', 4))
  print()


def _wrapped(text: str, indent: int) -> str:
  """Returns text in lines of the terminal's width; paths and addresses stay whole."""
  return textwrap.fill(
    text,
    max(shutil.get_terminal_size().columns, 60),
    initial_indent=' ' * indent,
    subsequent_indent=' ' * (indent + 2),
    break_long_words=False,
    break_on_hyphens=False,
  )
