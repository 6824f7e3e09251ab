"""Residual networks for ImageNet and CIFAR (He et al. 2016, arXiv 1512.03385).

Modules are named as in torchvision and timm, `layer1.0.conv1` as `layer1_0/conv1`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.convolution import conv_general_dilated
from jaxlab.models.initializers import (
  Initializer,
  kaiming_normal_fan_out,
  torch_default,
  torch_default_bias,
)
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import BatchNorm

Array = jax.Array


def square_conv(
  features: int,
  kernel_size: int,
  stride: int = 1,
  groups: int = 1,
  kernel_init: Initializer = kaiming_normal_fan_out,
  padding: str | None = None,
  **kwargs: Any,
) -> nn.Conv:
  """Returns a square convolution, by default without bias, padded by half the kernel or as `padding` says."""
  return nn.Conv(
    features,
    (kernel_size, kernel_size),
    strides=(stride, stride),
    padding=padding or [(kernel_size // 2, kernel_size // 2)] * 2,
    feature_group_count=groups,
    kernel_init=kernel_init,
    **{'use_bias': False, 'conv_general_dilated': conv_general_dilated} | kwargs,
  )


def pad_shortcut(x: Array, features: int, stride: int) -> Array:
  """Returns the parameter-free shortcut, option A of He et al. 2016.

  Every `stride`-th row and column of `x` `[batch, height, width, channels]`, with zero channels added
  half before and half after (the odd one after) up to `features`.
  """
  extra = features - x.shape[-1]
  if extra < 0:
    raise ValueError(f"shortcut='pad' cannot go from {x.shape[-1]} channels down to {features}.")
  x = x[:, ::stride, ::stride]
  return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))


def average_pairs(x: Array) -> Array:
  """Returns the average of each 2x2 window of `x` `[batch, height, width, channels]`, side by side.

  Windows over the edge of odd sides average what lies inside.
  """
  padding = [(0, side % 2) for side in x.shape[1:3]]
  return nn.avg_pool(x, (2, 2), (2, 2), padding, count_include_pad=False)


ACTIVATIONS = {'relu': nn.relu, 'sigmoid': nn.sigmoid, 'arctan': jnp.arctan}


class _Block(nn.Module):
  """What both residual blocks share.

  Attributes:
    features: channels of the 3x3 convolution(s), before the expansion.
    stride: of the block, height and width.
    shortcut: `'projection'` (1x1 convolution and norm), `'average'` (2x2 average before that), or `'pad'`,
      where the shape changes.
    zero_init_residual: start the last norm's scale at 0, so that the block begins as its shortcut.
    cardinality: groups of the bottleneck's 3x3 convolution (ResNeXt).
    base_width: channels of one of these groups at `features == 64`.
    activation: of `ACTIVATIONS`; its hook points are called `relu` whichever it is.
    conv: `conv(features, kernel_size, stride, name=...)` makes a convolution.
    norm: `norm(name=...)` makes a norm.
    inner: output channels of the convolutions but the last, where they differ from what `features` says.
    outer: output channels of the block, where they differ from `features` times the expansion.
    project: whether the shortcut has a projection; None: where the shape changes.
  """

  features: int
  stride: int = 1
  shortcut: str = 'projection'
  zero_init_residual: bool = False
  cardinality: int = 1
  base_width: int = 64
  activation: str = 'relu'
  conv: Callable[..., nn.Module] = square_conv
  norm: Callable[..., nn.Module] = BatchNorm
  inner: Sequence[int] | None = None
  outer: int | None = None
  project: bool | None = None
  expansion: ClassVar[int] = 1

  @property
  def outputs(self) -> int:
    """Channels of the block's output."""
    return self.outer or self.features * self.expansion

  def last_scale_init(self) -> Initializer:
    """Returns the initializer of the residual branch's last scale."""
    return nn.initializers.zeros if self.zero_init_residual else nn.initializers.ones

  def act(self, x: Array) -> Array:
    """Returns the activation of `x`."""
    return ACTIVATIONS[self.activation](x)

  def skip(self, x: Array, train: bool) -> Array:
    """Returns the shortcut of `x`, brought to the branch's shape."""
    features = self.outputs
    same = self.stride == 1 and x.shape[-1] == features
    if not self.project and (same or self.project is not None):
      return x
    if self.shortcut == 'pad':
      return HookPoint(name='downsample')(pad_shortcut(x, features, self.stride))
    if self.shortcut == 'projection':
      x = self.conv(features, 1, self.stride, name='downsample_0')(x)
      return self.norm(name='downsample_1')(x, train)
    x = HookPoint(name='downsample_0')(average_pairs(x) if self.stride == 2 else x)
    x = self.conv(features, 1, name='downsample_1')(x)
    return self.norm(name='downsample_2')(x, train)


class BasicBlock(_Block):
  """Two 3x3 convolutions around a shortcut; the first one strides."""

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[batch, height, width, channels]` to `[batch, height/stride, width/stride, features]`."""
    if self.cardinality != 1:
      raise ValueError('cardinality needs the bottleneck block; BasicBlock has no grouped form.')
    (inner,) = self.inner or (self.features,)
    y = self.conv(inner, 3, self.stride, name='conv1')(x)
    y = self.norm(name='bn1')(y, train)
    y = HookPoint(name='relu1')(self.act(y))
    y = self.conv(self.outputs, 3, name='conv2')(y)
    y = self.norm(name='bn2', scale_init=self.last_scale_init())(y, train)
    return HookPoint(name='relu2')(self.act(y + self.skip(x, train)))


class Bottleneck(_Block):
  """1x1, 3x3 and 1x1 convolutions around a shortcut; the 3x3 one strides, as in torchvision."""

  expansion: ClassVar[int] = 4

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[batch, height, width, channels]` to `[batch, height/stride, width/stride, 4 features]`."""
    width = self.features * self.base_width // 64 * self.cardinality
    first, second = self.inner or (width, width)
    y = self.conv(first, 1, name='conv1')(x)
    y = self.norm(name='bn1')(y, train)
    y = HookPoint(name='relu1')(self.act(y))
    y = self.conv(second, 3, self.stride, groups=self.cardinality, name='conv2')(y)
    y = self.norm(name='bn2')(y, train)
    y = HookPoint(name='relu2')(self.act(y))
    y = self.conv(self.outputs, 1, name='conv3')(y)
    y = self.norm(name='bn3', scale_init=self.last_scale_init())(y, train)
    return HookPoint(name='relu3')(self.act(y + self.skip(x, train)))


BLOCKS = {'basic': BasicBlock, 'bottleneck': Bottleneck}


class ResNet(nn.Module):
  """A residual network over float images `[batch, height, width, channels]`.

  Stem, stages `layer1_0, layer1_1, ..., layer2_0, ...`, global average `avgpool`, classifier `fc`. ReLUs
  have hook points `relu`, `layer1_0/relu1`, ... Convolutions have no bias and pad symmetrically.
  Collections: `params`, `batch_stats`.

  Attributes:
    stage_sizes: number of blocks of each stage.
    block: `'basic'`, `'bottleneck'`, or a block class with the fields of these.
    width: channels of the stem.
    widths: channels of the stages before a bottleneck's expansion; None doubles from `width`.
    trunk_widths: channels of each stage's outputs; None: `widths`, times 4 with bottlenecks. With the next
      two what is left of a pruned network (`jaxlab.compression`).
    inner_widths: output channels of each block's convolutions but the last, blocks in order: `(c,)` of a
      basic block, `(c1, c2)` of a bottleneck; None: as `widths` say.
    projections: whether the first block of each stage has a projection on its shortcut; None: where the shape
      changes.
    strides: stride of each stage (surplus entries are ignored).
    stem: `'imagenet'` (7x7, stride 2, then max-pooling 3x3, stride 2), `'deep'` (three 3x3 in place of the
      7x7, with half the channels in between: `conv1_0`, `conv1_3`, `conv1_6`), `'cifar'` (3x3, stride 1) or
      `'identity'`: the first block sees the image.
    num_classes: size of the classifier `fc`; None returns the pooled features.
    zero_init_residual: start the last norm's scale of each block at 0 (Goyal et al. 2017).
    shortcut: `'projection'`; `'average'` (with a deep stem, ResNet-D of He et al. 2019, arXiv 1812.01187); or
      `'pad'` for option A of the CIFAR networks of depth 20 to 110.
    norm_groups: groups of the batch with separate statistics, see `BatchNorm`.
    cardinality: groups of the bottlenecks' 3x3 convolutions (ResNeXt).
    base_width: channels of one of these groups in the first stage.
    activation: `'relu'`, or `'sigmoid'` or `'arctan'`, for studies; its hook points are called `relu` all the
      same.
    conv_init: initializer of convolutions.
    fc_init: initializer of the classifier's kernel.
    dtype: of the computation (parameters and statistics stay float32); None: as the input.
    remat: recompute each block's activations in the backward pass instead of storing them.

  Raises:
    ValueError: at construction, if a field is out of its range.
  """

  stage_sizes: Sequence[int]
  block: str | Any = 'basic'
  width: int = 64
  widths: Sequence[int] | None = None
  trunk_widths: Sequence[int] | None = None
  inner_widths: Sequence[Sequence[int]] | None = None
  projections: Sequence[bool] | None = None
  strides: Sequence[int] = (1, 2, 2, 2)
  stem: str = 'imagenet'
  num_classes: int | None = None
  zero_init_residual: bool = False
  shortcut: str = 'projection'
  norm_groups: int = 1
  cardinality: int = 1
  base_width: int = 64
  activation: str = 'relu'
  conv_init: Initializer = kaiming_normal_fan_out
  fc_init: Initializer = torch_default
  dtype: Any = None
  remat: bool = False

  def __post_init__(self):
    stages = len(self.stage_sizes)
    for name, allowed in (
      ('stem', ('imagenet', 'deep', 'cifar', 'identity')),
      ('activation', tuple(ACTIVATIONS)),
      ('shortcut', ('projection', 'average', 'pad')),
      *((('block', tuple(BLOCKS)),) if isinstance(self.block, str) else ()),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(f'ResNet: {name}={getattr(self, name)!r} is none of {allowed}.')
    if len(self.strides) < stages or (self.widths and len(self.widths) != stages):
      raise ValueError(
        f'ResNet: {stages} stages need as many widths and strides; got widths={self.widths}, '
        f'strides={self.strides}.'
      )
    for name, count in (
      ('trunk_widths', stages),
      ('projections', stages),
      ('inner_widths', sum(self.stage_sizes)),
    ):
      own = getattr(self, name)
      if own is not None and len(own) != count:
        raise ValueError(f'ResNet: {name} needs {count} entries, got {own}.')
    if self.shortcut == 'average' and set(self.strides[:stages]) - {1, 2}:
      raise ValueError(f"ResNet: shortcut='average' has strides of 1 and 2, got {self.strides}.")
    if self.num_classes is not None and self.num_classes < 1:
      raise ValueError(f'ResNet: num_classes={self.num_classes}; give None for pooled features.')
    super().__post_init__()

  @property
  def block_class(self) -> type[nn.Module]:
    """The class of the blocks."""
    return BLOCKS[self.block] if isinstance(self.block, str) else self.block

  @property
  def stage_widths(self) -> tuple[int, ...]:
    """Channels of each stage's outputs."""
    if self.trunk_widths:
      return tuple(self.trunk_widths)
    widths = self.widths or [self.width * 2**stage for stage in range(len(self.stage_sizes))]
    return tuple(features * self.block_class.expansion for features in widths)

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns logits `[batch, num_classes]`, or features `[batch, channels]` without classifier."""
    check_images(x)
    conv = functools.partial(square_conv, kernel_init=self.conv_init, dtype=self.dtype)
    norm = functools.partial(BatchNorm, groups=self.norm_groups, dtype=self.dtype)
    act = ACTIVATIONS[self.activation]
    if self.stem == 'deep':
      for index in (0, 3):
        x = conv(self.width // 2, 3, 1 if index else 2, name=f'conv1_{index}')(x)
        x = norm(name=f'conv1_{index + 1}')(x, train)
        x = HookPoint(name=f'conv1_{index + 2}')(act(x))
      x = conv(self.width, 3, name='conv1_6')(x)
    elif self.stem != 'identity':
      kernel_size, stride = (7, 2) if self.stem == 'imagenet' else (3, 1)
      x = conv(self.width, kernel_size, stride, name='conv1')(x)
    if self.stem != 'identity':
      x = HookPoint(name='relu')(act(norm(name='bn1')(x, train)))
    if self.stem in ('imagenet', 'deep'):
      x = HookPoint(name='maxpool')(nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))))

    block = self.block_class
    if self.remat:
      block = nn.remat(block, static_argnums=(2,))
    widths = self.widths or [self.width * 2**stage for stage in range(len(self.stage_sizes))]
    inner = iter(self.inner_widths or [None] * sum(self.stage_sizes))
    for stage, size in enumerate(self.stage_sizes):
      for index in range(size):
        x = block(
          features=widths[stage],
          stride=self.strides[stage] if index == 0 else 1,
          shortcut=self.shortcut,
          zero_init_residual=self.zero_init_residual,
          cardinality=self.cardinality,
          base_width=self.base_width,
          activation=self.activation,
          conv=conv,
          norm=norm,
          inner=next(inner),
          outer=self.trunk_widths and self.trunk_widths[stage],
          project=self.projections and (index == 0 and self.projections[stage]),
          name=f'layer{stage + 1}_{index}',
        )(x, train)
    x = HookPoint(name='avgpool')(jnp.mean(x, (1, 2)))
    if self.num_classes is None:
      return x
    bias_init = torch_default_bias(x.shape[-1])
    fc = nn.Dense(
      self.num_classes, kernel_init=self.fc_init, bias_init=bias_init, dtype=self.dtype, name='fc'
    )
    return fc(x)


def check_images(x: Array) -> None:
  """Raises ValueError unless `x` is a float array `[batch, height, width, channels]`."""
  if x.ndim != 4:
    raise ValueError(f'Images must be [batch, height, width, channels]; got shape {x.shape}.')
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(
      f'Images must be normalized floats; got {x.dtype}. Convert and normalize first.'
    )
