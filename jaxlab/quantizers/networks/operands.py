"""Quantizers on the operands of products: inputs and kernels of layers, both sides of attention's matmuls.

Kernels of a quantized network are fake-quantized in `params`; the constants are arrays of the collection
`'quantization'`, at the module whose operand they quantize:

- `input`: of the module's first argument. Affine `{scale, zero_point, low, high}`, scalars or
  `[channels]`; of each token by its own maximum `{epsilon, low, high}`; log-sqrt2 `{scale, bits}`; learned
  `{step, low, high}` (LSQ).
- `kernel`: of its kernel, `{scale, zero_point, low, high}`, the first two `[features]`, or in the shape that
  broadcasts against a kernel whose outputs are other axes: the codes of the fake-quantized kernel are
  `round(kernel / scale) + zero_point`.
- `embedding`: of its table, as `kernel`, the first two `[rows, 1]`; `input` is then that of a tied head.
- `output`: of what the module returns, affine or by token, or absent.
- `bias`: what is added to the output of a layer that has no bias of its own (see `repq`).

The hooks hold no constants and name no path: the same ones serve every network and, given a block's own
slice of the variables, every block of it. Operands without constants stay in float.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.intercept import Hook, HookPoint, Site, first_argument
from jaxlab.models.main_arrays import is_array
from jaxlab.quantizers.networks.batches import Batch, as_call, trace_calls
from jaxlab.quantizers.networks.layers import (
  TABLES,
  VECTORS,
  Layer,
  check_channels,
  check_unstacked,
  layer_of,
)
from jaxlab.quantizers.networks.quantized import COLLECTION, check_model
from jaxlab.quantizers.networks.rules import (
  Bits,
  Rule,
  Rules,
  check_accepted,
  check_matches,
  decide,
)
from jaxlab.quantizers.numerics import affine
from jaxlab.quantizers.numerics.affine import AffineParams, AffineQuantizer
from jaxlab.quantizers.numerics.learned import lsq_fake_quantize
from jaxlab.quantizers.numerics.logarithmic import log_sqrt2_fake_quantize
from jaxlab.quantizers.numerics.quantiles import quantiles_of_finite
from jaxlab.quantizers.numerics.ranges import PERCENTILES, best_candidate
from jaxlab.quantizers.numerics.row_sums import has_one_cpu
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any

TENSOR = AffineQuantizer(rule='asymmetric', granularity='tensor')
CHANNEL = AffineQuantizer(rule='asymmetric', granularity='channel', axis=-1)

LEARNED = ('step', 'low', 'high')
BY_TOKEN = ('epsilon', 'low', 'high')
Constant = Literal['widen', 'zeros', 'mark']
FLOOR = 1e-6  # smallest learned step; one that has sunk below gets no gradient
METHODS = ('__call__', 'attend')  # whose first argument is an operand
MIN_BITS, MAX_BITS = 2, 8

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
  return (Hook('.*', call=_run_site, collection=COLLECTION, methods=METHODS),)


def reads_operand(site: Site) -> bool:
  """Returns whether this call reads an operand: of an embedding not the lookup, but a tied head's product."""
  return isinstance(site.module, nn.Embed) == (site.method == 'attend')


def _run_site(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  if not site.path and COLLECTION not in site.module.variables:
    raise ValueError(
      f'The variables have no collection {COLLECTION!r}, so nothing would be quantized: call the `Quantized` '
      f'network, or pass the variables of its `unbind()` (a block: its slice of every collection, which may '
      f'be empty).'
    )
  if site.has('input') and reads_operand(site):
    x, given = first_argument(site, args, kwargs)
    args, kwargs = given(fake_quantize_operand(x, site.read('input')))
  y = call(*args, **kwargs)
  if site.method != '__call__':
    return y
  y = y + site.read('bias').astype(y.dtype) if site.has('bias') else y
  return fake_quantize_operand(y, site.read('output')) if site.has('output') else y


def fake_quantize_operand(x: Array, constants: Mapping[str, Array]) -> Array:
  """Returns `x` fake-quantized by constants of the collection: affine, by token, log-sqrt2 or learned."""
  if 'bits' in constants:
    return log_sqrt2_fake_quantize(x, constants['scale'], constants['bits'])
  if 'epsilon' in constants:
    return affine.fake_quantize(TENSOR, x, token_params(x, constants))
  if 'step' in constants:
    return lsq_fake_quantize(x, *(constants[n] for n in LEARNED), floor=FLOOR)
  params = AffineParams(
    **{name: constants[name] for name in ('scale', 'zero_point', 'low', 'high')}
  )
  return affine.fake_quantize(TENSOR, x, params)


def token_params(x: Array, constants: Mapping[str, Array]) -> AffineParams:
  """Returns the params of each token of `x` `[..., channels]`: its scale is `(max |x| + epsilon) / high`."""
  epsilon, low, high = (constants[name] for name in BY_TOKEN)
  x = jax.lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32))
  largest = jnp.max(jnp.abs(x), -1, keepdims=True)
  return AffineParams((largest + epsilon) / high, jnp.zeros_like(high), low, high)


def affine_form(constants: Mapping[str, Array]) -> dict[str, Array]:
  """Returns constants as affine ones: learned codes `[Q_n, Q_p]` become `[0, Q_p - Q_n]`."""
  if 'step' not in constants:
    return dict(constants)
  step, low, high = (jnp.asarray(constants[name]) for name in LEARNED)
  scale = jnp.maximum(step, FLOOR)
  shape = scale.shape
  while len(shape) > 1 and shape[0] == 1:
    shape = shape[1:]
  scale = scale.reshape(shape)
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
    layers: all layers with a kernel by path.
    skipped: kernels that rules name and that are not quantized, by path, and why.
    table_bits: bit-width of embedding tables by path.
  """

  kinds: tuple[tuple[str, str], ...]
  input_bits: dict[str, Bits]
  kernel_bits: dict[str, Bits]
  layers: dict[str, Layer]
  skipped: dict[str, str]
  table_bits: dict[str, Bits]


def plan(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  x: Batch,
  rules: Rules,
  name: str,
  /,
  *,
  learned: bool = False,
  kernels: str = 'channel',
  per_channel: Sequence[str] = (),
  tables: bool = False,
  **kwargs: Any,
) -> Plan:
  """Returns which kernels and inputs `rules` ask to be quantized; traces the model abstractly.

  Candidates are the modules with a `kernel` and the hook points `query`, `key`, `value` (affine) and
  `softmax` (log-sqrt2).

  Args:
    model: any Linen module.
    variables: its variables.
    x: a batch of model inputs, or their shapes.
    rules: over kernels and inputs.
    name: of the method, for messages.
    learned: whether it learns its steps.
    kernels: the granularity of its kernels.
    per_channel: paths whose input gets one quantizer a channel.
    tables: whether it quantizes embedding tables.
    **kwargs: passed to the model.

  Raises:
    ValueError: if a rule names no candidate or asks for what the method does not do, bits are outside 2 to 8,
      or blocks are stacked.
  """
  check_model(model, variables)
  accepted = {'kernel': (kernels,), 'input': ('tensor',)}
  accepted |= {'embedding': ('channel',)} if tables else {}
  check_accepted(rules, name, accepted, learned)
  table_bits: dict[str, Bits] = {}
  found_tables: list[str] = []
  layers: dict[str, Layer] = {}
  points: dict[str, str] = {}
  flat = traverse_util.flatten_dict(dict(variables['params']), sep='/')

  def visit(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    out = call(*args, **kwargs)
    if isinstance(site.module, nn.Embed):
      found_tables.append(site.path)
      rule = decide(rules, site.path, 'embedding') if tables else None
      table_bits.update({} if rule is None else {site.path: rule.bits})
      if rule is not None and site.method == 'attend':
        points[site.path] = 'tensor'
    elif site.method != '__call__':
      pass
    elif (layer := layer_of(site, flat, args, kwargs)) is not None:
      layers.setdefault(site.path, layer)
      if is_array(out):  # others hand their kernels over to those who multiply
        points[site.path] = 'tensor'
    elif isinstance(site.module, HookPoint):
      for pattern, kind in ((AFFINE_POINTS, 'tensor'), (LOGARITHMIC_POINTS, 'log_sqrt2')):
        if re.fullmatch(pattern, site.path):
          points[site.path] = kind
    return out

  trace_calls(model, variables, as_call(x, kwargs), visit, methods=METHODS)
  check_matches(rules, 'kernel', list(layers), found_tables)
  check_matches(rules, 'input', list(points))
  check_matches(rules, 'embedding', found_tables)
  check_unstacked(layers, name)
  kinds = {path: 'channel' if path in per_channel else kind for path, kind in points.items()}
  input_bits, kernel_bits = (
    {path: rule.bits for path in paths if (rule := decide(rules, path, operand)) is not None}
    for operand, paths in (('input', kinds), ('kernel', layers))
  )
  for path in kernel_bits:
    shape = flat[join(path, 'kernel')].shape
    layers[path] = with_axes(layers[path], decide(rules, path, 'kernel'), shape)
    check_channels(path, layers[path], shape)
  for path, bits in (*input_bits.items(), *kernel_bits.items(), *table_bits.items()):
    check_bits(path, bits)
  skipped = kernels_in_float(flat, rules, (*kernel_bits, *table_bits))
  kinds = tuple((path, kinds[path]) for path in input_bits)
  return Plan(kinds, input_bits, kernel_bits, layers, skipped, table_bits)


def said_by(todo: Plan) -> dict[str, Any]:
  """Returns the fields of `Quantized` that a plan knows."""
  return {'layers': todo.layers, 'skipped': todo.skipped}


def kernels_in_float(
  flat: Mapping[str, Any], rules: Rules, quantized: Iterable[str]
) -> dict[str, str]:
  """Returns the modules with weights that rules for kernels name and that are not quantized, and why.

  Tables and tokens are looked up or added, never multiplied with: rules for kernels are not meant for them.
  """
  quantized, skipped = set(quantized), {}
  for name, leaf in flat.items():
    path, _, own = name.rpartition('/')
    if (
      path in quantized or leaf.ndim < 2 or own in VECTORS or decide(rules, path, 'kernel') is None
    ):
      continue
    if own == 'kernel':
      skipped[path] = 'the model does not call it'
    elif path and not TABLES.fullmatch(own):
      skipped.setdefault(path, f'its {own} is no kernel')
  return skipped


def with_axes(layer: Layer, rule: Rule, shape: tuple[int, ...]) -> Layer:
  """Returns the layer with the channel axes of the rule, if it gives some, for a kernel of a shape."""
  if rule.axes is None:
    return layer
  ndim = len(shape)
  if not all(-ndim <= axis < ndim for axis in rule.axes):
    raise ValueError(
      f'axes={rule.axes} of the rule for {rule.path!r} are not those of a kernel {tuple(shape)}.'
    )
  return layer._replace(channels=tuple(sorted({axis % ndim - ndim for axis in rule.axes})))


def join(path: str, name: str) -> str:
  """Returns the path of what a module at `path` holds; either may be empty."""
  return f'{path}/{name}' if path and name else path or name


def check_bits(path: str, bits: Bits) -> None:
  """Raises ValueError if `bits` of the operand at `path` are known and outside of 2 to 8."""
  if not is_concrete(bits):
    return
  if not MIN_BITS <= float(bits) <= MAX_BITS:
    raise ValueError(f'bits of {path!r} must lie in [{MIN_BITS}, {MAX_BITS}]; got {bits}.')


def is_finite(x: Array) -> Array:
  """Returns whether all values are finite, a scalar."""
  return jnp.all(jnp.isfinite(x))


@functools.partial(jax.jit, static_argnums=(0, 3))
def affine_constants(
  quantizer: AffineQuantizer, x: Array, bits: Bits, constant: Constant = 'widen'
) -> dict[str, Array]:
  """Returns `{scale, zero_point, low, high}` by `percentile_range`, scalars or `[channels]`.

  A range below 16 units in the last place of its bounds is that of a constant, see `constants_of_range`.
  If `x` is not finite, the scale is NaN.
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
  return constants_of_range(
    quantizer, minimum.reshape(shape), maximum.reshape(shape), bits, constant
  )


def constants_of_range(
  quantizer: AffineQuantizer,
  minimum: Array,
  maximum: Array,
  bits: Bits,
  constant: Constant = 'widen',
) -> dict[str, Array]:
  """Returns `{scale, zero_point, low, high}` of a range.

  Args:
    quantizer: static choices.
    minimum: of what shares a scale.
    maximum: of the same.
    bits: of the codes.
    constant: what becomes of the range of a constant: `'widen'` makes it hold 0, and gives zeros the scale
      1, as `params_from_range` does; `'zeros'` the same, but zeros get the scale 0, which leaves values as
      they are: nothing is known of their size; `'mark'` gives the scale 0 to every constant.
  """
  extreme = jnp.maximum(jnp.abs(minimum), jnp.abs(maximum))
  flat = maximum - minimum <= 16 * jnp.finfo(minimum.dtype).eps * extreme
  if constant != 'mark':
    minimum = jnp.where(flat, jnp.minimum(minimum, 0), minimum)
    maximum = jnp.where(flat, jnp.maximum(maximum, 0), maximum)
  params = affine.params_from_range(quantizer, minimum, maximum, bits)
  kept = {'widen': False, 'zeros': flat & (extreme == 0), 'mark': flat}[constant]
  return {
    'scale': jnp.where(kept, 0, params.scale),
    'zero_point': jnp.where(kept, 0, params.zero_point),
    'low': params.low,
    'high': params.high,
  }


def collection(
  inputs: Mapping[str, Mapping[str, Array]],
  kernels: Mapping[str, Mapping[str, Array]],
  biases: Mapping[str, Array],
  tables: Mapping[str, Mapping[str, Array]] = {},
) -> dict[str, PyTree]:
  """Returns the tree of the collection `'quantization'` from constants by module path."""
  flat = {f'{path}/input': dict(constants) for path, constants in inputs.items()}
  flat |= {f'{path}/kernel': dict(constants) for path, constants in kernels.items()}
  flat |= {f'{path}/bias': bias for path, bias in biases.items()}
  flat |= {f'{path}/embedding': dict(constants) for path, constants in tables.items()}
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
