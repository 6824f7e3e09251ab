"""`python -m experiments` lists the papers; with a command it runs one of the tools.

python -m experiments                    one line a paper
python -m experiments list [PAPER]       settings, and what data each needs
python -m experiments report DIR ...     tables over seeds, claims
python -m experiments aot --config=...   compiles for a TPU pod
python -m experiments bench              measures speed
python -m experiments compare            next to another library
"""

import sys


def main(arguments: list[str] | None = None) -> None:
  """Runs the command."""
  command, *rest = (sys.argv[1:] if arguments is None else arguments) or ['papers']
  if command == 'papers':
    from experiments.tools import listing

    listing.papers()
  elif command == 'list':
    from experiments.tools import listing

    listing.settings(rest)
  elif command == 'report':
    from experiments.tools import report

    report.main(rest)
  elif command == 'aot':
    from experiments.tools import aot

    aot.command(rest)
  elif command == 'bench':
    from experiments.tools import bench

    bench.main(rest)
  elif command == 'compare':
    from experiments import qwix_comparison

    qwix_comparison.main(rest)
  else:
    print(__doc__)
    raise SystemExit(0 if command in ('help', '-h', '--help') else 2)


if __name__ == '__main__':
  main()
