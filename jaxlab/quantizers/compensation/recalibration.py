"""Ranges of layers' inputs, found anew once the layers before them are compensated."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import traverse_util

from jaxlab.models.blockwise import Part, relative
from jaxlab.models.intercept import Hook, Site
from jaxlab.quantizers.compensation.hook import COLLECTION, compensation_hook
from jaxlab.quantizers.networks.batches import Positions
from jaxlab.quantizers.networks.input_ranges import recalibration_hook
from jaxlab.quantizers.networks.quantized import COLLECTION as QUANTIZATION

Array = jax.Array
PyTree = Any


def quantized_inputs(
  block: Part, parts: Sequence[Part], variables: PyTree, hooks: Sequence[Hook]
) -> list[list[str]]:
  """Returns for each part the paths, up to its own, whose inputs are quantized behind the part before."""
  ends = {part.path for part in parts}
  found: list[list[str]] = [[]]

  def visit(site: Site, call, *args, **kwargs):
    renewed = site.has('input') and 'scale' in site.read('input')  # learned and dynamic ones stay
    if renewed and site.path not in found[-1]:
      found[-1].append(site.path)
    out = call(*args, **kwargs)
    if site.path in ends:
      found.append([])
    return out

  hooks = [*hooks, Hook('.*', call=visit, collection=QUANTIZATION)]
  jax.eval_shape(lambda v, x: block.run(v, x, hooks), variables, list(block.call.array_shapes))
  # A range is that of all calls of its module: if they lie here and there, it stays as it is.
  counts = collections.Counter(path for own in found for path in own)
  return [[path for path in own if counts[path] == 1] for own in found[: len(parts)]]


def recalibrate(
  block: Part,
  variables: PyTree,
  leaves: Sequence[Array],
  hooks: Sequence[Hook],
  paths: Sequence[str],
  arrays: Mapping[str, Mapping[str, Array]],
  dtype: Any,
  positions: Positions | None = None,
) -> dict[str, Array]:
  """Returns new constants of the inputs at `paths`, by their path in the collection of the block.

  Args:
    block: in which they lie.
    variables: of the quantized block.
    leaves: arrays of its arguments.
    hooks: of the quantized network.
    paths: see `quantized_inputs`.
    arrays: compensations of the layers before, by path.
    dtype: of the compensation's product.
    positions: those that count; None: all.
  """
  flat = {
    f'{relative(p, block.path)}/{n}': leaf for p, own in arrays.items() for n, leaf in own.items()
  }
  variables = {**variables, COLLECTION: traverse_util.unflatten_dict(flat, sep='/')}
  compensated = [compensation_hook(dtype)] if arrays else []
  hooks = [*hooks, *compensated, recalibration_hook(paths, positions)]
  _, state = block.run(variables, leaves, hooks, mutable=[QUANTIZATION])
  own = tuple(f'{relative(path, block.path)}/input/' for path in paths)
  new = traverse_util.flatten_dict(dict(state[QUANTIZATION]), sep='/')
  return {name: leaf for name, leaf in new.items() if name.startswith(own)}


def with_constants(variables: Mapping[str, PyTree], new: Mapping[str, Array]) -> dict[str, PyTree]:
  """Returns variables with constants of the collection `'quantization'` replaced, by path."""
  if not new:
    return dict(variables)
  flat = traverse_util.flatten_dict(dict(variables[QUANTIZATION]), sep='/')
  return {**variables, QUANTIZATION: traverse_util.unflatten_dict({**flat, **new}, sep='/')}
