"""The fit of the compensations inside one block: at its own output, or at layers in it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxlab.models.block_stream import Stream
from jaxlab.models.blockwise import (
  CAPTURES,
  Part,
  Programs,
  find_parts,
  park,
  reach,
  relative,
  restore,
  slice_variables,
)
from jaxlab.models.intercept import Hook, Site, any_of
from jaxlab.models.main_arrays import array_leaves
from jaxlab.quantizers.compensation import fits
from jaxlab.quantizers.compensation.cost import compensation_cost
from jaxlab.quantizers.compensation.hook import apply_arrays
from jaxlab.quantizers.compensation.methods import Method, QwTv2
from jaxlab.quantizers.compensation.recalibration import (
  quantized_inputs,
  recalibrate,
  with_constants,
)
from jaxlab.quantizers.networks.batches import counted_rows, positions_of, row_weights
from jaxlab.quantizers.networks.input_ranges import renewed_constants
from jaxlab.quantizers.networks.quantized import COLLECTION as QUANTIZATION

Array = jax.Array
PyTree = Any


class BlockWalk:
  """Fits the compensations inside one block.

  Attributes:
    entries: for each part, in order of execution, the columns of the report.
    constants: of ranges that were found anew, by path in the collection `'quantization'`.
  """

  def __init__(
    self,
    block: Part,
    method: Method,
    variables: PyTree,
    float_variables: PyTree,
    hooks: Sequence[Hook],
    dtype: Any,
    programs: Programs,
    masks: Sequence[Array | None],
    branch_ends: Mapping[str, Sequence[str]] = {},
  ):
    self.branch_ends, self.masks = branch_ends, masks
    self.block, self.method, self.dtype, self.programs = block, method, dtype, programs
    self.hooks = hooks
    self.quantized = slice_variables(variables, block.path)
    self.float = slice_variables(float_variables, block.path)
    self.parts = self._parts()
    self.entries: list[tuple] = []
    self.constants: dict[str, Array] = {}
    self.inputs: list[list[str]] = [[] for _ in self.parts]
    if getattr(method, 'recalibrate', False):
      self.inputs = quantized_inputs(block, self.parts, self.quantized, hooks)
    # Compensations by part, of those whose parked outputs are without: what uses them applies it.
    self.pending: dict[int, dict[str, Array]] = {}

  def _parts(self) -> list[Part]:
    block = self.block
    chosen = _chosen_layers(block, self.method, self.float, self.branch_ends)
    if chosen is None:
      return [block]
    pattern = any_of([f'{block.path}/{path}' for path in chosen])
    return find_parts(block, self.quantized, block.call.array_shapes, self.hooks, pattern)

  def run(self, networks: Sequence[Stream]) -> tuple[dict[str, dict[str, Array]], list[list]]:
    """Returns the arrays by path, and what the block returns in each of the networks, parked."""
    stream = networks[0]
    teachers, float_outputs = self._teachers(networks[1]) if len(networks) > 1 else (None, None)
    outputs: list[dict[int, list]] = [{} for _ in stream.leaves]
    arrays = {}
    for index, part in enumerate(self.parts):
      self._recalibrate(index, stream, arrays)
      shapes = _shapes(part, self.method, self.quantized)
      state, rows = self._observe(index, shapes, stream, outputs, teachers)
      try:
        found = fits.fit(self.method, shapes, state, rows)
      except ValueError as error:
        raise ValueError(f'{part.path}: {error}') from error
      errors = self._finish(index, found, rows, outputs)
      r2 = 1 - errors[1] / errors[0] if np.isnan(found.r2) and errors[0] else found.r2
      cost = compensation_cost(found.arrays, shapes.out)
      self.entries.append((*errors, r2, found.skipped, *cost))
      arrays[part.path] = found.arrays
    return arrays, [self._leave(stream, outputs), *([float_outputs] if float_outputs else [])]

  def _recalibrate(self, index: int, stream: Stream, arrays: Mapping[str, dict]) -> None:
    """Finds the ranges of inputs between the part before and part `index` anew, on the first batch."""
    block, hooks, dtype = self.block, self.hooks, self.dtype
    paths = [path for path in self.inputs[index] if path != self.parts[index].path]
    if not paths:
      return

    def ranges(quantized, leaves, arrays, positions):
      return recalibrate(block, quantized, leaves, hooks, paths, arrays, dtype, positions)

    args = (self.quantized, restore(stream.leaves[0]), arrays, positions_of(self.masks[0]))
    self._renew(self.programs(ranges, *args)(*args))

  def _renew(self, new: Mapping[str, Array]) -> None:
    """Takes new constants, by their path in the collection of the block."""
    self.quantized = with_constants(self.quantized, new)
    self.constants |= {f'{self.block.path}/{name}': leaf for name, leaf in new.items()}

  def _recalibrate_own(self, index: int, x: Array) -> None:
    """Finds the range of the input of part `index` anew, on what the part is given.

    Not in the program that computes x: then searches of equal shapes share one compilation.
    """
    below = relative(self.parts[index].path, self.block.path)
    old = slice_variables(self.quantized, below)[QUANTIZATION]['input']
    prefix = f'{below}/input/' if below else 'input/'
    rows = counted_rows(x, positions_of(self.masks[0]), self.parts[index].path)
    found = renewed_constants(old, rows)
    self._renew({f'{prefix}{name}': leaf for name, leaf in found.items()})

  def _has_exact_sums(self, part: Part) -> bool:
    """Whether the errors of `part` follow from its statistics, and its output can be compensated later.

    A scale and a shift in float32 are exact enough; the rounding of a narrower output is to be measured.
    """
    dtype = part.y_shape.dtype
    return isinstance(self.method, QwTv2) and dtype == jnp.promote_types(dtype, jnp.float32)

  def _observe(
    self, index: int, shapes: fits.Shapes, stream: Stream, outputs, teachers
  ) -> tuple[Any, fits.Rows]:
    """Runs part `index` on all batches; returns their sums, and parks its output, and rows if needed."""
    part, block, dtype = self.parts[index], self.block, self.dtype
    parts, hooks = self.parts, self.hooks
    below, exact = relative(part.path, block.path), self._has_exact_sums(part)
    state, update = fits.first_pass(self.method, shapes)

    def given(quantized, leaves, outputs, pending):
      known = _compensated(parts, outputs, pending, dtype)
      return reach(block, parts, index, quantized, leaves, known, hooks)

    def observe(quantized, floats, leaves, teacher, state, batch, mask):
      outputs = array_leaves(part.run(quantized, leaves, hooks))
      y = outputs[part.main]
      if teacher is None:
        teacher = array_leaves(part.run(floats, leaves, hooks))[part.main]
      wide = jnp.promote_types(y.dtype, jnp.float32)
      err = teacher.astype(wide) - y.astype(wide)
      weights = row_weights(err, mask, part.path)
      if shapes.is_conv and weights is not None and weights.ndim > 1:
        raise ValueError(
          f'{part.path!r}: the convolutional form counts whole images, counted says which positions do.'
        )
      state = update(state, leaves[part.lead], y, err, batch, weights)
      return outputs, None if exact else err, weights, state

    run, arrive, kept = None, None, []
    for batch, leaves in enumerate(stream.leaves):
      restored = restore(leaves)
      everywhere = fits.replicated_like(restored[0])
      if run is None:
        state, self.pending = jax.device_put((state, self.pending), everywhere)
      if part is not block:
        args = (self.quantized, restored, restore(outputs[batch]), self.pending)
        arrive = arrive or self.programs(given, *args)
        restored = arrive(*args)
      if run is None and part.path in self.inputs[index]:
        self._recalibrate_own(index, restored[part.lead])
      teacher = None if teachers is None else teachers[batch][index].restore()
      # The part's own variables alone, so that parts of one shape share a program.
      own = (slice_variables(tree, below) for tree in (self.quantized, self.float))
      args = (*own, restored, teacher, state, np.int32(batch), self.masks[batch])
      run = run or self.programs(observe, *args, out_shardings=(None, None, None, everywhere))
      y, err, weights, state = run(*args)
      outputs[batch][index] = park(y)
      x = None if isinstance(self.method, QwTv2) else leaves[part.lead]
      kept.append((x, park(err), None if weights is None else np.asarray(weights)))
    return jax.device_get(state), fits.Rows(kept, self.programs)

  def _finish(
    self, index: int, found: fits.Fitted, rows: fits.Rows, outputs
  ) -> tuple[float, float]:
    """Compensates the output of part `index`; returns the mean squared error before and after."""
    if self._has_exact_sums(self.parts[index]):
      self.pending[index] = found.arrays
      return found.errors
    dtype, main = self.dtype, self.parts[index].main

    def finish(arrays, x, y, err, weights):
      new = apply_arrays(y, x, arrays, dtype)
      left = y.astype(err.dtype) + err - new.astype(err.dtype)
      own = err, left
      if weights is not None:
        weights = weights.reshape(*weights.shape, *(1,) * (err.ndim - weights.ndim))
        own = [jnp.where(weights > 0, values, 0) for values in own]
      return new, *(jnp.sum(values**2) for values in own)

    run, before, after, size = None, 0.0, 0.0, 0
    for known, (x, err, weights) in zip(outputs, rows.batches):
      x, y, err = restore((x, known[index][main], err))
      placed = jax.device_put(found.arrays, fits.replicated_like(y))
      args = (placed, x, y, err, weights)
      run = run or self.programs(finish, *args)
      new, *squares = run(*args)
      known[index] = [*known[index][:main], park(new), *known[index][main + 1 :]]
      before, after = before + float(squares[0]), after + float(squares[1])
      share = 1 if weights is None else np.mean(weights)
      size += err.size * share
    return before / size, after / size

  def _leave(self, stream: Stream, outputs) -> list[list]:
    """Returns what the block returns, from the outputs of its parts."""
    block, parts, hooks, dtype = self.block, self.parts, self.hooks, self.dtype
    if parts == [block] and not self.pending:
      return [known[0] for known in outputs]

    def leave(quantized, leaves, outputs, pending):
      known = _compensated(parts, outputs, pending, dtype)
      if parts == [block]:
        return known[0]
      return reach(block, parts, len(parts), quantized, leaves, known, hooks)

    run, left = None, []
    for leaves, known in zip(stream.leaves, outputs):
      args = (self.quantized, restore(leaves), restore(known), self.pending)
      run = run or self.programs(leave, *args)
      left.append(park(run(*args)))
    return left

  def _teachers(self, stream: Stream) -> tuple[list[list], list[list]]:
    """Returns the float network's activation at each part, and what its block returns, for each batch."""
    paths = [part.path for part in self.parts]
    mains = {part.path: part.main for part in self.parts}
    block, hooks = self.block, self.hooks

    def run_float(floats, leaves):
      def keep(site: Site, call, *args, **kwargs):
        y = call(*args, **kwargs)
        site.write('output', array_leaves(y)[mains[site.path]])
        return y

      keeping = Hook(any_of(paths), call=keep, collection=CAPTURES)
      out, state = block.run(floats, leaves, [*hooks, keeping], mutable=[CAPTURES])
      found = [slice_variables(state, relative(path, block.path))[CAPTURES] for path in paths]
      return [own['output'] for own in found], array_leaves(out)

    run, teachers, outputs = None, [], []
    for leaves in stream.leaves:
      args = (self.float, restore(leaves))
      run = run or self.programs(run_float, *args)
      teacher, out = run(*args)
      teachers.append(park(teacher))
      outputs.append(park(out))
    return teachers, outputs


def check_block(
  block: Part,
  method: Method,
  variables: PyTree,
  branch_ends: Mapping[str, Sequence[str]],
  num_batches: int,
) -> None:
  """Raises ValueError if a method cannot compensate a block, by its shapes and names alone; names the block.

  Args:
    block: of the network.
    method: settings.
    variables: of the network.
    branch_ends: the last layer of each branch, by block.
    num_batches: of the calibration.
  """
  own = slice_variables(variables, block.path)
  _chosen_layers(block, method, own, branch_ends)
  try:
    fits.check(method, _shapes(block, method, own), num_batches)
  except ValueError as error:
    raise ValueError(f'{block.path}: {error}') from error


def _chosen_layers(
  block: Part, method: Method, variables: PyTree, branch_ends: Mapping[str, Sequence[str]]
) -> list[str] | None:
  """Returns the layers that are compensated, seen from the block; None: the block itself is."""
  if not isinstance(method, QwTv2) or (method.granularity == 'block' and not method.modules):
    return None
  flat = traverse_util.flatten_dict(dict(variables.get('params', {})), sep='/')
  layers = [path.removesuffix('/kernel') for path in flat if path.endswith('/kernel')]
  if method.modules:
    chosen = [path for path in layers if re.fullmatch(method.modules, path)]
  elif method.granularity == 'branch':
    chosen = [relative(path, block.path) for path in branch_ends.get(block.path, ())]
  else:
    chosen = layers
  if not chosen:
    raise ValueError(
      f'No layer of {block.path!r} is one to compensate; it has {", ".join(layers)}. Give modules=, or an '
      f'anatomy that tells the branches of the block.'
    )
  return chosen


def _shapes(part: Part, method: Method, variables: PyTree) -> fits.Shapes:
  """Returns the shapes of a part of a block with these variables."""
  x, out = part.x_shape.shape, part.y_shape.shape
  kind = getattr(method, 'kind', 'linear')
  if kind == 'auto':
    leaves = jax.tree.leaves(variables.get('params', {}))
    kind = 'conv' if len(x) == 4 and any(np.ndim(leaf) == 4 for leaf in leaves) else 'linear'
  return fits.Shapes(x, out, kind == 'conv')


def _compensated(
  parts: Sequence[Part],
  outputs: Mapping[int, list[Array]],
  pending: Mapping[int, dict[str, Array]],
  dtype: Any,
) -> dict[int, list[Array]]:
  """Returns the outputs of parts, by index, with the compensations that are pending applied."""
  known = {i: list(arrays) for i, arrays in outputs.items()}
  for i, arrays in pending.items():
    if i in known:
      main = parts[i].main
      known[i][main] = apply_arrays(known[i][main], None, arrays, dtype)
  return known
