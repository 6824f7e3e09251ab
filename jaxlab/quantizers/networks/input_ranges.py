"""Ranges of the inputs of layers and of attention's operands, found in order of execution."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxlab.models.intercept import Hook, Site, first_argument
from jaxlab.quantizers.networks.batches import Positions, counted_rows
from jaxlab.quantizers.networks.operands import (
  CHANNEL,
  METHODS,
  TENSOR,
  affine_constants,
  fake_quantize_operand,
  is_finite,
  reads_operand,
)
from jaxlab.quantizers.networks.quantized import COLLECTION
from jaxlab.quantizers.networks.rules import Bits
from jaxlab.quantizers.numerics import affine
from jaxlab.quantizers.numerics.logarithmic import log_sqrt2_scale

Array = jax.Array
PyTree = Any

SEEN = '.seen'  # inputs of the calls so far, of no module's name; not a part of the result


def search_hook(
  kinds: Mapping[str, str], bits: Mapping[str, Bits], positions: Positions | None = None
) -> Hook:
  """Returns the hook that finds the ranges of the inputs `kinds` that have none, and quantizes all of them.

  To be applied with `mutable=['quantization']`. Each range is found on values that all quantizers before it
  have already been applied to (RepQ-ViT's "first quantized forward"). That of a module that is called again
  is found anew, on the inputs of all its calls so far.

  Args:
    kinds: kind of the quantizer by path: `'tensor'`, `'channel'`, `'log_sqrt2'`.
    bits: bit-width by path.
    positions: those that count; None: all.

  Raises (when the model is applied):
    ValueError: if a module's variables are not carried through a transformation around it, or the shape of
      its input does not tell which positions count.
  """
  find = _InputSearch()

  def visit(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if site.path in kinds and reads_operand(site):
      x, given = first_argument(site, args, kwargs)
      kind = kinds[site.path]
      if site.has(SEEN) or not site.has('input'):
        rows = seen_rows(site, x, positions, kind)
        site.write('input', find(site, kind, bits[site.path], rows))
      args, kwargs = given(fake_quantize_operand(x, site.read('input')))
    return call(*args, **kwargs)

  return Hook('.*', call=visit, collection=COLLECTION, methods=METHODS)


def seen_rows(
  site: Site, x: Array, positions: Positions | None, kind: str, name: str = SEEN
) -> Array:
  """Returns what counts of a value at a module, behind those of its calls before, which it keeps.

  Args:
    site: of the call; its collection has to be mutable.
    x: the value, an input unless `name` says otherwise.
    positions: those that count; None: all.
    kind: of the quantizer.
    name: under which values are kept; it begins with a dot.

  Raises:
    ValueError: see `search_hook`.
  """
  rows = counted_rows(x, positions, site.path, softmax=kind == 'log_sqrt2')
  flat = rows.reshape(-1, rows.shape[-1]) if kind == 'channel' else rows.ravel()
  if site.has(name):
    rows = flat = jnp.concatenate([site.read(name), flat])
  site.keep(name, flat)
  return rows


def input_constants(collection: Mapping[str, PyTree]) -> dict[str, dict[str, Array]]:
  """Returns `{path: constants}` of all inputs in a collection `'quantization'`."""
  found: dict[str, dict[str, Array]] = {}
  for path, value in traverse_util.flatten_dict(dict(collection), sep='/').items():
    operand, _, name = path.rpartition('/')
    module, _, which = operand.rpartition('/')
    if which == 'input' and name != SEEN:
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
  if kind == 'tensor':
    return affine_constants(TENSOR, x, bits, 'zeros')
  constants = affine_constants(CHANNEL, x, bits, 'mark')
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


def recalibration_hook(paths: Sequence[str], positions: Positions | None = None) -> Hook:
  """Returns the hook that finds the ranges of the inputs at `paths` anew, on what flows in.

  To be appended to `operand_hooks()` and applied with `mutable=['quantization']`: the collection that comes
  back holds the new constants, of the old bit-widths; later layers already see inputs quantized with them.
  The range of a module that is called several times holds those of all its calls.
  A module without an `input` there, or one whose steps are learned or found for each token, is left alone.

  Args:
    paths: of modules, seen from the model.
    positions: those that count; None: all.
  """
  paths = frozenset(paths)
  find = _InputSearch()
  renewed: set[str] = set()
  running = 0

  def visit(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    nonlocal running
    if not running:
      renewed.clear()
    own = site.read('input') if site.path in paths and site.has('input') else {}
    if 'scale' in own and reads_operand(site):
      kind, bits = _kind_and_bits(own)
      x, _ = first_argument(site, args, kwargs)
      new = find(site, kind, bits, counted_rows(x, positions, site.path, softmax='bits' in own))
      new = joined_constants(own, new) if site.path in renewed else new
      renewed.add(site.path)
      site.write('input', {name: new[name] for name in own})
    running += 1
    try:
      return call(*args, **kwargs)
    finally:
      running -= 1

  return Hook('.*', call=visit, collection=COLLECTION, methods=METHODS)


@jax.jit
def joined_constants(first: Mapping[str, Array], second: Mapping[str, Array]) -> dict[str, Array]:
  """Returns the constants of an input whose range holds both ranges, of one kind and bit-width.

  A channel of scale 0 is the constant `value`; a tensor of scale 0 has no range.
  """
  if 'bits' in first:
    return {**first, 'scale': jnp.maximum(first['scale'], second['scale'])}

  def ends(own: Mapping[str, Array]) -> tuple[Array, Array]:
    low, high = ((own[name] - own['zero_point']) * own['scale'] for name in ('low', 'high'))
    if 'value' not in own:
      return low, high
    flat = own['scale'] == 0
    return jnp.where(flat, own['value'], low), jnp.where(flat, own['value'], high)

  both = ends(first), ends(second)
  low, high = jnp.minimum(both[0][0], both[1][0]), jnp.maximum(both[0][1], both[1][1])
  quantizer = CHANNEL if first['scale'].ndim else TENSOR
  params = affine.params_from_range(quantizer, low, high, _kind_and_bits(first)[1])
  flat = low == high
  new = {'scale': jnp.where(flat, 0, params.scale), 'zero_point': params.zero_point}
  return {**first, **{name: own.astype(first[name].dtype) for name, own in new.items()}}
