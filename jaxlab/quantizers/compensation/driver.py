"""Block by block through a quantized network, fitting a compensation at each: QwT, QwT-v2 and NBC.

Calibration batches are streamed: a block sees one batch at a time on the devices, its inputs and
outputs wait in host memory. Each block runs once in float and once quantized; the next block gets the
compensated output.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.intercept import Hook, Site, module_paths, raise_unmatched
from jaxlab.quantizers.compensation import methods
from jaxlab.quantizers.compensation.bipolar import BipolarCompensation, apply_nbc
from jaxlab.quantizers.compensation.channel_affine import ChannelAffine, apply_channel_affine
from jaxlab.quantizers.compensation.cost import compensation_cost
from jaxlab.quantizers.compensation.linear import LinearCompensation
from jaxlab.quantizers.compensation.linear_apply import apply_linear_compensation
from jaxlab.quantizers.compensation.methods import Method, QwT, QwTv2, Rows
from jaxlab.quantizers.compensation.parts import (
  CAPTURES,
  Part,
  Programs,
  Skeleton,
  any_of,
  array_leaves,
  find_parts,
  park,
  reach,
  relative,
  restore,
  slice_variables,
)
from jaxlab.quantizers.compensation.stream import Stream, block_pattern

Array = jax.Array
PyTree = Any
COLLECTION = 'compensation'


class Report(NamedTuple):
  """What the compensation did, one entry a compensated module, in order of execution.

  Attributes:
    paths: of the modules.
    error_before: mean squared error on the calibration data against the teacher, float64 `[modules]`.
    error_after: the same of the compensated module, with the arithmetic of `dtype`.
    r2: of the fit; for QwT-v2 `1 - error_after / error_before`.
    skipped: whether the gate left the module as it is.
    parameters: values that were added.
    multiply_adds: that were added, for one example.
  """

  paths: tuple[str, ...]
  error_before: np.ndarray
  error_after: np.ndarray
  r2: np.ndarray
  skipped: np.ndarray
  parameters: np.ndarray
  multiply_adds: np.ndarray


class Compensated(NamedTuple):
  """A compensated network: `jaxlab.models.apply(model, variables, x, hooks=hooks)`.

  Attributes:
    variables: those of the quantized network and the collection `'compensation'`.
    hooks: those of the quantized network and one that compensates.
    report: see `Report`.
  """

  variables: dict[str, PyTree]
  hooks: tuple[Hook, ...]
  report: Report


def compensate(
  model: nn.Module,
  quantized: tuple[PyTree, PyTree, Sequence[Hook]],
  batches: Iterable[Any],
  method: Method | None = None,
  *,
  blocks: str | None = None,
  start_block: int = 0,
  target: Literal['local', 'global'] = 'local',
  dtype: Any = jnp.float16,
  float_hooks: Sequence[Hook] | None = None,
  programs: Programs | None = None,
  **kwargs: Any,
) -> Compensated:
  """Fits and adds the compensation of every block of a quantized network, in closed form.

  Batches may be sharded over a mesh: sums are over the whole batch, and the result is that of one device.
  Blocks of one shape share one compilation.

  Args:
    model: any Linen module whose blocks are modules called one after another, each on what the one before
      returned (with whatever the model computes in between and hands in besides).
    quantized: `(variables, float_variables, hooks)`, e.g. from `repq`: the quantized network, and the
      variables of the same network with the quantizers off.
    batches: calibration inputs of one shape; a tuple is several arguments. No labels. Iterated once.
    method: `QwT`, `QwTv2` or `NBC`; None: `QwT()`.
    blocks: regular expression of the blocks' paths; None: the names that our models use.
    start_block: blocks before this one are left as they are.
    target: what the quantized block's output is compared with: the float block on the same, quantized
      network's input (`'local'`, as in QwT's code), or the float network's activation there (`'global'`).
    dtype: of the compensation's matrix product while later blocks are fitted, and in the returned hooks:
      float16 as in QwT's evaluation, or float32.
    float_hooks: under which `float_variables` are the float network; None: the same hooks (they are
      expected to do nothing where the variables hold no quantization constants). `()` for none.
    programs: compiled functions of earlier calls, e.g. at other bit-widths: a `Programs()` that is handed to
      all of them.
    **kwargs: passed to the model, e.g. `train=False`.

  Raises:
    ValueError: if there is no batch, no block matches, blocks are nested, shared or stacked, `start_block`
      is out of range, shapes do not fit the method, or activations are not finite.

  Warns:
    RuntimeWarning: if a fit has fewer rows than unknowns.
  """
  method = QwT() if method is None else method
  if target not in ('local', 'global'):
    raise ValueError(f"target={target!r}; choose 'local' or 'global'.")
  variables, float_variables, hooks = dict(quantized[0]), dict(quantized[1]), tuple(quantized[2])
  float_hooks = hooks if float_hooks is None else tuple(float_hooks)
  inputs = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
  if not inputs:
    raise ValueError('batches is empty: the compensation needs at least one calibration batch.')
  root = Part('', model, Skeleton.of((inputs[0], kwargs)))
  pattern = block_pattern(model, inputs[0], kwargs, blocks)
  parts = find_parts(root, variables, array_leaves((inputs[0], kwargs)), hooks, pattern)
  if not parts:
    raise_unmatched([pattern], module_paths(model, *inputs[0], **kwargs), 'block pattern', 'module')
  if not 0 <= start_block < len(parts):
    raise ValueError(f'start_block={start_block} is not one of the {len(parts)} blocks.')
  parts = parts[start_block:]

  programs = Programs() if programs is None else programs
  networks = [Stream(root, parts, variables, hooks, inputs, kwargs, programs)]
  if target == 'global':
    networks.append(Stream(root, parts, float_variables, float_hooks, inputs, kwargs, programs))
  arrays: dict[str, dict[str, Array]] = {}
  entries: list[tuple] = []
  for index, block in enumerate(parts):
    for network in networks:
      network.advance(index)
    walk = _BlockWalk(
      block, method, variables, float_variables, hooks, float_hooks, dtype, programs
    )
    fitted, outputs = walk.run(networks)
    arrays |= fitted
    entries += walk.entries
    for network, out in zip(networks, outputs):
      network.outputs = out
  report = Report(tuple(arrays), *(np.asarray(column) for column in zip(*entries)))
  flat = {f'{path}/{name}': leaf for path, own in arrays.items() for name, leaf in own.items()}
  tree = traverse_util.unflatten_dict(flat, sep='/')
  hook = compensation_hook(list(arrays), dtype)
  return Compensated({**variables, COLLECTION: tree}, (*hooks, hook), report)


def compensation_hook(paths: Sequence[str], dtype: Any = jnp.float16) -> Hook:
  """Returns the hook that compensates the modules at `paths` by the arrays in collection `'compensation'`.

  The arrays are ordinary variables: `jax.grad` reaches them (QwT* trains them, with dtype float32).

  Args:
    paths: of modules that have arrays.
    dtype: of the matrix product's operands.
  """
  return Hook(any_of(paths), call=_Compensate(jnp.dtype(dtype)), collection=COLLECTION)


@dataclasses.dataclass(frozen=True)
class _Compensate:
  """The hook's function; equal for equal dtypes, so that programs with equal hooks are compiled once."""

  dtype: Any

  def __call__(self, site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    out = call(*args, **kwargs)
    leaves, treedef = jax.tree.flatten(out)
    names = ('gamma', 'beta') if site.has('gamma') else ('weight', 'bias')
    names = BipolarCompensation._fields[:-1] if site.has('kappa') else names
    own = {name: site.read(name) for name in names}
    x = array_leaves((args, kwargs))[0]
    return jax.tree.unflatten(treedef, [_apply(leaves[0], x, own, self.dtype), *leaves[1:]])


def _apply(y: Array, x: Array, arrays: dict[str, Array], dtype: Any) -> Array:
  if 'gamma' in arrays:
    return apply_channel_affine(y, ChannelAffine(**arrays))
  if 'kappa' in arrays:
    return apply_nbc(y, x, BipolarCompensation(**arrays, r2=jnp.zeros(())), dtype)
  return apply_linear_compensation(y, x, LinearCompensation(**arrays, r2=jnp.zeros(())), dtype)


class _BlockWalk:
  """Fits the compensations inside one block (at its own output, or at layers in it)."""

  def __init__(
    self, block, method, variables, float_variables, hooks, float_hooks, dtype, programs
  ):
    self.block, self.method, self.dtype, self.programs = block, method, dtype, programs
    self.hooks, self.float_hooks = hooks, float_hooks
    self.quantized = slice_variables(variables, block.path)
    self.float = slice_variables(float_variables, block.path)
    self.parts = self._parts()
    self.entries: list[tuple] = []

  def _parts(self) -> list[Part]:
    block, method = self.block, self.method
    if not isinstance(method, QwTv2) or (method.granularity == 'block' and not method.modules):
      return [block]
    flat = traverse_util.flatten_dict(dict(self.float['params']), sep='/')
    layers = [path.removesuffix('/kernel') for path in flat if path.endswith('/kernel')]
    if method.modules:
      chosen = [path for path in layers if re.fullmatch(method.modules, path)]
    elif method.granularity == 'branch':
      last = 'conv3' if 'conv3' in layers else 'conv2'
      names = rf'{methods.LINEAR_NAMES}|{last}'
      chosen = [path for path in layers if re.fullmatch(rf'(.*/)?({names})', path)]
    else:
      chosen = layers
    if not chosen:
      raise ValueError(
        f'No layer of {block.path!r} is one to compensate; it has {", ".join(layers)}. Give modules=.'
      )
    pattern = any_of([f'{block.path}/{path}' for path in chosen])
    return find_parts(block, self.quantized, block.call.array_shapes, self.hooks, pattern)

  def run(self, networks: Sequence[Stream]) -> tuple[dict[str, dict[str, Array]], list[list]]:
    """Returns the arrays by path, and what the block returns in each of the networks, parked."""
    stream = networks[0]
    teachers, float_outputs = self._teachers(networks[1]) if len(networks) > 1 else (None, None)
    outputs: list[dict[int, list]] = [{} for _ in stream.leaves]
    arrays = {}
    for index, part in enumerate(self.parts):
      rows = self._observe(index, stream, outputs, teachers)
      try:
        own, r2, skipped = methods.fit(self.method, rows)
      except ValueError as error:
        raise ValueError(f'{part.path}: {error}') from error
      before, after = self._finish(index, rows, own, outputs)
      r2 = 1 - after / before if np.isnan(r2) and isinstance(self.method, QwTv2) and before else r2
      cost = compensation_cost(own, rows.err_shape)
      self.entries.append((before, after, r2, skipped, *cost))
      arrays[part.path] = own
    return arrays, [self._leave(stream, outputs), *([float_outputs] if float_outputs else [])]

  def _observe(self, index, stream, outputs, teachers) -> Rows:
    """Runs part `index` on all batches; parks its input, output and error."""
    part, block = self.parts[index], self.block
    parts, hooks, float_hooks = self.parts, self.hooks, self.float_hooks
    below = relative(part.path, block.path)

    def observe(quantized, floats, leaves, outputs, teacher):
      if part is not block:
        leaves = reach(block, parts, index, quantized, leaves, outputs, hooks)
      y = array_leaves(part.run(slice_variables(quantized, below), leaves, hooks))
      if teacher is None:
        own = slice_variables(floats, below)
        teacher = array_leaves(part.run(own, leaves, float_hooks))[0]
      wide = jnp.promote_types(y[0].dtype, jnp.float32)
      return leaves[0], y, teacher.astype(wide) - y[0].astype(wide)

    run, batches = None, []
    for batch, leaves in enumerate(stream.leaves):
      teacher = None if teachers is None else teachers[batch][index].restore()
      args = (self.quantized, self.float, restore(leaves), restore(outputs[batch]), teacher)
      run = run or self.programs(observe, *args)
      x, y, err = run(*args)
      outputs[batch][index] = park(y)
      batches.append((leaves[0] if part is block else park(x), outputs[batch][index][0], park(err)))
    return Rows(batches, self.programs, self._is_conv(batches[0]))

  def _is_conv(self, batch: tuple) -> bool:
    kind = getattr(self.method, 'kind', 'linear')
    if kind != 'auto':
      return kind == 'conv'
    leaves = jax.tree.leaves(self.quantized.get('params', {}))
    return len(batch[0].shape) == 4 and any(np.ndim(leaf) == 4 for leaf in leaves)

  def _finish(self, index, rows: Rows, arrays, outputs) -> tuple[float, float]:
    """Compensates the parked outputs of part `index`; returns the mean squared error before and after."""
    needs_input = not isinstance(self.method, QwTv2)

    dtype = self.dtype

    def finish(arrays, x, y, err):
      new = _apply(y, x, arrays, dtype)
      left = y.astype(err.dtype) + err - new.astype(err.dtype)
      return new, jnp.sum(err**2), jnp.sum(left**2)

    run, before, after, size = None, 0.0, 0.0, 0
    for batch, (x, y, err) in enumerate(rows.batches):
      y, err = y.restore(), err.restore()
      placed = jax.device_put(arrays, methods.replicated_like(y))
      args = (placed, x.restore() if needs_input else None, y, err)
      run = run or self.programs(finish, *args)
      new, *squares = run(*args)
      outputs[batch][index] = [park(new), *outputs[batch][index][1:]]
      before, after = before + float(squares[0]), after + float(squares[1])
      size += err.size
    return before / size, after / size

  def _leave(self, stream: Stream, outputs) -> list[list]:
    """Returns what the block returns, from the compensated outputs of its parts."""
    if self.parts == [self.block]:
      return [known[0] for known in outputs]

    def leave(quantized, leaves, outputs):
      return reach(self.block, self.parts, len(self.parts), quantized, leaves, outputs, self.hooks)

    run, left = None, []
    for leaves, known in zip(stream.leaves, outputs):
      args = (self.quantized, restore(leaves), restore(known))
      run = run or self.programs(leave, *args)
      left.append(park(run(*args)))
    return left

  def _teachers(self, stream: Stream) -> tuple[list[list], list[list]]:
    """Returns the float network's activation at each part, and what its block returns, for each batch."""
    paths = [part.path for part in self.parts]

    block, float_hooks = self.block, self.float_hooks

    def run_float(floats, leaves):
      def keep(site: Site, call, *args, **kwargs):
        y = call(*args, **kwargs)
        site.write('output', array_leaves(y)[0])
        return y

      hooks = [*float_hooks, Hook(any_of(paths), call=keep, collection=CAPTURES)]
      out, state = block.run(floats, leaves, hooks, mutable=[CAPTURES])
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
