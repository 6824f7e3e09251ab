"""GPTQ through a whole network, block by block, and its kernels as packed codes.

All layers of a block see the inputs that the already quantized blocks before it give (Frantar et al. 2023,
in the order of the authors' code without `true_sequential`).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from flax.linen.linear import canonicalize_padding
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.block_stream import Stream
from jaxlab.models.blockwise import (
  Part,
  Programs,
  array_leaves,
  find_blocks,
  park,
  relative,
  restore,
  slice_variables,
)
from jaxlab.models.intercept import Hook, Site, any_of
from jaxlab.quantizers.networks import operands
from jaxlab.quantizers.networks.calibration import calibrate_inputs
from jaxlab.quantizers.networks.quantized import COLLECTION, Quantized, peek
from jaxlab.quantizers.networks.rules import Rules
from jaxlab.quantizers.numerics.affine import AffineQuantizer
from jaxlab.quantizers.numerics.gptq import (
  GPTQKernel,
  HessianState,
  accumulate_hessian,
  gptq_kernel,
  init_hessian,
  unfold,
)
from jaxlab.quantizers.numerics.integers import pack_int4
from jaxlab.quantizers.numerics.storage import QuantizedArray

Array = jax.Array
PyTree = Any


def gptq_ptq(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Array | Iterable[Array],
  rules: Rules,
  *,
  anatomy: Anatomy | None = None,
  blocks: str | None = None,
  programs: Programs | None = None,
  options: Mapping[str, Any] = {},
  **kwargs: Any,
) -> Quantized:
  """Post-training quantization with GPTQ kernels, and inputs by percentiles where rules ask for them.

  Block by block in order of execution: the Hessians of all its kernels over all batches, in one forward pass
  each; its kernels by `gptq_kernel` (in the kernels' own dtype: in bfloat16 they are rounded once more); its
  outputs with these. A kernel outside of the blocks (a classifier)
  is rounded to nearest with the same range rule. Then, where rules ask for inputs, their ranges are found in
  one pass over the first batch (as in `percentile_ptq`). Batches may be sharded over a mesh:
  Hessians are sums over the whole batch. A batch is on the devices alone, the others wait in host memory.
  Kernels that lie on a mesh are quantized there, each device a share of the outputs, and stay split as they
  were.

  Args:
    model: any Linen module whose blocks run one after another.
    variables: its float variables.
    batches: calibration inputs `[batch, ...]` of one shape, 128 sequences of 2048 tokens in GPTQ: Hessians
      are sums over all of them.
    rules: over kernels and inputs, 2 to 8 bits. Only weights: `[Rule('.*/(mlp|attn)/.*', 'kernel', 4)]`.
    anatomy: the names of the model's parts; None: `models.anatomy(model)`.
    blocks: regular expression of the blocks' paths; None: the blocks of the anatomy.
    programs: compiled functions of earlier calls, as in `compensate`.
    options: of `gptq_kernel`: `group_size`, `symmetric`, `mse`, `act_order`, `damping`, ...
    **kwargs: passed to the model, e.g. `train=False`.

  Returns:
    The network. The constants of a kernel in groups are `scale` and `zero_point` `[groups, features]` and
    `group` `[in]`; such a layer runs in float (`integer_network` says so), its codes are `gptq_array`'s.

  Raises:
    ValueError: if there is no batch, the model's parts are not known, a rule names nothing or asks for what
      is not done here, blocks are nested, shared or stacked, a kernel to be quantized belongs to a grouped
      convolution, or weights, inputs or Hessians are not finite.
  """
  batches = list(peek(batches)[1])
  kind = 'group' if options.get('group_size') else 'channel'
  todo = operands.plan(model, variables, batches[0], rules, 'gptq_ptq', kernels=kind, **kwargs)
  inputs = [(batch,) for batch in batches]
  root, parts = find_blocks(model, variables, inputs[0], kwargs, (), blocks, anatomy)
  programs = Programs() if programs is None else programs
  params = traverse_util.flatten_dict(dict(variables['params']), sep='/')
  constants: dict[str, dict[str, Array]] = {}
  stream = Stream(root, parts, variables, (), inputs, kwargs, programs)
  for index, block in enumerate(parts):
    stream.advance(index)
    inside = [path for path in todo.kernel_bits if path.startswith(f'{block.path}/')]
    own = slice_variables(variables, block.path)
    hessians = _hessians(block, own, inside, stream.leaves, programs)
    for path in inside:
      found = _quantize(params[f'{path}/kernel'], hessians[path], path, todo, options)
      params[f'{path}/kernel'] = found.kernel
      constants[path] = _constants(found, todo.kernel_bits[path])
    new = slice_variables({**variables, 'params': _tree(params)}, block.path)
    stream.outputs = _outputs(block, new, stream.leaves, programs)
  for path in todo.kernel_bits:
    if path not in constants:
      kernel = params[f'{path}/kernel']
      rows = int(np.prod(kernel.shape[:-1]))
      found = _quantize(kernel, jnp.eye(rows), path, todo, options)
      params[f'{path}/kernel'] = found.kernel
      constants[path] = _constants(found, todo.kernel_bits[path])

  quantized = {**variables, 'params': _tree(params)}
  ranges = {}
  if todo.kinds:
    ranges = calibrate_inputs(model, quantized, batches[0], todo, anatomy, **kwargs)
  operands.check_finite(ranges, constants)
  quantized[COLLECTION] = operands.collection(ranges, constants, {})
  hooks = operands.operand_hooks()
  return Quantized.of(model, quantized, variables, hooks, kwargs=kwargs, anatomy=anatomy)


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
  codes = pack_int4(codes) if bits <= 4 else codes
  return QuantizedArray(codes, scale, zero_point, quantizer, tuple(found.kernel.shape))


def _tree(params: Mapping[str, Array]) -> PyTree:
  return traverse_util.unflatten_dict(params, sep='/')


def _hessians(
  block: Part,
  variables: PyTree,
  paths: Sequence[str],
  batches: Sequence[list],
  programs: Programs,
) -> dict[str, Array]:
  """Returns the Hessian of every kernel's inputs over all batches, by path."""
  if not paths:
    return {}

  def accumulate(variables, leaves, states):
    new = {}

    def visit(site: Site, call, *args, **kwargs):
      x = _patches(site.module, args[0])
      path = relative(site.path, block.path)
      state = states.get(path) or init_hessian(x.shape[-1])
      new[path] = accumulate_hessian(state, x)
      return call(*args, **kwargs)

    block.run(variables, leaves, [Hook(any_of(paths), call=visit)])
    return new

  states: dict[str, HessianState] = {}
  run = {}
  for leaves in batches:
    args = (variables, restore(leaves), states)
    started = bool(states)
    run[started] = run.get(started) or programs(accumulate, *args)
    states = run[started](*args)
  return {path: states[relative(path, block.path)].hessian for path in paths}


def _patches(module: nn.Module, x: Array) -> Array:
  """Returns the rows that a layer's flattened kernel multiplies."""
  if not isinstance(module, nn.Conv):
    return x
  if module.feature_group_count != 1:
    raise ValueError(
      f'{"/".join(module.path)!r} is a grouped convolution: leave it out of the rules, or quantize each '
      f"group's kernel by gptq_kernel."
    )
  size = module.kernel_size
  padding = canonicalize_padding(module.padding, len(size))
  strides, dilation = (
    (value,) * len(size) if isinstance(value, int) else tuple(value or (1,) * len(size))
    for value in (module.strides, module.kernel_dilation)
  )
  return unfold(x, size, strides, padding, dilation)


def _quantize(
  kernel: Array, hessian: Array, path: str, todo: operands.Plan, options: Mapping[str, Any]
) -> GPTQKernel:
  """Quantizes one kernel; on a mesh each device takes a share of the outputs, which are independent."""
  kernel = jnp.asarray(kernel)
  home = kernel.sharding
  if isinstance(home, NamedSharding):
    mesh = home.mesh
    outputs = mesh.axis_names if kernel.shape[-1] % mesh.size == 0 else None
    spread = NamedSharding(mesh, PartitionSpec(*[None] * (kernel.ndim - 1), outputs))
    whole = NamedSharding(mesh, PartitionSpec())
    kernel, hessian = jax.device_put((kernel, hessian), (spread, whole))
  try:
    found = gptq_kernel(kernel, hessian, todo.kernel_bits[path], **options)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error
  if isinstance(home, NamedSharding):
    constants = jax.device_put((found.scale, found.zero_point, found.group), whole)
    found = GPTQKernel(jax.device_put(found.kernel, home), found.codes, *constants)
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


def _constants(found: GPTQKernel, bits: Any) -> dict[str, Array]:
  high = 2.0 ** jnp.asarray(bits, jnp.float32) - 1
  constants = {'low': jnp.zeros_like(high), 'high': high}
  if len(found.scale) == 1:
    return constants | {'scale': found.scale[0], 'zero_point': found.zero_point[0]}
  return constants | {
    'scale': found.scale, 'zero_point': found.zero_point, 'group': found.group
  }  # fmt: skip
