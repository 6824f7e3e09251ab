"""Quantizers on the operands of products: inputs and kernels of layers, both sides of attention's matmuls.

A network quantized here is `(model, variables, hooks)`, used by
`jaxlab.models.apply(model, variables, x, hooks=hooks)`. Kernels are fake-quantized in `params`; the constants
are arrays of the collection `'quantization'`, at the module whose operand they quantize:

- `input`: of the module's first argument. Affine `{scale, zero_point, low, high}`, scalars or
  `[channels]`; log-sqrt2 `{scale, bits}`.
- `kernel`: of its kernel, `{scale, zero_point, low, high}`, the first two `[features]`: the codes of the
  fake-quantized kernel are `round(kernel / scale) + zero_point`.
- `bias`: what is added to the output of a layer that has no bias of its own (see `repq`).

The hooks hold no constants and name no path: the same ones serve every network and, given a block's own
slice of the variables, every block of it. Variables whose collection has no `input` run in float.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.intercept import Hook, HookPoint, Site, any_of, apply
from jaxlab.quantizers import affine
from jaxlab.quantizers.affine import AffineParams, AffineQuantizer
from jaxlab.quantizers.logarithmic import log_sqrt2_fake_quantize
from jaxlab.quantizers.policy import BitPolicy, Bits, check_rules
from jaxlab.quantizers.ranges import percentile_range
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any

COLLECTION = 'quantization'
TENSOR = AffineQuantizer(rule='asymmetric', granularity='tensor')
CHANNEL = AffineQuantizer(rule='asymmetric', granularity='channel', axis=-1)

MIN_BITS, MAX_BITS = 2, 8

# The first and last layers of all networks of `jaxlab.models`: their `anatomy(model).edges`.
EDGES = any_of(
  [
    *('conv1', 'conv_stem', 'patch_embed/proj', 'fc0'),
    *('fc', 'linear', 'classifier', 'head', 'head_dist', 'head/fc', 'lm_head'),
  ]
)
AFFINE_POINTS = r'(.*/)?(query|key|value)'
LOGARITHMIC_POINTS = r'(.*/)?softmax'


class Quantized(NamedTuple):
  """A quantized network and the float network that it approximates.

  Attributes:
    variables: of the quantized network, collection `'quantization'` included.
    float_variables: of the same network with all quantizers off. Its collection `'quantization'` is empty
      except for biases that layers without one were given; then it, too, needs the hooks.
    hooks: for `jaxlab.models.apply`, with either of the two.
  """

  variables: dict[str, PyTree]
  float_variables: dict[str, PyTree]
  hooks: tuple[Hook, ...]


def operand_hooks() -> tuple[Hook, ...]:
  """Returns the hooks that run a network by its collection `'quantization'`: the same for all networks.

  A module with an `input` there gets its first argument fake-quantized (straight-through gradient, constants
  constant); one with a `bias` gets it added to its output; any other is left alone.

  Raises (when the model is applied):
    ValueError: if the variables have no collection `'quantization'`: the network was not calibrated.
  """
  return (Hook('.*', call=_run_site, collection=COLLECTION),)


def _run_site(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  if not site.path and COLLECTION not in site.module.variables:
    raise ValueError(
      f'The variables have no collection {COLLECTION!r}, so nothing would be quantized: pass those of '
      f'`percentile_ptq` or `repq` (a block: its slice of every collection, which may be empty).'
    )
  if site.has('input'):
    args = (fake_quantize_operand(args[0], site.read('input')), *args[1:])
  y = call(*args, **kwargs)
  return y + site.read('bias').astype(y.dtype) if site.has('bias') else y


def fake_quantize_operand(x: Array, constants: Mapping[str, Array]) -> Array:
  """Returns `x` fake-quantized by constants of the collection, affine or log-sqrt2."""
  if 'zero_point' not in constants:
    return log_sqrt2_fake_quantize(x, constants['scale'], constants['bits'])
  params = AffineParams(
    **{name: constants[name] for name in ('scale', 'zero_point', 'low', 'high')}
  )
  return affine.fake_quantize(TENSOR, x, params)


def edge_policy(
  weight_bits: Bits,
  activation_bits: Bits,
  *,
  edges: str | Anatomy | None = EDGES,
  edge_bits: Bits = 8,
) -> BitPolicy:
  """Returns the policy `(weight_bits, activation_bits)`, with `edge_bits` for both at modules `edges`.

  Patch embedding or stem and the classifier at 8/8 are QwT's exceptions.

  Args:
    weight_bits: of kernels.
    activation_bits: of inputs (or outputs, as the method reads the policy).
    edges: `models.anatomy(model)`, whose `edges` are the exceptions; or their pattern, by default what they
      are called in the networks of this library; None makes none.
    edge_bits: of both at the exceptions.

  >>> policy = edge_policy(4, 4)
  >>> policy.weight_bits('head'), policy.weight_bits('blocks_0/mlp/fc1')
  (8, 4)
  """
  if isinstance(edges, Anatomy):
    edges = any_of(edges.edges) or None
  first = () if edges is None else ((edges, edge_bits),)
  return BitPolicy((*first, ('.*', weight_bits)), (*first, ('.*', activation_bits)))


class Plan(NamedTuple):
  """Which operands of a network are quantized, in order of execution.

  Attributes:
    kinds: static pairs (path, kind of the quantizer of its input): `'tensor'`, `'channel'`, `'log_sqrt2'`.
    input_bits: bit-width by path, of `kinds`.
    kernel_bits: bit-width of kernels by path.
    kernel_ndims: dimensions of all kernels by path.
  """

  kinds: tuple[tuple[str, str], ...]
  input_bits: dict[str, Bits]
  kernel_bits: dict[str, Bits]
  kernel_ndims: dict[str, int]


def plan(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  x: Array,
  policy: BitPolicy,
  *,
  per_channel: Sequence[str] = (),
  **kwargs: Any,
) -> Plan:
  """Returns what `policy` asks to be quantized; traces the model abstractly.

  Candidates are the modules with a `kernel` and the hook points `query`, `key`, `value` (affine) and
  `softmax` (log-sqrt2).

  Args:
    model: any Linen module.
    variables: its variables.
    x: model input, or its shape.
    policy: its `activations` rules are over *inputs* of candidates.
    per_channel: paths whose input gets one quantizer a channel.
    **kwargs: passed to the model.

  Raises:
    ValueError: if a rule names no candidate, bits are outside 2 to 8, or blocks are stacked.
  """
  ndims: dict[str, int] = {}
  points: dict[str, str] = {}

  def visit(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if site.module.scope.has_variable('params', 'kernel'):
      kernel = site.module.scope.get_variable('params', 'kernel')
      ndims[site.path], points[site.path] = kernel.ndim, 'tensor'
    elif isinstance(site.module, HookPoint):
      for pattern, kind in ((AFFINE_POINTS, 'tensor'), (LOGARITHMIC_POINTS, 'log_sqrt2')):
        if re.fullmatch(pattern, site.path):
          points[site.path] = kind
    return call(*args, **kwargs)

  jax.eval_shape(
    lambda v, x: apply(model, v, x, hooks=[Hook('.*', call=visit)], **kwargs), dict(variables), x
  )
  check_rules(policy.weights, list(ndims), 'weight')
  check_rules(policy.activations, list(points), 'activation')
  flat = traverse_util.flatten_dict(dict(variables['params']), sep='/')
  stacked = [path for path, ndim in ndims.items() if flat[f'{path}/kernel'].ndim != ndim]
  if stacked:
    raise ValueError(
      f'The kernels of {", ".join(stacked[:3])} are stacked (nn.scan): quantize the plain network, with '
      f'variables of `unstack_blocks`.'
    )
  kinds = {path: 'channel' if path in per_channel else kind for path, kind in points.items()}
  input_bits = {path: bits for path in kinds if (bits := policy.activation_bits(path)) is not None}
  kernel_bits = {path: bits for path in ndims if (bits := policy.weight_bits(path)) is not None}
  for path, bits in (*input_bits.items(), *kernel_bits.items()):
    check_bits(path, bits)
  return Plan(tuple((p, kinds[p]) for p in input_bits), input_bits, kernel_bits, ndims)


def check_bits(path: str, bits: Bits) -> None:
  """Raises ValueError if `bits` of the operand at `path` are known and outside of 2 to 8."""
  if not is_concrete(bits):
    return
  if not MIN_BITS <= float(bits) <= MAX_BITS:
    raise ValueError(f'bits of {path!r} must lie in [{MIN_BITS}, {MAX_BITS}]; got {bits}.')


def quantize_kernels(
  params: PyTree, kernel_bits: Mapping[str, Bits]
) -> tuple[PyTree, dict[str, dict[str, Array]]]:
  """Returns `params` with fake-quantized kernels, and `{path: constants}` of the collection's `kernel`.

  One range per output channel (last axis), by `percentile_range`. Kernels of equal shape share one
  compilation, for all bit-widths.
  """
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  constants = {}
  for path, bits in kernel_bits.items():
    name = f'{path}/kernel'
    flat[name], constants[path] = _quantize_kernel(flat[name], bits)
  return traverse_util.unflatten_dict(flat, sep='/'), constants


@jax.jit
def _quantize_kernel(kernel: Array, bits: Bits) -> tuple[Array, dict[str, Array]]:
  constants = affine_constants(CHANNEL, kernel, bits)
  return fake_quantize_operand(kernel, constants), constants


def finite_or_nan(x: Array) -> Array:
  """Returns `x`, or NaN everywhere if it is not finite; what is computed of it waits for the answer."""
  return jnp.where(jnp.all(jnp.isfinite(x)), x, jnp.nan)


@functools.partial(jax.jit, static_argnums=0)
def affine_constants(quantizer: AffineQuantizer, x: Array, bits: Bits) -> dict[str, Array]:
  """Returns `{scale, zero_point, low, high}` by `percentile_range`, scalars or `[channels]`.

  A range below 16 units in the last place of its bounds is that of a constant: its scale is 0, which leaves
  values as they are. If `x` is not finite, the scale is NaN.
  """
  x = finite_or_nan(jax.lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32)))
  minimum, maximum = percentile_range(quantizer, x, bits)
  shape = () if quantizer.granularity == 'tensor' else (-1,)
  minimum, maximum = minimum.reshape(shape), maximum.reshape(shape)
  params = affine.params_from_range(quantizer, minimum, maximum, bits)
  extreme = jnp.maximum(jnp.abs(minimum), jnp.abs(maximum))
  constant = maximum - minimum <= 16 * jnp.finfo(x.dtype).eps * extreme
  return {
    'scale': jnp.where(constant, 0, params.scale),
    'zero_point': jnp.where(constant, 0, params.zero_point),
    'low': params.low,
    'high': params.high,
  }


def collection(
  inputs: Mapping[str, Mapping[str, Array]],
  kernels: Mapping[str, Mapping[str, Array]],
  biases: Mapping[str, Array],
) -> dict[str, PyTree]:
  """Returns the tree of the collection `'quantization'` from constants by module path."""
  flat = {f'{path}/input': dict(constants) for path, constants in inputs.items()}
  flat |= {f'{path}/kernel': dict(constants) for path, constants in kernels.items()}
  flat |= {f'{path}/bias': bias for path, bias in biases.items()}
  return traverse_util.unflatten_dict(flat, sep='/')


def check_finite(
  inputs: Mapping[str, Mapping[str, Array]], kernels: Mapping[str, Mapping[str, Array]]
) -> None:
  """Raises ValueError if a scale is not finite; names the first kernel, or else the first input.

  What is calibrated behind a broken operand is broken, too. Traced constants pass unseen.
  """
  for what, constants in (('kernel', kernels), ('input', inputs)):
    finite = _finite([own['scale'] for own in constants.values()])
    if is_concrete(finite) and not np.all(finite):
      raise ValueError(
        f'The {what} of {list(constants)[int(np.argmin(finite))]!r} is not finite: are the weights and the '
        f'calibration batch free of NaN and infinity?'
      )


@jax.jit
def _finite(arrays: list[Array]) -> Array:
  return jnp.asarray([jnp.all(jnp.isfinite(array)) for array in arrays], bool)
