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

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.blockwise import Skeleton
from jaxlab.models.intercept import Hook, Site, apply, first_argument
from jaxlab.models.main_arrays import array_leaves
from jaxlab.quantizers.networks.activation_qat import float_kernels
from jaxlab.quantizers.networks.batches import (
  Batches,
  Counted,
  as_call,
  counted_mask,
  joined_batch,
  positions_of,
)
from jaxlab.quantizers.networks.input_ranges import input_constants, seen_rows
from jaxlab.quantizers.networks.operands import (
  METHODS,
  affine_form,
  fake_quantize_operand,
  join,
  operand_hooks,
  plan,
  reads_operand,
  said_by,
)
from jaxlab.quantizers.networks.quantized import COLLECTION, Quantized
from jaxlab.quantizers.networks.rules import Bits, Rules
from jaxlab.quantizers.numerics.bit_widths import code_range
from jaxlab.quantizers.numerics.learned import lsq_scale
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any

STEPS, CODES = 'lsq', 'lsq_codes'


def lsq(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Batches,
  rules: Rules,
  *,
  anatomy: Anatomy | None = None,
  counted: Counted = None,
  **kwargs: Any,
) -> Quantized:
  """Returns the network with learned steps at their first values, by LSQ's rule (`lsq_scale`).

  A channel of zeros gets the mean step of its kernel's others.
  Inputs are measured in one forward pass, in order of execution, each on values that all quantizers
  before it have been applied to. Their codes are unsigned where no value is negative (behind a
  ReLU or a softmax), else signed; those of kernels are signed.

  Args:
    model: any Linen module.
    variables: its float variables.
    batches: a first training batch of model inputs; see `percentile_ptq`.
    rules: over kernels and inputs of layers, and hook points of attention, as in `repq`, all `learned`; 2 to
      8 bits, which may be traced.
    anatomy: the names of the model's parts, for what goes on from the result; None: `models.anatomy(model)`.
    counted: which positions are measured; see `percentile_ptq`.
    **kwargs: passed to the model with every batch, e.g. `train=False`.

  Raises:
    ValueError: if there is no batch, a rule names no layer, is not learned or asks for what is not done here,
      bits are outside 2 to 8, blocks are stacked, or a kernel or an input is all zeros or not finite.
  """
  x = joined_batch(batches)
  called = as_call(x, kwargs)
  positions = positions_of(counted_mask(counted, model, called))
  todo = plan(model, variables, x, rules, 'lsq', learned=True, **kwargs)
  flat = traverse_util.flatten_dict(dict(variables['params']), sep='/')
  steps, codes = {}, {}
  for path, bits in todo.kernel_bits.items():
    low, high = code_range(bits, signed=True)
    kernel, channels = flat[f'{path}/kernel'], todo.layers[path].channels
    steps[f'{path}/kernel'] = _kernel_step(path, kernel, high, channels)
    codes |= {f'{path}/kernel/low': low, f'{path}/kernel/high': high}

  skeleton = Skeleton.of(called)

  @jax.jit
  def run(variables, leaves, input_bits, positions):
    def measure(site: Site, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
      if site.path in input_bits and reads_operand(site):
        x, given = first_argument(site, args, kwargs)
        kind = kinds[site.path]
        site.write('input', _measured(seen_rows(site, x, positions, kind), input_bits[site.path]))
        args, kwargs = given(fake_quantize_operand(x, site.read('input')))
      return call(*args, **kwargs)

    # The collection of the other constants: transformations of a model that carry it need no other.
    hooks = [Hook('.*', call=measure, collection=COLLECTION, methods=METHODS)]
    args, kwargs = skeleton.fill(leaves)
    options = {**kwargs, 'mutable': [COLLECTION]}
    _, state = apply(model, variables, *args, hooks=hooks, **options)
    return input_constants(state.get(COLLECTION, {}))

  kinds = dict(todo.kinds)
  given = _with_constants({**variables, STEPS: _nested(steps), CODES: _nested(codes)})
  del given[COLLECTION]
  found = run(given, array_leaves(called), todo.input_bits, positions)
  for path, own in found.items():
    if is_concrete(own['step']) and not 0 < float(own['step']) < np.inf:
      raise ValueError(
        f'The input of {path!r} has no step: it is all zeros in these batches, or not finite. Hand in other '
        f'batches, or leave it out of the rules.'
      )
    steps[f'{path}/input'] = own['step']
    codes |= {f'{path}/input/{name}': own[name] for name in ('low', 'high')}
  return Quantized.of(
    model,
    {**variables, STEPS: _nested(steps), CODES: _nested(codes)},
    variables,
    operand_hooks(),
    kwargs=kwargs,
    anatomy=anatomy,
    prepare=_with_constants,
    **said_by(todo),
  )


def weight_only_lsq(network: Quantized, rules: Rules) -> Quantized:
  """Gives the kernels of a network learned steps, one an output channel, and leaves everything else alone.

  Behind `activation_qat` kernels and activations are trained together; `weight_only_ptq` rounds the kernels
  when the activations are done.

  Args:
    network: whose kernels are in float, e.g. of `activation_qat`.
    rules: over kernels, all `learned`; 2 to 8 bits, which may be traced.

  Raises:
    ValueError: for what is no `Quantized`, a network whose kernels are quantized, rules that name no kernel,
      are not learned or ask for what is not done here, bits outside 2 to 8, or kernels of zeros.

  >>> from jaxlab import models
  >>> from jaxlab.quantizers import activation_qat, activation_rules, uniform_rules
  >>> model, x = models.MLP((4,), num_classes=2), jnp.linspace(-1, 1, 8).reshape(2, 4)
  >>> inputs = activation_rules(models.anatomy(model), 4)
  >>> first = activation_qat(model, model.init(jax.random.key(0), x), x, inputs)
  >>> weight_only_lsq(first, uniform_rules(3, learned=True)).operands()['fc0'] == {
  ...   'kernel': 3,
  ...   'input': 8,
  ... }
  True
  """
  found = float_kernels(network, rules, 'weight_only_lsq', learned=True)
  params = traverse_util.flatten_dict(dict(network.variables['params']), sep='/')
  steps, codes = {}, {}
  for path, (bits, channels) in found.items():
    low, high = code_range(bits, signed=True)
    name = join(path, 'kernel')
    steps[name] = _kernel_step(path, params[name], high, channels)
    codes |= {f'{name}/low': low, f'{name}/high': high}
  variables = network.variables.tree
  return Quantized.of(
    network.model, {**variables, STEPS: _nested(steps), CODES: _nested(codes)}, variables,
    (*network.hooks, *operand_hooks()), kwargs=network.kwargs, anatomy=network.anatomy,
    prepare=_with_constants,
  )  # fmt: skip


def _kernel_step(path: str, kernel: Array, high: Array, channels: tuple[int, ...]) -> Array:
  try:
    return lsq_scale(kernel, high, channels, on_zeros='mean')
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from None


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
