"""QwT-v2 at no cost: scale and shift of a layer's output, folded into the layer's own constants."""

import dataclasses

from flax import traverse_util

from jaxlab.quantizers.compensation.hook import COLLECTION
from jaxlab.quantizers.networks import operands
from jaxlab.quantizers.networks.quantized import Quantized, check_quantized


def fold_compensation(compensated: Quantized) -> Quantized:
  """Returns the network of which every `gamma y + beta` behind a layer is a part of the layer.

  `kernel <- gamma kernel`, its scale likewise (so that the integer codes stay what they are, also for a
  negative gamma), `bias <- gamma bias + beta`: QwT-v2, arXiv 2505.20932. Outputs are those of the compensated
  network but for the rounding of float products; in integers the accumulators are the same, and only the
  constants behind them change.

  Args:
    compensated: a network with quantized kernels, compensated by `QwTv2` at layers.

  Returns:
    The network without the collection `'compensation'`. Its float network is that of the folded kernels: the
    one before has no such compensation to fold.

  Raises:
    ValueError: for what is no `Quantized` of `compensate`, or if a compensation is not one of scale and shift
      behind a layer with a kernel.
  """
  check_quantized(compensated, 'fold_compensation')
  if COLLECTION not in compensated.variables:
    raise ValueError(
      'The network has no compensation: fold_compensation takes what compensate returns.'
    )
  variables, hooks = compensated.unbind()
  flat = traverse_util.flatten_dict(dict(variables.pop(COLLECTION)), sep='/')
  params = traverse_util.flatten_dict(dict(variables['params']), sep='/')
  constants = traverse_util.flatten_dict(dict(variables[operands.COLLECTION]), sep='/')
  for path in dict.fromkeys(name.rpartition('/')[0] for name in flat):
    own = {name: flat.get(f'{path}/{name}') for name in ('gamma', 'beta')}
    kernel = f'{path}/kernel'
    if None in own.values() or kernel not in params or f'{kernel}/scale' not in constants:
      raise ValueError(
        f'The compensation of {path!r} cannot be folded: it takes a scale and a shift (QwTv2 with '
        f"granularity 'linear' or 'branch') behind a layer with a quantized kernel."
      )
    gamma, beta = own['gamma'], own['beta']
    layer = compensated.layers.get(path)
    # The outputs of ConvTranspose(transpose_kernel=True) are the second last axis.
    factor = gamma[:, None] if layer is not None and layer.channels == (-2,) else gamma
    params[kernel] = (params[kernel] * factor).astype(params[kernel].dtype)
    constants[f'{kernel}/scale'] = constants[f'{kernel}/scale'] * factor
    bias = f'{path}/bias'
    biases = params if bias in params else constants
    old = biases.get(bias)
    biases[bias] = beta if old is None else (gamma * old + beta).astype(old.dtype)
  variables['params'] = traverse_util.unflatten_dict(params, sep='/')
  variables[operands.COLLECTION] = traverse_util.unflatten_dict(constants, sep='/')
  return dataclasses.replace(
    compensated, variables=variables, exact={}, hooks=hooks[:-1], report=None
  )
