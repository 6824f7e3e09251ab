"""Closed-form compensation of quantized networks: QwT, QwT-v2 and NBC through one block-by-block driver.

`compensate` does the whole for any network; the pieces (streaming statistics, solvers, maps) are functions of
arrays.
"""

from jaxlab.models.blockwise import Programs
from jaxlab.quantizers.compensation.bipolar import (
  BipolarCompensation,
  apply_nbc,
  blt,
  fit_nbc,
  inverse_blt,
)
from jaxlab.quantizers.compensation.bipolar_scales import select_nbc_scales
from jaxlab.quantizers.compensation.channel_affine import (
  ChannelAffine,
  ChannelAffineStats,
  apply_channel_affine,
  fit_channel_affine,
  init_channel_affine_stats,
  merge_channel_affine_stats,
  solve_channel_affine,
  update_channel_affine_stats,
)
from jaxlab.quantizers.compensation.conv import fit_conv_compensation, num_groups
from jaxlab.quantizers.compensation.cost import bipolar_cost, channel_affine_cost, linear_cost
from jaxlab.quantizers.compensation.driver import compensate
from jaxlab.quantizers.compensation.fold import fold_compensation
from jaxlab.quantizers.compensation.hook import compensation_hook
from jaxlab.quantizers.compensation.linear import (
  LinearCompensation,
  LinearStats,
  fit_linear_compensation,
  init_linear_stats,
  merge_linear_stats,
  solve_linear,
  update_linear_stats,
)
from jaxlab.quantizers.compensation.linear_apply import apply_linear_compensation
from jaxlab.quantizers.compensation.methods import NBC, Method, QwT, QwTv2
from jaxlab.quantizers.networks.quantized import Report

__all__ = [
  'NBC',
  'BipolarCompensation',
  'ChannelAffine',
  'ChannelAffineStats',
  'LinearCompensation',
  'LinearStats',
  'Method',
  'Programs',
  'QwT',
  'QwTv2',
  'Report',
  'apply_channel_affine',
  'apply_linear_compensation',
  'apply_nbc',
  'bipolar_cost',
  'blt',
  'channel_affine_cost',
  'compensate',
  'compensation_hook',
  'fit_channel_affine',
  'fit_conv_compensation',
  'fit_linear_compensation',
  'fit_nbc',
  'fold_compensation',
  'init_channel_affine_stats',
  'init_linear_stats',
  'inverse_blt',
  'linear_cost',
  'merge_channel_affine_stats',
  'merge_linear_stats',
  'num_groups',
  'select_nbc_scales',
  'solve_channel_affine',
  'solve_linear',
  'update_channel_affine_stats',
  'update_linear_stats',
]
