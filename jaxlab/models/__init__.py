"""Plain Linen networks over NHWC images, and the means to work around their named modules.

`create('resnet18')` makes a network by its timm name; `from_torch` and `to_torch` exchange weights with
PyTorch; `apply` runs a model under hooks on modules chosen by path; `anatomy` says what a network's parts are
called.
"""

from jaxlab.models import masked_autoencoder
from jaxlab.models.alibi import (
  alibi_bias,
  alibi_slopes,
)
from jaxlab.models.anatomy import (
  anatomy,
)
from jaxlab.models.anatomy_parts import (
  Anatomy,
  Block,
  Branch,
  Norm,
)
from jaxlab.models.architectures import (
  create,
)
from jaxlab.models.bert import (
  Bert,
  mean_embedding,
)
from jaxlab.models.bilinear import (
  BilinearCNN,
  bilinear_pool,
  compact_bilinear,
  draw_sketches,
)
from jaxlab.models.block_outputs import (
  block_outputs,
)
from jaxlab.models.bloom import (
  Bloom,
)
from jaxlab.models.causal_attention import (
  cache_bytes,
)
from jaxlab.models.channels import make_divisible
from jaxlab.models.checkpoints import (
  abstract_variables,
  from_torch,
  load_pretrained,
  pretrained_repository,
  read_state_dict,
  to_torch,
)
from jaxlab.models.class_attention import (
  ClassAttention,
)
from jaxlab.models.classifier_heads import (
  AdaptedLinear,
  Classifier,
  LearnableWeightScaling,
  Linear,
  NormedLinear,
  WeightNormHead,
  nearest_class_mean,
  tau_normalize,
)
from jaxlab.models.cnn13 import (
  CNN13,
)
from jaxlab.models.configurations import (
  from_config,
  to_config,
)
from jaxlab.models.convnet import (
  ConvNet,
)
from jaxlab.models.convnext import (
  ConvNeXt,
)
from jaxlab.models.convolution import (
  conv_general_dilated,
  fast_convolutions,
)
from jaxlab.models.coordinate_head import (
  CoordinateHead,
  coordinates,
  merge_coordinates,
)
from jaxlab.models.densenet import (
  DenseNet,
)
from jaxlab.models.feature_maps import (
  MapClassifier,
  feature_map,
  feature_map_path,
)
from jaxlab.models.generation import (
  generate,
  sample_token,
)
from jaxlab.models.gpt2 import (
  GPT2,
)
from jaxlab.models.heads import (
  DINOHead,
  MLPHead,
  barlow_projector,
  byol_mlp,
  moco_projector,
  simsiam_predictor,
  simsiam_projector,
)
from jaxlab.models.intercept import (
  Hook,
  HookPoint,
  Site,
  any_of,
  apply,
  capture,
  eval_mode_hooks,
  map_matching,
  module_paths,
)
from jaxlab.models.lazy_checkpoints import (
  LazyStateDict,
  open_state_dict,
  save_state_dict,
)
from jaxlab.models.llama import (
  Llama,
)
from jaxlab.models.mlp import (
  MLP,
)
from jaxlab.models.mobilenetv2 import (
  EfficientNet,
  MobileNetV2,
)
from jaxlab.models.network_stages import (
  attach_stage,
  feature_width,
  last_stage,
  require_resolution,
  total_stride,
  truncate,
)
from jaxlab.models.normalization import (
  BatchNorm,
  batch_normalize,
)
from jaxlab.models.parameter_differences import (
  ChangeHistogram,
  ParameterChange,
  change_histogram,
  changes_by_module,
  delta_norms,
  is_bimodal,
  parameter_changes,
  parameter_distances,
  relative_change,
)
from jaxlab.models.parameter_surgery import (
  destroy_parameters,
  merge_parameters,
  remove_blocks,
  select_parameters,
  tuned_parameters,
  unselected,
  untied,
)
from jaxlab.models.pointnet import (
  PointNet,
  PointNetHead,
)
from jaxlab.models.position_embedding import (
  resample_position_embedding,
)
from jaxlab.models.pvt import (
  PVT,
)
from jaxlab.models.random_subspace import (
  NRSHead,
  NRSLayer,
  expand_subspaces,
  mlp_baseline,
  nrs_net,
  random_subspace_index,
  subspace_convolution,
)
from jaxlab.models.residual_attention import (
  CSRAMultiHead,
  class_attention,
  csra_head,
  csra_logits,
  csra_scores,
  csra_temperatures,
  max_residual,
)
from jaxlab.models.resnet import (
  BasicBlock,
  Bottleneck,
  ResNet,
)
from jaxlab.models.rotary import (
  RotaryScaling,
  rotary_embedding,
)
from jaxlab.models.second_order import (
  SecondOrderHead,
  covariance_pool,
  isqrt_cov,
  newton_schulz_sqrt,
  upper_triangle,
)
from jaxlab.models.shake_shake import (
  ShakeShake,
  ShakeShakeBlock,
  ShiftConvDownsample,
  shake,
)
from jaxlab.models.siamese import (
  Encoder,
  apply_in_turn,
)
from jaxlab.models.slimmable import (
  at_width,
  narrow,
  packed_axes,
  slice_params,
  width_floor,
)
from jaxlab.models.swin import (
  Swin,
)
from jaxlab.models.t2t import (
  T2TViT,
)
from jaxlab.models.tokenizers import (
  read_tokenizer,
  train_tokenizer,
)
from jaxlab.models.vgg import (
  VGG,
)
from jaxlab.models.vit import (
  ViT,
  stack_blocks,
  unstack_blocks,
)
from jaxlab.models.weight_pairs import (
  WeightPair,
  weight_pairs,
)
from jaxlab.models.wide_resnet import (
  PreActivationBlock,
  WideResNet,
)

__all__ = [
  'CNN13',
  'GPT2',
  'MLP',
  'PVT',
  'VGG',
  'AdaptedLinear',
  'Anatomy',
  'BasicBlock',
  'BatchNorm',
  'Bert',
  'BilinearCNN',
  'Block',
  'Bloom',
  'Bottleneck',
  'Branch',
  'CSRAMultiHead',
  'ChangeHistogram',
  'ClassAttention',
  'Classifier',
  'ConvNeXt',
  'ConvNet',
  'CoordinateHead',
  'DINOHead',
  'DenseNet',
  'EfficientNet',
  'Encoder',
  'Hook',
  'HookPoint',
  'LazyStateDict',
  'LearnableWeightScaling',
  'Linear',
  'Llama',
  'MLPHead',
  'MapClassifier',
  'MobileNetV2',
  'NRSHead',
  'NRSLayer',
  'Norm',
  'NormedLinear',
  'ParameterChange',
  'PointNet',
  'PointNetHead',
  'PreActivationBlock',
  'ResNet',
  'RotaryScaling',
  'SecondOrderHead',
  'ShakeShake',
  'ShakeShakeBlock',
  'ShiftConvDownsample',
  'Site',
  'Swin',
  'T2TViT',
  'ViT',
  'WeightNormHead',
  'WeightPair',
  'WideResNet',
  'abstract_variables',
  'alibi_bias',
  'alibi_slopes',
  'anatomy',
  'any_of',
  'apply',
  'apply_in_turn',
  'at_width',
  'attach_stage',
  'barlow_projector',
  'batch_normalize',
  'bilinear_pool',
  'block_outputs',
  'byol_mlp',
  'cache_bytes',
  'capture',
  'change_histogram',
  'changes_by_module',
  'class_attention',
  'compact_bilinear',
  'conv_general_dilated',
  'coordinates',
  'covariance_pool',
  'create',
  'csra_head',
  'csra_logits',
  'csra_scores',
  'csra_temperatures',
  'delta_norms',
  'destroy_parameters',
  'draw_sketches',
  'eval_mode_hooks',
  'expand_subspaces',
  'fast_convolutions',
  'feature_map',
  'feature_map_path',
  'feature_width',
  'from_config',
  'from_torch',
  'generate',
  'is_bimodal',
  'isqrt_cov',
  'last_stage',
  'load_pretrained',
  'make_divisible',
  'map_matching',
  'masked_autoencoder',
  'max_residual',
  'mean_embedding',
  'merge_coordinates',
  'merge_parameters',
  'mlp_baseline',
  'moco_projector',
  'module_paths',
  'narrow',
  'nearest_class_mean',
  'newton_schulz_sqrt',
  'nrs_net',
  'open_state_dict',
  'packed_axes',
  'parameter_changes',
  'parameter_distances',
  'pretrained_repository',
  'random_subspace_index',
  'read_state_dict',
  'read_tokenizer',
  'relative_change',
  'remove_blocks',
  'require_resolution',
  'resample_position_embedding',
  'rotary_embedding',
  'sample_token',
  'save_state_dict',
  'select_parameters',
  'shake',
  'simsiam_predictor',
  'simsiam_projector',
  'slice_params',
  'stack_blocks',
  'subspace_convolution',
  'tau_normalize',
  'to_config',
  'to_torch',
  'total_stride',
  'train_tokenizer',
  'truncate',
  'tuned_parameters',
  'unselected',
  'unstack_blocks',
  'untied',
  'upper_triangle',
  'weight_pairs',
  'width_floor',
]
