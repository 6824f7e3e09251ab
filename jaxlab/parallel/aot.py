"""Ahead-of-time compilation: what a train step needs on a TPU pod, found out without a pod.

The TPU compiler (package `libtpu`) runs on any x86 Linux machine. `tpu_topology_mesh` describes a pod,
`compile_step` compiles a program for it, `report` reads memory, operations and communication off the
result.
"""

import importlib.util
import os
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from jaxlab.parallel.mesh import make_mesh
from jaxlab.parallel.program import shard_program

# Bytes of high-bandwidth memory of a chip, from the system pages of cloud.google.com/tpu/docs.
HBM_BYTES = {'v4': 32 * 2**30, 'v5e': 16 * 2**30, 'v5p': 95 * 2**30, 'v6e': 32 * 2**30}
# Of a chip, by the same pages: operations of a second in bfloat16, and bytes that its memory moves.
PEAK_FLOPS = {'v4': 275e12, 'v5e': 197e12, 'v5p': 459e12, 'v6e': 918e12}
HBM_BYTES_PER_SECOND = {'v4': 1228e9, 'v5e': 819e9, 'v5p': 2765e9, 'v6e': 1640e9}
_KINDS = {'TPU v4': 'v4', 'TPU v5 lite': 'v5e', 'TPU v5': 'v5p', 'TPU v6 lite': 'v6e'}
COLLECTIVES = (
  'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute',
)  # fmt: skip


def compile_only_environment() -> dict[str, str]:
  """Returns the environment in which `libtpu` compiles quietly; set it before jax is imported.

  The accelerator type only has to be a known one: the topology is asked for by its own name.
  """
  return {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
    'JAX_PLATFORMS': 'cpu',
    # Nothing is run on a chip: several compilations may go on side by side.
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }


def tpu_topology_mesh(
  topology: str = 'v5e:4x4', data: int = -1, fsdp: int = 1, tensor: int = 1
) -> Mesh:
  """Returns a mesh of the chips of a TPU topology that is described, not attached.

  Args:
    topology: generation and shape, e.g. `v5e:4x4`, `v5e:16x16`, `v6e:4x4`, `v4:4x4x4`.
    data: see `make_mesh`.
    fsdp: see `make_mesh`.
    tensor: see `make_mesh`.

  Raises:
    ModuleNotFoundError: without `libtpu`; says how to install it.
    ValueError: for a topology that the compiler does not know.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ModuleNotFoundError(
      'The TPU compiler is missing. Install it (Linux, x86): pip install libtpu.'
    )
  from jax.experimental import topologies

  for name, value in compile_only_environment().items():
    os.environ.setdefault(name, value)
  try:
    # A v4 chip has two cores that work as one device, as they do on a real pod.
    options = {'chip_config_name': 'megacore'} if topology.startswith('v4:') else {}
    devices = topologies.get_topology_desc(topology, 'tpu', **options).devices
  except Exception as error:
    raise ValueError(
      f'topology={topology!r} is none that the TPU compiler knows, such as v5e:4x4, v5e:16x16, '
      f'v6e:4x4, v4:4x4x4, v5p:4x4x4: {error}'
    ) from error
  return make_mesh(data, fsdp, tensor, devices=devices)


def lower_step(program: Any, mesh: Mesh) -> jax.stages.Lowered:
  """Lowers the program's train step for `mesh`; allocates and runs nothing.

  Raises:
    ValueError: if the batch or a partition rule does not fit the mesh.
  """
  sharded = shard_program(program, mesh)
  return sharded.step.lower(sharded.state, sharded.frozen, sharded.batch)


def compile_lowered(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
  """Compiles what was lowered.

  Raises:
    MemoryError: if it does not fit the chips' memory; with the compiler's account of it.
  """
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' in str(error):
      raise MemoryError(f'The step does not fit: {str(error)[:2000]}') from error
    raise


def compile_step(program: Any, mesh: Mesh) -> jax.stages.Compiled:
  """Compiles the program's train step for `mesh`: `compile_lowered(lower_step(program, mesh))`."""
  return compile_lowered(lower_step(program, mesh))


def report(compiled: jax.stages.Compiled) -> dict[str, Any]:
  """Returns what a compiled step needs, per device (on a TPU: per chip).

  Returns:
    A dict of plain numbers:
      `devices`: how many; `device_kind`: of what kind.
      `hbm`: bytes of `arguments` (state and batch), `outputs`, `alias` (outputs that overwrite donated
        arguments), `temporaries`, `code`; their `total` = arguments + outputs - alias + temporaries +
        code; what is `available` on the device (None if unknown) and whether it `fits`.
      `flops`: floating point operations of a step; the body of a loop (`lax.scan`) counts once.
      `collectives`: `count` and `bytes` by kind, see `collectives`; None where jax cannot read the program
        that a newer compiler made.
  """
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  devices = _devices(compiled)
  hbm = {
    'arguments': memory.argument_size_in_bytes,
    'outputs': memory.output_size_in_bytes,
    'alias': memory.alias_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    'code': memory.generated_code_size_in_bytes,
  }
  total = sum(hbm.values()) - 2 * hbm['alias']
  available = HBM_BYTES.get(_KINDS.get(devices[0].device_kind))
  hbm |= {'total': total, 'available': available, 'fits': available and total <= available}
  return {
    'devices': len(devices),
    'device_kind': devices[0].device_kind,
    'hbm': hbm,
    'flops': float(cost.get('flops', 0.0)),
    'collectives': _readable_collectives(compiled),
  }


def _readable_collectives(compiled: jax.stages.Compiled) -> dict[str, dict[str, int]] | None:
  try:
    return collectives(compiled.as_text())
  except jax.errors.JaxRuntimeError as error:
    if 'INTERNAL' not in str(error):
      raise
    return None


def least_seconds(compiled: jax.stages.Compiled) -> float:
  """Returns the time below which a chip cannot run a compiled program.

    max(FLOPs / peak in bfloat16, bytes moved / memory bandwidth)

  A bound and no forecast: what small kernels, waiting and communication cost is not in it, and the body of a
  loop counts once. Ratios of it say what pruning can gain.

  Raises:
    ValueError: for a device whose peaks are not known.
  """
  device = _devices(compiled)[0].device_kind
  if (kind := _KINDS.get(device)) is None:
    raise ValueError(f'the peaks of {device!r} are not known; known are {", ".join(_KINDS)}.')
  cost = compiled.cost_analysis()
  flops, moved = float(cost.get('flops', 0.0)), float(cost.get('bytes accessed', 0.0))
  return max(flops / PEAK_FLOPS[kind], moved / HBM_BYTES_PER_SECOND[kind])


def least_latency(
  function: Callable[..., Any], *arguments: Any, topology: str = 'v5e:2x2'
) -> float:
  """Returns the time in seconds below which one chip of a TPU cannot run a function; see `least_seconds`.

  It is compiled by the real TPU compiler on any x86 Linux machine (`pip install libtpu`): what a network
  without some of its blocks or channels can gain on a pod is known without a pod.

  Args:
    function: of arrays, such as `model.apply`.
    *arguments: pytrees of arrays, or of their shapes.
    topology: generation and shape, of which one chip is taken; see `tpu_topology_mesh`.

  Raises:
    ModuleNotFoundError: without `libtpu`.
    ValueError: for a topology that the compiler does not know.
  """
  sharding = SingleDeviceSharding(tpu_topology_mesh(topology).devices.flat[0])
  given = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments
  )
  return least_seconds(jax.jit(function).lower(*given).compile())


def _devices(compiled: jax.stages.Compiled) -> list[jax.Device]:
  return sorted(
    jax.tree.leaves(compiled.input_shardings)[0].device_set, key=lambda device: device.id
  )


_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z\d\-]*)\(')
_CALLED = re.compile(
  r'(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)'
  r'|(?:branch_computations|called_computations)=\{([^}]*)\}'
)
_TRIPS = re.compile(r'known_trip_count\W+n\W+(\d+)')
_SHAPE = re.compile(r'\b(pred|[a-z]+\d+[a-z\d]*)\[([\d,]*)\]')


def collectives(hlo: str) -> dict[str, dict[str, int]]:
  """Counts the communication of a compiled program on one device.

  `count` is how often an operation of the kind runs in a step (once a trip in loops whose number of
  trips is known), `bytes` the sum of their results' sizes on one device: what an all-gather has gathered,
  what an all-reduce has summed, the part that a reduce-scatter leaves.

  >>> collectives('ENTRY %main (p: f32[8]) -> f32[8] {\\n  %r = f32[8]{0} all-reduce(%p)\\n}')
  {'all-reduce': {'count': 1, 'bytes': 32}}

  Args:
    hlo: the optimized module as text, `compiled.as_text()`.
  """
  entry, computation = None, None
  found, called = defaultdict(list), defaultdict(list)
  for line in hlo.splitlines():
    if header := _COMPUTATION.match(line):
      computation = header[2]
      entry = computation if header[1] else entry
    elif instruction := _INSTRUCTION.match(line):
      shape, kind = instruction[1], instruction[2]
      if kind.removesuffix('-start') in COLLECTIVES:
        size = _result_bytes(shape, kind)
        found[computation].append((kind.removesuffix('-start'), size))
      trips = _TRIPS.search(line) if kind == 'while' else None
      for one, several in _CALLED.findall(line):
        for name in [one] if one else re.findall(r'[\w.\-]+', several):
          called[computation].append((name, int(trips[1]) if trips else 1))

  totals: dict[str, dict[str, int]] = {}

  def visit(name: str, times: int) -> None:
    for kind, size in found[name]:
      total = totals.setdefault(kind, {'count': 0, 'bytes': 0})
      total['count'] += times
      total['bytes'] += times * size
    for callee, trips in called[name]:
      visit(callee, times * trips)

  visit(entry, 1)
  return dict(sorted(totals.items()))


def _result_bytes(shape: str, kind: str) -> int:
  """Returns the bytes of a collective's result; a started one returns (operands, results, ...)."""
  sizes = [_array_bytes(dtype, dims) for dtype, dims in _SHAPE.findall(shape)]
  if kind == 'collective-permute-start':
    return sizes[1]
  if kind in ('all-gather-start', 'reduce-scatter-start', 'all-to-all-start'):
    return sum(sizes[len(sizes) // 2 :])
  return sum(sizes)


def _array_bytes(dtype: str, dims: str) -> int:
  bits = 8 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0])
  for dim in filter(None, dims.split(',')):
    bits *= int(dim)
  return -(-bits // 8)
