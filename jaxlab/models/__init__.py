"""Plain Linen networks over NHWC images, and the means to work around their named modules.

`create('resnet18')` makes a network by its timm name; `from_torch` and `to_torch` exchange weights with
PyTorch; `apply` runs a model under hooks on modules chosen by path.
"""

from jaxlab.models.architectures import create
from jaxlab.models.checkpoints import (
  abstract_variables,
  from_torch,
  load_pretrained,
  read_state_dict,
  to_torch,
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
  apply,
  capture,
  map_matching,
  module_paths,
)
from jaxlab.models.normalization import BatchNorm, batch_normalize
from jaxlab.models.position_embedding import resample_position_embedding
from jaxlab.models.resnet import BasicBlock, Bottleneck, ResNet
from jaxlab.models.siamese import Encoder, apply_in_turn, momentum_pass
from jaxlab.models.vit import ViT, stack_blocks, unstack_blocks

__all__ = [
  'BasicBlock',
  'BatchNorm',
  'Bottleneck',
  'DINOHead',
  'Encoder',
  'Hook',
  'HookPoint',
  'MLPHead',
  'ResNet',
  'Site',
  'ViT',
  'abstract_variables',
  'apply',
  'apply_in_turn',
  'barlow_projector',
  'batch_normalize',
  'byol_mlp',
  'capture',
  'create',
  'from_torch',
  'load_pretrained',
  'map_matching',
  'moco_projector',
  'module_paths',
  'momentum_pass',
  'read_state_dict',
  'resample_position_embedding',
  'simsiam_predictor',
  'simsiam_projector',
  'stack_blocks',
  'to_torch',
  'unstack_blocks',
]
