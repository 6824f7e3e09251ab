"""Several runs of one setting with other seeds: found on disk, and summed up by mean and deviation."""

import collections
import itertools
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.harness.results import Results, judged

Run = Mapping[str, Any]


def collect(directories: Sequence[str | pathlib.Path]) -> dict[tuple[str, str], list[Results]]:
  """Returns all runs below `directories` by (paper, setting), in order of seed.

  Raises:
    ValueError: if there is none, a file is no result, a seed occurs twice, or settings differ in more than
      the seed.
  """
  files = sorted({p for folder in directories for p in pathlib.Path(folder).rglob('results.json')})
  if not files:
    raise ValueError(f'no results.json below {", ".join(map(str, directories))}.')
  groups = collections.defaultdict(list)
  for file in files:
    try:
      run = Results(json.loads(file.read_text()), file.parent)
      groups[run['paper'], run['setting']].append(run)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      raise ValueError(f'{file} is not the result of an experiment: {error!r}.') from None
  for name, runs in groups.items():
    runs.sort(key=lambda run: run['seed'])
    _check_group(name, runs)
  return dict(groups)


def _check_group(name: tuple[str, str], runs: list[Results]) -> None:
  for earlier, later in itertools.pairwise(runs):
    if earlier['seed'] == later['seed']:
      raise ValueError(f'seed {later["seed"]} twice: {earlier.workdir} and {later.workdir}.')
  first = {**runs[0]['config'], 'seed': None}
  for run in runs[1:]:
    other = {**run['config'], 'seed': None}
    different = sorted(k for k in first.keys() | other.keys() if first.get(k) != other.get(k))
    if different:
      raise ValueError(
        f'{"/".join(name)}: {runs[0].workdir} and {run.workdir} differ in {", ".join(different)}.'
      )


def summary(runs: Sequence[Run], workdir: Any = None) -> Results:
  """Returns the results of several seeds as one.

  Rows hold `{'mean', 'deviation'}` by metric, over the seeds that have it; claims `difference` likewise and
  `holds`: the mean difference is at least the margin. The deviation is that of a sample, None of one seed.
  """
  values: dict[str, dict[str, list[float]]] = {}
  roles = {}
  for run in runs:
    for item in run['rows']:
      roles.setdefault(item['name'], item['role'])
      for metric, value in item['metrics'].items():
        values.setdefault(item['name'], {}).setdefault(metric, []).append(value)
  rows = [
    {'name': name, 'role': roles[name], 'metrics': {m: spread(v) for m, v in metrics.items()}}
    for name, metrics in values.items()
  ]
  differences: dict[str, list[float]] = {}
  for run in runs:
    for verdict in judged(run):
      differences.setdefault(json.dumps(verdict.claim), []).append(verdict.difference)
  claims = []
  for text, found in differences.items():
    claim, difference = json.loads(text), spread(found)
    holds = difference['mean'] >= claim['margin']
    claims.append({**claim, 'difference': difference, 'holds': holds, 'seeds': len(found)})
  first = runs[0]
  metrics = dict.fromkeys(name for item in rows for name in item['metrics'])
  found = {
    'paper': first['paper'],
    'setting': first['setting'],
    'seeds': [run['seed'] for run in runs],
    'rows': rows,
    'claims': claims,
    'table': first.get('table', {'title': '', 'metrics': list(metrics)}),
    'seconds': round(sum(run['seconds'] for run in runs), 1),
    'config': {k: v for k, v in first['config'].items() if k != 'seed'},
    'machines': _distinct([run.get('machine', {}) for run in runs]),
    'versions': _distinct([run.get('versions', {}) for run in runs]),
  }
  return Results(found, workdir)


def spread(values: Sequence[float]) -> dict[str, float | None]:
  """Returns the mean and the sample's standard deviation, None for a single value."""
  deviation = statistics.stdev(values) if len(values) > 1 else None
  return {'mean': statistics.fmean(values), 'deviation': deviation}


def _distinct(items: Sequence[Any]) -> list[Any]:
  return [item for index, item in enumerate(items) if item not in items[:index]]
