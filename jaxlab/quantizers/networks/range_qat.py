"""Learned ranges around an untouched model: EWGS's quantized layers, which QFD trains.

What is learned lies in the collection `'learned_ranges'`, at the layer: `kernel` and `input`, each
`{lower, upper}`, and `output_scale`; constants, bit-widths and which inputs are signed, in `'range_bits'`. A
layer computes

  y = |output_scale| layer(Q_A(input), Q_W(kernel)) + bias

with `Q_W` in [-1, 1] and `Q_A` in [0, 1] (`range_quantize`); a module whose output is quantized, the
features of QFD's teacher, has an `output`, `{lower, upper}` and perhaps `beta` (`quantize_feature`).
Inputs with negative values (of a transformer's layers) are quantized as weights are, to [-1, 1]: levels
from 0 would add a constant to every output.

Training is that of any model whose
parameters are `params` and `learned_ranges`, the latter with an optimizer of their own (Adam at 1e-5
without weight decay in EWGS's code):

  network = range_qat(model, variables, images, rules)
  optimizer = by_path([('learned_ranges/.*', optax.adam(1e-5)), ('.*', sgd)])

  def loss(trained):  # {'params': ..., 'learned_ranges': ...}
    logits = network.update(**trained)(images)
    ...
"""

import collections
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.blockwise import Skeleton
from jaxlab.models.intercept import Hook, Site, apply, first_argument
from jaxlab.models.main_arrays import array_leaves
from jaxlab.quantizers.networks.batches import (
  Batches,
  Counted,
  Positions,
  as_call,
  counted_mask,
  joined_batch,
  positions_of,
)
from jaxlab.quantizers.networks.input_ranges import seen_rows
from jaxlab.quantizers.networks.layers import check_unstacked, find_layers
from jaxlab.quantizers.networks.operands import join
from jaxlab.quantizers.networks.outputs import look_at_outputs
from jaxlab.quantizers.networks.quantized import (
  COLLECTION,
  Quantized,
  check_model,
)
from jaxlab.quantizers.networks.rules import Rules, check_accepted, check_matches, decide
from jaxlab.quantizers.numerics.bit_widths import check_bits
from jaxlab.quantizers.numerics.range_uniform import (
  activation_range,
  feature_scale,
  output_scale,
  quantize_feature,
  range_quantize,
  weight_range,
)
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any

RANGES, BITS = 'learned_ranges', 'range_bits'
_ALONE = 'range_qat_layer'


def range_qat(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Batches,
  rules: Rules,
  *,
  delta: float = 0.0,
  signed_inputs: bool | None = None,
  units: Literal['feature', 'scaled'] = 'feature',
  anatomy: Anatomy | None = None,
  counted: Counted = None,
  **kwargs: Any,
) -> Quantized:
  """Returns the network with learned ranges at their first values.

  They are measured in one forward pass, in order of execution, each on values that all layers before it have
  been quantized for: `weight_range`, `activation_range`, and `output_scale` of the layer on the input that it
  got; those of a module that is called again on all its calls. What a rule for outputs names and is no array
  of floats is in the result's `skipped`. QFD leaves the first convolution, the last layer and batch norm in
  float. Its teacher is a float network with quantized features:

    teacher = range_qat(model, variables, images, [Rule(anatomy.features, 'output', 4, learned=True)])

  Args:
    model: any Linen module. Its quantized layers have a field `use_bias`, as all of Linen's do.
    variables: its float variables.
    batches: a first training batch of model inputs; several are taken as one. See `percentile_ptq`.
    rules: over kernels and inputs of layers, and outputs of modules, all `learned`, one range a tensor; 1 to
      16 bits, which may be traced.
    delta: see `range_quantize`: 0 is straight-through (QFD), 0.001 and the like EWGS.
    signed_inputs: whether inputs and quantized outputs are signed; None: those that have a negative value.
    units: of quantized outputs, see `quantize_feature`.
    anatomy: the names of the model's parts, for what goes on from the result; None: `models.anatomy(model)`.
    counted: which positions are measured; see `percentile_ptq`.
    **kwargs: passed to the model with every batch, e.g. `train=False`. With `train=True` layers are measured
      behind the statistics of the batch, as in EWGS's code; running statistics stay as they are, and the
      network is called with `mutable=['batch_stats']` or `train=False`.

  Raises:
    ValueError: if there is no batch, a rule names no layer, is not learned or asks for what is not done here,
      bits are out of range, blocks are stacked, a layer has no field `use_bias`, or a range is not finite or
      does not open (weights that are all 0).

  References:
    Zhu et al., Quantized Feature Distillation for Network Quantization, AAAI 2023
    (https://arxiv.org/abs/2307.10638); Lee et al., CVPR 2021 (https://arxiv.org/abs/2104.00903), whose layers
    have no bias.
  """
  check_model(model, variables)
  own = ('tensor',)
  check_accepted(
    rules, 'range_qat', dict.fromkeys(('kernel', 'input', 'output'), own), learned=True
  )
  if units not in ('feature', 'scaled'):
    raise ValueError(f"units={units!r}; choose 'feature' or 'scaled'.")
  called = as_call(joined_batch(batches), kwargs)
  positions = positions_of(counted_mask(counted, model, called))
  # What a model writes in training (running statistics) is not kept.
  written = [name for name in variables if name != 'params']
  traced = called[0], {**called[1], 'mutable': written}
  layers = list(found := find_layers(model, variables, *traced[0], **traced[1]))
  check_unstacked(found, 'range_qat')
  bits: dict[str, dict[str, Any]] = {}
  named = look_at_outputs(model, variables, traced, rules)
  outputs = [path for path, reason in named.items() if reason is None]
  for operand, paths in (('kernel', layers), ('input', layers), ('output', outputs)):
    if operand != 'output':
      check_matches(rules, operand, paths)
    for path in paths:
      if (rule := decide(rules, path, operand)) is not None:
        check_bits(rule.bits)
        bits.setdefault(path, {})[operand] = jnp.asarray(rule.bits, jnp.float32)
  skeleton = Skeleton.of(called)

  calls = collections.Counter()

  @jax.jit
  def run(
    variables: PyTree, leaves: list[Array], bits: PyTree, positions: Any, ends: PyTree
  ) -> PyTree:
    def measure(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
      # A layer that is run alone has the path of the model.
      if site.path not in bits or site.module.name == _ALONE:
        return call(*args, **kwargs)
      own = bits[site.path]
      if 'kernel' in own or 'input' in own:
        calls[site.path] += 1
        y = _measured(site, args, kwargs, own, signed_inputs, positions, bool(ends))
      else:
        y = call(*args, **kwargs)
      if 'output' in own:
        y = _measured_output(site, y, own['output'], units, signed_inputs, positions)
      return y

    hooks = [Hook('.*', call=measure, collection=RANGES)]
    args, kwargs = skeleton.fill(leaves)
    given = {**variables, RANGES: traverse_util.unflatten_dict(ends, sep='/')}
    _, state = apply(model, given, *args, hooks=hooks, mutable=[RANGES, *written], **kwargs)
    found = traverse_util.flatten_dict(dict(state.get(RANGES, {})), sep='/')
    return {name: leaf for name, leaf in found.items() if '/.' not in f'/{name}'}  # nothing seen

  given = dict(variables), array_leaves(called), bits, positions
  found = run(*given, {})
  if max(calls.values(), default=0) > 1:
    # The scale of an output is in units of the input's range, which a later call may have widened.
    found = run(*given, {n: v for n, v in found.items() if n.rpartition('/')[2] != 'output_scale'})
  constants = {join(p, o): b for p, each in bits.items() for o, b in each.items()}
  for name in [name for name in found if name.rpartition('/')[2] == 'signed']:
    constants[name] = found.pop(name)
  _check_ranges(found)
  own = {
    RANGES: traverse_util.unflatten_dict(found, sep='/'),
    BITS: traverse_util.unflatten_dict(constants, sep='/'),
    COLLECTION: {},
  }
  return Quantized.of(
    model,
    {**variables, **own},
    variables,
    _hooks(delta),
    kwargs=kwargs,
    anatomy=anatomy,
    prepare=_prepare(delta),
    skipped={path: reason for path, reason in named.items() if reason is not None},
  )


def _measured(
  site: Site,
  args: tuple,
  kwargs: Mapping[str, Any],
  bits: Mapping[str, Array],
  signed: bool | None,
  positions: Positions | None,
  known: bool,
) -> Array:
  """Returns the layer's quantized output; writes its ranges, on the values of all calls so far.

  With `known` ranges it writes the scale of its output alone.
  """
  module, kernel = site.module, site.module.scope.get_variable('params', 'kernel')
  if not hasattr(module, 'use_bias'):
    raise ValueError(
      f'range_qat runs a layer without its bias to measure its output, but {site.path!r} '
      f'({type(module).__name__}) has no field use_bias: leave it out of the rules.'
    )
  bare = module.clone(parent=None, name=_ALONE, use_bias=False)

  def layer(kernel: Array, x: Array) -> Array:
    args, kwargs = given(x)
    return bare.apply({'params': {'kernel': kernel}}, *args, **kwargs)

  x, given = first_argument(site, args, kwargs)
  new_kernel, new_x = kernel, x
  if 'kernel' in bits:
    if not site.has('kernel'):
      site.write('kernel', weight_range(kernel)._asdict())
    own = site.read('kernel')
    new_kernel = range_quantize(kernel, **own, bits=bits['kernel'], signed=True)
  if 'input' in bits:
    if not known:
      rows = seen_rows(site, x, positions, 'tensor', '.input')
      site.write('signed', jnp.min(rows) < 0 if signed is None else jnp.asarray(signed))
      site.write('input', activation_range(rows, signed=site.read('signed'))._asdict())
    own, negative = site.read('input'), site.read('signed')
    new_x = range_quantize(x, **own, bits=bits['input'], signed=negative)
  y = layer(new_kernel, new_x)
  both = {'.exact': layer(kernel, x), '.quantized': y}
  both = (seen_rows(site, value, positions, 'tensor', name) for name, value in both.items())
  site.write('output_scale', output_scale(*both))
  y = y * site.read('output_scale').astype(y.dtype)
  if site.module.scope.has_variable('params', 'bias'):
    y = y + site.module.scope.get_variable('params', 'bias').astype(y.dtype)
  return y


def _measured_output(
  site: Site,
  y: Array,
  bits: Array,
  units: str,
  signed: bool | None,
  positions: Positions | None,
) -> Array:
  """Returns a module's quantized output; writes its range, on the values of all calls so far."""
  rows = seen_rows(site, y, positions, 'tensor', '.output')
  negative = jnp.min(rows) < 0 if signed is None else jnp.asarray(signed)
  ends = activation_range(rows, signed=negative)
  scale = {'beta': feature_scale(rows, *ends, bits)} if units == 'scaled' else {}
  site.write('output', {**ends._asdict(), **scale})
  return _quantized_output(y, site.read('output'), bits, 0.0)


def _quantized_output(y: Array, own: Mapping[str, Array], bits: Array, delta: float) -> Array:
  beta = own.get('beta')
  units = 'feature' if beta is None else 'scaled'
  return quantize_feature(y, own['lower'], own['upper'], bits, units=units, beta=beta, delta=delta)


def _has(site: Site, operand: str) -> bool:
  """Whether there is a range of an operand; a module within this one may be called as it is."""
  return site.has(operand) and 'lower' in site.read(operand)


def _check_ranges(flat: Mapping[str, Array]) -> None:
  for name, lower in flat.items():
    if not name.endswith('/lower') or not is_concrete(lower):
      continue
    operand, upper = name.removesuffix('/lower'), flat[f'{name.removesuffix("/lower")}/upper']
    if not (np.isfinite(lower) and np.isfinite(upper) and upper > lower):
      raise ValueError(
        f'The range of {operand!r}, [{lower}, {upper}], is not finite or does not open: are the weights and '
        f'the calibration batch free of NaN, and not all 0?'
      )


@functools.cache
def _hooks(delta: float) -> tuple[Hook, ...]:
  """Returns the hooks that quantize inputs; for one delta the same, so that nothing is compiled twice."""

  def visit(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _has(site, 'input'):
      bits, signed = (site.module.scope.get_variable(BITS, n) for n in ('input', 'signed'))
      x, given = first_argument(site, args, kwargs)
      ends = site.read('input')
      args, kwargs = given(range_quantize(x, **ends, bits=bits, signed=signed, delta=delta))
    y = call(*args, **kwargs)
    if _has(site, 'output'):
      bits = site.module.scope.get_variable(BITS, 'output')
      y = _quantized_output(y, site.read('output'), bits, delta)
    return y

  return (Hook('.*', call=visit, collection=RANGES),)


@functools.cache
def _prepare(delta: float) -> Callable[[dict[str, PyTree]], dict[str, PyTree]]:
  """Returns the function of the variables that puts `|output_scale| Q_W(kernel)` in place of kernels."""

  def prepare(variables: dict[str, PyTree]) -> dict[str, PyTree]:
    ranges, bits, params = (
      traverse_util.flatten_dict(dict(variables[name]), sep='/')
      for name in (RANGES, BITS, 'params')
    )
    for name, scale in ranges.items():
      if name.rpartition('/')[2] != 'output_scale':
        continue
      path = f'{name.removesuffix("output_scale")}kernel'
      kernel = params[path]
      new = kernel
      if path in bits:
        ends = ranges[f'{path}/lower'], ranges[f'{path}/upper']
        new = range_quantize(kernel, *ends, bits[path], signed=True, delta=delta)
      params[path] = (jnp.abs(scale) * new).astype(kernel.dtype)
    return {**variables, 'params': traverse_util.unflatten_dict(params, sep='/')}

  return prepare
