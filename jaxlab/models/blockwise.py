"""A network cut into parts that run one after another: any Linen model, by paths, without touching it.

A part is a module together with what it was called with. It runs alone, on its slice of the variables,
with the hooks of the whole model. What lies between two parts (nothing, patch merging, masks) is computed by
the model itself: `reach` runs it with the parts before replaced by their known outputs and takes what the
next part is given; under `jit` everything else is dead code.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxlab.models.anatomy import anatomy as anatomy_of
from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.intercept import Hook, Site, any_of, apply, module_paths, raise_unmatched
from jaxlab.models.main_arrays import array_leaves, index_of, is_array, main_input, main_output

Array = jax.Array
PyTree = Any
CAPTURES = 'captures'


@dataclasses.dataclass(frozen=True)
class Skeleton:
  """A pytree without its arrays: `fill` puts arrays back."""

  tree: jax.tree_util.PyTreeDef
  static: tuple[Any, ...]
  shapes: tuple[jax.ShapeDtypeStruct, ...]

  @classmethod
  def of(cls, tree: PyTree) -> 'Skeleton':
    """Returns the skeleton of `tree`."""
    leaves, treedef = jax.tree.flatten(tree)
    static = tuple(None if is_array(leaf) else leaf for leaf in leaves)
    shapes = tuple(
      jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_array(leaf) else None for leaf in leaves
    )
    return cls(treedef, static, shapes)

  @property
  def array_shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of the arrays, in order."""
    return tuple(shape for shape in self.shapes if shape is not None)

  def fill(self, arrays: Sequence[Array]) -> PyTree:
    """Returns the tree with these arrays."""
    arrays = iter(arrays)
    leaves = [s if shape is None else next(arrays) for s, shape in zip(self.static, self.shapes)]
    return jax.tree.unflatten(self.tree, leaves)


@dataclasses.dataclass(frozen=True)
class Part:
  """A module that runs alone.

  Attributes:
    path: in the model; the empty string is the model.
    module: unbound copy.
    call: its arguments `(args, kwargs)`, without the arrays.
    out: what it returns, without the arrays.
    sources: for each array of its arguments, where it came from: `('out', i)`, the i-th array that the
      part before returned; `('in', i)`, the i-th that the part before was given; None: something else.
    lead: place of the activations among the arrays of its arguments (`main_input`), or None.
    main: place of the activations among the arrays that it returns (`main_output`), or None.
  """

  path: str
  module: nn.Module
  call: Skeleton
  out: Skeleton | None = None
  sources: tuple[tuple[str, int] | None, ...] = ()
  lead: int | None = 0
  main: int | None = 0

  @property
  def x_shape(self) -> jax.ShapeDtypeStruct:
    """Shape of the activations that it is given; raises ValueError if they cannot be told."""
    if self.lead is None:
      raise ValueError(
        f'{self.path!r} is called with {_shown(self.call)}: which array are its activations cannot be told. '
        f'Name it first in the signature, or hand it over by position.'
      )
    return self.call.array_shapes[self.lead]

  @property
  def y_shape(self) -> jax.ShapeDtypeStruct:
    """Shape of the activations that it returns; raises ValueError if they cannot be told."""
    if self.main is None:
      raise ValueError(
        f'{self.path!r} returns {_shown(self.out)}: which array goes on to the next block cannot be told. '
        f'Return it alone, or first in a tuple.'
      )
    return self.out.array_shapes[self.main]

  def run(
    self, variables: PyTree, leaves: Sequence[Array], hooks: Sequence[Hook], **options: Any
  ) -> PyTree:
    """Returns what the module returns for arrays `leaves` of its arguments; `options` are Linen's."""
    args, kwargs = self.call.fill(leaves)
    return apply(self.module, variables, *args, hooks=hooks, prefix=self.path, **options, **kwargs)


def _shown(skeleton: Skeleton) -> str:
  names = [f'{shape.dtype}{list(shape.shape)}' for shape in skeleton.array_shapes]
  return f'{skeleton.tree} of {", ".join(names) or "no array"}'


def slice_variables(variables: Mapping[str, PyTree], path: str) -> dict[str, PyTree]:
  """Returns the part of every variable collection that lies below `path`."""
  found = {}
  for name, tree in variables.items():
    for key in path.split('/') if path else ():
      tree = tree.get(key) if isinstance(tree, Mapping) else None
      if tree is None:
        break
    if tree is not None:
      found[name] = tree
  return found


def relative(path: str, root: str) -> str:
  """Returns `path` as seen from the module at `root`."""
  return path.removeprefix(root).removeprefix('/')


def find_blocks(
  model: nn.Module,
  variables: PyTree,
  args: tuple,
  kwargs: dict[str, Any],
  hooks: Sequence[Hook],
  blocks: str | None = None,
  anatomy: Anatomy | None = None,
) -> tuple[Part, list[Part]]:
  """Returns the model as a part, and its blocks in order of execution.

  Traces abstractly: no computation.

  Args:
    model: any Linen module.
    variables: its variables.
    args: its positional arguments, arrays or shapes.
    kwargs: its keyword arguments.
    hooks: of the model.
    blocks: regular expression of the blocks' paths; None: the blocks of `anatomy`.
    anatomy: of the model; None: what `models.anatomy` says.

  Raises:
    ValueError: if the model is unknown, no module or not every block is there, or blocks are nested, called
      twice or stacked.
  """
  wanted = ()
  if blocks is None:
    wanted = (anatomy_of(model) if anatomy is None else anatomy).block_paths
    if not wanted:
      raise ValueError(f'The anatomy of {type(model).__name__} names no blocks: give blocks=.')
  pattern = any_of(wanted) if blocks is None else blocks
  root = Part('', model, Skeleton.of((args, kwargs)))
  parts = find_parts(root, variables, array_leaves((args, kwargs)), hooks, pattern)
  missing = sorted(set(wanted) - {part.path for part in parts})
  if missing or not parts:
    paths = module_paths(model, *args, **kwargs)
    raise_unmatched(missing or [pattern], paths, 'block pattern', 'module')
  return root, parts


def find_parts(
  root: Part,
  variables: PyTree,
  leaves: Sequence[Array],
  hooks: Sequence[Hook],
  pattern: str,
) -> list[Part]:
  """Returns the modules below `root` whose path matches `pattern`, in order of execution.

  Traces abstractly: no computation.

  Args:
    root: the model, or a part of it.
    variables: of the root.
    leaves: arrays (or shapes) of its arguments.
    hooks: of the model.
    pattern: regular expression over whole paths, seen from the model.

  Raises:
    ValueError: if parts are nested, called twice or stacked under `nn.scan`. No match is an empty list.
  """
  found: list[Part] = []
  given: list[list[Array]] = []
  returned: list[list[Array]] = []
  open_paths: list[str] = []

  def source(leaf: Array) -> tuple[str, int] | None:
    if returned:
      for kind, candidates in (('out', returned[-1]), ('in', given[-1])):
        for index, candidate in enumerate(candidates):
          if candidate is leaf:
            return kind, index
    return None

  def visit(site: Site, call: Callable, *args, **kwargs):
    if open_paths:
      raise ValueError(
        f'{site.path!r} lies inside {open_paths[-1]!r}, and both match {pattern!r}: choose a pattern that '
        f'matches the blocks alone.'
      )
    if any(part.path == site.path for part in found):
      raise ValueError(
        f'{site.path!r} is called twice: parts are worked on one after another, which a shared one cannot be.'
      )
    _check_not_stacked(site, slice_variables(variables, relative(site.path, root.path)))
    arrays = array_leaves((args, kwargs))
    sources = tuple(source(leaf) for leaf in arrays)
    open_paths.append(site.path)
    out = call(*args, **kwargs)
    open_paths.pop()
    module = site.module.clone(parent=None, name=None)
    x = main_input(site, args, kwargs)
    places = index_of(x, (args, kwargs)), index_of(main_output(out, x), out)
    call = Skeleton.of((args, kwargs)), Skeleton.of(out)
    found.append(Part(site.path, module, *call, sources, *places))
    given.append(arrays)
    returned.append(array_leaves(out))
    return out

  hooks = [*hooks, Hook(pattern, call=visit)]
  jax.eval_shape(lambda v, x: root.run(v, x, hooks), variables, list(leaves))
  return found


def _check_not_stacked(site: Site, variables: Mapping[str, PyTree]) -> None:
  inside = site.module.variables.get('params', {})
  shapes = lambda tree: jax.tree.map(lambda leaf: tuple(leaf.shape), dict(tree))  # noqa: E731
  same = shapes(inside) == shapes(variables.get('params', {}))
  if not same:
    raise ValueError(
      f'The parameters of {site.path!r} are stacked (nn.scan): use the model without scan, with '
      f'`jaxlab.models.unstack_blocks` parameters.'
    )


def reach(
  root: Part,
  parts: Sequence[Part],
  index: int,
  variables: PyTree,
  leaves: Sequence[Array],
  outputs: Mapping[int, Sequence[Array]],
  hooks: Sequence[Hook],
) -> list[Array]:
  """Returns the arrays that `parts[index]` is given, without running any of `parts`.

  Args:
    root: what the parts lie in.
    parts: in order of execution.
    index: `len(parts)`: the arrays that the root returns.
    variables: of the root.
    leaves: arrays of the root's arguments.
    outputs: arrays that parts before `index` return, by their index; those that are missing are taken
      as NaN, so that a wrong assumption of independence shows.
    hooks: of the model.
  """
  return reach_with_state(root, parts, index, variables, leaves, outputs, hooks)[0]


def reach_with_state(
  root: Part,
  parts: Sequence[Part],
  index: int,
  variables: PyTree,
  leaves: Sequence[Array],
  outputs: Mapping[int, Sequence[Array]],
  hooks: Sequence[Hook],
  mutable: Sequence[str] = (),
) -> tuple[list[Array], PyTree]:
  """Returns what `reach` does, and the collections `mutable` that hooks between the parts have written."""
  order = {part.path: i for i, part in enumerate(parts)}

  def visit(site: Site, call: Callable, *args, **kwargs):
    i = order[site.path]
    given = array_leaves((args, kwargs))
    if i == index:
      for j, leaf in enumerate(given):
        site.write(f'argument{j}', leaf)
    known = outputs.get(i)
    if known is None:
      shapes = parts[i].out.array_shapes
      if [leaf.shape for leaf in given] != [shape.shape for shape in parts[i].call.array_shapes]:
        shapes = array_leaves(call(*args, **kwargs))  # another batch size; its values are dead code
      known = [_unknown(shape) for shape in shapes]
    return parts[i].out.fill(known)

  hooks = [*hooks, Hook(any_of(list(order)), call=visit, collection=CAPTURES)]
  out, state = root.run(variables, leaves, hooks, mutable=[CAPTURES, *mutable])
  if index == len(parts):
    return array_leaves(out), state
  captured = slice_variables(state, relative(parts[index].path, root.path))[CAPTURES]
  found = [captured[f'argument{j}'] for j in range(len(parts[index].call.array_shapes))]
  return found, state


def _unknown(shape: jax.ShapeDtypeStruct | Array) -> Array:
  value = jnp.nan if jnp.issubdtype(shape.dtype, jnp.inexact) else 0
  return jnp.full(shape.shape, value, shape.dtype)


class Programs:
  """Jitted functions, of which those that lower to the same program share one compilation.

  `programs(fn, *args)` returns a jitted function equivalent to `fn` for such arguments: twelve blocks of one
  shape are traced twelve times, but compiled once. Functions of other arguments (in number, structure, shapes
  or dtypes, also where a function does not read them), or that read others of them, share nothing.
  """

  def __init__(self):
    self._by_key: dict[Any, Callable] = {}

  def __call__(self, fn: Callable, *args: Any, **options: Any) -> Callable:
    """Returns a jitted `fn`; `options` go to `jax.jit`."""
    # Arguments that are not read stay in the text: else functions that read different ones look alike.
    jitted = jax.jit(fn, keep_unused=True, **options)
    traced = jitted.trace(*args)
    lowered = traced.lower()
    digest = hashlib.sha256(lowered.as_text().encode())
    for constant in traced.jaxpr.consts:
      digest.update(np.asarray(constant).tobytes())
    # Called with other arguments, a function would be traced anew.
    given = tuple(map(jax.typeof, jax.tree.leaves(args)))
    key = (digest.digest(), jax.tree.structure(args), given, jax.tree.structure(lowered.out_info))
    return self._by_key.setdefault(key, jitted)


def to_host(array: Array) -> np.ndarray:
  """Returns the values in host memory: on a CPU, whose device memory that is, the array's own."""
  return np.asarray(array)


class Parked:
  """An array in host memory, each host its own shards; `restore` lays it out on the devices as it was."""

  def __init__(self, array: Array):
    self.shape, self.dtype, self._sharding = array.shape, array.dtype, array.sharding
    self._shards = [(shard.device, to_host(shard.data)) for shard in array.addressable_shards]

  def restore(self) -> Array:
    """Returns the array on its devices."""
    shards = [jax.device_put(data, device) for device, data in self._shards]
    return jax.make_array_from_single_device_arrays(self.shape, self._sharding, shards)


def park(tree: PyTree) -> PyTree:
  """Returns `tree` with its arrays in host memory."""
  return jax.tree.map(Parked, tree)


def restore(tree: PyTree) -> PyTree:
  """Returns `tree` with its parked arrays on their devices."""
  return jax.tree.map(lambda leaf: leaf.restore(), tree)
