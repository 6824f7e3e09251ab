"""Training in 8-bit floats around an untouched model: linear layers, norms and head, states threaded through.

  state, probes = init_float8(model, variables, x)
  params = merge_probes(variables['params'], probes)
  hooks = float8_hooks()

  def loss(params, float8, x):
    y, changed = models.apply(model, {'params': params, 'float8': float8}, x, hooks=hooks, mutable=['float8'])
    return ..., changed['float8']

  optimizer = by_path([(PROBES, replace_by_gradient()), ('.*', adamw)])

Scales and histories are the collection `'float8'`, which every forward pass advances and which a program
carries from step to step (`collections=` of supervised programs). The largest magnitude of a layer's
*gradient* comes out of the backward pass as the gradient of a probe, a scalar `float8_gradient` in the
layer's parameters; the optimizer writes it there (`replace_by_gradient`), and the next forward pass pushes
it into the gradient's history, before the backward pass that needs it. Over microbatches it is the mean of
their maxima. Master weights and the optimizer's state stay as they are.

A module that is called several times in a forward pass has one scale for all calls, and pushes the largest
magnitude of all of them; its probe has a number for each call, `[calls]`.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.intercept import Hook, Site, apply, first_argument
from jaxlab.models.normalization import LayerNorm
from jaxlab.quantizers.numerics.float8 import (
  E4M3,
  E5M2,
  HISTORY,
  DelayedScale,
  Float8Scales,
  float8_dot,
  float8_round,
  init_delayed_scale,
  update_delayed_scale,
)

Array = jax.Array
PyTree = Any

METHODS = ('__call__', 'attend')
NORMS = (LayerNorm, nn.LayerNorm, nn.RMSNorm)
COLLECTION, PROBE, REPEATED = 'float8', 'float8_gradient', 'repeated'
PROBES = rf'(.*/)?{PROBE}'


def init_float8(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  x: Any,
  *,
  layers: str = '.*',
  norms: bool = True,
  history: int = HISTORY,
  **kwargs: Any,
) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
  """Returns the collection `'float8'` before the first step, and the probes, both by module.

  A module that they hold is run in float8 by `float8_hooks`: `nn.Dense`, the head of a language model that is
  tied to its embedding, and, with `norms`, what layer norms (and RMS norms) return. Of the modules of a
  stack (`nn.scan`) they are stacked, too; those that are called several times have to be called as often
  later. Attention's products and the convolution of a patch embedding stay as they are.

  Args:
    model: any Linen module.
    variables: its variables, or their shapes.
    x: model input, or its shape.
    layers: regular expression over whole module paths; TWEO leaves no linear layer, norm or head out.
    norms: whether the outputs of layer norms, and the gradients there, are rounded.
    history: number of past maxima that a scale looks at.
    **kwargs: passed to the model.

  Raises:
    ValueError: if no linear layer matches, or the history is empty.

  References:
    Liang et al., TWEO: Transformers Without Extreme Outliers Enables FP8 Training and Quantization for
    Dummies, CVPR 2026 (https://arxiv.org/abs/2511.23225). What Transformer Engine does at a norm, rounding
    what it hands on, is this library's reading.
  """
  init_delayed_scale(history)
  found: list[str] = []

  def visit(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    module, names = site.module, ()
    if re.fullmatch(layers, site.path):
      if isinstance(module, nn.Dense) or site.method == 'attend':
        found.append(site.path)
        names = ('x', 'kernel', 'gradient')
      elif norms and isinstance(module, NORMS):
        names = ('x', 'gradient')
    for name in names:
      site.write(name, init_delayed_scale(history)._asdict())
    if names:
      # Calls are counted by a shape, which transformations that trace a module twice leave alone.
      before = site.read(REPEATED)['calls'].size if site.has(REPEATED) else 0
      largest = {name: jnp.float32(0) for name in names if name != 'gradient'}
      site.write(REPEATED, {'calls': jnp.zeros(before + 1), **largest})
    return call(*args, **kwargs)

  hooks = [Hook('.*', call=visit, collection=COLLECTION, methods=METHODS)]
  variables = {name: tree for name, tree in variables.items() if name != COLLECTION}

  def run(variables: PyTree, x: Any) -> PyTree:
    return apply(model, variables, x, hooks=hooks, mutable=[COLLECTION], **kwargs)[1]

  shapes = jax.eval_shape(run, variables, x)
  if not found:
    raise ValueError(
      f'layers={layers!r} matches no linear layer of {type(model).__name__}; models.module_paths(model, x) '
      f'lists all paths.'
    )
  flat = traverse_util.flatten_dict(dict(shapes[COLLECTION]))
  calls = {path[:-2]: leaf.shape for path, leaf in flat.items() if path[-2:] == (REPEATED, 'calls')}
  state, probes = {}, {}
  for path, leaf in flat.items():
    *stack, count = calls[path[:-2]]
    if path[-2:] == ('gradient', 'scale'):
      probes[*path[:-2], PROBE] = jnp.zeros(
        leaf.shape if count == 1 else (*stack, count), leaf.dtype
      )
    if path[-1] == 'calls':
      leaf = jax.ShapeDtypeStruct(stack, jnp.int32)
    if path[-2] != REPEATED or count > 1:
      state[path] = jnp.full(leaf.shape, 1 if path[-1] == 'scale' else 0, leaf.dtype)
  return traverse_util.unflatten_dict(state), traverse_util.unflatten_dict(probes)


def merge_probes(params: Mapping[str, PyTree], probes: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Returns parameters with the probes among them."""
  flat = traverse_util.flatten_dict(dict(params))
  return traverse_util.unflatten_dict({**flat, **traverse_util.flatten_dict(dict(probes))})


def split_probes(params: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Returns parameters without probes: those of the model, for evaluation in full precision."""
  flat = traverse_util.flatten_dict(dict(params))
  return traverse_util.unflatten_dict({path: p for path, p in flat.items() if path[-1] != PROBE})


@functools.cache
def float8_hooks(margin: float = 0) -> tuple[Hook, ...]:
  """Returns the hooks that run the modules of the collection `'float8'` in float8; the same for all networks.

  Apply the model with `mutable=['float8']` to advance the scales, which those who evaluate do not.

  Args:
    margin: see `update_delayed_scale`.

  Raises (when the model is applied):
    ValueError: if a module of the collection has no probe among its parameters, or takes what no `nn.Dense`
      does.
  """

  def visit(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    looked_up = isinstance(site.module, nn.Embed) and site.method == '__call__'
    if looked_up or not site.has('gradient'):
      return call(*args, **kwargs)
    probe = site.module.scope.get_variable('params', PROBE)
    if probe is None:
      raise ValueError(f'{site.path!r} has no probe {PROBE!r}: merge_probes(params, probes).')
    index, count = _call_of(site, probe)
    gradient = update_delayed_scale(_state(site, 'gradient'), jnp.max(probe), E5M2, margin=margin)
    gradient = _write(site, 'gradient', gradient, index == 0)
    own = probe if count == 1 else probe[index]
    if isinstance(site.module, NORMS):
      y = call(*args, **kwargs)
      (scale,) = _scales(site, {'x': y}, index, count, margin)
      return float8_round(y, scale, gradient.scale, own)
    x, kernel, bias, dtype = _operands(site, first_argument(site, args, kwargs)[0])
    scales = _scales(site, {'x': x, 'kernel': kernel}, index, count, margin)
    y = float8_dot(x, kernel, Float8Scales(*scales, gradient.scale), own).astype(dtype)
    return y if bias is None else y + bias.astype(dtype)

  return (Hook('.*', call=visit, collection=COLLECTION, methods=METHODS),)


def _operands(site: Site, x: Array) -> tuple[Array, Array, Array | None, Any]:
  """Returns input, kernel, bias and the dtype of the result."""
  read, own = site.module.scope.get_variable, site.module.dtype
  if site.method == 'attend':
    kernel, bias = read('params', 'embedding').T, None
  else:
    kernel, bias = read('params', 'kernel'), read('params', 'bias')
  given = [x, kernel] if bias is None else [x, kernel, bias]
  return x, kernel, bias, jnp.result_type(*given) if own is None else own


def _call_of(site: Site, probe: Array) -> tuple[Array | int, int]:
  """Returns which call of the module in this forward pass it is, and of how many."""
  count = probe.size
  return (0 if count == 1 else site.read(REPEATED)['calls']), count


def _state(site: Site, name: str) -> DelayedScale:
  return DelayedScale(**site.read(name))


def _write(site: Site, name: str, state: DelayedScale, due: Array | bool) -> DelayedScale:
  """Stores and returns a state where it is due, else that which is there."""
  if due is not True:
    state = jax.tree.map(lambda new, old: jnp.where(due, new, old), state, _state(site, name))
  site.write(name, state._asdict())
  return state


def _scales(
  site: Site, values: Mapping[str, Array], index: Array | int, count: int, margin: float
) -> list[Array]:
  """Returns the scales from the steps before; the last call pushes the maxima of all calls of this one."""
  found, largest = [], {}
  for name, value in values.items():
    amax = jnp.max(jnp.abs(jax.lax.stop_gradient(value)).astype(jnp.float32))
    if count > 1:
      amax = jnp.where(index == 0, amax, jnp.maximum(amax, site.read(REPEATED)[name]))
    state, largest[name] = _state(site, name), amax
    found.append(state.scale)
    pushed = update_delayed_scale(state, amax, E4M3, margin=margin)
    _write(site, name, pushed, True if count == 1 else index == count - 1)
  if count > 1:
    site.write(REPEATED, {'calls': (index + 1) % count, **largest})
  return found
