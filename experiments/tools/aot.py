"""Compiles an experiment's programs, such as its train step, for a TPU pod, on a machine without one.

  python -m experiments aot --config=gml/imagenet_lt --topology=v5e:4x4

prints HBM and FLOPs per chip, the collectives with the bytes of their results on one chip, and whether the
step fits. The mesh is that of the config (`config.mesh`, `data=-1` takes the remaining chips) unless `--mesh`
says otherwise. Needs the TPU compiler: pip install libtpu.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import os
import pathlib
import sys
import time
from typing import Any


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
  """Returns the command line's options; `overrides` are the `--config.key=value`."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments aot', description=__doc__.split('\n')[0], allow_abbrev=False
  )
  parser.add_argument('--config', required=True, help='<paper>/<setting>, or a file')
  parser.add_argument('--topology', default='v5e:4x4', help='v5e:16x16, v6e:4x4, v5p:4x4x4, ...')
  parser.add_argument('--mesh', default='', help='data=-1,fsdp=4,tensor=1')
  parser.add_argument('--json', help='write the report to this file as well')
  options, rest = parser.parse_known_args(arguments)
  unknown = [text for text in rest if not text.startswith('--config.')]
  if unknown:
    parser.error(f'unknown arguments: {" ".join(unknown)}')
  options.overrides = [text.removeprefix('--config.') for text in rest]
  return options


def lower(config: Any, mesh: Any) -> dict[str, Any]:
  """Returns the lowered programs of `experiments.<paper>` by name, for nominal facts.

  Raises:
    ValueError: if there is no such experiment, or its settings cannot be.
  """
  if importlib.util.find_spec(f'experiments.{config.paper}') is None:
    raise ValueError(f'there is no experiments/{config.paper}.py for this config.')
  module = importlib.import_module(f'experiments.{config.paper}')
  if hasattr(module, 'lower'):
    return module.lower(config, mesh)
  if not hasattr(module, 'Settings'):
    from jaxlab.parallel import aot

    return {'step': aot.lower_step(module.program(config), mesh)}
  return {name: item.lower(mesh) for name, item in module.programs(config).items()}


def load(path: str, overrides: list[str]) -> Any:
  """Returns the settings of `<paper>/<setting>`, or of a file in a paper's folder."""
  from experiments.harness import launcher

  paper = pathlib.Path(path).resolve().parent.name if path.endswith('.py') else path.split('/')[0]
  found = importlib.util.find_spec(f'experiments.{paper}')
  if found and hasattr(importlib.import_module(f'experiments.{paper}'), 'Settings'):
    config = launcher.load(paper, path if path.endswith('.py') else path.split('/')[-1], overrides)
    launcher.check(config)
    return config
  from experiments.launcher import load_config, override

  config = load_config(path)
  override(config, overrides)
  return config


def mesh_sizes(text: str, config: Any) -> dict[str, int]:
  """Returns the axes' sizes from `data=-1,fsdp=4`, else from `config.mesh`, else `data=-1`.

  >>> mesh_sizes('data=-1,fsdp=4', None)
  {'data': -1, 'fsdp': 4}
  """
  if not text:
    own = config.mesh if hasattr(config, 'mesh') else {}
    own = dataclasses.asdict(own) if dataclasses.is_dataclass(own) else dict(own)
    return {name: int(size) for name, size in own.items()}
  sizes = dict(part.partition('=')[::2] for part in text.split(','))
  for name, size in sizes.items():
    if name not in ('data', 'fsdp', 'tensor') or not size.lstrip('-').isdigit():
      raise ValueError(f'--mesh={text}: expected data=N,fsdp=N,tensor=N.')
  return {name: int(size) for name, size in sizes.items()}


def show(found: dict[str, Any]) -> None:
  """Prints the report as a table, one column a program."""
  from rich.console import Console
  from rich.table import Table

  def size_of(count: int) -> str:
    return f'{count / 2**30:.2f} GiB' if count >= 2**28 else f'{count / 2**20:.2f} MiB'

  console = Console()
  axes = ' x '.join(f'{name} {size}' for name, size in found['mesh'].items())
  console.print(f'{found["config"]} on {found["topology"]}: {axes}', soft_wrap=True)
  table = Table()
  table.add_column('per chip')
  programs = found['programs'].values()
  for name in found['programs']:
    table.add_column(name, justify='right')
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
  for kind in dict.fromkeys(kind for program in programs for kind in program['collectives']):
    totals = [program['collectives'].get(kind) for program in programs]
    table.add_row(kind, *(f'{t["count"]} x, {size_of(t["bytes"])}' if t else '' for t in totals))
  table.add_row('compile time', *(f'{program["compile_seconds"]:.1f} s' for program in programs))
  console.print(table)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
  """Compiles, prints, and returns the report."""
  options = parse(arguments)
  from jaxlab.parallel import aot

  config = load(options.config, options.overrides)
  mesh = aot.tpu_topology_mesh(options.topology, **mesh_sizes(options.mesh, config))
  programs = {}
  for name, lowered in lower(config, mesh).items():
    began = time.perf_counter()
    compiled = aot.compile_lowered(lowered)
    seconds = time.perf_counter() - began
    programs[name] = {'compile_seconds': seconds, **aot.report(compiled)}
  found = {
    'config': options.config,
    'topology': options.topology,
    'mesh': dict(mesh.shape),
    'programs': programs,
  }
  show(found)
  if options.json:
    pathlib.Path(options.json).write_text(json.dumps(found, indent=2))
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
  """Runs `main` from the command line; errors end it with one line."""
  _environment()
  try:
    main(arguments)
  except (ValueError, ModuleNotFoundError, MemoryError) as error:
    sys.exit(f'experiments aot: {error}')
