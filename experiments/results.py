"""What a run leaves behind: rows of plain numbers, claims about them, a table."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

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


def results(
  config: ConfigDict, rows: Sequence[Mapping[str, Any]], claims: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
  """Returns a run's results in the form that `experiments.report` reads.

  Args:
    config: with `paper`, `setting` and `seed`.
    rows: from `row`.
    claims: `{'statement', 'metric', 'baseline', 'method', 'higher_is_better', 'margin'}` each; `baseline`
      and `method` are names of rows.

  Raises:
    ValueError: if a claim names a row or metric that is not there.
  """
  metrics = {item['name']: item['metrics'] for item in rows}
  for claim in claims:
    for side in ('baseline', 'method'):
      if claim['metric'] not in metrics.get(claim[side], {}):
        raise ValueError(
          f'claim {claim["statement"]!r}: no {claim["metric"]!r} in row {claim[side]!r}.'
        )
  return {
    'paper': config.paper,
    'setting': config.setting,
    'seed': config.seed,
    'rows': [dict(item) for item in rows],
    'claims': [dict(claim) for claim in claims],
  }


def check_claims(config: ConfigDict, rows: str, metrics: str) -> None:
  """Raises ValueError if `config.claims` or `config.pictured` name what an experiment cannot have.

  Args:
    config: with `claims` and, maybe, `pictured` (names of the rows that are drawn).
    rows: a regular expression that matches the names of rows, whether they are run or not.
    metrics: likewise of metrics.
  """
  for name in config.get('pictured', ()):
    if not re.fullmatch(rows, name):
      raise ValueError(f'pictured={config.pictured}: there is no row {name!r}.')
  for claim in config.claims:
    for side in ('baseline', 'method'):
      if not re.fullmatch(rows, claim[side]):
        raise ValueError(f'claim {claim["statement"]!r}: there is no row {claim[side]!r}.')
    if not re.fullmatch(metrics, claim['metric']):
      raise ValueError(f'claim {claim["statement"]!r}: there is no metric {claim["metric"]!r}.')


def measured_claims(config: ConfigDict, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """Returns the claims about rows that were run and metrics that were measured; says which are left out."""
  metrics = {item['name']: item['metrics'] for item in rows}
  kept = []
  for claim in config.claims:
    if all(claim['metric'] in metrics.get(claim[side], ()) for side in ('baseline', 'method')):
      kept.append(claim)
    elif jax.process_index() == 0:
      print(f'Not judged, as it was not measured: {claim["statement"]} ({claim["method"]}).')
  return kept


def save_json(path: Any, value: Any) -> None:
  """Writes `value` as JSON to an `epath` or `pathlib` path, at once or not at all."""
  partial = path.parent / f'{path.name}.partial'
  partial.write_text(json.dumps(value, indent=2) + '\n')
  partial.replace(path)


def print_table(title: str, rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> None:
  """Prints the rows of a comparison side by side, metrics downwards, once for all processes."""
  if jax.process_index():
    return
  from rich.console import Console
  from rich.table import Table

  table = Table('', *(item['name'] for item in rows), title=title)
  for metric in metrics:
    values = (item['metrics'].get(metric) for item in rows)
    table.add_row(metric, *('' if value is None else _number(value) for value in values))
  Console().print(table)


def _number(value: float) -> str:
  return f'{value:.1f}' if abs(value) >= 2 else f'{value:.3f}'
