"""Sums up runs over seeds: tables, claims, a picture, and a paper's page.

  python -m experiments report runs/gml/embedded [more directories ...] [--page] [--picture=FILE.png]

Directories are searched for `results.json` files, as `python -m experiments.PAPER --seeds=0,1,2` leaves them.
Runs of one paper and setting are seeds of one experiment and must have the same settings but for the seed. A
claim holds when the mean over seeds of `method - baseline` (turned round where lower is better) is at least
its margin. What was found is printed as Markdown.

With `--page` it is written into the paper's page, `mlcollections_configs/PAPER/README.md`, between two
markers for each setting; what stands around them is kept, so a page's prose is written by hand.
"""

import argparse
import pathlib
import re
import shlex
from collections.abc import Sequence
from typing import Any

from experiments.harness import launcher, machine, overrides, seeds
from experiments.harness import settings as sections
from experiments.harness.results import Results, cell, judged, lines, shown
from experiments.tools import listing

# From so many metrics on they stand below each other, rows across.
_MANY = 10


def markdown(runs: Sequence[Results], pictures: Sequence[str] = ()) -> str:
  """Returns what the runs of a setting say together: table, claims, what the paper reports, how it was run.

  Args:
    runs: of several seeds.
    pictures: links to the pictures that are shown.
  """
  together = seeds.summary(runs)
  unit = together['table']['title']
  parts = [
    f'### `{together["setting"]}`: {_subject(together)}',
    f'```\n{_command(together)}\n```',
    *([f'{unit[:1].upper()}{unit[1:]}; mean ± deviation over seeds.'] if unit else []),
    _table(together),
    _claims(together),
    *([f'The paper reports: {text}'] if (text := _reported(together)) else []),
    *(f'![{_escaped(together["setting"])}, seed {runs[0]["seed"]}]({link})' for link in pictures),
    _how(together),
  ]
  return '\n\n'.join(part for part in parts if part) + '\n'


def _subject(together: Results) -> str:
  for path in launcher.CONFIGS.glob(f'{together["paper"]}/{together["setting"]}.py'):
    return listing.summary(path)
  return f'{together["paper"]} with settings of its own.'


def _reported(together: Results) -> str:
  """Returns what the paper reports, by the setting of the runs or else by the paper's embedded one."""
  if text := together['config'].get('reported', ''):
    return text
  paper = together['paper']
  return launcher.load(paper, 'embedded').reported if paper in launcher.papers() else ''


def _command(together: Results) -> str:
  """Returns the command of the runs, with what differs from the setting's file and decides a result."""
  paper, setting = together['paper'], together['setting']
  parts = [f'python -m experiments.{paper}']
  parts += [f'--config={setting}'] * (setting != 'embedded')
  parts += [f'--seeds={",".join(map(str, together["seeds"]))}']
  try:
    loaded = launcher.load(paper, setting)
    own = dict(overrides.entries(sections.plain(loaded)))
    decisive = {key for key, _ in overrides.entries(sections.identity(loaded))}
  except (ValueError, ImportError):  # a paper or setting that is not here
    own = None
  for key, text in overrides.entries(together['config']) if own is not None else ():
    if own.get(key) != text and (key in decisive or key not in own):
      parts.append(shlex.quote(f'--config.{key}={text}'))
  return ' '.join(parts)


def _table(together: Results) -> str:
  rows = lines(together)
  names = shown(rows, together['table']['metrics'])
  cells = [[cell(item['metrics'].get(name)) for name in names] for item in rows]
  heads = [
    f'**{_escaped(item["name"])}**' if item['role'] == 'method' else _escaped(item['name'])
    for item in rows
  ]
  if len(names) > _MANY:
    return _grid(heads, list(map(_escaped, names)), list(zip(*cells)))
  return _grid(list(map(_escaped, names)), heads, cells)


def _claims(together: Results) -> str:
  if not together['claims']:
    return ''
  lines = []
  for verdict in judged(together):
    claim = verdict.claim
    between = f'{claim["method"]} against {claim["baseline"]}, {claim["metric"]}'
    spread = '' if verdict.deviation is None else f' ± {verdict.deviation:.2g}'
    word = 'holds' if verdict.holds else '**does not hold**'
    lines.append(
      [_escaped(between), f'{verdict.difference:+.3g}{spread}', f'{claim["margin"]:g}', word]
    )
  heads = [_escaped(claim['statement']) for claim in together['claims']]
  return _grid(['', 'better by', 'margin', ''], heads, lines, 'claim')


def _grid(
  columns: Sequence[str], rows: Sequence[str], cells: Sequence[Sequence[str]], corner: str = ''
) -> str:
  lines = [[corner, *columns], ['---'] * (len(columns) + 1)]
  lines += [[name, *line] for name, line in zip(rows, cells, strict=True)]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def _how(together: Results) -> str:
  count = len(together['seeds'])
  runs = f'Seed{"s" * (count > 1)} {", ".join(map(str, together["seeds"]))}'
  machines = ' and '.join(machine.sentence(item) for item in together['machines'])
  versions = {item['jax'] for item in together['versions'] if 'jax' in item}
  jax = f'; jax {", ".join(sorted(versions))}' if versions else ''
  return (
    f'{runs}; {machines}{jax}; {together["seconds"] / count:.0f} s a seed. Small networks move by points '
    'with machine, threads and seeds.'
  )


def _escaped(text: str) -> str:
  """Returns text that Markdown shows as it is, also in a table."""
  return re.sub(r'([\\|*_<>\[\]`])', r'\\\1', text)


def write_page(runs: Sequence[Results], page: pathlib.Path) -> None:
  """Writes what the runs of a setting say together into a page, in place of what it said before.

  Pictures of the first seed go to `.assets` next to the settings' folder where there is one, else next to the
  page.
  """
  first = runs[0]
  paper, setting = first['paper'], first['setting']
  assets = launcher.CONFIGS.parent / '.assets'
  if not assets.is_dir() or page.parent != launcher.CONFIGS / paper:
    assets = page.parent
  page.parent.mkdir(parents=True, exist_ok=True)
  links = []
  for picture in first.pictures:
    target = assets / '_'.join([paper, *[setting] * (setting != 'embedded'), picture.name])
    target.write_bytes(picture.read_bytes())
    links.append(target.name if assets == page.parent else f'../../.assets/{target.name}')
  text = page.read_text() if page.exists() else f'# {_title(paper)}\n'
  page.write_text(placed(text, setting, markdown(runs, links)))


def placed(text: str, setting: str, found: str) -> str:
  """Returns a page with `found` between the markers of a setting.

  A page without them gets them below its heading `## Measured`, or at its end.
  """
  begin, end = f'<!-- report of {setting} -->', f'<!-- end of the report of {setting} -->'
  block = f'{begin}\n\n{found.strip()}\n\n{end}'
  if begin in text and end in text:
    return text[: text.index(begin)] + block + text[text.index(end) + len(end) :]
  heading = re.search(r'^## Measured\n', text, re.MULTILINE)
  if heading is None:
    return f'{text.rstrip()}\n\n## Measured\n\n{block}\n'
  rest = text[heading.end() :].lstrip('\n')
  return f'{text[: heading.end()]}\n{block}\n' + (f'\n{rest}' if rest else '')


def _title(paper: str) -> str:
  return listing.paper_summary(paper) if paper in launcher.papers() else paper


def picture(groups: dict[tuple[str, str], list[Results]], path: pathlib.Path) -> None:
  """Draws the claims' metrics, method next to baseline, with the deviation over seeds."""
  from experiments.harness import pictures

  options = {'size': (8, 3.2 * len(groups)), 'squeeze': False}
  with pictures.drawn(path, len(groups), 1, **options) as axes:
    for axis, ((paper, setting), runs) in zip(axes[:, 0], groups.items(), strict=True):
      together = seeds.summary(runs)
      rows: dict[str, Any] = {item['name']: item['metrics'] for item in together['rows']}
      claims = together['claims']
      for offset, side, color in ((-0.2, 'baseline', '#9aa5b1'), (0.2, 'method', '#2563eb')):
        values = [rows[claim[side]][claim['metric']] for claim in claims]
        axis.bar(
          [i + offset for i in range(len(claims))],
          [value['mean'] for value in values],
          0.4,
          yerr=[value['deviation'] or 0 for value in values],
          label=', '.join(dict.fromkeys(claim[side] for claim in claims)),
          color=color,
          capsize=3,
        )
      axis.set_xticks(range(len(claims)), [claim['metric'] for claim in claims])
      axis.set_title(f'{paper}, {setting} ({len(runs)} seeds)')
      axis.legend(frameon=False)


def main(arguments: Sequence[str] | None = None) -> None:
  """Prints the report of the directories given on the command line."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments report',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('directories', nargs='+', metavar='DIR', help='with results.json below')
  parser.add_argument(
    '--page',
    nargs='?',
    type=pathlib.Path,
    const=pathlib.Path(),
    metavar='FILE',
    help="write the paper's page, or this file",
  )
  parser.add_argument(
    '--picture', type=pathlib.Path, metavar='FILE', help='draw the claims into this file'
  )
  options = parser.parse_args(arguments)
  with launcher.errors_without_traceback():
    groups = seeds.collect(options.directories)
    for (paper, _), runs in groups.items():
      if options.page is None:
        print(markdown(runs))
      else:
        own = options.page if options.page.name else launcher.CONFIGS / paper / 'README.md'
        write_page(runs, own)
        print(f'Page: {own}')
    if options.picture:
      picture(groups, options.picture)
      print(f'Picture: {options.picture}')
