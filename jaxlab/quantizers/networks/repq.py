"""RepQ-ViT (Li et al. 2023, arXiv 2212.08254), as QwT (Fu et al. 2025, arXiv 2411.13918) uses it.

LayerNorm outputs differ so much between channels that one range a tensor fails. RepQ-ViT calibrates them
per channel, then moves the channels' differences into the LayerNorm and the layer behind it: an exact
transform of the float parameters, after which one range a tensor is right.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.anatomy import anatomy as anatomy_of
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
from jaxlab.quantizers.networks.input_ranges import joined_constants
from jaxlab.quantizers.networks.kernels import quantize_kernels
from jaxlab.quantizers.networks.norm_readers import (
  Pairs,
  all_readers,
  check_function,
  layer_norm_pairs,
  norm_dense_pairs,
)
from jaxlab.quantizers.networks.quantized import COLLECTION, Quantized, check_model
from jaxlab.quantizers.networks.rules import Rules
from jaxlab.quantizers.networks.tables import quantize_tables
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any


class Reparametrized(NamedTuple):
  """A LayerNorm and a dense layer, equivalent to the given ones, and the quantizer between them."""

  norm: dict[str, Array]
  dense: dict[str, Array]
  scale: Array
  zero_point: Array


def reparametrize(
  norm: Mapping[str, Array],
  dense: Mapping[str, Array],
  scale: Array,
  zero_point: Array,
  value: Array | None = None,
) -> Reparametrized:
  """Returns the parameters for which one quantizer a tensor does what one a channel did before.

  With `s` and `z` the means of `scale_c` and `zero_point_c` over channels, `r_c = scale_c / s` and
  `v_c = (z - zero_point_c) s`:

    norm:  scale_c <- scale_c / r_c,   bias_c <- bias_c / r_c - v_c
    dense: kernel_c <- kernel_c r_c,   bias <- bias + sum_c v_c kernel_c (new)

  In float the function stays the same. The merged zero point is fractional and stays so; where it happens to
  be whole, the quantized function is that of the per-channel quantizer, too. (RepQ-ViT, section 3.2;
  its `v_c` is `m_c / r_c - m` with `m_c = -zero_point_c scale_c`, `m = -z s`.)

  A channel of scale 0 is a constant and takes no part in the means: `r_c = 1`, and `v_c = value_c`, so
  that the norm gives 0, which every quantizer here keeps, and the constant moves into the dense bias.

  Args:
    norm: `scale` and `bias` `[channels]`.
    dense: `kernel` `[channels, features]` (or several axes of features) and, perhaps, `bias` `[features]`;
      the result has one.
    scale: steps of the per-channel quantizer of the norm's output, `[channels]`.
    zero_point: its zero points `[channels]`.
    value: `[channels]`, what channels of scale 0 are equal to; None: 0.

  Returns:
    New parameters in the dtypes of the given ones; scalar scale and zero point.

  Raises:
    ValueError: if the norm has no scale or bias, or shapes do not fit.
  """
  missing = [name for name in ('scale', 'bias') if name not in norm]
  if missing:
    raise ValueError(
      f'reparametrize needs a LayerNorm with scale and bias; it has no {" and no ".join(missing)}. An '
      f'RMSNorm cannot take the shift: leave it out of the pairs, its layer then keeps one range a tensor.'
    )
  kernel = dense['kernel']
  shapes = {jnp.shape(norm['scale']), jnp.shape(scale), jnp.shape(zero_point), kernel.shape[:1]}
  if len(shapes) != 1 or kernel.ndim < 2:
    raise ValueError(
      f'reparametrize: norm scale {jnp.shape(norm["scale"])}, quantizer {jnp.shape(scale)} and '
      f'{jnp.shape(zero_point)}, kernel {kernel.shape} are not [channels], [channels, features].'
    )
  flat = scale == 0
  count = jnp.maximum(jnp.sum(~flat), 1)
  merged_scale = jnp.sum(scale) / count
  merged_zero_point = jnp.sum(jnp.where(flat, 0, zero_point)) / count
  ratio = jnp.where(flat, 1, scale / jnp.where(merged_scale == 0, 1, merged_scale))
  constant = 0 if value is None else value
  shift = jnp.where(flat, constant, (merged_zero_point - zero_point) * merged_scale)

  new_kernel = kernel * ratio.reshape(-1, *(1,) * (kernel.ndim - 1))
  flat_kernel = new_kernel.reshape(len(ratio), -1)
  offset = jnp.matmul(shift, flat_kernel, precision=jax.lax.Precision.HIGHEST)
  offset = offset.reshape(kernel.shape[1:])
  bias = dense['bias'] if 'bias' in dense else jnp.zeros(kernel.shape[1:], kernel.dtype)
  new_norm = {'scale': norm['scale'] / ratio, 'bias': norm['bias'] / ratio - shift}
  new_dense = {
    'kernel': new_kernel.astype(kernel.dtype),
    'bias': (bias + offset).astype(bias.dtype),
  }
  return Reparametrized(
    {**norm, **{name: leaf.astype(norm[name].dtype) for name, leaf in new_norm.items()}},
    {**dense, **new_dense},
    merged_scale,
    merged_zero_point,
  )


def repq(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Batches,
  rules: Rules,
  *,
  anatomy: Anatomy | None = None,
  pairs: Pairs | None = None,
  counted: Counted = None,
  **kwargs: Any,
) -> Quantized:
  """Post-training quantization of a transformer by RepQ-ViT, with QwT's range search.

  Kernels: affine per output channel. Inputs of layers, and the hook points `query`, `key`, `value`: affine
  per tensor. `softmax`: log-sqrt2. All ranges by the percentile search, those of activations in one
  forward pass in order of execution (`calibrate_inputs`). Inputs of layers that a
  LayerNorm feeds are calibrated per channel and merged (`reparametrize`); then those layers' kernels get new
  ranges, while activations keep the ranges of the pass. LayerNorm, softmax, GELU and residual sums are in
  float. All layers that read a rescaled norm make up for it, those too that are not quantized; a norm that is
  called several times has the channels' ranges of all its readers. The float network is run before and after
  the transform, on the calibration data (unless they are traced): it has to stay the same.

  A layer without bias is given one in the collection `'quantization'`, which the hooks add.
  For data parallelism hand in a batch sharded over the mesh. A traceable function: for compilation ahead of
  time jit `lambda v, x: repq(model, v, x, rules)`.

  Args:
    model: any Linen module.
    variables: its float variables.
    batches: calibration inputs, 32 images of the training set in QwT; see `percentile_ptq`.
    rules: over kernels and inputs of layers and the hook points above, 2 to 8 bits, e.g. `edge_rules(4, 4)`.
      Bits may be traced.
    anatomy: the names of the model's parts; None: `models.anatomy(model)`. Not asked for with `pairs`.
    pairs: see `norm_dense_pairs`; `()` reparametrizes nothing. Other layers that read a paired norm join it.
      None: the LayerNorms of the anatomy and their readers, but for the head.
    counted: which positions enter the ranges; see `percentile_ptq`.
    **kwargs: passed to the model with every batch, e.g. `train=False`.

  Returns:
    The network; its `float_variables` are the reparametrized ones, equal to `variables` as a function.

  Raises:
    ValueError: if there is no batch, the model's parts are not known, a rule or a pair names nothing, a rule
      asks for what is not done here, bits are outside 2 to 8, blocks are stacked, what reads a norm cannot
      absorb its scale (all before any work), weights or calibration data are not finite, or the rescaled
      float network is another function: something else reads a norm.
  """
  check_model(model, variables)
  x = joined_batch(batches)
  positions = positions_of(counted_mask(counted, model, as_call(x, kwargs)))
  if pairs is None:
    found = layer_norm_pairs(anatomy_of(model) if anatomy is None else anatomy, variables['params'])
  else:
    found = norm_dense_pairs(variables['params'], pairs)
  call = as_call(x, kwargs)
  readers = all_readers(model, variables, call, found)
  denses = [dense for _, dense in readers.pairs]
  todo = operands.plan(
    model, variables, x, rules, 'repq', per_channel=denses, tables=True, **kwargs
  )
  quantized = [pair for pair in readers.pairs if pair[1] in todo.input_bits]
  _check_shared_norms(quantized, todo)
  params, kernels = quantize_kernels(variables['params'], todo.kernel_bits, todo.layers)
  params, tables = quantize_tables(params, todo.table_bits)
  first_pass = {**variables, 'params': params}
  inputs = calibrate_inputs(model, first_pass, x, todo, anatomy, positions, **kwargs)
  operands.check_finite(inputs, kernels)

  ranges: dict[str, dict[str, Array]] = {}
  for norm, dense in quantized:
    own = {name: inputs[dense][name] for name in ('scale', 'zero_point', 'low', 'high', 'value')}
    del inputs[dense]['value']
    known = ranges.get(norm)
    ranges[norm] = (
      joined_constants(known, own) if known and norm in readers.repeated else known or own
    )
  merged = {
    dense: _jitted_reparametrize(
      _below(variables['params'], norm),
      _below(variables['params'], dense),
      *(ranges[norm][name] for name in ('scale', 'zero_point', 'value')),
    )
    for norm, dense in readers.pairs
    if norm in ranges
  }
  for _, dense in quantized:
    inputs[dense] |= {'scale': merged[dense].scale, 'zero_point': merged[dense].zero_point}

  def rescaled(norms: Iterable[str]) -> tuple[PyTree, dict[str, Array]]:
    """Returns float parameters with these norms rescaled, and the biases of layers that have none."""
    flat, biases = traverse_util.flatten_dict(dict(variables['params']), sep='/'), {}
    for norm, dense in readers.pairs:
      if norm not in norms:
        continue
      flat |= {f'{norm}/{name}': leaf for name, leaf in merged[dense].norm.items()}
      for name, leaf in merged[dense].dense.items():
        if f'{dense}/{name}' in flat:
          flat[f'{dense}/{name}'] = leaf
        else:
          biases[dense] = leaf
    return traverse_util.unflatten_dict(flat, sep='/'), biases

  float_params, biases = rescaled(ranges)
  check_function(model, variables, call, rescaled, ranges)
  params, kernels = quantize_kernels(float_params, todo.kernel_bits, todo.layers)
  params, _ = quantize_tables(params, todo.table_bits)
  constants = operands.collection(inputs, kernels, biases, tables)
  return Quantized.of(
    model,
    {**variables, 'params': params, COLLECTION: constants},
    {**variables, 'params': float_params},
    operands.operand_hooks(),
    kwargs=kwargs,
    anatomy=anatomy,
    **operands.said_by(todo),
  )


def _check_shared_norms(pairs: Sequence[tuple[str, str]], todo: operands.Plan) -> None:
  """Raises ValueError if layers behind one norm want different bits: they share its channels' ranges."""
  first: dict[str, str] = {}
  for norm, dense in pairs:
    other = first.setdefault(norm, dense)
    bits = todo.input_bits[other], todo.input_bits[dense]
    concrete = all(map(is_concrete, bits))
    if bits[0] is not bits[1] and not (concrete and np.array_equal(*bits)):
      raise ValueError(
        f'{other!r} and {dense!r} read the same norm {norm!r}: give their inputs the same bits.'
      )


_jitted_reparametrize = jax.jit(reparametrize)


def _below(tree: PyTree, path: str) -> PyTree:
  for name in path.split('/'):
    tree = tree[name]
  return tree
