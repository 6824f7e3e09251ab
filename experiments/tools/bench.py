"""Measures how fast networks train and run, next to PyTorch, and what the loop and calibration cost.

  python -m experiments bench [--models=resnet18_64,vit_tiny_224] [--torch-python=PATH] [--output=FILE]

Networks (`--models`, none with `--models=`): wall time and CPU time of a training step (SGD with momentum)
and of a forward pass, with all threads and with one; the time to compile the step; the time from the start
of the process to the end of the first step, with nothing compiled before and with the step in the cache.
With the Python of an environment that has torch and timm, all of it is measured there too, in turns, and
given as a ratio (below 1: ours is faster). Nothing else should run meanwhile.

Input (`--workers`, none with `--workers=`): how many photographs a second are read from a folder, decoded,
resized and cropped to 224 pixels by so many worker processes, or by none; next to torchvision's loader.

Sizes (`--sizes`, none with `--sizes=`):

- embedded, resnet18: steps of SSQL fed by the input pipeline (shuffle, gather, transfer, metrics) against
  the bare step on a batch that lies on the device; the fake-quantized step against the plain one (SimSiam),
  which does half the passes; the first step of both, and how often the step was compiled again while
  bit-widths were drawn at random;
- calibration: the closed form of QwT, QwT-v2 and NBC, for one more image, against one float forward pass
  of it.
"""

import argparse
import math
import pathlib
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.tools import bench_comparison, bench_input, bench_loop


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """Returns what to measure, checked: `models` and `sizes` are tuples, `threads` numbers or None for all."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments bench',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  cases = bench_comparison.CASES
  parser.add_argument(
    '--models',
    default=','.join(bench_comparison.STANDARD),
    help=f'of {", ".join(cases)}, or all; default: %(default)s',
  )
  parser.add_argument(
    '--torch-python', metavar='PATH', help='a Python, or its environment, with torch and timm'
  )
  parser.add_argument('--threads', default='all,1', help='default: %(default)s')
  parser.add_argument(
    '--rounds', type=int, default=2, help='processes a side and number of threads'
  )
  parser.add_argument('--steps', type=int, default=5, help='steps and passes a process')
  parser.add_argument(
    '--workers', default='0,1,2', help='processes that read photographs; default: %(default)s'
  )
  parser.add_argument('--sizes', default=','.join(bench_loop.SIZES), help='default: %(default)s')
  parser.add_argument('--repeats', type=int, default=5, help='of the sizes; default: %(default)s')
  parser.add_argument(
    '--output', metavar='FILE', type=pathlib.Path, help='write the figures as JSON'
  )
  options = parser.parse_args(arguments)
  if options.models == 'all':
    options.models = ','.join(cases)
  for field, known in (('models', cases), ('sizes', bench_loop.SIZES)):
    given = tuple(filter(None, getattr(options, field).split(',')))
    if unknown := set(given) - set(known):
      parser.error(f'--{field}: {", ".join(sorted(unknown))} is none of {", ".join(known)}')
    setattr(options, field, given)
  counts = tuple(filter(None, options.workers.split(',')))
  if not all(map(str.isdecimal, counts)):
    parser.error(f'--workers={options.workers}: expected numbers >= 0, such as 0,1,2')
  options.workers = tuple(map(int, counts))
  for field in ('rounds', 'steps', 'repeats'):
    if getattr(options, field) < 1:
      parser.error(f'--{field}={getattr(options, field)}: expected a number >= 1')
  if options.output and not options.output.parent.is_dir():
    parser.error(f'--output={options.output}: there is no folder {options.output.parent}')
  try:
    options.threads = bench_comparison.thread_counts(options.threads)
    if options.torch_python:
      options.torch_python = bench_comparison.interpreter(options.torch_python)
  except ValueError as error:
    parser.error(str(error))
  return options


def machine() -> dict[str, Any]:
  """Returns the processor's name, how many CPUs this process may use, the system, Python's version."""
  from experiments.harness import machine as own

  return {
    'processor': own.processor(),
    'cpus': own.threads(),
    'system': platform.platform(terse=True),
    'python': platform.python_version(),
  }


def geometric_means(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
  """Returns, by row, the geometric mean over networks of our wall and CPU time over PyTorch's."""
  ratios: dict[str, dict[str, list[float]]] = {}
  for model in found.values():
    for row, sides in model['rows'].items():
      for kind, value in sides.get('ratio', {}).items():
        ratios.setdefault(row, {}).setdefault(kind, []).append(value)
  return {
    row: {kind: math.exp(sum(map(math.log, v)) / len(v)) for kind, v in kinds.items()}
    for row, kinds in ratios.items()
  }


def models_table(found: Mapping[str, Mapping[str, Any]]) -> Any:
  """Returns a table of seconds and ratios: a section a network, then the geometric means of the ratios."""
  from rich import box
  from rich.table import Table

  table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
  table.add_column('', no_wrap=True)
  for column in ('wall s', 'PyTorch', 'ratio', 'CPU s', 'PyTorch', 'ratio'):
    table.add_column(column, justify='right')
  for name, model in found.items():
    table.add_section()
    table.add_row(f'{name}, batch {model["case"]["batch"]}')
    for row, sides in model['rows'].items():
      table.add_row(f'  {row}', *_cells(sides, ('ours', 'torch', 'ratio')))
  if means := geometric_means(found):
    table.add_section()
    table.add_row('geometric mean')
    for row, kinds in means.items():
      table.add_row(f'  {row}', *_cells({'ratio': kinds}, ('', '', 'ratio')))
  return table


def _cells(sides: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> list[str]:
  values = [sides.get(side, {}).get(kind) for kind in ('wall', 'cpu') for side in columns]
  return ['' if value is None else f'{value:.3g}' for value in values]


def figures_table(corner: str, found: Mapping[str, Mapping[str, Any]]) -> Any:
  """Returns a table of figures, what they were measured for across."""
  from rich.table import Table

  table = Table(corner, *found)
  for name in dict.fromkeys(name for figures in found.values() for name in figures):
    values = (figures.get(name) for figures in found.values())
    table.add_row(name, *('' if value is None else f'{value:.4g}' for value in values))
  return table


def measure_input(workers: Sequence[int], torch_python: str | None) -> dict[str, dict[str, float]]:
  """Returns `bench_input.measure` by '0 workers' and so on, all over the same photographs."""
  if not workers:
    return {}
  with tempfile.TemporaryDirectory() as folder:
    bench_input.photographs(folder)
    return {
      f'{count} workers': bench_input.measure(count, torch_python=torch_python, root=folder)
      for count in workers
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
  """Measures, prints, and returns `{'machine', 'models', 'geometric_means', 'input', 'sizes'}`."""
  options = parse(arguments)
  from rich.console import Console

  from experiments.harness import results

  console = Console()
  found: dict[str, Any] = {'machine': machine()}
  line = '{processor}, {cpus} CPUs, {system}, Python {python}'.format(**found['machine'])
  console.print(line, markup=False)
  found['models'] = bench_comparison.measure(
    options.models,
    options.threads,
    torch_python=options.torch_python,
    rounds=options.rounds,
    steps=options.steps,
    report=lambda text: print(text, file=sys.stderr, flush=True),
  )
  found['geometric_means'] = geometric_means(found['models'])
  if found['models']:
    versions = {k: v for model in found['models'].values() for k, v in model['versions'].items()}
    console.print(', '.join(f'{name} {version}' for name, version in versions.items()))
    console.print(models_table(found['models']))
  found['input'] = measure_input(options.workers, options.torch_python)
  if found['input']:
    console.print(figures_table('photographs a second', found['input']))
  found['sizes'] = {size: bench_loop.measure(size, options.repeats) for size in options.sizes}
  if found['sizes']:
    console.print(figures_table('', found['sizes']))
  if options.output:
    results.save_json(options.output, found)
  return found


if __name__ == '__main__':
  main()
