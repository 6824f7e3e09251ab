"""Kernels and outputs of an untouched model by the smallest and largest value, by path.

The pieces, for training loops that quantize in every step:

- `quantize_weights(params, rules)`: a pure transform of the parameters;
- `range_hooks(rules)`: hooks that record the range of each quantized output in the collection `'ranges'`;
- `fake_quantize_hooks(rules)`: hooks that read those ranges and fake-quantize the outputs.

And the whole, for a trained network: `ptq(model, variables, batches, rules)`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.intercept import Hook, Site, apply
from jaxlab.quantizers.networks.batches import (
  Batches,
  Call,
  Counted,
  as_call,
  jitted_calls,
  only_counted,
  peek,
)
from jaxlab.quantizers.networks.layers import find_layers
from jaxlab.quantizers.networks.operands import (
  join,
  kernels_in_float,
  operand_hooks,
  with_axes,
)
from jaxlab.quantizers.networks.outputs import NOT_CARRIED, look_at_outputs, why_no_output
from jaxlab.quantizers.networks.quantized import COLLECTION, Quantized, check_model
from jaxlab.quantizers.networks.rules import (
  Bits,
  Rule,
  Rules,
  check_accepted,
  check_rules,
  decide,
  quantizer_of,
)
from jaxlab.quantizers.networks.weights import (
  KERNELS,
  kernel_constants,
  named_kernels,
  quantize_weights,
)
from jaxlab.quantizers.numerics import affine
from jaxlab.quantizers.numerics.affine import AffineParams, AffineQuantizer
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any

OUTPUTS = AffineQuantizer(rule='asymmetric', granularity='tensor')


def range_hooks(
  rules: Rules,
  quantizer: AffineQuantizer = OUTPUTS,
  collection: str = 'ranges',
  *,
  mask: Array | None = None,
) -> list[Hook]:
  """Returns hooks that record the running minimum and maximum of every output that `rules` quantize.

  Outputs that are no float array are left alone. Apply the model with `mutable=['ranges']`. The ranges of a
  second batch are merged with those that `variables` hold, so that calibration is a loop over batches; those
  of a second call of a module likewise. Recorded values carry no gradient.

  Args:
    rules: those over outputs are read.
    quantizer: granularity, where the rules choose none.
    collection: of the ranges.
    mask: bool `[batch, ...]`, which positions count; None: all.

  Raises (when the model is applied):
    ValueError: if the shape of an output does not tell which positions count.
  """

  def record(site: Site, y: Array, rule: Rule) -> Array:
    own = only_counted(jax.lax.stop_gradient(y), mask, site.path)
    minimum, maximum = affine.min_max(quantizer_of(rule, quantizer), own)
    if site.has('minimum'):
      minimum = jnp.minimum(minimum, site.read('minimum'))
      maximum = jnp.maximum(maximum, site.read('maximum'))
    site.write('minimum', minimum)
    site.write('maximum', maximum)
    return y

  return _output_hooks(rules, record, collection)


def fake_quantize_hooks(
  rules: Rules,
  quantizer: AffineQuantizer = OUTPUTS,
  *,
  degenerate: Literal['element', 'tensor'] = 'element',
  collection: str = 'ranges',
) -> list[Hook]:
  """Returns hooks that fake-quantize every output that `rules` name, with ranges from `variables`.

  An output that was 0 throughout is left as it is. Of a dead channel (per channel) the scale is 1; with
  `degenerate='tensor'` it keeps the whole output in float (SSQL's code).

  Raises (when the model is applied):
    ValueError: if a module has no range: the model was not calibrated.
  """

  def quantize(site: Site, y: Array, rule: Rule) -> Array:
    own, ends = quantizer_of(rule, quantizer), (site.read('minimum'), site.read('maximum'))
    if degenerate == 'tensor':
      calibrated = affine.params_from_range(own, *ends, rule.bits, on_degenerate='identity')
    else:
      calibrated = _output_params(own, *ends, rule.bits)
    return affine.fake_quantize(own, y, calibrated, degenerate=degenerate)

  return _output_hooks(rules, quantize, collection)


def _output_hooks(
  rules: Rules, visit: Callable[[Site, Array, Rule], Array], collection: str
) -> list[Hook]:
  """Returns one hook a pattern; `visit(site, y, rule)` runs once an output, for the rule that decides."""

  def bind(pattern: str) -> Hook:
    def output(site: Site, y: Array) -> Array:
      rule = decide(rules, site.path, 'output')
      mine = rule is not None and rule.path == pattern and why_no_output(y) is None
      return visit(site, y, rule) if mine else y

    return Hook(pattern, output=output, collection=collection)

  check_rules(rules, 'A hook on outputs')
  patterns = dict.fromkeys(rule.path for rule in rules if rule.operand == 'output')
  return [bind(pattern) for pattern in patterns]


def _output_params(
  quantizer: AffineQuantizer, minimum: Array, maximum: Array, bits: Bits
) -> AffineParams:
  """Returns the parameters of an output; the scale is 0, for identity, where all of it was 0."""
  params = affine.params_from_range(quantizer, minimum, maximum, bits)
  dead = (minimum == 0) & (maximum == 0)
  dead = dead if quantizer.granularity == 'tensor' else jnp.all(dead)
  return params.replace(scale=jnp.where(dead, 0, params.scale))


def collect_ranges(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Batches,
  rules: Rules,
  quantizer: AffineQuantizer = OUTPUTS,
  *,
  counted: Counted = None,
  **kwargs: Any,
) -> PyTree:
  """Returns the ranges of all outputs that `rules` quantize, over `batches` of model inputs.

  The model runs in float, one jitted call per batch.

  Args:
    model: any Linen module.
    variables: its variables.
    batches: model inputs, each an array `[batch, ...]`, a tuple of arguments or a mapping of keywords (one
      shape: one compilation).
    rules: those over outputs are read.
    quantizer: granularity of the ranges, where the rules choose none.
    counted: which positions enter the ranges; see `percentile_ptq`.
    **kwargs: passed to the model with every batch, e.g. `train=False`.

  Raises:
    ValueError: if there is no batch, or the data lead to ranges that are not finite.
  """

  def observe(call: Call, mask: Array | None, variables: PyTree, ranges: PyTree) -> PyTree:
    hooks = range_hooks(rules, quantizer, mask=mask)
    given = {**variables, 'ranges': ranges} if ranges else variables
    args, kwargs = call
    _, state = apply(model, given, *args, hooks=hooks, mutable=['ranges'], **kwargs)
    return state.get('ranges', {})

  ranges: PyTree = {}
  for run in jitted_calls(observe, model, batches, kwargs, counted):
    ranges = run(dict(variables), ranges)
  _check_finite(ranges)
  return ranges


def _check_finite(ranges: PyTree) -> None:
  flat = traverse_util.flatten_dict(ranges, sep='/')
  bad = sorted(p for p, v in flat.items() if is_concrete(v) and not np.all(np.isfinite(v)))
  if bad:
    raise ValueError(f'Calibration data give non-finite ranges at {", ".join(bad[:5])}.')


def ptq(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Batches,
  rules: Rules,
  *,
  anatomy: Anatomy | None = None,
  kernels: AffineQuantizer = KERNELS,
  outputs: AffineQuantizer = OUTPUTS,
  counted: Counted = None,
  **kwargs: Any,
) -> Quantized:
  """Post-training quantization of kernels and outputs with ranges from their smallest to their largest value.

  Kernels have their own range (`quantize_weights`), outputs that seen by the float network on the batches.
  There is nothing in it that integers could be made of: layers read the quantized outputs of what is before
  them, if anything quantizes there; `percentile_ptq` quantizes their inputs.

  Args:
    model: any Linen module.
    variables: its variables; kept as they are except for the quantized kernels.
    batches: calibration inputs, seen one after another: ranges are those of all. See `percentile_ptq`.
    rules: over kernels and outputs, 1 to 16 bits, with scales for the tensor or for channels. Bits may be
      traced.
    anatomy: the names of the model's parts, for what goes on from the result; None: `models.anatomy(model)`.
    kernels: quantizer of the kernels, by default one range a channel.
    outputs: quantizer of the outputs, by default one range.
    counted: which positions enter the ranges; see `percentile_ptq`.
    **kwargs: passed to the model with every batch, e.g. `train=False`.

  Raises:
    ValueError: if there is no batch, a rule matches no module or asks for what is not done here (checked
      before any computation), or a range is not finite.
  """
  check_model(model, variables)
  choices = ('tensor', 'channel')
  check_accepted(rules, 'ptq', {'kernel': choices, 'output': choices})
  first, batches = peek(batches)
  call = as_call(first, kwargs)
  outputs_in_float = look_at_outputs(model, variables, call, rules)
  layers = find_layers(model, variables, *call[0], **call[1])
  flat = traverse_util.flatten_dict(dict(variables['params']), sep='/')
  named = named_kernels(flat, rules, kernels, layers)
  constants = {}
  if any(rule.operand == 'output' for rule in rules):
    ranges = collect_ranges(model, variables, batches, rules, outputs, counted=counted, **kwargs)
    constants = jax.jit(functools.partial(_constants, rules=rules, default=outputs))(ranges)
  own = traverse_util.flatten_dict(constants, sep='/')
  for path, reason in outputs_in_float.items():
    if reason is None and join(path, 'output/scale') not in own:
      outputs_in_float[path] = NOT_CARRIED
  # A module that Linen does not call (one of NNX, bridged) would take constants for parameters of its own.
  for path, (rule, quantizer, stacked) in ((path, named[path]) for path in layers if path in named):
    kernel = flat[join(path, 'kernel')]
    found = kernel_constants(quantizer, kernel, rule.bits, stacked)
    own |= {join(path, f'kernel/{name}'): leaf for name, leaf in found.items()}
  quantized = {
    **variables,
    'params': quantize_weights(variables['params'], rules, kernels, layers=layers),
    COLLECTION: traverse_util.unflatten_dict(own, sep='/'),
  }
  for path in layers.keys() & named:
    layers[path] = with_axes(layers[path], named[path].rule, flat[join(path, 'kernel')].shape)
  skipped = kernels_in_float(flat, rules, named)
  skipped |= {path: reason for path, reason in outputs_in_float.items() if reason is not None}
  fields = {'kwargs': kwargs, 'anatomy': anatomy, 'layers': layers, 'skipped': skipped}
  return Quantized.of(model, quantized, variables, operand_hooks(), **fields)


def _constants(ranges: PyTree, rules: Rules, default: AffineQuantizer) -> PyTree:
  """Returns the constants of outputs, all in the shape of their range, which `nn.scan` may have stacked."""
  flat, found = traverse_util.flatten_dict(ranges), {}
  for *path, _ in (path for path in flat if path[-1] == 'minimum'):
    ends = flat[*path, 'minimum'], flat[*path, 'maximum']
    rule = decide(rules, '/'.join(path), 'output')
    params = _output_params(quantizer_of(rule, default), *ends, rule.bits)
    for name in ('scale', 'zero_point', 'low', 'high'):
      found[*path, 'output', name] = jnp.broadcast_to(getattr(params, name), ends[0].shape)
  return traverse_util.unflatten_dict(found)
