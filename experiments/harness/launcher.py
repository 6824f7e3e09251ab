"""The command line of every experiment: settings, work directory, devices, seeds, results.

  python -m experiments.<paper> [--config=SETTING] [--workdir=DIR] [--seeds=0,1,2] [--config.key=value ...]

A setting is named by its file's stem, or by a path. Without `--config` the paper's `embedded` is run: it
needs no download and takes minutes on a CPU.
"""

import argparse
import dataclasses
import difflib
import importlib
import importlib.metadata
import importlib.util
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.harness import results
from experiments.harness import settings as sections

CONFIGS = pathlib.Path(importlib.util.find_spec('mlcollections_configs').origin).parent


def settings(paper: str) -> list[pathlib.Path]:
  """Returns the settings' files of a paper, `embedded.py` first."""
  files = [path for path in (CONFIGS / paper).glob('*.py') if path.stem != '__init__']
  return sorted(files, key=lambda path: (path.stem != 'embedded', path.stem))


def find(paper: str, setting: str | pathlib.Path) -> pathlib.Path:
  """Returns the file of a paper's setting, given by its name or its path.

  Raises:
    ValueError: if there is none (with the closest that are), or it is another paper's.
  """
  path = pathlib.Path(setting)
  known = {file.stem: file for file in settings(paper)}
  if path.suffix != '.py' and str(setting) in known:
    return known[str(setting)]
  if not path.is_file():
    close = difflib.get_close_matches(path.stem, known, 3, 0.4) or known
    raise ValueError(f'--config={setting}: {paper} has no such setting, only {", ".join(close)}.')
  owner = path.resolve().parent
  if owner.parent == CONFIGS and owner.name != paper:
    raise ValueError(f'--config={setting} is a setting of {owner.name}, not of {paper}.')
  return path


def load(paper: str, setting: str | pathlib.Path, assignments: Sequence[str] = ()) -> Any:
  """Returns a paper's settings, filled in: what the file names, `key=value` pairs, defaults for the rest.

  Raises:
    ValueError: for a setting that does not exist, and for keys and values that do not, all at once.
  """
  path = find(paper, setting)
  spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise ValueError(f'--config={setting}: {path} defines no get_config().')
  cls = importlib.import_module(f'experiments.{paper}').Settings
  values = sections.override(cls, module.get_config().to_dict(), assignments)
  config = sections.fill(cls, {**values, 'paper': paper, 'setting': path.stem})
  if getattr(config, 'features', ''):  # a user's own: neither the setting's data nor its numbers
    config = dataclasses.replace(config, setting='features')
  return config


def check(config: Any) -> None:
  """Raises SettingsError with all that is wrong with a paper's settings; opens no data."""
  found = list(sections.problems(config))
  try:
    found += importlib.import_module(f'experiments.{config.paper}').check(config)
  except (ValueError, ArithmeticError, LookupError):
    if not found:  # else it fell over what was found
      raise
  sections.require(found)


def launch(config: Any, workdir: str | pathlib.Path | None = None) -> dict[str, Any]:
  """Runs an experiment, writes `<workdir>/results.json`, and returns the results.

  Raises:
    ValueError: for settings that cannot be, data that are not what they say, a work directory of another
      experiment. Nothing is trained before that is known.
  """
  import jax

  from jaxlab.parallel import hosts

  hosts.initialize()
  check(config)
  if workdir is None:
    workdir = pathlib.Path('runs') / config.paper / config.setting / f'seed{config.seed}'
  workdir = claim(workdir, config)
  start = time.perf_counter()
  outcome = importlib.import_module(f'experiments.{config.paper}').run(config, workdir)
  device = jax.devices()[0]
  outcome |= {
    'seconds': round(time.perf_counter() - start, 1),
    'config': sections.plain(config),
    'versions': {
      name: importlib.metadata.version(name) for name in ('jax', 'flax', 'optax', 'jaxlab')
    },
    'device': {'kind': device.device_kind, 'count': jax.device_count()},
  }
  if jax.process_index() == 0:
    results.save_json(workdir / 'results.json', outcome)
    results.print_verdicts(outcome)
    print(f'Results: {workdir / "results.json"}')
    for picture in sorted(workdir.glob('*.png')):
      print(f'Picture: {picture}')
  return outcome


def run(
  paper: str,
  setting: str = 'embedded',
  *,
  workdir: str | pathlib.Path | None = None,
  overrides: Sequence[str] | Mapping[str, Any] = (),
) -> dict[str, Any]:
  """Does what the command line does; `overrides` are `key=value` pairs, or values by key."""
  if isinstance(overrides, Mapping):
    overrides = [f'{key}={value}' for key, value in overrides.items()]
  return launch(load(paper, setting, overrides), workdir)


def claim(workdir: str | pathlib.Path, config: Any) -> Any:
  """Creates the work directory and writes into it whose it is.

  Raises:
    ValueError: if it cannot be written, or is another paper's, setting's or seed's.
  """
  import json

  from etils import epath

  workdir = epath.Path(workdir)
  own = {name: getattr(config, name) for name in ('paper', 'setting', 'seed')}
  owner = workdir / 'experiment.json'
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    held = json.loads(owner.read_text()) if owner.exists() else None
    if held is None:
      owner.write_text(json.dumps(own))
  except OSError as error:
    raise ValueError(f'--workdir={workdir} cannot be written: {error}.') from error
  if held not in (None, own):
    there = ' '.join(f'{name}={value}' for name, value in held.items())
    raise ValueError(f'--workdir={workdir} is that of another experiment: {there}.')
  return workdir


def main(paper: str, arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Runs an experiment from the command line; returns the results of every seed.

  Errors of the user (settings, data that are not there) end the program with exit code 2.
  """
  parser = argparse.ArgumentParser(
    prog=f'python -m experiments.{paper}',
    description=f'Settings: {", ".join(path.stem for path in settings(paper))}.',
    epilog='--config.key=value overrides an entry of the settings.',
    allow_abbrev=False,
  )
  parser.add_argument('--config', default='embedded', help='name or file of a setting')
  parser.add_argument(
    '--workdir', help='where results go (default: runs/<paper>/<setting>/seed<seed>)'
  )
  parser.add_argument('--seeds', help='run all of them, such as 0,1,2: a folder a seed')
  parser.add_argument('--print_config', action='store_true', help='show the settings and stop')
  known, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
  assignments = [item.removeprefix('--config.') for item in rest if item.startswith('--config.')]
  if unknown := [item for item in rest if not item.startswith('--config.')]:
    parser.error(f'unknown arguments: {" ".join(unknown)}')
  try:
    config = load(paper, known.config, assignments)
    if known.print_config:
      print(' \\\n  '.join([f'python -m experiments.{paper}', *sections.assignments(config)]))
      return []
    if known.seeds is None:
      return [launch(config, known.workdir)]
    seeds = sections.parse(known.seeds, tuple[int, ...])
    return series(config, known.workdir, seeds)
  except (ValueError, FileNotFoundError) as error:
    print(f'error: {error}', file=sys.stderr)
    raise SystemExit(2) from error


def series(
  config: Any, workdir: str | pathlib.Path | None, seeds: Sequence[int]
) -> list[dict[str, Any]]:
  """Runs an experiment with several seeds, `<workdir>/seed<seed>` each, and prints what they say together.

  A seed whose results are there is not run again.
  """
  import json

  from experiments.tools import report

  folder = pathlib.Path(workdir or pathlib.Path('runs') / config.paper / config.setting)
  found = []
  for seed in seeds:
    own, file = dataclasses.replace(config, seed=seed), folder / f'seed{seed}' / 'results.json'
    held = json.loads(file.read_text()) if file.exists() else None
    if held is not None and held['config'] == sections.plain(own):
      results_of_seed = held
      print(f'seed {seed}: finished before, {file}')
    else:
      results_of_seed = launch(own, folder / f'seed{seed}')
    found.append(results_of_seed)
  print(report.markdown({(config.paper, config.setting): found}))
  return found
