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
  array_leaves,
  find_blocks,
  reach_with_state,
  relative,
  slice_variables,
)
from jaxlab.models.intercept import Hook, Site, any_of, apply
from jaxlab.quantizers.networks import operands
from jaxlab.quantizers.networks.input_ranges import input_constants, search_hook
from jaxlab.quantizers.networks.operands import Plan
from jaxlab.quantizers.networks.quantized import COLLECTION
from jaxlab.quantizers.networks.rules import Bits

Array = jax.Array
PyTree = Any
Constants = dict[str, dict[str, Array]]
Kinds = tuple[tuple[str, str], ...]


def calibrate_inputs(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  x: Array,
  todo: Plan,
  parts: Anatomy | None = None,
  **kwargs: Any,
) -> Constants:
  """Returns `{path: constants}` of the collection's `input`, from one forward pass over the batch `x`.

  Ranges are fixed in order of execution (`search_hook`). Per-channel constants also hold `value`
  `[channels]`, what the channels of scale 0 are equal to.

  Blocks (of the anatomy `parts`, or of the model's own) with equal settings and shapes share one compilation,
  for all bit-widths. A model without blocks that
  follow each other, and one that is traced, is a single program (compiled at each call if the model has
  unhashable fields).
  """
  variables = {name: tree for name, tree in variables.items() if name != COLLECTION}
  kwargs = tuple(kwargs.items())
  arrays = (variables, x)
  if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arrays)):
    network, whole = None, _whole
  else:
    try:
      network, whole = _cut(model, _Shapes.of(arrays), todo.kinds, kwargs, parts), _jitted_whole
    except TypeError:  # the model cannot be hashed
      network, whole = None, None
  if network is not None:
    found = _by_blocks(network, *arrays, todo.input_bits, dict(kwargs))
  else:
    static = {'model': model, 'kinds': todo.kinds, 'kwargs': kwargs}
    if whole is None:
      found = jax.jit(functools.partial(_whole, **static))(*arrays, todo.input_bits)
    else:
      found = whole(*arrays, todo.input_bits, **static)
  return {path: found[path] for path, _ in todo.kinds}


def _whole(variables, x, bits, *, model, kinds, kwargs) -> Constants:
  hooks = [search_hook(dict(kinds), bits)]
  _, state = apply(model, variables, x, hooks=hooks, mutable=[COLLECTION], **dict(kwargs))
  return input_constants(state.get(COLLECTION, {}))


_jitted_whole = jax.jit(_whole, static_argnames=('model', 'kinds', 'kwargs'))


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
  model: nn.Module, shapes: _Shapes, kinds: Kinds, kwargs: tuple, parts: Anatomy | None
) -> _Network | None:
  """Returns the model in blocks, for equal arguments the same objects; None if it has no blocks in a row."""
  variables, x = shapes.tree()
  pattern = _block_pattern(model, parts)
  places: dict[str, int] = {}
  finished: list[str] = []

  def place(site: Site, visit: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    places.setdefault(site.path, len(finished))
    out = visit(*args, **kwargs)
    if re.fullmatch(pattern, site.path):
      finished.append(site.path)
    return out

  try:
    everywhere = [Hook('.*', call=place)]
    root, blocks = find_blocks(model, variables, (x,), dict(kwargs), everywhere, pattern)
    hash(tuple(blocks))
  except (TypeError, ValueError):  # no blocks, or nested, shared, stacked or unhashable ones
    return None
  inside, outside = [], [[] for _ in range(len(blocks) + 1)]
  rest = dict(kinds)
  for block in blocks:
    own = [path for path in rest if path.startswith(f'{block.path}/')]
    inside.append(tuple((relative(path, block.path), rest.pop(path)) for path in own))
  for path, kind in rest.items():
    outside[places[path]].append((path, kind))
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
  x: Array,
  bits: Mapping[str, Bits],
  kwargs: Mapping[str, Any],
) -> Constants:
  blocks = network.blocks
  # Of the blocks themselves only what goes in and comes out counts for what lies between them.
  borders = tuple(dataclasses.replace(block, module=None) for block in blocks)
  images = array_leaves(((x,), dict(kwargs)))
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
      leaves, between = _between(known, images, outputs, own, index=index, **static)
    if block:
      kinds, path = network.inside[index], block.path
      own = {name: bits[f'{path}/{name}'] for name, _ in kinds}
      alone = dataclasses.replace(block, path='', out=None, sources=())
      slices = slice_variables(variables, path)
      outputs[index], new = _inside(slices, leaves, own, block=alone, kinds=kinds)
      inside |= {f'{path}/{name}': constants for name, constants in new.items()}
  return inside | between


@functools.partial(jax.jit, static_argnames=('root', 'blocks', 'index', 'kinds'))
def _between(variables, images, outputs, bits, *, root, blocks, index, kinds):
  """Returns what block `index` is given, and the constants of all inputs between blocks so far."""
  hooks = [search_hook(dict(kinds), bits)]
  leaves, state = reach_with_state(
    root, blocks, index, variables, images, outputs, hooks, [COLLECTION]
  )
  return leaves, input_constants(state.get(COLLECTION, {}))


@functools.partial(jax.jit, static_argnames=('block', 'kinds'))
def _inside(variables, leaves, bits, *, block, kinds):
  """Returns what a block returns, and the constants of its inputs."""
  out, state = block.run(variables, leaves, [search_hook(dict(kinds), bits)], mutable=[COLLECTION])
  return array_leaves(out), input_constants(state.get(COLLECTION, {}))
