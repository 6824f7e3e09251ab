"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381).

Modules are named as in timm, `blocks.2.0.conv_dw` as `blocks_2_0/conv_dw`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.initializers import kaiming_normal_fan_in, kaiming_normal_fan_out
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import BatchNorm
from jaxlab.models.resnet import check_images, square_conv

Array = jax.Array


def scale_channels(channels: int, multiplier: float, divisor: int = 8) -> int:
  """Returns `channels * multiplier`, rounded half up to a multiple of `divisor`, at least `divisor`.

  Where rounding takes more than a tenth away, the next multiple is taken.

  >>> [scale_channels(c, 0.35) for c in (16, 24, 32, 64, 96)]
  [8, 8, 16, 24, 32]
  """
  wanted = channels * multiplier
  rounded = max(divisor, int(wanted + divisor / 2) // divisor * divisor)
  return rounded + divisor if rounded < 0.9 * wanted else rounded


class InvertedResidual(nn.Module):
  """1x1 expansion, depthwise 3x3 that strides, 1x1 projection without activation, around a shortcut.

  Without expansion (the first stage) it is the depthwise and the 1x1 convolution alone. The shortcut is
  there where the shape stays. Names: `conv_pw bn1 relu1 conv_dw bn2 relu2 conv_pwl bn3`, without expansion
  `conv_dw bn1 relu1 conv_pw bn2`; the hook points `relu1`, `relu2` are behind `min(max(x, 0), 6)`.

  Attributes:
    features: channels of the output.
    stride: of the block, height and width.
    expansion: channels of the depthwise convolution over those of the input; None: no expansion.
    conv: `conv(features, kernel_size, stride, groups, name=...)` makes a convolution.
    norm: `norm(name=...)` makes a norm.
  """

  features: int
  stride: int = 1
  expansion: float | None = 6
  conv: Callable[..., nn.Module] = square_conv
  norm: Callable[..., nn.Module] = BatchNorm

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[batch, height, width, channels]` to `[batch, height/stride, width/stride, features]`."""
    y, norms, project = x, 0, 'conv_pw'
    if self.expansion is not None:
      inner = scale_channels(x.shape[-1], self.expansion)
      y = self.conv(inner, 1, name='conv_pw')(y)
      y = HookPoint(name='relu1')(nn.relu6(self.norm(name='bn1')(y, train)))
      norms, project = 1, 'conv_pwl'
    depthwise = functools.partial(self.conv, groups=y.shape[-1], kernel_init=kaiming_normal_fan_in)
    y = depthwise(y.shape[-1], 3, self.stride, name='conv_dw')(y)
    y = self.norm(name=f'bn{norms + 1}')(y, train)
    y = HookPoint(name=f'relu{norms + 1}')(nn.relu6(y))
    y = self.conv(self.features, 1, name=project)(y)
    y = self.norm(name=f'bn{norms + 2}')(y, train)
    return y + x if self.stride == 1 and x.shape == y.shape else y


class MobileNetV2(nn.Module):
  """MobileNetV2 over float images `[batch, height, width, channels]`.

  `conv_stem`, `bn1`, `relu1`; stages of inverted residuals `blocks_0_0, blocks_1_0, blocks_1_1, ...`, the
  first without expansion; `conv_head`, `bn2`, `relu2`; global average `avgpool`; `classifier`.
  Convolutions have no bias and pad symmetrically. Collections: `params`, `batch_stats`.

  Attributes:
    stage_sizes: number of blocks of each stage.
    widths: channels of the stages' outputs.
    strides: stride of each stage (surplus entries of `widths` and `strides` are ignored).
    expansion: of the inverted residuals, see there.
    stem_width: channels of `conv_stem`.
    head_width: channels of `conv_head`.
    stem: `'imagenet'` (3x3, stride 2) or `'cifar'` (3x3, stride 1).
    num_classes: size of the classifier; None returns the pooled features `[batch, head_width]`.
    norm_groups: groups of the batch with separate statistics, see `BatchNorm`.
    dtype: of the computation (parameters and statistics stay float32); None: as the input.
    remat: recompute each block's activations in the backward pass instead of storing them.

  Raises:
    ValueError: at construction, if a field is out of its range.
  """

  stage_sizes: Sequence[int] = (1, 2, 3, 4, 3, 3, 1)
  widths: Sequence[int] = (16, 24, 32, 64, 96, 160, 320)
  strides: Sequence[int] = (1, 2, 2, 2, 1, 2, 1)
  expansion: float = 6
  stem_width: int = 32
  head_width: int = 1280
  stem: str = 'imagenet'
  num_classes: int | None = None
  norm_groups: int = 1
  dtype: Any = None
  remat: bool = False

  def __post_init__(self):
    if self.stem not in ('imagenet', 'cifar'):
      raise ValueError(f"MobileNetV2: stem={self.stem!r} is none of ('imagenet', 'cifar').")
    stages = len(self.stage_sizes)
    if min(len(self.widths), len(self.strides)) < stages:
      raise ValueError(
        f'MobileNetV2: {stages} stages need as many widths and strides; got widths={self.widths}, '
        f'strides={self.strides}.'
      )
    if self.num_classes is not None and self.num_classes < 1:
      raise ValueError(
        f'MobileNetV2: num_classes={self.num_classes}; give None for pooled features.'
      )
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns logits `[batch, num_classes]`, or features `[batch, head_width]` without classifier."""
    check_images(x)
    conv = functools.partial(square_conv, kernel_init=kaiming_normal_fan_out, dtype=self.dtype)
    norm = functools.partial(BatchNorm, groups=self.norm_groups, dtype=self.dtype)
    x = conv(self.stem_width, 3, 2 if self.stem == 'imagenet' else 1, name='conv_stem')(x)
    x = HookPoint(name='relu1')(nn.relu6(norm(name='bn1')(x, train)))
    block = InvertedResidual
    if self.remat:
      block = nn.remat(block, static_argnums=(2,))
    for stage, size in enumerate(self.stage_sizes):
      for index in range(size):
        x = block(
          features=self.widths[stage],
          stride=self.strides[stage] if index == 0 else 1,
          expansion=self.expansion if stage else None,
          conv=conv,
          norm=norm,
          name=f'blocks_{stage}_{index}',
        )(x, train)
    x = norm(name='bn2')(conv(self.head_width, 1, name='conv_head')(x), train)
    x = HookPoint(name='relu2')(nn.relu6(x))
    x = HookPoint(name='avgpool')(jnp.mean(x, (1, 2)))
    if self.num_classes is None:
      return x
    # Uniform within +-1/sqrt(num_classes), and biases from 0: timm's EfficientNet initialization.
    kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_out', 'uniform')
    dense = nn.Dense(self.num_classes, kernel_init=kernel_init, dtype=self.dtype, name='classifier')
    return dense(x)


def mobilenetv2_fields(multiplier: float, deep: float | None = None) -> dict[str, Any]:
  """Returns the fields of `MobileNetV2` for timm's width `multiplier`.

  Stem and head grow with it (the head never shrinks). With `deep` (timm's `d` networks) they keep their width
  and all stages but the first and last have `deep` times as many blocks, rounded up.
  """
  plain = MobileNetV2
  fields = {'widths': tuple(scale_channels(width, multiplier) for width in plain.widths)}
  if deep is None:
    stem_width = scale_channels(plain.stem_width, multiplier)
    head_width = max(plain.head_width, scale_channels(plain.head_width, multiplier))
    return {**fields, 'stem_width': stem_width, 'head_width': head_width}
  first, *middle, last = plain.stage_sizes
  return {**fields, 'stage_sizes': (first, *(math.ceil(deep * n) for n in middle), last)}
