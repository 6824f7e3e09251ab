"""Quantizers: rounding and its gradients, affine quantizers, range estimates, bit policies, post-training.

A quantizer is a frozen dataclass of static choices plus a pytree of arrays, with free functions
`calibrate`, `quantize`, `dequantize`, `fake_quantize`.
"""

from jaxlab.quantizers.affine import (
  AffineParams,
  AffineQuantizer,
  affine_fake_quantize,
  calibrate,
  code_range,
  dequantize,
  fake_quantize,
  min_max,
  params_from_range,
  quantize,
)
from jaxlab.quantizers.policy import BitPolicy
from jaxlab.quantizers.post_training import (
  collect_ranges,
  fake_quantize_hooks,
  ptq,
  quantize_weights,
  range_hooks,
)
from jaxlab.quantizers.ranges import (
  Observer,
  averaged_min_max_observer,
  averaged_running_min_max_observer,
  gaussian_observer,
  min_max_observer,
  mse_range,
  mse_ternary_range,
  percentile_range,
  power_of_two_factor,
  quantile_observer,
  top_k_percentile_range,
)
from jaxlab.quantizers.rounding import clip_inclusive, round_straight_through

__all__ = [
  'AffineParams',
  'AffineQuantizer',
  'BitPolicy',
  'Observer',
  'affine_fake_quantize',
  'averaged_min_max_observer',
  'averaged_running_min_max_observer',
  'calibrate',
  'clip_inclusive',
  'code_range',
  'collect_ranges',
  'dequantize',
  'fake_quantize',
  'fake_quantize_hooks',
  'gaussian_observer',
  'min_max',
  'min_max_observer',
  'mse_range',
  'mse_ternary_range',
  'params_from_range',
  'percentile_range',
  'power_of_two_factor',
  'ptq',
  'quantile_observer',
  'quantize',
  'quantize_weights',
  'range_hooks',
  'round_straight_through',
  'top_k_percentile_range',
]
