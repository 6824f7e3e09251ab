"""Plain Linen networks over NHWC images, and the means to work around their named modules.

`create('resnet18')` makes a network by its timm name; `from_torch` and `to_torch` exchange weights with
PyTorch; `apply` runs a model under hooks on modules chosen by path; `anatomy` says what a network's parts are
called.
"""

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
from jaxlab.models.checkpoints import (
  abstract_variables,
  from_torch,
  load_pretrained,
  read_state_dict,
  to_torch,
)
from jaxlab.models.classifier_heads import (
  Classifier,
  LearnableWeightScaling,
  Linear,
  NormedLinear,
  WeightNormHead,
  nearest_class_mean,
  tau_normalize,
)
from jaxlab.models.convolution import (
  conv_general_dilated,
  fast_convolutions,
)
from jaxlab.models.decoders import (
  from_config,
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
from jaxlab.models.llama import (
  Llama,
)
from jaxlab.models.mlp import (
  MLP,
)
from jaxlab.models.mobilenetv2 import (
  MobileNetV2,
)
from jaxlab.models.normalization import (
  BatchNorm,
  batch_normalize,
)
from jaxlab.models.position_embedding import (
  resample_position_embedding,
)
from jaxlab.models.resnet import (
  BasicBlock,
  Bottleneck,
  ResNet,
)
from jaxlab.models.rotary import (
  rotary_embedding,
)
from jaxlab.models.siamese import (
  Encoder,
  apply_in_turn,
  momentum_pass,
)
from jaxlab.models.swin import (
  Swin,
)
from jaxlab.models.vit import (
  ViT,
  stack_blocks,
  unstack_blocks,
)
from jaxlab.models.wide_resnet import (
  PreActivationBlock,
  WideResNet,
)

__all__ = [
  'GPT2',
  'MLP',
  'Anatomy',
  'BasicBlock',
  'BatchNorm',
  'Block',
  'Bottleneck',
  'Branch',
  'Classifier',
  'DINOHead',
  'Encoder',
  'Hook',
  'HookPoint',
  'LearnableWeightScaling',
  'Linear',
  'Llama',
  'MLPHead',
  'MobileNetV2',
  'Norm',
  'NormedLinear',
  'PreActivationBlock',
  'ResNet',
  'Site',
  'Swin',
  'ViT',
  'WeightNormHead',
  'WideResNet',
  'abstract_variables',
  'anatomy',
  'any_of',
  'apply',
  'apply_in_turn',
  'barlow_projector',
  'batch_normalize',
  'byol_mlp',
  'capture',
  'conv_general_dilated',
  'create',
  'eval_mode_hooks',
  'fast_convolutions',
  'from_config',
  'from_torch',
  'generate',
  'load_pretrained',
  'map_matching',
  'moco_projector',
  'module_paths',
  'momentum_pass',
  'nearest_class_mean',
  'read_state_dict',
  'resample_position_embedding',
  'rotary_embedding',
  'sample_token',
  'simsiam_predictor',
  'simsiam_projector',
  'stack_blocks',
  'tau_normalize',
  'to_torch',
  'unstack_blocks',
]
