"""A program on a mesh: its functions jitted, with the shardings of all that goes in and comes out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxlab.parallel.mesh import batch_sharding, check_batch_size, replicated
from jaxlab.parallel.partition import program_shardings, tree_paths

PyTree = Any


class ShardedProgram(NamedTuple):
  """What `shard_program` returns.

  Attributes:
    init: `key -> state`, jitted: every device makes its own part of the state, none makes the whole.
    step: `(state, frozen, batch) -> (state, metrics)`, jitted; the state passed in is donated (gone after
      the call), metrics are replicated.
    state: the state as `jax.ShapeDtypeStruct`s that carry their shardings.
    batch: the global batch, likewise.
    frozen: what no step changes, likewise.
  """

  init: Callable[[jax.Array], PyTree]
  step: Callable[[PyTree, PyTree, PyTree], tuple[PyTree, dict[str, jax.Array]]]
  state: PyTree
  batch: PyTree
  frozen: PyTree


def shard_program(program: Any, mesh: Mesh, *, fsdp_min_size: int = 2**18) -> ShardedProgram:
  """Lays `program` (a `jaxlab.training.Program`) out on `mesh`, without computing anything.

  A result does not depend on the mesh beyond rounding: an average over the batch axis inside
  `program.step` is the average over the global batch, wherever its parts lie.

  Args:
    program: has `init`, `step`, `batch`, `rules`, `frozen`.
    mesh: from `make_mesh`.
    fsdp_min_size: see `state_shardings`.

  Raises:
    ValueError: if the batch does not divide over the mesh, or a partition rule cannot apply.
  """
  for size in {leaf.shape[0] for leaf in jax.tree.leaves(program.batch)}:
    check_batch_size(size, mesh)
  state = jax.eval_shape(program.init, jax.random.key(0))
  shardings, frozen = program_shardings(
    state, program.frozen, mesh, program.rules, fsdp_min_size=fsdp_min_size
  )
  over_batch, whole = batch_sharding(mesh), replicated(mesh)

  def step(state: PyTree, frozen: PyTree, batch: PyTree) -> tuple[PyTree, dict[str, jax.Array]]:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return program.step(state, frozen, batch)

  return ShardedProgram(
    init=jax.jit(program.init, out_shardings=shardings),
    step=jax.jit(
      step,
      in_shardings=(shardings, frozen, over_batch),
      out_shardings=(shardings, whole),
      donate_argnums=0,
    ),
    state=abstract(state, shardings),
    batch=abstract(program.batch, over_batch),
    frozen=abstract(program.frozen, frozen),
  )


def place(values: PyTree, like: PyTree, what: str = 'arrays') -> PyTree:
  """Returns `values` laid out as `like` says, `jax.ShapeDtypeStruct`s with shardings.

  Args:
    values: arrays, equal in all processes.
    like: such as `ShardedProgram.frozen`.
    what: how the caller calls them, for the message.

  Raises:
    ValueError: for values of other paths, shapes or types; all are listed.
  """

  def described(tree: PyTree) -> dict[str, str]:
    return {path: f'{leaf.dtype}{list(leaf.shape)}' for path, leaf in tree_paths(tree)}

  given, wanted = described(values), described(like)
  if given != wanted:
    lines = [
      f'  {path}: {wanted.get(path, "nothing")} wanted, {given.get(path, "nothing")} given'
      for path in sorted({*given, *wanted})
      if given.get(path) != wanted.get(path)
    ]
    raise ValueError(f'The {what} do not fit the program:\n' + '\n'.join(lines))
  values = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(values))
  return jax.tree.map(lambda leaf, own: _put(leaf, own.sharding), values, like)


def _put(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
  local = isinstance(leaf, jax.Array) and leaf.is_fully_addressable
  if local and not sharding.is_fully_addressable:
    # jax 0.10 makes an array whose shards cannot be read of one on a process's only device.
    leaf = np.asarray(leaf)
  return jax.device_put(leaf, sharding)


def abstract(tree: PyTree, shardings: PyTree) -> PyTree:
  """Returns shapes and dtypes of `tree` with shardings, to compile for: arrays that are not there.

  Args:
    tree: arrays, or their shapes.
    shardings: of all of them, or a tree of them; one may stand for a whole subtree.
  """

  def given(sharding: jax.sharding.Sharding, part: PyTree) -> PyTree:
    return jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), part
    )

  return jax.tree.map(given, shardings, tree)
