"""Image networks by the names of timm, and decoders by their own."""

import difflib
import re
from typing import Any

from flax import linen as nn

from jaxlab.models import decoders
from jaxlab.models.initializers import kaiming_normal_fan_in
from jaxlab.models.mlp import MLP
from jaxlab.models.mobilenetv2 import MobileNetV2, mobilenetv2_fields
from jaxlab.models.resnet import ResNet
from jaxlab.models.swin import Swin
from jaxlab.models.vit import ViT
from jaxlab.models.wide_resnet import WideResNet

# Depths of He et al. 2016, table 1.
_RESNETS = {
  18: {'stage_sizes': (2, 2, 2, 2), 'block': 'basic'},
  34: {'stage_sizes': (3, 4, 6, 3), 'block': 'basic'},
  50: {'stage_sizes': (3, 4, 6, 3), 'block': 'bottleneck'},
  101: {'stage_sizes': (3, 4, 23, 3), 'block': 'bottleneck'},
  152: {'stage_sizes': (3, 8, 36, 3), 'block': 'bottleneck'},
}
# Cardinality and base width of Xie et al. 2017 and torchvision, by name.
_RESNEXTS = {
  'resnext50_32x4d': (50, 32, 4),
  'resnext101_32x4d': (101, 32, 4),
  'resnext101_32x8d': (101, 32, 8),
}
_MLPS = {'mlp': (64, 64), 'linear': ()}  # hidden layers
_CIFAR_STEM_DEPTHS = (18, 34, 50)
_CIFAR_DEPTHS = (20, 32, 56, 110)  # 6 n + 2 with three stages of n blocks
_WIDE_NAMES = ('wrn16_4', 'wrn28_10', 'wrn40_4')  # any depth 6 n + 4, any factor on the widths

# DeiT, table 1; ViT-Base is that of Dosovitskiy et al. 2021.
_VITS = {
  'tiny': {'width': 192, 'depth': 12, 'num_heads': 3},
  'small': {'width': 384, 'depth': 12, 'num_heads': 6},
  'base': {'width': 768, 'depth': 12, 'num_heads': 12},
}
# Section 3.3 of Liu et al. 2021.
_SWINS = {
  'tiny': {'width': 96, 'depths': (2, 2, 6, 2), 'num_heads': (3, 6, 12, 24)},
  'small': {'width': 96, 'depths': (2, 2, 18, 2), 'num_heads': (3, 6, 12, 24)},
  'base': {'width': 128, 'depths': (2, 2, 18, 2), 'num_heads': (4, 8, 16, 32)},
}
_SWIN_NAME = re.compile(r'swin_(tiny|small|base)_patch(\d+)_window(\d+)_(\d+)')

# timm's width multipliers; its `d` networks are also deeper.
_MOBILENETS = {
  '035': (0.35,),
  '050': (0.5,),
  '075': (0.75,),
  '100': (1.0,),
  '110d': (1.1, 1.2),
  '120d': (1.2, 1.4),
  '140': (1.4,),
}

_VIT_NAME = re.compile(r'(vit|deit)_(tiny|small|base)(_distilled)?_patch(\d+)_(\d+)')


def names(patch_size: int = 16, image_size: int = 224) -> list[str]:
  """Returns the image networks that `create` knows; transformers also come in other patch and image sizes."""
  vits = [
    f'{family}_{size}{distilled}_patch{patch_size}_{image_size}'
    for family, distilled in (('vit', ''), ('deit', ''), ('deit', '_distilled'))
    for size in _VITS
  ]
  resnets = [f'resnet{depth}' for depth in _RESNETS]
  cifar = [f'cifar_resnet{depth}' for depth in (*_CIFAR_STEM_DEPTHS, *_CIFAR_DEPTHS)]
  swins = [f'swin_{size}_patch{patch_size}_window7_{image_size}' for size in _SWINS]
  mobilenets = [f'mobilenetv2_{size}' for size in _MOBILENETS]
  return [*resnets, *_RESNEXTS, *cifar, *_WIDE_NAMES, *mobilenets, *vits, *swins, *_MLPS]


def create(name: str, **overrides: Any) -> nn.Module:
  """Returns the network `name`, a Linen module over normalized float images, NHWC, or over tokens.

  `model.apply({'params': ..., 'batch_stats': ...}, images, train=...)`. Names and sizes are timm's:
  `resnet{18,34,50,101,152}`, `resnext{50_32x4d,101_32x4d,101_32x8d}`,
  `mobilenetv2_{035,050,075,100,110d,120d,140}`, `{vit,deit}_{tiny,small,base}_patch{p}_{image size}`,
  `deit_{...}_distilled_patch{p}_{image size}` and `swin_{tiny,small,base}_patch{p}_window{w}_{image size}`
  have 1000 classes; `cifar_resnet{18,34,50}` (3x3 stem, no pooling) and `cifar_resnet{20,32,56,110}` (three
  narrow stages, parameter-free shortcuts) have 10, as have wide residual networks `wrn{6n+4}_{k}`
  (`wrn28_10`), and `mlp` and `linear` over inputs of any shape.

  Decoders over tokens `[batch, time]`: `gpt2[_medium,_large,_xl]`, `llama` (the 7B of 2023), `llama2_7b`,
  `llama3_8b`; `from_config` builds any other size.

  Args:
    name: the network's name.
    **overrides: fields of the module; `num_classes=None` gives an image network's pooled features.

  Raises:
    ValueError: for an unknown name or field, with the closest known ones.

  >>> create('cifar_resnet20', num_classes=None).stage_sizes
  (3, 3, 3)
  >>> create('deit_small_patch16_224', drop_path=0.1).width
  384
  """
  model, fields = _parse(name)
  unknown = sorted(set(overrides) - set(model.__dataclass_fields__))
  if unknown:
    known = sorted(set(model.__dataclass_fields__) - {'parent', 'name'})
    raise ValueError(
      f'create({name!r}): {model.__name__} has no field {", ".join(map(repr, unknown))}; '
      f'its fields: {", ".join(known)}.'
    )
  return model(**{**fields, **overrides})


def _parse(name: str) -> tuple[type[nn.Module], dict[str, Any]]:
  """Returns the module class and the fields that belong to `name`."""
  if name in decoders.SIZES:
    return decoders.SIZES[name]
  if match := _VIT_NAME.fullmatch(name):
    family, size, distilled, patch, image = match.groups()
    if not (family == 'vit' and distilled):
      fields = {**_VITS[size], 'patch_size': int(patch), 'image_size': int(image)}
      return ViT, {**fields, 'distilled': bool(distilled), 'num_classes': 1000}
  elif match := _SWIN_NAME.fullmatch(name):
    patch, window, image = (int(group) for group in match.groups()[1:])
    sizes = {'patch_size': patch, 'window_size': window, 'image_size': image}
    return Swin, {**_SWINS[match[1]], **sizes, 'num_classes': 1000}
  elif (match := re.fullmatch(r'mobilenetv2_(\d+d?)', name)) and match[1] in _MOBILENETS:
    return MobileNetV2, {**mobilenetv2_fields(*_MOBILENETS[match[1]]), 'num_classes': 1000}
  elif name in _MLPS:
    return MLP, {'hidden': _MLPS[name], 'num_classes': 10}
  elif name in _RESNEXTS:
    depth, cardinality, base_width = _RESNEXTS[name]
    groups = {'cardinality': cardinality, 'base_width': base_width}
    return ResNet, {**_RESNETS[depth], **groups, 'num_classes': 1000}
  elif match := re.fullmatch(r'(cifar_)?resnet(\d+)', name):
    cifar, depth = bool(match[1]), int(match[2])
    if not cifar and depth in _RESNETS:
      return ResNet, {**_RESNETS[depth], 'num_classes': 1000}
    if cifar and depth in _CIFAR_STEM_DEPTHS:
      return ResNet, {**_RESNETS[depth], 'stem': 'cifar', 'num_classes': 10}
    if cifar and depth in _CIFAR_DEPTHS:
      return ResNet, {
        'stage_sizes': ((depth - 2) // 6,) * 3,
        'strides': (1, 2, 2),
        'width': 16,
        'stem': 'cifar',
        'shortcut': 'pad',
        'conv_init': kaiming_normal_fan_in,
        'fc_init': kaiming_normal_fan_in,
        'num_classes': 10,
      }
  elif (match := re.fullmatch(r'wrn(\d+)_(\d+)', name)) and int(match[1]) % 6 == 4:
    blocks, factor = int(match[1]) // 6, int(match[2])
    widths = tuple(width * factor for width in (16, 32, 64))
    if blocks and factor:
      return WideResNet, {'stage_sizes': (blocks,) * 3, 'widths': widths, 'num_classes': 10}
  known = [*names(), *decoders.SIZES]
  close = difflib.get_close_matches(name, known, 3, 0.5)
  hint = f'closest: {", ".join(close)}' if close else f'known: {", ".join(known)}'
  raise ValueError(f'create: no network is called {name!r}; {hint}.')
