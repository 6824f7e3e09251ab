"""What a train step costs: time and memory next to another's, in one process."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlab import parallel
from jaxlab.parallel import aot
from jaxlab.training import Program, TrainState

PyTree = Any


class Side(NamedTuple):
  """A step that is measured.

  Attributes:
    program: whose.
    begin: applied to the drawn state.
    frozen: the values of `program.frozen`.
  """

  program: Program
  begin: Callable[[TrainState], TrainState] = lambda state: state
  frozen: PyTree = None


def measure(
  sides: Mapping[str, Side], mesh: jax.sharding.Mesh, repeats: int = 5, steps: int = 4
) -> dict[str, dict[str, float]]:
  """Returns `milliseconds`, `megabytes` and `gigaflops` of a step by name.

  Milliseconds are the minimum over repeats that alternate between the sides, of `steps` steps each on a batch
  of zeros that lies on the device (without repeats: none); megabytes what the compiled step needs on one
  device at once, arguments and results included, gigaflops what it computes there (`aot.report`).
  """
  found: dict[str, dict[str, float]] = {}
  ready = {}
  for name, side in sides.items():
    sharded = parallel.shard_program(side.program, mesh)
    compiled = sharded.step.lower(sharded.state, sharded.frozen, sharded.batch).compile()
    needs = aot.report(compiled)
    found[name] = {'megabytes': needs['hbm']['total'] / 1e6, 'gigaflops': needs['flops'] / 1e9}
    if not repeats:
      continue
    state = side.begin(sharded.init(jax.random.key(0)))
    state = jax.tree.map(jnp.copy, parallel.place(state, sharded.state, 'state'))
    frozen = {} if side.frozen is None else side.frozen
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sharded.batch)
    batch = parallel.place(zeros, sharded.batch, 'batch')
    ready[name] = (compiled, state, parallel.place(frozen, sharded.frozen, 'frozen arrays'), batch)

  def several(name: str) -> None:
    compiled, state, frozen, batch = ready[name]
    for _ in range(steps):
      state, metrics = compiled(state, frozen, batch)
    jax.block_until_ready(metrics)
    ready[name] = compiled, state, frozen, batch

  for name in ready:
    several(name)
  times = alternate({name: lambda name=name: several(name) for name in ready}, repeats)
  for name, seconds in times.items():
    found[name]['milliseconds'] = 1000 * seconds / steps
  return found


def relative(
  sides: Mapping[str, Side], base: str, mesh: jax.sharding.Mesh, repeats: int = 5
) -> dict[str, dict[str, float]]:
  """Returns `time`, `memory` and `flops` of a step by name, over those of side `base`; see `measure`."""
  found = measure(sides, mesh, repeats)
  kinds = {'time': 'milliseconds', 'memory': 'megabytes', 'flops': 'gigaflops'}
  return {
    name: {kind: own[unit] / found[base][unit] for kind, unit in kinds.items()}
    for name, own in found.items()
  }


def alternate(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
  """Returns each side's shortest time in seconds, the sides taken in turns."""
  times: dict[str, list[float]] = {name: [] for name in sides}
  for _ in range(repeats):
    for name, run in sides.items():
      start = time.perf_counter()
      run()
      times[name].append(time.perf_counter() - start)
  return {name: min(values) for name, values in times.items()}
