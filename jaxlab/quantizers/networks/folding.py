"""Batch-norm folding: a convolution or linear map followed by batch norm, as one with a bias.

For evaluation and integer inference, where the statistics are constants: the integer kernel then carries the
norm's scale, and the bias goes into the requantization.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.models.intercept import any_of, raise_unmatched
from jaxlab.quantizers.networks.layers import Layer

Array = jax.Array
PyTree = Any


def fold_batch_norm(
  kernel: Array,
  bias: Array | None,
  scale: Array | None,
  offset: Array | None,
  mean: Array,
  var: Array,
  epsilon: float = 1e-5,
  axis: int = -1,
) -> tuple[Array, Array]:
  """Returns `(kernel k, offset + (bias - mean) k)` with `k = scale / sqrt(var + epsilon)`.

  A convolution or linear map with the result does what the original does with the norm behind it.

  Args:
    kernel: `[..., in, out]`, Flax layout; any number of groups.
    bias: `[out]`, or None for 0.
    scale: the norm's `[out]`, or None for 1.
    offset: the norm's bias `[out]`, or None for 0.
    mean: running mean `[out]`.
    var: running variance `[out]`, as it is used in evaluation.
    epsilon: the norm's own.
    axis: of the kernel's outputs; -2 of `ConvTranspose(transpose_kernel=True)`.

  Returns:
    `(kernel, bias)`, computed in at least float32, in the dtype of `kernel`.

  Raises:
    ValueError: if a vector does not have the kernel's output channels.
  """
  out = kernel.shape[axis]
  vectors = {'bias': bias, 'scale': scale, 'offset': offset, 'mean': mean, 'var': var}
  for name, vector in vectors.items():
    if vector is not None and vector.shape != (out,):
      raise ValueError(
        f'{name} of shape {vector.shape} does not fit a kernel {kernel.shape} with {out} output channels.'
      )
  wide = jnp.promote_types(jnp.result_type(kernel, mean, var), jnp.float32)
  factor = (1 if scale is None else scale.astype(wide)) / jnp.sqrt(var.astype(wide) + epsilon)
  shifted = (0 if bias is None else bias.astype(wide)) - mean.astype(wide)
  new_bias = (0 if offset is None else offset.astype(wide)) + shifted * factor
  each = factor.reshape([out if i == axis % kernel.ndim else 1 for i in range(kernel.ndim)])
  return (kernel.astype(wide) * each).astype(kernel.dtype), new_bias.astype(kernel.dtype)


def fold_batch_norms(
  params: PyTree,
  batch_stats: PyTree,
  pairs: Anatomy | Sequence[tuple[str, str]],
  *,
  epsilon: float = 1e-5,
  layers: Mapping[str, Layer] | None = None,
) -> tuple[PyTree, PyTree]:
  """Folds the batch norms of a model; returns `(params, batch_stats)` of the same trees.

  The model and its module tree stay: a folded norm becomes `y = x + bias`, with scale 1, mean 0 and
  variance `1 - epsilon`, so that it divides by `sqrt(1)`. The new bias is the convolution's own where it has
  one, else the norm's (where that has none, minus the mean). The output in evaluation is that of the
  original to rounding; to train the result makes no sense.

  Args:
    params: the model's parameters.
    batch_stats: its running statistics.
    pairs: `models.anatomy(model)`: every batch norm that directly follows a layer is folded into it. Or
      `(pattern, template)`: modules with a `kernel` whose whole path matches the pattern are folded with
      the norm at the path that the template expands to (`re.Match.expand`). Other norms are left as they
      are.
    epsilon: of the model's batch norms.
    layers: `find_layers(model, variables, inputs)`, which know the outputs of kernels. None: they are the
      axis that an `Anatomy` tells, or that has as many channels as the norm.

  Raises:
    ValueError: if a pattern matches no kernel, a norm does not exist or is taken twice, the channels differ,
      or the outputs of a kernel with as many inputs cannot be told (a transposed convolution may have them on
      either axis).
  """
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  stats = traverse_util.flatten_dict(dict(batch_stats), sep='/')
  told = {}
  if isinstance(pairs, Anatomy):
    told = {norm.layer: norm.axis for norm in pairs.norms}
    normalized = [n for n in pairs.norms if n.layer is not None and f'{n.path}/mean' in stats]
    pairs = [(any_of([norm.layer]), norm.path) for norm in normalized]
  for path, norm in norm_of_kernels(flat, stats, pairs).items():
    kernel, bias = fold_batch_norm(
      flat[f'{path}/kernel'],
      flat.get(f'{path}/bias'),
      flat.get(f'{norm}/scale'),
      flat.get(f'{norm}/bias'),
      stats[f'{norm}/mean'],
      stats[f'{norm}/var'],
      epsilon,
      _output_axis(
        path, flat[f'{path}/kernel'].shape, stats[f'{norm}/mean'].size, layers, told.get(path)
      ),
    )
    flat[f'{path}/kernel'] = kernel
    new = {'scale': jnp.ones_like(bias), 'bias': jnp.zeros_like(bias)}
    mean = jnp.zeros_like(stats[f'{norm}/mean'])
    if f'{path}/bias' in flat:
      flat[f'{path}/bias'] = bias
    elif f'{norm}/bias' in flat:
      new['bias'] = bias
    else:
      mean = -bias.astype(mean.dtype)
    for name, value in new.items():
      if f'{norm}/{name}' in flat:
        flat[f'{norm}/{name}'] = value.astype(flat[f'{norm}/{name}'].dtype)
    stats[f'{norm}/mean'] = mean
    stats[f'{norm}/var'] = jnp.full_like(stats[f'{norm}/var'], 1 - epsilon)
  return (
    traverse_util.unflatten_dict(flat, sep='/'),
    traverse_util.unflatten_dict(stats, sep='/'),
  )


def _output_axis(
  path: str,
  shape: tuple[int, ...],
  channels: int,
  layers: Mapping[str, Layer] | None,
  told: int | None,
) -> int:
  """Returns the axis of a kernel's outputs, -1 or -2."""
  if layers is not None and path in layers:
    known = layers[path].channels
    if known not in ((-1,), (-2,)):
      raise ValueError(
        f'{path!r} ({layers[path].name}) has outputs on the axes {known} of its kernel {tuple(shape)}: a '
        f'norm cannot be folded into it.'
      )
    return known[0]
  if told is not None or len(shape) < 3 or shape[-2] != channels:
    return -1 if told is None else told
  if shape[-1] != channels:
    return -2
  raise ValueError(
    f'{path!r} has as many inputs as outputs, and its kernel {tuple(shape)} does not tell which axis is '
    f'which: those of ConvTranspose(transpose_kernel=True) are the other way round. Hand in '
    f'layers=find_layers(model, variables, inputs), or an Anatomy with Norm(..., axis=-1).'
  )


def norm_of_kernels(
  params: Mapping[str, Array], stats: Mapping[str, Array], pairs: Sequence[tuple[str, str]]
) -> dict[str, str]:
  """Returns the path of the norm for the path of each kernel's module that `pairs` names.

  Args:
    params: flat parameters, `layer1_0/conv1/kernel`.
    stats: flat statistics, `layer1_0/bn1/mean`.
    pairs: see `fold_batch_norms`.

  Raises:
    ValueError: see `fold_batch_norms`.
  """
  owners = [
    path.rpartition('/')[0] for path in params if path.endswith('/kernel') or path == 'kernel'
  ]
  found: dict[str, str] = {}
  for pattern, template in pairs:
    matches = [(owner, match) for owner in owners if (match := re.fullmatch(pattern, owner))]
    if not matches:
      raise_unmatched([pattern], owners, 'convolution pattern', 'module')
    for owner, match in matches:
      norm = match.expand(template)
      if f'{norm}/mean' not in stats or f'{norm}/var' not in stats:
        raise ValueError(
          f'{owner!r} would be folded with {norm!r}, which has no running statistics; narrow the '
          f'pattern {pattern!r} or correct the template {template!r}.'
        )
      if norm in found.values() and found.get(owner) != norm:
        raise ValueError(f'The norm {norm!r} would be folded into {owner!r} and another module.')
      found[owner] = norm
  return found
