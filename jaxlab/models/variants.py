"""The networks of fixed names, as fields of their modules, and timm's default weights."""

import itertools
import re
from typing import Any

from flax import linen as nn

from jaxlab.models.bilinear import BilinearCNN
from jaxlab.models.cnn13 import CNN13
from jaxlab.models.convnet import ConvNet
from jaxlab.models.convnext import ConvNeXt
from jaxlab.models.densenet import DenseNet
from jaxlab.models.initializers import kaiming_normal_fan_in
from jaxlab.models.mlp import MLP
from jaxlab.models.mobilenetv2 import EfficientNet, MobileNetV2, scaled_fields
from jaxlab.models.pvt import PVT
from jaxlab.models.resnet import ResNet
from jaxlab.models.shake_shake import ShakeShake
from jaxlab.models.t2t import T2TViT
from jaxlab.models.vgg import VGG
from jaxlab.models.wide_resnet import WideResNet

Variant = tuple[type[nn.Module], dict[str, Any]]

# Depths of He et al. 2016, table 1.
_RESNETS = {
  18: {'stage_sizes': (2, 2, 2, 2), 'block': 'basic'},
  34: {'stage_sizes': (3, 4, 6, 3), 'block': 'basic'},
  50: {'stage_sizes': (3, 4, 6, 3), 'block': 'bottleneck'},
  101: {'stage_sizes': (3, 4, 23, 3), 'block': 'bottleneck'},
  152: {'stage_sizes': (3, 8, 36, 3), 'block': 'bottleneck'},
}
# Only with the stem and the shortcuts of He et al. 2019.
_DEEP_RESNETS = {
  26: {'stage_sizes': (2, 2, 2, 2), 'block': 'bottleneck'},
  200: {'stage_sizes': (3, 24, 36, 3), 'block': 'bottleneck'},
}
# Cardinality and base width of Xie et al. 2017 and torchvision, by name.
_RESNEXTS = {
  'resnext50_32x4d': (50, 32, 4),
  'resnext101_32x4d': (101, 32, 4),
  'resnext101_32x8d': (101, 32, 8),
}
_CIFAR = {
  'strides': (1, 2, 2),
  'width': 16,
  'stem': 'cifar',
  'shortcut': 'pad',
  'conv_init': kaiming_normal_fan_in,
  'fc_init': kaiming_normal_fan_in,
  'num_classes': 10,
}

# Arguments of `scaled_fields`: timm's width multipliers of MobileNetV2, its `d` networks also deeper;
# Tan & Le 2019's of EfficientNet.
_MOBILENETS = {
  '035': (0.35,),
  '050': (0.5,),
  '075': (0.75,),
  '100': (1.0,),
  '110d': (1.1, 1.2, True),
  '120d': (1.2, 1.4, True),
  '140': (1.4,),
}
_EFFICIENTNETS = (
  *((1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8)),
  *((1.6, 2.2), (1.8, 2.6), (2.0, 3.1), (2.2, 3.6)),
)
_LITE = {'activation': 'relu6', 'squeeze': None}
_TENSORFLOW = {'padding': 'SAME', 'epsilon': 1e-3}


def _resnets() -> dict[str, Variant]:
  table = {f'resnet{depth}': fields for depth, fields in _RESNETS.items()}
  for depth in (50, 101, 152):
    table[f'resnet{depth}c'] = {**_RESNETS[depth], 'stem': 'deep'}
  for depth, fields in sorted((_RESNETS | _DEEP_RESNETS).items()):
    table[f'resnet{depth}d'] = {**fields, 'stem': 'deep', 'shortcut': 'average'}
  for depth in (50, 101):  # Zagoruyko & Komodakis 2016
    table[f'wide_resnet{depth}_2'] = {**_RESNETS[depth], 'base_width': 128}
  for name, (depth, cardinality, base_width) in _RESNEXTS.items():
    table[name] = {**_RESNETS[depth], 'cardinality': cardinality, 'base_width': base_width}
  table = {name: {**fields, 'num_classes': 1000} for name, fields in table.items()}
  for depth in (18, 34, 50):
    table[f'cifar_resnet{depth}'] = {**_RESNETS[depth], 'stem': 'cifar', 'num_classes': 10}
  for depth in (20, 32, 56, 110):  # 6 n + 2 with three stages of n blocks
    table[f'cifar_resnet{depth}'] = {'stage_sizes': ((depth - 2) // 6,) * 3, **_CIFAR}
  return {name: (ResNet, fields) for name, fields in table.items()}


def _mobilenets() -> dict[str, Variant]:
  table = {
    f'mobilenetv2_{size}': (MobileNetV2, scaled_fields(MobileNetV2, *arguments))
    for size, arguments in _MOBILENETS.items()
  }
  for index, (width, depth) in enumerate(_EFFICIENTNETS):
    table[f'efficientnet_b{index}'] = EfficientNet, scaled_fields(EfficientNet, width, depth)
  for index, (width, depth) in enumerate(_EFFICIENTNETS[:5]):
    fields = scaled_fields(EfficientNet, width, depth, fixed_ends=True)
    table[f'efficientnet_lite{index}'] = EfficientNet, {**fields, **_LITE}
  for name, (kind, fields) in list(table.items()):
    if kind is EfficientNet:
      table[f'tf_{name}'] = kind, {**fields, **_TENSORFLOW}
  return {name: (kind, {**fields, 'num_classes': 1000}) for name, (kind, fields) in table.items()}


def expand(names: str) -> list[str]:
  """Returns all names with one choice of each pair of braces, as a shell does.

  >>> expand('vit_{tiny,base}_{,reg4_}dinov2')
  ['vit_tiny_dinov2', 'vit_tiny_reg4_dinov2', 'vit_base_dinov2', 'vit_base_reg4_dinov2']
  """
  parts = re.split(r'\{(.*?)\}', names)
  choices = [part.split(',') if index % 2 else [part] for index, part in enumerate(parts)]
  return [''.join(chosen) for chosen in itertools.product(*choices)]


# Liu et al. 2022, section 2.2; Huang et al. 2017, table 1; Simonyan & Zisserman 2015, table 1.
_CONVNEXTS = {
  'tiny': ((3, 3, 9, 3), 96),
  'small': ((3, 3, 27, 3), 96),
  'base': ((3, 3, 27, 3), 128),
  'large': ((3, 3, 27, 3), 192),
  'xlarge': ((3, 3, 27, 3), 256),
}
_DENSENETS = {
  '121': {'block_sizes': (6, 12, 24, 16)},
  '161': {'block_sizes': (6, 12, 36, 24), 'growth': 48, 'stem_width': 96},
  '169': {'block_sizes': (6, 12, 32, 32)},
  '201': {'block_sizes': (6, 12, 48, 32)},
}
_VGGS = {
  '11': (1, 1, 2, 2, 2),
  '13': (2, 2, 2, 2, 2),
  '16': (2, 2, 3, 3, 3),
  '19': (2, 2, 4, 4, 4),
}


def _convnets() -> dict[str, Variant]:
  table = {}
  for size, (depths, width) in _CONVNEXTS.items():
    widths = tuple(width * 2**stage for stage in range(4))
    table[f'convnext_{size}'] = ConvNeXt, {'depths': depths, 'widths': widths}
  for depth, fields in _DENSENETS.items():
    table[f'densenet{depth}'] = DenseNet, fields
  for depth, sizes in _VGGS.items():
    table[f'vgg{depth}'] = VGG, {'stage_sizes': sizes}
    table[f'vgg{depth}_bn'] = VGG, {'stage_sizes': sizes, 'batch_norm': True}
    table[f'bcnn_vgg{depth}'] = BilinearCNN, {'stage_sizes': sizes}
  table = {name: (kind, {**fields, 'num_classes': 1000}) for name, (kind, fields) in table.items()}
  return table | _agenets()


def _agenets() -> dict[str, Variant]:
  """Returns ThinAgeNet and TinyAgeNet (Gao et al. 2020): a VGG-16 of a half and a quarter of the channels.

  Hybrid pooling, the last 2x2 maxima and the mean over what is left, is in place of the hidden layers. Their
  outputs are ages 0 to 100.
  """
  table = {}
  for name, width in (('thin', 32), ('tiny', 16)):
    fields = {'stage_sizes': _VGGS['16'], 'widths': tuple(width * k for k in (1, 2, 4, 8, 8))}
    fields |= {'batch_norm': True, 'conv_bias': False, 'hidden': None, 'num_classes': 101}
    table[f'{name}_agenet'] = VGG, fields
  return table


# Table 1 of Wang et al. 2022; table 2 of Yuan et al. 2021, `t` with full attention in the stem.
_T2T_14 = {'width': 384, 'depth': 14, 'num_heads': 6, 'mlp_ratio': 3.0, 'num_classes': 1000}
_PVT_B1 = {'widths': (64, 128, 320, 512), 'num_classes': 1000}
_FURTHER_TRANSFORMERS: dict[str, Variant] = {
  'pvt_v2_b0': (PVT, {'num_classes': 1000}),
  'pvt_v2_b1': (PVT, _PVT_B1),
  'pvt_v2_b2': (PVT, {**_PVT_B1, 'depths': (3, 4, 6, 3)}),
  't2t_vit_7': (T2TViT, {'num_classes': 1000}),
  't2t_vit_14': (T2TViT, _T2T_14),
  't2t_vit_t_14': (T2TViT, {**_T2T_14, 'performer': False}),
}

# He et al. 2016 (arXiv 1603.05027) as much code for CIFAR has it: nothing stands behind the last block.
_PREACT_RESNET18 = {
  'stage_sizes': (2, 2, 2, 2),
  'widths': (64, 128, 256, 512),
  'strides': (1, 2, 2, 2),
  'stem_width': 64,
  'final_norm': False,
  'num_classes': 10,
}

VARIANTS: dict[str, Variant] = {
  **_resnets(),
  **_convnets(),
  **_mobilenets(),
  **_FURTHER_TRANSFORMERS,
  'convnet': (ConvNet, {'num_classes': 10}),
  'cifar_preact_resnet18': (WideResNet, _PREACT_RESNET18),
  'cnn13': (CNN13, {'num_classes': 10}),
  'shake_shake26_2x96d': (ShakeShake, {'num_classes': 10}),
  'mlp': (MLP, {'hidden': (64, 64), 'num_classes': 10}),
  'linear': (MLP, {'hidden': (), 'num_classes': 10}),
}

# timm's default weights of each name (the tag behind the point on huggingface.co/timm), and repositories.
_TAGS = (
  ('minilm_l6', 'sentence-transformers/all-MiniLM-L6-v2'),
  ('bert_base', 'google-bert/bert-base-uncased'),
  ('bert_large', 'google-bert/bert-large-uncased'),
  ('xlm_roberta_base', 'FacebookAI/xlm-roberta-base'),
  ('xlm_roberta_large', 'FacebookAI/xlm-roberta-large'),
  ('gpt2', 'openai-community/gpt2'),
  ('bloom_560m', 'bigscience/bloom-560m'),
  ('bloom_7b1', 'bigscience/bloom-7b1'),
  ('llama2_7b', 'meta-llama/Llama-2-7b-hf'),
  ('llama2_13b', 'meta-llama/Llama-2-13b-hf'),
  ('llama3_8b', 'meta-llama/Meta-Llama-3-8B'),
  ('llama3_1_8b', 'meta-llama/Llama-3.1-8B'),
  ('llama3_3_70b', 'meta-llama/Llama-3.3-70B-Instruct'),
  *(
    (f'qwen2_5_{ours}', f'Qwen/Qwen2.5-{theirs}')
    for ours, theirs in (
      ('0_5b', '0.5B'),
      ('1_5b', '1.5B'),
      ('7b', '7B'),
      ('14b', '14B'),
      ('32b', '32B'),
    )
  ),
  ('resnet{18,34,50}', 'a1_in1k'),
  ('resnet{101,152}', 'a1h_in1k'),
  ('resnet{50,101,152}c', 'gluon_in1k'),
  ('resnet{18,34,50,101,152,200}d', 'ra2_in1k'),
  ('resnet26d', 'bt_in1k'),
  ('wide_resnet50_2', 'racm_in1k'),
  ('wide_resnet101_2', 'tv_in1k'),
  ('resnext50_32x4d', 'a1h_in1k'),
  ('resnext101_32x8d', 'tv_in1k'),
  ('convnext_{tiny,small}', 'in12k_ft_in1k'),
  ('convnext_{base,large,xlarge}', 'fb_in22k_ft_in1k'),
  ('densenet121', 'ra_in1k'),
  ('densenet{161,169,201}', 'tv_in1k'),
  ('vgg{11,13,16,19}{,_bn}', 'tv_in1k'),
  ('mobilenetv2_050', 'lamb_in1k'),
  ('mobilenetv2_{100,110d,120d,140}', 'ra_in1k'),
  ('efficientnet_{b0,b2,lite0}', 'ra_in1k'),
  ('efficientnet_b1', 'ra4_e3600_r240_in1k'),
  ('efficientnet_{b3,b4}', 'ra2_in1k'),
  ('efficientnet_b5', 'sw_in12k_ft_in1k'),
  ('tf_efficientnet_b{0,1,2,3,4,5,6,7}', 'ns_jft_in1k'),
  ('tf_efficientnet_b8', 'ap_in1k'),
  ('tf_efficientnet_lite{0,1,2,3,4}', 'in1k'),
  ('vit_{tiny,small}_patch16_{224,384}', 'augreg_in21k_ft_in1k'),
  ('vit_base_patch{16,8}_224', 'augreg2_in21k_ft_in1k'),
  ('vit_base_patch16_384', 'augreg_in21k_ft_in1k'),
  ('vit_{small,base}_patch32_{224,384}', 'augreg_in21k_ft_in1k'),
  ('vit_large_patch16_{224,384}', 'augreg_in21k_ft_in1k'),
  ('vit_large_patch32_384', 'orig_in21k_ft_in1k'),
  ('vit_{large_patch32,huge_patch14}_224', 'orig_in21k'),
  ('vit_small_patch8_224', 'dino'),
  ('deit_{tiny,small,base}_{,distilled_}patch16_224', 'fb_in1k'),
  ('deit_base_{,distilled_}patch16_384', 'fb_in1k'),
  ('deit3_{small,base,large}_patch16_{224,384}', 'fb_in1k'),
  ('deit3_huge_patch14_224', 'fb_in1k'),
  ('vit_{small,base,large,giant}_patch14_{,reg4_}dinov2', 'lvd142m'),
  ('vit_base_patch32_clip_{224,384,448}', 'laion2b_ft_in12k_in1k'),
  ('vit_base_patch32_clip_256', 'datacompxl'),
  ('vit_base_patch16_clip_{224,384}', 'laion2b_ft_in12k_in1k'),
  ('vit_{large,huge}_patch14_clip_{224,336}', 'laion2b_ft_in12k_in1k'),
  ('vit_base_patch16_clip_quickgelu_224', 'metaclip_2pt5b'),
  ('vit_base_patch32_clip_quickgelu_224', 'laion400m_e32'),
  ('vit_large_patch14_clip_quickgelu_224', 'dfn2b'),
  ('vit_large_patch14_clip_quickgelu_336', 'openai'),
  ('vit_huge_patch14_clip_quickgelu_{224,378}', 'dfn5b'),
  ('pvt_v2_b{0,1,2}', 'in1k'),
  ('swin_tiny_patch4_window7_224', 'ms_in1k'),
  ('swin_{small,base,large}_patch4_window7_224', 'ms_in22k_ft_in1k'),
  ('swin_{base,large}_patch4_window12_384', 'ms_in22k_ft_in1k'),
)
DEFAULT_TAGS = {name: tag for names, tag in _TAGS for name in expand(names)}
