"""Ranges of the inputs of layers and of attention's operands, found in order of execution."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxlab.models.intercept import Hook, Site
from jaxlab.quantizers.networks.operands import (
  CHANNEL,
  TENSOR,
  affine_constants,
  fake_quantize_operand,
  is_finite,
)
from jaxlab.quantizers.networks.quantized import COLLECTION
from jaxlab.quantizers.networks.rules import Bits
from jaxlab.quantizers.numerics.logarithmic import log_sqrt2_scale

Array = jax.Array
PyTree = Any


def search_hook(kinds: Mapping[str, str], bits: Mapping[str, Bits]) -> Hook:
  """Returns the hook that finds the ranges of the inputs `kinds` that have none, and quantizes all of them.

  To be applied with `mutable=['quantization']`. Each range is found on values that all quantizers before it
  have already been applied to (RepQ-ViT's "first quantized forward").

  Args:
    kinds: kind of the quantizer by path: `'tensor'`, `'channel'`, `'log_sqrt2'`.
    bits: bit-width by path.
  """
  find = _InputSearch()

  def visit(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if site.path in kinds:
      if not site.has('input'):
        site.write('input', find(site, kinds[site.path], bits[site.path], args[0]))
      args = (fake_quantize_operand(args[0], site.read('input')), *args[1:])
    return call(*args, **kwargs)

  return Hook('.*', call=visit, collection=COLLECTION)


def input_constants(collection: Mapping[str, PyTree]) -> dict[str, dict[str, Array]]:
  """Returns `{path: constants}` of all inputs in a collection `'quantization'`."""
  found: dict[str, dict[str, Array]] = {}
  for path, value in traverse_util.flatten_dict(dict(collection), sep='/').items():
    operand, _, name = path.rpartition('/')
    module, _, which = operand.rpartition('/')
    if which == 'input':
      found.setdefault(module, {})[name] = value
  return found


class _InputSearch:
  """Finds the constants of one input after another, also where the inputs do not depend on each other.

  The search is a loop that counts over the whole batch, on a mesh with a collective in it. XLA on CPUs starts
  independent loops in any order, another one on each device, and they would wait for each other for ever.
  Siblings (query, key, value) are independent; others follow each other in the network.
  """

  def __init__(self):
    self.scales = (
      weakref.WeakKeyDictionary()
    )  # by the scope of the parent, which lives as long as a call

  def __call__(self, site: Site, kind: str, bits: Bits, x: Array) -> dict[str, Array]:
    parent = site.module.scope.parent
    if parent in self.scales:
      x = jnp.where(jnp.isnan(self.scales[parent]), jnp.nan, x)
    constants = _input_constants(kind, bits, x)
    if parent is not None:
      self.scales[parent] = constants['scale'].ravel()[0]
    return constants


def _input_constants(kind: str, bits: Bits, x: Array) -> dict[str, Array]:
  if kind == 'log_sqrt2':
    x = jnp.where(is_finite(x), x, jnp.nan)
    scale = jnp.where(jnp.isnan(x.ravel()[0]), jnp.nan, log_sqrt2_scale(x, bits))
    return {'scale': scale, 'bits': jnp.asarray(bits, scale.dtype)}
  constants = affine_constants(TENSOR if kind == 'tensor' else CHANNEL, x, bits)
  if kind == 'channel':
    constants['value'] = x.reshape(-1, x.shape[-1])[0].astype(constants['scale'].dtype)
  return constants


@jax.jit
def renewed_constants(constants: Mapping[str, Array], x: Array) -> dict[str, Array]:
  """Returns the constants of an input found anew on `x`, of the same kind and bit-width."""
  new = _input_constants(*_kind_and_bits(constants), x)
  return {name: new[name] for name in constants}


def _kind_and_bits(constants: Mapping[str, Array]) -> tuple[str, Array]:
  if 'bits' in constants:
    return 'log_sqrt2', constants['bits']
  kind = 'channel' if constants['scale'].ndim else 'tensor'
  return kind, jnp.log2(constants['high'] - constants['low'] + 1)


def recalibration_hook(paths: Sequence[str]) -> Hook:
  """Returns the hook that finds the ranges of the inputs at `paths` anew, on what flows in.

  To be appended to `operand_hooks()` and applied with `mutable=['quantization']`: the collection that comes
  back holds the new constants, of the old bit-widths; later layers already see inputs quantized with them.
  A module without an `input` there is left alone.

  Args:
    paths: of modules, seen from the model.
  """
  paths = frozenset(paths)
  find = _InputSearch()

  def visit(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if site.path in paths and site.has('input'):
      own = site.read('input')
      new = find(site, *_kind_and_bits(own), args[0])
      site.write('input', {name: new[name] for name in own})
    return call(*args, **kwargs)

  return Hook('.*', call=visit, collection=COLLECTION)
