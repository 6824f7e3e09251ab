"""Collects the results of runs over seeds: a Markdown table, the claims, and a picture.

  python -m experiments report runs/ssql/embedded [more directories ...] [--picture=FILE.png]

A directory is searched for `results.json` files. Runs of one paper and setting are seeds of one experiment
and must share their configuration but for the seed. A claim holds when the mean over seeds of
`method - baseline` (turned round where lower is better) is at least its margin.
"""

import argparse
import collections
import itertools
import json
import math
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

Run = dict[str, Any]


def collect(directories: Sequence[str | pathlib.Path]) -> dict[tuple[str, str], list[Run]]:
  """Returns all runs below `directories` by (paper, setting), in order of seed.

  Raises:
    ValueError: if there is none, a file is no result, a seed occurs twice, or configurations differ in
      more than the seed.
  """
  files = sorted({p for folder in directories for p in pathlib.Path(folder).rglob('results.json')})
  if not files:
    raise ValueError(f'No results.json below {", ".join(map(str, directories))}.')
  groups = collections.defaultdict(list)
  for file in files:
    try:
      run = json.loads(file.read_text())
      groups[run['paper'], run['setting']].append(run | {'file': str(file)})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
      raise ValueError(f'{file} is not the result of an experiment: {error!r}.') from None
  for name, runs in groups.items():
    runs.sort(key=lambda run: run['seed'])
    _check_group(name, runs)
  return dict(groups)


def _check_group(name: tuple[str, str], runs: list[Run]) -> None:
  for earlier, later in itertools.pairwise(runs):
    if earlier['seed'] == later['seed']:
      raise ValueError(f'Seed {later["seed"]} twice: {earlier["file"]} and {later["file"]}.')
  first = {**runs[0]['config'], 'seed': None}
  for run in runs[1:]:
    other = {**run['config'], 'seed': None}
    different = sorted(k for k in first.keys() | other.keys() if first.get(k) != other.get(k))
    if different:
      raise ValueError(
        f'{"/".join(name)}: {runs[0]["file"]} and {run["file"]} differ in {", ".join(different)}.'
      )


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
  """Returns the mean and the sample standard deviation (NaN for a single value)."""
  deviation = statistics.stdev(values) if len(values) > 1 else math.nan
  return statistics.fmean(values), deviation


def aggregate(runs: list[Run]) -> dict[str, dict[str, tuple[float, float]]]:
  """Returns `{row: {metric: (mean, deviation)}}` over the seeds that have the row."""
  values: dict[str, dict[str, list[float]]] = {}
  for run in runs:
    for row in run['rows']:
      for metric, value in row['metrics'].items():
        values.setdefault(row['name'], {}).setdefault(metric, []).append(value)
  return {
    row: {metric: mean_and_deviation(v) for metric, v in metrics.items()}
    for row, metrics in values.items()
  }


def judge(runs: list[Run]) -> list[dict[str, Any]]:
  """Returns each claim with `difference` (mean, deviation over seeds; positive is better) and `holds`."""
  verdicts = []
  for claim in runs[0]['claims']:
    sign = 1 if claim['higher_is_better'] else -1
    differences = []
    for run in runs:
      metrics = {row['name']: row['metrics'] for row in run['rows']}
      method, baseline = metrics[claim['method']], metrics[claim['baseline']]
      differences.append(sign * (method[claim['metric']] - baseline[claim['metric']]))
    mean, deviation = mean_and_deviation(differences)
    verdicts.append(
      claim
      | {'difference': (mean, deviation), 'holds': mean >= claim['margin'], 'seeds': len(runs)}
    )
  return verdicts


def _cell(value: tuple[float, float]) -> str:
  mean, deviation = value
  digits = 1 if abs(mean) >= 10 else 2
  spread = '' if math.isnan(deviation) else f' ± {deviation:.{digits}f}'
  return f'{mean:.{digits}f}{spread}'


def markdown(groups: dict[tuple[str, str], list[Run]]) -> str:
  """Returns a table for each experiment (metrics down, rows across) and its claims, as Markdown."""
  parts = []
  for (paper, setting), runs in groups.items():
    table = aggregate(runs)
    metrics = list(dict.fromkeys(m for row in table.values() for m in row))
    seeds = ', '.join(str(run['seed']) for run in runs)
    parts.append(f'### {paper}, {setting} (seeds {seeds})\n')
    parts.append(f'| | {" | ".join(table)} |\n|---|{"---|" * len(table)}')
    for metric in metrics:
      cells = [_cell(row[metric]) if metric in row else '' for row in table.values()]
      parts.append(f'| {metric} | {" | ".join(cells)} |')
    for verdict in judge(runs):
      word = 'holds' if verdict['holds'] else 'does NOT hold'
      parts.append(
        f'\n- {verdict["statement"]}: **{word}** (difference {_cell(verdict["difference"])}, '
        f'margin {verdict["margin"]:g}, {verdict["seeds"]} seeds)'
      )
    parts.append('')
  return '\n'.join(parts)


def picture(groups: dict[tuple[str, str], list[Run]], path: pathlib.Path) -> None:
  """Draws the claims' metrics, method next to baseline, with the deviation over seeds."""
  import matplotlib

  matplotlib.use('Agg')
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(len(groups), 1, figsize=(8, 3.2 * len(groups)), squeeze=False)
  for axis, ((paper, setting), runs) in zip(axes[:, 0], groups.items(), strict=True):
    table = aggregate(runs)
    claims = runs[0]['claims']
    for offset, side, color in ((-0.2, 'baseline', '#9aa5b1'), (0.2, 'method', '#2563eb')):
      values = [table[claim[side]][claim['metric']] for claim in claims]
      axis.bar(
        [i + offset for i in range(len(claims))],
        [mean for mean, _ in values],
        0.4,
        yerr=[0 if math.isnan(d) else d for _, d in values],
        label=', '.join(dict.fromkeys(claim[side] for claim in claims)),
        color=color,
        capsize=3,
      )
    axis.set_xticks(range(len(claims)), [claim['metric'] for claim in claims])
    axis.set_title(f'{paper}, {setting} ({len(runs)} seeds)')
    axis.legend(frameon=False)
  figure.tight_layout()
  figure.savefig(path, dpi=120)
  plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints the report of the directories given on the command line."""
  parser = argparse.ArgumentParser(prog='python -m experiments report', description=__doc__)
  parser.add_argument('directories', nargs='+')
  parser.add_argument('--picture', type=pathlib.Path, help='also draw a picture into this file')
  options = parser.parse_args(arguments)
  try:
    groups = collect(options.directories)
  except ValueError as error:
    print(f'error: {error}', file=sys.stderr)
    raise SystemExit(2) from error
  print(markdown(groups))
  if options.picture:
    picture(groups, options.picture)
    print(f'Picture: {options.picture}')
