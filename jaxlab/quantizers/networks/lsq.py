"""LSQ around an untouched model: learned steps for kernels and for the inputs of layers, by path.

What is learned lies in the collection `'lsq'`, at the module whose operand it quantizes: `kernel`, a step for
each output channel, and `input`, one step. The lowest and highest codes, constants, lie in `'lsq_codes'`
under the same names. Training is that of any model whose parameters are `params` and `lsq`:

  network = lsq(model, variables, images, uniform_rules(3, 3, learned=True))

  def loss(params, steps):
    logits = network.update(params=params, lsq=steps)(images)
    ...

`params` are the float kernels throughout; `network.unbind()` gives those that the network computes with.
Steps are learned no more behind `compensate`, and become scales in `integer_network`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.intercept import Hook, Site, apply
from jaxlab.quantizers.networks.operands import (
  affine_form,
  fake_quantize_operand,
  operand_hooks,
  plan,
)
from jaxlab.quantizers.networks.quantized import COLLECTION, Quantized, joined_batch
from jaxlab.quantizers.networks.rules import Bits, Rules
from jaxlab.quantizers.numerics.affine import code_range
from jaxlab.quantizers.numerics.learned import lsq_scale

Array = jax.Array
PyTree = Any

STEPS, CODES = 'lsq', 'lsq_codes'


def lsq(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Array | Iterable[Array],
  rules: Rules,
  *,
  anatomy: Anatomy | None = None,
  **kwargs: Any,
) -> Quantized:
  """Returns the network with learned steps at their first values, by LSQ's rule (`lsq_scale`).

  Inputs are measured in one forward pass, in order of execution, each on values that all quantizers
  before it have been applied to. Their codes are unsigned where no value is negative (behind a
  ReLU or a softmax), else signed; those of kernels are signed.

  Args:
    model: any Linen module.
    variables: its float variables.
    batches: a first training batch of model inputs; several arrays are taken as one.
    rules: over kernels and inputs of layers, and hook points of attention, as in `repq`, all `learned`; 2 to
      8 bits, which may be traced.
    anatomy: the names of the model's parts, for what goes on from the result; None: `models.anatomy(model)`.
    **kwargs: passed to the model, e.g. `train=False`.

  Raises:
    ValueError: if there is no batch, a rule names no layer, is not learned or asks for what is not done here,
      bits are outside 2 to 8, blocks are stacked, or a kernel has a channel of zeros or is not finite.
  """
  x = joined_batch(batches)
  todo = plan(model, variables, x, rules, 'lsq', learned=True, **kwargs)
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
        args = (fake_quantize_operand(args[0], site.read('input')), *args[1:])
      return call(*args, **kwargs)

    hooks = [Hook('.*', call=measure, collection='found')]
    _, state = apply(model, variables, x, hooks=hooks, mutable=['found'], **kwargs)
    return state.get('found', {})

  given = {**variables, STEPS: _nested(steps), CODES: _nested(codes)}
  found = run(_with_constants(given), x, todo.input_bits)
  for path, leaf in traverse_util.flatten_dict(dict(found), sep='/').items():
    module, _, name = path.rpartition('/')
    if name == 'step':
      steps[module] = leaf
    else:
      codes[path] = leaf
  return Quantized.of(
    model,
    {**variables, STEPS: _nested(steps), CODES: _nested(codes)},
    variables,
    operand_hooks(),
    kwargs=kwargs,
    anatomy=anatomy,
    prepare=_with_constants,
  )


def _nested(flat: Mapping[str, Array]) -> PyTree:
  return traverse_util.unflatten_dict(dict(flat), sep='/')


def _measured(x: Array, bits: Bits) -> dict[str, Array]:
  positive = jnp.min(x) >= 0
  ranges = code_range(bits, signed=False), code_range(bits, signed=True)
  low, high = (jnp.where(positive, unsigned, signed) for unsigned, signed in zip(*ranges))
  return {'step': lsq_scale(x, high).reshape(()), 'low': low, 'high': high}


def _with_constants(variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
  """Returns variables for `operand_hooks`: steps and codes as constants, kernels fake-quantized."""
  found = dict(variables)
  steps = traverse_util.flatten_dict(dict(found.pop(STEPS)), sep='/')
  codes = traverse_util.flatten_dict(dict(found.pop(CODES)), sep='/')
  params = traverse_util.flatten_dict(dict(found['params']), sep='/')
  constants = {}
  for path, step in steps.items():
    own = {'step': step, 'low': codes[f'{path}/low'], 'high': codes[f'{path}/high']}
    constants[path] = own
    if path.rpartition('/')[2] == 'kernel':
      constants[path], params[path] = affine_form(own), fake_quantize_operand(params[path], own)
  return {**found, 'params': _nested(params), COLLECTION: _nested(constants)}
