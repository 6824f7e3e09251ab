"""Image networks by the names of timm, and networks over tokens by their own."""

import difflib
import re
from typing import Any

from flax import linen as nn

from jaxlab.models.configurations import SIZES
from jaxlab.models.pointnet import PointNet
from jaxlab.models.swin import Swin
from jaxlab.models.variants import VARIANTS, expand
from jaxlab.models.vit import ViT
from jaxlab.models.wide_resnet import WideResNet

_WIDE_NAMES = ('wrn16_4', 'wrn28_10', 'wrn40_4')  # any depth 6 n + 4, any factor on the widths

# DeiT, table 1; Dosovitskiy et al. 2021, table 1.
_VITS = {
  'tiny': {'width': 192, 'depth': 12, 'num_heads': 3},
  'small': {'width': 384, 'depth': 12, 'num_heads': 6},
  'base': {'width': 768, 'depth': 12, 'num_heads': 12},
  'large': {'width': 1024, 'depth': 24, 'num_heads': 16},
  'huge': {'width': 1280, 'depth': 32, 'num_heads': 16},
}
# What families of transformers add to their size, by timm's names: a name's expression, sizes, fields.
_DEIT3 = {'layer_scale': 1e-6, 'embed_prefix': False}
_DINOV2 = {'layer_scale': 1e-5, 'image_size': 518, 'num_classes': None}
_CLIP = {'pre_norm': True, 'epsilon': 1e-5}
# Channels of the space that CLIP's texts share.
_CLIP_SPACE = {'base': 512, 'large': 768, 'huge': 1024}
_CLIP_VITS = {size: {**_VITS[size], 'num_classes': space} for size, space in _CLIP_SPACE.items()}
# SwiGLU's two halves of 4096 channels.
_GIANT = {'width': 1536, 'depth': 40, 'num_heads': 24, 'mlp_ratio': 16 / 3, 'activation': 'swiglu'}
_VIT_FAMILIES: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
  (r'(?:vit|deit)_(\w+)_patch(\d+)_(\d+)', _VITS, {}),
  (r'deit_(\w+)_distilled_patch(\d+)_(\d+)', _VITS, {'distilled': True}),
  (r'deit3_(\w+)_patch(\d+)_(\d+)', _VITS, _DEIT3),
  (r'vit_(\w+)_patch(\d+)_dinov2', _VITS | {'giant': _GIANT}, _DINOV2),
  (
    r'vit_(\w+)_patch(\d+)_reg4_dinov2',
    _VITS | {'giant': _GIANT},
    _DINOV2 | {'registers': 4, 'embed_prefix': False},
  ),
  (r'vit_(\w+)_patch(\d+)_clip_(\d+)', _VITS, _CLIP),
  (r'vit_(\w+)_patch(\d+)_clip_quickgelu_(\d+)', _CLIP_VITS, _CLIP | {'activation': 'quick_gelu'}),
)
# Section 3.3 of Liu et al. 2021.
_SWINS = {
  'tiny': {'width': 96, 'depths': (2, 2, 6, 2), 'num_heads': (3, 6, 12, 24)},
  'small': {'width': 96, 'depths': (2, 2, 18, 2), 'num_heads': (3, 6, 12, 24)},
  'base': {'width': 128, 'depths': (2, 2, 18, 2), 'num_heads': (4, 8, 16, 32)},
  'large': {'width': 192, 'depths': (2, 2, 18, 2), 'num_heads': (6, 12, 24, 48)},
}
_SWIN_NAME = re.compile(r'swin_(tiny|small|base|large)_patch(\d+)_window(\d+)_(\d+)')

# Of the transformers, which also come in other patch and image sizes, those that timm knows.
_TRANSFORMERS = (
  'vit_{tiny,small,base,large}_patch16_{224,384}',
  'vit_{small,base,large}_patch32_{224,384}',
  'vit_{small,base}_patch8_224',
  'vit_{large,huge}_patch14_224',
  'deit_{tiny,small,base}_{,distilled_}patch16_224',
  'deit_base_{,distilled_}patch16_384',
  'deit3_{small,base,large}_patch16_{224,384}',
  'deit3_huge_patch14_224',
  'vit_{small,base,large,giant}_patch14_{,reg4_}dinov2',
  'vit_base_patch32_clip_{224,256,384,448}',
  'vit_base_patch16_clip_{224,384}',
  'vit_large_patch14_clip_{224,336}',
  'vit_huge_patch14_clip_{224,336}',
  'vit_base_patch{16,32}_clip_quickgelu_224',
  'vit_large_patch14_clip_quickgelu_{224,336}',
  'vit_huge_patch14_clip_quickgelu_{224,378}',
  'swin_{tiny,small,base,large}_patch4_window7_224',
  'swin_{base,large}_patch4_window12_384',
)


# Over clouds of points.
_POINT_NETWORKS = {'pointnet': (PointNet, {'num_classes': 40})}


def names() -> list[str]:
  """Returns the image networks that `create` knows; those of transformers that timm knows, too."""
  return [*VARIANTS, *_WIDE_NAMES, *(name for names in _TRANSFORMERS for name in expand(names))]


def create(name: str, **overrides: Any) -> nn.Module:
  """Returns the network `name`, a Linen module over normalized float images, NHWC, or over tokens.

  `model.apply({'params': ..., 'batch_stats': ...}, images, train=...)`. Names and sizes are timm's:
  `resnet{18,34,50,101,152}`, `resnet{50,101,152}c`, `resnet{18,26,34,50,101,152,200}d`,
  `wide_resnet{50,101}_2`, `resnext{50_32x4d,101_32x4d,101_32x8d}`,
  `convnext_{tiny,small,base,large,xlarge}`, `densenet{121,161,169,201}`, `vgg{11,13,16,19}[_bn]`,
  `mobilenetv2_{035,050,075,100,110d,120d,140}`, `[tf_]efficientnet_{b0..b8,lite0..lite4}` (with `tf_` padded
  as TensorFlow does), `{vit,deit,deit3}_{size}_patch{p}_{image size}` (sizes tiny, small, base,
  large, huge), `deit_{size}_distilled_patch{p}_{image size}`, CLIP's image towers
  `vit_{size}_patch{p}_clip_{image size}` and `swin_{tiny,small,base,large}_patch{p}_window{w}_{image size}`
  have 1000 classes, as have `pvt_v2_b{0,1,2}`, `t2t_vit_{7,14,t_14}` (Yuan et al. 2021) and the bilinear
  `bcnn_vgg{11,13,16,19}`; CLIP's
  `vit_{size}_patch{p}_clip_quickgelu_{image size}` have the channels of its space;
  DINOv2's `vit_{size or giant}_patch{p}_[reg4_]dinov2` have none, and images of 518 pixels;
  `cifar_resnet{18,34,50}` (3x3 stem, no pooling) and `cifar_resnet{20,32,56,110}` (three narrow stages,
  parameter-free shortcuts) have 10, as have `cifar_preact_resnet18`, wide residual networks `wrn{6n+4}_{k}`
  (`wrn28_10`), `shake_shake26_2x96d`, `cnn13`, the small `convnet`, and `mlp` and `linear` over inputs of any
  shape; `{thin,tiny}_agenet` (Gao et al. 2020) have 101, ages.

  Over clouds `[batch, points, 3]`: `pointnet`, 40 classes. Over tokens `[batch, time]`: the decoders
  `gpt2[_medium,_large,_xl]`, `bloom_{560m,7b1}`, `llama` (the 7B of 2023), `llama2_{7b,13b}`, `llama3_8b`,
  `qwen2_5_{0_5b,1_5b,7b,14b,32b}` and the encoders `bert_{base,large}`,
  `xlm_roberta_{base,large}`, `minilm_l6`; `from_config` builds any other size.

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
  if variant := (SIZES | _POINT_NETWORKS).get(name) or VARIANTS.get(name):
    return variant
  if fields := _vit_fields(name):
    return ViT, fields
  if match := _SWIN_NAME.fullmatch(name):
    patch, window, image = (int(group) for group in match.groups()[1:])
    sizes = {'patch_size': patch, 'window_size': window, 'image_size': image}
    return Swin, {**_SWINS[match[1]], **sizes, 'num_classes': 1000}
  elif (match := re.fullmatch(r'wrn(\d+)_(\d+)', name)) and int(match[1]) % 6 == 4:
    blocks, factor = int(match[1]) // 6, int(match[2])
    widths = tuple(width * factor for width in (16, 32, 64))
    if blocks and factor:
      return WideResNet, {'stage_sizes': (blocks,) * 3, 'widths': widths, 'num_classes': 10}
  known = [*names(), *SIZES, *_POINT_NETWORKS]
  close = [other for other in known if name and other.startswith(name)][:3]
  close = close or difflib.get_close_matches(name, known, 3, 0.5)
  families = dict.fromkeys(re.match(r'[a-z]+?(v\d|(?=[_\d]|$))', other)[0] for other in known)
  hint = f'closest: {", ".join(close)}' if close else f'families: {", ".join(families)}'
  raise ValueError(f'create: no network is called {name!r}; {hint}.')


def _vit_fields(name: str) -> dict[str, Any] | None:
  """Returns the fields of the vision transformer `name`; None if that names none."""
  for pattern, sizes, family in _VIT_FAMILIES:
    match = re.fullmatch(pattern, name)
    if match and match[1] in sizes:
      image = {'image_size': int(match[3])} if match.re.groups == 3 else {}
      size = {**sizes[match[1]], 'patch_size': int(match[2]), **image}
      return {'num_classes': 1000, **family, **size}
  return None
