"""GPTQ through a whole network, block by block, and its kernels as packed codes.

All layers of a block see the inputs that the already quantized blocks before it give (Frantar et al. 2023,
in the order of the authors' code without `true_sequential`).
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.block_stream import Stream
from jaxlab.models.blockwise import (
  Part,
  Programs,
  find_blocks,
  park,
  relative,
  restore,
  slice_variables,
)
from jaxlab.models.intercept import Hook, Site, any_of, first_argument
from jaxlab.models.main_arrays import array_leaves
from jaxlab.quantizers.networks import operands
from jaxlab.quantizers.networks.batches import (
  Batches,
  Counted,
  as_call,
  counted_mask,
  peek,
  positions_of,
  row_weights,
  trace_calls,
)
from jaxlab.quantizers.networks.calibration import calibrate_inputs
from jaxlab.quantizers.networks.layer_inputs import KernelLayout, LayerRows, kernel_layout
from jaxlab.quantizers.networks.layers import channel_shape
from jaxlab.quantizers.networks.quantized import COLLECTION, Quantized
from jaxlab.quantizers.networks.rules import Rules
from jaxlab.quantizers.networks.tables import quantize_tables
from jaxlab.quantizers.numerics.affine import AffineQuantizer
from jaxlab.quantizers.numerics.gptq import (
  GPTQKernel,
  gptq_kernel,
)
from jaxlab.quantizers.numerics.hessians import HessianState, accumulate_hessian, init_hessian
from jaxlab.quantizers.numerics.storage import QuantizedArray, pack_codes

Array = jax.Array
PyTree = Any


def gptq_ptq(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Batches,
  rules: Rules,
  *,
  anatomy: Anatomy | None = None,
  blocks: str | None = None,
  programs: Programs | None = None,
  options: Mapping[str, Any] = {},
  counted: Counted = None,
  **kwargs: Any,
) -> Quantized:
  """Post-training quantization with GPTQ kernels, and inputs by percentiles where rules ask for them.

  Block by block in order of execution: the Hessians of all its kernels over all batches and calls, in one
  forward pass a batch; its kernels by `gptq_kernel` (in the kernels' own dtype: in bfloat16 they are rounded
  once more); its outputs with these. Convolutions of every kind and `DenseGeneral` are matrices over the rows
  that they see, grouped convolutions one for each group. A kernel outside of the blocks (a classifier) is
  rounded to nearest with the same range rule; likewise a layer or an expert that nothing of the calibration
  data reached. The result's `rounded` names both. Then, where rules ask for inputs, their ranges are found in
  one pass over the first batch (as in `percentile_ptq`). Batches may be sharded over a mesh:
  Hessians are sums over the whole batch. A batch is on the devices alone, the others wait in host memory.
  Kernels that lie on a mesh are quantized there, each device a share of the outputs, and stay split as they
  were.

  Args:
    model: any Linen module whose blocks run one after another.
    variables: its float variables.
    batches: calibration inputs, 128 sequences of 2048 tokens in GPTQ: Hessians are sums over all of them. See
      `percentile_ptq`.
    rules: over kernels and inputs, 2 to 8 bits. Only weights: `[Rule('.*/(mlp|attn)/.*', 'kernel', 4)]`.
    anatomy: the names of the model's parts; None: `models.anatomy(model)`.
    blocks: regular expression of the blocks' paths; None: the blocks of the anatomy.
    programs: compiled functions of earlier calls, as in `compensate`.
    options: of `gptq_kernel`: `group_size`, `symmetric`, `mse`, `act_order`, `damping`, ...
    counted: which positions enter Hessians and ranges; see `percentile_ptq`.
    **kwargs: passed to the model with every batch, e.g. `train=False`.

  Returns:
    The network. The constants of a kernel in groups are `scale` and `zero_point` `[groups, features]` and
    `group` `[in]`; such a layer runs in float (`integer_network` says so), its codes are `gptq_array`'s.

  Raises:
    ValueError: if there is no batch, the model's parts are not known, a rule names nothing or asks for what
      is not done here, blocks are nested, shared or stacked, a kernel to be quantized is no matrix over rows
      of its layer's input, or weights, inputs or Hessians are not finite.
  """
  batches = list(peek(batches)[1])
  kind = 'group' if options.get('group_size') else 'channel'
  todo = operands.plan(
    model, variables, batches[0], rules, 'gptq_ptq', kernels=kind, tables=True, **kwargs
  )
  if any(rule.axes is not None for rule in rules):
    raise ValueError(
      'gptq_ptq takes no axes= of rules: what one output is a sum over follows from the module. Leave the '
      'layer out, or quantize its kernel by gptq_kernel.'
    )
  inputs = [as_call(batch, kwargs) for batch in batches]
  masks = [counted_mask(counted, model, call) for call in inputs]
  layouts = _layouts(model, variables, inputs[0], todo.kernel_bits)
  root, parts = find_blocks(model, variables, *inputs[0], (), blocks, anatomy)
  programs = Programs() if programs is None else programs
  looked_up, tables = quantize_tables(variables['params'], todo.table_bits)
  params = traverse_util.flatten_dict(dict(looked_up), sep='/')
  constants: dict[str, dict[str, Array]] = {}
  rounded = dict.fromkeys(tables, 'a table is looked up')
  stream = Stream(root, parts, {**variables, 'params': looked_up}, (), inputs, programs)

  def quantize(path: str, hessian: Array | None, reason: str = '') -> None:
    name = f'{path}/kernel'
    found, missed = _quantize(params[name], hessian, path, layouts[path], todo, options)
    params[name], constants[path] = found.kernel, _constants(found, path, todo)
    if missed or reason:
      rounded[path] = reason or missed

  for index, block in enumerate(parts):
    stream.advance(index)
    inside = [path for path in todo.kernel_bits if f'{path}/'.startswith(f'{block.path}/')]
    own = slice_variables(variables, block.path)
    hessians = _hessians(block, own, inside, stream.leaves, masks, programs)
    for path in inside:
      quantize(path, hessians.get(path), '' if path in hessians else 'the model does not call it')
    new = slice_variables({**variables, 'params': _tree(params)}, block.path)
    stream.outputs = _outputs(block, new, stream.leaves, programs)
  for path in todo.kernel_bits:
    if path not in constants:
      quantize(path, None, 'it lies outside of the blocks')

  quantized = {**variables, 'params': _tree(params)}
  ranges = {}
  if todo.kinds:
    positions = positions_of(masks[0])
    ranges = calibrate_inputs(model, quantized, batches[0], todo, anatomy, positions, **kwargs)
  operands.check_finite(ranges, constants)
  quantized[COLLECTION] = operands.collection(ranges, constants, {}, tables)
  hooks = operands.operand_hooks()
  return Quantized.of(
    model,
    quantized,
    variables,
    hooks,
    kwargs=kwargs,
    anatomy=anatomy,
    rounded=rounded,
    **operands.said_by(todo),
  )


def gptq_array(found: GPTQKernel, bits: int) -> QuantizedArray:
  """Returns the codes of a GPTQ kernel in as few bytes as they take; `dequantize()` gives its `kernel`.

  Args:
    found: from `gptq_kernel`, or `GPTQKernel(kernel, codes, scale, zero_point, group)`.
    bits: with which it was quantized.

  Raises:
    ValueError: for groups that are not equal runs of the inputs (`act_order` without `static_groups`), or of
      a convolution: they have no stored form here.

  >>> kernel = jax.random.normal(jax.random.key(0), (8, 3))
  >>> found = gptq_kernel(kernel, jnp.eye(8), 4, group_size=4)
  >>> stored = gptq_array(found, 4)
  >>> stored.codes.shape, stored.codes.dtype, bool((stored.dequantize() == found.kernel).all())
  ((4, 3), dtype('uint8'), True)
  """
  groups, scale, zero_point = len(found.scale), found.scale, found.zero_point
  quantizer = AffineQuantizer(bits, 'asymmetric', 'channel')
  if groups > 1:
    inputs = found.kernel.shape[0]
    size = inputs // groups
    runs = np.arange(inputs) // max(size, 1)
    if found.kernel.ndim > 2 or inputs % groups or not np.array_equal(found.group, runs):
      raise ValueError(
        f"{groups} groups of a kernel {found.kernel.shape} are not equal runs of a dense layer's inputs: use "
        f'static_groups=True, or no act_order, and a group_size that divides the inputs.'
      )
    quantizer = AffineQuantizer(bits, 'asymmetric', 'group', axis=-2, group_size=size)
    scale, zero_point = scale[:, None], zero_point[:, None]
  codes = found.codes.astype(jnp.uint8 if bits <= 8 else jnp.uint16)
  codes = pack_codes(codes, bits)
  return QuantizedArray(codes, scale, zero_point, quantizer, tuple(found.kernel.shape))


def _tree(params: Mapping[str, Array]) -> PyTree:
  return traverse_util.unflatten_dict(params, sep='/')


def _layouts(
  model: nn.Module, variables: PyTree, call: tuple, paths: Mapping[str, Any]
) -> dict[str, KernelLayout]:
  """Returns the layouts of the kernels of the layers `paths`; traces the model abstractly."""
  found: dict[str, KernelLayout] = {}

  def visit(site: Site, call, *args, **kwargs):
    found[site.path] = kernel_layout(site, site.module.scope.get_variable('params', 'kernel'))
    return call(*args, **kwargs)

  if paths:
    trace_calls(model, variables, call, visit, any_of(paths))
  return found


def _hessians(
  block: Part,
  variables: PyTree,
  paths: Sequence[str],
  batches: Sequence[list],
  masks: Sequence[Array | None],
  programs: Programs,
) -> dict[str, Array]:
  """Returns the Hessian of every kernel's inputs over all batches and calls, by path; of groups one each."""
  if not paths:
    return {}

  def accumulate(variables, leaves, mask, states):
    layer_rows = LayerRows()

    def visit(site: Site, call, *args, **kwargs):
      if layer_rows.running:
        return call(*args, **kwargs)
      x, _ = first_argument(site, args, kwargs)
      kernel = site.module.scope.get_variable('params', 'kernel')
      rows = layer_rows(site, x, kernel)
      grouped = kernel_layout(site, kernel).groups > 1
      # In the collection of the constants: transformations of a model that carry it need no other.
      state = site.read('hessian') if site.has('hessian') else None
      site.keep('hessian', _accumulated(state, rows, mask, site.path, grouped))
      return call(*args, **kwargs)

    known = {f'{path}/hessian'.lstrip('/'): state for path, state in states.items()}
    given = {**variables, COLLECTION: traverse_util.unflatten_dict(known, sep='/')}
    hooks = [Hook(any_of(paths), call=visit, collection=COLLECTION)]
    _, written = block.run(given, leaves, hooks, mutable=[COLLECTION])
    flat = traverse_util.flatten_dict(dict(written.get(COLLECTION, {})), sep='/')
    return {name.removesuffix('hessian').rstrip('/'): own for name, own in flat.items()}

  states: dict[str, HessianState] = {}
  run = None
  for leaves, mask in zip(batches, masks):
    args = (variables, restore(leaves), mask)
    if run is None:
      shapes = jax.eval_shape(accumulate, *args, states)
      states = jax.tree.map(lambda shape: np.zeros(shape.shape, shape.dtype), shapes)
      states = _like_sums(states, args[1])
      run = programs(accumulate, *args, states)
    states = run(*args, states)
  called = ((path, states.get(relative(path, block.path))) for path in paths)
  return {path: state.hessian for path, state in called if state is not None}


def _like_sums(states: PyTree, leaves: Sequence[Array]) -> PyTree:
  """Returns arrays on the devices of `leaves`, as sums over them lie there: no program is compiled twice."""
  home = leaves[0].sharding
  if isinstance(home, NamedSharding):
    return jax.device_put(states, NamedSharding(home.mesh, PartitionSpec()))
  return jax.device_put(states, home) if isinstance(home, SingleDeviceSharding) else states


def _accumulated(
  state: HessianState | None, rows: Array, mask: Array | None, path: str, grouped: bool
) -> HessianState:
  """Returns the state after the rows of one call, of those that count; of groups side by side."""
  if grouped:
    size = rows.shape[-2:]
    state = state or HessianState(jnp.zeros((size[0], size[1], size[1])), jnp.zeros((size[0],)))
    each = jax.vmap(lambda own, x: _accumulated(own, x, mask, path, False), (0, -2))
    return each(state, rows)
  state = state or init_hessian(rows.shape[-1])
  weights = row_weights(rows, mask, path)
  if weights is not None:
    rows = rows * weights.reshape(*weights.shape, *(1,) * (rows.ndim - weights.ndim)).astype(
      rows.dtype
    )
  return accumulate_hessian(state, rows)


def _quantize(
  kernel: Array,
  hessian: Array | None,
  path: str,
  layout: KernelLayout,
  todo: operands.Plan,
  options: Mapping[str, Any],
) -> tuple[GPTQKernel, str]:
  """Quantizes one kernel, and says why it was rounded to nearest, if it was; None for a Hessian does that.

  On a mesh each device takes a share of the outputs, which are independent.
  """
  kernel = jnp.asarray(kernel)
  home = kernel.sharding
  plain, hessian, reached = _prepared(kernel, hessian, layout)
  if isinstance(home, NamedSharding):
    mesh = home.mesh
    outputs = mesh.axis_names if plain.shape[-1] % mesh.size == 0 else None
    spread = NamedSharding(mesh, PartitionSpec(*[None] * (plain.ndim - 1), outputs))
    whole = NamedSharding(mesh, PartitionSpec())
    plain, hessian = jax.device_put(plain, spread), jax.device_put(hessian, whole)
  reached = np.asarray(reached)
  missed = '' if reached.all() else 'no calibration input reached it'
  if missed and reached.any():
    missed = f'no calibration input reached {(~reached).sum()} of its {len(reached)} groups'
  bits = todo.kernel_bits[path]
  try:
    found = _quantize_plain(plain, hessian, bits, layout.groups, options)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  kernel, codes, *constants = _restored(found, layout, kernel.shape)
  if isinstance(home, NamedSharding):
    kernel, constants = jax.device_put(kernel, home), jax.device_put(constants, whole)
  return GPTQKernel(kernel, codes, *constants), missed


# One program a layout: hundreds of small ones would take longer to compile than all kernels to quantize.
@functools.partial(jax.jit, static_argnames='layout')
def _prepared(
  kernel: Array, hessian: Array | None, layout: KernelLayout
) -> tuple[Array, Array, Array]:
  """Returns the plain kernel, its Hessian, of groups one each, and which of them an input reached."""
  plain = layout.plain(kernel)
  rows = math.prod(plain.shape[int(layout.groups > 1) : -1])
  groups = (layout.groups,) if layout.groups > 1 else ()
  nearest = jnp.broadcast_to(jnp.eye(rows), (*groups, rows, rows))
  if hessian is None:
    return plain, nearest, jnp.zeros(layout.groups, bool)
  # Of what no input reached, every weight would be as good as another: GPTQ takes 0.
  reached = jnp.any((hessian != 0) & (nearest != 0), (-2, -1))
  hessian = jnp.where(reached[..., None, None], hessian, nearest)
  return plain, hessian, jnp.atleast_1d(reached)


@functools.partial(jax.jit, static_argnames=('layout', 'shape'))
def _restored(found: GPTQKernel, layout: KernelLayout, shape: tuple[int, ...]) -> GPTQKernel:
  """Returns what was found for a plain kernel, or for those of groups, in the layout of the layer."""
  kernel, codes = (layout.restore(part, shape) for part in (found.kernel, found.codes))
  scale, zero_point, group = found.scale, found.zero_point, found.group
  if layout.groups > 1:
    scale, zero_point = (
      jnp.moveaxis(a, 0, -2).reshape(a.shape[1], -1) for a in (scale, zero_point)
    )
    group = group[0]
  return GPTQKernel(kernel, codes, scale, zero_point, group)


def _quantize_plain(
  kernel: Array, hessian: Array, bits: Any, groups: int, options: Mapping[str, Any]
) -> GPTQKernel:
  """Quantizes a kernel `[..., in, out]`, or those of groups `[groups, ..., in, out]`."""
  if groups == 1:
    return gptq_kernel(kernel, hessian, bits, **options)
  if options.get('group_size') and options.get('act_order'):
    raise ValueError(
      'act_order orders the inputs of each group of a convolution by itself: no group_size.'
    )
  found = jax.vmap(lambda own, h: gptq_kernel(own, h, bits, **options))(kernel, hessian)
  if not np.all(np.isfinite(found.kernel)):
    raise ValueError(
      'A damped Hessian is not positive definite, or inputs or weights are not finite: use more calibration '
      'data or a larger damping.'
    )
  return found


def _outputs(
  block: Part, variables: PyTree, batches: Sequence[list], programs: Programs
) -> list[list]:
  def forward(variables, leaves):
    return array_leaves(block.run(variables, leaves, ()))

  run, outputs = None, []
  for leaves in batches:
    args = (variables, restore(leaves))
    run = run or programs(forward, *args)
    outputs.append(park(run(*args)))
  return outputs


def _constants(found: GPTQKernel, path: str, todo: operands.Plan) -> dict[str, Array]:
  high = 2.0 ** jnp.asarray(todo.kernel_bits[path], jnp.float32) - 1
  constants = {'low': jnp.zeros_like(high), 'high': high}
  if len(found.scale) == 1:
    shape = channel_shape(found.kernel.shape, todo.layers[path].channels)
    own = {'scale': found.scale, 'zero_point': found.zero_point}
    return constants | {name: leaf.reshape(shape) for name, leaf in own.items()}
  return constants | {
    'scale': found.scale, 'zero_point': found.zero_point, 'group': found.group
  }  # fmt: skip
