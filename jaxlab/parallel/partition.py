"""Partition rules: which array of the state is split along which axis of the mesh."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlab.trees import tree_paths

PyTree = Any
Rules = Sequence[tuple[str, PartitionSpec]]


def fsdp_spec(shape: Sequence[int], mesh: Mesh, min_size: int) -> PartitionSpec:
  """Returns the automatic rule: `fsdp` on the largest dimension that it divides.

  Arrays of fewer than `min_size` elements, and those that no dimension of fits, are replicated: to
  gather a small array costs more time than its copies cost memory.
  """
  fsdp = mesh.shape['fsdp']
  fitting = [axis for axis, size in enumerate(shape) if size and size % fsdp == 0]
  if fsdp == 1 or math.prod(shape) < min_size or not fitting:
    return PartitionSpec()
  axis = max(fitting, key=lambda axis: shape[axis])
  return PartitionSpec(*[None] * axis, 'fsdp')


def fsdp_shardings(
  tree: PyTree, mesh: Mesh, rules: Rules = (), *, fsdp_min_size: int = 2**18
) -> PyTree:
  """Returns the sharding of every array of any pytree: by rules, else by the automatic one, `fsdp_spec`.

  For weights that are not trained here: `jax.device_put(variables, fsdp_shardings(variables, mesh))`.

  Args:
    tree: of arrays or `jax.ShapeDtypeStruct`s.
    mesh: from `make_mesh`.
    rules: as of `state_shardings`, for paths in the tree (`params/layers_0/mlp/up_proj/kernel`).
    fsdp_min_size: number of elements from which an array is split.

  Raises:
    ValueError: as `state_shardings` does.
  """
  decide, finish = _deciding(rules, mesh, fsdp_min_size)
  paths = tree_paths(tree)
  shardings = [NamedSharding(mesh, decide(path, tuple(leaf.shape))) for path, leaf in paths]
  finish([path for path, _ in paths])
  return jax.tree.unflatten(jax.tree.structure(tree), shardings)


def state_shardings(
  state: PyTree, mesh: Mesh, rules: Rules = (), *, fsdp_min_size: int = 2**18
) -> PyTree:
  """Returns the sharding of every array of a train state.

  `rules` is an ordered list of `(pattern, spec)`; the first pattern that matches a whole path
  (`re.fullmatch`) decides. For a parameter the path is that in `state.params` (`layer1_0/conv1/kernel`).
  Everything else *follows*: an array of the optimizer's state, of a teacher or of an average whose path
  ends in the path of a parameter of the same shape is laid out as that parameter is. What follows no
  parameter is matched by its path in the state (`extra/queue`). Where no rule matches, the automatic
  rule `fsdp_spec` applies; the rule `('.*', PartitionSpec())` at the list's end turns it off.

  Args:
    state: a `TrainState` of `jax.ShapeDtypeStruct`s, e.g. `jax.eval_shape(program.init, key)`.
    mesh: from `make_mesh`.
    rules: patterns and specs over the mesh's axes.
    fsdp_min_size: number of elements from which the automatic rule splits an array; 2**18 float32
      are 1 MiB.

  Returns:
    A tree of `NamedSharding`s with the structure of `state`.

  Raises:
    ValueError: if a pattern matches nothing, or a spec cannot apply to an array that it decides on:
      more entries than dimensions, an unknown axis, or a size that the axes do not divide.
  """
  return program_shardings(state, {}, mesh, rules, fsdp_min_size=fsdp_min_size)[0]


def program_shardings(
  state: PyTree, frozen: PyTree, mesh: Mesh, rules: Rules = (), *, fsdp_min_size: int = 2**18
) -> tuple[PyTree, PyTree]:
  """Returns the shardings of a train state, and of the arrays that its steps read and do not change.

  Both as `state_shardings` has it: what follows no parameter is matched by `frozen/teacher/...`.
  """
  shapes = {path: tuple(leaf.shape) for path, leaf in tree_paths(state.params)}
  decide, finish = _deciding(rules, mesh, fsdp_min_size)
  params = {path: decide(path, shape) for path, shape in shapes.items()}
  specs, others = [], []
  paths = tree_paths(state) + [(f'frozen/{path}', leaf) for path, leaf in tree_paths(frozen)]
  for path, leaf in paths:
    followed = _followed(path, tuple(leaf.shape), shapes)
    if followed is None:
      others.append(path)
    specs.append(params[followed] if followed else decide(path, tuple(leaf.shape)))
  finish([*shapes, *others])
  shardings = [NamedSharding(mesh, spec) for spec in specs]
  return jax.tree.unflatten(jax.tree.structure((state, frozen)), shardings)


def _deciding(
  rules: Rules, mesh: Mesh, min_size: int
) -> tuple[Callable[[str, tuple[int, ...]], PartitionSpec], Callable[[Sequence[str]], None]]:
  """Returns what decides on a path and a shape, and what raises ValueError if a rule has decided on none."""
  unused = {pattern for pattern, _ in rules}

  def decide(path: str, shape: tuple[int, ...]) -> PartitionSpec:
    matching = [(pattern, spec) for pattern, spec in rules if re.fullmatch(pattern, path)]
    unused.difference_update(pattern for pattern, _ in matching)
    if not matching:
      return fsdp_spec(shape, mesh, min_size)
    _check_spec(*matching[0], path, shape, mesh)
    return matching[0][1]

  def finish(known: Sequence[str]) -> None:
    if unused:
      raise ValueError(
        f'Partition rule(s) {", ".join(map(repr, sorted(unused)))} match none of the {len(known)} '
        f'paths, such as {", ".join(known[:8])}.'
      )

  return decide, finish


def _followed(path: str, shape: tuple[int, ...], params: dict[str, tuple[int, ...]]) -> str | None:
  """Returns the longest path of a parameter of this shape that `path` ends in."""
  parts = path.split('/')
  for start in range(1, len(parts)):
    ending = '/'.join(parts[start:])
    if params.get(ending) == shape:
      return ending
  return None


def _check_spec(
  pattern: str, spec: PartitionSpec, path: str, shape: tuple[int, ...], mesh: Mesh
) -> None:
  """Raises ValueError if `spec` cannot apply to an array of `shape`."""
  about = f'Partition rule ({pattern!r}, {spec}) cannot apply to {path} of shape {list(shape)}: '
  if len(spec) > len(shape):
    raise ValueError(f'{about}it has {len(spec)} entries for {len(shape)} dimension(s).')
  for axis, names in enumerate(spec):
    names = (names,) if isinstance(names, str) else tuple(names or ())
    unknown = [name for name in names if name not in mesh.shape]
    if unknown:
      raise ValueError(f'{about}the mesh has axes {list(mesh.shape)}, not {unknown}.')
    parts = math.prod(mesh.shape[name] for name in names)
    if shape[axis] % parts:
      raise ValueError(
        f'{about}dimension {axis} of size {shape[axis]} does not divide by '
        f'{" x ".join(names)} = {parts}.'
      )
