"""A program on a mesh: its functions jitted, with the shardings of all that goes in and comes out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxlab.parallel.mesh import batch_sharding, check_batch_size, replicated
from jaxlab.parallel.partition import state_shardings

PyTree = Any


class ShardedProgram(NamedTuple):
  """What `shard_program` returns.

  Attributes:
    init: `key -> state`, jitted: every device makes its own part of the state, none makes the whole.
    step: `(state, batch) -> (state, metrics)`, jitted; the state passed in is donated (gone after the
      call), metrics are replicated.
    state: the state as `jax.ShapeDtypeStruct`s that carry their shardings.
    batch: the global batch, likewise.
  """

  init: Callable[[jax.Array], PyTree]
  step: Callable[[PyTree, PyTree], tuple[PyTree, dict[str, jax.Array]]]
  state: PyTree
  batch: PyTree


def shard_program(program: Any, mesh: Mesh, *, fsdp_min_size: int = 2**18) -> ShardedProgram:
  """Lays `program` (a `jaxlab.training.Program`) out on `mesh`, without computing anything.

  A result does not depend on the mesh beyond rounding: an average over the batch axis inside
  `program.step` is the average over the global batch, wherever its parts lie.

  Args:
    program: has `init`, `step`, `batch`, `rules`.
    mesh: from `make_mesh`.
    fsdp_min_size: see `state_shardings`.

  Raises:
    ValueError: if the batch does not divide over the mesh, or a partition rule cannot apply.
  """
  for size in {leaf.shape[0] for leaf in jax.tree.leaves(program.batch)}:
    check_batch_size(size, mesh)
  state = jax.eval_shape(program.init, jax.random.key(0))
  shardings = state_shardings(state, mesh, program.rules, fsdp_min_size=fsdp_min_size)
  over_batch, whole = batch_sharding(mesh), replicated(mesh)
  return ShardedProgram(
    init=jax.jit(program.init, out_shardings=shardings),
    step=jax.jit(
      program.step,
      in_shardings=(shardings, over_batch),
      out_shardings=(shardings, whole),
      donate_argnums=0,
    ),
    state=jax.tree.map(_abstract, state, shardings),
    batch=jax.tree.map(lambda leaf: _abstract(leaf, over_batch), program.batch),
  )


def _abstract(leaf: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
