"""Quantize the weights and activations of an untouched model: by path, with collected ranges.

The pieces, for training loops that quantize in every step:

- `quantize_weights(params, policy)`: a pure transform of the parameters;
- `range_hooks(policy)`: hooks that record the range of each quantized output in the collection `'ranges'`;
- `fake_quantize_hooks(policy)`: hooks that read those ranges and fake-quantize the outputs.

And the whole, for a trained network: `ptq(model, variables, batches, policy)`.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.intercept import Hook, Site, apply, module_paths
from jaxlab.quantizers.networks.rules import BitPolicy, Bits, check_rules
from jaxlab.quantizers.numerics import affine
from jaxlab.quantizers.numerics.affine import AffineQuantizer
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any

WEIGHTS = AffineQuantizer(rule='half_range', granularity='channel', axis=-1)
ACTIVATIONS = AffineQuantizer(rule='asymmetric', granularity='tensor')


def quantize_weights(
  params: PyTree,
  policy: BitPolicy,
  quantizer: AffineQuantizer = WEIGHTS,
  *,
  scale_grad: bool = False,
  degenerate: Literal['element', 'tensor'] = 'tensor',
) -> PyTree:
  """Returns `params` with the kernels that `policy` names fake-quantized, ranges from the kernels themselves.

  Blocks that are stacked under `blocks` (`models.stack_blocks`, `ViT(scan=True)`) are quantized one by one.

  Args:
    params: parameter tree; a kernel's path without `/kernel` is its module's path.
    policy: its `weights` rules.
    quantizer: static choices; `bits` comes from the policy.
    scale_grad: gradients also flow through the scale to the extreme weight, as in SSQL's training step.
    degenerate: see `affine.fake_quantize`.

  Raises:
    ValueError: if a rule matches no kernel.
  """
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  owners = {path: path.rpartition('/')[0] for path in flat if re.search(r'(^|/)kernel$', path)}
  check_rules(policy.weights, list(owners.values()), 'weight')
  stacked = _stacked_subtrees(flat)
  for path, owner in owners.items():
    bits = policy.weight_bits(owner)
    if bits is not None:
      quantize = functools.partial(
        _fake_quantize_kernel,
        bits=bits,
        quantizer=quantizer,
        scale_grad=scale_grad,
        degenerate=degenerate,
      )
      flat[path] = (jax.vmap(quantize) if path.startswith(stacked) else quantize)(flat[path])
  return traverse_util.unflatten_dict(flat, sep='/')


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
  policy: BitPolicy, quantizer: AffineQuantizer = ACTIVATIONS, collection: str = 'ranges'
) -> list[Hook]:
  """Returns hooks that record the running minimum and maximum of every output that `policy` quantizes.

  Apply the model with `mutable=['ranges']`. The ranges of a second batch are merged with those that
  `variables` hold, so that calibration is a loop over batches. Recorded values carry no gradient.
  """

  def record(site: Site, y: Array, bits: Bits) -> Array:
    del bits
    minimum, maximum = affine.min_max(quantizer, jax.lax.stop_gradient(y))
    if site.has('minimum'):
      minimum = jnp.minimum(minimum, site.read('minimum'))
      maximum = jnp.maximum(maximum, site.read('maximum'))
    site.write('minimum', minimum)
    site.write('maximum', maximum)
    return y

  return _output_hooks(policy, record, collection)


def fake_quantize_hooks(
  policy: BitPolicy,
  quantizer: AffineQuantizer = ACTIVATIONS,
  *,
  degenerate: Literal['element', 'tensor'] = 'tensor',
  collection: str = 'ranges',
) -> list[Hook]:
  """Returns hooks that fake-quantize every output that `policy` names, with ranges from `variables`.

  Raises (when the model is applied):
    ValueError: if a module has no range: the model was not calibrated.
  """

  def quantize(site: Site, y: Array, bits: Bits) -> Array:
    calibrated = affine.params_from_range(
      quantizer, site.read('minimum'), site.read('maximum'), bits
    )
    return affine.fake_quantize(quantizer, y, calibrated, degenerate=degenerate)

  return _output_hooks(policy, quantize, collection)


def _output_hooks(
  policy: BitPolicy, visit: Callable[[Site, Array, Bits], Array], collection: str
) -> list[Hook]:
  """Returns one hook a rule; `visit(site, y, bits)` runs at each output once, for the rule that decides."""

  def bind(pattern: str) -> Hook:
    def output(site: Site, y: Array) -> Array:
      decisive, bits = policy.activation_rule(site.path)
      return visit(site, y, bits) if decisive == pattern and bits is not None else y

    return Hook(pattern, output=output, collection=collection)

  return [bind(pattern) for pattern in dict.fromkeys(pattern for pattern, _ in policy.activations)]


def collect_ranges(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Iterable[Array],
  policy: BitPolicy,
  quantizer: AffineQuantizer = ACTIVATIONS,
  **kwargs: Any,
) -> PyTree:
  """Returns the ranges of all outputs that `policy` quantizes, over `batches` of model inputs.

  The model runs in float, one jitted call per batch.

  Args:
    model: any Linen module.
    variables: its variables.
    batches: model inputs, each an array `[batch, ...]` (one shape: one compilation).
    policy: its `activations` rules.
    quantizer: granularity of the ranges.
    **kwargs: passed to the model, e.g. `train=False`.

  Raises:
    ValueError: if there is no batch, or the data lead to ranges that are not finite.
  """

  @jax.jit
  def observe(variables, ranges, batch):
    hooks = range_hooks(policy, quantizer)
    given = {**variables, 'ranges': ranges} if ranges else variables
    _, state = apply(model, given, batch, hooks=hooks, mutable=['ranges'], **kwargs)
    return state['ranges']

  ranges: PyTree = {}
  for batch in batches:
    ranges = observe(dict(variables), ranges, batch)
  if not ranges:
    raise ValueError('batches is empty: calibration needs at least one batch of model inputs.')
  _check_finite(ranges)
  return ranges


def _check_finite(ranges: PyTree) -> None:
  flat = traverse_util.flatten_dict(jax.device_get(ranges), sep='/')
  bad = sorted(path for path, value in flat.items() if not np.all(np.isfinite(value)))
  if bad:
    raise ValueError(f'Calibration data give non-finite ranges at {", ".join(bad[:5])}.')


def ptq(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Iterable[Array],
  policy: BitPolicy,
  *,
  weights: AffineQuantizer = WEIGHTS,
  activations: AffineQuantizer = ACTIVATIONS,
  **kwargs: Any,
) -> tuple[dict[str, PyTree], list[Hook]]:
  """Post-training quantization: returns `(variables, hooks)` of the fake-quantized network.

  `intercept.apply(model, variables, x, hooks=hooks)` is the quantized network. Weights are quantized
  with their own range, activations with the range seen on `batches` by the float network.

  Args:
    model: any Linen module.
    variables: its variables; kept as they are except for the quantized kernels.
    batches: calibration inputs, arrays `[batch, ...]`; consumed once.
    policy: bit-widths by module path.
    weights: quantizer of the kernels.
    activations: quantizer of the outputs.
    **kwargs: passed to the model while calibrating, e.g. `train=False`.

  Raises:
    ValueError: if a rule of the policy matches no module (checked before any computation), if there is no
      calibration batch, or if a range is not finite.
  """
  batches = iter(batches)
  try:
    first = next(batches)
  except StopIteration:
    raise ValueError('batches is empty: calibration needs at least one batch.') from None
  check_rules(policy.activations, module_paths(model, first, **kwargs), 'activation')
  params = quantize_weights(variables['params'], policy, weights)
  quantized = {**variables, 'params': params}
  if not policy.activations:
    return quantized, []

  def all_batches():
    yield first
    yield from batches

  quantized['ranges'] = collect_ranges(
    model, variables, all_batches(), policy, activations, **kwargs
  )
  return quantized, fake_quantize_hooks(policy, activations)
