"""LSQ around an untouched model: learned steps for kernels and for the inputs of layers, by path.

What is learned lies in the collection `'lsq'`, at the module whose operand it quantizes: `kernel`, a step for
each output channel, and `input`, one step. The lowest and highest codes, constants, lie in `'lsq_codes'`
under the same names. Training is that of any model whose parameters are `params` and `lsq`:

  variables = lsq_variables(model, variables, images, BitPolicy([('.*', 3)], [('.*', 3)]))

  def loss(params, lsq):
    logits = lsq_apply(model, {**variables, 'params': params, 'lsq': lsq}, images)
    ...

`params` are the float kernels throughout; `lsq_kernels` gives those that the network computes with.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.intercept import Hook, Site, apply
from jaxlab.quantizers.networks.operands import plan
from jaxlab.quantizers.networks.rules import BitPolicy, Bits
from jaxlab.quantizers.numerics.affine import code_range
from jaxlab.quantizers.numerics.learned import lsq_fake_quantize, lsq_scale

Array = jax.Array
PyTree = Any

STEPS, CODES = 'lsq', 'lsq_codes'
FLOOR = 1e-6  # smallest step; one that has sunk below gets no gradient


def lsq_variables(
  model: nn.Module, variables: Mapping[str, PyTree], x: Array, policy: BitPolicy, **kwargs: Any
) -> dict[str, PyTree]:
  """Returns `variables` with collections `'lsq'` and `'lsq_codes'`, steps by LSQ's rule (`lsq_scale`).

  Inputs are measured in one forward pass over `x`, in order of execution, each on values that all quantizers
  before it have been applied to. Their codes are unsigned where no value of the batch is negative (behind a
  ReLU or a softmax), else signed; those of kernels are signed.

  Args:
    model: any Linen module.
    variables: its float variables.
    x: a first training batch of model inputs.
    policy: bit-widths; its `activations` rules are over the layers whose *input* is quantized, and hook
      points of attention, as in `operands.plan`. At least 2 bits; may be traced.
    **kwargs: passed to the model, e.g. `train=False`.

  Raises:
    ValueError: if a rule names no layer, bits are outside 2 to 8, blocks are stacked, or a kernel has a
      channel of zeros or is not finite.
  """
  todo = plan(model, variables, x, policy, **kwargs)
  flat = traverse_util.flatten_dict(dict(variables['params']), sep='/')
  steps, codes = {}, {}
  for path, bits in todo.kernel_bits.items():
    low, high = code_range(bits, signed=True)
    try:
      steps[f'{path}/kernel'] = lsq_scale(flat[f'{path}/kernel'], high, axis=-1)
    except ValueError as error:
      raise ValueError(f'{path}: {error}') from None
    codes |= {f'{path}/kernel/low': low, f'{path}/kernel/high': high}

  @jax.jit
  def run(variables, x, input_bits):
    def measure(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
      if site.path in input_bits:
        if not site.has('input'):
          site.write('input', _measured(args[0], input_bits[site.path]))
        args = (_quantized(args[0], **site.read('input')), *args[1:])
      return call(*args, **kwargs)

    hooks = [Hook('.*', call=measure, collection='found')]
    _, state = apply(model, variables, x, hooks=hooks, mutable=['found'], **kwargs)
    return state.get('found', {})

  given = {**variables, STEPS: _nested(steps), CODES: _nested(codes)}
  found = run(lsq_kernels(given), x, todo.input_bits)
  for path, leaf in traverse_util.flatten_dict(dict(found), sep='/').items():
    module, _, name = path.rpartition('/')
    if name == 'scale':
      steps[module] = leaf
    else:
      codes[path] = leaf
  return {**variables, STEPS: _nested(steps), CODES: _nested(codes)}


def _nested(flat: Mapping[str, Array]) -> PyTree:
  return traverse_util.unflatten_dict(dict(flat), sep='/')


def _measured(x: Array, bits: Bits) -> dict[str, Array]:
  positive = jnp.min(x) >= 0
  ranges = code_range(bits, signed=False), code_range(bits, signed=True)
  low, high = (jnp.where(positive, unsigned, signed) for unsigned, signed in zip(*ranges))
  return {'scale': lsq_scale(x, high).reshape(()), 'low': low, 'high': high}


def _quantized(x: Array, scale: Array, low: Array, high: Array) -> Array:
  return lsq_fake_quantize(x, scale, low, high, floor=FLOOR)


def lsq_kernels(variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Returns `variables` with every kernel that has a step fake-quantized, with LSQ's gradients."""
  flat = traverse_util.flatten_dict(dict(variables['params']), sep='/')
  steps = traverse_util.flatten_dict(dict(variables[STEPS]), sep='/')
  codes = traverse_util.flatten_dict(dict(variables[CODES]), sep='/')
  for path, scale in steps.items():
    if path.endswith('/kernel'):
      flat[path] = _quantized(flat[path], scale, codes[f'{path}/low'], codes[f'{path}/high'])
  return {**variables, 'params': _nested(flat)}


def lsq_hooks() -> tuple[Hook, ...]:
  """Returns the hooks that fake-quantize the inputs of all modules that have a step: the same for all models.

  They go with kernels of `lsq_kernels`; `lsq_apply` is both.
  """
  return (Hook('.*', call=_run_site, collection=STEPS),)


def _run_site(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
  if site.has('input'):
    codes = site.module.scope.get_variable(CODES, 'input')
    args = (_quantized(args[0], site.read('input'), **codes), *args[1:])
  return call(*args, **kwargs)


def lsq_apply(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  *args: Any,
  hooks: tuple[Hook, ...] = (),
  **kwargs: Any,
) -> Any:
  """Returns `model.apply(variables, *args, **kwargs)` with the operands that have steps fake-quantized.

  Args:
    model: any Linen module.
    variables: with the collections of `lsq_variables`.
    *args: of the model.
    hooks: further ones, around these.
    **kwargs: of the model and of `apply`.
  """
  return apply(model, lsq_kernels(variables), *args, hooks=(*lsq_hooks(), *hooks), **kwargs)
