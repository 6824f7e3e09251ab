"""Post-training quantization with ranges by percentiles."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from jaxlab.quantizers.networks import operands
from jaxlab.quantizers.networks.calibration import calibrate_inputs
from jaxlab.quantizers.networks.operands import COLLECTION, Quantized
from jaxlab.quantizers.networks.rules import BitPolicy, Bits

Array = jax.Array
PyTree = Any


def percentile_ptq(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  x: Array,
  policy: BitPolicy,
  *,
  conv_act_bits: Bits = None,
  **kwargs: Any,
) -> Quantized:
  """Post-training quantization with the percentile search: kernels per output channel, inputs per tensor.

  QwT's base for ResNets. Norms stay in float, batch norm is not folded. Attention's operands, if there are
  any, are quantized as in `repq`. The ranges of inputs are fixed in one forward pass over `x`, in
  order of execution (`calibrate_inputs`); for data parallelism hand in `x` sharded over the mesh. A
  traceable function: to compile it ahead of time, jit `lambda v, x: percentile_ptq(model, v, x, policy)[:2]`.

  Args:
    model: any Linen module.
    variables: its float variables.
    x: calibration batch `[batch, ...]`, 32 images in QwT.
    policy: bit-widths, 2 to 8, e.g. `edge_policy(4, 4)`; its `activations` rules are over the layers whose
      input is quantized (and hook points of attention). Bits may be traced.
    conv_act_bits: in place of the policy's, for quantized inputs of convolutions. QwT's code of June 2025
      takes 8 there whatever is asked for, which its ResNet numbers contain.
    **kwargs: passed to the model, e.g. `train=False`; hashable.

  Raises:
    ValueError: if a rule names no layer, bits are outside 2 to 8, blocks are stacked (all before any
      work), or weights or calibration data are not finite.
  """
  todo = operands.plan(model, variables, x, policy, **kwargs)
  if conv_act_bits is not None:
    operands.check_bits('conv_act_bits', conv_act_bits)
    convs = [path for path in todo.input_bits if todo.kernel_ndims.get(path, 0) > 2]
    todo.input_bits.update(dict.fromkeys(convs, conv_act_bits))
  params, kernels = operands.quantize_kernels(variables['params'], todo.kernel_bits)
  quantized = {**variables, 'params': params}
  inputs = calibrate_inputs(model, quantized, x, todo, **kwargs)
  operands.check_finite(inputs, kernels)
  quantized[COLLECTION] = operands.collection(inputs, kernels, {})
  return Quantized(quantized, {**variables, COLLECTION: {}}, operands.operand_hooks())
