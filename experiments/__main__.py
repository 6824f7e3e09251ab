"""jaxlab's experiments.

python -m experiments                    one line a paper
python -m experiments list [PAPER ...]   settings, and the data and weights that each needs
python -m experiments.PAPER              runs one; --help shows its options
python -m experiments report DIR ...     tables over seeds with claims, and a paper's page
python -m experiments aot --config=...   compiles a setting's programs for a TPU pod
python -m experiments bench              measures speed
python -m experiments compare            next to another library
python -m experiments edge               trains on features that another machine gathered
python -m experiments COMMAND --help     options of a command
"""

import difflib
import importlib
import sys

# The module of `experiments.tools` and its function.
COMMANDS = {
  'papers': ('listing', 'papers'),
  'list': ('listing', 'main'),
  'report': ('report', 'main'),
  'aot': ('aot', 'command'),
  'bench': ('bench', 'main'),
  'compare': ('compare', 'main'),
  'edge': ('edge', 'command'),
}


def main(arguments: list[str] | None = None) -> None:
  """Runs the command; one that does not exist ends the program with status 2."""
  name, *rest = (sys.argv[1:] if arguments is None else arguments) or ['papers']
  if name in ('help', '-h', '--help'):
    print(__doc__.strip())
    return
  if name not in COMMANDS:
    print(f'error: {_unknown(name)}', file=sys.stderr)
    raise SystemExit(2)
  module, function = COMMANDS[name]
  getattr(importlib.import_module(f'experiments.tools.{module}'), function)(rest)


def _unknown(name: str) -> str:
  """Returns what is said of a command that does not exist."""
  from experiments.harness import launcher

  if name in launcher.papers():
    return f'{name} is a paper: python -m experiments.{name} runs it.'
  papers = [f'experiments.{paper}' for paper in launcher.papers()]
  close = difflib.get_close_matches(name, [*COMMANDS, *launcher.papers()], 3, 0.5)
  found = [f'experiments.{text}' if f'experiments.{text}' in papers else text for text in close]
  hint = f'did you mean {" or ".join(found)}?' if found else f'there are {", ".join(COMMANDS)}.'
  return f'there is no command {name!r}; {hint}'


if __name__ == '__main__':
  main()
