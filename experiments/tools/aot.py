"""Compiles an experiment's programs, such as its train step, for a TPU pod, on a machine without one.

  python -m experiments aot --config=gml/imagenet_lt --topology=v5e:4x4
  python -m experiments aot --config=kv_heads/llama2_7b --topology=v5e:4x4 --programs=calibrate,decode

prints HBM and FLOPs per chip, the collectives with the bytes of their results on one chip, and whether the
step fits. The mesh is that of the config (`config.mesh`, `data=-1` takes the remaining chips) unless `--mesh`
says otherwise. Large networks take minutes a program: each is said when it is done, and written to the
file of `--json` at once. Needs the TPU compiler: pip install libtpu.
"""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import sys
import time
from typing import Any


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """Returns the command line's options; `overrides` are the `--config.key=value`."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments aot',
    description=__doc__,
    epilog='--config.KEY=VALUE changes an entry of the settings.',
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    '--config', required=True, metavar='PAPER/SETTING', help='or a file in the folder of a paper'
  )
  parser.add_argument(
    '--topology', default='v5e:4x4', help='v5e:16x16, v6e:4x4, v5p:4x4x4, ...; default: %(default)s'
  )
  parser.add_argument('--mesh', default='', help='such as data=-1,fsdp=4,tensor=1')
  parser.add_argument(
    '--programs', default='', metavar='NAME,...', help='these alone; default: all'
  )
  parser.add_argument('--json', metavar='FILE', help='write the report to this file as well')
  options, rest = parser.parse_known_args(arguments)
  unknown = [text for text in rest if not text.startswith('--config.')]
  if unknown:
    parser.error(f'unknown arguments: {" ".join(unknown)}')
  if options.json and not pathlib.Path(options.json).absolute().parent.is_dir():
    parser.error(f'--json={options.json}: there is no folder {pathlib.Path(options.json).parent}.')
  options.overrides = [text.removeprefix('--config.') for text in rest]
  return options


def programs_of(config: Any, names: str = '') -> dict[str, Any]:
  """Returns the programs of `experiments.<paper>` by name, for nominal facts.

  Args:
    config: of the paper.
    names: of those that are wanted, with commas between; empty: all.

  Raises:
    ValueError: for a name that none has.
  """
  from experiments.harness import launcher

  module = importlib.import_module(f'experiments.{config.paper}')
  known = module.programs(config)
  chosen = [name.strip() for name in names.split(',')] if names else [*known]
  for name in chosen:
    if name not in known:
      raise ValueError(f'--programs={names}: no {name!r}. {launcher.closest(name, [*known])}')
  return {name: known[name] for name in chosen}


def compiled(program: Any, mesh: Any) -> dict[str, Any]:
  """Returns what `aot.report` says of a program, and the seconds that tracing and compiling it took."""
  from jaxlab.parallel import aot

  began = time.perf_counter()
  lowered = program.lower(mesh)
  traced = time.perf_counter()
  found = aot.compile_lowered(lowered)
  seconds = time.perf_counter() - traced
  return {'trace_seconds': traced - began, 'compile_seconds': seconds, **aot.report(found)}


def place(text: str) -> tuple[str, str | pathlib.Path]:
  """Returns paper and setting of `<paper>/<setting>`, or of a file in a paper's folder."""
  path = pathlib.Path(text)
  if path.suffix == '.py':
    return path.resolve().parent.name, path
  paper, _, setting = text.partition('/')
  return paper, setting or 'embedded'


def mesh_changes(text: str) -> list[str]:
  """Returns the changes of settings that `data=-1,fsdp=4` stands for.

  >>> mesh_changes('data=-1,fsdp=4')
  ['mesh.data=-1', 'mesh.fsdp=4']
  """
  sizes = dict(part.partition('=')[::2] for part in text.split(',')) if text else {}
  for name, size in sizes.items():
    if name not in ('data', 'fsdp', 'tensor') or not size.lstrip('-').isdigit():
      raise ValueError(f'--mesh={text}: expected data=N,fsdp=N,tensor=N.')
  return [f'mesh.{name}={size}' for name, size in sizes.items()]


def show(found: dict[str, Any]) -> None:
  """Prints the report as a table, one column a program."""
  from rich.console import Console
  from rich.table import Table
  from rich.text import Text

  def size_of(count: int) -> str:
    return f'{count / 2**30:.2f} GiB' if count >= 2**28 else f'{count / 2**20:.2f} MiB'

  console = Console()
  axes = ' x '.join(f'{name} {size}' for name, size in found['mesh'].items())
  console.print(Text(f'{found["config"]} on {found["topology"]}: {axes}'), soft_wrap=True)
  table = Table()
  table.add_column('per chip', no_wrap=True)
  programs = found['programs'].values()
  for name in found['programs']:
    table.add_column(Text(name), justify='right', overflow='fold')
  for name in next(iter(programs))['hbm']:
    sizes = [program['hbm'][name] for program in programs]
    if name == 'fits':
      verdicts = {True: '[green]yes', False: '[red]no', None: 'unknown'}
      table.add_row('fits', *(verdicts[size] for size in sizes))
    elif None not in sizes:
      table.add_row(f'HBM {name}', *map(size_of, sizes))
  table.add_section()
  table.add_row('FLOPs', *(f'{program["flops"]:.4e}' for program in programs))
  table.add_section()
  moved = [program['collectives'] for program in programs]
  for kind in dict.fromkeys(kind for own in moved for kind in own or ()):
    totals = [own and own.get(kind) for own in moved]
    table.add_row(kind, *(f'{t["count"]} x, {size_of(t["bytes"])}' if t else '' for t in totals))
  if None in moved:
    table.add_row('collectives', *('unknown' if own is None else '' for own in moved))
  table.add_row('compile time', *(f'{program["compile_seconds"]:.1f} s' for program in programs))
  console.print(table, soft_wrap=True)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
  """Compiles, prints, and returns the report."""
  options = parse(arguments)
  from experiments.harness import launcher
  from experiments.harness.sections import meshes_over
  from jaxlab.parallel import aot

  given = *place(options.config), [*options.overrides, *mesh_changes(options.mesh)]
  launcher.load(*given)  # what does not exist is said without a compiler, too
  devices = aot.tpu_topology_mesh(options.topology).devices.flatten().tolist()
  with meshes_over(devices):
    config = launcher.load_checked(*given)
  mesh = aot.tpu_topology_mesh(options.topology, **dataclasses.asdict(config.mesh))
  found = {
    'config': options.config,
    'topology': options.topology,
    'mesh': dict(mesh.shape),
    'programs': {},
  }
  for name, program in programs_of(config, options.programs).items():
    found['programs'][name] = own = compiled(program, mesh)
    seconds = own['trace_seconds'], own['compile_seconds']
    print('{}: traced in {:.0f} s, compiled in {:.0f} s'.format(name, *seconds), file=sys.stderr)
    if options.json:
      pathlib.Path(options.json).write_text(json.dumps(found, indent=2))
  show(found)
  return found


def _environment() -> None:
  """Sets what `libtpu` reads before jax is imported."""
  if 'jax' in sys.modules:
    import jax

    jax.config.update('jax_platforms', 'cpu')
  os.environ.update(
    TPU_SKIP_MDS_QUERY='1',
    TPU_WORKER_HOSTNAMES='localhost',
    TPU_ACCELERATOR_TYPE='v5litepod-16',
    JAX_PLATFORMS='cpu',
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
  )


def command(arguments: list[str] | None = None) -> None:
  """Runs `main` from the command line; errors end it with a line."""
  _environment()
  from experiments.harness import launcher

  with launcher.errors_without_traceback():
    try:
      main(arguments)
    except (ModuleNotFoundError, MemoryError) as error:
      raise ValueError(str(error)) from error
