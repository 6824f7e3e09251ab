"""Ranges of all inputs of a network in one pass over a batch, compiled a kind of block at a time."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn

from jaxlab.models.anatomy import anatomy
from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.blockwise import (
  Part,
  Skeleton,
  find_blocks,
  reach_with_state,
  relative,
  slice_variables,
)
from jaxlab.models.intercept import Hook, Site, any_of, apply
from jaxlab.models.main_arrays import array_leaves
from jaxlab.quantizers.networks import operands
from jaxlab.quantizers.networks.batches import Batch, Positions, as_call
from jaxlab.quantizers.networks.input_ranges import input_constants, search_hook
from jaxlab.quantizers.networks.operands import METHODS, Plan
from jaxlab.quantizers.networks.quantized import COLLECTION
from jaxlab.quantizers.networks.rules import Bits

Array = jax.Array
PyTree = Any
Constants = dict[str, dict[str, Array]]
Kinds = tuple[tuple[str, str], ...]


def calibrate_inputs(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  x: Batch,
  todo: Plan,
  parts: Anatomy | None = None,
  positions: Positions | None = None,
  /,
  **kwargs: Any,
) -> Constants:
  """Returns `{path: constants}` of the collection's `input`, from one forward pass over the batch `x`.

  Ranges are fixed in order of execution (`search_hook`), those of a module that is called several times by
  all its calls. Per-channel constants also hold `value` `[channels]`, what the channels of scale 0 are equal
  to.

  Blocks (of the anatomy `parts`, or of the model's own) with equal settings and shapes share one compilation,
  for all bit-widths. A model without blocks that
  follow each other, and one that is traced, is a single program (compiled at each call if the model has
  unhashable fields).

  Args:
    model: any Linen module.
    variables: its variables, kernels quantized.
    x: a batch; see `batches`.
    todo: what is quantized.
    parts: see above.
    positions: those of the batch that count; None: all.
    **kwargs: passed to the model.

  Raises:
    ValueError: if a module's variables are not carried through a transformation around it, or the shape of
      its input does not tell which of its positions count.
  """
  variables = {name: tree for name, tree in variables.items() if name != COLLECTION}
  given = as_call(x, kwargs)
  call = Skeleton.of(given)
  arrays = (variables, array_leaves(given))
  if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays)):
    network, whole = None, _whole
  else:
    try:
      network, whole = _cut(model, _Shapes.of(variables), todo.kinds, call, parts), _jitted_whole
    except TypeError:  # the model cannot be hashed
      network, whole = None, None
  if network is not None:
    found = _by_blocks(network, *arrays, todo.input_bits, positions)
  else:
    static = {'model': model, 'kinds': todo.kinds, 'call': call}
    if whole is None:
      found = jax.jit(functools.partial(_whole, **static))(*arrays, todo.input_bits, positions)
    else:
      found = whole(*arrays, todo.input_bits, positions, **static)
  return {path: found[path] for path, _ in todo.kinds}


def _whole(variables, leaves, bits, positions, *, model, kinds, call) -> Constants:
  hooks = [search_hook(dict(kinds), bits, positions)]
  args, kwargs = call.fill(leaves)
  _, state = apply(model, variables, *args, hooks=hooks, **{**kwargs, 'mutable': [COLLECTION]})
  return input_constants(state.get(COLLECTION, {}))


_jitted_whole = jax.jit(_whole, static_argnames=('model', 'kinds', 'call'))


@dataclasses.dataclass(frozen=True)
class _Shapes:
  """Shapes and dtypes of a pytree of arrays, hashable."""

  treedef: jax.tree_util.PyTreeDef
  leaves: tuple[jax.ShapeDtypeStruct, ...]

  @classmethod
  def of(cls, tree: PyTree) -> '_Shapes':
    leaves, treedef = jax.tree.flatten(tree)
    return cls(treedef, tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves))

  def tree(self) -> PyTree:
    return jax.tree.unflatten(self.treedef, self.leaves)


class _Network(NamedTuple):
  """A model cut into blocks, and the inputs to be quantized in them and between them.

  Attributes:
    root: the model.
    blocks: in order of execution.
    inside: for each block, the inputs in it, seen from it.
    outside: the inputs before each block, and behind the last one.
  """

  root: Part
  blocks: tuple[Part, ...]
  inside: tuple[Kinds, ...]
  outside: tuple[Kinds, ...]


@functools.lru_cache(maxsize=64)
def _cut(
  model: nn.Module, shapes: _Shapes, kinds: Kinds, call: Skeleton, parts: Anatomy | None
) -> _Network | None:
  """Returns the model in blocks, for equal arguments the same objects; None if it has no blocks in a row."""
  variables = shapes.tree()
  args, kwargs = call.fill(call.array_shapes)
  pattern = _block_pattern(model, parts)
  places: dict[str, set[int]] = {}
  finished: list[str] = []
  inner: set[str] = set()
  running: list[str] = []

  def place(site: Site, visit: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if running:
      inner.add(site.path)
    places.setdefault(site.path, set()).add(len(finished))
    is_block = re.fullmatch(pattern, site.path)
    running.extend([site.path] if is_block else [])
    out = visit(*args, **kwargs)
    if is_block:
      finished.append(running.pop())
    return out

  try:
    everywhere = [Hook('.*', call=place, methods=METHODS)]
    root, blocks = find_blocks(model, variables, args, kwargs, everywhere, pattern)
    hash(tuple(blocks))
  except (TypeError, ValueError):  # no blocks, or nested, shared, stacked or unhashable ones
    return None
  inside, outside = [], [[] for _ in range(len(blocks) + 1)]
  rest = dict(kinds)
  for block in blocks:
    own = [path for path in rest if f'{path}/'.startswith(f'{block.path}/')]
    inside.append(tuple((relative(path, block.path), rest.pop(path)) for path in own))
  for path, kind in rest.items():
    if (
      path in inner or len(places[path]) > 1
    ):  # called in blocks, or here and there: by all its calls
      return None
    outside[min(places[path])].append((path, kind))
  return _Network(root, tuple(blocks), tuple(inside), tuple(map(tuple, outside)))


def _block_pattern(model: nn.Module, parts: Anatomy | None) -> str:
  """Returns the pattern of the blocks, for a model without an anatomy of the usual names of blocks.

  Where it cuts changes what is compiled, never a result.
  """
  try:
    paths = (anatomy(model) if parts is None else parts).block_paths
  except (TypeError, ValueError):
    paths = ()
  return any_of(paths) if paths else r'(.*/)?(blocks?|layers?|h|features|stages?)(\d*_\d+)+'


def _by_blocks(
  network: _Network,
  variables: PyTree,
  images: list[Array],
  bits: Mapping[str, Bits],
  positions: Positions | None,
) -> Constants:
  blocks = network.blocks
  # Of the blocks themselves only what goes in and comes out counts for what lies between them.
  borders = tuple(dataclasses.replace(block, module=None) for block in blocks)
  inside: Constants = {}
  between: Constants = {}
  outputs: dict[int, list[Array]] = {}
  leaves: list[Array] = []
  for index, kinds in enumerate(network.outside):
    block = blocks[index] if index < len(blocks) else None
    if block and index and not kinds and None not in block.sources:
      pool = {'in': leaves, 'out': outputs[index - 1]}
      leaves = [pool[kind][i] for kind, i in block.sources]
    elif block or kinds:
      known = {**variables, COLLECTION: operands.collection(between, {}, {})}
      own = {path: bits[path] for path, _ in kinds}
      static = {
        'root': network.root,
        'blocks': borders,
        'kinds': sum(network.outside[: index + 1], ()),
      }
      leaves, between = _between(known, images, outputs, own, positions, index=index, **static)
    if block:
      kinds, path = network.inside[index], block.path
      own = {name: bits[operands.join(path, name)] for name, _ in kinds}
      alone = dataclasses.replace(block, path='', out=None, sources=())
      slices = slice_variables(variables, path)
      outputs[index], new = _inside(slices, leaves, own, positions, block=alone, kinds=kinds)
      inside |= {operands.join(path, name): constants for name, constants in new.items()}
  return inside | between


@functools.partial(jax.jit, static_argnames=('root', 'blocks', 'index', 'kinds'))
def _between(variables, images, outputs, bits, positions, *, root, blocks, index, kinds):
  """Returns what block `index` is given, and the constants of all inputs between blocks so far."""
  hooks = [search_hook(dict(kinds), bits, positions)]
  leaves, state = reach_with_state(
    root, blocks, index, variables, images, outputs, hooks, [COLLECTION]
  )
  return leaves, input_constants(state.get(COLLECTION, {}))


@functools.partial(jax.jit, static_argnames=('block', 'kinds'))
def _inside(variables, leaves, bits, positions, *, block, kinds):
  """Returns what a block returns, and the constants of its inputs."""
  hooks = [search_hook(dict(kinds), bits, positions)]
  out, state = block.run(variables, leaves, hooks, mutable=[COLLECTION])
  return array_leaves(out), input_constants(state.get(COLLECTION, {}))
