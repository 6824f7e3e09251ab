"""The command line of every experiment: configuration, work directory, devices, results.

  python -m experiments.<paper> [--config=FILE] [--workdir=DIR] [--config.key=value ...]

Without `--config` the paper's `embedded.py` is run: it needs no download and takes minutes on a CPU.
"""

import argparse
import ast
import difflib
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections

from experiments.results import save_json

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / 'mlcollections_configs'


def settings(paper: str) -> list[pathlib.Path]:
  """Returns the config files of a paper, `embedded.py` first."""
  files = [path for path in (CONFIGS / paper).glob('*.py') if path.stem != '__init__']
  return sorted(files, key=lambda path: (path.stem != 'embedded', path.stem))


def load_config(path: str | pathlib.Path) -> ml_collections.ConfigDict:
  """Returns what `get_config()` of a config file gives, locked, with `paper` and `setting` filled in.

  Raises:
    ValueError: if there is no such file, or no `get_config` in it; a mistyped setting is answered by the
      settings that exist.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    known = [str(file.relative_to(CONFIGS.parent)) for file in sorted(CONFIGS.glob('*/[!_]*.py'))]
    close = difflib.get_close_matches(str(path), known, 3, 0.4) or known
    raise ValueError(f'--config={path}: there is no such file. Settings: {", ".join(close)}.')
  spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise ValueError(f'--config={path}: the file defines no get_config().')
  config = module.get_config()
  with config.unlocked():
    config.paper = path.resolve().parent.name
    config.setting = path.stem
  return config.lock()


def override(config: ml_collections.ConfigDict, assignments: Sequence[str]) -> None:
  """Sets `key.sub=value` pairs in place; the value is read by the type of what is there.

  Raises:
    ValueError: for a key that does not exist (with the closest that do) or a value of another type.
  """
  leaves = _leaves(config)
  for assignment in assignments:
    key, separator, text = assignment.partition('=')
    if not separator:
      raise ValueError(f'--config.{assignment}: expected --config.key=value.')
    if key not in leaves:
      close = difflib.get_close_matches(key, leaves, 3, 0.4)
      hint = f'Did you mean {", ".join(close)}?' if close else f'Keys: {", ".join(leaves)}.'
      raise ValueError(f'--config.{key}: unknown key. {hint}')
    parent, _, name = key.rpartition('.')
    target = config if not parent else _get(config, parent)
    target[name] = _parse(key, text, leaves[key])


def _leaves(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  leaves = {}
  for key, value in config.items():
    if isinstance(value, ml_collections.ConfigDict):
      leaves.update(_leaves(value, f'{prefix}{key}.'))
    else:
      leaves[prefix + key] = value
  return leaves


def _get(config: Any, key: str) -> Any:
  for part in key.split('.'):
    config = config[part]
  return config


def _parse(key: str, text: str, old: Any) -> Any:
  if isinstance(old, str):
    return text
  names = {'true': True, 'false': False, 'none': None}
  try:
    value = names[text] if text in names else ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  if isinstance(old, (tuple, list)) and isinstance(value, (tuple, list)):
    return tuple(value)
  if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if old is not None and value is not None and type(value) is not type(old):
    raise ValueError(
      f'--config.{key}={text}: expected {type(old).__name__} as in {old!r}, got {type(value).__name__}.'
    )
  return value


def main(
  run: Callable[[ml_collections.ConfigDict, pathlib.Path], dict[str, Any]],
  paper: str,
  arguments: Sequence[str] | None = None,
) -> dict[str, Any]:
  """Runs an experiment from the command line and writes `<workdir>/results.json`; returns the results.

  Errors of the user (a `ValueError` before or during the work, data that are not there) end the program with
  one line on standard error and exit code 2.
  """
  parser = argparse.ArgumentParser(
    prog=f'python -m experiments.{paper}',
    description=f'Settings: {", ".join(path.stem for path in settings(paper))}.',
    epilog='--config.key=value overrides an entry of the configuration.',
    allow_abbrev=False,
  )
  parser.add_argument('--config', default=str(CONFIGS / paper / 'embedded.py'), help='config file')
  parser.add_argument(
    '--workdir', help='where results go (default: runs/<paper>/<setting>/seed<seed>)'
  )
  parser.add_argument('--print_config', action='store_true', help='show the configuration and stop')
  known, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
  assignments = [item.removeprefix('--config.') for item in rest if item.startswith('--config.')]
  unknown = [item for item in rest if not item.startswith('--config.')]
  if unknown:
    parser.error(f'unknown arguments: {" ".join(unknown)}')
  try:
    config = load_config(known.config)
    override(config, assignments)
    if known.print_config:
      print(config)
      return {}
    return launch(run, config, known.workdir)
  except (ValueError, FileNotFoundError) as error:
    print(f'error: {error}', file=sys.stderr)
    raise SystemExit(2) from error


def launch(
  run: Callable[[ml_collections.ConfigDict, pathlib.Path], dict[str, Any]],
  config: ml_collections.ConfigDict,
  workdir: str | pathlib.Path | None = None,
) -> dict[str, Any]:
  """Runs `run(config, workdir)`, completes its results with what all runs record, and writes them."""
  import jax

  from jaxlab.parallel import hosts

  hosts.initialize()
  if config.get('features'):  # a user's own: neither the setting's data nor its numbers
    config = config.copy_and_resolve_references()
    config.setting = 'features'
  if workdir is None:
    workdir = pathlib.Path('runs') / config.paper / config.setting / f'seed{config.seed}'
  workdir = prepare_workdir(workdir)
  start = time.perf_counter()
  outcome = run(config, workdir)
  device = jax.devices()[0]
  outcome |= {
    'seconds': round(time.perf_counter() - start, 1),
    'config': json.loads(config.to_json()),
    'versions': {
      name: importlib.metadata.version(name) for name in ('jax', 'flax', 'optax', 'jaxlab')
    },
    'device': {'kind': device.device_kind, 'count': jax.device_count()},
  }
  if jax.process_index() == 0:
    save_json(workdir / 'results.json', outcome)
    print(f'Results: {workdir / "results.json"}')
  return outcome


def prepare_workdir(workdir: str | pathlib.Path) -> pathlib.Path:
  """Creates the directory and proves that it can be written.

  Raises:
    ValueError: if it can not.
  """
  from etils import epath

  workdir = epath.Path(workdir)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / '.writable'
    probe.write_text('')
    probe.unlink()
  except OSError as error:
    raise ValueError(f'--workdir={workdir} cannot be written: {error}.') from error
  return workdir
