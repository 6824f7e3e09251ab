"""Quantizers: rounding and its gradients, learned and logarithmic ones, whole networks, integers.

A quantizer is a frozen dataclass of static choices plus a pytree of arrays, with free functions
`calibrate`, `quantize`, `dequantize`, `fake_quantize`; one without static choices is free functions alone. A
network is quantized by rules over its modules (`Rule`); every method (`ptq`, `percentile_ptq`, `repq`,
`gptq_ptq`, `lsq`) returns a `Quantized` network, to which `compensation` gives back a part of what it lost,
and of which `integer_network` makes integers.
"""

from jaxlab.quantizers import compensation
from jaxlab.quantizers.networks.absmax import absmax_ptq, largest_magnitudes
from jaxlab.quantizers.networks.activation_qat import (
  activation_qat,
  activation_rules,
  weight_only_ptq,
)
from jaxlab.quantizers.networks.execution import (
  export_network,
  integer_hooks,
  integer_network,
  load_integer_network,
  save_integer_network,
)
from jaxlab.quantizers.networks.float8 import (
  PROBES,
  float8_hooks,
  init_float8,
  merge_probes,
  split_probes,
)
from jaxlab.quantizers.networks.folding import (
  fold_batch_norm,
  fold_batch_norms,
)
from jaxlab.quantizers.networks.gptq import (
  gptq_array,
  gptq_ptq,
)
from jaxlab.quantizers.networks.input_ranges import (
  recalibration_hook,
)
from jaxlab.quantizers.networks.kernels import quantize_kernels
from jaxlab.quantizers.networks.layers import Layer, find_layers
from jaxlab.quantizers.networks.lsq import lsq, weight_only_lsq
from jaxlab.quantizers.networks.norm_readers import norm_dense_pairs
from jaxlab.quantizers.networks.operands import (
  MAX_BITS,
  MIN_BITS,
  operand_hooks,
)
from jaxlab.quantizers.networks.percentile import (
  percentile_ptq,
)
from jaxlab.quantizers.networks.post_training import (
  collect_ranges,
  fake_quantize_hooks,
  ptq,
  range_hooks,
)
from jaxlab.quantizers.networks.quantized import Quantized
from jaxlab.quantizers.networks.range_qat import range_qat
from jaxlab.quantizers.networks.repq import (
  reparametrize,
  repq,
)
from jaxlab.quantizers.networks.rules import (
  EDGES,
  Rule,
  edge_rules,
  parse_bits,
  uniform_rules,
)
from jaxlab.quantizers.networks.smoothing import smooth_norms
from jaxlab.quantizers.networks.storage import (
  load_quantized,
  restore,
  save_quantized,
  size_in_bytes,
)
from jaxlab.quantizers.networks.weights import quantize_weights
from jaxlab.quantizers.numerics.activation_steps import (
  activation_fake_quantize,
  step_of_percentiles,
  step_of_range,
)
from jaxlab.quantizers.numerics.affine import (
  AffineParams,
  AffineQuantizer,
  affine_fake_quantize,
  calibrate,
  dequantize,
  fake_quantize,
  min_max,
  params_from_range,
  quantize,
)
from jaxlab.quantizers.numerics.bit_widths import code_range
from jaxlab.quantizers.numerics.float8 import (
  DelayedScale,
  Float8Scales,
  cast_saturating,
  float8_dot,
  float8_fake_quantize,
  float8_round,
  init_delayed_scale,
  update_delayed_scale,
)
from jaxlab.quantizers.numerics.gptq import (
  GPTQKernel,
  GPTQResult,
  dequantize_groups,
  gptq_kernel,
)
from jaxlab.quantizers.numerics.hessians import (
  HessianState,
  accumulate_hessian,
  init_hessian,
  output_error,
  unfold,
)
from jaxlab.quantizers.numerics.integers import (
  as_qarray,
  grouped_integer_dot,
  integer_conv,
  integer_dot,
  pack_int4,
  unpack_int4,
)
from jaxlab.quantizers.numerics.learned import (
  dorefa_activations,
  dorefa_mean_weights,
  dorefa_scaled_activations,
  dorefa_weights,
  lsq_fake_quantize,
  lsq_plus_fake_quantize,
  lsq_scale,
  pact_fake_quantize,
  pact_penalty,
  scale_gradient,
)
from jaxlab.quantizers.numerics.logarithmic import (
  log2_dequantize,
  log2_fake_quantize,
  log2_quantize,
  log_sqrt2_dequantize,
  log_sqrt2_fake_quantize,
  log_sqrt2_quantize,
  log_sqrt2_scale,
)
from jaxlab.quantizers.numerics.quantiles import (
  select_quantiles,
)
from jaxlab.quantizers.numerics.range_uniform import (
  Range,
  activation_range,
  feature_scale,
  output_scale,
  quantize_feature,
  range_quantize,
  weight_range,
)
from jaxlab.quantizers.numerics.ranges import (
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
from jaxlab.quantizers.numerics.requantization import (
  FixedPoint,
  fixed_point_constants,
  flip_negative_channels,
  fold_channel_affine,
  requantize,
  requantize_constants,
  requantize_fixed_point,
)
from jaxlab.quantizers.numerics.rounding import (
  clip_inclusive,
  round_straight_through,
)
from jaxlab.quantizers.numerics.storage import (
  QuantizedArray,
  store,
)

__all__ = [
  'EDGES',
  'MAX_BITS',
  'MIN_BITS',
  'PROBES',
  'AffineParams',
  'AffineQuantizer',
  'DelayedScale',
  'FixedPoint',
  'Float8Scales',
  'GPTQKernel',
  'GPTQResult',
  'HessianState',
  'Layer',
  'Observer',
  'Quantized',
  'QuantizedArray',
  'Range',
  'Rule',
  'absmax_ptq',
  'accumulate_hessian',
  'activation_fake_quantize',
  'activation_qat',
  'activation_range',
  'activation_rules',
  'affine_fake_quantize',
  'as_qarray',
  'averaged_min_max_observer',
  'averaged_running_min_max_observer',
  'calibrate',
  'cast_saturating',
  'clip_inclusive',
  'code_range',
  'collect_ranges',
  'compensation',
  'dequantize',
  'dequantize_groups',
  'dorefa_activations',
  'dorefa_mean_weights',
  'dorefa_scaled_activations',
  'dorefa_weights',
  'edge_rules',
  'export_network',
  'fake_quantize',
  'fake_quantize_hooks',
  'feature_scale',
  'find_layers',
  'fixed_point_constants',
  'flip_negative_channels',
  'float8_dot',
  'float8_fake_quantize',
  'float8_hooks',
  'float8_round',
  'fold_batch_norm',
  'fold_batch_norms',
  'fold_channel_affine',
  'gaussian_observer',
  'gptq_array',
  'gptq_kernel',
  'gptq_ptq',
  'grouped_integer_dot',
  'init_delayed_scale',
  'init_float8',
  'init_hessian',
  'integer_conv',
  'integer_dot',
  'integer_hooks',
  'integer_network',
  'largest_magnitudes',
  'load_integer_network',
  'load_quantized',
  'log2_dequantize',
  'log2_fake_quantize',
  'log2_quantize',
  'log_sqrt2_dequantize',
  'log_sqrt2_fake_quantize',
  'log_sqrt2_quantize',
  'log_sqrt2_scale',
  'lsq',
  'lsq_fake_quantize',
  'lsq_plus_fake_quantize',
  'lsq_scale',
  'merge_probes',
  'min_max',
  'min_max_observer',
  'mse_range',
  'mse_ternary_range',
  'norm_dense_pairs',
  'operand_hooks',
  'output_error',
  'output_scale',
  'pack_int4',
  'pact_fake_quantize',
  'pact_penalty',
  'params_from_range',
  'parse_bits',
  'percentile_ptq',
  'percentile_range',
  'power_of_two_factor',
  'ptq',
  'quantile_observer',
  'quantize',
  'quantize_feature',
  'quantize_kernels',
  'quantize_weights',
  'range_hooks',
  'range_qat',
  'range_quantize',
  'recalibration_hook',
  'reparametrize',
  'repq',
  'requantize',
  'requantize_constants',
  'requantize_fixed_point',
  'restore',
  'round_straight_through',
  'save_integer_network',
  'save_quantized',
  'scale_gradient',
  'select_quantiles',
  'size_in_bytes',
  'smooth_norms',
  'split_probes',
  'step_of_percentiles',
  'step_of_range',
  'store',
  'top_k_percentile_range',
  'unfold',
  'uniform_rules',
  'unpack_int4',
  'update_delayed_scale',
  'weight_only_lsq',
  'weight_only_ptq',
  'weight_range',
]
