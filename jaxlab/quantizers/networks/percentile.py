"""Post-training quantization with ranges by percentiles."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.quantizers.networks import operands
from jaxlab.quantizers.networks.batches import (
  Batches,
  Counted,
  as_call,
  counted_mask,
  joined_batch,
  positions_of,
)
from jaxlab.quantizers.networks.calibration import calibrate_inputs
from jaxlab.quantizers.networks.kernels import quantize_kernels
from jaxlab.quantizers.networks.quantized import COLLECTION, Quantized
from jaxlab.quantizers.networks.rules import Bits, Rules
from jaxlab.quantizers.networks.tables import quantize_tables

Array = jax.Array
PyTree = Any


def percentile_ptq(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Batches,
  rules: Rules,
  *,
  anatomy: Anatomy | None = None,
  conv_act_bits: Bits = None,
  counted: Counted = None,
  **kwargs: Any,
) -> Quantized:
  """Post-training quantization with the percentile search: kernels per output channel, inputs per tensor.

  QwT's base for ResNets. Norms stay in float, batch norm is not folded. Attention's operands, if there are
  any, are quantized as in `repq`. The ranges of inputs are fixed in one forward pass, in order of execution
  (`calibrate_inputs`); for data parallelism hand in a batch sharded over the mesh. A traceable function: to
  compile it ahead of time, jit `lambda v, x: percentile_ptq(model, v, x, rules)`.

  Args:
    model: any Linen module.
    variables: its float variables.
    batches: calibration inputs `[batch, ...]`, 32 images in QwT; several are taken as one. A batch is an
      array, a tuple of arguments, or a mapping of keywords.
    rules: over kernels and inputs of layers (and hook points of attention), 2 to 8 bits, e.g.
      `edge_rules(4, 4)`. Bits may be traced.
    anatomy: the names of the model's parts, for what goes on from the result; None: `models.anatomy(model)`.
    conv_act_bits: in place of the rules', for quantized inputs of convolutions. QwT's code of June 2025
      takes 8 there whatever is asked for, which its ResNet numbers contain.
    counted: which positions enter the ranges (others are padding): the name of the model's argument that
      holds the mask `[batch, ...]`, or a function of its arguments, `lambda tokens: tokens != 0`.
    **kwargs: passed to the model with every batch, e.g. `train=False`.

  Raises:
    ValueError: if there is no batch, a rule names no layer or asks for what is not done here, bits are
      outside 2 to 8, blocks are stacked (all before any work), a module's variables are not carried through a
      transformation around it, or weights or calibration data are not finite.
  """
  x = joined_batch(batches)
  positions = positions_of(counted_mask(counted, model, as_call(x, kwargs)))
  todo = operands.plan(model, variables, x, rules, 'percentile_ptq', tables=True, **kwargs)
  if conv_act_bits is not None:
    operands.check_bits('conv_act_bits', conv_act_bits)
    convs = [path for path in todo.input_bits if path in todo.layers and todo.layers[path].spatial]
    todo.input_bits.update(dict.fromkeys(convs, conv_act_bits))
  params, kernels = quantize_kernels(variables['params'], todo.kernel_bits, todo.layers)
  params, tables = quantize_tables(params, todo.table_bits)
  quantized = {**variables, 'params': params}
  inputs = calibrate_inputs(model, quantized, x, todo, anatomy, positions, **kwargs)
  operands.check_finite(inputs, kernels)
  quantized[COLLECTION] = operands.collection(inputs, kernels, {}, tables)
  hooks = operands.operand_hooks()
  return Quantized.of(
    model, quantized, variables, hooks, kwargs=kwargs, anatomy=anatomy, **operands.said_by(todo)
  )
