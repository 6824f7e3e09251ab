"""The command line of every experiment, and the same from Python: settings, work directory, seeds, results.

  python -m experiments.<paper> [--config=SETTING] [--workdir=DIR] [--seeds=0,1,2] [--config.key=value ...]

A setting is named by its file's stem, or by a path. Without `--config` the paper's `embedded` is run: it
needs no download and takes minutes on a CPU.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from experiments.harness import commands, machine, overrides, results, seeds, sources
from experiments.harness import settings as sections
from experiments.harness.results import Results
from experiments.harness.runs import say
from jaxlab import training
from jaxlab.parallel import hosts

STOPPED = 'stopped; the same command goes on from what is saved'
CONFIGS = pathlib.Path(importlib.util.find_spec('mlcollections_configs').origin).parent


def papers() -> list[str]:
  """Returns the papers: those that have settings and a module."""
  folders = sorted(path.parent.name for path in CONFIGS.glob('*/embedded.py'))
  return [name for name in folders if importlib.util.find_spec(f'experiments.{name}')]


def settings(paper: str) -> list[pathlib.Path]:
  """Returns the settings' files of a paper, `embedded.py` first.

  Raises:
    ValueError: if there is no such paper (with the closest that are).
  """
  if paper not in papers():
    raise ValueError(f'there is no paper {paper!r}. {closest(paper, papers())}')
  files = [path for path in (CONFIGS / paper).glob('*.py') if path.stem != '__init__']
  return sorted(files, key=lambda path: (path.stem != 'embedded', path.stem))


def closest(name: str, known: Sequence[str]) -> str:
  """Returns a question for the closest of some names, or else all of them."""
  close = difflib.get_close_matches(name, known, 3, 0.5)
  return f'Did you mean {" or ".join(close)}?' if close else f'There are {", ".join(known)}.'


def find(paper: str, setting: str | pathlib.Path) -> pathlib.Path:
  """Returns the file of a paper's setting, given by its name or its path.

  Raises:
    ValueError: if there is none (with the closest that are), or it is another paper's.
  """
  path, known = pathlib.Path(setting), {file.stem: file for file in settings(paper)}
  if path.suffix != '.py' and str(setting) in known:
    return known[str(setting)]
  is_file = path.suffix == '.py' and path.is_file()
  folder = path.resolve().parent if is_file else path.parent
  elsewhere = is_file and folder.parent.name != CONFIGS.name
  if folder.name in papers() and folder.name != paper and not elsewhere:
    raise ValueError(f'--config={setting} is a setting of {folder.name}, not of {paper}.')
  if is_file:
    return path
  same = [name for name in papers() if path.stem in [file.stem for file in settings(name)]]
  if paper in same:  # a path that is written from elsewhere
    raise ValueError(f'--config={setting}: no such file; {paper} has --config={path.stem}.')
  text = f' It is a setting of {", ".join(same)}.' if same else ''
  raise ValueError(
    f'--config={setting}: {paper} has no such setting.{text} {closest(path.stem, list(known))}'
  )


def load(
  paper: str,
  setting: str | pathlib.Path = 'embedded',
  changes: Sequence[str] | Mapping[str, Any] = (),
) -> Any:
  """Returns a paper's settings, filled in: what the file names, changes, defaults for the rest.

  Args:
    paper: the paper.
    setting: name or path.
    changes: `key=text` pairs, or values by key; see `overrides.override`.

  Raises:
    ValueError: for a setting that does not exist, and for keys and values that do not, all at once.
  """
  config, problems = _read(paper, setting, changes)
  sections.require(problems)
  return config


def load_checked(
  paper: str,
  setting: str | pathlib.Path = 'embedded',
  changes: Sequence[str] | Mapping[str, Any] = (),
) -> Any:
  """Returns `load`'s settings, or says with what it finds all that `check` finds, at once."""
  config, problems = _read(paper, setting, changes)
  if config is not None:
    problems += _problems(config, bool(problems))
  sections.require(problems)
  return config


def check(config: Any) -> None:
  """Raises SettingsError with all that is wrong with a paper's settings; opens no data."""
  sections.require(_problems(config))


def _read(
  paper: str, setting: str | pathlib.Path, changes: Sequence[str] | Mapping[str, Any]
) -> tuple[Any, list[str]]:
  """Returns the settings as far as they can be, None if they cannot, and what is wrong with them."""
  path = find(paper, setting)
  spec = importlib.util.spec_from_file_location(f'config_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_config'):
    raise ValueError(f'--config={setting}: {path} defines no get_config().')
  cls = importlib.import_module(f'experiments.{paper}').Settings
  values, problems = overrides.overridden(cls, module.get_config().to_dict(), changes)
  try:
    config = sections.fill(cls, {**values, 'paper': paper, 'setting': path.stem})
  except sections.SettingsError as error:
    return None, [*problems, *error.problems]
  if getattr(config, 'features', ''):  # a user's own: neither the setting's data nor its numbers
    config = dataclasses.replace(config, setting='features')
  return config, problems


def _problems(config: Any, known: bool = False) -> list[str]:
  """Returns what is wrong with some settings; `known`: that something is."""
  found = list(sections.problems(config))
  try:
    found += importlib.import_module(f'experiments.{config.paper}').check(config)
  except (ValueError, ArithmeticError, LookupError):
    if not found and not known:  # else it fell over what was found
      raise
  return found


def launch(config: Any, workdir: str | pathlib.Path | None = None) -> Results:
  """Runs an experiment, writes `<workdir>/results.json`, and returns the results.

  Results of the same settings that are there already are returned as they are.

  Raises:
    ValueError: for settings that cannot be, data that are not what they say, a work directory of another
      experiment or in use by another process. Nothing is trained before that is known.
    FileNotFoundError: for data that are not there; the message says what the setting needs.
  """
  hosts.initialize()
  check(config)
  workdir = claim(workdir or default_folder(config) / f'seed{config.seed}', config)
  file = workdir / 'results.json'
  if (held := _finished(file, config)) is not None:
    say(f'Finished before: {file} (without this file everything is evaluated again).')
    if changed := _changed_since(file, config):
      say(
        f'But {", ".join(changed)} changed since then: these are the results of what was there before. '
        'Choose another --workdir for those of what is there now.'
      )
    return held
  with training.locked(workdir):
    start = time.perf_counter()
    try:
      outcome = importlib.import_module(f'experiments.{config.paper}').run(config, workdir)
    except FileNotFoundError as error:
      needed = '\n  '.join(sources.needed(config))
      raise FileNotFoundError(
        f'{error}\n{config.paper}/{config.setting} needs\n  {needed}'
      ) from error
    outcome |= {
      'seconds': round(time.perf_counter() - start, 1),
      'config': sections.plain(config),
      'versions': {
        name: importlib.metadata.version(name) for name in ('jax', 'flax', 'optax', 'jaxlab')
      },
      'machine': machine.describe(),
    }
    if jax.process_index() == 0:
      _keep_others(file, outcome['config'])
      results.save_json(file, outcome)
  return Results(outcome, workdir)


def _keep_others(file: Any, config: dict[str, Any]) -> None:
  """Renames results of other settings, such as other rows of the same trainings, to `results.<n>.json`."""
  held = json.loads(file.read_text()).get('config', {}) if file.exists() else config
  if held == config:
    return
  number = next(n for n in itertools.count(1) if not file.with_name(f'results.{n}.json').exists())
  kept = file.with_name(f'results.{number}.json')
  file.rename(kept)
  changed = ', '.join(sorted(key for key in {*held, *config} if held.get(key) != config.get(key)))
  say(f'{file.name} was of other settings ({changed}); it is kept as {kept.name}.')


def _finished(file: Any, config: Any) -> Results | None:
  """Returns the results of these very settings, if they are there."""
  if not file.exists() or config.setting == 'features':  # the features may be others
    return None
  held = json.loads(file.read_text())
  same = held.get('config') == sections.plain(config) and 'table' in held
  return Results(held, file.parent) if same else None


def _changed_since(file: Any, config: Any) -> list[str]:
  """Returns the entries that name a local file, or a folder with a file, newer than some results."""
  written = os.path.getmtime(file) if os.path.exists(file) else math.inf

  def newer(path: str) -> bool:
    inside = [os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else []
    there = filter(os.path.exists, (path, *inside))  # a link may point nowhere
    return max(map(os.path.getmtime, there)) > written

  named = (entry for entry in overrides.entries(config) if os.path.exists(entry[1]))
  return [f'{key}={path}' for key, path in named if newer(path)]


def run(
  paper: str,
  setting: str = 'embedded',
  *,
  workdir: str | pathlib.Path | None = None,
  seeds: Sequence[int] | None = None,
  overrides: Sequence[str] | Mapping[str, Any] = (),
) -> Results:
  """Does what the command line does, and returns the results; see `experiments.run`."""
  hosts.initialize()
  config = load_checked(paper, setting, overrides)
  try:
    return launch(config, workdir) if seeds is None else series(config, workdir, seeds)
  except SystemExit as stop:  # a training that was interrupted has saved
    raise KeyboardInterrupt('stopped and saved; the same call goes on from there') from stop


def default_folder(config: Any) -> pathlib.Path:
  """Returns the folder of a setting's runs."""
  return pathlib.Path('runs') / config.paper / config.setting


def claim(workdir: str | pathlib.Path, config: Any, several: bool = False) -> Any:
  """Creates the work directory and writes into it whose it is.

  Args:
    workdir: the folder.
    config: the experiment.
    several: whether it is to hold a folder for each of several seeds.

  Raises:
    ValueError: if it cannot be written, or is another paper's, setting's or seed's.
  """
  workdir = epath.Path(workdir)
  own = {'paper': config.paper, 'setting': config.setting}
  own |= {} if several else {'seed': config.seed}
  owner = workdir / 'experiment.json'
  try:
    held = json.loads(owner.read_text()) if owner.exists() else None
    if held is None:
      workdir.mkdir(parents=True, exist_ok=True)
      if jax.process_index() == 0:
        results.save_json(owner, own)
  except OSError as error:
    raise ValueError(f'--workdir={workdir} cannot be written: {error}.') from error
  if held not in (None, own):
    raise ValueError(
      f'--workdir={workdir} holds {_described(held)}; this is {_described(own)}. Choose another directory.'
    )
  return workdir


def _described(owner: Mapping[str, Any]) -> str:
  seed = f'seed {owner["seed"]}' if 'seed' in owner else 'several seeds'
  return f'{owner["paper"]}/{owner["setting"]}, {seed}'


def series(config: Any, workdir: str | pathlib.Path | None, chosen: Sequence[int]) -> Results:
  """Runs an experiment with several seeds, `<workdir>/seed<seed>` each, and returns what they say together.

  A seed that was finished is not run again; `<workdir>/summary.json` holds mean and deviation of every row
  and claim. A signal ends the series; the same call goes on where it was.

  Raises:
    ValueError: for no seeds or one that occurs twice, and as `launch` does.
  """
  if not chosen or len(set(chosen)) < len(chosen):
    raise ValueError(f'seeds={",".join(map(str, chosen))}: expected different ones, such as 0,1,2.')
  hosts.initialize()
  configs = [dataclasses.replace(config, seed=seed) for seed in chosen]
  for own in configs:
    check(own)
  folder = claim(workdir or default_folder(config), config, several=True)
  found = []
  for own in configs:
    say(f'{own.paper}, {own.setting}, seed {own.seed} ({len(found) + 1} of {len(configs)})')
    found.append(launch(own, folder / f'seed{own.seed}'))
  together = seeds.summary(found, folder)
  if jax.process_index() == 0:
    results.save_json(folder / 'summary.json', together)
  return together


def main(paper: str, arguments: Sequence[str] | None = None) -> Results | None:
  """Runs an experiment from the command line and prints its results; returns them.

  What is wrong with settings, data or folders ends the program with status 2 and without a traceback, a loss
  that is not finite with status 1. SIGTERM and Ctrl-C end it with status 0, after a training has saved; a
  second Ctrl-C ends it at once (130).
  """
  options, changes = _parse(paper, sys.argv[1:] if arguments is None else list(arguments))
  with errors_without_traceback():
    if own := commands.asked_for(paper, options, changes):
      own.run(options)
      return None
    if options.print_config:
      config = load(paper, options.config, changes)
      own = overrides.assignments(config, leave_out=('paper', 'setting'))
      print(
        ' \\\n  '.join([f'python -m experiments.{paper} --config={options.config}', *own]),
        flush=True,
      )
      check(config)
      return None
    hosts.initialize()
    try:
      with training.catch_signals() as stopping, stopping.at_once():
        config = load_checked(paper, options.config, changes)
        if options.seeds is None:
          found = launch(config, options.workdir)
        else:
          if any(change.startswith('seed=') for change in changes):
            raise ValueError('--seeds and --config.seed: expected one of the two.')
          found = series(config, options.workdir, overrides.parse(options.seeds, tuple[int, ...]))
        say(f'\n{found}')
    except SystemExit:
      print(STOPPED, file=sys.stderr)
      raise
    return found


def _parse(paper: str, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """Returns the options, and the `key=value` pairs of `--config.key=value`."""
  parser = argparse.ArgumentParser(
    prog=f'python -m experiments.{paper}',
    description=f'Settings: {", ".join(path.stem for path in settings(paper))} '
    f'(python -m experiments list {paper}: what each is and needs).',
    epilog='--config.KEY=VALUE changes an entry of the settings, as in --config.network.epochs=3 or '
    '--config.runs=a,b; --print_config shows all.',
    allow_abbrev=False,
  )
  parser.add_argument(
    '--config', default='embedded', metavar='SETTING', help='name or file (default: embedded)'
  )
  parser.add_argument(
    '--workdir',
    metavar='DIR',
    help='where results, pictures and checkpoints go (default: runs/<paper>/<setting>/seed<seed>); the same '
    'command goes on from what is there',
  )
  parser.add_argument(
    '--seeds', metavar='0,1,2', help='run all of them, a folder a seed, and sum them up'
  )
  parser.add_argument(
    '--print_config', action='store_true', help='show the settings as a command, and stop'
  )
  if own := commands.of(paper):
    own.add_options(parser.add_argument_group(own.title))
  options, rest = parser.parse_known_args(arguments)
  if unknown := [text for text in rest if not text.startswith('--config.')]:
    names = [own for action in parser._actions for own in action.option_strings if own != '-h']
    close = difflib.get_close_matches(unknown[0].partition('=')[0], names, 1)
    hint = f'Did you mean {close[0]}? ' if close else ''
    parser.error(
      f'unknown arguments: {" ".join(unknown)}. {hint}Entries of the settings are --config.KEY=VALUE.'
    )
  return options, [text.removeprefix('--config.') for text in rest]


@contextlib.contextmanager
def errors_without_traceback() -> Iterator[None]:
  """Ends the program with a line in place of a traceback for what a user can do something about."""
  try:
    yield
    sys.stdout.flush()
  except BrokenPipeError as error:  # the reader, such as `head`, has seen enough
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(1) from error
  except (ValueError, FileNotFoundError, ConnectionError) as error:
    print(f'error: {error}', file=sys.stderr)
    raise SystemExit(2) from error
  except FloatingPointError as error:
    print(f'error: {error}', file=sys.stderr)
    raise SystemExit(1) from error
  except KeyboardInterrupt as error:
    print(STOPPED, file=sys.stderr)
    raise SystemExit(130) from error
