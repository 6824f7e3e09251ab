"""What a run leaves behind: rows of plain numbers, claims about them, a table, a verdict on every claim."""

import base64
import dataclasses
import html
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments.harness.sections import Experiment

ROLES = ('baseline', 'method', 'reference')


class Results(dict):
  """What `results.json` holds of a run, or `summary.json` of several; shows its table and verdicts itself.

  `print` shows them as text, a notebook as a table with the pictures.

  Attributes:
    workdir: the folder where they lie; None: they were not written.
  """

  def __init__(self, found: Mapping[str, Any], workdir: Any = None):
    super().__init__(found)
    self.workdir = workdir

  @property
  def pictures(self) -> list[Any]:
    """The pictures' paths; of several seeds, those of the first."""
    if self.workdir is None:
      return []
    folder = self.workdir / f'seed{self["seeds"][0]}' if 'seeds' in self else self.workdir
    return sorted(folder.glob('*.png'))

  @property
  def title(self) -> str:
    """Paper, setting, seeds, and what the numbers are."""
    seeds = ', '.join(map(str, self['seeds'])) if 'seeds' in self else self['seed']
    word = 'seeds' if 'seeds' in self else 'seed'
    unit = self['table']['title']
    return f'{self["paper"]}, {self["setting"]}, {word} {seeds}' + f': {unit}' * bool(unit)

  @property
  def verdicts(self) -> list[str]:
    """A sentence on every claim."""
    return [str(verdict) for verdict in judged(self)]

  def __repr__(self) -> str:
    parts = [table(self.title, lines(self), self['table']['metrics']), *self.verdicts]
    if self.workdir is not None:
      name = 'summary.json' if 'seeds' in self else 'results.json'
      parts += [f'Results: {self.workdir / name}', *(f'Picture: {p}' for p in self.pictures)]
    return '\n'.join(parts)

  def _repr_html_(self) -> str:
    rows = lines(self)
    names = shown(rows, self['table']['metrics'])
    head = ''.join(f'<th>{html.escape(name)}</th>' for name in ('', *names))
    body = ''.join(
      f'<tr><th>{html.escape(item["name"])}</th>'
      + ''.join(f'<td>{cell(item["metrics"].get(name))}</td>' for name in names)
      + '</tr>'
      for item in rows
    )
    verdicts = ''.join(f'<li>{html.escape(text)}</li>' for text in self.verdicts)
    pictures = ''.join(
      f'<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
      for path in self.pictures
    )
    return (
      f'<p>{html.escape(self.title)}</p><table><tr>{head}</tr>{body}</table>'
      f'<ul>{verdicts}</ul>{pictures}'
    )


class Verdict(NamedTuple):
  """How a claim came out.

  Attributes:
    claim: as in the results.
    difference: of method and baseline, over seeds their mean; positive is better.
    deviation: over seeds; None: of one run.
    holds: whether the difference is at least the claim's margin.
  """

  claim: Mapping[str, Any]
  difference: float
  deviation: float | None
  holds: bool

  def __str__(self) -> str:
    claim = self.claim
    spread = '' if self.deviation is None else f' ± {self.deviation:.3g}'
    return (
      f'{"holds" if self.holds else "does not hold"}: {claim["statement"]} ({claim["method"]} against '
      f'{claim["baseline"]}: {self.difference:+.3g}{spread}, margin {claim["margin"]:g})'
    )


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


def results(
  config: Experiment,
  rows: Sequence[Mapping[str, Any]],
  metrics: Sequence[str] | None = None,
  title: str = '',
  parts: Sequence[str] = (),
) -> dict[str, Any]:
  """Returns a run's results, with the claims about rows that were run and metrics that were measured.

  Args:
    config: the experiment.
    rows: see `row`.
    metrics: those that its table shows, in this order; None: all.
    title: what the numbers are, such as 'recalls in %'.
    parts: of the experiment, such as its data sets, each of which has its own metrics `<part>_<metric>`: the
      table has a line for each of them and each row, and `metrics` are named without the part.
  """
  measured = {item['name']: item['metrics'] for item in rows}
  kept = []
  for claim in config.claims:
    if all(claim.metric in measured.get(side, ()) for side in (claim.baseline, claim.method)):
      kept.append(dataclasses.asdict(claim))
    elif jax.process_index() == 0:
      print(f'Not judged, as it was not measured: {claim.statement} ({claim.method}).')
  if metrics is None:
    metrics = dict.fromkeys(name for item in rows for name in item['metrics'])
  return {
    'paper': config.paper,
    'setting': config.setting,
    'seed': config.seed,
    'rows': [dict(item) for item in rows],
    'claims': kept,
    'table': {'title': title, 'metrics': list(metrics), 'parts': list(parts)},
  }


def lines(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """Returns the lines of a table of results: its rows, or those of each part that have metrics of it."""
  parts = found['table'].get('parts')
  if not parts:
    return found['rows']
  each = []
  for part in parts:
    for item in found['rows']:
      own = {
        name.removeprefix(f'{part}_'): value
        for name, value in item['metrics'].items()
        if name.startswith(f'{part}_')
      }
      if not own.keys().isdisjoint(found['table']['metrics']):
        each.append({'name': f'{part} {item["name"]}', 'role': item['role'], 'metrics': own})
  return each


def judged(found: Mapping[str, Any]) -> list[Verdict]:
  """Returns the verdict on each claim of some results, of one run or of several (`seeds.summary`)."""
  if 'seeds' in found:
    return [
      Verdict(claim, *(claim['difference'][k] for k in ('mean', 'deviation')), claim['holds'])
      for claim in found['claims']
    ]
  verdicts = []
  metrics = {item['name']: item['metrics'] for item in found['rows']}
  for claim in found['claims']:
    sign = 1 if claim['higher_is_better'] else -1
    method, baseline = (metrics[claim[side]][claim['metric']] for side in ('method', 'baseline'))
    difference = sign * (method - baseline)
    verdicts.append(Verdict(claim, difference, None, difference >= claim['margin']))
  return verdicts


def save_json(path: Any, value: Any) -> None:
  """Writes `value` as JSON to an `epath` or `pathlib` path, at once or not at all."""
  partial = path.parent / f'{path.name}.{os.getpid()}.partial'
  partial.write_text(json.dumps(value, indent=2) + '\n')
  partial.replace(path)


def shown(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[str]:
  """Returns those of `metrics` that some row has."""
  return [name for name in metrics if any(name in item['metrics'] for item in rows)]


def table(title: str, rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> str:
  """Returns a comparison as text, rows down and metrics across.

  Where the terminal is too narrow, the metrics are cut into several tables, each with the rows that have
  some of them; no number is cut.
  """
  from rich import box
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text

  console = Console(file=io.StringIO(), force_jupyter=False, force_terminal=False)
  unicode = (sys.stdout.encoding or 'utf-8').lower().startswith('utf')
  cells = {
    name: [cell(item['metrics'].get(name)) for item in rows] for name in shown(rows, metrics)
  }
  first = max([len(item['name']) for item in rows], default=0) + 4
  parts, room = [[]], console.width - first
  for metric in cells:
    width = max(len(metric), *map(len, cells[metric])) + 3
    if width > room and parts[-1]:
      parts, room = [*parts, []], console.width - first
    parts[-1].append(metric)
    room -= width
  console.print(Text(title))
  for part in parts:
    drawn = Table(box=box.HEAVY_HEAD if unicode else box.ASCII)
    drawn.add_column('', no_wrap=True)
    for metric in part:
      drawn.add_column(Text(metric), justify='right', no_wrap=True)
    for index, item in enumerate(rows):
      line = [cells[metric][index] for metric in part]
      if any(line) or len(parts) == 1:
        drawn.add_row(Text(item['name']), *line)
    console.print(drawn, soft_wrap=True)
  return console.file.getvalue().rstrip()


def print_table(title: str, rows: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> None:
  """Prints `table`, once for all processes."""
  if jax.process_index() == 0:
    print(table(title, rows, metrics))


def cell(value: float | Mapping[str, float | None] | None) -> str:
  """Returns a number, or the mean and deviation of several, as tables show it; nothing for None.

  A deviation of zero is left out.

  >>> cell(12.345), cell({'mean': 51.0, 'deviation': 1.414}), cell(208896.0)
  ('12.3', '51.0 ± 1.4', '208896')
  """
  if value is None:
    return ''
  mean, deviation = (
    (value['mean'], value['deviation']) if isinstance(value, Mapping) else (value, None)
  )
  size = abs(mean)
  digits = 1 if size >= 10 else 2 if size >= 2 else 3
  if not math.isfinite(mean) or (size >= 100 and mean == int(mean) and not deviation):
    digits = 0
  spread = f' ± {deviation:.{digits}f}' if deviation else ''
  return f'{mean:.{digits}f}{spread}'
