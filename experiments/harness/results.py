"""What a run leaves behind: rows of plain numbers, claims about them, a table, a verdict on every claim."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from experiments.harness.sections import Experiment

ROLES = ('baseline', 'method', 'reference')


def row(name: str, role: str, metrics: Mapping[str, float]) -> dict[str, Any]:
  """Returns one row of a comparison.

  Args:
    name: as in the table.
    role: 'baseline', 'method', or 'reference' (what is shown but not compared by a claim).
    metrics: plain numbers by name.

  Raises:
    ValueError: for another role.
  """
  if role not in ROLES:
    raise ValueError(f'row {name!r}: role {role!r} is none of {", ".join(ROLES)}.')
  return {'name': name, 'role': role, 'metrics': {k: float(v) for k, v in metrics.items()}}


def check_claims(config: Experiment, rows: Sequence[str], metrics: Sequence[str]) -> Iterator[str]:
  """Yields what `config.claims` and `config.pictured` name that an experiment cannot have.

  Args:
    config: the experiment.
    rows: regular expressions that match the names of rows, whether they are run or not.
    metrics: likewise of metrics.
  """
  has_row, has_metric = re.compile('|'.join(rows)), re.compile('|'.join(metrics))
  for name in config.pictured:
    if not has_row.fullmatch(name):
      yield f'pictured={config.pictured}: there is no row {name!r}.'
  for claim in config.claims:
    for side in (claim.baseline, claim.method):
      if not has_row.fullmatch(side):
        yield f'claim {claim.statement!r}: there is no row {side!r}.'
    if not has_metric.fullmatch(claim.metric):
      yield f'claim {claim.statement!r}: there is no metric {claim.metric!r}.'


def results(config: Experiment, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns a run's results, with the claims about rows that were run and metrics that were measured."""
  metrics = {item['name']: item['metrics'] for item in rows}
  kept = []
  for claim in config.claims:
    if all(claim.metric in metrics.get(side, ()) for side in (claim.baseline, claim.method)):
      kept.append(dataclasses.asdict(claim))
    elif jax.process_index() == 0:
      print(f'Not judged, as it was not measured: {claim.statement} ({claim.method}).')
  return {
    'paper': config.paper,
    'setting': config.setting,
    'seed': config.seed,
    'rows': [dict(item) for item in rows],
    'claims': kept,
  }


def judged(found: Mapping[str, Any]) -> list[tuple[dict[str, Any], float, bool]]:
  """Returns each claim of some results with the difference (positive is better) and whether it holds."""
  metrics = {item['name']: item['metrics'] for item in found['rows']}
  verdicts = []
  for claim in found['claims']:
    sign = 1 if claim['higher_is_better'] else -1
    method, baseline = (metrics[claim[side]][claim['metric']] for side in ('method', 'baseline'))
    difference = sign * (method - baseline)
    verdicts.append((claim, difference, difference >= claim['margin']))
  return verdicts


def save_json(path: Any, value: Any) -> None:
  """Writes `value` as JSON to an `epath` or `pathlib` path, at once or not at all."""
  partial = path.parent / f'{path.name}.partial'
  partial.write_text(json.dumps(value, indent=2) + '\n')
  partial.replace(path)


def print_table(title: str, rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> None:
  """Prints a comparison, rows down and metrics across, once for all processes.

  Where a terminal is too narrow, the metrics are cut into several tables; no number is.
  """
  if jax.process_index():
    return
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text

  console = Console()
  shown = [m for m in metrics if any(m in item['metrics'] for item in rows)]
  cells = {
    m: [number(item['metrics'][m]) if m in item['metrics'] else '' for item in rows] for m in shown
  }
  first = max([len(item['name']) for item in rows], default=0) + 4
  parts, room = [[]], console.width - first
  for metric in shown:
    width = max(len(metric), *map(len, cells[metric])) + 3
    if width > room and parts[-1]:
      parts, room = [*parts, []], console.width - first
    parts[-1].append(metric)
    room -= width
  console.print(Text(title))
  for part in parts:
    table = Table()
    table.add_column('', no_wrap=True)
    for metric in part:
      table.add_column(Text(metric), justify='right', no_wrap=True)
    for index, item in enumerate(rows):
      table.add_row(Text(item['name']), *(cells[metric][index] for metric in part))
    console.print(table, soft_wrap=True)


def print_verdicts(found: Mapping[str, Any]) -> None:
  """Prints every claim with its figure and whether it holds."""
  if jax.process_index():
    return
  for claim, difference, holds in judged(found):
    word = 'holds' if holds else 'DOES NOT HOLD'
    print(
      f'{word}: {claim["statement"]} ({claim["method"]} against {claim["baseline"]}: '
      f'{difference:+.3g}, margin {claim["margin"]:g})'
    )


def number(value: float) -> str:
  """Returns a number as tables show it."""
  return f'{value:.1f}' if abs(value) >= 2 else f'{value:.3f}'
