"""`python -m experiments` lists the papers, their settings, what each needs, and what was run here."""

import ast
import importlib.util
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from experiments.launcher import CONFIGS, load_config, settings


def papers() -> list[str]:
  """Returns the papers that have both configurations and a module."""
  folders = sorted(path.parent.name for path in CONFIGS.glob('*/embedded.py'))
  return [name for name in folders if importlib.util.find_spec(f'experiments.{name}')]


def summary(path: pathlib.Path) -> str:
  """Returns the first line of a module's docstring, without importing it."""
  return (ast.get_docstring(ast.parse(path.read_text())) or '').partition('\n')[0]


EMBEDDED = {'digits', 'pasted_digits', 'digit_scenes', 'text'}


def place(data: Mapping[str, Any]) -> str:
  """Returns the name of a data set and where it comes from."""
  name = data.get('name', 'nothing')
  options = data.get('train_options') or data.get('base_options') or {}
  return f'{name} ({"embedded" if name in EMBEDDED else options.get("root", "on disk")})'


def need(paper: str, setting: pathlib.Path) -> str:
  """Returns what a setting needs: its data, its batches, public weights."""
  config = load_config(setting)
  sections = [config]
  if 'network' in config:
    sections = [config.network[name] for name in config.networks]
  stages = [config.stages[name] for name in config.runs] if 'stages' in config else []
  needs = dict.fromkeys(place(section.get('data', {})) for section in sections)
  weights = [part.pretrained for part in (*sections, *stages) if part.get('pretrained')]
  what = [f'weights {", ".join(dict.fromkeys(weights))}'] if weights else []
  if stages or not weights:
    batches = dict.fromkeys(str(part.batch_size) for part in stages or sections)
    what.append(f'batch {", ".join(batches)}')
  if any('checkpoint' in section for section in sections) and setting.stem != 'embedded':
    what.append('or a checkpoint')
  return ', '.join([*needs, *what])


def measured(paper: str, setting: str, runs: pathlib.Path = pathlib.Path('runs')) -> Iterator[str]:
  """Yields the seeds of which `runs` holds results."""
  for file in sorted((runs / paper / setting).rglob('results.json')):
    yield str(json.loads(file.read_text())['seed'])


def main() -> None:
  """Prints the list."""
  from rich.console import Console
  from rich.table import Table

  for paper in papers():
    table = Table(title=f'{paper}: {summary(pathlib.Path(__file__).parent / f"{paper}.py")}')
    for column in ('setting', 'what', 'needs', 'results in runs/'):
      table.add_column(column)
    for path in settings(paper):
      seeds = ', '.join(measured(paper, path.stem))
      table.add_row(path.stem, summary(path), need(paper, path), f'seeds {seeds}' if seeds else '')
    Console().print(table)
    print(
      f'  python -m experiments.{paper} --config=mlcollections_configs/{paper}/SETTING.py '
      f'--workdir=DIR\n'
    )


if __name__ == '__main__':
  main()
