"""Activations first, weights afterwards: learned steps for inputs around float kernels, then kernels alone.

GPLQ's first stage trains all weights, in float, and the steps of all activations:

  network = activation_qat(model, variables, images, activation_rules(models.anatomy(model), 4))

  def loss(trained):  # {'params': ..., 'activation_steps': ...}
    logits = network.update(**trained)(images)
    ...

Its second quantizes the kernels behind those steps, and compensates block by block, with what the first stage
left (float weights, quantized activations) for the teacher:

  rules = edge_rules(4, None, edges=models.anatomy(model))  # stem and head at 8 bits
  four_bits = weight_only_ptq(network.update(**trained), rules)
  better = compensate(four_bits, batches, QwT())

Steps lie in the collection `'activation_steps'`, `input` at each module; bit-widths, constants, in
`'activation_bits'`. They belong to the float network, too, as compensation sees it: `network.in_float()`
keeps them.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.intercept import Hook, Site, any_of, apply, first_argument
from jaxlab.quantizers.networks.batches import (
  Batches,
  Call,
  Counted,
  Positions,
  as_call,
  counted_rows,
  jitted_calls,
  joined_batch,
  positions_of,
  trace_calls,
)
from jaxlab.quantizers.networks.input_ranges import seen_rows
from jaxlab.quantizers.networks.layers import (
  as_matrix,
  channel_shape,
  check_channels,
  check_unstacked,
  find_layers,
  from_matrix,
  summed_axes,
  tree_layer,
)
from jaxlab.quantizers.networks.operands import (
  AFFINE_POINTS,
  LOGARITHMIC_POINTS,
  affine_constants,
  check_bits,
  check_finite,
  collection,
  fake_quantize_operand,
  join,
  operand_hooks,
)
from jaxlab.quantizers.networks.quantized import (
  COLLECTION,
  Quantized,
  check_model,
  check_quantized,
)
from jaxlab.quantizers.networks.rules import (
  Bits,
  Granularity,
  Rule,
  Rules,
  check_accepted,
  check_matches,
  decide,
)
from jaxlab.quantizers.numerics.activation_steps import (
  activation_fake_quantize,
  step_of_range,
)
from jaxlab.quantizers.numerics.affine import AffineQuantizer
from jaxlab.quantizers.numerics.quantiles import select_quantiles

Array = jax.Array
PyTree = Any

STEPS, BITS, SEEN = 'activation_steps', 'activation_bits', 'activation_ranges'
POINTS = f'{AFFINE_POINTS}|{LOGARITHMIC_POINTS}'


def activation_rules(
  anatomy: Anatomy,
  bits: Bits = 4,
  *,
  edge_bits: Bits = 8,
  granularity: Granularity = 'channel',
  attention: bool = True,
) -> tuple[Rule, ...]:
  """Returns GPLQ's rules of the first stage: learned steps for activations alone.

  Args:
    anatomy: `models.anatomy(model)`.
    bits: of the inputs of layers within blocks, and between them.
    edge_bits: of the inputs of stem and head.
    granularity: of the inputs of layers: one step a `'channel'`, or one a `'tensor'`.
    attention: whether the operands of attention's two products (query, key, softmax, value) are quantized, by
      one step each.

  >>> from jaxlab import models
  >>> rules = activation_rules(models.anatomy(models.ViT(depth=1, num_classes=2)))
  >>> [(rule.path.split('|')[0], rule.bits, rule.granularity) for rule in rules]
  ... # doctest: +NORMALIZE_WHITESPACE
  [('patch_embed/proj', 8, 'channel'), ('blocks_0/attention/qkv', 4, 'channel'),
   ('(blocks_0/attention)/(query', 4, 'tensor')]
  """
  edges = set(anatomy.edges)
  inner = [path for path in anatomy.layers if path not in edges]
  branches = [branch for block in anatomy.blocks for branch in block.branches]
  products = [branch.output for branch in branches if branch.kind == 'attention']
  rules = []
  if anatomy.edges:
    rules.append(Rule(any_of(anatomy.edges), 'input', edge_bits, granularity, learned=True))
  if inner:
    rules.append(Rule(any_of(inner), 'input', bits, granularity, learned=True))
  if attention and products:
    points = f'({any_of(products)})/(query|key|value|softmax)'
    rules.append(Rule(points, 'input', bits, 'tensor', learned=True))
  return tuple(rules)


def activation_qat(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Batches,
  rules: Rules,
  *,
  lower: float = 0.01,
  upper: float = 0.99,
  anatomy: Anatomy | None = None,
  counted: Counted = None,
  **kwargs: Any,
) -> Quantized:
  """Returns the network with a learned step for every input that `rules` name, at their first values.

  The float network runs over the batch. A step of a channel is its largest magnitude over `Q_p`, one of a
  tensor the larger of two percentiles' of all values; both of all calls of a module.

  Args:
    model: any Linen module.
    variables: its float variables, which stay float.
    batches: calibration inputs, 512 images in GPLQ; see `percentile_ptq`. The activations of all of them have
      to fit into memory: for data parallelism hand in a batch sharded over the mesh.
    rules: over inputs of layers with a kernel (one step a `'channel'`, by default, or a `'tensor'`) and of
      the hook points of attention (a `'tensor'`), all `learned`; 2 to 8 bits, which may be traced. A channel
      is what a layer sums over: of `DenseGeneral` with several axes each of their entries, `[channels]` in
      the order of the axes.
    lower: share of values below the lower percentile.
    upper: share below the upper one.
    anatomy: the names of the model's parts, for what goes on from the result; None: `models.anatomy(model)`.
    counted: which positions are measured; see `percentile_ptq`.
    **kwargs: passed to the model with every batch, e.g. `train=False`.

  Raises:
    ValueError: if there is no batch, a rule names no layer, is not learned or asks for what is not done here,
      bits are outside 2 to 8, blocks are stacked, or activations are not finite.

  References:
    Liang et al., GPLQ: A General, Practical, and Lightning QAT Method for Vision Transformers, NeurIPS 2025
    (https://arxiv.org/abs/2506.11784), section 3.2. The divisor `Q_p` is inferred.
  """
  check_model(model, variables)
  check_accepted(rules, 'activation_qat', {'input': ('channel', 'tensor')}, learned=True)
  batch = joined_batch(batches)
  call = as_call(batch, kwargs)
  layers = list(kernels := find_layers(model, variables, *call[0], **call[1]))
  check_unstacked(kernels, 'activation_qat')
  points = _attention_points(model, variables, call)
  candidates = [*layers, *points]
  check_matches(rules, 'input', candidates)
  bits: dict[str, Bits] = {}
  by_channel: set[str] = set()
  for path in candidates:
    if (rule := decide(rules, path, 'input')) is None:
      continue
    check_bits(path, rule.bits)
    bits[path] = rule.bits
    if rule.granularity == 'channel' and path in points:
      raise ValueError(f"The step of {path!r} is one of the 'tensor'; the rule says 'channel'.")
    if path in layers and rule.granularity != 'tensor':
      by_channel.add(path)
  given = model, variables, batch, counted, kwargs
  found = _ranges(*given, frozenset(bits), by_channel, (lower, upper))
  steps, widths = {}, {}
  for path, width in bits.items():
    minimum, maximum = (found[join(path, name)] for name in ('minimum', 'maximum'))
    try:
      steps[join(path, 'input')] = step_of_range(minimum, maximum, width)
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from None
    widths[join(path, 'input')] = jnp.asarray(width, jnp.float32)
  own = {
    STEPS: traverse_util.unflatten_dict(steps, sep='/'),
    BITS: traverse_util.unflatten_dict(widths, sep='/'),
  }
  given = {**variables, **own, COLLECTION: {}}
  return Quantized.of(model, given, given, (_HOOK,), kwargs=kwargs, anatomy=anatomy)


def weight_only_ptq(network: Quantized, rules: Rules, *, symmetric: bool = True) -> Quantized:
  """Quantizes the kernels of a network, one scale an output channel, and leaves everything else alone.

  Ranges are by RepQ-ViT's search over three percentiles (`percentile_range`). The network as it is given, its
  activations quantized or not, becomes what compensation compares with.

  Args:
    network: whose kernels are in float, e.g. of `activation_qat`.
    rules: over kernels, 2 to 8 bits.
    symmetric: `s = max(|lower|, |upper|) / (2^(b-1) - 1)` without a zero point, as GPLQ's text has it;
      otherwise asymmetric, as in RepQ-ViT's code.

  Raises:
    ValueError: for what is no `Quantized`, a network whose kernels are quantized, rules that name no
      kernel or ask for what is not done here, bits outside 2 to 8, or kernels that are not finite.

  References:
    Liang et al., NeurIPS 2025, as `activation_qat`; Li et al., RepQ-ViT, ICCV 2023.
  """
  found = float_kernels(network, rules, 'weight_only_ptq')
  variables = dict(network.variables.tree)
  flat = traverse_util.flatten_dict(dict(variables['params']), sep='/')
  rule = 'symmetric' if symmetric else 'asymmetric'
  quantizer = AffineQuantizer(rule=rule, granularity='channel', axis=-1)
  constants = {}
  for owner, (bits, channels) in found.items():
    path = join(owner, 'kernel')
    matrix, shape = as_matrix(flat[path], channels), flat[path].shape
    own = affine_constants(quantizer, matrix, jnp.asarray(bits))
    flat[path] = from_matrix(fake_quantize_operand(matrix, own), shape, channels)
    each = channel_shape(shape, channels)
    constants[owner] = own | {n: own[n].reshape(each) for n in ('scale', 'zero_point')}
  check_finite({}, constants)
  quantized = {
    **variables,
    'params': traverse_util.unflatten_dict(flat, sep='/'),
    COLLECTION: collection({}, constants, {}),
  }
  hooks = (*network.hooks, *operand_hooks())
  return Quantized.of(
    network.model, quantized, variables, hooks, kwargs=network.kwargs, anatomy=network.anatomy
  )


def float_kernels(
  network: Quantized, rules: Rules, method: str, learned: bool = False
) -> dict[str, tuple[Bits, tuple[int, ...]]]:
  """Returns bits and channel axes of the kernels that rules name, by path of the module.

  Raises:
    ValueError: for what is no `Quantized`, a network whose kernels are quantized, rules that name no kernel
      or ask for what `method` does not do, or bits outside 2 to 8.
  """
  check_quantized(network, method)
  check_accepted(rules, method, {'kernel': ('channel',)}, learned=learned)
  if network.prepare is not None or network.variables.tree.get(COLLECTION):
    raise ValueError('The kernels of the network are quantized already: give the one before.')
  flat = traverse_util.flatten_dict(dict(network.variables['params']), sep='/')
  owners = [
    path.removesuffix('kernel').rstrip('/') for path in flat if path.split('/')[-1] == 'kernel'
  ]
  check_matches(rules, 'kernel', owners)
  found = {}
  for owner in owners:
    if (chosen := decide(rules, owner, 'kernel')) is not None:
      check_bits(owner, chosen.bits)
      shape = flat[join(owner, 'kernel')].shape
      found[owner] = chosen.bits, check_channels(owner, tree_layer(flat, owner), shape)
  return found


def _visit(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  if site.has('input'):
    bits, step = site.module.scope.get_variable(BITS, 'input'), site.read('input')
    x, given = first_argument(site, args, kwargs)
    if jnp.ndim(step):
      rows, back = _by_channels(site, x, args, kwargs)
      args, kwargs = given(back(activation_fake_quantize(rows, step, bits)))
    else:
      args, kwargs = given(activation_fake_quantize(x, step, bits))
  return call(*args, **kwargs)


def _by_channels(
  site: Site, x: Array, args: tuple, kwargs: Mapping[str, Any]
) -> tuple[Array, Callable[[Array], Array]]:
  """Returns a layer's input as `[..., channels]`, and the function that brings such an array back."""
  axes = sorted(axis % x.ndim for axis in summed_axes(site.module, args, kwargs))
  if axes == [x.ndim - 1]:
    return x, lambda rows: rows
  last = range(x.ndim - len(axes), x.ndim)
  moved = jnp.moveaxis(x, axes, last)
  rows = moved.reshape(*moved.shape[: -len(axes)], -1)
  return rows, lambda rows: jnp.moveaxis(rows.reshape(moved.shape), last, axes)


_HOOK = Hook('.*', call=_visit, collection=STEPS)


def _attention_points(model: nn.Module, variables: Mapping[str, PyTree], call: Call) -> list[str]:
  """Returns the paths of the hook points of attention; traces the model abstractly."""
  found: dict[str, None] = {}

  def visit(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if re.fullmatch(POINTS, site.path):
      found.setdefault(site.path)
    return call(*args, **kwargs)

  trace_calls(model, variables, call, visit)
  return list(found)


def _ranges(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batch: Batches,
  counted: Counted,
  kwargs: Mapping[str, Any],
  paths: frozenset[str],
  by_channel: set[str],
  shares: tuple[float, float],
) -> dict[str, Array]:
  """Returns the bounds of inputs by path: extremes of channels, percentiles of tensors."""

  def bounds(site: Site, x: Array, positions: Positions | None) -> tuple[Array, Array]:
    x = jax.lax.stop_gradient(x)
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if site.path not in by_channel:
      kind = 'log_sqrt2' if re.fullmatch(LOGARITHMIC_POINTS, site.path) else 'tensor'
      rows = seen_rows(site, x, positions, kind)
      low, high = (bound.reshape(()) for bound in select_quantiles(rows, shares))
      return low, high
    rows = counted_rows(x, positions, site.path)
    axes = tuple(range(rows.ndim - 1))
    low, high = jnp.min(rows, axes), jnp.max(rows, axes)
    if site.has('minimum'):  # of a layer that is called again
      low, high = (
        jnp.minimum(low, site.read('minimum')),
        jnp.maximum(high, site.read('maximum')),
      )
    return low, high

  def observe(call: Call, positions: Positions | None, variables: PyTree) -> dict[str, Array]:
    def visit(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
      if site.path in paths:
        x = first_argument(site, args, kwargs)[0]
        if site.path in by_channel:
          x, _ = _by_channels(site, x, args, kwargs)
        found = bounds(site, x, positions)
        for name, bound in zip(('minimum', 'maximum'), found):
          site.keep(name, bound)
      return call(*args, **kwargs)

    hooks = [Hook('.*', call=visit, collection=SEEN)]
    args, kwargs = call
    _, state = apply(model, variables, *args, hooks=hooks, mutable=[SEEN], **kwargs)
    flat = traverse_util.flatten_dict(dict(state.get(SEEN, {})), sep='/')
    return {
      name: leaf for name, leaf in flat.items() if name.rpartition('/')[2] in ('minimum', 'maximum')
    }

  (run,) = jitted_calls(observe, model, [batch], kwargs, counted, positions_of)
  return run(dict(variables))
