"""Kernels and outputs of an untouched model by the smallest and largest value, by path.

The pieces, for training loops that quantize in every step:

- `quantize_weights(params, rules)`: a pure transform of the parameters;
- `range_hooks(rules)`: hooks that record the range of each quantized output in the collection `'ranges'`;
- `fake_quantize_hooks(rules)`: hooks that read those ranges and fake-quantize the outputs.

And the whole, for a trained network: `ptq(model, variables, batches, rules)`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.intercept import Hook, Site, apply, module_paths
from jaxlab.quantizers.networks.operands import operand_hooks
from jaxlab.quantizers.networks.quantized import COLLECTION, Quantized, check_model, peek
from jaxlab.quantizers.networks.rules import (
  Bits,
  Rule,
  Rules,
  check_accepted,
  check_matches,
  check_rules,
  decide,
)
from jaxlab.quantizers.numerics import affine
from jaxlab.quantizers.numerics.affine import AffineQuantizer
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any

KERNELS = AffineQuantizer(rule='half_range', granularity='channel', axis=-1)
OUTPUTS = AffineQuantizer(rule='asymmetric', granularity='tensor')


def quantize_weights(
  params: PyTree,
  rules: Rules,
  quantizer: AffineQuantizer = KERNELS,
  *,
  scale_grad: bool = False,
  degenerate: Literal['element', 'tensor'] = 'tensor',
) -> PyTree:
  """Returns `params` with the kernels that `rules` name fake-quantized, ranges from the kernels themselves.

  Blocks that are stacked under `blocks` (`models.stack_blocks`, `ViT(scan=True)`) are quantized one by one.

  Args:
    params: parameter tree; a kernel's path without `/kernel` is its module's path.
    rules: those over kernels are read.
    quantizer: static choices; bits come from the rules, which may choose another granularity.
    scale_grad: gradients also flow through the scale to the extreme weight, as in SSQL's training step.
    degenerate: see `affine.fake_quantize`.

  Raises:
    ValueError: if a rule matches no kernel.
  """
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  owners = {path: path.rpartition('/')[0] for path in flat if re.search(r'(^|/)kernel$', path)}
  check_rules(rules, 'quantize_weights')
  check_matches(rules, 'kernel', list(owners.values()))
  stacked = _stacked_subtrees(flat)
  for path, owner in owners.items():
    rule = decide(rules, owner, 'kernel')
    if rule is not None:
      quantize = functools.partial(
        _fake_quantize_kernel,
        bits=rule.bits,
        quantizer=_quantizer(quantizer, rule),
        scale_grad=scale_grad,
        degenerate=degenerate,
      )
      flat[path] = (jax.vmap(quantize) if path.startswith(stacked) else quantize)(flat[path])
  return traverse_util.unflatten_dict(flat, sep='/')


def _quantizer(default: AffineQuantizer, rule: Rule) -> AffineQuantizer:
  if rule.granularity in (None, default.granularity):
    return default
  return dataclasses.replace(default, granularity=rule.granularity, group_size=None)


def _fake_quantize_kernel(kernel: Array, bits: Bits, **choices: Any) -> Array:
  if is_concrete(kernel):
    return _kernel_by_own_range(kernel, bits, **choices)
  # Kernels of one shape are traced and differentiated once.
  if is_concrete(bits):
    return _traced_once(kernel, None, bits=int(bits), **choices)
  return _traced_once(kernel, bits, bits=None, **choices)


def _kernel_by_own_range(
  kernel: Array, bits: Bits, quantizer: AffineQuantizer, scale_grad: bool, degenerate: str
) -> Array:
  params = affine.calibrate(quantizer, kernel, bits)
  return affine.fake_quantize(
    quantizer, kernel, params, scale_grad=scale_grad, degenerate=degenerate
  )


@functools.partial(jax.jit, static_argnames=('bits', 'quantizer', 'scale_grad', 'degenerate'))
def _traced_once(
  kernel: Array, traced_bits: Array | None, bits: int | None, **choices: Any
) -> Array:
  return _kernel_by_own_range(kernel, traced_bits if bits is None else bits, **choices)


def _stacked_subtrees(flat: Mapping[str, Array]) -> tuple[str, ...]:
  """Returns the prefixes `.../blocks/` below which all arrays are stacked along their first axis.

  Vectors (biases, scales of norms) are then matrices, and all arrays are of one length.
  """
  found: dict[str, list[Array]] = {}
  for path, leaf in flat.items():
    for match in re.finditer(r'(^|/)blocks/', path):
      found.setdefault(path[: match.end()], []).append(leaf)
  return tuple(
    prefix
    for prefix, leaves in found.items()
    if all(len(leaf.shape) > 1 for leaf in leaves) and len({leaf.shape[0] for leaf in leaves}) == 1
  )


def range_hooks(
  rules: Rules, quantizer: AffineQuantizer = OUTPUTS, collection: str = 'ranges'
) -> list[Hook]:
  """Returns hooks that record the running minimum and maximum of every output that `rules` quantize.

  Apply the model with `mutable=['ranges']`. The ranges of a second batch are merged with those that
  `variables` hold, so that calibration is a loop over batches. Recorded values carry no gradient.
  """

  def record(site: Site, y: Array, rule: Rule) -> Array:
    minimum, maximum = affine.min_max(_quantizer(quantizer, rule), jax.lax.stop_gradient(y))
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
  degenerate: Literal['element', 'tensor'] = 'tensor',
  collection: str = 'ranges',
) -> list[Hook]:
  """Returns hooks that fake-quantize every output that `rules` name, with ranges from `variables`.

  Raises (when the model is applied):
    ValueError: if a module has no range: the model was not calibrated.
  """

  def quantize(site: Site, y: Array, rule: Rule) -> Array:
    own, ends = _quantizer(quantizer, rule), (site.read('minimum'), site.read('maximum'))
    calibrated = affine.params_from_range(own, *ends, rule.bits)
    return affine.fake_quantize(own, y, calibrated, degenerate=degenerate)

  return _output_hooks(rules, quantize, collection)


def _output_hooks(
  rules: Rules, visit: Callable[[Site, Array, Rule], Array], collection: str
) -> list[Hook]:
  """Returns one hook a pattern; `visit(site, y, rule)` runs once an output, for the rule that decides."""

  def bind(pattern: str) -> Hook:
    def output(site: Site, y: Array) -> Array:
      rule = decide(rules, site.path, 'output')
      return visit(site, y, rule) if rule is not None and rule.path == pattern else y

    return Hook(pattern, output=output, collection=collection)

  check_rules(rules, 'A hook on outputs')
  patterns = dict.fromkeys(rule.path for rule in rules if rule.operand == 'output')
  return [bind(pattern) for pattern in patterns]


def collect_ranges(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Array | Iterable[Array],
  rules: Rules,
  quantizer: AffineQuantizer = OUTPUTS,
  **kwargs: Any,
) -> PyTree:
  """Returns the ranges of all outputs that `rules` quantize, over `batches` of model inputs.

  The model runs in float, one jitted call per batch.

  Args:
    model: any Linen module.
    variables: its variables.
    batches: model inputs, each an array `[batch, ...]` (one shape: one compilation).
    rules: those over outputs are read.
    quantizer: granularity of the ranges, where the rules choose none.
    **kwargs: passed to the model, e.g. `train=False`.

  Raises:
    ValueError: if there is no batch, or the data lead to ranges that are not finite.
  """

  @jax.jit
  def observe(variables, ranges, batch):
    hooks = range_hooks(rules, quantizer)
    given = {**variables, 'ranges': ranges} if ranges else variables
    _, state = apply(model, given, batch, hooks=hooks, mutable=['ranges'], **kwargs)
    return state.get('ranges', {})

  ranges: PyTree = {}
  for batch in peek(batches)[1]:
    ranges = observe(dict(variables), ranges, batch)
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
  batches: Array | Iterable[Array],
  rules: Rules,
  *,
  anatomy: Anatomy | None = None,
  kernels: AffineQuantizer = KERNELS,
  outputs: AffineQuantizer = OUTPUTS,
  **kwargs: Any,
) -> Quantized:
  """Post-training quantization of kernels and outputs with ranges from their smallest to their largest value.

  Kernels have their own range, outputs that seen by the float network on the batches. There is nothing in it
  that integers could be made of: layers read the quantized outputs of what is before them, if anything
  quantizes there; `percentile_ptq` quantizes their inputs.

  Args:
    model: any Linen module.
    variables: its variables; kept as they are except for the quantized kernels.
    batches: calibration inputs `[batch, ...]`, seen one after another: ranges are those of all.
    rules: over kernels and outputs, 1 to 16 bits, with scales for the tensor or for channels. Bits may be
      traced.
    anatomy: the names of the model's parts, for what goes on from the result; None: `models.anatomy(model)`.
    kernels: quantizer of the kernels, by default one range a channel.
    outputs: quantizer of the outputs, by default one range.
    **kwargs: passed to the model, e.g. `train=False`.

  Raises:
    ValueError: if there is no batch, a rule matches no module or asks for what is not done here (checked
      before any computation), or a range is not finite.
  """
  check_model(model, variables)
  choices = ('tensor', 'channel')
  check_accepted(rules, 'ptq', {'kernel': choices, 'output': choices})
  first, batches = peek(batches)
  check_matches(rules, 'output', module_paths(model, first, **kwargs))
  constants = {}
  if any(rule.operand == 'output' for rule in rules):
    ranges = collect_ranges(model, variables, batches, rules, outputs, **kwargs)
    constants = jax.jit(functools.partial(_constants, rules=rules, default=outputs))(ranges)
  quantized = {
    **variables,
    'params': quantize_weights(variables['params'], rules, kernels),
    COLLECTION: constants,
  }
  return Quantized.of(model, quantized, variables, operand_hooks(), kwargs=kwargs, anatomy=anatomy)


def _constants(ranges: PyTree, rules: Rules, default: AffineQuantizer) -> PyTree:
  """Returns the constants of outputs, all in the shape of their range, which `nn.scan` may have stacked."""
  flat, found = traverse_util.flatten_dict(ranges), {}
  for *path, _ in (path for path in flat if path[-1] == 'minimum'):
    ends = flat[*path, 'minimum'], flat[*path, 'maximum']
    rule = decide(rules, '/'.join(path), 'output')
    params = affine.params_from_range(_quantizer(default, rule), *ends, rule.bits)
    for name in ('scale', 'zero_point', 'low', 'high'):
      found[*path, 'output', name] = jnp.broadcast_to(getattr(params, name), ends[0].shape)
  return traverse_util.unflatten_dict(found)
