"""DenseNet (Huang et al. 2017, arXiv 1608.06993).

Modules are named as in timm and torchvision, `features.denseblock1.denselayer2.conv1` as
`denseblock1/denselayer2/conv1`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxlab.models.initializers import kaiming_normal_fan_in, torch_default
from jaxlab.models.intercept import HookPoint
from jaxlab.models.normalization import BatchNorm
from jaxlab.models.resnet import check_images, square_conv

Array = jax.Array


class DenseLayer(nn.Module):
  """A pre-activation bottleneck whose `growth` new channels are appended to its input's.

  `concat(x, conv2(relu2(norm2(conv1(relu1(norm1(x)))))))`, with a 1x1 and a 3x3 convolution.

  Attributes:
    growth: number of new channels.
    bottleneck: channels between the convolutions over `growth`.
    conv: `conv(features, kernel_size, name=...)` makes a convolution.
    norm: `norm(name=...)` makes a norm.
  """

  growth: int
  bottleneck: int = 4
  conv: Callable[..., nn.Module] = square_conv
  norm: Callable[..., nn.Module] = BatchNorm

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[batch, height, width, channels]` to `[batch, height, width, channels + growth]`."""
    y = HookPoint(name='relu1')(nn.relu(self.norm(name='norm1')(x, train)))
    y = self.conv(self.bottleneck * self.growth, 1, name='conv1')(y)
    y = HookPoint(name='relu2')(nn.relu(self.norm(name='norm2')(y, train)))
    return jnp.concatenate([x, self.conv(self.growth, 3, name='conv2')(y)], axis=-1)


class DenseBlock(nn.Module):
  """Layers `denselayer1, denselayer2, ...`; see `DenseNet` for the attributes."""

  size: int
  growth: int
  bottleneck: int
  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]
  remat: bool = False

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[..., channels]` to `[..., channels + size * growth]`."""
    layer = nn.remat(DenseLayer, static_argnums=(2,)) if self.remat else DenseLayer
    for index in range(self.size):
      own = layer(self.growth, self.bottleneck, self.conv, self.norm, name=f'denselayer{index + 1}')
      x = own(x, train)
    return x


class Transition(nn.Module):
  """`norm`, ReLU, a 1x1 convolution `conv` to half the channels, and the average of each 2x2 window."""

  conv: Callable[..., nn.Module]
  norm: Callable[..., nn.Module]

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Maps `[batch, height, width, channels]` to half the size, rounded down, and half the channels."""
    y = HookPoint(name='relu')(nn.relu(self.norm(name='norm')(x, train)))
    y = self.conv(x.shape[-1] // 2, 1, name='conv')(y)
    return HookPoint(name='pool')(nn.avg_pool(y, (2, 2), (2, 2)))


class DenseNet(nn.Module):
  """A densely connected network over float images `[batch, height, width, channels]`.

  `conv0` (7x7, stride 2), `norm0`, `relu0`, `pool0` (3x3, stride 2); `denseblock1, transition1, ...`;
  `norm5`, `relu5`; global average `avgpool`; `classifier`. Convolutions have no bias. Collections: `params`,
  `batch_stats`.

  Attributes:
    block_sizes: number of layers of each dense block.
    growth: channels that each layer adds.
    stem_width: channels of `conv0`.
    bottleneck: channels within a layer over `growth`.
    num_classes: size of the classifier; None returns the pooled features.
    norm_groups: groups of the batch with separate statistics, see `BatchNorm`.
    dtype: of the computation (parameters and statistics stay float32); None: as the input.
    remat: recompute each layer's activations in the backward pass instead of storing them.

  Raises:
    ValueError: at construction, if `num_classes` is not positive; when called, for images that leave nothing
      to the last block (with four blocks, of less than 29 pixels a side).
  """

  block_sizes: Sequence[int] = (6, 12, 24, 16)
  growth: int = 32
  stem_width: int = 64
  bottleneck: int = 4
  num_classes: int | None = None
  norm_groups: int = 1
  dtype: Any = None
  remat: bool = False

  def __post_init__(self):
    if self.num_classes is not None and self.num_classes < 1:
      raise ValueError(f'DenseNet: num_classes={self.num_classes}; give None for pooled features.')
    super().__post_init__()

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    """Returns logits `[batch, num_classes]`, or features `[batch, channels]` without classifier."""
    check_images(x)
    smallest = 4 * 2 ** (len(self.block_sizes) - 1) - 3
    if min(x.shape[1:3]) < smallest:
      raise ValueError(
        f'DenseNet: images of {x.shape[1]} x {x.shape[2]} pixels leave nothing to the last of '
        f'{len(self.block_sizes)} blocks; give at least {smallest}.'
      )
    conv = functools.partial(square_conv, kernel_init=kaiming_normal_fan_in, dtype=self.dtype)
    norm = functools.partial(BatchNorm, groups=self.norm_groups, dtype=self.dtype)
    x = norm(name='norm0')(conv(self.stem_width, 7, 2, name='conv0')(x), train)
    x = HookPoint(name='relu0')(nn.relu(x))
    x = HookPoint(name='pool0')(nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))))
    for index, size in enumerate(self.block_sizes):
      block = DenseBlock(
        size,
        self.growth,
        self.bottleneck,
        conv,
        norm,
        self.remat,
        name=f'denseblock{index + 1}',
      )
      x = block(x, train)
      if index + 1 < len(self.block_sizes):
        x = Transition(conv, norm, name=f'transition{index + 1}')(x, train)
    x = HookPoint(name='relu5')(nn.relu(norm(name='norm5')(x, train)))
    x = HookPoint(name='avgpool')(jnp.mean(x, (1, 2)))
    if self.num_classes is None:
      return x
    dense = nn.Dense(
      self.num_classes, kernel_init=torch_default, dtype=self.dtype, name='classifier'
    )
    return dense(x)
