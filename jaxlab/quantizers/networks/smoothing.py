"""SmoothQuant: the outliers of activations are moved into the weights that read them, before quantization."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from jaxlab.models.anatomy import anatomy as anatomy_of
from jaxlab.models.anatomy_parts import Anatomy
from jaxlab.quantizers.networks.absmax import largest_magnitudes
from jaxlab.quantizers.networks.batches import as_call, peek
from jaxlab.quantizers.networks.layers import check_unstacked, find_layers
from jaxlab.quantizers.networks.norm_readers import (
  Pairs,
  all_readers,
  check_function,
  layer_norm_pairs,
  norm_dense_pairs,
)
from jaxlab.quantizers.networks.quantized import check_model
from jaxlab.tracing import is_concrete

Array = jax.Array
PyTree = Any

FLOOR = 1e-5  # of the factors, and of the weights' magnitudes


def smooth_norms(
  model: nn.Module,
  variables: Mapping[str, PyTree],
  batches: Array | Iterable[Array],
  *,
  alpha: float = 0.5,
  anatomy: Anatomy | None = None,
  pairs: Pairs | None = None,
  **kwargs: Any,
) -> dict[str, PyTree]:
  """Returns variables of the same function, whose norms hand on activations without outlying channels.

    s_c = max |x_c|^alpha / max |w_c|^(1 - alpha)

  for each channel c between a norm and the layers that read it, `x_c` over all batches, `w_c` over the rows
  of all readers' kernels. The norm's scale (and bias) is divided by `s_c`, the readers' rows are multiplied
  by it: nothing is added to the network, and any method goes on from here:

    smooth = smooth_norms(model, variables, batches)
    network = absmax_ptq(model, smooth, batches, rules)

  Magnitudes of weights and factors are at least 1e-5. The network is run before and after on the first batch
  (unless it is traced): it has to stay the same.

  Args:
    model: any Linen module.
    variables: its float variables.
    batches: calibration inputs `[batch, ...]`, seen one after another.
    alpha: in [0, 1], how much of the difference between channels is moved into the weights.
    anatomy: the names of the model's parts; None: `models.anatomy(model)`. Not asked for with `pairs`.
    pairs: (norm, layer) as regular expressions of paths below a common parent, see `norm_dense_pairs`; norms
      need no bias. Other layers that read a paired norm join it. None: the norms of the anatomy and their
      readers, but for the head.
    **kwargs: passed to the model, e.g. `train=False`.

  Raises:
    ValueError: if alpha is out of range, there is no batch, the model has no such norm or its parts are not
      known, a pair names nothing, blocks are stacked, what reads a norm cannot absorb its scale (all before
      any work), weights or calibration data are not finite, or the rescaled network is another function:
      something else reads a norm.

  References:
    Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models,
    ICML 2023 (https://arxiv.org/abs/2211.10438), equation 4, with the floors of its code.
  """
  check_model(model, variables)
  if not 0 <= alpha <= 1:
    raise ValueError(f'alpha must lie in [0, 1], got {alpha}.')
  first, batches = peek(batches)
  params = variables['params']
  if pairs is None:
    parts = anatomy_of(model) if anatomy is None else anatomy
    found = layer_norm_pairs(parts, params, shifted=False)
  else:
    found = norm_dense_pairs(params, pairs, shifted=False)
  if not found:
    raise ValueError(
      f'{type(model).__name__} has no norm that layers alone read: there is nothing to smooth. Name some by '
      f'pairs=[(norm, layer)].'
    )
  call = as_call(first, kwargs)
  readers = all_readers(model, variables, call, found)
  layers = find_layers(model, variables, *call[0], **call[1])
  check_unstacked({layer: layers[layer] for _, layer in readers.pairs}, 'smooth_norms')
  norms = dict.fromkeys(norm for norm, _ in readers.pairs)
  seen = largest_magnitudes(model, variables, batches, (), norms, by_channel=True, **kwargs)
  flat = traverse_util.flatten_dict(dict(params), sep='/')
  rows: dict[str, Array] = {}
  for norm, layer in readers.pairs:
    own = _row_magnitudes(flat[f'{layer}/kernel'])
    rows[norm] = jnp.maximum(rows[norm], own) if norm in rows else own
  factors = {norm: _factors(seen[f'{norm}/output'], rows[norm], alpha) for norm in norms}
  for norm, factor in factors.items():
    if is_concrete(factor) and not np.all(np.isfinite(factor)):
      raise ValueError(
        f'What {norm!r} returns is not finite, or a kernel behind it: are the weights and the calibration '
        f'batches free of NaN and infinity?'
      )

  def rescaled(norms: Iterable[str]) -> tuple[PyTree, dict[str, Array]]:
    new = dict(flat)
    for norm in norms:
      for name in ('scale', 'bias'):
        if (path := f'{norm}/{name}') in flat:
          new[path] = (flat[path] / factors[norm]).astype(flat[path].dtype)
    for norm, layer in readers.pairs:
      if norm in norms:
        kernel = flat[path := f'{layer}/kernel']
        each = factors[norm].reshape(-1, *(1,) * (kernel.ndim - 1))
        new[path] = (kernel * each).astype(kernel.dtype)
    return traverse_util.unflatten_dict(new, sep='/'), {}

  check_function(model, variables, call, rescaled, norms)
  return {**variables, 'params': rescaled(norms)[0]}


def _row_magnitudes(kernel: Array) -> Array:
  """Returns `max |w_c|` of each input channel of a kernel `[channels, ...]`."""
  size = jnp.abs(kernel).astype(jnp.promote_types(kernel.dtype, jnp.float32))
  return jnp.max(size.reshape(len(kernel), -1), 1)


def _factors(activations: Array, weights: Array, alpha: float) -> Array:
  weights = jnp.maximum(weights, FLOOR)
  return jnp.maximum(activations**alpha / weights ** (1 - alpha), FLOOR)
