"""Networks of inverted residuals: MobileNetV2 and EfficientNet.

MobileNetV2 is Sandler et al. 2018 (arXiv 1801.04381), EfficientNet Tan & Le 2019 (arXiv 1905.11946).
Modules are named as in timm, `blocks.2.0.conv_dw` as `blocks_2_0/conv_dw`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.channels import make_divisible
from jaxlab.models.convolution import conv_general_dilated
from jaxlab.models.initializers import kaiming_normal_fan_in, kaiming_normal_fan_out
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import BatchNorm
from jaxlab.models.resnet import check_images, square_conv

Array = jax.Array

# Each activation with the stem of its hook points' names.
ACTIVATIONS = {'relu6': (nn.relu6, 'relu'), 'silu': (nn.silu, 'silu')}


def scale_channels(channels: int, multiplier: float, divisor: int = 8) -> int:
  """Returns `channels * multiplier`, rounded half up to a multiple of `divisor`, at least `divisor`.

  Where rounding takes more than a tenth away, the next multiple is taken.

  >>> [scale_channels(c, 0.35) for c in (16, 24, 32, 64, 96)]
  [8, 8, 16, 24, 32]
  """
  return make_divisible(channels * multiplier, divisor, divisor)


class SqueezeExcite(nn.Module):
  """A gate for each channel of each image, `x * sigmoid(conv_expand(act(conv_reduce(mean(x)))))`.

  Hu et al. 2018, arXiv 1709.01507. Both layers are 1x1 convolutions with bias; hook points `relu1` or
  `silu1`, and `gate`.

  Attributes:
    reduced: channels between the layers.
    activation: `'relu6'` or `'silu'`.
    dtype: of the computation.
  """

  reduced: int
  activation: str = 'silu'
  dtype: Any = None

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps `[batch, height, width, channels]` to the same shape."""
    conv = functools.partial(
      nn.Conv,
      kernel_size=(1, 1),
      kernel_init=kaiming_normal_fan_out,
      conv_general_dilated=conv_general_dilated,
      dtype=self.dtype,
    )
    function, point = ACTIVATIONS[self.activation]
    y = conv(self.reduced, name='conv_reduce')(jnp.mean(x, (1, 2), keepdims=True))
    y = HookPoint(name=f'{point}1')(function(y))
    y = conv(x.shape[-1], name='conv_expand')(y)
    return x * HookPoint(name='gate')(nn.sigmoid(y))


class InvertedResidual(nn.Module):
  """1x1 expansion, depthwise convolution that strides, 1x1 projection without activation, around a shortcut.

  Without expansion (the first stage) it is the depthwise and the 1x1 convolution alone. The shortcut is
  there where the shape stays. Names: `conv_pw bn1 relu1 conv_dw bn2 relu2 [se] conv_pwl bn3`, without
  expansion `conv_dw bn1 relu1 [se] conv_pw bn2`; the hook points `relu1`, `relu2` (`silu1`, `silu2`) are
  behind the activation, `min(max(x, 0), 6)` or `x sigmoid(x)`.

  Attributes:
    features: channels of the output.
    stride: of the block, height and width.
    expansion: channels of the depthwise convolution over those of the input; None: no expansion.
    kernel_size: of the depthwise convolution.
    activation: `'relu6'` or `'silu'`.
    squeeze: channels within `se`, a `SqueezeExcite` behind the depthwise convolution, over those of the
      block's input; None: no `se`.
    conv: `conv(features, kernel_size, stride, groups, name=...)` makes a convolution.
    norm: `norm(name=...)` makes a norm.
    dtype: of the computation within `se`.
    inner: channels of the depthwise convolution, where they differ from what `expansion` says.
    shortcut: whether the input is added; None: where the shape stays.
  """

  features: int
  stride: int = 1
  expansion: float | None = 6
  kernel_size: int = 3
  activation: str = 'relu6'
  squeeze: float | None = None
  conv: Callable[..., nn.Module] = square_conv
  norm: Callable[..., nn.Module] = BatchNorm
  dtype: Any = None
  inner: int | None = None
  shortcut: bool | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[batch, height, width, channels]` to `[batch, height/stride, width/stride, features]`."""
    function, point = ACTIVATIONS[self.activation]
    y, norms, project = x, 0, 'conv_pw'
    if self.expansion is not None:
      inner = self.inner or scale_channels(x.shape[-1], self.expansion)
      y = self.conv(inner, 1, name='conv_pw')(y)
      y = HookPoint(name=f'{point}1')(function(self.norm(name='bn1')(y, train)))
      norms, project = 1, 'conv_pwl'
    depthwise = functools.partial(self.conv, groups=y.shape[-1], kernel_init=kaiming_normal_fan_in)
    y = depthwise(y.shape[-1], self.kernel_size, self.stride, name='conv_dw')(y)
    y = self.norm(name=f'bn{norms + 1}')(y, train)
    y = HookPoint(name=f'{point}{norms + 1}')(function(y))
    if self.squeeze is not None:
      reduced = max(1, round(x.shape[-1] * self.squeeze))
      y = SqueezeExcite(reduced, self.activation, self.dtype, name='se')(y)
    y = self.conv(self.features, 1, name=project)(y)
    y = self.norm(name=f'bn{norms + 2}')(y, train)
    added = self.stride == 1 and x.shape == y.shape
    return y + x if added and self.shortcut is not False else y


class MobileNetV2(nn.Module):
  """MobileNetV2 over float images `[batch, height, width, channels]`.

  `conv_stem`, `bn1`, `relu1`; stages of inverted residuals `blocks_0_0, blocks_1_0, blocks_1_1, ...`, the
  first without expansion; `conv_head`, `bn2`, `relu2`; global average `avgpool`; `classifier`.
  Convolutions have no bias. Collections: `params`, `batch_stats`.

  Attributes:
    stage_sizes: number of blocks of each stage.
    widths: channels of the stages' outputs.
    strides: stride of each stage (surplus entries of `widths`, `strides` and `kernel_sizes` are ignored).
    expansion: of the inverted residuals, see there.
    stem_width: channels of `conv_stem`.
    head_width: channels of `conv_head`.
    stem: `'imagenet'` (3x3, stride 2) or `'cifar'` (3x3, stride 1).
    num_classes: size of the classifier; None returns the pooled features `[batch, head_width]`.
    norm_groups: groups of the batch with separate statistics, see `BatchNorm`.
    kernel_sizes: of the depthwise convolutions of each stage.
    activation: `'relu6'` (hook points `relu...`) or `'silu'` (hook points `silu...`).
    squeeze: of the inverted residuals, see there.
    padding: of 3x3 and larger convolutions: None for half the kernel on all sides, as PyTorch, or `'SAME'`
      for TensorFlow's, which pads more at the bottom and right.
    epsilon: of the norms.
    inner_widths: channels of each block's depthwise convolution, blocks in order (without expansion its
      input's, whatever stands here); None: as `expansion` says. With the next one what is left of a pruned
      network (`jaxlab.compression`).
    shortcuts: whether the first block of each stage adds its input; None: where the shape stays.
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
  kernel_sizes: Sequence[int] = (3,) * 7
  activation: str = 'relu6'
  squeeze: float | None = None
  padding: str | None = None
  epsilon: float = 1e-5
  inner_widths: Sequence[int] | None = None
  shortcuts: Sequence[bool] | None = None
  dtype: Any = None
  remat: bool = False

  def __post_init__(self):
    kind = type(self).__name__
    for name, allowed in (
      ('stem', ('imagenet', 'cifar')),
      ('activation', tuple(ACTIVATIONS)),
      ('padding', (None, 'SAME')),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(f'{kind}: {name}={getattr(self, name)!r} is none of {allowed}.')
    stages = len(self.stage_sizes)
    if min(len(self.widths), len(self.strides), len(self.kernel_sizes)) < stages:
      raise ValueError(
        f'{kind}: {stages} stages need as many widths and strides, and kernel_sizes; got '
        f'widths={self.widths}, strides={self.strides}, kernel_sizes={self.kernel_sizes}.'
      )
    for name, count in (('inner_widths', sum(self.stage_sizes)), ('shortcuts', stages)):
      if (own := getattr(self, name)) is not None and len(own) != count:
        raise ValueError(f'{kind}: {name} needs {count} entries, got {own}.')
    if self.num_classes is not None and self.num_classes < 1:
      raise ValueError(f'{kind}: num_classes={self.num_classes}; give None for pooled features.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns logits `[batch, num_classes]`, or features `[batch, head_width]` without classifier."""
    check_images(x)
    function, point = ACTIVATIONS[self.activation]
    conv = functools.partial(
      square_conv, kernel_init=kaiming_normal_fan_out, padding=self.padding, dtype=self.dtype
    )
    norm = functools.partial(
      BatchNorm, epsilon=self.epsilon, groups=self.norm_groups, dtype=self.dtype
    )
    x = conv(self.stem_width, 3, 2 if self.stem == 'imagenet' else 1, name='conv_stem')(x)
    x = HookPoint(name=f'{point}1')(function(norm(name='bn1')(x, train)))
    block = InvertedResidual
    if self.remat:
      block = nn.remat(block, static_argnums=(2,))
    inner = iter(self.inner_widths or [None] * sum(self.stage_sizes))
    for stage, size in enumerate(self.stage_sizes):
      for index in range(size):
        x = block(
          features=self.widths[stage],
          stride=self.strides[stage] if index == 0 else 1,
          expansion=self.expansion if stage else None,
          kernel_size=self.kernel_sizes[stage],
          activation=self.activation,
          squeeze=self.squeeze,
          conv=conv,
          norm=norm,
          dtype=self.dtype,
          inner=next(inner),
          shortcut=self.shortcuts[stage] if self.shortcuts and index == 0 else None,
          name=f'blocks_{stage}_{index}',
        )(x, train)
    x = norm(name='bn2')(conv(self.head_width, 1, name='conv_head')(x), train)
    x = HookPoint(name=f'{point}2')(function(x))
    x = HookPoint(name='avgpool')(jnp.mean(x, (1, 2)))
    if self.num_classes is None:
      return x
    # Uniform within +-1/sqrt(num_classes), and biases from 0: timm's EfficientNet initialization.
    kernel_init = nn.initializers.variance_scaling(1 / 3, 'fan_out', 'uniform')
    dense = nn.Dense(self.num_classes, kernel_init=kernel_init, dtype=self.dtype, name='classifier')
    return dense(x)


class EfficientNet(MobileNetV2):
  """EfficientNet-B0 by default: a `MobileNetV2` with 5x5 windows, SiLU and squeeze-and-excitation.

  The Lite networks have `activation='relu6'` and `squeeze=None`; TensorFlow's weights (`tf_*`) need
  `padding='SAME'` and `epsilon=1e-3`. Modules, attributes and errors are those of `MobileNetV2`.
  """

  stage_sizes: Sequence[int] = (1, 2, 2, 3, 3, 4, 1)
  widths: Sequence[int] = (16, 24, 40, 80, 112, 192, 320)
  kernel_sizes: Sequence[int] = (3, 3, 5, 3, 5, 5, 3)
  activation: str = 'silu'
  squeeze: float | None = 0.25


def scaled_fields(
  kind: type[MobileNetV2], width: float, depth: float = 1.0, fixed_ends: bool = False
) -> dict[str, Any]:
  """Returns the fields of `kind` whose widths and depths are multiplied, rounded as timm does.

  Args:
    kind: `MobileNetV2` or `EfficientNet`.
    width: multiplier of the channels of all stages, and of stem and head (the head never shrinks).
    depth: multiplier of the number of blocks of each stage, rounded up.
    fixed_ends: leave the width of stem and head, and the depth of the first and last stage, as they are:
      MobileNetV2's `d` networks and the Lite ones.
  """
  sizes = [math.ceil(depth * size) for size in kind.stage_sizes]
  stem_width = scale_channels(kind.stem_width, width)
  head_width = max(kind.head_width, scale_channels(kind.head_width, width))
  if fixed_ends:
    sizes = [kind.stage_sizes[0], *sizes[1:-1], kind.stage_sizes[-1]]
    stem_width, head_width = kind.stem_width, kind.head_width
  return {
    'stage_sizes': tuple(sizes),
    'widths': tuple(scale_channels(features, width) for features in kind.widths),
    'stem_width': stem_width,
    'head_width': head_width,
  }
