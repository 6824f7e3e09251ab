"""Trains a small network on features that a cloud gathered, in files or over a socket; loads no backbone."""

import argparse
import contextlib
import json
import pathlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.harness import overrides, results, settings
from experiments.harness.runs import say
from experiments.protocols import edge_training
from experiments.protocols.edge_training import SUFFIXES, Settings
from jaxlab import adapters, data, training

RECEIVED = 'received.json'  # beside the files of features that came over a socket


def main(arguments: Sequence[str]) -> dict[str, Any]:
  """Runs the command; writes `<workdir>/edge.json` and returns what is in it."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments edge',
    description='Trains a network of low-rank attention on features that `python -m experiments.mist '
    '--config.role=cloud` wrote (--features) or serves (--cloud).',
    epilog='--config.KEY=VALUE changes an entry of the settings, as in --config.edge.rank=8, '
    '--config.edge.rates=1e-3,1e-2 or --config.recipe.epochs=20.',
    allow_abbrev=False,
  )
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument('--features', metavar='DIR', help='folder of <task>-train and <task>-test')
  source.add_argument('--cloud', metavar='HOST:PORT', help='where a cloud waits for this device')
  parser.add_argument(
    '--suffix',
    default='.npz',
    choices=SUFFIXES,
    help='of received files; those of .array_record are never in memory as a whole',
  )
  parser.add_argument('--network', default='', help='fingerprint that features must have')
  parser.add_argument('--workdir', required=True, metavar='DIR', help='for all that is made here')
  options, rest = parser.parse_known_args(arguments)
  if unknown := [text for text in rest if not text.startswith('--config.')]:
    parser.error(f'unknown arguments: {" ".join(unknown)}.')
  changes = [text.removeprefix('--config.') for text in rest]
  config = settings.fill(Settings, overrides.override(Settings, {'paper': 'edge'}, changes))
  settings.require(settings.problems(config))
  for name in ('workdir', 'features'):
    if '://' in (getattr(options, name) or ''):
      raise ValueError(f'--{name}={getattr(options, name)}: expected a folder of this machine.')
  address = data.parse_address(options.cloud) if options.cloud else None
  workdir = pathlib.Path(options.workdir)
  call = ['python', '-m', 'experiments', 'edge', f'--workdir={workdir}', *rest]
  call += [f'--network={options.network}'] if options.network else []
  with training.locked(workdir), _stopping(call) as again:
    if address:
      folder = workdir / 'features'
      files, received = data.receive_features(
        *address, folder, suffix=options.suffix, timeout=600.0
      )
      # The folder holds what was received alone, so that `--features` goes on with just that.
      for path in edge_training.feature_files(folder) - {*files.values()}:
        path.unlink()
      results.save_json(folder / RECEIVED, {'bytes': received})
      tasks = [name.removesuffix('-train') for name in files if name.endswith('-train')]
      suffixes = (options.suffix,)
    else:
      folder, suffixes = pathlib.Path(options.features), SUFFIXES
      received = received_bytes(folder)
      tasks = edge_training.tasks_in(folder)
    again.append(f'--features={folder}')
    if address:
      say(f'received {received} bytes, which are kept: from here on\n  {shlex.join(call + again)}')
    found = trained(config, folder, tasks, suffixes, workdir, options.network)
  found['received_bytes'] = received
  results.save_json(workdir / 'edge.json', found)
  say(f'Results: {workdir / "edge.json"}')
  return found


def received_bytes(folder: pathlib.Path) -> int:
  """Returns the bytes on the wire that files of a folder came with, 0 for those that did not."""
  file = folder / RECEIVED
  return json.loads(file.read_text(encoding='utf-8'))['bytes'] if file.is_file() else 0


@contextlib.contextmanager
def _stopping(call: Sequence[str]) -> Iterator[list[str]]:
  """SIGTERM and Ctrl-C end a `with` block where nothing gets lost, and say what goes on from there.

  Args:
    call: the command without its source of features.

  Yields:
    A list, to which that source is added as soon as there is one.
  """
  again: list[str] = []
  try:
    with training.catch_signals() as stopping, stopping.at_once():
      yield again
  except SystemExit:
    told = f'goes on from what is saved:\n  {shlex.join([*call, *again])}'
    print(f'stopped; {told if again else "nothing was received"}', file=sys.stderr)
    raise


def trained(
  config: Settings,
  folder: pathlib.Path,
  tasks: Sequence[str],
  suffixes: Sequence[str],
  workdir: pathlib.Path,
  network: str,
) -> dict[str, Any]:
  """Trains on tasks of a folder; returns accuracies, the numbers that are trained, and bytes.

  Raises:
    ValueError: for no task, and for features of several networks, of different layers or types.
  """
  if not tasks:
    raise ValueError('no features to train on came: expected sets <task>-train and <task>-test.')
  expected = {'network': network} if network else {}
  # All files are looked at before the first training.
  pairs = {t: edge_training.pair_of(folder, t, suffixes, **expected) for t in tasks}
  for train, test in pairs.values():
    edge_training.check_pair(config.edge, config.recipe, train, test)
  for name in ('network', 'layers', 'dtype'):
    held = {getattr(train.header, name): train.path for train, _ in pairs.values()}
    if len(held) > 1:
      different = ', '.join(f'{path.name} {value!r}' for value, path in held.items())
      raise ValueError(f'{folder}: expected the same {name} in all tasks, got {different}.')
  accuracies, header = {}, next(iter(pairs.values()))[0].header
  for task, (train, test) in pairs.items():
    ended = edge_training.train(
      config, config.edge, config.recipe, train, test, workdir / task, task
    )
    accuracies[task] = ended.accuracy
    size = adapters.count_parameters(ended.params)
    say(f'{task}: accuracy {ended.accuracy:.4g}')
  return {
    'accuracy': accuracies,
    'trained_with_head': size,
    'bytes_per_image': header.record_bytes,
    'layers': header.layers,
    'config': settings.plain(config),
  }


def command(arguments: Sequence[str]) -> None:
  """Runs the command; what a user can do something about ends it without a traceback."""
  from experiments.harness.launcher import errors_without_traceback

  with errors_without_traceback():
    main(arguments)
