"""Quantizers on the operands of products: inputs and kernels of layers, both sides of attention's matmuls.

Kernels of a quantized network are fake-quantized in `params`; the constants are arrays of the collection
`'quantization'`, at the module whose operand they quantize:

- `input`: of the module's first argument. Affine `{scale, zero_point, low, high}`, scalars or
  `[channels]`; log-sqrt2 `{scale, bits}`; learned `{step, low, high}` (LSQ).
- `kernel`: of its kernel, `{scale, zero_point, low, high}`, the first two `[features]`: the codes of the
  fake-quantized kernel are `round(kernel / scale) + zero_point`.
- `output`: of what the module returns, affine, or absent.
- `bias`: what is added to the output of a layer that has no bias of its own (see `repq`).

The hooks hold no constants and name no path: the same ones serve every network and, given a block's own
slice of the variables, every block of it. Operands without constants stay in float.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.intercept import Hook, HookPoint, Site, apply
from jaxlab.quantizers.networks.quantized import COLLECTION, check_model
from jaxlab.quantizers.networks.rules import Bits, Rules, check_accepted, check_matches, decide
from jaxlab.quantizers.numerics import affine
from jaxlab.quantizers.numerics.affine import AffineParams, AffineQuantizer
from jaxlab.quantizers.numerics.learned import lsq_fake_quantize
from jaxlab.quantizers.numerics.logarithmic import log_sqrt2_fake_quantize
from jaxlab.quantizers.numerics.quantiles import quantiles_by_ends, quantiles_of_finite
from jaxlab.quantizers.numerics.ranges import PERCENTILES, best_candidate
from jaxlab.quantizers.numerics.row_sums import has_one_cpu
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any

TENSOR = AffineQuantizer(rule='asymmetric', granularity='tensor')
CHANNEL = AffineQuantizer(rule='asymmetric', granularity='channel', axis=-1)

LEARNED = ('step', 'low', 'high')
FLOOR = 1e-6  # smallest learned step; one that has sunk below gets no gradient
MIN_BITS, MAX_BITS = 2, 8
SMALL = 2**19  # values of a kernel that may be searched together with others
LENGTHS = 8  # largest ratio of lengths in one such search

AFFINE_POINTS = r'(.*/)?(query|key|value)'
LOGARITHMIC_POINTS = r'(.*/)?softmax'


def operand_hooks() -> tuple[Hook, ...]:
  """Returns the hooks that run a network by its collection `'quantization'`: the same for all networks.

  A module with an `input` there gets its first argument fake-quantized (straight-through gradient, constants
  constant, but for learned steps); one with a `bias` gets it added to its output, which is fake-quantized if
  there is an `output`; any other is left alone.

  Raises (when the model is applied):
    ValueError: if the variables have no collection `'quantization'`: the network was not calibrated.
  """
  return (Hook('.*', call=_run_site, collection=COLLECTION),)


def _run_site(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  if not site.path and COLLECTION not in site.module.variables:
    raise ValueError(
      f'The variables have no collection {COLLECTION!r}, so nothing would be quantized: call the `Quantized` '
      f'network, or pass the variables of its `unbind()` (a block: its slice of every collection, which may '
      f'be empty).'
    )
  if site.has('input'):
    args = (fake_quantize_operand(args[0], site.read('input')), *args[1:])
  y = call(*args, **kwargs)
  y = y + site.read('bias').astype(y.dtype) if site.has('bias') else y
  return fake_quantize_operand(y, site.read('output')) if site.has('output') else y


def fake_quantize_operand(x: Array, constants: Mapping[str, Array]) -> Array:
  """Returns `x` fake-quantized by constants of the collection: affine, log-sqrt2 or learned."""
  if 'bits' in constants:
    return log_sqrt2_fake_quantize(x, constants['scale'], constants['bits'])
  if 'step' in constants:
    return lsq_fake_quantize(x, *(constants[n] for n in LEARNED), floor=FLOOR)
  params = AffineParams(
    **{name: constants[name] for name in ('scale', 'zero_point', 'low', 'high')}
  )
  return affine.fake_quantize(TENSOR, x, params)


def affine_form(constants: Mapping[str, Array]) -> dict[str, Array]:
  """Returns constants as affine ones: learned codes `[Q_n, Q_p]` become `[0, Q_p - Q_n]`."""
  if 'step' not in constants:
    return dict(constants)
  step, low, high = (jnp.asarray(constants[name]) for name in LEARNED)
  scale = jnp.maximum(step, FLOOR)
  scale = scale.ravel() if scale.ndim else scale
  return {
    'scale': scale,
    'zero_point': jnp.full_like(scale, -low),
    'low': jnp.zeros_like(high),
    'high': high - low,
  }


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
  rules: Rules,
  method: str,
  *,
  learned: bool = False,
  kernels: str = 'channel',
  per_channel: Sequence[str] = (),
  **kwargs: Any,
) -> Plan:
  """Returns which kernels and inputs `rules` ask to be quantized; traces the model abstractly.

  Candidates are the modules with a `kernel` and the hook points `query`, `key`, `value` (affine) and
  `softmax` (log-sqrt2).

  Args:
    model: any Linen module.
    variables: its variables.
    x: model input, or its shape.
    rules: over kernels and inputs.
    method: its name, for messages.
    learned: whether it learns its steps.
    kernels: the granularity of its kernels.
    per_channel: paths whose input gets one quantizer a channel.
    **kwargs: passed to the model.

  Raises:
    ValueError: if a rule names no candidate or asks for what the method does not do, bits are outside 2 to 8,
      or blocks are stacked.
  """
  check_model(model, variables)
  check_accepted(rules, method, {'kernel': (kernels,), 'input': ('tensor',)}, learned)
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
  check_matches(rules, 'kernel', list(ndims))
  check_matches(rules, 'input', list(points))
  flat = traverse_util.flatten_dict(dict(variables['params']), sep='/')
  stacked = [path for path, ndim in ndims.items() if flat[f'{path}/kernel'].ndim != ndim]
  if stacked:
    raise ValueError(
      f'The kernels of {", ".join(stacked[:3])} are stacked (nn.scan): quantize the plain network, with '
      f'variables of `unstack_blocks`.'
    )
  kinds = {path: 'channel' if path in per_channel else kind for path, kind in points.items()}
  input_bits, kernel_bits = (
    {path: rule.bits for path in paths if (rule := decide(rules, path, operand)) is not None}
    for operand, paths in (('input', kinds), ('kernel', ndims))
  )
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
  compilation, and small ones of about the same length one search; both for all bit-widths.
  """
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  groups: dict[tuple, list[str]] = {}
  for path, bits in kernel_bits.items():
    kernel = flat[f'{path}/kernel']
    alone = (path,) if not _is_small(kernel, bits) else (_length_class(kernel), kernel.dtype)
    groups.setdefault(alone, []).append(path)
  found = {}
  for paths in groups.values():
    kernels = [flat[f'{path}/kernel'] for path in paths]
    if len(paths) == 1:
      found[paths[0]] = _quantize_kernel(*kernels, kernel_bits[paths[0]])
    else:
      each = _quantize_kernels_together(kernels, [kernel_bits[path] for path in paths])
      found |= dict(zip(paths, each))
  constants = {}
  for path in kernel_bits:
    flat[f'{path}/kernel'], constants[path] = found[path]
  return traverse_util.unflatten_dict(flat, sep='/'), constants


def _is_small(kernel: Array, bits: Bits) -> bool:
  """Whether a kernel may be searched together with others, laid side by side in host memory."""
  if not (is_concrete(kernel) and is_concrete(bits)) or kernel.size > SMALL:
    return False
  return isinstance(kernel, np.ndarray) or len(kernel.sharding.device_set) == 1


def _length_class(kernel: Array) -> int:
  return math.ceil(math.log(max(kernel.size // kernel.shape[-1], 1), LENGTHS))


@jax.jit
def _quantize_kernel(kernel: Array, bits: Bits) -> tuple[Array, dict[str, Array]]:
  constants = affine_constants(CHANNEL, kernel, bits)
  return fake_quantize_operand(kernel, constants), constants


def _quantize_kernels_together(
  kernels: Sequence[Array], bits: Sequence[Bits]
) -> list[tuple[Array, dict[str, Array]]]:
  """Returns what `_quantize_kernel` does, for each, by one search over the rows of all channels.

  It is the search that takes long to compile; all the rest is done by NumPy.
  """
  matrices = [np.asarray(kernel).reshape(-1, kernel.shape[-1]).T for kernel in kernels]
  columns = max(matrix.shape[1] for matrix in matrices)
  rows = np.concatenate(
    [
      np.pad(matrix, ((0, 0), (0, columns - matrix.shape[1])), constant_values=np.nan)
      for matrix in matrices
    ]
  )
  channels = [len(matrix) for matrix in matrices]
  each = np.repeat(np.asarray(bits, np.float32), channels)
  lengths = tuple(matrix.shape[::-1] for matrix in matrices)
  rows, constants = jax.device_get(_quantize_rows(rows, each, lengths))
  found = []
  for kernel, matrix, end in zip(kernels, matrices, np.cumsum(channels)):
    start = end - len(matrix)
    new = rows[start:end, : matrix.shape[1]].T.reshape(kernel.shape)
    own = {
      name: leaf[start:end] if name in ('scale', 'zero_point') else leaf[start]
      for name, leaf in constants.items()
    }
    home = None if isinstance(kernel, np.ndarray) else kernel.sharding
    found.append(jax.device_put((new, own), home and next(iter(home.device_set))))
  return found


@functools.partial(jax.jit, static_argnames='lengths')
def _quantize_rows(
  rows: Array, bits: Array, lengths: tuple[tuple[int, int], ...]
) -> tuple[Array, dict[str, Array]]:
  """Returns fake-quantized rows and their constants.

  Args:
    rows: `[channels, columns]`, filled up with NaN.
    bits: `[channels]`.
    lengths: number of values a channel, and of channels, for each kernel.
  """
  wide = rows.astype(jnp.promote_types(rows.dtype, jnp.float32))
  counts = np.repeat(*np.transpose(lengths))
  fill = np.arange(rows.shape[1]) >= counts[:, None]
  shares = [1 - p for p in PERCENTILES] + list(PERCENTILES)
  ends = (jnp.where(fill, value, wide) for value in (-jnp.inf, jnp.inf))
  bounds = quantiles_by_ends(*ends, counts, shares)
  minimum, maximum = best_candidate(CHANNEL, wide, bits[:, None], bounds[..., None], (1,))
  # What the sorted ends of a broken row are is not said.
  minimum = jnp.where(jnp.all(fill | jnp.isfinite(wide), 1), minimum[:, 0], jnp.nan)
  constants = constants_of_range(CHANNEL, minimum, maximum[:, 0], bits)
  own = {name: leaf[:, None] for name, leaf in constants.items()}
  return fake_quantize_operand(rows, own), constants


def is_finite(x: Array) -> Array:
  """Returns whether all values are finite, a scalar."""
  return jnp.all(jnp.isfinite(jnp.stack([jnp.min(x), jnp.max(x)])))  # NaN, if there is one


@functools.partial(jax.jit, static_argnums=0)
def affine_constants(quantizer: AffineQuantizer, x: Array, bits: Bits) -> dict[str, Array]:
  """Returns `{scale, zero_point, low, high}` by `percentile_range`, scalars or `[channels]`.

  A range below 16 units in the last place of its bounds is that of a constant: its scale is 0, which leaves
  values as they are. If `x` is not finite, the scale is NaN.
  """
  x = jax.lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32))
  finite = is_finite(x)
  if not has_one_cpu():
    # Then the search waits for the answer. Of two collectives that do not depend on each other, one in a
    # loop, XLA on CPUs may start either first, on each device another, and they would wait for ever.
    x = jnp.where(finite, x, jnp.nan)
  axes = affine.reduction_axes(quantizer, x.ndim)
  bounds = quantiles_of_finite(x, tuple([1 - p for p in PERCENTILES] + list(PERCENTILES)), axes)
  shape = () if quantizer.granularity == 'tensor' else (-1,)
  minimum, maximum = best_candidate(quantizer, x, bits, bounds, axes)
  minimum = jnp.where(finite, minimum, jnp.nan)
  return constants_of_range(quantizer, minimum.reshape(shape), maximum.reshape(shape), bits)


def constants_of_range(
  quantizer: AffineQuantizer, minimum: Array, maximum: Array, bits: Bits
) -> dict[str, Array]:
  """Returns `{scale, zero_point, low, high}` of a range; see `affine_constants`."""
  params = affine.params_from_range(quantizer, minimum, maximum, bits)
  extreme = jnp.maximum(jnp.abs(minimum), jnp.abs(maximum))
  constant = maximum - minimum <= 16 * jnp.finfo(minimum.dtype).eps * extreme
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
