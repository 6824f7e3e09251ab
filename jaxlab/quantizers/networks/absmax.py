"""Symmetric quantization by the largest magnitude: the simplest there is, and what outliers break."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.intercept import Hook, Site, apply, first_argument
from jaxlab.quantizers.networks.batches import (
  Batches,
  Call,
  Counted,
  as_call,
  jitted_calls,
  only_counted,
  peek,
)
from jaxlab.quantizers.networks.layers import (
  Layer,
  channel_shape,
  check_channels,
  check_unstacked,
  find_layers,
)
from jaxlab.quantizers.networks.operands import (
  METHODS,
  check_bits,
  fake_quantize_operand,
  join,
  kernels_in_float,
  operand_hooks,
  reads_operand,
  with_axes,
)
from jaxlab.quantizers.networks.outputs import NOT_CARRIED, look_at_outputs
from jaxlab.quantizers.networks.quantized import COLLECTION, Quantized, check_model
from jaxlab.quantizers.networks.rules import (
  Bits,
  Rule,
  Rules,
  check_accepted,
  check_matches,
  decide,
)
from jaxlab.quantizers.networks.tables import find_tables
from jaxlab.quantizers.numerics import affine
from jaxlab.quantizers.numerics.affine import AffineQuantizer
from jaxlab.quantizers.numerics.extremes import largest_magnitude
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any

ROWS = -2  # of a table: outputs of a head that is tied to it


def absmax_ptq(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Batches,
  rules: Rules,
  *,
  anatomy: Anatomy | None = None,
  epsilon: float = 1e-8,
  counted: Counted = None,
  seen: Mapping[str, Array] | None = None,
  **kwargs: Any,
) -> Quantized:
  """Post-training quantization by the largest magnitude: one static number a tensor, or one a token.

    x_hat = clip(round(x / s), -Q, Q) s,  s = (max |x| + epsilon) / Q,  Q = 2^(b-1) - 1

  Kernels by their own maximum, activations by that of the float network over all batches; later values beyond
  it saturate. Activations by `'token'` are dynamic: each by its own maximum over channels, at each call. The
  inputs of linear layers alone, and with the residual stream quantized too:

    linear = uniform_rules(8, inputs=8)
    stream = uniform_rules(outputs=8, path=any_of(models.anatomy(model).stream))
    network = absmax_ptq(model, variables, batches, [*linear, *stream])

  W8(C)A8(K), kernels by channel and inputs by token, is
  `[Rule('.*', 'kernel', 8, 'channel'), Rule(layers, 'input', 8, 'token')]`. Attention's operands are outputs
  of the hook points `query`, `key`, `value`, `softmax`. The table of an embedding has a rule of its own, a
  scale a `'tensor'` or a row (`'channel'`), which a tied head shares; the head's input is then an input of
  that module. `integer_network` makes integers of the layers whose input and kernel are quantized, the input
  with a static scale. What a rule for outputs names and is no array of floats is in the result's `skipped`.

  Args:
    model: any Linen module.
    variables: its float variables.
    batches: calibration inputs, seen one after another; see `percentile_ptq`.
    rules: over kernels and tables (one scale a `'tensor'`, the default, or a `'channel'`), inputs of layers
      with a kernel, and outputs of modules (one scale a `'tensor'`, the default, or a `'token'`, the last
      axis); 2 to 8 bits, which may be traced.
    anatomy: the names of the model's parts, for what goes on from the result; None: `models.anatomy(model)`.
    epsilon: not negative; keeps the scale of what is always 0 positive.
    counted: which positions are seen; see `percentile_ptq`.
    seen: what `largest_magnitudes` returned for this network and these batches, so that many rules take one
      calibration; then the network is not run. None: found here.
    **kwargs: passed to the model with every batch, e.g. `train=False`.

  Raises:
    ValueError: if there is no batch, a rule names no module or asks for what is not done here (a scale a
      token of what sums over more than the last axis: convolutions), bits are outside 2 to 8, blocks are
      stacked, `seen` lacks what a rule names (all before any work), or weights or calibration data are not
      finite.

  References:
    Liang et al., TWEO: Transformers Without Extreme Outliers Enables FP8 Training and Quantization for
    Dummies, CVPR 2026 (https://arxiv.org/abs/2511.23225), AbsMax in its W8(T)A8(T), W8(C)A8(T) and
    W8(C)A8(K).
  """
  check_model(model, variables)
  own, either = ('tensor', 'token'), ('tensor', 'channel')
  accepted = {'kernel': either, 'embedding': either, 'input': own, 'output': own}
  check_accepted(rules, 'absmax_ptq', accepted)
  if not epsilon >= 0:
    raise ValueError(f'epsilon must not be negative, got {epsilon}.')
  first, batches = peek(batches)
  call = as_call(first, kwargs)
  layers = find_layers(model, variables, *call[0], **call[1])
  check_unstacked(layers, 'absmax_ptq')
  outputs_in_float = look_at_outputs(model, variables, call, rules)
  tables, tied = find_tables(model, variables, call)
  heads = [path for path in tied if decide(rules, path, 'embedding') is not None]
  outputs = [path for path, reason in outputs_in_float.items() if reason is None]
  chosen = {}
  for operand, paths in (
    ('kernel', layers),
    ('embedding', tables),
    ('input', [*layers, *heads]),
    ('output', outputs),
  ):
    if operand != 'output':
      check_matches(rules, operand, list(paths), tables if operand == 'kernel' else ())
    chosen[operand] = {p: rule for p in paths if (rule := decide(rules, p, operand)) is not None}
    for path, rule in chosen[operand].items():
      check_bits(path, rule.bits)

  flat = traverse_util.flatten_dict(dict(variables['params']), sep='/')
  for path, rule in chosen['input'].items():
    if rule.granularity == 'token' and path in layers:  # a tied head sums over the last axis
      _check_tokens(path, layers[path], flat[join(path, 'kernel')].shape)
  constants: dict[str, dict[str, Array]] = {}
  static: dict[str, dict[str, Rule]] = {}
  for operand in ('input', 'output'):
    by_token = {p: rule for p, rule in chosen[operand].items() if rule.granularity == 'token'}
    for path, rule in by_token.items():
      constants[join(path, operand)] = _token_constants(rule.bits, epsilon)
    static[operand] = {p: rule for p, rule in chosen[operand].items() if p not in by_token}
  if seen is None and any(static.values()):
    seen = largest_magnitudes(
      model,
      variables,
      batches,
      **{f'{operand}s': paths for operand, paths in static.items()},
      counted=counted,
      **kwargs,
    )
    for path in [path for path in static['output'] if join(path, 'output') not in seen]:
      outputs_in_float[path] = NOT_CARRIED
      del static['output'][path]
  for operand, own_rules in static.items():
    for path, rule in own_rules.items():
      if (name := join(path, operand)) not in seen:
        raise ValueError(
          f'seen lacks {name!r}, which is quantized: largest_magnitudes(model, variables, batches, inputs, '
          f'outputs) of all paths that rules name.'
        )
      constants[name] = _constants(name, seen[name], rule.bits, epsilon)
  for operand in ('kernel', 'embedding'):
    for path, rule in chosen[operand].items():
      name, channels = join(path, operand), (ROWS,)
      if operand == 'kernel':
        layers[path] = with_axes(layers[path], rule, flat[name].shape)
        channels = check_channels(path, layers[path], flat[name].shape)
      largest = _largest(flat[name], channels, rule.granularity == 'channel')
      constants[name] = _constants(name, largest, rule.bits, epsilon)
      flat[name] = fake_quantize_operand(flat[name], constants[name])
  quantized = {
    **variables,
    'params': traverse_util.unflatten_dict(flat, sep='/'),
    COLLECTION: traverse_util.unflatten_dict(constants, sep='/'),
  }
  skipped = kernels_in_float(flat, rules, chosen['kernel'])
  skipped |= {path: reason for path, reason in outputs_in_float.items() if reason is not None}
  fields = {'kwargs': kwargs, 'anatomy': anatomy, 'layers': layers, 'skipped': skipped}
  return Quantized.of(model, quantized, variables, operand_hooks(), **fields)


def _largest(kernel: Array, channels: tuple[int, ...], by_channel: bool) -> Array:
  """Returns `max |kernel|` for each output channel (of a table: row), of the channel or of the whole."""
  wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
  inputs = tuple(axis for axis in range(wide.ndim) if axis - wide.ndim not in channels)
  largest = largest_magnitude(wide, inputs).reshape(channel_shape(kernel.shape, channels))
  return largest if by_channel else jnp.full_like(largest, largest_magnitude(largest))


def _constants(name: str, largest: Array, bits: Bits, epsilon: float) -> dict[str, Array]:
  """Returns constants of the collection, with unsigned codes as `integer_network` reads them."""
  if is_concrete(largest) and not np.all(np.isfinite(largest)):
    raise ValueError(
      f'{name!r} is not finite: are the weights and the calibration batches free of NaN and infinity?'
    )
  quantizer, largest = AffineQuantizer(narrow=True), largest + epsilon
  params = affine.params_from_range(quantizer, -largest, largest, bits)
  return {
    'scale': params.scale,
    'zero_point': jnp.full_like(params.scale, params.high),
    'low': jnp.zeros_like(params.high),
    'high': 2 * params.high,
  }


def _token_constants(bits: Bits, epsilon: float) -> dict[str, Array]:
  """Returns constants of what has a scale a token."""
  high = 2 ** (jnp.asarray(bits, jnp.float32) - 1) - 1
  return {'epsilon': jnp.float32(epsilon), 'low': -high, 'high': high}


def _check_tokens(path: str, layer: Layer, shape: tuple[int, ...]) -> None:
  """Raises ValueError unless a layer sums over the last axis of its input alone."""
  inputs = None if layer.channels is None else len(shape) - len(layer.channels)
  if inputs != 1 or layer.spatial:
    raise ValueError(
      f"The input of {path!r} ({layer.name}, kernel {tuple(shape)}) cannot have a scale a 'token': the layer "
      f"sums over more than the channels of one position. Give it a rule of its own, a 'tensor'."
    )


def largest_magnitudes(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Batches,
  inputs: Iterable[str],
  outputs: Iterable[str],
  *,
  by_channel: bool = False,
  counted: Counted = None,
  **kwargs: Any,
) -> dict[str, Array]:
  """Returns `max |x|` over all batches and calls, by `path/input` and `path/output`, in float32 or wider.

  What many calls of `absmax_ptq` on the same network share:

    parts = models.anatomy(model)
    seen = largest_magnitudes(model, variables, batches, parts.layers, parts.stream)
    networks = [absmax_ptq(model, variables, batches, uniform_rules(b, b), seen=seen) for b in (8, 4)]

  Args:
    model: any Linen module.
    variables: its variables.
    batches: calibration inputs.
    inputs: paths of modules whose first argument is looked at.
    outputs: likewise of what they return.
    by_channel: `[channels]`, of each index of the last axis; otherwise scalars.
    counted: which positions are seen; see `percentile_ptq`.
    **kwargs: passed to the model with every batch.
  """
  inputs, outputs = frozenset(inputs), frozenset(outputs)

  def largest(site: Site, name: str, x: Array, mask: Array | None) -> Array:
    x = only_counted(jax.lax.stop_gradient(x), mask, site.path)
    axes = tuple(range(x.ndim - 1)) if by_channel else None
    found = largest_magnitude(x, axes).astype(jnp.promote_types(x.dtype, jnp.float32))
    # Several calls of one module share its quantizer.
    return jnp.maximum(found, site.read(name)) if site.has(name) else found

  def observe(call: Call, mask: Array | None, variables: PyTree, seen: PyTree) -> PyTree:
    def visit(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
      if site.path in inputs and reads_operand(site):
        x, _ = first_argument(site, args, kwargs)
        site.keep('input', largest(site, 'input', x, mask))
      y = call(*args, **kwargs)
      if site.path in outputs and site.method == '__call__':
        site.write('output', largest(site, 'output', y, mask))
      return y

    # In the collection of the constants: transformations of a model that carry it need no other.
    hooks = [Hook('.*', call=visit, collection=COLLECTION, methods=METHODS)]
    given = {**variables, COLLECTION: seen} if seen else variables
    args, kwargs = call
    _, state = apply(model, given, *args, hooks=hooks, mutable=[COLLECTION], **kwargs)
    return dict(state.get(COLLECTION, {}))

  seen: PyTree = {}
  variables = {name: tree for name, tree in variables.items() if name != COLLECTION}
  for run in jitted_calls(observe, model, batches, kwargs, counted):
    seen = run(variables, seen)
  return traverse_util.flatten_dict(seen, sep='/')
