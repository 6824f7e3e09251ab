"""RepQ-ViT (Li et al. 2023, arXiv 2212.08254), as QwT (Fu et al. 2025, arXiv 2411.13918) uses it.

LayerNorm outputs differ so much between channels that one range a tensor fails. RepQ-ViT calibrates them
per channel, then moves the channels' differences into the LayerNorm and the layer behind it: an exact
transform of the float parameters, after which one range a tensor is right.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.anatomy import anatomy as anatomy_of
from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.intercept import raise_unmatched
from jaxlab.quantizers.networks import operands
from jaxlab.quantizers.networks.calibration import calibrate_inputs
from jaxlab.quantizers.networks.quantized import COLLECTION, Quantized, check_model, joined_batch
from jaxlab.quantizers.networks.rules import Rules
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any
Pairs = Sequence[tuple[str, str]]


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
    dense: `kernel` `[channels, features]` and, perhaps, `bias` `[features]`; the result has one.
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
  if len(shapes) != 1 or kernel.ndim != 2:
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

  new_kernel = kernel * ratio[:, None]
  offset = jnp.matmul(shift, new_kernel, precision=jax.lax.Precision.HIGHEST)
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


def norm_dense_pairs(params: PyTree, pairs: Pairs) -> tuple[tuple[str, str], ...]:
  """Returns the paths of all (LayerNorm, dense layer) in `params` that `pairs` names.

  Args:
    params: parameter tree.
    pairs: (norm, dense) as regular expressions of paths below a common parent, e.g.
      `('norm1', 'attention/qkv')`; each must name something.

  Raises:
    ValueError: if one of `pairs` matches nothing, or names a norm without bias.

  >>> import numpy as np
  >>> norm = {'scale': np.ones(2), 'bias': np.zeros(2)}
  >>> fc1 = {'kernel': np.ones((2, 3)), 'bias': np.zeros(3)}
  >>> norm_dense_pairs({'blocks_0': {'norm2': norm, 'mlp': {'fc1': fc1}}}, [('norm2', 'mlp/fc1')])
  (('blocks_0/norm2', 'blocks_0/mlp/fc1'),)
  """
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  norms = {
    path.removesuffix('scale').rstrip('/') for path in flat if path.split('/')[-1] == 'scale'
  }
  denses = [
    path.removesuffix('kernel').rstrip('/') for path in flat if path.split('/')[-1] == 'kernel'
  ]
  found = []
  for norm_pattern, dense_pattern in pairs:
    matches = []
    for dense in denses:
      if match := re.fullmatch(rf'(?P<parent>(.*/)?)({dense_pattern})', dense):
        parent = match['parent']
        matches += [
          (norm, dense)
          for norm in sorted(norms)
          if norm.startswith(parent) and re.fullmatch(norm_pattern, norm[len(parent) :])
        ]
    if not matches:
      raise_unmatched([norm_pattern, dense_pattern], [*norms, *denses], 'pair', 'norm and layer')
    for norm, _ in matches:
      if f'{norm}/bias' not in flat:
        raise ValueError(
          f'The norm {norm!r} has no bias (RMSNorm): it cannot take the shift. Leave it out of the pairs; '
          f'its layer then keeps one range a tensor.'
        )
    found += matches
  return tuple(found)


def layer_norm_pairs(anatomy: Anatomy, params: PyTree) -> tuple[tuple[str, str], ...]:
  """Returns the norms with a bias (an RMSNorm is left alone) and their readers, but for the head."""
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  return tuple(
    (norm.path, reader)
    for norm in anatomy.norms
    for reader in norm.readers
    if f'{norm.path}/bias' in flat and reader not in anatomy.head
  )


def repq(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Array | Iterable[Array],
  rules: Rules,
  *,
  anatomy: Anatomy | None = None,
  pairs: Pairs | None = None,
  **kwargs: Any,
) -> Quantized:
  """Post-training quantization of a transformer by RepQ-ViT, with QwT's range search.

  Kernels: affine per output channel. Inputs of layers, and the hook points `query`, `key`, `value`: affine
  per tensor. `softmax`: log-sqrt2. All ranges by the percentile search, those of activations in one
  forward pass in order of execution (`calibrate_inputs`). Inputs of layers that a
  LayerNorm feeds are calibrated per channel and merged (`reparametrize`); then those layers' kernels get new
  ranges, while activations keep the ranges of the pass. LayerNorm, softmax, GELU and residual sums are in
  float.

  A layer without bias is given one in the collection `'quantization'`, which the hooks add.
  For data parallelism hand in a batch sharded over the mesh. A traceable function: for compilation ahead of
  time jit `lambda v, x: repq(model, v, x, rules)`.

  Args:
    model: any Linen module.
    variables: its float variables.
    batches: calibration inputs `[batch, ...]`, 32 images of the training set in QwT; several arrays are taken
      as one.
    rules: over kernels and inputs of layers and the hook points above, 2 to 8 bits, e.g. `edge_rules(4, 4)`.
      Bits may be traced.
    anatomy: the names of the model's parts; None: `models.anatomy(model)`. Not asked for with `pairs`.
    pairs: see `norm_dense_pairs`; `()` reparametrizes nothing. Nothing else than the layers paired with
      it may read a paired norm's output. None: the LayerNorms of the anatomy and their readers, but for the
      head.
    **kwargs: passed to the model, e.g. `train=False`; hashable.

  Returns:
    The network; its `float_variables` are the reparametrized ones, equal to `variables` as a function.

  Raises:
    ValueError: if there is no batch, the model's parts are not known, a rule or a pair names nothing, a rule
      asks for what is not done here, bits are outside 2 to 8, blocks are stacked (all before any work), or
      weights or calibration data are not finite.
  """
  check_model(model, variables)
  x = joined_batch(batches)
  if pairs is None:
    found = layer_norm_pairs(anatomy_of(model) if anatomy is None else anatomy, variables['params'])
  else:
    found = norm_dense_pairs(variables['params'], pairs)
  denses = [dense for _, dense in found]
  todo = operands.plan(model, variables, x, rules, 'repq', per_channel=denses, **kwargs)
  found = tuple(pair for pair in found if pair[1] in todo.input_bits)
  _check_shared_norms(found, todo)
  params, kernels = operands.quantize_kernels(variables['params'], todo.kernel_bits)
  first_pass = {**variables, 'params': params}
  inputs = calibrate_inputs(model, first_pass, x, todo, anatomy, **kwargs)
  operands.check_finite(inputs, kernels)

  floats = traverse_util.flatten_dict(dict(variables['params']), sep='/')
  biases = {}
  for norm, dense in found:
    constants = inputs[dense]
    new = _jitted_reparametrize(
      _below(variables['params'], norm),
      _below(variables['params'], dense),
      constants['scale'],
      constants['zero_point'],
      constants.pop('value'),
    )
    constants |= {'scale': new.scale, 'zero_point': new.zero_point}
    floats |= {f'{norm}/{name}': leaf for name, leaf in new.norm.items()}
    for name, leaf in new.dense.items():
      if f'{dense}/{name}' in floats:
        floats[f'{dense}/{name}'] = leaf
      else:
        biases[dense] = leaf
  float_params = traverse_util.unflatten_dict(floats, sep='/')
  params, kernels = operands.quantize_kernels(float_params, todo.kernel_bits)
  return Quantized.of(
    model,
    {**variables, 'params': params, COLLECTION: operands.collection(inputs, kernels, biases)},
    {**variables, 'params': float_params},
    operands.operand_hooks(),
    kwargs=kwargs,
    anatomy=anatomy,
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
