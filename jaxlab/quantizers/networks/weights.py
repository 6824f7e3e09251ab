"""Kernels of a parameter tree by their smallest and largest value: a pure transform, by path."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxlab.quantizers.networks.layers import Layer, channel_shape, check_channels, tree_layer
from jaxlab.quantizers.networks.operands import join
from jaxlab.quantizers.networks.rules import (
  Bits,
  Rule,
  Rules,
  check_matches,
  check_rules,
  decide,
  quantizer_of,
)
from jaxlab.quantizers.numerics import affine
from jaxlab.quantizers.numerics.affine import AffineQuantizer
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any

KERNELS = AffineQuantizer(rule='half_range', granularity='channel', axis=-1)


def quantize_weights(
  params: PyTree,
  rules: Rules,
  quantizer: AffineQuantizer = KERNELS,
  *,
  layers: Mapping[str, Layer] | None = None,
  scale_grad: bool = False,
  degenerate: Literal['element', 'tensor'] = 'element',
) -> PyTree:
  """Returns `params` with the kernels that `rules` name fake-quantized, ranges from the kernels themselves.

  Per channel means per output channel, of each head, of each layer that `nn.scan` and of each expert that
  `nn.vmap` stacks; a kernel that is stacked has a scale for each even per tensor.

  Args:
    params: parameter tree; a kernel's path without `/kernel` is its module's path.
    rules: those over kernels are read.
    quantizer: static choices; bits come from the rules, which may choose another granularity. An `axis` other
      than -1 is taken as it is.
    layers: `find_layers(model, variables, inputs)`, which know what the axes of kernels are. Of others, and
      without it, what the parameters tell: `[in, out]`, `[height, width, in, out]`, axes of a bias, stacks
      with their norms.
    scale_grad: gradients also flow through the scale to the extreme weight, as in SSQL's training step.
    degenerate: a channel of zeros alone is kept and others are quantized (`'element'`), or it keeps the whole
      kernel in float (`'tensor'`, SSQL's code).

  Raises:
    ValueError: if a rule matches no kernel, or the parameters do not tell what the axes of a kernel are.
  """
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  check_rules(rules, 'quantize_weights')
  for owner, named in named_kernels(flat, rules, quantizer, layers).items():
    flat[join(owner, 'kernel')] = _fake_quantize_kernel(
      flat[join(owner, 'kernel')],
      bits=named.rule.bits,
      quantizer=named.quantizer,
      stacked=named.stacked,
      scale_grad=scale_grad,
      degenerate=degenerate,
    )
  return traverse_util.unflatten_dict(flat, sep='/')


class NamedKernel(NamedTuple):
  """A kernel that is to be quantized: its rule, its quantizer, the axes along which it is stacked."""

  rule: Rule
  quantizer: AffineQuantizer
  stacked: tuple[int, ...]


def named_kernels(
  flat: Mapping[str, Array],
  rules: Rules,
  default: AffineQuantizer,
  layers: Mapping[str, Layer] | None,
) -> dict[str, NamedKernel]:
  """Returns the kernels that rules name, by path of the module."""
  owners, tables = (
    [path.rpartition('/')[0] for path in flat if path.rpartition('/')[2] == name]
    for name in ('kernel', 'embedding')
  )
  check_matches(rules, 'kernel', owners, tables)
  found = {}
  for owner in owners:
    if (rule := decide(rules, owner, 'kernel')) is None:
      continue
    own, shape = quantizer_of(rule, default), flat[join(owner, 'kernel')].shape
    stacked: tuple[int, ...] = ()
    if rule.axes is not None:
      own = dataclasses.replace(own, axis=rule.axes)
    elif own.granularity == 'tensor' or (own.granularity == 'channel' and own.axis == -1):
      layer = (layers or {}).get(owner) or tree_layer(flat, owner)
      stacked = layer.stacked
      axes = stacked if own.granularity == 'tensor' else check_channels(owner, layer, shape)
      if axes not in ((), (-1,)):
        own = dataclasses.replace(own, granularity='channel', axis=axes)
    found[owner] = NamedKernel(rule, own, stacked)
  return found


def _fake_quantize_kernel(kernel: Array, bits: Bits, **choices: Any) -> Array:
  if is_concrete(kernel):
    return _kernel_by_own_range(kernel, bits, **choices)
  # Kernels of one shape are traced and differentiated once.
  if is_concrete(bits):
    return _traced_once(kernel, None, bits=int(bits), **choices)
  return _traced_once(kernel, bits, bits=None, **choices)


def _kernel_by_own_range(
  kernel: Array,
  bits: Bits,
  quantizer: AffineQuantizer,
  stacked: tuple[int, ...],
  scale_grad: bool,
  degenerate: str,
) -> Array:
  marked = 'identity' if degenerate == 'tensor' else 'widen'
  params = affine.calibrate(quantizer, kernel, bits, on_degenerate=marked)
  if degenerate == 'tensor' and stacked:  # each of the stack is a tensor of its own
    axes = tuple(axis for axis in range(-kernel.ndim, 0) if axis not in stacked)
    kept = jnp.any(params.scale == 0, axes, keepdims=True)
    params, degenerate = params.replace(scale=jnp.where(kept, 0, params.scale)), 'element'
  return affine.fake_quantize(
    quantizer, kernel, params, scale_grad=scale_grad, degenerate=degenerate
  )


_STATIC = ('bits', 'quantizer', 'stacked', 'scale_grad', 'degenerate')


@functools.partial(jax.jit, static_argnames=_STATIC)
def _traced_once(
  kernel: Array, traced_bits: Array | None, bits: int | None, **choices: Any
) -> Array:
  return _kernel_by_own_range(kernel, traced_bits if bits is None else bits, **choices)


def kernel_constants(
  quantizer: AffineQuantizer, kernel: Array, bits: Bits, stacked: tuple[int, ...]
) -> dict[str, Array]:
  """Returns `{scale, zero_point, low, high}` of a kernel, in the shape that broadcasts against it."""
  params = affine.calibrate(quantizer, kernel, bits)
  shape = params.scale.shape
  if quantizer.granularity in ('tensor', 'channel'):
    axes = quantizer.axis if isinstance(quantizer.axis, tuple) else (quantizer.axis,)
    axes = () if quantizer.granularity == 'tensor' else axes
    shape = channel_shape(kernel.shape, tuple(i % kernel.ndim - kernel.ndim for i in axes))
  # Stacked modules may slice everything below them along the first axis.
  ends = shape[:1] if stacked else ()
  return {
    'scale': params.scale.reshape(shape),
    'zero_point': params.zero_point.reshape(shape),
    'low': jnp.broadcast_to(params.low, ends),
    'high': jnp.broadcast_to(params.high, ends),
  }
